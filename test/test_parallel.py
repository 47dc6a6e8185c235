"""Tests of runs by several processes: they train as one does, and end together whatever happens to one of them.

python3 test/test_parallel.py [CLASS[.TEST]], after make or make cpu. LOQT_TEST_DEVICE=cuda takes two GPUs, more tests run on four. See program.py for settings.
"""
import json
import array
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import unittest

import program
from program import checkpoint, DEVICE, ENVIRONMENT, metrics, new_run, path, PROGRAM, ProgramTest, read_safetensors, read_text, series, start, steps

KILLS = int(os.environ.get("LOQT_TEST_RANK_KILLS", 4))


def setUpModule():
    program.setUpModule()
    probe = program.program("--config", "tiny", "--device", DEVICE, "--gpus", 2, "--data.train", "none", "--run.dir", "probe")
    reason = re.search(r"run\.gpus: (.*)", probe.stderr)
    if reason:
        raise unittest.SkipTest(f"runs by several processes: {reason[1]}")


def children(process):
    """{rank: pid} of a launcher's processes that are there."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as f:
                parent = int(f.read().rsplit(")", 1)[1].split()[1])
            with open(f"/proc/{pid}/environ", "rb") as f:
                rank = re.search(rb"(?:^|\0)RANK=(\d+)", f.read())
        except OSError:
            continue
        if parent == process.pid and rank:
            found[int(rank[1])] = int(pid)
    return found


def most():
    """How many processes can train together, at most 4."""
    if DEVICE == "cpu":
        return 4
    there = sum(line.startswith("GPU ") for line in subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, text=True).stdout.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return min(4, there if visible is None else len(visible.split(",")))


def trained(name):
    """Steps in the metrics so far."""
    log = path(name, "metrics.jsonl")
    return len(re.findall(r'"event": ?"train"', read_text(log))) if os.path.exists(log) else 0


class ParallelTest(ProgramTest):
    def train_by(self, processes, *arguments):
        return self.train("--gpus", processes, *arguments)

    def wait_for_steps(self, process, name, count):
        deadline = time.time() + 60
        while process.poll() is None and trained(name) < count and time.time() < deadline:
            time.sleep(0.002)
        self.assertIsNone(process.poll(), process.stderr.read() if process.poll() is not None else "")

    def ended(self, process, within):
        """(exit code, stderr) of a process that has to end within so many seconds, with all its children."""
        ranks = children(process)
        try:
            _, errors = process.communicate(timeout=within)
        except subprocess.TimeoutExpired:
            for pid in [process.pid, *ranks.values()]:
                os.kill(pid, signal.SIGKILL)
            self.fail(f"still there after {within} s")
        time.sleep(0.2)
        for rank, pid in ranks.items():
            self.assertFalse(os.path.exists(f"/proc/{pid}") and "Z" not in read_text(f"/proc/{pid}/stat").rsplit(")", 1)[1].split()[0], f"rank {rank} lives on")
        return process.returncode, errors


class SameTrainingTest(ParallelTest):
    # Title: options, and how far losses may be from those of one process. Sums come in another order; that is all where nothing is factorized. The columns
    # of P that belong to small singular values move with it, as do codes of NF4, and micro-batches of another size ("per layer") round otherwise from
    # the start: 60 runs were at most 2.1e-2 apart.
    SUMS, FACTORS, CODES = 1e-6, 2e-2, 6e-2
    VARIANTS = {
        "full": (("--method.name", "full"), SUMS), "lora": (("--method.name", "lora"), SUMS), "relora": (("--method.name", "relora", "--relora_gap", 3, "--relora_warmup", 2), SUMS),
        "loftq": (("--method.name", "loftq"), SUMS), "galore": (("--method.name", "galore", "--scale", 1), FACTORS), "loqt-nq": (("--method.name", "loqt-nq"), FACTORS),
        "galore per layer": (("--method.name", "galore", "--scale", 1, "--updates", "per_layer", "--clip", 0, "--micro_batch", "auto"), CODES),
        "loqt": ((), CODES), "clipped": (("--clip", 0.5), CODES), "unclipped": (("--clip", 0), CODES), "8-bit gradients": (("--gradients", "int8", "--micro_batch", 1), CODES),
        "reset": (("--moments_at_merge", "reset"), CODES), "project": (("--moments_at_merge", "project", "--moments", "int8"), CODES),
        "subspace": (("--projection", "subspace"), CODES), "per layer": (("--updates", "per_layer", "--clip", 0, "--micro_batch", "auto"), CODES),
        "masked rows": (("--data.train", "rows", "--data.val", "rows", "--data.layout", "rows"), CODES),
        "last micro-batch": (("--projection_gradient", "last", "--micro_batch", 1), None),  # twice as many sequences with two processes
    }

    def test_variants(self):
        share, of = map(int, os.environ.get("LOQT_TEST_SHARE", "0/1").split("/"))  # as in test_program.py
        for title, (options, tolerance) in list(self.VARIANTS.items())[share::of]:
            with self.subTest(title):
                options = ("--steps", 8, "--merge_gap", 3, "--lr", 1e-3, "--verify_every", 1, *options)
                one, two = self.train_by(1, *options), self.train_by(2, *options)
                again = self.train_by(2, *options)
                self.assert_same_run(again, two, title)
                self.assertEqual(steps(two, "merge"), steps(one, "merge"))
                if title != "8-bit gradients":  # before anything was rounded
                    self.assertAlmostEqual(float(series(two, key="grad_norm")[1]), float(series(one, key="grad_norm")[1]), delta=1e-4)
                self.assertAlmostEqual(float(series(two)[1]), float(series(one)[1]), delta=1e-5)
                if tolerance is None:
                    continue
                for event in ("train", "eval"):
                    theirs = series(one, event)
                    for step, loss in series(two, event).items():
                        self.assertAlmostEqual(float(loss), float(theirs[step]), delta=tolerance, msg=f"seed {program.SEED}: {event} {step}")

    @unittest.skipUnless(DEVICE == "cpu", "where P is in fp32")
    def test_projections_are_of_the_gradient_of_all(self):
        # Losses would not tell: the leading vectors of half of the data serve nearly as well.
        def leading(run):
            tensors, _ = read_safetensors(checkpoint(run, 1))
            rows = {}
            for name, (_, shape, data) in tensors.items():
                if name.endswith(".P"):
                    row = array.array("f", data)[:shape[1]]
                    rows[name] = [x / math.sqrt(sum(y * y for y in row)) for x in row]
            return rows

        for options in ((), ("--micro_batch", 1), ("--clip", 0)):
            with self.subTest(options):
                options = ("--method.name", "loqt-nq", "--steps", 1, *options)
                one, two = (leading(self.train_by(processes, *options)) for processes in (1, 2))
                cosines = sorted(abs(sum(a * b for a, b in zip(row, two[name]))) for name, row in one.items())
                self.assertEqual(len(cosines), 14)
                # Where two singular values are close, two vectors may turn into one another; not so in most matrices.
                self.assertGreater(cosines[len(cosines) // 2], 0.9999, f"seed {program.SEED}: {cosines}")

    def test_evaluation_is_the_same_to_the_bit(self):
        for sequences in (1, 5, 8, 0):
            options = ("--steps", 1, "--micro_batch", 1, "--eval.sequences", sequences, "--official_perplexity", "true")
            first = [next(e for e in metrics(self.train_by(n, *options)) if e["event"] == "eval") for n in (1, 2, 4) if n <= most()]
            for other in first[1:]:
                for key in ("loss", "perplexity", "perplexity_official_biased", "tokens"):
                    self.assertEqual(other[key], first[0][key], f"seed {program.SEED}: {sequences} sequences, {key}")

    def test_one_run_directory(self):
        two = self.train_by(2)
        events = metrics(two)
        self.assertEqual([e["gpus"] for e in events if e["event"] == "start"], [2])
        self.assertEqual(len([e for e in events if e["event"] == "train"]), 12)
        self.assertEqual([e["tokens"] for e in events if e["event"] == "train"][-1], 12 * 4 * 32)

    def test_resumed_by_another_number(self):
        options = ("--checkpoint.every", 1, "--lr", 1e-3)
        reference = self.train_by(2, *options)
        step = self.rng.randrange(1, 11)
        again = self.copy_until(reference, step)
        self.succeed("--resume", "--run.dir", again)  # run.gpus is in the run's configuration
        self.assert_same_run(again, reference, f"resumed at {step} by two")
        for processes in (n for n in (1, 4) if n <= most()):
            other = self.copy_until(reference, step)
            self.succeed("--resume", "--run.dir", other, "--gpus", processes)  # micro-batches of 1 instead of 2 where there are four
            self.assertEqual([e["gpus"] for e in metrics(other) if e["event"] == "resume"], [processes])
            configurations = [json.loads(read_text(run, "config.json")) for run in (reference, other)]
            self.assertEqual(configurations[1]["train"]["micro_batch"], configurations[0]["train"]["micro_batch"])  # for the next resume
            for number, loss in series(other).items():
                self.assertAlmostEqual(float(loss), float(series(reference)[number]), delta=self.CODES, msg=f"seed {program.SEED}: {processes} from {step}")
        one = self.train_by(1, *options)
        other = self.copy_until(one, step)
        self.succeed("--resume", "--run.dir", other, "--gpus", 2)
        for number, loss in series(other).items():
            self.assertAlmostEqual(float(loss), float(series(one)[number]), delta=self.CODES, msg=f"seed {program.SEED}: one, then two from {step}")


class EndTest(ParallelTest):
    """Whatever ends one process ends all, soon and with one message; and the run goes on from its last checkpoint as if nothing had been."""

    OPTIONS = ("--steps", 60, "--gpus", 2, "--checkpoint.every", 5, "--eval.every", 20, "--keep_last", 3)

    def begin(self, *options):
        name = self.name()
        return name, start(*new_run(name, *self.OPTIONS, *options))

    def test_killed_rank(self):
        reference = self.train(*self.OPTIONS)
        for kill in range(KILLS):
            name, process = self.begin()
            self.wait_for_steps(process, name, self.rng.randrange(6, 40))
            rank = kill % 2
            os.kill(children(process)[rank], signal.SIGKILL)
            code, errors = self.ended(process, 15)
            self.assertEqual(code, 3)
            self.assertRegex(errors, rf"^train_loqt: .*rank {rank}\b[^\n]*\n$", f"seed {program.SEED}")
            self.assertIn("--resume", errors)
            self.succeed("--resume", "--run.dir", name)
            self.assert_same_run(name, reference, f"rank {rank} killed")

    def test_killed_before_others_know_it(self):
        for rank in (0, 1):
            name, process = self.begin()
            while rank not in children(process):
                self.assertIsNone(process.poll())
            os.kill(children(process)[rank], signal.SIGKILL)
            code, errors = self.ended(process, 15)
            self.assertNotEqual(code, 0)
            self.assertRegex(errors, rf"^train_loqt: [^\n]*rank {rank}\b[^\n]*\n$")

    def test_stopped_rank(self):
        for rank in (0, 1):
            name, process = self.begin("--comm-timeout", 2)
            self.wait_for_steps(process, name, 6)
            os.kill(children(process)[rank], signal.SIGSTOP)
            code, errors = self.ended(process, 15)
            self.assertEqual(code, 3)
            self.assertRegex(errors, rf"^train_loqt: rank {rank}\b[^\n]*not been heard of[^\n]*\n$")

    def test_signal_saves_once_and_ends_all(self):
        reference = self.train(*self.OPTIONS)
        for which in (signal.SIGINT, signal.SIGTERM):
            name, process = self.begin()
            self.wait_for_steps(process, name, self.rng.randrange(6, 40))
            process.send_signal(which)
            self.assertEqual(self.ended(process, 30), (0, ""))
            end = metrics(name)[-1]
            self.assertEqual((end["event"], end["finished"]), ("end", False))
            self.assertTrue(os.path.exists(checkpoint(name, end["step"])))
            self.assertEqual(len([e for e in metrics(name) if e["event"] == "checkpoint" and e["step"] == end["step"]]), 1)
            self.succeed("--resume", "--run.dir", name)
            self.assert_same_run(name, reference, which.name)

    def test_signal_in_an_evaluation(self):
        """No other step is taken, and nothing evaluated twice. One of a few signals comes in time."""
        for _ in range(8):
            name, process = self.begin("--eval.every", 1, "--micro_batch", 1, "--checkpoint.every", 0)
            self.wait_for_steps(process, name, 2)
            step = trained(name)
            process.send_signal(signal.SIGTERM)
            self.assertEqual(self.ended(process, 30), (0, ""))
            events = [(e["event"], e["step"]) for e in metrics(name)]
            if events[-4:] == [("train", step), ("eval", step), ("checkpoint", step), ("end", step)]:
                return
        self.fail(f"seed {program.SEED}: the last of 8 runs was told to stop after step {step} and ended with {events[-4:]}")

    def test_signal_to_one_rank(self):
        name, process = self.begin()
        self.wait_for_steps(process, name, 8)
        os.kill(children(process)[1], signal.SIGTERM)
        self.assertEqual(self.ended(process, 30), (0, ""))
        self.assertEqual(metrics(name)[-1]["event"], "end")

    def test_killed_launcher(self):
        name, process = self.begin()
        self.wait_for_steps(process, name, 8)
        ranks = children(process)
        process.kill()
        process.communicate()
        deadline = time.time() + 30
        while any(os.path.exists(f"/proc/{pid}") for pid in ranks.values()) and time.time() < deadline:
            time.sleep(0.05)
        self.assertEqual([rank for rank, pid in ranks.items() if os.path.exists(f"/proc/{pid}")], [])
        self.assertEqual(metrics(name)[-1]["event"], "end")  # they were told to stop, and saved

    def test_not_finite(self):
        line = self.mistake(new_run(self.name(), "--gpus", 2, "--lr", 1e30), "not finite", "lr")
        self.assertNotIn("rank", line)


class StartTest(ParallelTest):
    def environment(self, rank, size, port, **more):
        return {**ENVIRONMENT, "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}

    def free_port(self):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return s.getsockname()[1]

    def test_started_by_another_launcher(self):
        reference, name, port = self.train_by(2), self.name(), self.free_port()
        processes = [subprocess.Popen([PROGRAM, *map(str, new_run(name))], cwd=program.folder, env=self.environment(rank, 2, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                     for rank in (0, 1)]
        results = [process.communicate(timeout=60) for process in processes]
        self.assertEqual([process.returncode for process in processes], [0, 0], results)
        self.assertIn("final checkpoint", results[0][0])
        self.assertEqual(results[1], ("", ""))
        self.assert_same_run(name, reference)

    def test_only_rank_0_needs_the_files(self):
        name, port, elsewhere = self.name(), self.free_port(), path(f"elsewhere-{self.rng.random()}")
        os.makedirs(elsewhere)
        for data in ("shards",):
            os.symlink(path(data), os.path.join(elsewhere, data))
        commands = [(program.folder, new_run(name)), (elsewhere, ("--config", "nothing"))]
        processes = [subprocess.Popen([PROGRAM, *map(str, arguments)], cwd=folder, env=self.environment(rank, 2, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                     for rank, (folder, arguments) in enumerate(commands)]
        results = [process.communicate(timeout=60) for process in processes]
        self.assertEqual([process.returncode for process in processes], [0, 0], results)
        self.assertEqual(os.listdir(elsewhere), ["shards"])

    def test_other_data_on_another_machine(self):
        name, port, elsewhere = self.name(), self.free_port(), path(f"other-data-{self.rng.random()}")
        os.makedirs(elsewhere)
        with open(path("text.txt")) as f, open(os.path.join(elsewhere, "text.txt"), "w") as shorter:
            shorter.write(f.read()[:10000])
        tokenize = [sys.executable, os.path.join(program.ROOT, "data", "tokenize.py"), "text.txt", "--tokenizer", "bytes", "--val-fraction", "0.1", "--quiet", "--out", "shards"]
        subprocess.run(tokenize, cwd=elsewhere, check=True, stdout=subprocess.DEVNULL)
        processes = [subprocess.Popen([PROGRAM, *map(str, new_run(name))], cwd=folder, env=self.environment(rank, 2, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                     for rank, folder in enumerate((program.folder, elsewhere))]
        results = [process.communicate(timeout=60) for process in processes]
        self.assertEqual([process.returncode for process in processes], [2, 2], results)
        self.assertRegex(results[0][1], r"^train_loqt: data\.train, data\.val: rank 1 finds \d+ training tokens[^\n]*\n$")
        self.assertFalse(os.path.exists(path(name)))

    def test_remark_on_the_config_file_is_made_once(self):
        name = self.train_by(2)
        with open(path("other.json"), "w") as f:
            json.dump({**program.CONFIG, "eval": {"every": 4}}, f)
        errors = self.succeed("--config", "other.json", "--resume", "--run.dir", name).stderr
        self.assertEqual(len(errors.splitlines()), 1, errors)
        self.assertIn("other.json", errors)

    def test_mistakes(self):
        self.mistake(new_run(self.name(), "--gpus", 2, "--batch", 3), "train.batch", "3", "2")
        self.mistake(new_run(self.name(), "--gpus", -1), "run.gpus")
        self.mistake(new_run(self.name(), "--gpus", 2, "--micro_batch", 4), "train.micro_batch", "2 sequences")
        self.mistake(new_run(self.name(), "--gpus", 2, "--data.train", "nowhere"), "nowhere")
        self.mistake(new_run(self.name(), "--gpus", 2, "--device", "cuda:1"), "run.gpus", "cuda:1")
        self.mistake(new_run(self.name(), "--gpus", 2, "--device", "cuda:1", "--plan"), "run.gpus", "cuda:1")
        existing = self.train_by(2)
        self.mistake(new_run(existing, "--gpus", 2), "already holds a run")

    def test_another_launcher_decides_how_many(self):
        port = self.free_port()
        processes = [subprocess.Popen([PROGRAM, *map(str, new_run(self.name(), "--gpus", 4))], cwd=program.folder, env=self.environment(rank, 2, port), stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
        errors = [process.communicate(timeout=60)[1] for process in processes]
        self.assertEqual([process.returncode for process in processes], [2, 2])
        self.assertRegex(errors[0], r"^train_loqt: run\.gpus: 4, but torchrun has started 2 processes; leave it out\n$")
        self.assertEqual(errors[1], "")

    def test_missing_rank(self):
        line = self.mistake(new_run(self.name(), "--comm-timeout", 1.5), "rank 1", environment=self.environment(0, 2, self.free_port()))
        self.assertNotIn("\n", line)

    def test_plan(self):
        output = program.program("--config", "60m", "--plan", "--gpus", 4, "--memory-budget", "24GiB").stdout
        self.assertIn("each of 4 GPUs", output)
        self.assertIn("batch 512 = 4 × ", output)


if __name__ == "__main__":
    unittest.main()
