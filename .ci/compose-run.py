#!/usr/bin/python3
"""Runs docker-compose.yml without Docker, on a bare Debian root: what a compose file promises, tried.

Each service gets namespaces of its own (network, mounts, processes, host name) on an overlay of the root: the file's
command, account, environment, mounts, secrets, tmpfs, read-only root, no capabilities, no new privileges, its name in
/etc/hosts, and its start in the order of depends_on by its own health check. Images that are not ours are Debian's
packages of the same servers; exporters, Prometheus and Grafana are left out; memory limits are not set.

  .ci/compose-run.py root DIR PROGRAMS    makes the root: debootstrap, the RUN lines of the Dockerfile's last stages, servers, programs
  .ci/compose-run.py run DIR              starts everything with simulators, counts, fails over, counts again, stops

Needs root and debootstrap, about 1 GB; not part of `make test`.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

REPO = Path(__file__).resolve().parent.parent
WORK = Path("/var/tmp/tier0-compose-run")
SERVERS = ["mosquitto", "redis-server", "redis-sentinel", "rabbitmq-server", "netcat-openbsd"]
SERVICES = ["region1", "region2", "redis-region1", "redis-region2", "sentinel-1", "sentinel-2", "sentinel-3", "failover-orchestrator",
            "mosquitto", "rabbitmq", "mqtt-consumer", "rabbitmq-consumer", "device-simulator", "user-simulator"]
PROGRAMS = ["region-agent", "failover-orchestrator", "mqtt-consumer", "rabbitmq-consumer", "device-simulator", "user-simulator"]
DEVICES = 2000
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BRIDGE, NETWORK = "t0br", "10.77.0."
# What the official image does in its own entry point.
AS_PACKAGED = {"rabbitmq": (["/usr/lib/rabbitmq/bin/rabbitmq-server"],
                            {"HOME": "/var/lib/rabbitmq", "RABBITMQ_LOGS": "-", "RABBITMQ_NODENAME": "rabbit@rabbitmq",
                             "RABBITMQ_CONFIG_FILES": "/etc/rabbitmq/conf.d", "PATH": "/usr/lib/rabbitmq/bin:" + PATH})}


def sh(command, check=True):
    done = subprocess.run(command, shell=True, text=True, capture_output=True)
    if check and done.returncode:
        sys.exit(f"{command}: {done.stdout}{done.stderr}")
    return done


def make_root(root, programs):
    root.mkdir(parents=True)
    sh(f"debootstrap --variant=minbase bookworm {root} http://deb.debian.org/debian")
    stages = (REPO / "Dockerfile").read_text().split("\nFROM ")[2:]
    lines = [line for stage in stages for line in re.findall(r"^RUN ((?:.*\\\n)*.*)$", stage, re.M)]
    (root / "steps.sh").write_text("set -eu\n" + "\n".join(lines))
    sh(f"chroot {root} sh /steps.sh")
    sh(f"chroot {root} sh -ec 'apt-get update -qq; DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends {' '.join(SERVERS)}'")
    for program in [programs / name for name in PROGRAMS] + [REPO / "config/compose/healthcheck"]:
        shutil.copy2(program, root / "usr/local/bin")


class Run:
    def __init__(self, root):
        self.root, self.running = root, {}
        shutil.rmtree(WORK, ignore_errors=True)
        (WORK / "volumes").mkdir(parents=True)
        # A copy: its secrets are its own.
        repo = WORK / "repo"
        repo.mkdir()
        for name in ["docker-compose.yml", "config", "grafana", "docs"]:
            sh(f"cp -a {REPO / name} {repo}/")
        sh(f"{repo}/config/compose/make-secrets.py --simulators")
        text = sh(f"TIER0_SIMULATED_DEVICES={DEVICES} docker-compose --env-file {repo}/.env --project-directory {repo} "
                  f"-f {repo}/docker-compose.yml --profile simulate config").stdout
        self.services = yaml.safe_load(text)["services"]
        self.address = {name: f"{NETWORK}{number + 10}" for number, name in enumerate(SERVICES)}
        (WORK / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in self.address.items()))
        sh(f"ip link add {BRIDGE} type bridge; ip addr add {NETWORK}1/24 dev {BRIDGE}; ip link set {BRIDGE} up")
        for number, name in enumerate(SERVICES):
            space = f"t0-{number}"
            sh(f"ip netns add {space}; ip link add t0v{number} type veth peer name eth0 netns {space}; ip link set t0v{number} master {BRIDGE} up; "
               f"ip -n {space} addr add {self.address[name]}/24 dev eth0; ip -n {space} link set eth0 up; ip -n {space} link set lo up")

    def start(self, name):
        service, number = self.services[name], SERVICES.index(name)
        base = WORK / "services" / name
        root = base / "root"
        (base / "layer").mkdir(parents=True)
        root.mkdir()
        uid, gid = str(service["user"]).split(":")
        mounts = [f"mount -t tmpfs layer {base}/layer; mkdir {base}/layer/upper {base}/layer/work",
                  f"mount -t overlay -o lowerdir={self.root},upperdir={base}/layer/upper,workdir={base}/layer/work overlay {root}",
                  f"mount -t proc proc {root}/proc; mount --rbind /dev {root}/dev; mount -t tmpfs -o mode=1777 shm {root}/dev/shm"]

        def bind(source, target, read_only):
            place = f"{root}{target}"
            mounts.append(f"mkdir -p {place}" if Path(source).is_dir() else f"mkdir -p $(dirname {place}); touch {place}")
            mounts.append(f"mount --bind {source} {place}" + (f"; mount -o remount,ro,bind {place}" if read_only else ""))

        bind(WORK / "hosts", "/etc/hosts", True)
        for volume in service.get("volumes") or []:
            source, target, *mode = str(volume).split(":")
            bind(source if source.startswith("/") else self.volume(source, target, service), target, "ro" in ",".join(mode).split(","))
        for secret in service.get("secrets") or []:
            secret = secret["source"] if isinstance(secret, dict) else secret
            bind(WORK / "repo/secrets" / secret, f"/run/secrets/{secret}", True)
        for place in service.get("tmpfs") or []:
            place = place.split(":")[0]
            mounts.append(f"mkdir -p {root}{place}; mount -t tmpfs -o mode=1777 tmpfs {root}{place}")
        if service["read_only"]:
            mounts.append(f"mount -o remount,ro {root}")
        command = [word.replace("$$", "$") for word in service["command"]] if service.get("command") else []
        environment = {"PATH": PATH, **{key: str(value) for key, value in (service.get("environment") or {}).items()}}
        if name in AS_PACKAGED:
            command, more = AS_PACKAGED[name]
            environment.update(more)
        self.environment = {**getattr(self, "environment", {}), name: environment}
        script = "\n".join(["set -e", f"hostname {service.get('hostname', name)}", *mounts, "cd /",
                            f"exec chroot {root} setpriv --reuid={uid} --regid={gid} --clear-groups --no-new-privs --bounding-set=-all "
                            "--inh-caps=-all -- \"$@\""])
        self.running[name] = subprocess.Popen(
            ["ip", "netns", "exec", f"t0-{number}", "unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=SIGKILL",
             "sh", "-c", script, name, *command],
            stdout=open(WORK / f"{name}.log", "w"), stderr=subprocess.STDOUT, env=environment, start_new_session=True)

    def volume(self, name, target, service):
        """New ones belong to whom the image's directory belongs, as Docker does it."""
        place = WORK / "volumes" / name
        if not place.exists():
            place.mkdir()
            if service["image"].startswith("tier0/"):
                image = (Path(str(self.root) + target)).stat()
                os.chown(place, image.st_uid, image.st_gid)
                place.chmod(image.st_mode & 0o777)
            else:
                uid, gid = str(service["user"]).split(":")
                os.chown(place, int(uid), int(gid))
        return place

    def child(self, name):
        return sh(f"pgrep -P {self.running[name].pid}", check=False).stdout.split()

    def inside(self, name, *command):
        uid, gid = str(self.services[name]["user"]).split(":")
        child = self.child(name)
        if not child:
            return 1, ""
        try:
            done = subprocess.run(["nsenter", "-t", child[0], "-m", "-n", "-p", "-u", "chroot", str(WORK / "services" / name / "root"), "setpriv",
                                   f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--", *command],
                                  text=True, capture_output=True, env=self.environment[name], timeout=60)
        except subprocess.TimeoutExpired:
            return 1, "no answer"
        return done.returncode, done.stdout + done.stderr

    def healthy(self, name):
        kind, *test = [word.replace("$$", "$") for word in self.services[name]["healthcheck"]["test"]]
        return self.inside(name, *(test if kind == "CMD" else ["sh", "-c", *test]))[0] == 0

    def bring_up(self, name):
        for other in self.services[name].get("depends_on") or {}:
            if other not in self.running:
                self.bring_up(other)
        if name in self.running:
            return
        began = time.monotonic()
        self.start(name)
        while not self.healthy(name):
            if self.running[name].poll() is not None or time.monotonic() - began > 180:
                self.fail(name, "does not become healthy")
            time.sleep(0.2)
        print(f"  {name}: healthy after {time.monotonic() - began:.1f} s", flush=True)

    def fail(self, name, why):
        print((WORK / f"{name}.log").read_text()[-3000:], file=sys.stderr)
        sys.exit(f"{name} {why}")

    def request(self, method, path):
        _, answer = self.inside("failover-orchestrator", "bash", "-c",
                                "exec 3<>/dev/tcp/127.0.0.1/8003; printf '%s %s HTTP/1.0\\r\\nHost: localhost\\r\\nContent-Length: 0\\r\\n"
                                "Authorization: Bearer %s\\r\\n\\r\\n' \"$0\" \"$1\" \"$(cat /run/secrets/orchestrator_token)\" >&3; cat <&3",
                                method, path)
        return json.loads(answer.split("\n\n", 1)[1])

    def sql(self, statement):
        """As reader, who comes over the network like Grafana; from the node that leads."""
        region, port = ("region1", 5432) if self.request("GET", "/status")["current_region"] == "region1" else ("region2", 5433)
        return self.inside(region, "sh", "-c", f"PGPASSWORD=$(cat /run/secrets/reader_password) psql -h {region} -p {port} -U reader "
                                               'tier0_db -XAtc "$0"', statement)[1].strip()

    def until(self, what, true, limit=90):
        deadline = time.monotonic() + limit
        while not (seen := true()):
            if time.monotonic() > deadline:
                sys.exit(f"not {what} within {limit} s: {self.request('GET', '/status')}")
            time.sleep(0.5)
        print(f"  {what}: {seen}", flush=True)

    def runbooks(self):
        """What docs/runbooks/README.md has people on call paste for Compose, with a `docker` that knows these services."""
        page = (REPO / "docs/runbooks/README.md").read_text()
        block = re.search(r"^    on\(\)   \{ docker.*?(?=^\S)", page, re.M | re.S)[0]
        places = []
        for name in SERVICES:
            uid, gid = str(self.services[name]["user"]).split(":")
            command = ["env", "-i", *(f"{key}={value}" for key, value in self.environment[name].items()), "nsenter", "-t", self.child(name)[0], "-m", "-n",
                       "-p", "-u", "chroot", str(WORK / "services" / name / "root"), "setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--"]
            places.append(f"inside_{name.replace('-', '_')}() {{ {shlex.join(command)} env $given \"$@\"; }}")
        docker = [*places, f"""docker() {{
            [ "$1" = compose ] || return 9; shift; local verb=$1 given=; shift
            while case $1 in -e|--tail) [ "$1" = -e ] && given=$2; shift ;; -*) ;; *) false ;; esac do shift; done
            case $verb in exec) "inside_${{1//-/_}}" "${{@:2}}" ;; logs) cat "{WORK}/$1.log" ;; *) return 9 ;; esac; }}"""]
        script = "\n".join([*docker, f"cd {WORK}/repo", block])

        def ask(command, wanted):
            done = subprocess.run(["bash", "-c", script + "\n" + command], text=True, capture_output=True, timeout=60)
            if not re.search(wanted, done.stdout):
                sys.exit(f"{command}: no {wanted!r} in {done.stdout!r}, {done.stderr!r}")
            print(f"  {command}: as the page says", flush=True)

        leader = self.request("GET", "/status")["current_region"]
        follower = "region1" if leader == "region2" else "region2"
        for node, standby in [("primary", "f"), ("standby", "t"), (leader, "f"), (follower, "t")]:
            ask(f'sql {node} "SELECT pg_is_in_recovery() AS standby"', rf"standby\s+-+\s+{standby}\s")
        for at, wanted in [("9101/metrics", "ingest_rows"), ("9103/health/ready", "ready"), ("8101/health/live", "."), ("8102/health/live", "."),
                           ("8003/health/ready", ".")]:
            ask(f"get {at}", wanted)
        ask("logs mqtt-consumer", "INFO|info")
        ask('sql nobody "SELECT 1"; [ $? = 1 ] && echo refused', "refused")
        ask('sql primary "SELECT 1/0"; [ $? != 0 ] && echo failed', "failed")
        ask('[ -n "$TOKEN" ] && echo token', "token")

    def try_it(self):
        self.until("every device stored", lambda: (count := self.sql("SELECT count(DISTINCT device_id) FROM device_telemetry")) == str(DEVICES) and count)
        self.until("sessions stored", lambda: int(count := self.sql("SELECT count(*) FROM user_sessions")) > 100 and count)
        self.until("two copies", lambda: self.request("GET", "/status")["sync_set"])
        answer = self.request("POST", "/failover/region2")
        if not answer.get("success"):
            sys.exit(f"the failover: {answer}")
        print(f"  failover to region2: {answer['total_duration_ms']:.0f} ms, {answer['error']}")
        self.until("two copies again", lambda: self.request("GET", "/status")["sync_set"] == ["region1"])
        self.until("Redis in region2", lambda: (redis := self.request("GET", "/status")["redis"])["region"] == "region2" and redis["master"])
        self.until("readings from after it", lambda: int(count := self.sql(
            f"SELECT count(*) FROM device_telemetry WHERE timestamp_utc > '{answer['end_time']}'")) > DEVICES and count)
        letters = self.sql("SELECT count(*) FROM dead_letters")
        if letters != "0":
            sys.exit(f"{letters} dead letters")
        for name in SERVICES:
            if not self.healthy(name):
                self.fail(name, "is not healthy any more")
        print("  all healthy, no dead letter")
        self.runbooks()

    def stop(self, orderly):
        for name in reversed(list(self.running)):
            process = self.running[name]
            for child in self.child(name):
                os.kill(int(child), signal.SIGTERM)
            try:
                process.wait(130)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if orderly and process.returncode:
                print((WORK / f"{name}.log").read_text()[-1500:], file=sys.stderr)
                sys.exit(f"{name} ended with {process.returncode}")
        if orderly:
            print("  all ended with status 0")

    def clean(self):
        for number in range(len(SERVICES)):
            sh(f"ip netns del t0-{number}", check=False)
        sh(f"ip link del {BRIDGE}", check=False)
        if not os.environ.get("TIER0_KEEP"):
            shutil.rmtree(WORK, ignore_errors=True)


def main():
    match sys.argv[1:]:
        case ["root", root, programs]:
            make_root(Path(root).resolve(), Path(programs).resolve())
        case ["run", root]:
            run = Run(Path(root).resolve())
            try:
                for name in SERVICES:
                    run.bring_up(name)
                run.try_it()
                run.stop(orderly=True)
                print("compose-run: docker-compose.yml does what it says")
            finally:
                run.stop(orderly=False)
                run.clean()
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
