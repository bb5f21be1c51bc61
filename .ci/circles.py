#!/usr/bin/python3
"""No circle of files: a file may use what is above it in its module's tree or beside it, but whoever is used never uses back, directly
or through others. Parent and child of one module are one idea and may. Test modules do not count. It first tries itself on files that it
makes."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Compiled for tests only, though not below tests/.
TEST_ONLY = {("failover", "model"), ("failover", "simulation")}


def modules(src):
    """Module path (a tuple) -> file, of one crate's library."""
    found = {}
    for path in sorted(src.rglob("*.rs")):
        parts = path.relative_to(src).with_suffix("").parts
        if parts[0] in ("bin", "main") or parts[-1] == "tests" or "tests" in parts:
            continue
        found[() if parts == ("lib",) else parts] = path
    return found


def without_tests(text):
    text = re.sub(r"(?m)^\s*//.*$", "", text)
    return re.split(r"#\[cfg\(test\)\]\s*(?:pub(?:\([a-z]+\))? )?mod \w+ \{", text)[0]


def expand(tree):
    """`a::{b, c::{d, e}}` -> a::b, a::c::d, a::c::e."""
    tree = tree.strip()
    start = tree.find("{")
    if start < 0:
        return [tree.split(" as ")[0]]
    inner, depth, piece, pieces = tree[start + 1 : tree.rfind("}")], 0, "", []
    for char in inner:
        if char == "," and depth == 0:
            pieces.append(piece)
            piece = ""
            continue
        depth += (char == "{") - (char == "}")
        piece += char
    pieces.append(piece)
    return [tree[:start] + rest for one in pieces if one.strip() for rest in expand(one)]


def uses(text):
    """Paths of our own crate that a file names."""
    for statement in re.findall(r"\buse\s+((?:crate|super|self)\b[^;]*);", text):
        yield from expand(re.sub(r"\s+", " ", statement).replace(" ::", "::"))
    plain = re.sub(r"\buse\s+[^;]*;", "", text)
    yield from re.findall(r"\b((?:crate|super|self)(?:::\w+)+)", plain)


def target(path, here, known):
    parts = [part.strip() for part in path.split("::")]
    if parts[0] == "crate":
        parts = parts[1:]
        base = ()
    else:
        base = here
        while parts and parts[0] in ("super", "self"):
            base = base[:-1] if parts[0] == "super" else base
            parts = parts[1:]
    full = base + tuple(parts)
    while full and full not in known:
        full = full[:-1]
    return full


def related(a, b):
    return a[: len(b)] == b or b[: len(a)] == a


def circles(known):
    return strong(edges_of(known))


def edges_of(known):
    edges = {}
    for here, path in known.items():
        text = without_tests(path.read_text())
        there = {target(use, here, known) for use in uses(text)}
        # The crate's root only lists modules; a parent and what is below it are one module.
        edges[here] = {one for one in there if one and one != here and not related(one, here)}
    return edges


def strong(edges):
    """Tarjan: sets of more than one file that reach each other."""
    index, low, stack, on, found = {}, {}, [], set(), []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        on.add(node)
        for other in edges.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in on:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            part = set()
            while True:
                other = stack.pop()
                on.discard(other)
                part.add(other)
                if other == node:
                    break
            if len(part) > 1:
                found.append(part)

    sys.setrecursionlimit(10_000)
    for node in edges:
        if node not in index:
            visit(node)
    return found


def crates():
    listed = subprocess.run(["git", "ls-files", "*/src/lib.rs"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    return [ROOT / Path(name).parent for name in listed if not name.startswith("fuzz/")]


def check():
    bad = 0
    for src in crates():
        crate = src.parent.name
        known = {name: path for name, path in modules(src).items() if not name or (crate, name[0]) not in TEST_ONLY}
        edges = edges_of(known)
        for part in strong(edges):
            bad += 1
            print(f"architecture: a circle of files in {crate}:", file=sys.stderr)
            for here in sorted(part):
                for other in sorted(edges[here] & part):
                    print(f"  {'/'.join(here)} uses {'/'.join(other)}", file=sys.stderr)
    return bad


def self_test():
    with tempfile.TemporaryDirectory() as dir:
        src = Path(dir) / "src"
        (src / "a").mkdir(parents=True)
        files = {
            "lib.rs": "mod a; mod b; mod c;",
            "a.rs": "use crate::b::B;\nmod inner;",
            "a/inner.rs": "use super::A; use crate::c;",
            "b.rs": "use std::fmt;\nfn f(_: crate::c::C) {}",
            "c.rs": "// use crate::a::A;\n#[cfg(test)]\nmod tests { use crate::a; }",
        }
        for name, text in files.items():
            (src / name).write_text(text)
        assert circles(modules(src)) == [], circles(modules(src))
        (src / "c.rs").write_text("use crate::{a::A, x};")
        assert circles(modules(src)) == [{("a",), ("b",), ("c",)}], circles(modules(src))
        (src / "c.rs").write_text("use super::a::inner::I;")
        assert {("a", "inner"), ("c",)} <= set().union(*circles(modules(src)))


if __name__ == "__main__":
    self_test()
    sys.exit(bool(check()))
