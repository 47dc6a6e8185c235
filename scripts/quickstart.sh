#!/usr/bin/env bash
# From a fresh clone to a trained model: set up, build for this machine, turn real English text into tokens, train the tiny preset with LoQT,
# print a sample. About four minutes on two CPU cores, seconds on a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '\n== %s\n' "$*"; }

say "setting up"
sh scripts/setup.sh quickstart

say "building"
if nvidia-smi -L >/dev/null 2>&1; then target=all; else target=cpu; fi
make -s -j"$(nproc)" $target

say "text"
mkdir -p data/shards/quickstart
if [ ! -f data/shards/quickstart/manifest.json ]; then
    python3 data/quickstart_text.py data/shards/quickstart/text.txt
    python3 data/tokenize.py --tokenizer bytes --val-fraction 0.02 --out data/shards/quickstart --quiet data/shards/quickstart/text.txt
fi

say "training (Ctrl-C stops and saves; --resume goes on)"
run=runs/quickstart
if [ -f $run/config.json ]; then
    ./train_loqt --run.dir $run --resume
else
    ./train_loqt --config tiny --run.dir $run --data.train data/shards/quickstart --data.val data/shards/quickstart
fi

say "what it learned"
python3 scripts/summary.py $run
echo
echo 'sample, prompt "In the beginning":'
./train_loqt --run.dir $run --sample "In the beginning" --sample-tokens 240 2>/dev/null
