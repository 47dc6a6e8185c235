"""Tests of the program as a user meets it: python3 test/test_program.py (after make, or make cpu)

Every test runs ./train_loqt on a model of 300,000 parameters, in a temporary folder, on text made here.
LOQT_TEST_DEVICE=cuda runs the same on a GPU (test/gpu_program.sh), LOQT_TEST_KILLS sets the number of kills, LOQT_TEST_SEED repeats a run.
"""
import array
import glob
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.path.join(ROOT, "train_loqt")
DEVICE = os.environ.get("LOQT_TEST_DEVICE", "cpu")
KILLS = int(os.environ.get("LOQT_TEST_KILLS", 20))
SEED = int(os.environ.get("LOQT_TEST_SEED", random.SystemRandom().randrange(2**32)))
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="2")

CONFIG = {
    "model": {"hidden": 128, "intermediate": 172, "heads": 2, "kv_heads": 1, "layers": 2, "vocab": 259},
    "method": {"rank": 16, "merge_gap": 6, "merge_growth": 0},
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
    subprocess.run(tokenize + ["--out", path("shards")], check=True)
    subprocess.run(tokenize + ["--out", path("rows"), "--layout", "rows", "--seq-len", "32"], check=True)
    with open(path("config.json"), "w") as f:
        json.dump(CONFIG, f)


def path(*names):
    return os.path.join(folder, *map(str, names))


def program(*arguments, **options):
    """The finished process, with its output as text."""
    return subprocess.run([PROGRAM, *map(str, arguments)], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, errors="replace",
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


class KillTest(ProgramTest):
    """kill -9 at random moments, and what else can interrupt a run."""

    def kill_once(self, name, startup):
        """Starts or resumes the run and kills it at a random moment; False if it came to its end before."""
        log, fresh = path(name, "metrics.jsonl"), not os.path.exists(path(name, "config.json"))
        lines = lambda: open(log, "rb").read().count(b"\n") if os.path.exists(log) else 0
        begin = lines()
        process = start(*(new_run(name) if fresh else ()), *(() if fresh else ("--resume", "--run.dir", name)), *self.options * fresh)
        if self.rng.random() < 0.15:
            time.sleep(self.rng.uniform(0, startup))
        else:
            wanted = begin + self.rng.randrange(1, 12)
            while process.poll() is None and lines() < wanted:
                time.sleep(0.0005)
            time.sleep(self.rng.uniform(0, 0.01))
        process.kill()
        _, errors = process.communicate()
        self.assertIn(process.returncode, (0, -signal.SIGKILL), errors)
        self.assertNotIn("train_loqt: ", errors)
        return process.returncode != 0

    def kill_and_compare(self, kills, *options):
        self.options = ("--steps", 40, "--keep_last", 2, *options)
        begin = time.time()
        reference = self.train(*self.options)
        events = metrics(reference)
        self.assertGreater(len([e for e in events if e["event"] == "merge"]), 4)
        startup = max(0.02, time.time() - begin - float(events[-1]["training_seconds"]))
        name = self.name()
        done = 0
        while done < kills:
            if self.kill_once(name, startup):
                done += 1
            else:
                self.assert_same_run(name, reference, f"after {done} kills")
                name = self.name()
        if os.path.exists(path(name, "config.json")):
            self.succeed("--resume", "--run.dir", name)
        else:
            self.succeed(*new_run(name, *self.options))
        self.assert_same_run(name, reference, f"after {done} kills")
        self.assertEqual([f for f in checkpoints(name) if ".tmp" in f], [])

    def test_killed_with_fp32_moments(self):
        self.kill_and_compare(KILLS // 2)

    def test_killed_with_8_bit_moments_and_subspace_projection(self):
        self.kill_and_compare(KILLS - KILLS // 2, "--moments", "int8", "--rounding", "stochastic", "--projection", "subspace", "--moments_at_merge", "project",
                              "--projection_gradient", "last")

    def test_metrics_line_cut_short(self):
        reference = self.train("--checkpoint.every", 4)
        name = self.copy_until(reference, 8)
        lines = open(path(name, "metrics.jsonl")).read().splitlines(keepends=True)
        cut = next(i for i, line in enumerate(lines) if '"train"' in line and '"step": 11' in line)
        with open(path(name, "metrics.jsonl"), "w") as f:
            f.write("".join(lines[:cut]) + lines[cut][:self.rng.randrange(1, len(lines[cut]) - 1)])
        self.succeed("--resume", "--run.dir", name)
        self.assert_same_run(name, reference)
        total = open(path(name, "metrics.jsonl")).read().count("\n")
        self.assertEqual(len(metrics(name)), total - 1)  # every line but the cut one can be read

    def test_signals_finish_the_step_and_save(self):
        options = ("--steps", 150, "--eval.every", 0, "--checkpoint.every", 50, "--merge_gap", 20)
        reference, name = self.train(*options), self.name()
        for i, which in enumerate((signal.SIGINT, signal.SIGTERM)):
            process = start(*new_run(name, *options)) if i == 0 else start("--resume", "--run.dir", name)
            while process.poll() is None and not (os.path.exists(path(name, "metrics.jsonl")) and len(series(name)) > 20 * i + 2):
                time.sleep(0.001)
            process.send_signal(which)
            output, errors = process.communicate(timeout=60)
            self.assertEqual((process.returncode, errors), (0, ""))
            end = metrics(name)[-1]
            self.assertEqual((end["event"], end["finished"]), ("end", False))
            self.assertLess(end["step"], 150)
            self.assertIn(f"stopped after step {end['step']}; state saved", output)
            self.assertTrue(os.path.exists(checkpoint(name, end["step"])))
            self.assertEqual(max(series(name)), end["step"])
        self.succeed("--resume", "--run.dir", name)
        self.assert_same_run(name, reference)

    def test_resume_with_another_micro_batch(self):
        tolerance = 1e-5 if DEVICE == "cpu" else 5e-3  # sums in another order; bf16 on a GPU
        for method in ("loqt", "full"):
            reference = self.train("--method.name", method, "--merge_gap", 5)
            for micro_batch in (1, 4):
                name = self.copy_until(reference, 6)
                self.succeed("--resume", "--run.dir", name, "--micro_batch", micro_batch)
                theirs = series(reference)
                for step, loss in series(name).items():
                    self.assertAlmostEqual(float(loss), float(theirs[step]), delta=tolerance * float(loss), msg=f"{method}, step {step}")
                resumed = [e for e in metrics(name) if e["event"] == "resume"]
                self.assertEqual([(e["step"], e["micro_batch"]) for e in resumed], [(6, micro_batch)])
                self.assertIn("micro_batch", resumed[0]["changed"])
                self.assertEqual(json.load(open(path(name, "config.json")))["train"]["micro_batch"], micro_batch)  # for the next resume

    def test_a_finished_run_has_nothing_to_resume(self):
        name = self.train()
        before = series(name), checkpoints(name)
        self.succeed("--resume", "--run.dir", name)
        self.assertEqual((series(name), checkpoints(name)), before)


class MistakeTest(ProgramTest):
    """A user's mistake is one line and exit code 2; it leaves no run behind."""

    def test_options(self):
        cases = [
            (("--lrr", 1), "--lrr", "--optimizer.lr"),
            (("--resme",), "--resme", "--resume"),
            (("--every", 5), "ambiguous", "--eval.every", "--checkpoint.every"),
            (("--lr", "fast"), "optimizer.lr", "fast", "number"),
            (("--lr", -1), "optimizer.lr", "-1"),
            (("--lr",), "lr", "missing"),
            (("--rank", 0), "method.rank", "0"),
            (("--rank", -3), "method.rank", "-3"),
            (("--rank", 129), "method.rank", "129", "128"),
            (("--seq_len", 0), "train.seq_len", "0"),
            (("--seq_len", 10**6), "seq_len"),
            (("--steps", "1.5"), "train.steps", "1.5"),
            (("--micro_batch", 3), "train.micro_batch", "3", "4"),
            (("--heads", 3), "model.heads", "3", "128"),
            (("--moments", "int4"), "optimizer.moments", "int4", "int8"),
            (("--memory_budget", "lots"), "lots", "GiB"),
            (("--run.device", "tpu"), "tpu", "cuda"),
            (("stray",), "stray"),
            (("--data.train", ""), "train", "shards"),
            (("--data.train", "nowhere"), "nowhere"),
            (("--data.val", "nowhere/*.bin"), "val", "nowhere/*.bin"),
            (("--vocab", 100), "259", "100"),
            (("--init_from", "nowhere"), "nowhere"),
        ]
        for arguments, *words in cases:
            with self.subTest(arguments):
                name = self.name()
                budget = ("--memory_budget", "1GiB") if "--memory_budget" not in arguments else ()
                self.mistake(new_run(name, *budget, *arguments), *words)
                self.assertFalse(os.path.exists(path(name)))

    def test_config_files(self):
        def config(text, *words):
            with open(path("bad.json"), "w") as f:
                f.write(text)
            self.mistake(("--config", "bad.json", "--run.dir", "bad"), *words)

        config('{"optimizer": {"learning": 1}}', "bad.json", "optimizer.learning", "did you mean")
        config('{"method": {"rnk": 1}}', "method.rnk", "method.rank")
        config('{"rank": 16}', "rank", "method")
        config('{"method": {"rank": "many"}}', "method.rank", "many")
        config('{"method": {"name": "lora"}}', "method.name", "lora", "loqt")
        config("[]", "bad.json", "object")
        config("", "bad.json", "JSON")
        text = json.dumps(CONFIG)
        config(text[:self.rng.randrange(1, len(text))], "bad.json", "JSON", "byte")
        self.mistake(("--config", "nonesuch"), "nonesuch", "tiny.json", "60m.json")
        self.mistake((), "--config")

    def test_shards(self):
        def shard(*words, magic=20240520, version=1, tokens=(5,) * 1000, count=None, size=None):
            with open(path("x.bin"), "wb") as f:
                body = array.array("H", tokens).tobytes()
                f.write((struct.pack("<3i", magic, version, len(tokens) if count is None else count).ljust(1024, b"\0") + body)[:size])
            name = self.name()
            self.mistake(new_run(name, "--data.train", "x.bin", "--data.val", ""), "x.bin", *words)

        shard("magic", "12345", magic=12345)
        shard("version 2", version=2)
        shard("truncated", "1001", count=1001)
        shard("truncated", size=1999)
        shard("1024", size=100)
        shard("10 tokens", tokens=(5,) * 10)
        shard("300", "259", tokens=(5,) * 500 + (300,) + (5,) * 499)
        # An id that the spot checks pass over is met while training: the run ends the same way.
        tokens = [5] * 200_000
        for sample in range(3000, 6000):
            tokens[sample * 32 + 7] = 259
        shard("259", tokens=tokens[:199_000])

    def test_memory_budget(self):
        budget, long = "60MiB", ("--seq_len", 1024, "--eval.sequences", 1, "--steps", 1)
        line = self.mistake(new_run(self.name(), *long, "--device", DEVICE, "--memory_budget", "8MiB"), "does not fit", "8.00 MiB", "--moments int8", "--seq_len")
        self.assertRegex(line, r"[\d.]+ [MG]iB planned")
        if DEVICE == "cpu":
            self.mistake(new_run(self.name(), *long, "--micro_batch", 4, "--memory_budget", budget), "--micro_batch auto")
            name = self.train(*long, "--micro_batch", "auto", "--memory_budget", budget)
            self.assertLessEqual(metrics(name)[0]["planned_bytes"], 60 << 20)

    def test_run_directory(self):
        name = self.train("--steps", 1)
        self.mistake(new_run(name), name, "--resume")
        self.mistake(("--resume", "--run.dir", "nothing-here"), "nothing-here", "no run")
        self.mistake(("--resume",), "--run.dir")
        with open(path("plain-file"), "w") as f:
            f.write("x")
        self.mistake(new_run("plain-file"), "plain-file")
        os.symlink("loop", path("loop"))
        self.mistake(new_run("loop"), "loop")
        self.mistake(("--resume", "--run.dir", "loop"), "loop")
        for key, value in (("train.seed", 7), ("method.rank", 8), ("model.layers", 1), ("train.batch", 8), ("optimizer.moments", "int8"), ("method.name", "full")):
            self.mistake(("--resume", "--run.dir", name, "--" + key, value), key, value)
        with open(path(name, "config.json"), "r+") as f:
            f.truncate(200)
        self.mistake(("--resume", "--run.dir", name), "config.json", "JSON")

    @unittest.skipIf(os.geteuid() == 0, "root may read everything")
    def test_directory_without_permission(self):
        name = self.train("--steps", 1)
        os.chmod(path(name), 0)
        self.addCleanup(os.chmod, path(name), 0o700)
        self.mistake(("--resume", "--run.dir", name), name, "ermission")

    def test_run_directory_in_use(self):
        name = self.name()
        process = start(*new_run(name, "--steps", 100000, "--checkpoint.every", 0))
        try:
            while process.poll() is None and not (os.path.exists(path(name, "metrics.jsonl")) and series(name)):
                time.sleep(0.005)
            self.mistake(("--resume", "--run.dir", name), name, "in use")
        finally:
            process.kill()
            process.communicate()
        process = start("--resume", "--run.dir", name)  # the lock went with its holder
        while process.poll() is None and not any(e["event"] == "resume" for e in metrics(name)):
            time.sleep(0.005)
        self.assertIsNone(process.poll())
        process.kill()
        process.communicate()

    @unittest.skipIf(shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0, "there is a GPU")
    def test_no_gpu(self):
        self.mistake(new_run(self.name(), "--device", "cuda"), "cuda", "GPU", "--device cpu")

    def test_no_validation_data(self):
        name = self.train("--data.val", "")
        self.assertEqual(series(name, "eval"), {})
        self.assertEqual(len(series(name)), 12)


class DamageTest(ProgramTest):
    """Checkpoints that were damaged, swapped, or could not be written."""

    def flip(self, file):
        with open(file, "r+b") as f:
            size = os.path.getsize(file)
            place = self.rng.randrange(size // 2, size)  # in the tensors
            f.seek(place)
            byte = f.read(1)[0]
            f.seek(place)
            f.write(bytes([byte ^ (1 << self.rng.randrange(8))]))

    def test_flipped_bit_and_cut_file(self):
        reference = self.train()
        name = self.copy_until(reference, 9)
        self.flip(checkpoint(name, 9))
        with open(checkpoint(name, 6), "r+b") as f:
            f.truncate(self.rng.randrange(os.path.getsize(f.name)))
        result = self.succeed("--resume", "--run.dir", name)
        lines = result.stderr.splitlines()
        self.assertEqual(len(lines), 2, result.stderr)
        for line, step in zip(lines, (9, 6)):
            self.assertIn("skipped checkpoint", line)
            self.assertIn(f"step-{step:08d}", line)
        self.assertIn("resumed at step 3", result.stdout)
        self.assert_same_run(name, reference)

    def test_no_checkpoint_left(self):
        name = self.train("--steps", 6)
        for file in glob.glob(path(name, "checkpoints", "*")):
            self.flip(file)
        for arguments in (("--resume",), ("--sample", "a"), ("--export", "exported")):
            self.mistake((*arguments, "--run.dir", name), "no valid checkpoint", before=("step-00000006", "step-00000003"))
        self.assertFalse(os.path.exists(path("exported")))

    def test_checkpoint_of_another_model(self):
        name = self.train("--steps", 3)
        others = [("--hidden", 192, "--heads", 3, "hidden"), ("--intermediate", 160, "intermediate"), ("--layers", 1, "layers"), ("--rank", 8, "rank"),
                  ("--moments", "int8", "moments"), ("--method.name", "full", "method"), ("--vocab", 270, "vocab")]
        for *options, word in others:
            with self.subTest(options):
                other = self.train("--steps", 3, *options)
                shutil.copy(checkpoint(other, 3), checkpoint(name, 3))
                self.mistake(("--resume", "--run.dir", name), "step-00000003.safetensors", word)

    def check_full_disk(self, name, reference, checkpoint_names):
        self.assertEqual(checkpoints(name), checkpoint_names)  # no temporary either
        self.succeed("--sample", "a", "--run.dir", name)
        self.succeed("--resume", "--run.dir", name)
        self.assert_same_run(name, reference)

    def test_file_size_limit(self):
        reference = self.train()
        name = self.copy_until(reference, 6)
        before, size = checkpoints(name), os.path.getsize(checkpoint(name, 6))
        limit = self.rng.randrange(size // 3, size)
        self.mistake(("--resume", "--run.dir", name), "step-00000009", "File too large",
                     preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        self.check_full_disk(name, reference, before)

    def test_disk_full(self):
        """A file system of 5 MiB in a mount namespace of its own: room for three checkpoints."""
        reference = self.train()
        script = """mkdir -p small && mount -t tmpfs -o size=5m none small || exit 77
            "$0" --config config.json --run.dir small/run 2>errors; echo "full $?" >>errors
            ls small/run/checkpoints | grep -c tmp >>errors
            mount -o remount,size=50m small
            "$0" --resume --run.dir small/run >/dev/null 2>>errors; echo "resumed $?" >>errors
            cp -r small/run """ + self.name()
        result = subprocess.run(["unshare", "-rm", "sh", "-c", script, PROGRAM], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True) if shutil.which("unshare") else None
        if not result or result.returncode in (1, 77):
            self.skipTest("cannot mount a small file system here")
        lines = open(path("errors")).read().splitlines()
        self.assertEqual(lines[1:], ["full 2", "0", "resumed 0"])
        self.assertRegex(lines[0], r"^train_loqt: .*free some space")
        self.assert_same_run(f"{self._testMethodName}-{self.number}", reference)

    @unittest.skipUnless(os.path.exists("/dev/full"), "no /dev/full")
    def test_metrics_cannot_be_written(self):
        name = self.train()
        os.remove(path(name, "metrics.jsonl"))
        os.symlink("/dev/full", path(name, "metrics.jsonl"))
        self.mistake(("--resume", "--run.dir", name), "metrics.jsonl", "No space left")


class NonFiniteTest(ProgramTest):
    def test_stop(self):
        for options in ((), ("--method.name", "full"), ("--moments", "int8", "--method.name", "loqt-nq")):
            name = self.name()
            line = self.mistake(new_run(name, *options, "--lr", 1e30), "not finite", "lr")
            step = int(re.search(r"step (\d+)", line)[1])
            event = next(e for e in metrics(name) if e["event"] == "nonfinite")
            self.assertEqual((event["step"], event["policy"]), (step, "stop"))
            self.assertEqual(max(series(name)), step)  # steps done
            self.assertEqual(checkpoints(name)[-1], os.path.basename(checkpoint(name, step)))
            self.assertEqual(non_finite(checkpoint(name, step)), [])

    def test_skip(self):
        name = self.train("--lr", 1e30, "--nonfinite", "skip")
        counts = series(name, "train", "skipped")
        self.assertEqual(len(counts), 12)
        self.assertEqual(len([e for e in metrics(name) if e["event"] == "nonfinite"]), counts[12])
        self.assertGreater(counts[12], 5)
        self.assertEqual(metrics(name)[-1]["skipped"], counts[12])
        self.assertEqual(non_finite(checkpoint(name, 12)), [])

    def test_a_skipped_step_changes_nothing(self):
        name = self.train("--lr", 1e30, "--nonfinite", "skip", "--checkpoint.every", 1, "--keep_last", 20)
        self.assertEqual(series(name, "train", "skipped")[11], series(name, "train", "skipped")[12] - 1)
        before, after = (read_safetensors(checkpoint(name, step))[0] for step in (11, 12))
        self.assertEqual(before, after)

    def test_weights_stay_finite_at_any_learning_rate(self):
        for method in ("loqt", "loqt-nq", "full"):
            lr = 10 ** self.rng.uniform(0, 36)
            name = self.train("--method.name", method, "--lr", lr, "--nonfinite", "skip", "--merge_gap", 2, "--warmup_ratio", 0.5)
            self.assertEqual(non_finite(checkpoint(name, 12)), [], f"seed {SEED}: {method}, lr {lr}")


class MetricsTest(ProgramTest):
    KEYS = {
        "start": "step device method parameters train_tokens planned_bytes",
        "train": "step loss lr grad_norm tokens tokens_per_s mfu step_ms memory_bytes",
        "eval": "step loss perplexity tokens",
        "merge": "step seconds quant_error captured_energy",
        "checkpoint": "step path seconds",
        "end": "step finished seconds",
    }

    def test_events(self):
        name = self.train("--steps", 20, "--merge_growth", 1.5, "--merge_gap", 3)
        with open(path(name, "metrics.jsonl")) as f:
            events = [json.loads(line) for line in f]
        for e in events:
            self.assertEqual(set(self.KEYS[e["event"]].split()) - set(e), set(), e)
            self.assertLess(abs(e["time"] - time.time()), 300)
        self.assertEqual({e["event"] for e in events}, set(self.KEYS))
        self.assertEqual((events[0]["event"], events[-1]["event"], events[-1]["finished"]), ("start", "end", True))

        steps = lambda kind: [e["step"] for e in events if e["event"] == kind]
        # Gap k is tau + floor(psi^k), the first tau; no merge in the last tau steps.
        schedule, gap = [0], 3
        while schedule[-1] + gap + 3 < 20:
            schedule.append(schedule[-1] + gap)
            gap = 3 + math.floor(1.5 ** (len(schedule) - 1))
        self.assertEqual(steps("merge"), schedule)
        self.assertEqual(steps("train"), list(range(1, 21)))
        self.assertEqual(steps("eval"), [0, 5, 10, 15, 20])
        self.assertEqual(steps("checkpoint"), [3, 6, 9, 12, 15, 18, 20])
        for e in events:
            if e["event"] == "train":
                self.assertEqual(e["tokens"], e["step"] * 4 * 32)
                self.assertGreater(e["memory_bytes"], 0)
            elif e["event"] == "eval":
                self.assertAlmostEqual(math.log(e["perplexity"]), e["loss"], places=9)
                self.assertEqual(e["tokens"], 8 * 32)
            elif e["event"] == "merge":
                self.assertTrue(0 < e["quant_error"] < e["quant_error_uncompensated"] < 0.12 and 0 < e["captured_energy"] <= 1.0001, e)
                self.assertEqual((e["matrices"], e["failed"]), (14, 0))
            elif e["event"] == "checkpoint":
                self.assertTrue(os.path.exists(path(e["path"])))
        # The schedule of the learning rate: linear warm-up over a tenth, cosine to a tenth.
        rates = [e["lr"] for e in events if e["event"] == "train"]
        expected = [0.01 * (u + 1) / 2 if u < 2 else 0.01 * (0.1 + 0.45 * (1 + math.cos(math.pi * (u - 2) / 18))) for u in range(20)]
        for mine, theirs in zip(rates, expected):
            self.assertAlmostEqual(mine, theirs, places=12)

    def test_checkpoint_describes_itself(self):
        name = self.train("--keep_last", 2, "--keep_every", 6)
        self.assertEqual(checkpoints(name), [f"step-{s:08d}.safetensors" for s in (6, 9, 12)])
        tensors, metadata = read_safetensors(checkpoint(name, 9))
        self.assertEqual((metadata["step"], metadata["next_sample"], metadata["seed"]), ("9", "36", "42"))
        self.assertEqual(json.loads(metadata["config"]), json.load(open(path(name, "config.json"))))
        self.assertIn("model.layers.1.mlp.down_proj.weight.B", tensors)

    def test_config_round_trip(self):
        name = self.train("--steps", 2)
        again = self.name()
        self.succeed("--config", path(name, "config.json"), "--run.dir", again)
        first, second = (json.load(open(path(n, "config.json"))) for n in (name, again))
        self.assertEqual(second["run"].pop("dir"), again)
        del first["run"]["dir"]
        self.assertEqual(first, second)
        for section, values in CONFIG.items():
            for key, value in values.items():
                if key != "steps":
                    self.assertEqual(first[section][key], value)
        self.assert_same_run(again, name)

    def test_log_every(self):
        self.assertEqual(list(series(self.train("--log_every", 5))), [5, 10, 12])

    def test_plan_of_every_preset(self):
        for preset in sorted(os.listdir(os.path.join(ROOT, "configs"))):
            for device in ("cpu", "cuda"):
                with self.subTest(preset=preset, device=device):
                    budget = () if device == "cuda" else ("--memory_budget", "2000GiB")
                    micro_batch = ("--micro_batch", 1) if preset == "13b.json" and device == "cuda" else ()
                    result = self.succeed("--config", preset[:-5], "--device", device, "--plan", *budget, *micro_batch)
                    self.assertRegex(result.stdout, r"total +\d+\.\d+ GiB")
                    self.assertIn("device kind " + device, result.stdout)
                    self.assertEqual(result.stderr, "")
        self.assertFalse(os.path.exists(path("runs")))


class UseTest(ProgramTest):
    """What comes after training: export and samples."""

    def test_export_and_start_from_it(self):
        for method in ("full", "loqt", "loqt-nq"):
            with self.subTest(method):
                run, target = self.train("--method.name", method), self.name()
                self.succeed("--run.dir", run, "--export", target, "--export-dtype", "f32")
                self.mistake(("--run.dir", run, "--export", target), target, "not empty", before=("checkpoint ",))
                exported = json.load(open(path(target, "config.json")))
                self.assertEqual((exported["hidden_size"], exported["num_key_value_heads"], exported["vocab_size"], exported["eos_token_id"]), (128, 1, 259, 1))
                # Another shape in the file: that of the model counts.
                again = self.train("--method.name", "full", "--init_from", target, "--steps", 1, "--hidden", 64, "--layers", 1)
                final, begin = float(series(run, "eval")[12]), float(series(again, "eval")[0])
                self.assertAlmostEqual(begin, final, delta=(1e-5 if DEVICE == "cpu" else 2e-3) * final)
                self.assertLess(final, 4)

    def test_export_in_bf16(self):
        run, target = self.train("--steps", 4), self.name()
        self.succeed("--run.dir", run, "--export", target)
        tensors, _ = read_safetensors(path(target, "model.safetensors"))
        self.assertEqual({t[0] for t in tensors.values()}, {"BF16"})
        self.assertEqual(len(tensors), 2 * 9 + 3)
        self.assertEqual(non_finite(path(target, "model.safetensors")), [])

    def test_sample(self):
        run = self.train("--steps", 30)

        def sample(prompt, *options):
            return self.succeed("--run.dir", run, "--sample", prompt, "--sample-tokens", 50, *options).stdout

        text = sample("abc def", "--sample-seed", 3)
        self.assertTrue(text.startswith("abc def"), text)
        self.assertLessEqual(len(text), 7 + 50 + 1)
        self.assertEqual(text, sample("abc def", "--sample-seed", 3))
        self.assertNotEqual(text, sample("abc def", "--sample-seed", 4))
        self.assertEqual(sample("ab", "--temperature", 0, "--sample-seed", 1), sample("ab", "--temperature", 0, "--sample-seed", 2))
        self.assertEqual(sample("ab", "--top-k", 1), sample("ab", "--temperature", 0))
        self.assertGreater(len(sample("")), 1)  # starts as a document does
        self.assertTrue(sample("länger als der Kontext, " * 10).startswith("länger als der Kontext, " * 10))
        for options in (("--sample-tokens", "x"), ("--temperature", "hot")):
            self.mistake(("--run.dir", run, "--sample", "a", *options), options[1])

    def test_sample_with_a_token_the_model_lacks(self):
        os.mkdir(path("foreign"))
        with open(path("foreign", "x.bin"), "wb") as f:
            f.write(struct.pack("<3i", 20240520, 1, 4000).ljust(1024, b"\0") + array.array("H", [self.rng.randrange(100) for _ in range(4000)]).tobytes())
        run = self.train("--data.train", "foreign/x.bin", "--data.val", "", "--vocab", 100, "--steps", 1)
        self.mistake(("--run.dir", run, "--sample", "a"), "manifest.json")
        shutil.copy(path("shards", "manifest.json"), path("foreign"))
        self.mistake(("--run.dir", run, "--sample", "AzB"), "token 125", "100", before=("checkpoint ",))


class MethodTest(ProgramTest):
    """Every method and storage format trains, is deterministic, and resumes exactly."""

    VARIANTS = {
        "loqt": (), "loqt-nq": ("--method.name", "loqt-nq"), "full": ("--method.name", "full"),
        "bf16": ("--moments", "bf16"), "bf16-nearest": ("--moments", "bf16-nearest"), "int8": ("--moments", "int8"),
        "nearest": ("--rounding", "nearest"), "stochastic": ("--rounding", "stochastic"), "master": ("--rounding", "master"),
        "subspace": ("--projection", "subspace"), "last": ("--projection_gradient", "last"), "one micro-batch": ("--micro_batch", 4),
        "reset": ("--moments_at_merge", "reset"), "project": ("--moments_at_merge", "project"),
        "project int8": ("--moments_at_merge", "project", "--moments", "int8"), "single quantization": ("--double_quant", "false"),
        "no compensation": ("--compensation_rounds", 0), "bf16 gradients": ("--gradients", "bf16"), "rebuilt": ("--effective_weights", "rebuilt"),
        "rows": ("--data.train", "rows", "--data.val", "rows", "--data.layout", "rows"),
    }

    def test_variants(self):
        for title, options in self.VARIANTS.items():
            with self.subTest(title):
                options = ("--steps", 8, "--merge_gap", 3, "--checkpoint.every", 1, *options)
                first, second = self.train(*options), self.train(*options)
                self.assertEqual(list(series(first, "merge")), [] if title == "full" else [0, 3])
                losses = [float(x) for x in series(first).values()]
                self.assertTrue(all(map(math.isfinite, losses)))
                self.assertAlmostEqual(losses[0], math.log(259), delta=0.3)
                self.assertLess(losses[-1], losses[0] - 1)
                self.assertLess(float(series(first, "eval")[8]), float(series(first, "eval")[0]) - 1)
                self.assert_same_run(second, first, title)
                step = self.rng.randrange(1, 8)
                resumed = self.copy_until(first, step)
                self.succeed("--resume", "--run.dir", resumed)
                self.assert_same_run(resumed, first, f"{title}, resumed at {step}")

    def test_same_loss_however_effective_weights_are_kept(self):
        cached, rebuilt = (self.train("--effective_weights", way) for way in ("cached", "rebuilt"))
        self.assert_same_run(cached, rebuilt)


if __name__ == "__main__":
    unittest.main()
