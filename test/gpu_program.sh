#!/usr/bin/env bash
# The program's tests on a GPU: every method and storage format, merges, kill -9 with --resume compared bit for bit, export, samples.
# Usage: test/gpu_program.sh [CLASS[.TEST] of test_program.py...]     needs a GPU and ./train_loqt built with nvcc (make)
set -euo pipefail
cd "$(dirname "$0")/.."
export LOQT_TEST_DEVICE=cuda LOQT_TEST_KILLS="${LOQT_TEST_KILLS:-5}"
nvidia-smi -L
if [ $# -gt 0 ]; then exec python3 test/test_program.py -v "$@"; fi
# The kills first: they matter most. Mistakes in files and options do not depend on the device.
status=0
python3 test/test_program.py -v KillTest || status=1
python3 test/test_program.py -v MethodTest NonFiniteTest DamageTest || status=1
python3 test/test_program_use.py -v MetricsTest UseTest || status=1
exit $status
