#!/usr/bin/env python3
"""Runs train_loqt case by case and compares the memory it planned with what it took: GPU memory by the driver, host memory by the kernel.

    python3 bench/memory.py                                every case that this machine's device can run
    python3 bench/memory.py --cases 7b-2560,13b-per-layer  some of them; --list shows all with their commands
    python3 bench/memory.py --plan-only                    what is planned, without running anything: needs no GPU
    python3 bench/memory.py --table1                       weights and optimizer beside the paper's Table 1: needs no GPU
    python3 bench/memory.py --show A.json B.json           the table again, from files of earlier calls; --brief: the columns of docs/memory.md
    python3 bench/memory.py --cases 1b -- --rank 256       after --, options of train_loqt for every case

Each case is 20 steps (--steps) with merges at the first and in the middle and a checkpoint at the end. Rows in Markdown are printed, and all figures
written to --out, as soon as they are there. bench/README.md says what is measured and how. The status is 1 if a case failed or has a remark.
"""
import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import sys
import time

from measure import COMMON, Driver, gib, new_report, read_plan, run_program, shown_now, synthetic_shards, work_folder, write_report
from report import GIB, number, table
from run import ROOT, config_path, gpu_there, say

sys.path.append(os.path.join(ROOT, "scripts"))
from summary import read_events  # noqa: E402

TOLERANCE = 0.02  # between planned and measured peak, on a GPU
HOST_LIMIT = 8 * GIB  # of a process' own host memory
# name: preset, budget ("" = what is free), options. Two micro-batches or more a step wherever the method allows it, so that gradients are kept.
LARGE = "--optimizer.lr 3e-4 "
CASES = {
    "60m": ("60m", "", "--optimizer.lr 1e-3"),
    "130m": ("130m", "", "--optimizer.lr 1e-3"),
    "350m": ("350m", "", "--optimizer.lr 1e-3"),
    "1b": ("1b", "", "--optimizer.lr 1e-3"),
    "7b-1280": ("7b", "24GiB", LARGE + "--train.batch 10 --train.micro_batch 5 --train.recompute light"),
    "7b-2560": ("7b", "24GiB", LARGE + "--train.batch 20 --train.micro_batch 10 --train.recompute light --optimizer.embedding_moments bf16"),
    "7b-block-8192": ("7b", "24GiB", LARGE + "--train.batch 64 --train.micro_batch 32 --train.recompute block"),
    "7b-seq2048": ("7b", "24GiB", LARGE + "--train.seq_len 2048 --train.batch 2 --train.micro_batch 1"),
    "7b-seq4096": ("7b", "24GiB", LARGE + "--train.seq_len 4096 --train.batch 2 --train.micro_batch 1"),
    "13b-per-layer": ("13b", "20.5GiB", LARGE + "--train.batch 1 --train.micro_batch 1 --train.updates per_layer"),
    "13b-ordinary": ("13b", "23.5GiB", LARGE + "--train.batch 4 --train.micro_batch 1 --train.recompute block"),
    "13b-40GiB": ("13b", "40GiB", LARGE + "--train.batch 256 --train.micro_batch 128"),
    "tiny": ("tiny", "", "--optimizer.lr 0.01 --train.batch 8 --train.micro_batch 4 --train.seq_len 64"),
}
# Weights and optimizer of the paper's Table 1, in its unit: MiB / 1000.
TABLE1 = {"60m": {"full": 0.36, "loqt": 0.23, "loqt-nq": 0.28}, "130m": {"full": 0.76, "loqt": 0.49, "loqt-nq": 0.63},
          "350m": {"full": 2.06, "loqt": 0.98, "loqt-nq": 1.47}, "1b": {"full": 7.80, "loqt": 3.16, "loqt-nq": 5.11}}
CHOICES = ["train.recompute", "train.effective_weights", "train.updates", "train.gradients", "optimizer.moments", "optimizer.embedding_moments"]
SETTINGS = "recompute, weights, updates, gradients, moments, of embeddings"
COLUMNS = ["case", "budget", "micro-batch", SETTINGS, "planned, GiB", "peak, GiB", "difference", "by the program, GiB", "loss", "tokens/s", "merge, s: first, later",
           "host: RSS, own, GiB", "start, s", "checkpoint, s", "wall, s", "remarks"]
