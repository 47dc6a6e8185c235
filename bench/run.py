#!/usr/bin/env python3
"""Times train_loqt's training step beside a full-rank peer in PyTorch, on the same device, one after the other, each at its best micro-batch.

    make bench                                        all of it (BENCH="--presets 60m" passes options)
    python3 bench/run.py --presets 60m,1b             some presets
    python3 bench/run.py --presets 1b -- --rank 256   after --, keys of the configuration

Prints tables in Markdown and writes them, with all figures as JSON, to --out. Without a GPU it runs the tiny preset on the CPU; without PyTorch
the peer is left out. bench/README.md says what is measured and how.
"""
import argparse
import datetime
import json
import os
import subprocess
import sys

from report import markdown

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Sequences per pass that the peer is tried with. What does not fit is passed over.
PEER_MICRO_BATCHES = {"60m": [512, 256], "130m": [512, 256], "350m": [256, 128], "1b": [128, 64]}
MODEL_KEYS = {"hidden", "intermediate", "heads", "kv_heads", "layers", "vocab"}
QUICK = ["--steps", "4", "--merges", "0", "--profile", "0"]  # for choosing a micro-batch


# Without it idle OpenMP threads spin at length, which ruins times on a CPU that others use. For both sides.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def gpu_there():
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
    except OSError:
        return False


def say(text, end="\n"):
    print(text, end=end, file=sys.stderr, flush=True)


def config_path(preset):
    path = os.path.join(ROOT, "configs", preset + ".json")
    return path if os.path.exists(path) else preset


def find_binary(args):
    if args.binary:
        return os.path.abspath(args.binary)
    command = ["make", f"-j{os.cpu_count()}", "--no-print-directory", "print-bench"]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit("run.py: the build failed; see above")
    return os.path.join(ROOT, result.stdout.split()[-1])


def bench_step(args, preset, method, options):
    """The JSON of one build/bench_step, or {"error": its message}."""
    command = [args.binary, "--config", config_path(preset), "--method.name", method, "--run.device", args.device, *options, *args.overrides]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return json.loads(result.stdout)
    lines = result.stderr.strip().splitlines() or [f"ended with status {result.returncode}"]
    return {"error": lines[-1].replace("bench_step: ", "", 1)}


