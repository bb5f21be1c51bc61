#!/bin/sh
# Runs each fuzz target for a bounded time: fuzz.sh SECONDS [TARGET ..]. Needs cargo-fuzz and a C++ compiler, no nightly toolchain:
# RUSTC_BOOTSTRAP lets this one take the coverage options. There is no sanitizer, since the code has no `unsafe`.
set -eu
cd "$(dirname "$0")/.."
seconds=$1
shift
command -v cargo-fuzz >/dev/null || { echo "fuzz: cargo-fuzz is missing: cargo install --locked cargo-fuzz" >&2; exit 1; }
export RUSTC_BOOTSTRAP=1
[ $# -gt 0 ] || set -- $(cargo fuzz list)
bad=0
for target; do
    mkdir -p "fuzz/corpus/$target"
    seeds=fuzz/seeds/$target
    [ -d "$seeds" ] || seeds=
    echo "fuzz: $target for $seconds s"
    # The bytes that a crash was made of are printed with how to run them again.
    cargo fuzz run --sanitizer none "$target" "fuzz/corpus/$target" $seeds -- \
        -max_total_time="$seconds" -max_len=65536 -timeout=10 -rss_limit_mb=1024 -dict=fuzz/json.dict -print_final_stats=1 ||
        { echo "fuzz: $target found something; again with: RUSTC_BOOTSTRAP=1 cargo fuzz run --sanitizer none $target FILE" >&2; bad=1; }
done
exit $bad
