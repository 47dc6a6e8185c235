#!/usr/bin/env python3
"""Runs sweeps: every run of a JSON file as one ./train_loqt, on the GPUs at hand; continues where it stopped; ends with a table and a picture.

    python3 scripts/sweep.py sweeps/reduced/table1.json -- data.train=data/shards/mine data.val=data/shards/mine
    python3 scripts/sweep.py FILE.json --dry-run                    what would be run, and the memory it takes
    python3 scripts/sweep.py FILE.json --devices cuda:0,cuda:1
    python3 scripts/sweep.py FIRST.json SECOND.json --time-limit 560     one after the other, and no GPU idle between them

After -- come configuration keys for all runs: KEY=VALUE or --key value. docs/formats.md describes the file and the folder.
Started again it goes on: finished runs are left alone, begun and failed ones resumed. First seeds come before second ones. Ctrl-C lets every run save; a
second one, a second or more later, kills them. Exit status: 0, 1 if a run failed, 2 for a mistake (then nothing was started), 3 if runs
are left to do for want of time, 130 if interrupted.
"""
import argparse
import glob
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

from sweep_file import Mistake, Sweep, default_values, known_keys
from sweep_run import Run, lock, read_json, words, write_json

SCRIPTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(SCRIPTS)
POLL, PLAIN_PROGRESS = 0.2, 30.0  # seconds
START_AND_END = 10.0  # seconds that a process takes beside its training, at most


def config_file(name):
    """Where train_loqt finds a configuration; None if it does not."""
    presets = os.path.join(ROOT, "configs")
    candidates = (name, os.path.join(presets, name), os.path.join(presets, name + ".json"))
    return next((path for path in candidates if os.path.isfile(path)), None)


class Display:
    """A table that is drawn anew on a terminal; else a line whenever a run's state changes, and now and then where running ones are."""

    def __init__(self, runs):
        self.runs, self.terminal, self.height = runs, sys.stdout.isatty(), 0
        self.width = max(len(run.title) for run in runs)
        self.said, self.last, self.note = {run: ("waiting", "") for run in runs}, time.monotonic(), ""

    def update(self, note):
        """note: of the whole sweep."""
        if not self.terminal and note != self.note:
            print(note, flush=True)
        self.note = note
        self.draw() if self.terminal else self.say()

    def draw(self):
        columns, rows = shutil.get_terminal_size()
        shown = self.runs
        if len(shown) > rows - 3:
            shown = [run for run in self.runs if run.state in ("running", "failed", "refused")][:max(1, rows - 3)]
        states = [run.state for run in self.runs]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        lines = [f"{run.title:<{self.width}}  {run.line()}" for run in shown] + [f"{counts}{'; ' if self.note else ''}{self.note}"]
        print((f"\x1b[{self.height}F" if self.height else "") + "\x1b[J" + "\n".join(line[:columns - 1] for line in lines), flush=True)
        self.height = len(lines)

    def say(self):
        due = time.monotonic() - self.last > PLAIN_PROGRESS
        if due:
            self.last = time.monotonic()
        for run in self.runs:
            state = (run.state, run.device)
            if state != self.said[run] and run.state != "waiting" or due and run.state == "running":
                print(f"{run.title}: {run.line()}", flush=True)
            self.said[run] = state


class Interrupts:
    """Counts Ctrl-C and SIGTERM; those of one second count as one, as launchers send both."""

    def __init__(self):
        self.count, self.last = 0, -1e9
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.take)

    def take(self, *_):
        if time.monotonic() - self.last >= 1.0:
            self.count, self.last = self.count + 1, time.monotonic()


