#!/bin/sh
# The architecture's invariants, stated as absences: which crate must not know which. ARCHITECTURE.md says why.
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

refuse() {
    how=$1
    shift
    for name in "$@"; do
        if printf '%s\n' "$tree" | tail -n +2 | grep -q "^$name v"; then
            echo "architecture: $crate $how $name" >&2
            bad=1
        fi
    done
}

# wire: shapes only, no I/O.
not_below wire tokio mio rumqttc lapin tokio-postgres axum service ingest consumers simulators playground tier0
# amqp: a connection and its queues; no message, no table.
not_below amqp tokio-postgres ingest consumers simulators playground tier0
# service: what every process has; no domain.
not_below service wire amqp ingest consumers simulators playground tier0 rumqttc lapin tokio-postgres
# ingest: a message in, a committed row out; knows no broker, no simulator.
not_below ingest amqp rumqttc lapin consumers simulators playground tier0
not_direct ingest axum clap
# consumers: a broker's delivery and its acknowledgement; no SQL of their own.
not_direct consumers tokio-postgres deadpool-postgres refinery
not_below consumers simulators playground tier0
# simulators: publish and remember; never see the database.
not_below simulators tokio-postgres deadpool-postgres ingest consumers playground tier0
# failover: regions and servers; knows no telemetry (of wire it takes the settings of a Postgres session), and production code
# never the playground.
not_below failover rumqttc lapin ingest consumers simulators playground tier0

# A merge that was not finished.
if git grep -nE '^(<<<<<<<|>>>>>>>) ' -- . >&2; then
    echo "architecture: conflict markers" >&2
    bad=1
fi

[ "$bad" -eq 0 ] && echo "architecture: all invariants hold"
exit "$bad"
