#!/bin/sh
# Names the libraries a build needs and does not find, and how to get them. Arguments: compiler, OpenBLAS flags.
compiler=${1:-g++}
if ! command -v $compiler >/dev/null 2>&1; then
    echo "there is no compiler \"$compiler\": install g++ 11 or newer (Debian or Ubuntu: sudo apt-get install g++), or set CXX" >&2
    exit 2
fi
missing=""
for pair in CLI/CLI.hpp:libcli11-dev nlohmann/json.hpp:nlohmann-json3-dev cblas.h:libopenblas-dev; do
    printf '#include <%s>\n' "${pair%%:*}" | $compiler -std=c++17 -x c++ $2 -M - >/dev/null 2>&1 || missing="$missing ${pair##*:}"
done
[ -z "$missing" ] && exit 0
echo "missing libraries:$missing. On Debian or Ubuntu: sudo apt-get install$missing (or sh scripts/setup.sh); elsewhere install CLI11, nlohmann/json and OpenBLAS" >&2
exit 2
