#!/usr/bin/env python3
"""Trains on one GPU and on several of this machine, and says what several are worth: throughput, communication, merges, memory, losses; and kills ranks.

    python3 bench/scaling.py                             60m and 1b on two GPUs
    python3 bench/scaling.py --presets 1b --gpus 4       another preset, more GPUs
    python3 bench/scaling.py --kill 5                    and a rank of the first preset killed five times in mid-step
    python3 bench/scaling.py --parts '' --kill 5         only that
    python3 bench/scaling.py --show A.json               the table again, from files of earlier calls
    python3 bench/scaling.py -- --rank 256               after --, options of train_loqt for every run

Rows in Markdown are printed, and all figures written to --out, as soon as they are there. Without a GPU the tiny preset is run by processes on the CPU:
that shows that everything works, its figures mean nothing. bench/README.md says what is measured and how. The status is 1 if a run failed, a wanted figure
was missed, or a killed run did not end and go on as it should.
"""
import argparse
import contextlib
import filecmp
import json
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time

from measure import COMMON, Driver, alive, gib, kill, kill_all, message_of, new_report, ranks_of, read_plan, run_program, shown_now, synthetic_shards, work_folder, write_report
from report import number, ratio, table
from run import ROOT, config_path, gpu_there

sys.path.append(os.path.join(ROOT, "scripts"))
from summary import read_events  # noqa: E402

# What two H200s of one host are to reach; the rest holds for any number of GPUs.
THROUGHPUT = {"60m": 1.90, "1b": 1.95}
COMMUNICATION = {"1b": 0.03}
MERGE, MEMORY = 0.6, 1.03
LR = "1e-3"  # of every preset: losses of runs that should be the same are compared, and a rate that is too high drives them apart
OPTIONS = {"tiny": ["--train.batch", "8", "--train.seq_len", "64"]}
FIXED = ["train.recompute", "train.effective_weights", "optimizer.embedding_moments"]  # as planned for one GPU in all runs of a preset
WARM = 3  # steps left out at the start: algorithms are tried, connections made
FAST_STEPS, KILL_STEPS, KILL_EVERY = 8, 24, 6  # steps of a run for fast merges; of one whose ranks are killed, and between its checkpoints
# The runs: on all GPUs or on one; the whole batch or a GPU's share of it; merges exact or fast. One that takes all comes first: where they cannot be had, nothing is run.
RUNS = {"many": (True, True, "gram"), "one": (False, False, "gram"), "whole": (False, True, "gram"), "fast many": (True, True, "subspace"), "fast one": (False, False, "subspace")}
PARTS = {"weak": ("many", "one"), "strong": ("many", "whole"), "fast": ("fast many", "fast one")}


# Figures

def plain_steps(events):
    """Times in ms of the steps that only train: not the first, and none with a merge or just after an evaluation or a checkpoint. Line u + 1 contains merge u."""
    other = {e["step"] + 1 for kind in ("merge", "eval", "checkpoint") for e in events.get(kind, [])}
    return [s["step_ms"] for s in events.get("train", []) if s["step"] > WARM and s["step"] not in other]


def figures(events):
    """What metrics.jsonl (events by kind, read_events) says about a run."""
    start, train, plain = events.get("start", [{}])[-1], events.get("train", []), plain_steps(events)
    median, by_step = statistics.median(plain) if plain else None, {s["step"]: s["step_ms"] for s in train}
    merges = [{"step": m["step"], "seconds": m["seconds"], "failed": m["failed"],
               "added_seconds": (by_step[m["step"] + 1] - median) / 1e3 if median and m["step"] + 1 in by_step else None} for m in events.get("merge", [])]
    return {"device": start.get("device"), "gpus": start.get("gpus"), "micro_batch": start.get("micro_batch"), "planned_bytes": start.get("planned_bytes"),
            "step_ms": median, "plain_ms": plain, "merges": merges, "steps": [s["step"] for s in train], "losses": [s["loss"] for s in train],
            "program_peak_bytes": max((s["memory_bytes"] for s in train), default=None)}