PLANNED = ["case", "budget", "micro-batch", SETTINGS, "planned, GiB", "remarks"]
BRIEF = ["case", "budget", "micro-batch", SETTINGS, "planned, GiB", "peak, GiB", "tokens/s", "later merge, s", "host, own, GiB"]


# Figures

def falling(losses):
    """The mean of the last quarter is below that of the first: single small batches scatter."""
    quarter = max(1, len(losses) // 4)
    return len(losses) > 1 and None not in losses and statistics.mean(losses[-quarter:]) < statistics.mean(losses[:quarter])


def figures(events):
    """What metrics.jsonl (events by kind, read_events) says about a run."""
    train, merges = events.get("train", []), events.get("merge", [])
    start, merged = events.get("start", [{}])[-1], {m["step"] + 1 for m in merges}  # line u + 1 contains merge u
    plain = [s for s in train if s["step"] not in merged]
    step_ms = statistics.median(s["step_ms"] for s in plain) if plain else None
    by_step = {s["step"]: s for s in train}
    return {
        "device": start.get("device"), "method": start.get("method"), "micro_batch": start.get("micro_batch"), "run_planned_bytes": start.get("planned_bytes"),
        "steps": len(train), "losses": [s["loss"] for s in train],  # None: not finite
        "nonfinite": len(events.get("nonfinite", [])),
        "tokens_per_s": statistics.median(s["tokens_per_s"] for s in plain) if plain else None,
        "step_seconds": step_ms and step_ms / 1e3,
        # What a merge costs in all: its step less the usual one.
        "merges": [{"step": m["step"], "seconds": m["seconds"], "failed": m["failed"],
                    "step_seconds_more": (by_step[m["step"] + 1]["step_ms"] - step_ms) / 1e3 if step_ms and m["step"] + 1 in by_step else None} for m in merges],
        "program_peak_bytes": max((s["memory_bytes"] for s in train), default=None),
        "checkpoint_seconds": sum(c["seconds"] for c in events["checkpoint"]) if "checkpoint" in events else None,
    }


def remarks(r):
    """What is not as it should be, in words."""
    found, low_rank = [r["error"]] if r.get("error") else [], r.get("method") not in (None, "full")
    if r.get("steps"):
        if r["nonfinite"] or None in r["losses"]:
            found.append("loss or gradient not finite")
        elif not falling(r["losses"]):
            found.append("loss does not fall")
        if low_rank and not any(0 < m["step"] < r["steps"] - 1 for m in r["merges"]):
            found.append("no merge in the middle")
        if sum(m["failed"] for m in r["merges"]):
            found.append(f"{sum(m['failed'] for m in r['merges'])} matrices were not merged")
    if r.get("run_planned_bytes") not in (None, r.get("planned_bytes")):
        found.append(f"the run planned {r['run_planned_bytes'] / GIB:.3f} GiB, --plan {r['planned_bytes'] / GIB:.3f}")
    if r.get("driver_peak_bytes") is not None and r.get("steps"):
        if r["plan"]["budget"] and r["driver_peak_bytes"] > r["plan"]["budget"]:
            found.append("above its budget")
        if abs(r["driver_peak_bytes"] / r["planned_bytes"] - 1) > TOLERANCE:
            found.append(f"peak not within {100 * TOLERANCE:.0f} % of the plan")
        if abs(r.get("driver_left_bytes", 0)) > 2**26:
            found.append(f"other programs' use of the GPU changed by {r['driver_left_bytes'] / 2**20:.0f} MiB")
    if r.get("host_own_bytes", 0) > HOST_LIMIT:
        found.append(f"more than {HOST_LIMIT / GIB:.0f} GiB of host memory")
    return found


def cells(r):
    """{column: text} of one case; "-" for what is not known. Peak is the driver's; without a GPU the program's, which includes its binary: no difference from the plan is shown."""
    plan, losses, planned, driver = r.get("plan"), r.get("losses") or [None], r["planned_bytes"], r.get("driver_peak_bytes")
    merges = [number(m["step_seconds_more"], "{:.1f}") for m in r.get("merges", [])]
    return {
        "case": r["name"], "budget": r["budget"] or (f"({gib(plan['budget'])} GiB)" if plan and plan["budget"] else "-"),
        "micro-batch": f"{plan['tokens_per_micro_batch'] // plan['seq_len']} × {plan['seq_len']}" if plan else "-",
        SETTINGS: ", ".join(plan["choices"][key]["value"] if key in plan["choices"] else "-" for key in CHOICES) if plan else "-",
        "planned, GiB": gib(planned), "peak, GiB": gib(r.get("program_peak_bytes") if driver is None else driver),
        "difference": number(100 * (driver / planned - 1) if driver and planned else None, "{:+.2f} %"),
        "by the program, GiB": gib(r.get("program_peak_bytes")), "loss": f"{number(losses[0], '{:.3f}')} → {number(losses[-1], '{:.3f}')}",
        "tokens/s": number(r.get("tokens_per_s")), "merge, s: first, later": ", ".join(merges) or "-", "later merge, s": ", ".join(merges[1:]) or "-",
        "host: RSS, own, GiB": f"{gib(r.get('host_rss_bytes'))}, {gib(r.get('host_own_bytes'))}", "host, own, GiB": gib(r.get("host_own_bytes")),
        **{f"{what}, s": number(r.get(f"{what}_seconds"), "{:.1f}") for what in ("start", "checkpoint", "wall")}, "remarks": "; ".join(r["remarks"]),
    }


def head(columns):
    return table(columns, []).rstrip("\n")


def line(r, columns):
    found = cells(r)
    return table([found[column] for column in columns], []).splitlines()[0]


# Cases

def budget_of(args, name):
    return CASES[name][1] if args.budget is None else args.budget


def merge_gap(steps):
    """Steps between merges: one comes at the first step and one in the middle. A merge needs as many steps again after it."""
    return 2 * steps // 5


def options_of(args, name):
    """train_loqt's options for a case, but for preset, device, data and run directory."""
    budget = budget_of(args, name)
    return ["--train.steps", str(args.steps), "--method.merge_gap", str(merge_gap(args.steps)), *COMMON, *shlex.split(CASES[name][2]),
            *(["--run.memory_budget", budget] if budget else []), *args.overrides]


def command_of(args, name):
    return [args.binary, "--config", config_path(CASES[name][0]), "--run.device", args.device, *options_of(args, name)]


def listed(args):
    """Every case with a command to paste, once DATA is replaced."""
    text = "# DATA: a folder of token shards (data/README.md) with the preset's vocabulary, as this script makes them of synthetic tokens\n"
    for name in args.names:
        text += f"{name:15} ./train_loqt --config {CASES[name][0]} {shlex.join(options_of(args, name))} --data.train DATA --data.val '' --run.dir runs/{name}\n"
    return text


def measure(args, name, driver):
    """One case: planned, run, judged."""
    command = command_of(args, name)
    r = {"name": name, "command": shlex.join(["./train_loqt", *command[1:]]), "budget": budget_of(args, name), "planned_bytes": None}
    folder = os.path.join(args.work, name)
    try:
        plan = r["plan"] = read_plan(command)
        r["planned_bytes"] = plan["total"]
        if args.plan_only:
            return r
        data = args.data or synthetic_shards(args.work, plan["model"]["vocab"], args.steps * plan["batch"] * plan["seq_len"] + 1)
        begin = time.time()
        (peaks,), r["wall_seconds"], r["error"] = run_program([*command, "--data.train", data, "--data.val", "", "--run.dir", folder], folder + ".log", [driver], args.timeout)
        r.update(peaks)
        if os.path.exists(os.path.join(folder, "metrics.jsonl")):
            events = read_events(folder)
            r.update(figures(events))
            if "start" in events:
                r["start_seconds"] = events["start"][0]["time"] - begin
    except (ValueError, OSError) as error:
        r["error"] = str(error)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return r


def table1(args):
    """Planned weights and moments with Adam in bf16, as the paper's, in the paper's unit."""
    rows = []
    for preset, paper in TABLE1.items():
        cells = []
        for method, published in paper.items():
            plan = read_plan([args.binary, "--config", config_path(preset), "--run.device", "cuda", "--method.name", method, "--optimizer.moments", "bf16",
                              "--train.batch", "1", "--train.micro_batch", "1", *args.overrides])
            cells += [f"{plan['weights_and_optimizer_bytes'] / 2**20 / 1000:.3f}", f"{published:.2f}"]
        rows.append([preset, *cells])
    methods = next(iter(TABLE1.values()))
    return table(["preset", *(text for method in methods for text in (method, f"{method}, paper"))], rows)


def parse_arguments(argv):
    at = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help="names, in this order [all but tiny; on a CPU tiny]")
    parser.add_argument("--list", action="store_true", help="print all cases, or --cases, with their commands")
    parser.add_argument("--plan-only", action="store_true", help="plan the cases, run none")
    parser.add_argument("--table1", action="store_true", help="weights and optimizer beside the paper's Table 1")
    parser.add_argument("--brief", action="store_true", help="fewer columns, for docs/memory.md; remarks go to stderr")
    parser.add_argument("--steps", type=int, default=20, help="steps of a case, 3 or more [20]")
    parser.add_argument("--show", nargs="+", metavar="FILE.json", help="print the table from these files; a case that is in several counts as in the last")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument("--budget", help='instead of every case\'s own, such as 40GiB; "" for what is free')
    parser.add_argument("--data", help="folder of token shards [synthetic ones, made here]")
    parser.add_argument("--work", help="folder for run directories; 13b needs 25 GB [a temporary one]")
    parser.add_argument("--keep", action="store_true", help="keep run directories")
    parser.add_argument("--timeout", type=float, default=400, help="seconds a case may take [400]")
    parser.add_argument("--binary", default=os.path.join(ROOT, "train_loqt"), help="the program [./train_loqt]")
    parser.add_argument("--out", default=os.path.join(ROOT, "build", "memory.json"), help="where to write the figures [build/memory.json]")
    args = parser.parse_args(argv[:at])
    args.overrides = argv[at + 1:]
    args.binary = os.path.abspath(args.binary)
    args.columns = BRIEF if args.brief else PLANNED if args.plan_only else COLUMNS
    if args.steps < 3:
        parser.error("--steps: a merge in the middle takes 3 or more")
    if args.device == "auto":
        args.device = "cuda" if args.plan_only or gpu_there() else "cpu"
    usual = list(CASES) if args.list else ["tiny"] if args.device == "cpu" else [name for name in CASES if name != "tiny"]
    args.names = args.cases.split(",") if args.cases else usual
    unknown = [name for name in args.names if name not in CASES]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    return args


