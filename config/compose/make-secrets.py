#!/usr/bin/env python3
"""Makes the passwords and tokens of a deployment: secrets/ (files) and .env (what compose reads).

Makes what is missing and changes nothing that is there; so it may be run again, and a password is renewed by deleting
its file (docs/deployment.md says which others follow). Nothing is printed but a new device's password.

secrets/ belongs to whoever runs this, mode 0700, and so nobody else on this machine gets at the files. The files that
containers mount are readable (0444) because the accounts in them are not ours; what is for people is 0600.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import secrets
import sys
from pathlib import Path

WORDS = [
    "postgres_password",
    "replicator_password",
    "owner_password",
    "writer_password",
    "reader_password",
    "monitor_password",
    "agent_token",
    "orchestrator_token",
    "redis_password",
    "mqtt_consumer_password",
    "rabbitmq_consumer_password",
    "rabbitmq_admin_password",
    "grafana_admin_password",
]
SIMULATORS = ["mqtt_simulator_password", "rabbitmq_simulator_password"]
# For people: no container mounts them.
PRIVATE = {"rabbitmq_admin_password"}


def write(path, text, mode):
    """Replaces the file as a whole; it never exists with a wider mode or half its text."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        os.fchmod(file.fileno(), mode)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)


def word(directory, name):
    path = directory / name
    if not path.exists():
        # Hexadecimal: nothing to quote in SQL, TOML, a URL or a password file.
        write(path, secrets.token_hex(24) + "\n", 0o600 if name in PRIVATE else 0o444)
    return path.read_text().strip()


def mosquitto_hash(password):
    """As mosquitto_passwd writes it: PBKDF2 with SHA-512. More rounds than its 101 are allowed; each login pays them."""
    salt, rounds = os.urandom(12), 1000
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, rounds)
    return "$7$%d$%s$%s" % (rounds, base64.b64encode(salt).decode(), base64.b64encode(digest).decode())


def rabbitmq_hash(password):
    salt = os.urandom(4)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def accounts(path):
    if not path.exists():
        return {}
    return dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)


def write_accounts(path, names):
    write(path, "".join(f"{name}:{value}\n" for name, value in sorted(names.items())), 0o444)


def rabbitmq_definitions(words):
    """Users and what each may do; queues are declared by the consumer. With definitions RabbitMQ makes no guest."""
    queue = r"(user_activity_queue|webapp_active_users)(\.dead-letter)?"
    users = [("admin", "administrator", words["rabbitmq_admin_password"], ".*", ".*", ".*"),
             # amq.default: it puts back what the broker itself moved to the dead-letter queue.
             ("consumer", "", words["rabbitmq_consumer_password"], f"^{queue}$", rf"^({queue}|amq\.default)$", f"^{queue}$")]
    if "rabbitmq_simulator_password" in words:
        users.append(("simulator", "", words["rabbitmq_simulator_password"], f"^{queue}$", rf"^({queue}|amq\.default)$",
                      f"^{queue}$"))
    return {
        "vhosts": [{"name": "/"}],
        # RabbitMQ 4 moves away what was delivered 20 times; an outage of the database must not turn good events into that. The exchange: a
        # queue that a plain publisher declared has none, and what the broker removes from it would be lost.
        "policies": [{"vhost": "/", "name": f"tier0-keep-{name}", "apply-to": "queues", "priority": 0, "pattern": f"^{name}$",
                      "definition": {"delivery-limit": -1, "dead-letter-exchange": f"{name}.dead-letter"}}
                     for name in ("user_activity_queue", "webapp_active_users")],
        "users": [{"name": name, "password_hash": rabbitmq_hash(password), "tags": tags,
                   "hashing_algorithm": "rabbit_password_hashing_sha256"} for name, tags, password, *_ in users],
        "permissions": [{"user": name, "vhost": "/", "configure": configure, "write": write_, "read": read}
                        for name, _, _, configure, write_, read in users],
    }


def make(root, simulators):
    directory = root / "secrets"
    directory.mkdir(mode=0o700, exist_ok=True)
    directory.chmod(0o700)
    names = WORDS + [name for name in SIMULATORS if simulators or (directory / name).exists()]
    words = {name: word(directory, name) for name in names}
    # Read by the exporter from its environment: it knows no file, and this one only reads the broker's own figures.
    env = root / ".env"
    lines = env.read_text().splitlines() if env.exists() else []
    found = [line.split("=", 1)[1] for line in lines if line.startswith("MQTT_MONITOR_PASSWORD=")]
    monitor = found[0] if found else secrets.token_hex(24)
    if not found:
        lines.append(f"MQTT_MONITOR_PASSWORD={monitor}")
        write(env, "\n".join(lines) + "\n", 0o600)
    env.chmod(0o600)

    # A directory, so that a container sees the file replaced.
    (directory / "mosquitto").mkdir(mode=0o755, exist_ok=True)
    (directory / "mosquitto").chmod(0o755)
    path = directory / "mosquitto" / "passwords"
    known = accounts(path)
    wanted = {"consumer": words["mqtt_consumer_password"], "monitor": monitor}
    if "mqtt_simulator_password" in words:
        wanted["simulator"] = words["mqtt_simulator_password"]
    stale = {name: password for name, password in wanted.items() if not fits(known.get(name), password)}
    if stale:
        write_accounts(path, {**known, **{name: mosquitto_hash(word) for name, word in stale.items()}})

    redis = words["redis_password"]
    write(directory / "redis_auth", f"requirepass {redis}\nmasterauth {redis}\n", 0o444)
    write(directory / "sentinel_auth", f"requirepass {redis}\nsentinel sentinel-pass {redis}\nsentinel auth-pass tier0 {redis}\n",
          0o444)
    ports = [("redis-region1", 6379), ("redis-region2", 6380), ("sentinel-1", 26379), ("sentinel-2", 26379),
             ("sentinel-3", 26379)]
    write(directory / "redis_exporter_passwords", json.dumps({f"redis://{h}:{p}": redis for h, p in ports}) + "\n", 0o444)
    write(directory / "rabbitmq_definitions", json.dumps(rabbitmq_definitions(words), indent=1) + "\n", 0o444)


def fits(stored, password):
    if not stored:
        return False
    _, kind, rounds, salt, digest = stored.split("$")
    made = hashlib.pbkdf2_hmac("sha512", password.encode(), base64.b64decode(salt), int(rounds))
    return kind == "7" and made == base64.b64decode(digest)


def add_device(root, device):
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", device):
        sys.exit(f"{device}: a device id here is letters, digits, dot, underscore and dash, at most 128")
    if device in ("consumer", "monitor", "simulator"):
        sys.exit(f"{device} is the account of one of our processes")
    path = root / "secrets" / "mosquitto" / "passwords"
    if not path.exists():
        sys.exit("there are no secrets yet: make secrets")
    password = secrets.token_urlsafe(18)
    write_accounts(path, {**accounts(path), device: mosquitto_hash(password)})
    print(f"user {device}\npassword {password}\nnow: docker compose kill -s HUP mosquitto")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2], help="where secrets/ and .env go")
    parser.add_argument("--simulators", action="store_true", help="accounts of the simulators too")
    parser.add_argument("--device", metavar="ID", help="add a device's account, or give it a new password")
    options = parser.parse_args()
    os.umask(0o077)
    if options.device:
        add_device(options.root, options.device)
    else:
        make(options.root, options.simulators)


if __name__ == "__main__":
    main()
