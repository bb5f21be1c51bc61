#!/bin/sh
# Prometheus' configuration and rules, with promtool (Debian's package prometheus): valid; every alert has a severity, a
# summary, a description, a runbook that is there, a test in which it fires and one in which it does not.
set -eu
cd "$(dirname "$0")/../config/prometheus"
command -v promtool >/dev/null || { echo "prometheus: promtool is missing (make install)" >&2; exit 1; }
bad=0
complain() {
    echo "prometheus: $1" >&2
    bad=1
}

quietly() {
    "$@" >"$output" 2>&1 || { cat "$output" >&2; complain "$1 $2 $3 failed"; }
}
output=$(mktemp)
trap 'rm -f "$output"' EXIT

quietly promtool check config prometheus.yml
quietly promtool check rules rules/*.yml
quietly promtool test rules tests/*.yml

# "ALERT key" for every key of every alert, in the layout the rules are written in.
keys=$(awk '
    $2 == "alert:" { alert = $3 }
    $1 == "-" && $2 == "record:" { alert = "" }
    alert != "" && /severity: (critical|warning)/ { print alert, "severity" }
    alert != "" && $1 ~ /^(summary|description|runbook_url):$/ { print alert, substr($1, 1, length($1) - 1) }
' rules/*.yml)
# "ALERT fires" and "ALERT quiet" for every case of every test.
cases=$(awk '
    $1 == "alertname:" { alert = $2 }
    $1 == "exp_alerts:" { print alert, ($2 == "[]" ? "quiet" : "fires") }
' tests/*.yml)
for alert in $(awk '$2 == "alert:" { print $3 }' rules/*.yml); do
    for key in severity summary description runbook_url; do
        echo "$keys" | grep -qx "$alert $key" || complain "alert $alert has no $key"
    done
    for case in fires quiet; do
        echo "$cases" | grep -qx "$alert $case" || complain "alert $alert has no test in which it ${case}"
    done
    grep -q "^Alerts: .*\`$alert\`" ../../docs/runbooks/*.md || complain "no runbook lists alert $alert"
done

# Every runbook that is named exists, and each has what a tired person looks for.
for page in $(awk '$1 == "runbook_url:" { print $2 }' rules/*.yml | sort -u); do
    [ -f "../../$page" ] || complain "$page is missing"
done
for page in ../../docs/runbooks/*.md; do
    name=${page##*/}
    [ "$name" = README.md ] && continue
    for heading in "Meaning" "Severity" "Diagnosis" "Mitigation" "Resolved when" "Impact"; do
        grep -qxF "## $heading" "$page" || complain "docs/runbooks/$name has no heading $heading"
    done
    grep -q "runbook_url: docs/runbooks/$name\$" rules/*.yml || complain "no alert leads to docs/runbooks/$name"
    for alert in $(sed -n 's/^Alerts: //p' "$page" | tr -d '`,'); do
        grep -q "alert: $alert\$" rules/*.yml || complain "docs/runbooks/$name lists $alert, which does not exist"
    done
    grep -q "]($name)" ../../docs/runbooks/README.md || complain "docs/runbooks/README.md does not list $name"
    for link in $(grep -o '](\([a-z.-]*/\)*[a-z-]*\.md)' "$page" | tr -d ']()'); do
        [ -f "../../docs/runbooks/$link" ] || complain "docs/runbooks/$name: $link is not there"
    done
done

[ "$bad" -eq 0 ] && echo "prometheus: configuration, rules, tests and runbooks hold"
exit "$bad"