def read_reports(paths):
    cases = {}
    for path in paths:
        with open(path, encoding="utf-8") as file:
            cases.update({r["name"]: r for r in json.load(file)["cases"]})
    return list(cases.values())


def show(args, r):
    print(line(r, args.columns), flush=True)
    if "remarks" not in args.columns and r["remarks"]:
        say(f"{r['name']}: {'; '.join(r['remarks'])}")


def run_cases(args, command):
    """Prints each case's row when it has it. → their figures."""
    driver = Driver(args.device) if args.device.startswith("cuda") and not args.plan_only else None
    report = new_report(args, command, cases=[])
    print(head(args.columns), flush=True)
    for name in args.names:
        shown_now(name)
        r = measure(args, name, driver)
        r["remarks"] = remarks(r)
        report["cases"].append(r)
        show(args, r)
        write_report(args, report)
    return report["cases"]


def main(argv):
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the program and its files go too
    if args.show:
        print(head(args.columns), flush=True)
        for r in read_reports(args.show):
            show(args, r)
        return 0
    if args.list:
        print(listed(args), end="")
        return 0
    if args.table1:
        print(table1(args), end="")
        return 0
    with work_folder(args, "memory"):
        cases = run_cases(args, "python3 bench/memory.py " + shlex.join(argv))
    return 1 if any(r["remarks"] for r in cases) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, ValueError) as error:
        sys.exit(f"memory.py: {error}")