def later_merges(run):
    """Seconds that a merge adds to its step: the median of all but the first."""
    values = [m["added_seconds"] for m in run["merges"][1:] if m["added_seconds"] is not None]
    return statistics.median(values) if values else None


def peaks(run):
    """Bytes of each GPU by the driver; without one the program's own figure."""
    return run["driver_peaks"] or [run["program_peak_bytes"]]


def difference(one, many):
    """{largest, step, mean} of many's losses less one's, over the steps that both have; None if there are none."""
    theirs = dict(zip(one["steps"], one["losses"]))
    found = {step: loss - theirs[step] for step, loss in zip(many["steps"], many["losses"]) if None not in (loss, theirs.get(step))}
    if not found:
        return None
    step = max(found, key=lambda s: abs(found[s]))
    return {"largest": abs(found[step]), "step": step, "mean": statistics.mean(found.values()), "steps": len(found)}


# Rows

def row(figure, one="-", many="-", result="-", wanted="-", note="", failed=False, missed=False):
    note = "; ".join(filter(None, ["missed" if missed else "", note]))
    return {"figure": figure, "one": one, "many": many, "result": result, "wanted": wanted, "failed": failed or missed, "note": note}


def compared(figure, one, many, form, least=None, most=None, note=""):
    """A row of two figures and many ÷ one, which is to be at least or at most so much."""
    value = ratio(many, one)
    missed = value is not None and (least is not None and value < least or most is not None and value > most)
    wanted = f"≥ {least:.2f}" if least is not None else f"≤ {most:.2f}" if most is not None else "-"
    return row(figure, number(one, form), number(many, form), number(value, "{:.3f}"), wanted, note, missed=missed)


def on_gpus(entry, limit):
    return limit if entry["device"] == "cuda" else None


def of_two(entry, limits):
    return on_gpus(entry, limits.get(entry["preset"])) if entry["gpus"] == 2 else None


def spread(run):
    """How far the middle half of the steps lies apart."""
    if len(run["plain_ms"]) < 4:
        return "-"
    low, _, high = statistics.quantiles(run["plain_ms"], n=4)
    return f"{100 * (high - low) / run['step_ms']:.1f} %"


def throughput(entry, one, many, figure, share, least=None):
    """Tokens per second; share: how much of many's batch is in a step of one."""
    rates = [tokens / run["step_ms"] * 1e3 if run["step_ms"] else None for run, tokens in ((one, entry["tokens"] * share), (many, entry["tokens"]))]
    return compared(figure, *rates, "{:,.0f}", least=least)


def merge_row(one, many, figure, most=None):
    failed = sum(m["failed"] for run in (one, many) for m in run["merges"])
    note = f"{failed} matrices were not merged" if failed else ""
    return compared(figure, later_merges(one), later_merges(many), "{:.3f}", most=most, note=note)


def weak_rows(entry, many, one):
    gpus, exposed, limit = entry["gpus"], None, of_two(entry, COMMUNICATION)
    if one["step_ms"] and many["step_ms"]:
        exposed = (many["step_ms"] - one["step_ms"]) / many["step_ms"]
    each = entry["batch"] // gpus
    found = [compared("step, ms", one["step_ms"], many["step_ms"], "{:,.1f}",
                      note=f"{each} sequences per GPU by {one['micro_batch']}; {len(one['plain_ms'])}, {len(many['plain_ms'])} steps, the middle half within {spread(one)}, {spread(many)}"),
             throughput(entry, one, many, "tokens/s, equal work per GPU", 1 / gpus, of_two(entry, THROUGHPUT)),
             row("communication not hidden, of a step", many=number(exposed and 100 * exposed, "{:.1f} %"), wanted=number(limit and 100 * limit, "≤ {:.0f} %"),
                 missed=None not in (exposed, limit) and exposed > limit)]
    found.append(merge_row(one, many, "exact merge, s"))
    highest = [max(filter(None, peaks(run)), default=None) for run in (one, many)]
    notes = [f"{bytes_ / 2**20:+.0f} MiB by other programs" for run in (one, many) for bytes_ in run["driver_left"] if abs(bytes_) > 2**26]
    above = [f"{(peak - run['planned_bytes']) / 2**20:.0f} MiB above the plan" for run, peak in zip((one, many), highest)
             if entry["device"] == "cuda" and None not in (peak, run["planned_bytes"]) and peak > run["planned_bytes"]]
    memory = compared("peak memory per GPU, GiB", *highest, "{}", most=on_gpus(entry, MEMORY), note="; ".join(notes + above))
    memory.update(one=gib(highest[0]), many=", ".join(map(gib, peaks(many))), failed=memory["failed"] or bool(above))
    return [*found, memory]


