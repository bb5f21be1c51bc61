#!/usr/bin/python3
"""docker-compose.yml against compose's own validation, and against the programs and configuration it names.

Every setting in it exists in the program that gets it and is in force there (asked with --print-config); every host:port
leads to a service that listens there; every mounted path, secret and script exists; every service has what keeps it
small and harmless. The programs are those of target/debug, or of the directory in TIER0_PROGRAMS.
"""

import copy
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = Path(os.environ.get("TIER0_PROGRAMS", ROOT / "target/debug"))
OURS = {"tier0/processes", "tier0/postgres"}
# The published port of each service, as the documentation promises them.
PUBLISHED = {
    "region1": {5432: 5432}, "region2": {5433: 5433}, "failover-orchestrator": {8003: 8003}, "mosquitto": {1883: 1883},
    "rabbitmq": {5672: 5672, 15672: 15672}, "redis-region1": {6379: 6379}, "redis-region2": {6380: 6380},
    "sentinel-1": {26379: 26379}, "sentinel-2": {26380: 26379}, "sentinel-3": {26381: 26379},
    "prometheus": {9090: 9090}, "alertmanager": {9093: 9093}, "grafana": {3001: 3000},
}
# Where images that are not ours listen when nobody says otherwise.
USUAL = {"prom/prometheus": 9090, "prom/alertmanager": 9093, "grafana/grafana": 3000, "oliver006/redis_exporter": 9121,
         "prom/node-exporter": 9100}
# Without the environment these have to be given, a real run asks for them.
OUTSIDE = {"TIER0_CERTIFICATES": str(ROOT / "config")}


def run(*command, env=None, check=True):
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=300)
    if check and done.returncode:
        sys.exit(f"compose: {' '.join(map(str, command))}: {done.stdout}{done.stderr}")
    return done


def words(command):
    return command.split() if isinstance(command, str) else [str(word) for word in command or []]


