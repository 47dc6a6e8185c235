"""What memory.py and scaling.py share: synthetic token shards, and running train_loqt while the driver and the kernel are asked for its memory."""
import array
import contextlib
import ctypes
import itertools
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time

from report import GIB
from run import commit, say

COMMON = ["--eval.every", "0", "--checkpoint.every", "0", "--optimizer.warmup_ratio", "0.1"]  # options of every run


# Data

def synthetic_tokens(count, vocab, seed=0):
    """Token ids with something to learn: frequencies by Zipf's law, and after every other token, on average, the next id in rank."""
    rng = random.Random(seed)
    weights = list(itertools.accumulate(1 / (rank + 2) for rank in range(vocab)))
    tokens = array.array("H", rng.choices(range(vocab), cum_weights=weights, k=count))
    for i, coin in enumerate(rng.choices((True, False), k=count - 1), 1):
        if coin:
            tokens[i] = (tokens[i - 1] + 1) % vocab
    return tokens


def write_shard(path, tokens):
    """A shard of 16-bit tokens as in data/README.md."""
    if sys.byteorder == "big":
        tokens.byteswap()
    with open(path, "wb") as file:
        file.write(struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253))
        tokens.tofile(file)


def synthetic_shards(folder, vocab, count):
    """A folder of at least `count` tokens, made once for a vocabulary and size."""
    path = os.path.join(folder, f"synthetic-{vocab}-{count}")
    if not os.path.exists(path):
        os.makedirs(path)
        write_shard(os.path.join(path, "synthetic_train_000000.bin"), synthetic_tokens(count, vocab))
    return path


# Measuring

class DriverMemory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class DriverProcess(ctypes.Structure):
    _fields_ = [("pid", ctypes.c_uint), ("used", ctypes.c_ulonglong), ("gpu_instance", ctypes.c_uint), ("compute_instance", ctypes.c_uint)]


class Driver:
    """What the driver says about one GPU's memory, through NVML, the library under nvidia-smi: a call takes well under a millisecond."""

    def __init__(self, device):
        self.nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self.handle = ctypes.c_void_p()
        self.call("nvmlInit_v2")
        index = int(device.split(":")[1]) if ":" in device else 0
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        name = visible[index] if index < len(visible) else str(index)
        if name.isdigit():
            self.call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(int(name)), ctypes.byref(self.handle))
        else:
            self.call("nvmlDeviceGetHandleByUUID", name.encode(), ctypes.byref(self.handle))

    def call(self, function, *arguments):
        status = getattr(self.nvml, function)(*arguments)
        if status:
            raise OSError(f"{function}: status {status} of NVML")

    def used(self):
        """Bytes in use on the GPU, by whatever process."""
        memory = DriverMemory()
        self.call("nvmlDeviceGetMemoryInfo", self.handle, ctypes.byref(memory))
        return memory.used

    def by_process(self):
        """{pid, as the driver knows it: bytes}; empty where the driver does not say, as in most containers."""
        count, processes = ctypes.c_uint(64), (DriverProcess * 64)()
        try:
            self.call("nvmlDeviceGetComputeRunningProcesses_v3", self.handle, ctypes.byref(count), processes)
        except (OSError, AttributeError):
            return {}
        return {p.pid: p.used for p in processes[:count.value] if p.used < 2**63}  # all ones: not known


def host_memory(pid):
    """{key: bytes} of /proc/PID/status: VmHWM (most resident so far, files included), RssAnon (the process' own now). Empty once it has ended."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8") as file:
            lines = [line.split() for line in file]
    except OSError:
        return {}
    return {line[0][:-1]: int(line[1]) * 1024 for line in lines if line[0] in ("VmHWM:", "RssAnon:")}


class Watch(threading.Thread):
    """Keeps the highest readings of a process' memory while it runs. GPU readings are above what was used before it was started."""

    def __init__(self, driver, interval=0.05):
        super().__init__(daemon=True)
        self.driver, self.interval, self.ended, self.pid = driver, interval, threading.Event(), None
        self.before = driver.used() if driver else 0
        self.others = set(driver.by_process()) if driver else set()
        self.peaks = {}

    def note(self, key, value):
        self.peaks[key] = max(value, self.peaks.get(key, 0))

    def read(self):
        for key, value in host_memory(self.pid).items():
            self.note({"VmHWM": "host_rss_bytes", "RssAnon": "host_own_bytes"}[key], value)
        if self.driver:
            self.note("driver_peak_bytes", self.driver.used() - self.before)
            mine = [used for pid, used in self.driver.by_process().items() if pid not in self.others]
            if mine:
                self.note("driver_process_bytes", sum(mine))

    def run(self):
        while not self.ended.wait(self.interval):
            self.read()

    def finish(self):
        """The highest readings, and how much more of the GPU is in use than before the start: by others, if it is not near 0."""
        self.ended.set()
        self.join()
        if self.driver:
            self.peaks["driver_left_bytes"] = self.driver.used() - self.before
        return self.peaks


