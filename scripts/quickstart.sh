#!/usr/bin/env bash
# From a fresh clone to a trained model: set up, build for this machine, turn real English text into tokens, train the tiny preset with LoQT,
# print a sample. Two idle cores take a minute and a half. Safe to run again: what is done is not done twice.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '\n== %s\n' "$*"; }

say "setting up"
sh scripts/setup.sh quickstart

if nvidia-smi -L >/dev/null 2>&1; then
    target=all
    command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ] || echo "there is a GPU but no nvcc (CUDA Toolkit 12.4 or newer): this build uses the CPU"
else
    target=cpu
fi
say "building (a few minutes the first time)"
make -s -j"$(nproc)" $target

say "text"
shards=data/shards/quickstart
if [ ! -f $shards/manifest.json ]; then
    mkdir -p $shards
    python3 data/quickstart_text.py $shards/text.txt
    python3 data/tokenize.py --tokenizer bytes --val-fraction 0.02 --out $shards --quiet $shards/text.txt
else
    echo "$shards is complete"
fi

# Threads spin for some microseconds, then wait asleep: by default they spin for so long that other programs on the cores slow them many times.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
run=runs/quickstart
say "training (Ctrl-C stops and saves; the same command goes on)"
if grep -qs '"finished": true' $run/metrics.jsonl; then
    echo "$run is trained; delete it to train again"
elif [ -f $run/config.json ]; then
    ./train_loqt --run.dir $run --resume
else
    ./train_loqt --config tiny --run.dir $run --data.train $shards --data.val $shards
fi

if ! grep -qs '"finished": true' $run/metrics.jsonl; then
    echo "stopped before the end; make quickstart goes on from here"
    exit 0
fi

say "what it learned"
python3 scripts/summary.py $run
printf '\nsample, prompt "In the beginning":\n'
./train_loqt --run.dir $run --sample "In the beginning" --sample-tokens 240