class Check:
    def __init__(self, compose, secrets):
        self.compose, self.secrets, self.bad = compose, secrets, []
        self.services = compose["services"]

    def complain(self, service, text):
        self.bad.append(f"{service}: {text}")

    def all(self):
        for name, service in self.services.items():
            self.posture(name, service)
            self.ports(name, service)
            self.mounts(name, service)
            if service["image"].rsplit(":", 1)[0] in OURS:
                self.settings(name, service)
            self.references(name, service)
        self.targets()
        return self.bad

    def environment(self, service):
        return {key: "" if value is None else str(value) for key, value in (service.get("environment") or {}).items()}

    def posture(self, name, service):
        image = service["image"].rsplit("/", 1)[-1]
        if ":" not in image or image.endswith(":latest"):
            self.complain(name, f"image {image} is not pinned by version")
        wanted = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"], "restart": "unless-stopped"}
        for key, value in wanted.items():
            if service.get(key) != value:
                self.complain(name, f"{key} is {service.get(key)}, not {value}")
        for key in ("mem_limit", "pids_limit", "healthcheck"):
            if not service.get(key):
                self.complain(name, f"has no {key}")
        if str(service.get("user", "0")).split(":")[0] in ("0", "root"):
            self.complain(name, "runs as root")
        if service.get("privileged") or service.get("network_mode") or service.get("cap_add"):
            self.complain(name, "asks for more rights")
        logging = service.get("logging") or {}
        if not {"max-size", "max-file"} <= set(logging.get("options") or {}):
            self.complain(name, "its log grows without end")
        for other, how in (service.get("depends_on") or {}).items():
            if how.get("condition") != "service_healthy":
                self.complain(name, f"does not wait until {other} is healthy")
            if (self.services[other].get("healthcheck") or {}).get("disable"):
                self.complain(name, f"waits for {other}, which has no health check")
        for key, value in self.environment(service).items():
            if re.search(r"PASSWORD|TOKEN", key) and not key.endswith("_FILE") and (name, key) != ("mosquitto-exporter", "MQTT2PROM_MQTT_PASSWORD"):
                self.complain(name, f"{key} stands in the environment")

    def ports(self, name, service):
        found = {}
        for port in service.get("ports") or []:
            text = port if isinstance(port, str) else None
            if text is None:
                self.complain(name, f"port {port} is not ADDRESS:PORT:PORT")
                continue
            address, outside, inside = text.removesuffix("/tcp").rsplit(":", 2)
            if address != "127.0.0.1":
                self.complain(name, f"port {outside} is open to {address}")
            found[int(outside)] = int(inside)
        if found != PUBLISHED.get(name, {}):
            self.complain(name, f"publishes {found}, not {PUBLISHED.get(name, {})}")
        for inside in found.values():
            if inside not in self.listening(name):
                self.complain(name, f"publishes port {inside}, but listens on {sorted(self.listening(name))}")

    def listening(self, name):
        """From the service's own settings and configuration files."""
        service = self.services[name]
        environment = self.environment(service)
        image = service["image"].rsplit(":", 1)[0]
        ports = {int(environment[key]) for key in ("TIER0__HTTP__PORT", "TIER0__REGION_AGENT__PORT") if key in environment}
        if image in USUAL:
            ports.add(USUAL[image])
        if image == "eclipse-mosquitto":
            for source, target in self.binds(service):
                if target.endswith(".conf"):
                    ports |= {int(port) for port in re.findall(r"^listener (\d+)", (ROOT / source).read_text(), re.M)}
        if image == "rabbitmq":
            for source, target in self.binds(service):
                if target.endswith(".conf"):
                    ports |= {int(port) for port in re.findall(r"^(?:listeners\.tcp\.default|\w+\.tcp\.port) = (\d+)",
                                                               (ROOT / source).read_text(), re.M)}
        for word in words(service.get("command")):
            ports |= {int(port) for port in re.findall(r"^(?:port |--web\.listen-address=:|-listen-port=)(\d+)$", word)}
        return ports

    def binds(self, service):
        found = []
        for volume in service.get("volumes") or []:
            source, target = str(volume).split(":")[:2]
            if source.startswith((".", "/")):
                found.append((source, target))
        return found

    def mounts(self, name, service):
        for volume in service.get("volumes") or []:
            source, target, *mode = str(volume).split(":")
            if not source.startswith((".", "/")):
                if source not in self.compose["volumes"]:
                    self.complain(name, f"volume {source} is not declared")
                continue
            path = Path(source)
            if str(path).startswith(str(ROOT / "secrets")):
                path = self.secrets / path.relative_to(ROOT / "secrets")
            if not path.exists():
                self.complain(name, f"{source} does not exist")
            if not mode or "ro" not in mode[0].split(","):
                self.complain(name, f"may write to {source}")
        given = set(service.get("secrets") or [])
        for secret in given:
            declared = (self.compose.get("secrets") or {}).get(secret)
            if not declared or not (self.secrets / Path(declared["file"]).name).is_file():
                self.complain(name, f"secret {secret} is not made by make secrets")
        # What its command, health check and environment read must be mounted.
        text = yaml.safe_dump([service.get("entrypoint"), service.get("command"), service.get("healthcheck"),
                               self.environment(service)])
        for path in re.findall(r"/run/secrets/(\w+)", text):
            if path not in given:
                self.complain(name, f"reads /run/secrets/{path}, which it is not given")
        if service["image"].startswith("rabbitmq:"):
            text += (ROOT / "config/rabbitmq/production.conf").read_text()
        for unused in given - set(re.findall(r"/run/secrets/(\w+)", text + self.read_by_scripts(service))):
            self.complain(name, f"is given secret {unused} and does not read it")
        targets = [target for _, target in self.binds(service)]
        for path in re.findall(r"(/(?:etc/tier0|etc/prometheus|etc/alertmanager|mosquitto/config)/[\w./-]+)", text):
            source = self.source_of(service, path)
            if source is None or not source.exists():
                self.complain(name, f"reads {path}, which none of {targets} brings")
            elif words(service.get("command"))[:1] == [path] and not os.access(source, os.X_OK):
                self.complain(name, f"{source} is not executable")

    def source_of(self, service, path):
        for source, target in sorted(self.binds(service), key=lambda bind: -len(bind[1])):
            if path == target:
                return Path(source)
            if path.startswith(target + "/"):
                return Path(source) / path[len(target) + 1:]
        return None

    def read_by_scripts(self, service):
        """The configuration files its start script is told to use."""
        text = ""
        for word in words(service.get("command")):
            source = self.source_of(service, word) if word.startswith("/") else None
            if source and source.is_file():
                text += source.read_text()
        return text

    def settings(self, name, service):
        """The program itself says which settings it knows and what is in force."""
        environment = self.environment(service)
        program = words(service["command"])[0]
        if program.startswith("/"):
            script = self.source_of(service, program)
            program = re.search(r"^exec ([\w-]+)", script.read_text(), re.M).group(1)
            for key in environment:
                if key.startswith("TIER0_") and not key.startswith("TIER0__") and key not in script.read_text():
                    self.complain(name, f"{script.name} knows no {key}")
        elif any(key.startswith("TIER0_") and not key.startswith("TIER0__") for key in environment):
            self.complain(name, "has variables that no program reads")
        ours = {key: value.replace("/run/secrets", str(self.secrets)) if key.endswith("_FILE") else value
                for key, value in environment.items() if key.startswith("TIER0__")}
        done = run(PROGRAMS / program, "--print-config", env={"PATH": os.environ["PATH"], **ours}, check=False)
        if done.returncode:
            return self.complain(name, f"{program}: {done.stderr.strip()}")
        force = dict(line.split(" = ", 1) for line in done.stdout.splitlines() if " = " in line)
        for key, value in ours.items():
            secret = key.endswith("_FILE")
            setting = ".".join(key.removesuffix("_FILE").removeprefix("TIER0__").lower().split("__"))
            if setting not in force:
                self.complain(name, f"{program} knows no {setting} ({key})")
            elif force[setting].strip('"') != ("<hidden>" if secret else value):
                self.complain(name, f"{key}={value}, but {setting} = {force[setting]} is in force")
        port = ours.get("TIER0__HTTP__PORT")
        test = words((service.get("healthcheck") or {}).get("test"))
        if test[1:3] != ["healthcheck", port] or test[3:] not in (["/health/live"], ["/health/ready"]):
            self.complain(name, f"its health check asks {test}, but it serves on {port}")
        if ours.get("TIER0__HTTP__BIND") != "0.0.0.0":
            self.complain(name, "nobody can ask for its health and metrics")

    def references(self, name, service):
        text = " ".join([*self.environment(service).values(), *words(service.get("command"))])
        for source, target in self.binds(service):
            if Path(source).is_file() and target.endswith((".yml", ".conf")):
                text += " " + "\n".join(line for line in Path(source).read_text().splitlines() if not line.lstrip().startswith("#"))
        for host, port in re.findall(r"\b([a-z][a-z0-9-]*):(\d{4,5})\b", text):
            self.reachable(name, host, int(port))
        for host, port in re.findall(r"\b(?:replicaof|monitor tier0) ([a-z][\w-]*) (\d+)", text + self.read_by_scripts(service)):
            self.reachable(name, host, int(port))
        environment = self.environment(service)
        for section in ("MQTT", "RABBITMQ"):
            if f"TIER0__{section}__HOST" in environment:
                self.reachable(name, environment[f"TIER0__{section}__HOST"], int(environment[f"TIER0__{section}__PORT"]))

    def reachable(self, name, host, port):
        if host not in self.services:
            self.complain(name, f"names {host}:{port}, but there is no service {host}")
        elif port not in self.listening(host):
            self.complain(name, f"names {host}:{port}, but {host} listens on {sorted(self.listening(host))}")

    def targets(self):
        """What Prometheus is told to scrape, in the same files and with the same jobs as in config/prometheus/targets."""
        here, there = ROOT / "config/compose/targets", ROOT / "config/prometheus/targets"
        if {path.name for path in here.iterdir()} != {path.name for path in there.iterdir()}:
            self.complain("prometheus", f"{here} and {there} hold different files")
        scraped = set()
        for path in here.glob("*.yml"):
            for group in yaml.safe_load(path.read_text()) or []:
                for target in group["targets"] + [group.get("labels", {}).get("__param_target", "").removeprefix("redis://")]:
                    if target:
                        self.reachable(f"targets/{path.name}", target.split(":")[0], int(target.split(":")[1]))
                        scraped.add(target.split(":")[0])
        silent = {"mosquitto", "grafana", "alertmanager"} | {name for name, service in self.services.items() if service.get("profiles")}
        for name in set(self.services) - scraped - silent:
            self.complain("prometheus", f"nothing looks after {name}")
        # The one file that differs only by an address.
        usual = (ROOT / "config/prometheus/mosquitto-exporter.yml").read_text()
        ours = (ROOT / "config/compose/mosquitto-exporter.yml").read_text()
        if usual.replace("tcp://127.0.0.1:1883", "tcp://mosquitto:1884") != ours:
            self.complain("mosquitto-exporter", "config/compose/mosquitto-exporter.yml is not config/prometheus/'s with another server")


