#!/usr/bin/python3
"""Licences, sources and banned crates of everything that is built, for whatever platform, by the lists of deny.toml."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def allowed(expression, allow):
    """An SPDX expression, made a Python one: every licence is True when it is allowed."""
    # Older crates write / for OR.
    tokens = re.findall(r"\(|\)|[^\s()]+(?: WITH [^\s()]+)?", expression.replace("/", " OR "))
    words = {"AND": "and", "OR": "or", "(": "(", ")": ")"}
    return eval(" ".join(words.get(token, str(token in allow)) for token in tokens))  # of True, False, and, or, brackets


def cargo(what, *options):
    return subprocess.run(["cargo", what, "--locked", *options], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def main():
    deny = tomllib.loads((ROOT / "deny.toml").read_text())
    # Cargo.lock also names what optional features of others would need and nobody asks for; the tree does not.
    tree = cargo("tree", "--workspace", "--all-features", "--target", "all", "--prefix", "none", "--format", "{p}")
    built = {tuple(line.split()[:2]) for line in tree.splitlines()}
    packages = json.loads(cargo("metadata", "--format-version", "1", "--all-features"))["packages"]
    packages = [package for package in packages if (package["name"], "v" + package["version"]) in built]
    allow, banned = set(deny["licenses"]["allow"]), {ban["crate"] for ban in deny["bans"]["deny"]}
    registries = {f"registry+{url}" for url in deny["sources"]["allow-registry"]}
    bad, used = [], set()
    for package in packages:
        name = f"{package['name']} {package['version']}"
        licence = package["license"]
        if not licence:
            bad.append(f"{name} states no licence")
        elif not allowed(licence, allow):
            bad.append(f"{name}: {licence} is not in deny.toml")
        used |= {known for known in allow if licence and re.search(rf"(?<![\w.-]){re.escape(known)}(?![\w.-])", licence)}
        if package["source"] and package["source"] not in registries:
            bad.append(f"{name} comes from {package['source']}")
        if package["name"] in banned:
            bad.append(f"{name} is banned")
        bad += [f"{name} depends on any version of {need['name']}" for need in package["dependencies"]
                if package["source"] is None and need["req"] == "*" and not need.get("path")]
    bad += [f"deny.toml allows {unused}, which nothing uses" for unused in allow - used]
    for line in bad:
        print(f"licences: {line}", file=sys.stderr)
    if not bad:
        print(f"licences: {len(packages)} packages, all of {', '.join(sorted(used))}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    # What must hold of the rule itself.
    assert allowed("MIT OR GPL-3.0", {"MIT"}) and not allowed("MIT AND GPL-3.0", {"MIT"})
    assert allowed("(A OR B) AND C WITH d", {"B", "C WITH d"}) and not allowed("A/B", {"C"})
    main()
