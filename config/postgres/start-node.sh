#!/bin/sh
# Starts a Postgres node: its data if there is none yet, then the region-agent in this process' place, which becomes
# Postgres' parent. Reads the agent's own settings (TIER0__REGION_AGENT__..), which must come by the environment.
#
#   TIER0_FIRST_NODE=yes    this node makes the cluster at the very first start; the others are cloned from it
#   TIER0_ORCHESTRATOR_DIR  where the orchestrator's state would be: once it is there, nobody makes a cluster any more, and a
#                           first node that lost its data is cloned like every other
#   TIER0_POSTGRES_CONF, TIER0_POSTGRES_HBA, TIER0_ROLES_SQL, TIER0_*_PASSWORD_FILE   what a new cluster is made of
set -eu
umask 077
data=$TIER0__REGION_AGENT__DATA
bin=${TIER0__REGION_AGENT__BIN:-/usr/lib/postgresql/15/bin}
port=$TIER0__REGION_AGENT__PORT

# Prints a secret of ours: hexadecimal or the like, so that nothing needs quoting.
secret() {
    read -r word <"$1" || [ -n "$word" ]
    case $word in
        "" | *[!A-Za-z0-9_-]*) echo "$1: letters, digits, _ and - are wanted" >&2; exit 78 ;;
    esac
    printf '%s' "$word"
}

make_cluster() {
    new=$data.new
    rm -rf "$new"
    echo "making a new cluster in $data"
    # Small segments: a promotion copies one and fills another before anybody can write.
    "$bin/initdb" --wal-segsize=4 --pgdata="$new" --username=postgres --pwfile="$TIER0__REGION_AGENT__PASSWORD_FILE" \
        --auth=scram-sha-256 --encoding=UTF8 --locale=C.UTF-8 --data-checksums
    # Both stay outside: a clone brings these two lines along and reads the files of its own machine.
    {
        echo "include '$TIER0_POSTGRES_CONF'"
        echo "hba_file = '$TIER0_POSTGRES_HBA'"
    } >"$new/postgresql.conf"
    # Only for this script: on the loopback address, and away before anybody else could have come.
    "$bin/pg_ctl" start --pgdata="$new" --wait --timeout=120 --log="$new.log" \
        --options="-c listen_addresses=127.0.0.1 -c port=$port -c logging_collector=off"
    PGPASSWORD=$(secret "$TIER0__REGION_AGENT__PASSWORD_FILE")
    export PGPASSWORD
    psql="$bin/psql --host=127.0.0.1 --port=$port --username=postgres --no-psqlrc --quiet --set=ON_ERROR_STOP=1"
    $psql --dbname=postgres --command='CREATE DATABASE tier0_db'
    {
        echo "\\set QUIET on"
        for role in tier0:$TIER0_OWNER_PASSWORD_FILE writer:$TIER0_WRITER_PASSWORD_FILE reader:$TIER0_READER_PASSWORD_FILE \
            monitor:$TIER0_MONITOR_PASSWORD_FILE replicator:$TIER0__REGION_AGENT__REPLICATION_PASSWORD_FILE; do
            word=$(secret "${role#*:}")
            echo "SET tier0.${role%%:*}_password = '$word';"
        done
        cat "$TIER0_ROLES_SQL"
    } | $psql --dbname=tier0_db
    unset PGPASSWORD
    "$bin/pg_ctl" stop --pgdata="$new" --wait --mode=fast
    rm -f "$new.log"
    # Complete or not there at all.
    sync
    mv "$new" "$data"
}

mkdir -p "${data%/*}"
if [ ! -e "$data" ]; then
    if [ "${TIER0_FIRST_NODE:-no}" = yes ] && [ ! -e "$TIER0_ORCHESTRATOR_DIR/state.json" ]; then
        make_cluster
    else
        # The orchestrator has it cloned.
        mkdir "$data"
    fi
fi
exec region-agent "$@"