def validated(files, secrets_root):
    """The file as compose understands it, by compose itself; then with short syntax for what it wrote out."""
    env = {**os.environ, **OUTSIDE}
    options = [option for file in files for option in ("-f", str(ROOT / file))]
    text = run("docker-compose", "--env-file", str(secrets_root / ".env"), "--project-directory", str(ROOT), *options, "--profile", "simulate", "config", env=env).stdout
    compose = yaml.safe_load(text)
    for service in compose["services"].values():
        service["secrets"] = [secret["source"] if isinstance(secret, dict) else secret for secret in service.get("secrets") or []]
        # Compose writes $ of a command as $$.
        for key in ("command", "entrypoint"):
            service[key] = [word.replace("$$", "$") for word in words(service.get(key))]
    return compose


def mutations(compose, secrets):
    """The check itself: each of these must be found."""
    def change(what, service, edit):
        broken = copy.deepcopy(compose)
        edit(broken["services"][service])
        if not Check(broken, secrets).all():
            sys.exit(f"compose: the check does not find {what}")

    environment = "environment"
    change("an unknown setting", "mqtt-consumer", lambda s: s[environment].update(TIER0__MQTT__PROT="1"))
    change("a setting of a section the program does not read", "mqtt-consumer", lambda s: s[environment].update(TIER0__REDIS__MASTER="x"))
    change("a wrong port", "mqtt-consumer", lambda s: s[environment].update(TIER0__MQTT__PORT="1885"))
    change("a wrong host", "rabbitmq-consumer", lambda s: s[environment].update(TIER0__DATABASE__HOSTS="region1:5432,region3:5433"))
    change("a secret that is not given", "region1", lambda s: s["secrets"].remove("agent_token"))
    change("a path that is not there", "grafana", lambda s: s["volumes"].append(f"{ROOT}/grafana/none:/x:ro"))
    change("a port open to all", "mosquitto", lambda s: s.update(ports=["0.0.0.0:1883:1883"]))
    change("a password in the environment", "grafana", lambda s: s[environment].update(GF_SECURITY_ADMIN_PASSWORD="x"))
    change("root", "redis-region1", lambda s: s.update(user="0:0"))
    change("no memory limit", "prometheus", lambda s: s.pop("mem_limit"))
    change("a health check of another port", "region2", lambda s: s["healthcheck"].update(test=["CMD", "healthcheck", "8101", "/health/live"]))


def main():
    for needed in ("docker-compose",):
        if run("sh", "-c", f"command -v {needed}", check=False).returncode:
            sys.exit(f"compose: {needed} is missing (make install)")
    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory)
        run(ROOT / "config/compose/make-secrets.py", "--root", made, "--simulators")
        compose = validated(["docker-compose.yml"], made)
        bad = Check(compose, made / "secrets").all()
        validated(["docker-compose.yml", "docker-compose.tls.yml"], made)
        if not bad:
            mutations(compose, made / "secrets")
    for line in bad:
        print(f"compose: {line}", file=sys.stderr)
    if not bad:
        print(f"compose: {len(compose['services'])} services hold to their programs and configuration")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