def state_of(pid):
    """(state, parent's pid) as the kernel tells them; a process that has ended but was not waited for is "Z", one that is not there ("", 0)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state, parent = file.read().rsplit(")", 1)[1].split()[:2]
    except OSError:
        return "", 0
    return state, int(parent)


def alive(pid):
    return state_of(pid)[0] not in ("", "Z", "X")


def ranks_of(pid):
    """{rank: pid} of the processes that `train_loqt --gpus N` has started and that are still there; empty for N = 1."""
    found = {}
    for child in map(int, filter(str.isdigit, os.listdir("/proc"))):
        if state_of(child)[1] != pid or not alive(child):
            continue
        with contextlib.suppress(OSError), open(f"/proc/{child}/environ", "rb") as file:
            rank = re.search(rb"(?:^|\0)RANK=(\d+)", file.read())
            if rank:
                found[int(rank[1])] = child
    return found


def kill(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_all(process):
    """Ends a program and all its ranks at once, if it has not ended."""
    if process.poll() is None:
        kill([process.pid, *ranks_of(process.pid).values()])
    process.wait()


def settle(drivers):
    """The driver takes a moment to clear up after a process."""
    if any(drivers):
        time.sleep(0.5)


def message_of(lines, status):
    """What a program that failed says: the last line on stderr."""
    return lines[-1].replace("train_loqt: ", "", 1) if lines else f"ended with status {status}"


def run_program(command, log, drivers, timeout):
    """Runs it to its end, watched by each driver (None: none). → (peaks of memory for each, seconds, None or the error: the last line on stderr)."""
    settle(drivers)
    watches, begin = [Watch(driver) for driver in drivers], time.time()
    with open(log, "w+", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file)
        try:
            for watch in watches:
                watch.pid = process.pid
                watch.start()
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:
            kill_all(process)
            settle(drivers)
            peaks = [watch.finish() for watch in watches]
        file.seek(0)
        lines = file.read().strip().splitlines()
    error = None
    if status == "timeout":
        error = f"stopped after {timeout:.0f} s"
    elif status:
        error = message_of(lines, status)
    return peaks, time.time() - begin, error


def read_plan(command):
    """The object that --plan --json prints for this command. Raises ValueError with the program's message."""
    result = subprocess.run([*command, "--plan", "--json"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(message_of(result.stderr.strip().splitlines(), result.returncode))
    return json.loads(result.stdout)


# Reports

@contextlib.contextmanager
def work_folder(args, name):
    """The folder args.work for run directories; a temporary one, deleted in the end, where that is None. args.keep: kept, and named."""
    own = args.work is None
    args.work = tempfile.mkdtemp(prefix=f"train_loqt-{name}-") if own else os.path.abspath(args.work)
    os.makedirs(args.work, exist_ok=True)
    try:
        yield
    finally:
        if own and not args.keep:
            shutil.rmtree(args.work, ignore_errors=True)
        elif args.keep:
            say(f"run directories are in {args.work}")


def new_report(args, command, **content):
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    return {"commit": commit(), "date": time.strftime("%Y-%m-%d"), "command": command, **content}


def write_report(args, report):
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)
        file.write("\n")


def shown_now(text):
    """Which run is under way, on a terminal that the table does not go to: on one terminal it would stand between the rows."""
    if sys.stderr.isatty() and not sys.stdout.isatty():
        say(f"{text} ...")


def gib(value):
    return "-" if value is None else f"{value / GIB:.2f}"