def strong_rows(entry, many, whole):
    d = difference(whole, many)
    last = [number(run["losses"][-1] if run["losses"] else None, "{:.4f}") for run in (whole, many)]
    return [throughput(entry, whole, many, "tokens/s, same batch", 1),
            merge_row(whole, many, "exact merge, same batch, s", on_gpus(entry, MERGE)),
            row("loss, same batch", *last, f"{d['mean']:+.5f} on average, {d['largest']:.5f} at most" if d else "-",
                note=f"over {d['steps']} steps; most at step {d['step']}" if d else "no step in common", failed=d is None)]


def fast_rows(entry, many, one):
    return [merge_row(one, many, "fast merge, s")]


def rows_of(entry, part):
    """The rows of one part of a preset, or one that says what failed."""
    runs = [entry["runs"][name] for name in PARTS[part]]
    errors = [f"{name}: {run['error']}" for name, run in zip(PARTS[part], runs) if run["error"]]
    if errors:
        return [row(part, note="; ".join(errors), failed=True)]
    return {"weak": weak_rows, "strong": strong_rows, "fast": fast_rows}[part](entry, *runs)


def kill_row(k):
    ended = "-" if k["seconds"] is None else f"ended in {k['seconds']:.1f} s"
    return row(f"rank {k['rank']} killed after step {k['step']}", many=ended, result="-" if k["remarks"] else "resumed to the same bits", wanted=f"≤ {k['limit']:g} s",
               note="; ".join(k["remarks"] + [k["message"]] * bool(k["message"])), failed=bool(k["remarks"]))


def head(report):
    unit, n = "GPU" if report["device"] == "cuda" else "process", report["gpus"]
    return table(["preset", "figure", f"1 {unit}", f"{n} {unit}{'s' if unit == 'GPU' else 'es'}", f"{n} ÷ 1", "wanted", "notes"], []).rstrip("\n")


def show(entry, found):
    """Prints rows. → whether none of them failed."""
    for r in found:
        print(table([entry["preset"], *(r[key] for key in ("figure", "one", "many", "result", "wanted", "note"))], []).splitlines()[0], flush=True)
    return not any(r["failed"] for r in found)


# Runs

def base_command(args, preset, gpus):
    return [args.binary, "--config", os.path.abspath(config_path(preset)) if os.path.exists(config_path(preset)) else preset, "--run.device", args.device, *COMMON,
            "--optimizer.lr", LR, *OPTIONS.get(preset, []), *args.overrides, "--run.gpus", str(gpus)]


