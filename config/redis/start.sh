#!/bin/sh
# Starts Redis or a Sentinel: start.sh redis-server|redis-sentinel FILE [LINE..]. Both write what they learn (who is master,
# the other Sentinels) into their own configuration, so each has a copy of FILE, with LINEs added, in its data directory,
# made at the first start and kept.
set -eu
umask 077
program=$1
file=$2
shift 2
if [ ! -e /data/server.conf ]; then
    {
        cat "$file"
        for line in "$@"; do
            printf '%s\n' "$line"
        done
    } >/data/server.conf.new
    mv /data/server.conf.new /data/server.conf
fi
exec "$program" /data/server.conf
