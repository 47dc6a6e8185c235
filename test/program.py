"""What the tests of the program share: test_program.py, test_program_use.py.

Every test runs ./train_loqt on a model of 300,000 parameters, in a temporary folder, on text made here.
LOQT_TEST_DEVICE=cuda runs the same on a GPU (test/gpu_program.sh), LOQT_TEST_KILLS sets the number of kills, LOQT_TEST_SEED repeats a run.
"""
import array
import glob
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.path.join(ROOT, "train_loqt")
DEVICE = os.environ.get("LOQT_TEST_DEVICE", "cpu")
KILLS = int(os.environ.get("LOQT_TEST_KILLS", 20))
SEED = int(os.environ.get("LOQT_TEST_SEED", random.SystemRandom().randrange(2**32)))
# Passive waiting: threads that spin would starve each other where other programs run too.
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive")

CONFIG = {
    "model": {"hidden": 128, "intermediate": 172, "heads": 2, "kv_heads": 1, "layers": 2, "vocab": 259},
    "method": {"rank": 32, "merge_gap": 6, "merge_growth": 0, "relora_gap": 6},
    "data": {"train": "shards", "val": "shards"},
    "train": {"steps": 12, "seq_len": 32, "batch": 4, "micro_batch": 2},
    "eval": {"every": 5, "sequences": 8},
    "checkpoint": {"every": 3, "keep_last": 10},
    "run": {"device": DEVICE},
}
folder = None  # temporary; holds shards/, rows/ and config.json


def setUpModule():
    global folder
    if not os.path.exists(PROGRAM):
        raise unittest.SkipTest("no ./train_loqt; build it with make, or make cpu")
    folder = tempfile.mkdtemp(prefix="train_loqt-test-")
    unittest.addModuleCleanup(shutil.rmtree, folder)
    rng = random.Random(SEED)
    words = ["".join(rng.choice("abcdefgh") for _ in range(rng.randrange(2, 7))) for _ in range(40)]
    with open(path("text.txt"), "w") as f:
        f.write("\n\n".join(" ".join(rng.choice(words) for _ in range(rng.randrange(5, 60))) for _ in range(400)))
    tokenize = [sys.executable, os.path.join(ROOT, "data", "tokenize.py"), path("text.txt"), "--tokenizer", "bytes", "--val-fraction", "0.1", "--quiet"]
    subprocess.run(tokenize + ["--out", path("shards")], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(tokenize + ["--out", path("rows"), "--layout", "rows", "--seq-len", "32"], check=True, stdout=subprocess.DEVNULL)
    with open(path("config.json"), "w") as f:
        json.dump(CONFIG, f)


def path(*names):
    return os.path.join(folder, *map(str, names))


def program(*arguments, environment=None, **options):
    """The finished process, with its output as text."""
    return subprocess.run([PROGRAM, *map(str, arguments)], cwd=folder, env=environment or ENVIRONMENT, capture_output=True, text=True, errors="replace",
                          timeout=300, **options)


def start(*arguments):
    return subprocess.Popen([PROGRAM, *map(str, arguments)], cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def new_run(name, *arguments):
    return ("--config", "config.json", "--run.dir", name, *arguments)


def metrics(name):
    """Events of a run's metrics.jsonl, numbers as the text they have there. Lines that a crash cut short are left out."""
    events = []
    with open(path(name, "metrics.jsonl")) as f:
        for line in f:
            try:
                events.append(json.loads(line, parse_float=str))
            except ValueError:
                pass
    return events


def read_text(*names):
    with open(path(*names)) as f:
        return f.read()


def steps(name, event):
    return [e["step"] for e in metrics(name) if e["event"] == event]


def series(name, event="train", key="loss"):
    """{step: text of the number}; where a step was done twice, the last counts."""
    return {e["step"]: e[key] for e in metrics(name) if e["event"] == event}


def checkpoints(name):
    return sorted(os.listdir(path(name, "checkpoints")))


def checkpoint(name, step):
    return path(name, "checkpoints", f"step-{step:08d}.safetensors")


def read_safetensors(file):
    """({name: (dtype, shape, bytes)}, metadata)"""
    with open(file, "rb") as f:
        data = f.read()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    metadata = header.pop("__metadata__", {})
    return {k: (t["dtype"], t["shape"], data[8 + size + t["data_offsets"][0]:8 + size + t["data_offsets"][1]]) for k, t in header.items()}, metadata


def non_finite(file):
    """Names of the tensors of a checkpoint with a NaN or Inf: their exponent has every bit set."""
    bad = []
    for name, (dtype, _, data) in read_safetensors(file)[0].items():
        if dtype in ("F32", "BF16"):
            mask = 0x7F800000 if dtype == "F32" else 0x7F80
            if any(bits & mask == mask for bits in array.array("I" if dtype == "F32" else "H", data)):
                bad.append(name)
    return bad


class ProgramTest(unittest.TestCase):
    def setUp(self):
        self.rng = random.Random(f"{SEED} {self.id()}")
        self.number = 0

    def name(self):
        """A new run directory."""
        self.number += 1
        return f"{self._testMethodName}-{self.number}"

    def succeed(self, *arguments, **options):
        result = program(*arguments, **options)
        self.assertEqual(result.returncode, 0, f"{arguments}: {result.stderr}")
        return result

    def train(self, *arguments):
        name = self.name()
        self.succeed(*new_run(name, *arguments))
        return name

    def copy_until(self, run, step):
        """A copy of the run as it was when it had saved `step`: later checkpoints are missing."""
        name = self.name()
        shutil.copytree(path(run), path(name))
        for file in glob.glob(path(name, "checkpoints", "*")):
            if file > checkpoint(name, step):
                os.remove(file)
        return name

    def assert_same_run(self, run, reference, note=""):
        """Every loss, gradient norm and evaluation, and the bits of the final weights and moments."""
        for event, key in (("train", "loss"), ("train", "grad_norm"), ("eval", "loss"), ("merge", "quant_error")):
            self.assertEqual(series(run, event, key), series(reference, event, key), f"seed {SEED} {note}: {event} {key}")
        last = checkpoints(reference)[-1]
        self.assertEqual(checkpoints(run)[-1], last)
        mine, theirs = (read_safetensors(path(r, "checkpoints", last))[0] for r in (run, reference))
        self.assertEqual([k for k in theirs if theirs[k] != mine.get(k)], [], f"seed {SEED} {note}: tensors of {last}")
        self.assertEqual(len(mine), len(theirs))

    def mistake(self, arguments, *words, before=(), **options):
        """One line on stderr that holds every word (after lines that hold those of `before`), exit code 2."""
        result = program(*arguments, **options)
        lines = result.stderr.splitlines()
        self.assertEqual(result.returncode, 2, f"{arguments}: {result.stderr}")
        self.assertEqual(len(lines), len(before) + 1, f"{arguments}: {result.stderr}")
        self.assertTrue(lines[-1].startswith("train_loqt: "), result.stderr)
        for line, word in zip(lines, before):
            self.assertIn(word, line)
        for word in words:
            self.assertIn(str(word), lines[-1])
        return lines[-1]
