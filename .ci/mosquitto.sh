#!/bin/sh
# The broker's production configuration, proved on a real Mosquitto (MQTT 5, which has a word for "refused"): who may
# publish and read what. config/mosquitto/production.conf as it is, only paths and ports moved, with passwords by make secrets.
set -eu
cd "$(dirname "$0")/.."
for program in mosquitto mosquitto_pub mosquitto_sub openssl; do
    PATH=$PATH:/usr/sbin command -v "$program" >/dev/null || { echo "mosquitto: $program is missing (make install)" >&2; exit 1; }
done
PATH=$PATH:/usr/sbin
dir=$(mktemp -d)
broker=
listening=
tidy() {
    for pid in $listening; do kill "$pid" 2>/dev/null || true; done
    [ -z "$broker" ] || kill "$broker" 2>/dev/null || true
    [ -z "$broker" ] || wait "$broker" 2>/dev/null || true
    rm -rf "$dir"
}
trap tidy EXIT
trap 'exit 130' INT TERM
fail() {
    echo "mosquitto: $1" >&2
    tail -30 "$dir/log" >&2
    exit 1
}

.ci/free-ports.py 3 >"$dir/ports"
read -r devices inside tls <"$dir/ports"
mkdir -p "$dir/config/base.d" "$dir/data" "$dir/certs"
config/compose/make-secrets.py --root "$dir" --simulators
for device in TURB-00001 TURB-00002; do
    config/compose/make-secrets.py --root "$dir" --device "$device" | sed -n 's/^password //p' >"$dir/secrets/$device"
done
cp config/mosquitto/acl "$dir/config/acl"
openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost \
    -keyout "$dir/certs/server.key" -out "$dir/certs/server.crt" 2>/dev/null
cp "$dir/certs/server.crt" "$dir/certs/ca.crt"
moved() {
    sed -e "s|/mosquitto/secrets/|@|; s|/mosquitto/|$dir/|; s|@|$dir/secrets/mosquitto/|" -e "s|^listener 1883$|listener $devices 127.0.0.1|" \
        -e "s|^listener 1884$|listener $inside 127.0.0.1|" -e "s|^listener 8883$|listener $tls 127.0.0.1|" "$1"
}
moved config/mosquitto/production.conf >"$dir/config/production.conf"
moved config/mosquitto/tls.conf >"$dir/config/base.d/tls.conf"
cp config/mosquitto/mosquitto.conf "$dir/config/base.d/mosquitto.conf"
# Root would change to user mosquitto, which cannot read our directory.
[ "$(id -u)" -ne 0 ] || echo "user root" >>"$dir/config/production.conf"
grep -q "^listener $tls" "$dir/config/base.d/tls.conf" || fail "the configuration has no listener to move"

mosquitto -c "$dir/config/production.conf" >"$dir/log" 2>&1 &
broker=$!

secret() { cat "$dir/secrets/$1"; }
as() { # PORT USER PASSWORD: options of a client
    printf '%s\n' -V 5 -h 127.0.0.1 -p "$1" -u "$2" -P "$3"
}
consumer() { as "$inside" consumer "$(secret mqtt_consumer_password)"; }
# publish WHO.. TOPIC -> "sent", "refused" (the broker's 0x87) or "turned away" (not let in)
publish() {
    topic=$1
    shift
    if ! mosquitto_pub "$@" -q 1 -t "$topic" -m "{\"n\":$((n += 1))}" >"$dir/said" 2>&1; then
        grep -q "Not authorized\|not authorised" "$dir/said" && { echo "turned away"; return; }
        echo "failed: $(cat "$dir/said")"
    elif grep -q "Not authorized" "$dir/said"; then
        echo refused
    else
        echo sent
    fi
}
n=0
expect() { # WHAT WANTED GOT
    [ "$2" = "$3" ] || fail "$1: expected $2, got $3"
    echo "  $1: $3"
}

tries=0
until mosquitto_pub $(consumer) -q 1 -t tier0/leave/probe -m up >/dev/null 2>&1; do
    kill -0 "$broker" 2>/dev/null || fail "the broker ended"
    [ $((tries += 1)) -lt 1200 ] || fail "the broker does not answer"
    sleep 0.1
done