def ours(args, preset, method):
    """Our best: the micro-batch that the program chooses by itself in full, then halves of it for as long as they are faster."""
    full = ["--steps", str(args.steps), "--seconds", str(args.seconds), "--merges", str(args.merges), "--profile", str(args.profile)]
    chosen = ["--train.micro_batch", str(args.micro_batch)] if args.micro_batch else []
    say(f"  {method} ...", end="")
    best = bench_step(args, preset, method, full + chosen)
    if "error" in best:
        say(f" {best['error']}")
        return best
    say(f" micro-batch {best['micro_batch']}: {best['tokens_per_s']:,.0f} tokens/s", end="")
    tried = {best["micro_batch"]: best["tokens_per_s"]}
    micro_batch, top = best["micro_batch"], best["tokens_per_s"]
    while not args.micro_batch and micro_batch % 2 == 0 and len(tried) < args.sweep:
        trial = bench_step(args, preset, method, QUICK + ["--train.micro_batch", str(micro_batch // 2)])
        if "error" in trial or trial["micro_batch"] in tried:
            break
        micro_batch = trial["micro_batch"]
        tried[micro_batch] = trial["tokens_per_s"]
        say(f", {micro_batch}: {trial['tokens_per_s']:,.0f}", end="")
        if trial["tokens_per_s"] <= top:
            break
        top = trial["tokens_per_s"]
    fastest = max(tried, key=tried.get)
    if fastest != best["micro_batch"]:
        again = bench_step(args, preset, method, full + ["--train.micro_batch", str(fastest)])
        best = again if "error" not in again and again["tokens_per_s"] > best["tokens_per_s"] else best
        say(f"; again {fastest}: {again.get('tokens_per_s', 0):,.0f}", end="")
    say("")
    best["tried"] = tried
    return best


def peer(args, preset, run):
    """The JSON of peer_torch.py at the batch and sequence length of our run, or {"error": why not}."""
    python = args.torch_python
    probe = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True)
    if probe.returncode:
        return {"error": f"{python} has no PyTorch"}
    if any(o.split("=")[0].lstrip("-").split(".")[-1].replace("-", "_") in MODEL_KEYS for o in args.overrides):
        return {"error": "the model was changed after --, which the peer does not know"}
    batch = run["batch"]
    candidates = args.peer_micro_batches or PEER_MICRO_BATCHES.get(preset, [batch] if batch <= 64 else [128, 64])
    candidates = [m for m in candidates if batch % m == 0] or [batch]
    command = [python, os.path.join(ROOT, "bench", "peer_torch.py"), "--config", config_path(preset), "--device", args.device if args.device.startswith("cuda") else "cuda" if run["gpu"] else "cpu",
               "--batch", str(batch), "--seq-len", str(run["seq_len"]), "--micro-batches", ",".join(map(str, candidates)),
               "--steps", str(args.steps), "--seconds", str(args.seconds), "--kinds", args.peer_kinds, "--attention", args.peer_attention]
    if args.peer_compile:
        command += ["--compile", args.peer_compile]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        return {"error": f"peer_torch.py ended with status {result.returncode}"}
    return json.loads(result.stdout.strip().splitlines()[-1])


def commit():
    try:
        run = lambda *command: subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        head = run("rev-parse", "--short", "HEAD")
        changed = run("status", "--porcelain", "--untracked-files=no").stdout.strip()
        return head.stdout.strip() + (" with changes" if changed else "") if head.returncode == 0 else "unknown"
    except OSError:
        return "unknown"


def parse_arguments(argv):
    at = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(x) for x in text.split(",")]
    parser.add_argument("--presets", help="names in configs/, or files [60m,130m,350m,1b; without a GPU tiny]")
    parser.add_argument("--methods", default="loqt,full", help="ours to run [loqt,full]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument("--steps", type=int, default=30, help="timed steps at most [30]")
    parser.add_argument("--seconds", type=float, default=4, help="end timing after this long, but not before five steps (or --steps, if fewer) [4]")
    parser.add_argument("--merges", type=int, default=2, help="timed merges in each projection mode; 0 = none [2]")
    parser.add_argument("--profile", type=int, default=2, help="steps to break down by operation; 0 = none [2]")
    parser.add_argument("--micro-batch", type=int, help="ours, instead of trying")
    parser.add_argument("--sweep", type=int, default=2, help="micro-batches of ours to try at most [2]")
    parser.add_argument("--no-peer", action="store_true", help="leave PyTorch out")
    parser.add_argument("--peer-micro-batches", type=numbers, help="the peer's to try, such as 256,128")
    parser.add_argument("--peer-kinds", default="lean,hf", help="peer models [lean,hf]")
    parser.add_argument("--peer-attention", default="default", help="attention kernels to try, such as default,cudnn,flash [default]")
    parser.add_argument("--peer-compile", help="modes of torch.compile to try, such as default,max-autotune-no-cudagraphs")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python with PyTorch [this one]")
    parser.add_argument("--binary", help="bench_step [built if it has to be]")
    parser.add_argument("--out", default=os.path.join(ROOT, "build", "bench"), help="where to write OUT.md and OUT.json [build/bench]")
    args = parser.parse_args(argv[:at])
    args.overrides = argv[at + 1:]
    return args


def main(argv):
    args = parse_arguments(argv)
    args.binary = find_binary(args)
    presets = (args.presets or ("60m,130m,350m,1b" if args.device != "cpu" and gpu_there() else "tiny")).split(",")
    report = {"commit": commit(), "date": datetime.date.today().isoformat(), "command": "python3 bench/run.py " + " ".join(argv), "presets": {}}
    for preset in presets:
        say(preset)
        entry = report["presets"][os.path.splitext(os.path.basename(preset))[0]] = {"ours": {}}
        for method in args.methods.split(","):
            entry["ours"][method] = ours(args, preset, method)
        done = [r for r in entry["ours"].values() if "error" not in r]
        if done and not args.no_peer:
            entry["peer"] = peer(args, preset, done[0])
            if "error" in entry["peer"]:
                say(f"  the peer is left out: {entry['peer']['error']}")
        os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
        for suffix, text in ((".json", json.dumps(report, indent=1) + "\n"), (".md", markdown(report))):
            with open(args.out + suffix, "w", encoding="utf-8") as file:
                file.write(text)
    print(markdown(report))
    return 1 if any("error" in run for entry in report["presets"].values() for run in entry["ours"].values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
