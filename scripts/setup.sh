#!/bin/sh
# Installs what building (and, with "test" or "quickstart", testing or the quick start) needs and this machine lacks: Debian packages where apt
# works, Python packages into .venv. What cannot be installed is named; only what a build cannot do without is an error.
# Usage: sh scripts/setup.sh [build | test | quickstart]
purpose=${1:-build}
cd "$(dirname "$0")/.." || exit 1

blas=$(if [ -n "$OPENBLAS_DIR" ]; then echo "-I$OPENBLAS_DIR/include"; else pkg-config --cflags openblas 2>/dev/null; fi)
has_header() { printf '#include <%s>\n' "$1" | ${CXX:-g++} -std=c++17 -x c++ $blas -M - >/dev/null 2>&1; }
has_command() { command -v "$1" >/dev/null 2>&1; }

# Debian packages that are missing, as " a b c".
missing() {
    has_command "${CXX:-g++}" || printf ' g++'
    has_command make || printf ' make'
    has_command python3 || printf ' python3'
    has_header CLI/CLI.hpp || printf ' libcli11-dev'
    has_header nlohmann/json.hpp || printf ' nlohmann-json3-dev'
    has_header cblas.h || printf ' libopenblas-dev'
    [ "$purpose" != test ] || has_header catch2/catch_all.hpp || has_header catch2/catch.hpp || printf ' catch2'
}

packages=$(missing)
# Text to train on, and what connects several CPU processes in tests; not worth an error if absent.
optional=""
[ "$purpose" = quickstart ] && ! has_command bible && optional=" bible-kjv"
[ "$purpose" = test ] && ! has_header gloo/allreduce.h && optional=" libgloo-dev"

if [ -n "$packages$optional" ] && has_command apt-get; then
    root=none
    if [ "$(id -u)" = 0 ]; then root=""; elif sudo -n true 2>/dev/null; then root="sudo -n"; fi
    if [ "$root" != none ]; then
        echo "installing$packages$optional"
        install="env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends"
        log=$(mktemp)
        $root apt-get update >"$log" 2>&1
        [ -z "$packages" ] || $root $install $packages >>"$log" 2>&1 || tail -n 3 "$log" >&2
        [ -z "$optional" ] || $root $install $optional >>"$log" 2>&1
        rm -f "$log"
        packages=$(missing)
    fi
fi
if [ -n "$packages" ]; then
    echo "missing packages:$packages. On Debian or Ubuntu: sudo apt-get install$packages" >&2
    exit 2
fi

# Python packages: the tests of scripts and tokenizers use them; training and the quick start need none.
if [ "$purpose" = test ]; then
    if [ ! -x .venv/bin/python3 ] && ! python3 -m venv --system-site-packages .venv >/dev/null 2>&1; then
        rm -rf .venv
        echo "python3 -m venv does not work here (Debian: apt-get install python3-venv); tests that need Python packages are skipped"
    elif ! .venv/bin/python3 -c 'import numpy, sentencepiece, tokenizers, safetensors, matplotlib, zstandard' >/dev/null 2>&1; then
        echo "installing scripts/requirements.txt into .venv"
        .venv/bin/python3 -m pip install -q --disable-pip-version-check --retries 1 -r scripts/requirements.txt >/dev/null 2>&1 ||
            echo "pip could not install them; tests that need them are skipped"
    fi
fi
exit 0
