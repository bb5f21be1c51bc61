#!/bin/sh
# Postgres nodes as docker-compose.yml starts them, without Docker: config/postgres/start-node.sh with the real agents and
# orchestrator. A cluster is made once; the second node is cloned; each role may do what is its own; a planned failover;
# a first node that lost its data is cloned and makes no second cluster. Programs: target/debug or TIER0_PROGRAMS.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
programs=${TIER0_PROGRAMS:-$root/target/debug}
bin=$(ls -d /usr/lib/postgresql/*/bin | tail -1)
dir=$(mktemp -d /var/tmp/tier0-regions-XXXXXX)
pids=
tidy() {
    for pid in $pids; do kill "$pid" 2>/dev/null || true; done
    for pid in $pids; do wait "$pid" 2>/dev/null || true; done
    [ -n "${TIER0_KEEP:-}" ] && echo "regions: kept $dir" || rm -rf "$dir"
}
trap tidy EXIT
trap 'exit 130' INT TERM
fail() {
    echo "regions: $1" >&2
    tail -n 15 "$dir"/*.log >&2
    exit 1
}
say() { echo "  $1"; }

.ci/free-ports.py 5 >"$dir/ports"
read -r pg1 pg2 agent1 agent2 api <"$dir/ports"
config/compose/make-secrets.py --root "$dir"
mkdir "$dir/etc" "$dir/log" "$dir/region1" "$dir/region2" "$dir/orchestrator"
cp config/postgres/* "$dir/etc"
sed "s|/etc/tier0/postgres|$dir/etc|; s|/var/log/tier0|$dir/log|" config/compose/postgres.conf >"$dir/etc/node.conf"
echo "shared_buffers = 128MB" >>"$dir/etc/node.conf"
# Postgres refuses root: then its account does all of this. In a container the account is the only one there is.
as=
if [ "$(id -u)" -eq 0 ]; then
    as="setpriv --reuid=postgres --regid=postgres --init-groups"
    cp "$programs/region-agent" "$programs/failover-orchestrator" "$dir/"
    programs=$dir
    chmod 755 "$dir" "$dir/etc"
    chmod 644 "$dir"/etc/*
    chmod 755 "$dir/etc/start-node.sh"
    chown -R postgres "$dir/secrets" "$dir/log" "$dir/region1" "$dir/region2" "$dir/orchestrator"
fi

node() { # NUMBER PORT AGENT_PORT [VARIABLE=VALUE..]
    number=$1 port=$2 agent=$3
    shift 3
    env -i PATH="$programs:$PATH" TIER0__LOG__FORMAT=json TIER0__HTTP__PORT="$agent" \
        TIER0__REGION_AGENT__NODE="region$number" TIER0__REGION_AGENT__PORT="$port" TIER0__REGION_AGENT__BIN="$bin" \
        TIER0__REGION_AGENT__DATA="$dir/region$number/data" TIER0__REGION_AGENT__STATE="$dir/region$number/agent" \
        TIER0__REGION_AGENT__POSTGRES_LOG="$dir/log/region$number.log" \
        TIER0__REGION_AGENT__PASSWORD_FILE="$dir/secrets/postgres_password" \
        TIER0__REGION_AGENT__REPLICATION_PASSWORD_FILE="$dir/secrets/replicator_password" \
        TIER0__REGION_AGENT__TOKEN_FILE="$dir/secrets/agent_token" \
        TIER0_ORCHESTRATOR_DIR="$dir/orchestrator" TIER0_POSTGRES_CONF="$dir/etc/node.conf" \
        TIER0_POSTGRES_HBA="$dir/etc/pg_hba.network.conf" TIER0_ROLES_SQL="$dir/etc/roles.sql" \
        TIER0_OWNER_PASSWORD_FILE="$dir/secrets/owner_password" TIER0_WRITER_PASSWORD_FILE="$dir/secrets/writer_password" \
        TIER0_READER_PASSWORD_FILE="$dir/secrets/reader_password" TIER0_MONITOR_PASSWORD_FILE="$dir/secrets/monitor_password" \
        "$@" $as "$dir/etc/start-node.sh" >>"$dir/node$number.log" 2>&1 &
    pids="$pids $!"
    eval "node$number=$!"
}
status() { curl -sS --noproxy '*' --max-time 5 "http://127.0.0.1:$api/status" 2>/dev/null || true; }
# Both nodes hold everything, and REGION leads.
whole() {
    tries=0
    until status | grep -q "\"current_region\":\"$1\".*\"sync_set\":\[\"region[12]\"\].*\"streaming\":true.*\"failover_under_way\":false"; do
        for pid in $pids; do kill -0 "$pid" 2>/dev/null || fail "a process ended"; done
        [ $((tries += 1)) -lt 1200 ] || fail "not whole under $1 after two minutes: $(status)"
        sleep 0.1
    done
}
order() { # REGION -> the answer
    curl -sS --noproxy '*' --max-time 180 -X POST -H "Authorization: Bearer $(cat "$dir/secrets/orchestrator_token")" \
        "http://127.0.0.1:$api/failover/$1"
}

node 1 "$pg1" "$agent1" TIER0_FIRST_NODE=yes
node 2 "$pg2" "$agent2"
env -i PATH="$PATH" TIER0__HTTP__PORT="$api" TIER0__ORCHESTRATOR__DIR="$dir/orchestrator" \
    TIER0__ORCHESTRATOR__NODES="region1=127.0.0.1:$pg1/127.0.0.1:$agent1,region2=127.0.0.1:$pg2/127.0.0.1:$agent2" \
    TIER0__ORCHESTRATOR__TOKEN_FILE="$dir/secrets/orchestrator_token" TIER0__ORCHESTRATOR__AGENT_TOKEN_FILE="$dir/secrets/agent_token" \
    TIER0__ORCHESTRATOR__MONITOR_PASSWORD_FILE="$dir/secrets/monitor_password" \
    $as "$programs/failover-orchestrator" >>"$dir/orchestrator.log" 2>&1 &
pids="$pids $!"
whole region1
say "a cluster is made on region1, region2 is cloned from it and synchronous"

sql() { # USER PASSWORD DATABASE STATEMENT
    PGPASSWORD=$(cat "$dir/secrets/$2_password") PGCONNECT_TIMEOUT=30 "$bin/psql" -h 127.0.0.1 -p "${port:-$pg1}" -U "$1" -d "$3" -XAtqc "$4" 2>&1
}
port=$pg1
may() { out=$(sql "$@") || fail "$1 may not: $4: $out"; }
may_not() {
    ! out=$(sql "$@") || fail "$1 may: $4"
    case $out in
        *"permission denied"* | *"must be owner"* | *"must be superuser"* | *"read-only transaction"* | *"pg_hba.conf"*) ;;
        *) fail "$1: $4: refused for another reason: $out" ;;
    esac
}
for file in ingest/migrations/V*.sql; do may tier0 owner tier0_db "$(cat "$file")"; done
row="INSERT INTO site_activity VALUES ('a', now(), '{}')"
letter="INSERT INTO dead_letters (received_at, source, topic, reason, error, payload) VALUES (now(), 's', 't', 'not_json', 'e', '')"
may tier0 owner tier0_db "CREATE TABLE p (LIKE sites); DROP TABLE p; $row; $letter"
may writer writer tier0_db "$row; UPDATE site_activity SET metrics = '{}'; CREATE TEMP TABLE t (LIKE user_sessions); $letter"
may_not writer writer tier0_db "DELETE FROM site_activity"
may_not writer writer tier0_db "TRUNCATE site_activity"
may_not writer writer tier0_db "CREATE TABLE p (a int)"
may_not writer writer tier0_db "DROP TABLE sites"
may_not writer writer postgres "SELECT 1"
may reader reader tier0_db "SELECT count(*) FROM site_activity"
may_not reader reader tier0_db "SET default_transaction_read_only = off; COMMIT; $row"
may monitor monitor tier0_db "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
may monitor monitor postgres "SELECT 1"
may_not monitor monitor tier0_db "SELECT count(*) FROM site_activity"
may_not replicator replicator tier0_db "SELECT 1"
may_not tier0 owner tier0_db "CREATE ROLE other SUPERUSER"
may_not tier0 owner postgres "SELECT 1"
outside=$(hostname -I | cut -d' ' -f1)
if [ -n "$outside" ]; then
    out=$(PGPASSWORD=$(cat "$dir/secrets/postgres_password") PGCONNECT_TIMEOUT=30 "$bin/psql" -h "$outside" -p "$pg1" -U postgres -d postgres -XAtqc "SELECT 1" 2>&1) &&
        fail "the superuser comes in over the network"
    case $out in *"pg_hba.conf rejects"*) ;; *) fail "the superuser, over the network: $out" ;; esac
fi
scram=$(sql postgres postgres postgres "SELECT count(*) FROM pg_authid WHERE rolcanlogin AND rolpassword NOT LIKE 'SCRAM-SHA-256%'")
[ "$scram" = 0 ] || fail "$scram roles without a SCRAM password"
say "every role may do what is its own and nothing else"

answer=$(order region2)
echo "$answer" | grep -q '"success":true' || fail "the failover to region2: $answer"
whole region2
say "a planned failover to region2, and region1 is its standby"

before=$(sed -n 's/.*"system_id": *"\([0-9]*\)".*/\1/p' "$dir/orchestrator/state.json")
kill "$node1"
wait "$node1" 2>/dev/null || true
pids=$(echo "$pids" | sed "s/ $node1\b//")
rm -rf "$dir/region1/data" "$dir/region1/agent"
node 1 "$pg1" "$agent1" TIER0_FIRST_NODE=yes
# Its answer says that it has been cloned; what the status says may be of before.
port=$pg1
tries=0
until count=$(sql reader reader tier0_db "SELECT count(*) FROM site_activity"); do
    [ $((tries += 1)) -lt 1200 ] || fail "region1 is not there after two minutes: $count"
    sleep 0.1
done
[ "$count" = 2 ] || fail "region1 has $count rows after its clone, not 2"
whole region2
after=$("$bin/pg_controldata" -D "$dir/region1/data" | sed -n 's/^Database system identifier: *//p')
[ "$before" = "$after" ] || fail "region1 made a cluster of its own: $after, not $before"
say "region1 without its data is cloned again"
echo "regions: nodes start as a deployment starts them"
