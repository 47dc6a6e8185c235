#!/bin/sh
# Installs what building (and, with "test" or "quickstart", testing or the quick start) needs and this machine lacks: Debian packages where apt
# works, Python packages into .venv. What cannot be installed is named; only what a build cannot do without is an error.
purpose=${1:-build}
cd "$(dirname "$0")/.." || exit 1

packages=""
need() { # header or command, package
    case $1 in
        *.h*) printf '#include <%s>\n' "$1" | ${CXX:-g++} -std=c++17 -x c++ -fsyntax-only - 2>/dev/null || packages="$packages $2" ;;
        *) command -v "$1" >/dev/null 2>&1 || packages="$packages $2" ;;
    esac
}
need g++ g++
need make make
need python3 python3
need CLI/CLI.hpp libcli11-dev
need nlohmann/json.hpp nlohmann-json3-dev
need cblas.h libopenblas-dev
if [ "$purpose" = test ]; then
    printf '#if __has_include(<catch2/catch_all.hpp>) || __has_include(<catch2/catch.hpp>)\n#else\n#error\n#endif\n' |
        ${CXX:-g++} -std=c++17 -x c++ -fsyntax-only - 2>/dev/null || packages="$packages catch2"
fi
# Text to train on; not worth an error if absent.
optional=""
[ "$purpose" = quickstart ] && ! command -v bible >/dev/null 2>&1 && optional="bible-kjv"

if [ -n "$packages$optional" ] && command -v apt-get >/dev/null 2>&1; then
    root=""
    if [ "$(id -u)" != 0 ]; then sudo -n true 2>/dev/null && root="sudo -n" || root=none; fi
    if [ "$root" != none ]; then
        echo "installing:$packages $optional"
        log=$(mktemp)
        $root apt-get update >"$log" 2>&1
        [ -z "$packages" ] || DEBIAN_FRONTEND=noninteractive $root apt-get install -y --no-install-recommends $packages >>"$log" 2>&1 || tail -n 3 "$log" >&2
        [ -z "$optional" ] || DEBIAN_FRONTEND=noninteractive $root apt-get install -y --no-install-recommends $optional >>"$log" 2>&1
        rm -f "$log"
        packages=""
        need CLI/CLI.hpp libcli11-dev
        need nlohmann/json.hpp nlohmann-json3-dev
        need cblas.h libopenblas-dev
    fi
fi
if [ -n "$packages" ]; then
    echo "missing packages:$packages. On Debian or Ubuntu: sudo apt-get install$packages" >&2
    exit 2
fi

# Python packages: the tokenizer tests and scripts use them; bytes need none.
if [ "$purpose" = test ] && [ ! -x .venv/bin/python3 ]; then
    echo "setting up .venv for the Python tests"
    if python3 -m venv .venv >/dev/null 2>&1; then
        .venv/bin/python3 -m pip install -q --disable-pip-version-check -r scripts/requirements.txt 2>/dev/null ||
            echo "Python packages could not be installed; tests that need them are skipped"
    else
        rm -rf .venv
        echo "python3 -m venv does not work here (Debian: apt-get install python3-venv); tests that need Python packages are skipped"
    fi
fi
exit 0