def prepare(args, preset):
    """What all runs of a preset have in common, from the plan of one GPU with its share of the batch."""
    whole = read_plan(base_command(args, preset, 1))
    if whole["batch"] % args.gpus:
        raise ValueError(f"{preset}: {args.gpus} GPUs cannot share {whole['batch']} sequences evenly; choose another train.batch after --")
    plan = read_plan([*base_command(args, preset, 1), "--train.batch", str(whole["batch"] // args.gpus)])
    seq_len, fixed = plan["seq_len"], [text for key in FIXED if key in plan["choices"] for text in ("--" + key, str(plan["choices"][key]["value"]))]
    fixed += ["--train.micro_batch", str(plan["tokens_per_micro_batch"] // seq_len)]
    data = args.data or synthetic_shards(args.work, plan["model"]["vocab"], max(args.steps, KILL_STEPS) * whole["batch"] * seq_len + 1)
    return {"preset": os.path.splitext(os.path.basename(preset))[0], "gpus": args.gpus, "device": args.device, "batch": whole["batch"], "tokens": whole["batch"] * seq_len,
            "fixed": fixed, "data": os.path.abspath(data), "config": preset, "runs": {}, "kills": []}


def command_of(args, entry, gpus, batch, steps, gap, *more):
    """Merges at the first step and every `gap` after it."""
    return [*base_command(args, entry["config"], gpus), *entry["fixed"], "--train.batch", str(batch), "--train.steps", str(steps), "--method.merge_gap", str(gap),
            "--method.merge_growth", "0", "--data.train", entry["data"], "--data.val", "", *more]


def measure(args, entry, name):
    """One run of a preset: its figures, or why there are none."""
    shown_now(f"{entry['preset']}: {name}")
    together, full, projection = RUNS[name]
    gpus = args.gpus if together else 1
    folder, steps = os.path.join(args.work, f"{entry['preset']}-{name.replace(' ', '-')}"), FAST_STEPS if projection == "subspace" else args.steps
    command = command_of(args, entry, gpus, entry["batch"] if full else entry["batch"] // args.gpus, steps, steps // 4, "--method.projection", projection, "--run.dir", folder)
    try:
        drivers = [Driver(f"cuda:{i}") for i in range(gpus)] if args.device == "cuda" else [None]
    except OSError as error:
        raise ValueError(f"the memory of {gpus} GPUs cannot be read ({error}); are there so many?") from None
    try:
        found, seconds, error = run_program(command, folder + ".log", drivers, args.timeout)
        if error and error.startswith("run.gpus:"):
            raise ValueError(error)
        events = read_events(folder) if os.path.exists(os.path.join(folder, "metrics.jsonl")) else {}
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    run = figures(events)
    if not error and run["gpus"] != gpus:
        error = f"trained on {run['gpus']} GPUs, not {gpus}"
    return {**run, "command": shlex.join(["./train_loqt", *command[1:]]), "wall_seconds": seconds, "error": error,
            "driver_peaks": [p["driver_peak_bytes"] for p in found if "driver_peak_bytes" in p], "driver_left": [p.get("driver_left_bytes", 0) for p in found]}


# Killed ranks

def results(folder):
    """Losses, gradient norms and merges of a run, as the text that metrics.jsonl has, and its last checkpoint's path."""
    found = {}
    with open(os.path.join(folder, "run", "metrics.jsonl"), encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):  # cut short by a kill
                event = json.loads(line, parse_float=str)
                for key in ("loss", "grad_norm", "quant_error"):
                    if key in event:
                        found[event["event"], event["step"], key] = event[key]
    checkpoints = os.path.join(folder, "run", "checkpoints")
    names = [name for name in sorted(os.listdir(checkpoints)) if name.endswith(".safetensors")]
    return found, os.path.join(checkpoints, names[-1]) if names else None


def differences(folder, reference):
    """What of a finished run is not as in the other, in words."""
    (mine, last), (theirs, their_last) = results(folder), results(reference)
    found = [f"{event} {key} of step {step} is {mine.get((event, step, key))}, undisturbed {value}"
             for (event, step, key), value in theirs.items() if mine.get((event, step, key)) != value][:1]
    if not last or os.path.basename(last) != os.path.basename(their_last) or not filecmp.cmp(last, their_last, shallow=False):
        found.append("the last checkpoint is another")
    return found


def trained(folder):
    """Steps in the metrics so far."""
    try:
        with open(os.path.join(folder, "run", "metrics.jsonl"), encoding="utf-8", errors="replace") as file:
            return len(re.findall(r'"event": ?"train"', file.read()))
    except OSError:
        return 0


def run_to_end(args, arguments, folder):
    """Raises ValueError with the program's message if it fails."""
    os.makedirs(folder, exist_ok=True)
    with open(folder + ".log", "w+", encoding="utf-8", errors="replace") as file:  # no pipe: a process left over would keep it open
        process = subprocess.Popen([args.binary, *arguments], cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file)
        try:
            status = process.wait(args.timeout)
        except subprocess.TimeoutExpired:
            raise ValueError(f"stopped after {args.timeout:.0f} s") from None
        finally:
            kill_all(process)
        file.seek(0)
        if status:
            raise ValueError(message_of(file.read().strip().splitlines(), status))


def kill_rank(args, command, folder, rank, step, wait):
    """Starts a run and kills the rank `wait` seconds after the step. → (seconds until all had ended or None, lines on stderr). ValueError: it ended before."""
    log, deadline = folder + ".log", time.time() + args.timeout
    os.makedirs(folder)
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file)
    ranks = {}
    try:
        while trained(folder) < step and process.poll() is None and time.time() < deadline:
            time.sleep(0.002)
        ranks = ranks_of(process.pid)
        time.sleep(wait)
        if process.poll() is None and rank in ranks:
            kill([ranks[rank]])
            begin = time.time()
            while (process.poll() is None or any(map(alive, ranks.values()))) and time.time() < begin + 1.5 * args.comm_timeout:
                time.sleep(0.02)
            seconds = None if process.poll() is None or any(map(alive, ranks.values())) else time.time() - begin
        else:
            seconds = -1
    finally:
        kill_all(process)
        kill(pid for pid in ranks.values() if alive(pid))
    with open(log, encoding="utf-8", errors="replace") as file:
        lines = file.read().strip().splitlines()
    if seconds == -1:
        raise ValueError(f"not killed: {message_of(lines, process.returncode)}")
    return seconds, lines


def complaints(rank, seconds, limit, lines):
    """What is not as it should be in the way that a run ended whose rank was killed."""
    found = []
    if seconds is None:
        found.append("did not end")
    elif seconds > limit:
        found.append("ended late")
    if len(lines) != 1:
        found.append(f"{len(lines)} lines on stderr")
    if not any(line.startswith("train_loqt: ") and re.search(rf"\brank {rank}\b", line) for line in lines):
        found.append(f"no message names rank {rank}")
    return found


def kill_test(args, entry):
    """Kills a rank args.kill times, shows a row for each. → whether all went as it should."""
    # The same relative run.dir everywhere: checkpoints hold the configuration, and are to be the same to the byte.
    command = command_of(args, entry, args.gpus, entry["batch"], KILL_STEPS, KILL_STEPS // 4 - 1, "--checkpoint.every", str(KILL_EVERY),
                         "--run.comm_timeout", f"{args.comm_timeout:g}", "--run.dir", "run")
    reference, rng, fine = os.path.join(args.work, "undisturbed"), random.Random(args.seed), True
    shown_now(f"{entry['preset']}: undisturbed")
    run_to_end(args, command[1:], reference)
    step_seconds = statistics.median(plain_steps(read_events(os.path.join(reference, "run")))) / 1e3
    for number_ in range(args.kill):
        rank, step, folder = number_ % args.gpus, rng.randrange(KILL_EVERY + 1, KILL_STEPS - 3), os.path.join(args.work, f"killed-{number_}")
        shown_now(f"{entry['preset']}: rank {rank} killed after step {step}")
        k = {"rank": rank, "step": step, "seconds": None, "limit": args.comm_timeout, "message": "", "remarks": []}
        try:
            k["seconds"], lines = kill_rank(args, command, folder, rank, step, rng.random() * step_seconds)
            k["message"], k["remarks"] = " / ".join(lines), complaints(rank, k["seconds"], args.comm_timeout, lines)
            run_to_end(args, ["--resume", "--run.dir", "run"], folder)
            k["remarks"] += differences(folder, reference)
        except (ValueError, OSError) as error:
            k["remarks"].append(str(error))
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
        entry["kills"].append(k)
        fine &= show(entry, [kill_row(k)])
    return fine


# Program

def parse_arguments(argv):
    at = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", help="names in configs/, or files [60m,1b; on a CPU tiny]")
    parser.add_argument("--gpus", type=int, default=2, help="GPUs, or processes on a CPU, to compare with one [2]")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="[auto]")
    parser.add_argument("--parts", default=",".join(PARTS), help="of weak (equal work per GPU, exact merges, memory), strong (same batch, losses), fast (fast merges) [all]")
    parser.add_argument("--kill", type=int, default=0, metavar="K", help="kill a rank of the first preset K times [0]")
    parser.add_argument("--comm-timeout", type=float, default=30, help="run.comm_timeout of those runs, in which all has to end [30]")
    parser.add_argument("--seed", type=int, default=0, help="of when they are killed [0]")
    parser.add_argument("--steps", type=int, default=24, help="steps of a run, 8 or more [24]")
    parser.add_argument("--show", nargs="+", metavar="FILE.json", help="print the tables from these files")
    parser.add_argument("--data", help="folder of token shards [synthetic ones, made here]")
    parser.add_argument("--work", help="folder for run directories; 1b needs some 10 GB [a temporary one]")
    parser.add_argument("--keep", action="store_true", help="keep run directories")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a run may take [300]")
    parser.add_argument("--binary", default=os.path.join(ROOT, "train_loqt"), help="the program [./train_loqt]")
    parser.add_argument("--out", default=os.path.join(ROOT, "build", "scaling.json"), help="where to write the figures [build/scaling.json]")
    args = parser.parse_args(argv[:at])
    args.overrides, args.binary = argv[at + 1:], os.path.abspath(args.binary)
    if args.device == "auto":
        args.device = "cuda" if gpu_there() else "cpu"
    args.presets = (args.presets or ("60m,1b" if args.device == "cuda" else "tiny")).split(",")
    args.parts = args.parts.split(",") if args.parts else []
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if args.gpus < 2:
        parser.error("--gpus: one GPU is compared with 2 or more")
    if args.steps < 8:
        parser.error("--steps: merges with steps between them take 8 or more")
    return args


def show_reports(paths):
    for path in paths:
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
        print(head(report))
        for entry in report["presets"]:
            for part in report["parts"]:
                if all(name in entry["runs"] for name in PARTS[part]):
                    show(entry, rows_of(entry, part))
            show(entry, map(kill_row, entry["kills"]))


def run_all(args, command):
    """Prints each row when it has it. → whether nothing failed."""
    report, fine = new_report(args, command, device=args.device, gpus=args.gpus, parts=args.parts, presets=[]), True
    print(head(report), flush=True)
    for number_, preset in enumerate(args.presets):
        entry = prepare(args, preset)
        report["presets"].append(entry)
        for part in args.parts:
            for name in PARTS[part]:
                if name not in entry["runs"]:
                    entry["runs"][name] = measure(args, entry, name)
            fine &= show(entry, rows_of(entry, part))
            write_report(args, report)
        if args.kill and number_ == 0:
            fine &= kill_test(args, entry)
            write_report(args, report)
    return fine


def main(argv):
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the program and its files go too
    if args.show:
        show_reports(args.show)
        return 0
    if args.device == "cpu":  # as many threads alone as beside others: equal work takes equal time
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // args.gpus)))
    with work_folder(args, "scaling"):
        return 0 if run_all(args, "python3 bench/scaling.py " + shlex.join(argv)) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, ValueError) as error:
        sys.exit(f"scaling.py: {error}")
