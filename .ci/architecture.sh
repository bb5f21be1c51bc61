#!/bin/sh
# What each room must not know of, by the table in ARCHITECTURE.md; each line is one row. --self-test: that each kind of rule can fail.
set -eu
cd "$(dirname "$0")/.."
bad=0

# not_below CRATE NAME..: no normal dependency at any depth.
not_below() {
    crate=$1
    shift
    tree=$(cargo tree --locked --quiet --package "$crate" --edges normal --prefix none)
    refuse "depends on" "$@"
}

# not_direct CRATE NAME..: no normal dependency of its own.
not_direct() {
    crate=$1
    shift
    tree=$(cargo tree --locked --quiet --package "$crate" --edges normal --prefix none --depth 1)
    refuse "names" "$@"
}

# not_in_tests CRATE NAME..: its tests are built without these too.
not_in_tests() {
    crate=$1
    shift
    tree=$(cargo tree --locked --quiet --package "$crate" --edges normal,dev --prefix none)
    refuse "or a test of it depends on" "$@"
}

refuse() {
    how=$1
    shift
    for name in "$@"; do
        if printf '%s\n' "$tree" | tail -n +2 | grep -q "^$name v"; then
            fail "$crate $how $name"
        fi
    done
}

# at_most CRATE NUMBER: distinct crates that it and its tests are built with.
at_most() {
    count=$(cargo tree --locked --quiet --package "$1" --edges normal,dev --prefix none | cut -d' ' -f1,2 | sort -u | wc -l)
    [ "$count" -le "$2" ] || fail "$1 and its tests are built with $count crates, more than $2"
}

# pure FILE..: neither clock nor disk nor network, outside of its tests.
pure() {
    for file in "$@"; do
        if sed '/^mod tests {/,$d' "$file" | grep -nE '\btokio\b|::now\(|std::(fs|net|thread)|SystemTime' | grep -v '^[0-9]*: *//' >&2; then
            fail "$file is to decide, not to look"
        fi
    done
}

fail() {
    echo "architecture: $*" >&2
    bad=1
}

if [ "${1:-}" = --self-test ]; then
    # Each kind of rule, on something that is so: it has to find it.
    tried() {
        bad=0
        "$@" 2>/dev/null
        [ "$bad" -eq 1 ] || { echo "architecture: '$*' found nothing, and should have" >&2; exit 1; }
    }
    tried not_below consumers ingest
    tried not_direct consumers ingest
    tried not_in_tests ingest playground
    tried at_most wire 1
    tried pure failover/src/operation.rs
    echo "architecture: each kind of rule can fail"
    exit 0
fi

products="ingest consumers simulators failover tier0"
brokers="rumqttc lapin"
# shellcheck disable=SC2086 # lists of names
{
# crates/: one concern each.
not_below wire tokio mio $brokers tokio-postgres axum service amqp playground $products
not_below service wire amqp failover-api $brokers tokio-postgres playground $products
not_below amqp rumqttc tokio-postgres playground $products
not_below failover-api tokio $brokers tokio-postgres axum service wire amqp playground $products
# ingest: a message in, a committed row out; knows no broker, no simulator.
not_below ingest amqp $brokers consumers simulators failover playground tier0
not_direct ingest axum clap
not_in_tests ingest consumers simulators failover tier0
at_most ingest 250
# consumers: a broker's delivery and its acknowledgement; no SQL of their own.
not_direct consumers tokio-postgres deadpool-postgres refinery
not_below consumers simulators failover playground tier0
not_in_tests consumers simulators failover tier0
# simulators: publish and remember; never see the database.
not_below simulators tokio-postgres deadpool-postgres ingest consumers failover playground tier0
not_in_tests simulators ingest consumers failover tier0
# failover: regions and servers; of wire it takes the settings of a Postgres session.
not_below failover $brokers ingest consumers simulators playground tier0
# playground: servers; no product below it, so that no crate's tests are built with another product.
not_below playground $products
}
# What decides takes the time as an argument.
pure failover/src/decide.rs failover/src/view.rs failover/src/state.rs failover/src/journal.rs failover/src/upkeep.rs failover/src/explain.rs

.ci/circles.py || bad=1

# A merge that was not finished.
if git grep -nE '^(<<<<<<<|>>>>>>>) ' -- . >&2; then
    fail "conflict markers"
fi

[ "$bad" -eq 0 ] && echo "architecture: all invariants hold"
exit "$bad"