def find_devices(text, program):
    if text != "auto":
        devices = text.split(",")
        for device in devices:
            if not re.fullmatch(r"cpu|cuda(:\d+)?", device) or devices.count(device) > 1:
                raise Mistake(f"--devices {text}: expected auto, cpu, or a list such as cuda:0,cuda:1")
        return devices
    # Whether there is a GPU that the program can use, only the program knows.
    if plan([program, "--config", os.path.join(ROOT, "configs", "tiny.json")])["device"] == "cpu":
        return ["cpu"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [f"cuda:{i}" for i in range(len(visible.split(",")))]
    try:
        names = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.splitlines()
    except OSError:
        names = []
    return [f"cuda:{i}" for i in range(max(1, sum(name.startswith("GPU ") for name in names)))]


def plan(command, environment=None):
    """The memory plan of a command as JSON (docs/formats.md). Raises Mistake with the program's message."""
    result = subprocess.run([*command, "--plan", "--json"], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        raise Mistake(lines[-1] if lines else f"{command[0]} --plan: exit status {result.returncode}")
    return json.loads(result.stdout)


def check_runs(sweep, runs, program, device, show):
    """Plans runs, so that a wrong option, missing shards or what does not fit are known before anything starts."""
    plans, environment, free = {}, None, None  # what is free on the GPU is asked for once: every process there takes a second to find out
    for run in runs:
        options = {key: value for key, value in run.options.items() if key != "train.seed"}
        if free:
            options.setdefault("run.memory_budget", free)
        command = (program, "--config", sweep.config, *words(options), "--run.device", device)
        for key in ("data.train", "data.val"):
            if not show and options.get(key) and not glob.glob(options[key]) and not os.path.exists(options[key]):
                raise Mistake(f"{run.name}: {key}: there is no {options[key]}; give the shards after -- ({key}=DIR)")
        try:
            if command not in plans:
                plans[command] = plan(command, environment)
        except Mistake as error:
            raise Mistake(f"{run.name}: {error}")
        if device != "cpu" and "run.memory_budget" not in options and plans[command]["budget"]:
            free, environment = f"{plans[command]['budget']}B", {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
        if show:
            print(f"{run.name}: {plans[command]['total'] / 2**30:.2f} GiB, " + " ".join(f"{k}={v}" for k, v in run.options.items()))


def expected_seconds(run, runs):
    """How long a run will take by the slowest finished one that differs in nothing that matters for speed, else by the slowest of all; 0 if none is finished."""
    timed = [other for other in runs if other.seconds_per_step]
    timed = [other for other in timed if other.what_counts_for_speed == run.what_counts_for_speed] or timed
    return max(other.seconds_per_step for other in timed) * run.steps + START_AND_END if timed else 0.0


def wait_for_orphans(runs, interrupts):
    """Runs of a sweep that was killed may still be saving."""
    for run in runs:
        said = False
        while os.path.isdir(run.folder) and not interrupts.count:
            descriptor = lock(run.folder)
            if descriptor is not None:
                os.close(descriptor)
                break
            if not said:
                print(f"{run.title}: another process trains or saves there; waiting for it", flush=True)
            said = True
            time.sleep(POLL)


def train(runs, program, devices, jobs, interrupts, deadline):
    """Runs what waits, in order, one process at a time for every slot; nothing that would not be done by the deadline (time.monotonic)."""
    # Threads that spin while they wait for each other ruin the speed of a CPU that others use.
    environment = {"GOMP_SPINCOUNT": "1000", **os.environ}
    if devices == ["cpu"] and jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // jobs)))
    display = Display(runs)
    slots, told = [device for _ in range(jobs) for device in devices], 0
    notes = ("", "runs save and stop; a second Ctrl-C kills them", "killed")
    late = "no time left: runs save and stop"
    changed = True
    while True:
        for run in runs:
            if run.process and run.poll():
                slots.append(run.device)
                changed = True
        left = deadline - time.monotonic()
        for run in runs:
            if changed and run.state == "waiting" and slots and not interrupts.count and expected_seconds(run, runs) <= left:
                run.start(program, slots.pop(0), environment)
        changed = False
        stops = max(interrupts.count, 1 if left <= 0 else 0)
        display.update(notes[min(stops, 2)] if interrupts.count or not stops else late)
        running = [run for run in runs if run.process]
        if not running:
            break
        if stops > told:
            told = stops
            for run in running:
                run.process.send_signal(signal.SIGINT if told == 1 else signal.SIGKILL)
        time.sleep(POLL)
    if display.terminal:  # where the table cut them short
        for run in runs:
            if run.state in ("failed", "refused"):
                print(f"{run.title}: {run.line()}")


def write_report(folder):
    """True if it could be made."""
    command = [sys.executable, os.path.join(SCRIPTS, "report.py"), "--sweep", folder, "--markdown", os.path.join(folder, "report.md"), "--csv", os.path.join(folder, "report.csv")]
    picture = importlib.util.find_spec("matplotlib") is not None
    print(f"\n{folder}: report.md, report.csv{', report.png' if picture else ' (no picture: matplotlib is not installed)'}", flush=True)
    return subprocess.run(command + (["-o", os.path.join(folder, "report.png")] if picture else [])).returncode == 0


def read_sweep(file, args, keys, defaults, overrides):
    """The sweep of a file, with where it goes (folder) and what it starts from (path, config_hash, defaults of the program)."""
    sweep = Sweep(file, keys, overrides)
    sweep.defaults = defaults
    sweep.path, sweep.folder = config_file(sweep.config), args.out or os.path.join("runs", sweep.name)
    if not sweep.path:
        raise Mistake(f"{file}: config: no file or preset {sweep.config}")
    with open(sweep.path, "rb") as contents:
        sweep.config_hash = hashlib.sha256(contents.read()).hexdigest()
    if os.path.exists(os.path.join(sweep.folder, "config.json")):
        raise Mistake(f"{sweep.folder} holds a run, not a sweep; choose another --out")
    return sweep


def occupy(sweep):
    """Makes the sweep's folder and keeps others out; returns the lock."""
    os.makedirs(sweep.folder, exist_ok=True)
    held = lock(os.path.join(sweep.folder, ".lock"), os.O_RDWR | os.O_CREAT)
    if held is None:
        raise Mistake(f"{sweep.folder} is in use by another sweep.py")
    return held


def check_sweep(sweep, runs):
    """Looks at what is there already, and tells report.py what to go by."""
    for run in runs:
        run.check()
    if all(run.state == "refused" for run in runs):
        return
    # A run that is refused now is none of this sweep's, but it stays where it was.
    path = os.path.join(sweep.folder, "sweep.json")
    there = [member["name"] for member in (read_json(path) or {"runs": []})["runs"]]
    members = [{"name": planned.name, "group": planned.group} for planned, run in zip(sweep.runs, runs) if run.state != "refused" or planned.name in there]
    write_json(path, {"name": sweep.name, "reference": sweep.reference, "runs": members})


def run_sweeps(args, overrides, interrupts):
    deadline = time.monotonic() + args.time_limit
    keys, defaults = known_keys(args.binary), default_values(args.binary)
    sweeps = [read_sweep(file, args, keys, defaults, overrides) for file in args.files]
    if len({os.path.abspath(sweep.folder) for sweep in sweeps}) < len(sweeps):
        raise Mistake("two of the sweeps have the same folder; --out is for one file, and names differ")
    devices = find_devices(args.devices, args.binary)
    if args.jobs > 1 and devices != ["cpu"] and any("run.memory_budget" not in run.options for sweep in sweeps for run in sweep.runs):
        raise Mistake(f"--jobs {args.jobs}: on a GPU every run takes what memory is free; give each its share, as with -- run.memory_budget=40GiB")
    for sweep in sweeps:
        new = [run for run in sweep.runs if args.dry_run or not os.path.exists(os.path.join(sweep.folder, run.name, "config.json"))]
        check_runs(sweep, new, args.binary, devices[0], args.dry_run)
    if args.dry_run:
        return 0
    locks = [occupy(sweep) for sweep in sweeps]  # held until the end
    runs_of = {sweep: [Run(planned, sweep, f"{sweep.name}/{planned.name}" if len(sweeps) > 1 else planned.name) for planned in sweep.runs] for sweep in sweeps}
    runs = [run for own in runs_of.values() for run in sorted(own, key=lambda run: run.turn)]
    wait_for_orphans(runs, interrupts)
    for sweep, own in runs_of.items():
        check_sweep(sweep, own)
    train(runs, args.binary, devices, args.jobs, interrupts, deadline)
    if interrupts.count:
        print("stopped; the same command goes on from here")
        return 130
    reported = [write_report(sweep.folder) for sweep, own in runs_of.items() if any(run.begun() and run.state != "refused" for run in own)]
    for descriptor in locks:
        os.close(descriptor)
    left = sum(run.state in ("waiting", "stopped") for run in runs)
    if left:
        print(f"{left} of {len(runs)} runs are left to do; the same command goes on from here")
    if any(run.state in ("failed", "refused") for run in runs) or not all(reported):
        return 1
    return 3 if left else 0


def main(argv):
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE.json")
    parser.add_argument("--out", metavar="DIR", help="folder of the sweep, of one file [runs/NAME, NAME as in the file]")
    parser.add_argument("--devices", default="auto", help="auto, cpu, or a list such as cuda:0,cuda:1 [auto: every GPU, else cpu]")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time on every device; on a GPU with run.memory_budget for each [1]")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="S",
                        help="begin no run that would not be done S seconds from now, by the speed of finished ones; what still runs then saves and stops")
    parser.add_argument("--binary", default=os.path.join(ROOT, "train_loqt"), help="the program [./train_loqt]")
    parser.add_argument("--dry-run", action="store_true", help="check the file, list the runs with their planned memory, start nothing")
    args = parser.parse_args(argv[:split])
    interrupts = Interrupts()
    try:
        if args.jobs < 1:
            raise Mistake(f"--jobs {args.jobs}: must be at least 1")
        if not args.time_limit > 0:
            raise Mistake(f"--time-limit {args.time_limit:g}: must be positive")
        return run_sweeps(args, argv[split + 1:], interrupts)
    except Mistake as error:
        print(f"sweep.py: {error}", file=sys.stderr)
    except OSError as error:
        print(f"sweep.py: {error.filename}: {error.strerror}", file=sys.stderr)
    return 130 if interrupts.count else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
