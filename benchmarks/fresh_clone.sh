#!/usr/bin/env bash
# Times README's two commands in a fresh clone with fresh environments; writes outputs/benchmarks/fresh_clone.json.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
clone=$(mktemp -d)
trap 'rm -rf "$clone"' EXIT
git clone --quiet "$root" "$clone/series"
cd "$clone/series"

seconds() {
    local start
    start=$(date +%s)
    "$@" >&2
    echo $(($(date +%s) - start))
}

install=$(seconds make .venv/.ready)
run=$(seconds make run)
test=$(seconds make test)
minutes() { awk "BEGIN {printf \"%.2f\", $1 / 60}"; }
mkdir -p "$root/outputs/benchmarks"
printf '{"install_minutes": %s, "run_minutes": %s, "test_minutes": %s, "cores": %s}\n' \
    "$(minutes "$install")" "$(minutes "$run")" "$(minutes "$test")" "$(nproc)" > "$root/outputs/benchmarks/fresh_clone.json"
cat "$root/outputs/benchmarks/fresh_clone.json"
