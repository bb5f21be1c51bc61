#!/bin/sh
# Installs the Debian packages Tier0 needs and this machine lacks; says which; does nothing when all are there.
#
# The packages are wanted for their programs only. No service is started or enabled, no database cluster is created:
# the playground runs its own servers with its own data. What was installed before stays as it is.
set -eu
purpose=${1:-run}

# The one list: a file that shows the program is there (any version of it), and the package that brings it.
# A new server of the playground adds its line here.
wanted() {
    echo "/usr/lib/postgresql/*/bin/postgres   postgresql"
    echo "/usr/sbin/mosquitto                  mosquitto"
    echo "/usr/lib/rabbitmq/bin/rabbitmq-server rabbitmq-server"
    echo "/usr/bin/redis-server                redis-server"
    echo "/usr/bin/redis-sentinel              redis-sentinel"
    echo "/usr/bin/prometheus                  prometheus"
    for exporter in node postgres redis mqtt; do
        echo "/usr/bin/prometheus-$exporter-exporter  prometheus-$exporter-exporter"
    done
    echo "/usr/bin/setpriv                     util-linux"
    echo "/usr/bin/cc                          gcc"
    echo "/usr/include/stdlib.h                libc6-dev"
    # What checks the deployment: .ci/mosquitto.sh, regions.sh, compose.py, licences.py; and what tests put in between.
    if [ "$purpose" = test ]; then
        echo "/usr/bin/mosquitto_pub               mosquitto-clients"
        echo "/usr/sbin/pgbouncer                  pgbouncer"
        echo "/usr/bin/openssl                     openssl"
        echo "/usr/bin/curl                        curl"
        echo "/usr/bin/python3                     python3"
        echo "/usr/lib/python3/dist-packages/yaml  python3-yaml"
        echo "/usr/bin/docker-compose              docker-compose"
        # Wrong clocks: consumers/tests/it/clock.rs.
        echo "/usr/lib/*/faketime/libfaketimeMT.so.1 libfaketime"
    fi
    # The baseline that `make bench` is held against.
    if [ "$purpose" = bench ]; then
        echo "/usr/lib/python3/dist-packages/paho      python3-paho-mqtt"
        echo "/usr/lib/python3/dist-packages/psycopg2  python3-psycopg2"
    fi
}

# Services that would start at the next boot; disabled when this script brought them.
service_of() {
    case $1 in
        mosquitto) echo mosquitto.service ;;
        rabbitmq-server) echo rabbitmq-server.service ;;
        postgresql) echo postgresql.service ;;
        redis-server) echo redis-server.service ;;
        redis-sentinel) echo redis-sentinel.service ;;
        pgbouncer) echo pgbouncer.service ;;
        prometheus | prometheus-*-exporter) echo "$1.service" ;;
    esac
}

present() {
    for file in $1; do
        [ -e "$file" ] && return 0
    done
    return 1
}

missing=$(wanted | while read -r file package; do
    present "$file" || printf '%s ' "$package"
done)
missing=${missing% }
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "missing: $missing. This is not Debian (no apt-get): install them by hand." >&2
    exit 1
fi
if [ "$(id -u)" -eq 0 ]; then
    as_root=
elif command -v sudo >/dev/null; then
    as_root=sudo
else
    echo "missing: $missing. Install them as root: apt-get install --no-install-recommends $missing" >&2
    exit 1
fi
echo "installing Debian packages: $missing"

# Debian starts a service when its package is installed, unless this file says no. An administrator's own file stays.
policy=/usr/sbin/policy-rc.d
# Debian creates a cluster "main" on port 5432 with the first Postgres package, unless this file says no.
createcluster=/etc/postgresql-common/createcluster.conf
made_policy=
made_createcluster=

tidy() {
    [ -z "$made_policy" ] || $as_root rm -f "$policy"
    if [ -n "$made_createcluster" ]; then
        # What the package would have put there.
        if [ -e /usr/share/postgresql-common/createcluster.conf ]; then
            $as_root cp /usr/share/postgresql-common/createcluster.conf "$createcluster"
        else
            $as_root rm -f "$createcluster"
        fi
    fi
}
trap tidy EXIT
trap 'exit 130' INT TERM

if [ ! -e "$policy" ]; then
    made_policy=yes
    printf '#!/bin/sh\n# Tier0 is installing packages; removed when it is done.\nexit 101\n' |
        $as_root tee "$policy" >/dev/null
    $as_root chmod 755 "$policy"
fi
if [ ! -e "$createcluster" ]; then
    made_createcluster=yes
    $as_root mkdir -p "${createcluster%/*}"
    echo "create_main_cluster = false" | $as_root tee "$createcluster" >/dev/null
fi

apt() {
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 \
        -o Dpkg::Options::=--force-confold "$@"
}
apt update -qq
# shellcheck disable=SC2086 # one word for each package
apt install -y -qq --no-install-recommends $missing

if command -v systemctl >/dev/null; then
    for package in $missing; do
        service=$(service_of "$package")
        [ -z "$service" ] || $as_root systemctl disable --quiet "$service" 2>/dev/null || true
    done
fi

wanted | while read -r file package; do
    present "$file" || { echo "$package is installed, but $file is not there" >&2; exit 1; }
done
