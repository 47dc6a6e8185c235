#!/usr/bin/env bash
# The program's tests on a GPU: every method and storage format, merges, kill -9 with --resume compared bit for bit, export, samples; with two GPUs or
# more also runs by several processes. Groups run side by side, each with a line when it is done; what failed is shown in full.
# Usage: test/gpu_program.sh [CLASS[.TEST] of test_program.py...]     needs a GPU and ./train_loqt built with nvcc (make)
set -uo pipefail
cd "$(dirname "$0")/.."
export LOQT_TEST_DEVICE=cuda LOQT_TEST_KILLS="${LOQT_TEST_KILLS:-5}" LOQT_TEST_RANK_KILLS="${LOQT_TEST_RANK_KILLS:-5}"
nvidia-smi -L || exit 2
if [ $# -gt 0 ]; then exec python3 test/test_program.py -v "$@"; fi

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
# group NAME COMMAND...: its result as a line, and a file $logs/NAME.failed if it is a bad one.
group() {
    local name=$1 begin=$SECONDS
    shift
    if "$@" >"$logs/$name" 2>&1; then
        echo "$name: $(tail -n 1 "$logs/$name"), $(grep -E '^Ran ' "$logs/$name"), $((SECONDS - begin)) s in all"
    else
        echo "$name: FAILED after $((SECONDS - begin)) s"
        touch "$logs/$name.failed"
        grep -vE '(ok|skipped .*)$' "$logs/$name" | tail -n 60
    fi
}
shares=6
for ((i = 0; i < shares; ++i)); do LOQT_TEST_SHARE="$i/$shares" group "methods-$i" python3 test/test_program.py -v MethodTest.test_variants & done
group kills python3 test/test_program.py -v KillTest &
group damage python3 test/test_program.py -v NonFiniteTest DamageTest &
wait
# What compares memory with its plan has the GPU to itself.
LOQT_TEST_SHARE=999/1000 group methods-rest python3 test/test_program.py -v MethodTest
group use python3 test/test_program_use.py -v MetricsTest UseTest
shares=4
for ((i = 0; i < shares; ++i)); do LOQT_TEST_SHARE="$i/$shares" group "several-gpus-$i" python3 test/test_parallel.py -v SameTrainingTest.test_variants & done
LOQT_TEST_SHARE=999/1000 group several-gpus-rest python3 test/test_parallel.py -v
wait
if compgen -G "$logs/*.failed" >/dev/null; then exit 1; fi