one=$(as "$devices" TURB-00001 "$(secret TURB-00001)")
# The consumer's session, with a shared subscription as consumers have it; from here on the broker keeps what comes.
mosquitto_sub $(consumer) -i tier0-mqtt-consumer -c -x 600 -q 1 -E -t '$share/ingest/og/field/#' >/dev/null
own=og/field/TX-EAGLE/turbine/TURB-00001
other=og/field/TX-EAGLE/turbine/TURB-00002

expect "a device under its own topic" sent "$(publish $own $one)"
expect "a device under another's topic" refused "$(publish $other $one)"
expect "a device below its own topic" refused "$(publish $own/more $one)"
expect "a device elsewhere" refused "$(publish tier0/leave/tier0-mqtt-consumer $one)"
expect "a device with a wrong password" "turned away" "$(publish $own $(as "$devices" TURB-00001 wrong))"
expect "a device with another's password" "turned away" "$(publish $own $(as "$devices" TURB-00001 "$(secret TURB-00002)"))"
expect "somebody without a name" "turned away" "$(publish $own -V 5 -h 127.0.0.1 -p "$devices")"
expect "somebody without a name, inside" "turned away" "$(publish $own -V 5 -h 127.0.0.1 -p "$inside")"
expect "the consumer as a device" refused "$(publish $own $(consumer))"
expect "the consumer's marker" sent "$(publish tier0/leave/tier0-mqtt-consumer $(consumer))"
expect "the simulator, for all devices" sent "$(publish $other $(as "$inside" simulator "$(secret mqtt_simulator_password)"))"
expect "a device over TLS" sent \
    "$(publish $own -V 5 -h localhost -p "$tls" --cafile "$dir/certs/ca.crt" -u TURB-00001 -P "$(secret TURB-00001)")"
expect "a device over TLS, another's topic" refused \
    "$(publish $other -V 5 -h localhost -p "$tls" --cafile "$dir/certs/ca.crt" -u TURB-00001 -P "$(secret TURB-00001)")"

# With the consumer's client id a device would throw away what waits for it; the broker gives it its own instead.
expect "a device with the consumer's client id" sent "$(publish $own $one -i tier0-mqtt-consumer)"
kept=$(mosquitto_sub $(consumer) -i tier0-mqtt-consumer -c -x 600 -q 1 -C 4 -W 120 -F %t -t '$share/ingest/og/field/#' | sort | uniq -c | tr -s ' \n' ' ')
expect "what the consumer's session kept" " 3 $own 1 $other " "$kept"

# Subscriptions are accepted; nothing comes. A device listens beside the consumer, to the same messages, and for as long.
heard() { # FILE TOPIC WHO..
    file=$1 wanted=$2
    shift 2
    exec mosquitto_sub "$@" -q 1 -W 120 -F %t -t "$wanted" >"$dir/$file" 2>"$dir/$file.err"
}
heard device '#' $one -t 'og/field/#' -t '$SYS/#' &
listening=$!
heard inside '#' $(consumer) -t 'og/field/#' -t '$SYS/#' &
listening="$listening $!"
heard monitor '$SYS/broker/version' $(as "$inside" monitor "$(sed -n 's/^MQTT_MONITOR_PASSWORD=//p' "$dir/.env")") -t 'og/field/#' &
listening="$listening $!"
# Sent until the consumer has heard one, and the monitor what is its own; then some more time for the device to hear it too.
tries=0
until grep -q "$other" "$dir/inside" 2>/dev/null && [ -s "$dir/monitor" ]; do
    [ $((tries += 1)) -lt 600 ] || fail "the consumer or the monitor hears nothing"
    publish $other $(as "$inside" simulator "$(secret mqtt_simulator_password)") >/dev/null
    sleep 0.1
done
sleep 2
publish $other $(as "$inside" simulator "$(secret mqtt_simulator_password)") >/dev/null
sleep 1
for pid in $listening; do
    kill "$pid" 2>/dev/null || true
    wait "$pid" || true
done
listening=
expect "what a device hears" "" "$(cat "$dir/device")"
expect "what the consumer hears" "$other" "$(sort -u "$dir/inside")"
expect "what the monitor hears" '$SYS/broker/version' "$(sort -u "$dir/monitor")"
echo "mosquitto: the production configuration lets everybody do what is theirs and nothing else"
