#!/bin/sh
# Names the headers a build needs and does not find, and how to get them. Arguments: compiler, OpenBLAS flags.
missing=""
for pair in CLI/CLI.hpp:libcli11-dev nlohmann/json.hpp:nlohmann-json3-dev cblas.h:libopenblas-dev; do
    header=${pair%%:*}
    printf '#include <%s>\n' "$header" | ${1:-g++} -std=c++17 -x c++ $2 -fsyntax-only - 2>/dev/null || missing="$missing ${pair##*:}"
done
[ -z "$missing" ] && exit 0
echo "missing libraries:$missing. On Debian or Ubuntu: sudo apt-get install$missing (or sh scripts/setup.sh); elsewhere install CLI11, nlohmann/json, OpenBLAS." >&2
exit 2
