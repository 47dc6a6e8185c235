"""scripts/sweep.py: sweep files, and whole sweeps of tiny runs, killed, interrupted, failing and continued."""
import csv
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import unittest

import program
from program import DEVICE, ENVIRONMENT, ROOT, path, series, steps

sys.path.insert(0, os.path.join(ROOT, "scripts"))
import sweep as sweep_script  # noqa: E402
import sweep_file  # noqa: E402

SWEEP = os.path.join(ROOT, "scripts", "sweep.py")
KEYS = {"train.seed": "train.seed", "seed": "train.seed", "optimizer.lr": "optimizer.lr", "lr": "optimizer.lr", "method.name": "method.name", "method": "method.name",
        "method.scale": "method.scale", "scale": "method.scale", "eval.every": "eval.every", "checkpoint.every": "checkpoint.every", "data.val": "data.val", "val": "data.val",
        "method.double_quant": "method.double_quant", "double_quant": "method.double_quant", "run.dir": "run.dir", "dir": "run.dir"}
setUpModule = program.setUpModule


def write_sweep(file_name, /, **fields):
    with open(path(file_name + ".json"), "w") as file:
        json.dump({"config": "config.json", **fields}, file)
    return file_name + ".json"


def start(file, *arguments):
    return subprocess.Popen([sys.executable, SWEEP, "--devices", DEVICE, file, *arguments], cwd=program.folder, env=ENVIRONMENT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def sweep(file, *arguments):
    """(output, exit status)"""
    process = start(file, *arguments)
    return process.communicate(timeout=300)[0], process.returncode


def wait_until(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.02)


def count(run, event):
    return len(steps(run, event)) if os.path.exists(path(run, "metrics.jsonl")) else 0


class FileTest(unittest.TestCase):
    def expand(self, arguments=(), **fields):
        return sweep_file.Sweep(path(write_sweep("file", **fields)), KEYS, arguments)

    def mistake(self, *words, arguments=(), **fields):
        with self.assertRaises(sweep_file.Mistake) as caught:
            self.expand(arguments, **fields)
        text = str(caught.exception)
        for word in ("file.json", *words):
            self.assertIn(word, text)
        self.assertNotIn("\n", text)

    def test_grid(self):
        runs = self.expand(grid={"lr": [0.01, 1e-5], "method.scale": [0.5, 0.25]}, seeds=[1, 2], options={"eval.every": 7, "double_quant": False}).runs
        self.assertEqual([r.name for r in runs], [f"lr-{lr}_scale-{s}_seed-{seed}" for lr in ("0.01", "1e-05") for s in ("0.5", "0.25") for seed in (1, 2)])
        self.assertEqual(runs[1].group, "lr-0.01_scale-0.5")
        self.assertEqual(runs[7].options, {"optimizer.lr": "1e-05", "method.scale": "0.25", "train.seed": "2", "eval.every": "7", "method.double_quant": "false"})

    def test_list(self):
        runs = self.expand(runs=[{"name": "plain", "method": "full"}, {"method": "loqt", "comment": "as in the paper", "grid": {"lr": [1, 2]}}], options={"lr": 5}).runs
        self.assertEqual([(r.name, r.group, r.options) for r in runs], [
            ("plain", "plain", {"optimizer.lr": "5", "method.name": "full"}),
            *((f"method-loqt_lr-{lr}",) * 2 + ({"optimizer.lr": str(lr), "method.name": "loqt"},) for lr in (1, 2))])

    def test_list_and_grid(self):
        runs = self.expand(runs=[{"name": "a", "method": "full"}, {"name": "b", "grid": {"scale": [3]}}], grid={"lr": [1, 2]}, seeds=[4]).runs
        self.assertEqual([r.name for r in runs], ["a_lr-1_seed-4", "a_lr-2_seed-4", "b_lr-1_scale-3_seed-4", "b_lr-2_scale-3_seed-4"])

    def test_own_seeds(self):
        runs = self.expand(runs=[{"name": "a", "seeds": [5, 6]}, {"name": "b"}], seeds=[4]).runs
        self.assertEqual([(r.name, r.options.get("train.seed"), r.turn) for r in runs], [("a_seed-5", "5", 0), ("a_seed-6", "6", 1), ("b_seed-4", "4", 0)])
        runs = self.expand(runs=[{"name": "a", "seeds": [5]}, {"name": "b"}]).runs
        self.assertEqual([(r.name, r.group, r.turn) for r in runs], [("a_seed-5", "a", 0), ("b", "b", 0)])

    def test_names_are_safe(self):
        self.assertEqual([r.name for r in self.expand(grid={"val": ["../a b/c"]}, seeds=[1]).runs], ["val-..-a-b-c_seed-1"])
        self.assertEqual([(r.name, r.group) for r in self.expand(name="s", seeds=[3]).runs], [("seed-3", "s")])

    def test_overrides(self):
        runs = self.expand(["lr=0.5", "--eval.every", "3", "--val=x=y"], seeds=[1], options={"lr": 1}).runs
        self.assertEqual(runs[0].options, {"optimizer.lr": "0.5", "eval.every": "3", "data.val": "x=y", "train.seed": "1"})

    def test_mistakes(self):
        self.mistake("unknown field \"grids\"", "\"grid\"", grids={"lr": [1]})
        self.mistake("no runs")
        self.mistake("config", config="", seeds=[1])
        self.mistake("two runs are called a", runs=[{"name": "a"}, {"name": "a", "lr": 1}])
        self.mistake("two runs are called lr-1", grid={"lr": [1, 1]})
        self.mistake("two runs are called seed-1", seeds=[1, 1])
        self.mistake("\"lrr\"", "\"lr\"", "grid", grid={"lrr": [1]})
        self.mistake("every", "ambiguous", "eval.every", "checkpoint.every", options={"every": 1}, seeds=[1])
        self.mistake("run.dir", options={"dir": "x"}, seeds=[1])
        self.mistake("list of values", grid={"lr": 0.1})
        self.mistake("list of values", grid={"lr": []})
        self.mistake("expected a number", grid={"lr": [[1]]})
        self.mistake("lr", "null", runs=[{"name": "a", "lr": None}])
        self.mistake("optimizer.lr is given twice", options={"lr": 1, "optimizer.lr": 2}, seeds=[1])
        self.mistake("both grids", grid={"lr": [1]}, runs=[{"name": "a", "grid": {"lr": [2]}}])
        self.mistake("run 1 (a)", "beside a grid", runs=[{"name": "a", "lr": 1, "grid": {"lr": [2]}}])
        self.mistake("beside \"seeds\"", seeds=[1], options={"seed": 1})
        self.mistake("beside \"seeds\"", seeds=[1], grid={"seed": [1]})
        self.mistake("seeds", seeds=["1"])
        self.mistake("run 1 (a), seeds", runs=[{"name": "a", "seeds": 1}])
        self.mistake("beside \"seeds\"", runs=[{"name": "a", "seeds": [1], "seed": 2}])
        self.mistake("keep: got \"nothing\", expected one of checkpoints, metrics", keep="nothing", seeds=[1])
        self.mistake("the sweep cannot be called \"../x\"", name="../x", seeds=[1])
        self.mistake("cannot be called \"x.log\"", runs=[{"name": "x.log"}])
        self.mistake("cannot be called \"..\"", runs=[{"name": ".."}])
        self.mistake("runs", runs=[])
        self.mistake("differs from run to run", grid={"lr": [1]}, arguments=["lr=3"])
        self.mistake("after --", "KEY=VALUE", seeds=[1], arguments=["lr"])
        self.mistake("reference", "\"full\"", "lr-1", grid={"lr": [1]}, reference="full")
        for text, word in (("{\"config\": \"tiny\", \"seeds\": [1], \"seeds\": [2]}", "twice"), ("{", "JSON"), ("[]", "object"), ("{\"seeds\": [1]}", "no \"config\""),
                           ("{\"config\": \"tiny\", \"grid\": {\"lr\": [NaN]}}", "NaN")):
            with open(path("file.json"), "w") as file:
                file.write(text)
            with self.assertRaisesRegex(sweep_file.Mistake, word):
                sweep_file.Sweep(path("file.json"), KEYS)

    def test_files_of_the_repository(self):
        """Every run of every file in sweeps/ is one that the program plans."""
        keys, plans = sweep_file.known_keys(program.PROGRAM), {}
        files = [os.path.join(folder, name) for folder, _, names in os.walk(os.path.join(ROOT, "sweeps")) for name in names if name.endswith(".json")]
        self.assertTrue(files)
        for file in files:
            parsed = sweep_file.Sweep(file, keys)
            for run in parsed.runs:
                with self.subTest(file=file, run=run.name):
                    options = tuple(f"--{key}={value}" for key, value in run.options.items() if key != "train.seed")
                    if (parsed.config, options) not in plans:
                        plans[parsed.config, options] = program.program("--config", parsed.config, *options, "--plan", "--run.device", "cuda", "--memory_budget", "80GiB")
                    result = plans[parsed.config, options]
                    self.assertEqual(result.returncode, 0, result.stderr)


    def test_same_memory(self):
        """What memory.json says of both sizes: nearly the same for weights, gradients and moments, and never less for full."""
        keys = sweep_file.known_keys(program.PROGRAM)

        def needed(config, options):
            result = program.program("--config", config, *(f"--{key}={value}" for key, value in options.items()), "--plan", "--json", "--run.device", "cuda", "--micro_batch", 64,
                                     "--memory_budget", "80GiB")
            plan = json.loads(result.stdout)
            return plan["weights_and_optimizer_bytes"] + plan["gradients_bytes"]
        for name in ("memory.json", "reduced/memory.json"):
            parsed = sweep_file.Sweep(os.path.join(ROOT, "sweeps", name), keys)
            options = {run.group: run.options for run in parsed.runs}
            for other, method in (("loqt_in-fulls-memory", "full"), ("full_in-loqts-memory", "loqt")):
                share = needed(parsed.config, options[other]) / needed(parsed.config, {"method.name": method})
                self.assertTrue(0.97 < share <= 1 if method == "full" else 1 <= share < 1.03, f"{name}: {other} {share}")


class SweepTest(unittest.TestCase):
    def test_killed_and_continued(self):
        file, out = write_sweep("killed", grid={"lr": [0.01, 0.005]}, seeds=[1, 2], options={"steps": 150, "checkpoint.every": 10, "eval.every": 50}, reference="lr-0.01"), "killed"
        names = [f"lr-{lr}_seed-{seed}" for lr in ("0.01", "0.005") for seed in (1, 2)]
        runs = [os.path.join(out, name) for name in names]
        process = start(file, "--out", out)
        wait_until(process, lambda: count(runs[1], "checkpoint") > 0)
        process.kill()
        process.communicate()
        self.assertEqual(count(runs[0], "end"), 1)
        text, status = sweep(file, "--out", out)
        self.assertEqual(status, 0, text)
        self.assertEqual([count(run, "start") for run in runs], [1] * 4)
        self.assertEqual([count(run, "resume") for run in runs], [0, 1, 0, 0], text)  # the finished one was left alone
        # The killed run is what it would have been.
        self.assertEqual(program.program(*program.new_run("alone", "--lr", 0.01, "--seed", 2, "--steps", 150, "--eval.every", 50)).returncode, 0)
        self.assertEqual(series(runs[1]), series("alone"))
        for name, run in zip(names, runs):
            self.assertIn(f"{name}: done: validation perplexity {float(series(run, 'eval', 'perplexity')[150]):.2f}", text)
        with open(path(out, "report.csv"), newline="") as f:
            rows = list(csv.DictReader(f))
        self.assertEqual([(r["run"], r["seeds"], r["step"], r["method"]) for r in rows], [("lr-0.01", "2", "150", "loqt"), ("lr-0.005", "2", "150", "loqt")])
        finals = [math.exp(float(series(run, "eval")[150])) for run in runs]
        for row, (a, b) in zip(rows, (finals[:2], finals[2:])):
            self.assertAlmostEqual(float(row["perplexity"]), (a + b) / 2, places=9)
            self.assertAlmostEqual(float(row["perplexity_error"]), abs(a - b) / 2, places=9)  # |a − b|/√2 over √2
        self.assertAlmostEqual(float(rows[1]["ratio"]), (finals[2] + finals[3]) / (finals[0] + finals[1]), places=9)
        self.assertIn("| lr-0.005 |", program.read_text(out, "report.md"))
        # Once more: nothing is left to do. With other options: refused run by run, but for what changes no result.
        before, members = [program.read_text(run, "metrics.jsonl") for run in runs], program.read_text(out, "sweep.json")
        self.assertEqual(sweep(file, "--out", out, "--", "checkpoint.every=5")[1], 0)
        text, status = sweep(write_sweep("killed", grid={"lr": [0.01, 0.005]}, seeds=[1, 2], options={"steps": 150, "checkpoint.every": 10, "eval.every": 50, "beta2": 0.9}), "--out", out)
        self.assertEqual(status, 1)
        self.assertEqual(program.read_text(out, "sweep.json"), members)
        self.assertNotIn("report.md", text)
        self.assertEqual(len(re.findall(r"refused: made with optimizer.beta2 as the configuration has it, now 0.9; remove killed/lr-[\w.-]+ to", text)), 4, text)
        self.assertEqual(before, [program.read_text(run, "metrics.jsonl") for run in runs])

    def test_failed_run(self):
        file = write_sweep("failing", runs=[{"name": "bad", "lr": 1e30}, {"name": "no-data", "data.train": "empty"}, {"name": "good"}], options={"steps": 5, "data.val": ""})
        os.makedirs(path("empty"), exist_ok=True)
        for attempt in (1, 2):
            text, status = sweep(file, "--out", "failing", "--jobs", "2" if DEVICE == "cpu" else "1")
            self.assertEqual(status, 1, text)
            self.assertRegex(text, r"bad: failed: train_loqt: .*not finite.*failing/bad\.log")
            self.assertRegex(text, r"no-data: failed: train_loqt: .*empty")
            self.assertIn("good: done", text)
            self.assertEqual((count("failing/good", "start"), count("failing/good", "resume")), (1, 0))
            self.assertEqual(program.read_text("failing", "bad.log").count("--- "), attempt)
        self.assertEqual(count("failing/bad", "resume"), 1)

    def test_interrupted(self):
        file = write_sweep("interrupted", seeds=[1, 2], options={"steps": 150, "checkpoint.every": 0})
        process = start(file, "--out", "interrupted")
        wait_until(process, lambda: count("interrupted/seed-1", "train") > 3)
        text, status = sweep(file, "--out", "interrupted")
        self.assertEqual((status, text), (2, "sweep.py: interrupted is in use by another sweep.py\n"))
        process.send_signal(signal.SIGINT)
        text = process.communicate(timeout=60)[0]
        self.assertEqual(process.returncode, 130, text)
        self.assertIn("seed-1: stopped", text)
        self.assertEqual(count("interrupted/seed-1", "checkpoint"), 1)
        self.assertFalse(os.path.exists(path("interrupted", "seed-2")))
        text, status = sweep(file, "--out", "interrupted")
        self.assertEqual(status, 0, text)
        self.assertEqual([count("interrupted/seed-1", e) for e in ("start", "resume", "train")], [1, 1, 150])  # no step was lost

    def test_time_limit(self):
        """Nothing is begun that would not be done in time. What is finished is known by its metrics and configuration alone, elsewhere too."""
        file, out = write_sweep("limited", seeds=[1, 2], grid={"lr": [0.01, 0.005]}, options={"steps": 20}, keep="metrics"), "limited"
        text, status = sweep(file, "--out", out, "--time-limit", "9.5")  # a process is given ten seconds beside its training, once one has shown how long that takes
        self.assertEqual(status, 3, text)
        self.assertIn("lr-0.01_seed-1: done", text)
        self.assertIn("3 of 4 runs are left to do", text)
        self.assertIn("| lr-0.01 |", program.read_text(out, "report.md"))
        self.assertEqual(sorted(name for name in os.listdir(path(out)) if os.path.isdir(path(out, name))), ["lr-0.01_seed-1"])
        self.assertEqual(sorted(os.listdir(path(out, "lr-0.01_seed-1"))), ["config.json", "metrics.jsonl"])
        for name in ("lr-0.01_seed-1/config.json", "lr-0.01_seed-1/metrics.jsonl", "lr-0.01_seed-1.json"):
            os.makedirs(os.path.dirname(path("elsewhere", name)), exist_ok=True)
            shutil.copy(path(out, name), path("elsewhere", name))
        text, status = sweep(file, "--out", "elsewhere", "--time-limit", "300")
        self.assertEqual(status, 0, text)
        self.assertNotIn("left to do", text)
        self.assertEqual([count(f"elsewhere/lr-{lr}_seed-{seed}", e) for lr in ("0.01", "0.005") for seed in (1, 2) for e in ("start", "resume", "train")], [1, 0, 20] * 4)
        begins = [json.loads(program.read_text(f"elsewhere/lr-{lr}_seed-{seed}", "metrics.jsonl").split("\n")[0])["time"] for seed in (1, 2) for lr in ("0.01", "0.005")]
        self.assertEqual(begins, sorted(begins))  # first seeds come first

    def test_time_is_up(self):
        """A run that takes longer than the limit saves and stops, and goes on next time; without its checkpoint it begins anew."""
        for carried in (True, False):
            out = f"late-{carried}"
            file = write_sweep(out, seeds=[1], options={"steps": 100000, "checkpoint.every": 0, "eval.every": 0}, keep="metrics")
            text, status = sweep(file, "--out", out, "--time-limit", "3")
            self.assertEqual(status, 3, text)
            self.assertIn("seed-1: stopped", text)
            self.assertIn("1 of 1 runs are left to do", text)
            done = count(f"{out}/seed-1", "train")
            self.assertTrue(0 < done < 100000)
            self.assertEqual(program.checkpoints(f"{out}/seed-1"), [f"step-{done:08d}.safetensors"])
            if not carried:
                shutil.rmtree(path(out, "seed-1", "checkpoints"))
            text, status = sweep(file, "--out", out, "--time-limit", "3")
            self.assertEqual(status, 3, text)
            self.assertEqual(steps(f"{out}/seed-1", "resume"), [done if carried else 0])
            self.assertGreater(count(f"{out}/seed-1", "train"), done)

    def test_expected_seconds(self):
        """By the slowest run that differs in nothing but what a step takes no longer for, else by the slowest."""
        with open(path("base.json"), "w") as file:
            json.dump({"train": {"steps": 1000}}, file)
        sweep_of = types.SimpleNamespace(keep="metrics", folder=path(), config="base.json", config_hash="", path=path("base.json"), defaults={})

        def run(speed=None, sweep=sweep_of, **options):
            planned = sweep_file.PlannedRun("run", "run", {key.replace("__", "."): value for key, value in options.items()}, 0)
            made = sweep_script.Run(planned, sweep, "run")
            made.seconds_per_step = speed
            return made
        runs = [run(0.1, method__rank="8", optimizer__lr="1"), run(0.2, method__rank="8", optimizer__lr="2"), run(0.5, method__rank="64"), run()]
        expected = sweep_script.expected_seconds
        self.assertAlmostEqual(expected(run(method__rank="8", optimizer__lr="3", train__steps="50"), runs), 20.0)
        self.assertAlmostEqual(expected(run(method__rank="16"), runs), 510.0)
        self.assertAlmostEqual(expected(run(sweep=types.SimpleNamespace(**{**vars(sweep_of), "config": "larger.json"}), method__rank="8"), runs), 510.0)
        self.assertEqual(expected(run(), [run()]), 0.0)

    def test_several_files(self):
        """Each into its own folder, in order."""
        files = [write_sweep(name, seeds=[1], options={"steps": 3}, keep="metrics") for name in ("one", "two")]
        text, status = sweep(*files)
        self.assertEqual(status, 0, text)
        begins = [json.loads(program.read_text("runs", name, "seed-1", "metrics.jsonl").split("\n")[0])["time"] for name in ("one", "two")]
        self.assertEqual(begins, sorted(begins))
        for name in ("one", "two"):
            self.assertIn(f"{name}/seed-1: done", text)
            self.assertIn(f"| {name} |", program.read_text("runs", name, "report.md"))
        for arguments, word in (((*files, "--out", "x"), "--out is for one file"), ((files[0], files[0]), "same folder"), ((files[0], "nowhere.json"), "nowhere.json")):
            text, status = sweep(*arguments)
            self.assertEqual((status, len(text.splitlines())), (2, 1), text)
            self.assertIn(word, text)

    def test_run_that_still_saves(self):
        """After a sweep was killed its last run may not have left yet: it is waited for, not failed."""
        os.makedirs(path("busy", "seed-1"))
        holder = os.open(path("busy", "seed-1"), os.O_RDONLY)
        fcntl.flock(holder, fcntl.LOCK_EX)
        process = start(write_sweep("busy", seeds=[1], options={"steps": 2}), "--out", "busy")
        self.assertIn("seed-1: another process", process.stdout.readline())
        os.close(holder)
        self.assertIn("seed-1: done", process.communicate(timeout=60)[0])
        self.assertEqual(process.returncode, 0)

    def test_second_interrupt_kills(self):
        """A stand-in for the program that cannot be stopped."""
        stubborn = path("stubborn")
        with open(stubborn, "w") as file:
            file.write(f"#!/bin/sh\ncase \"$*\" in *--help*|*--plan*) exec {program.PROGRAM} \"$@\";; esac\ntrap '' INT\ntouch {path('alive')}\nfor i in $(seq 200); do sleep 0.1; done\n")
        os.chmod(stubborn, 0o755)
        process = start(write_sweep("stubborn", seeds=[1]), "--out", "stubborn-runs", "--binary", stubborn)
        wait_until(process, lambda: os.path.exists(path("alive")))
        process.send_signal(signal.SIGINT)
        time.sleep(1.2)
        self.assertIsNone(process.poll())
        process.send_signal(signal.SIGTERM)
        self.assertIn("killed", process.communicate(timeout=20)[0])
        self.assertEqual(process.returncode, 130)

    def test_one_run_on_every_device(self):
        """A stand-in for the program that takes any device for a CPU, and leaves a note of when it ran."""
        fake, notes = path("fake"), path("notes")
        with open(fake, "w") as file:
            file.write(f"""#!{sys.executable}
import os, subprocess, sys
device, arguments = "", sys.argv[1:]
if "--run.device" in arguments:
    at = arguments.index("--run.device") + 1
    device, arguments[at] = arguments[at], "cpu"
note = "--plan" not in arguments and device
def say(word):
    if note:
        with open({notes!r}, "a") as file:
            file.write(word + " " + device + "\\n")
say("begin")
status = subprocess.run([{program.PROGRAM!r}, *arguments]).returncode
say("end")
sys.exit(status)
""")
        os.chmod(fake, 0o755)
        text, status = sweep(write_sweep("devices", seeds=[1, 2, 3, 4, 5], options={"steps": 3, "data.val": ""}), "--out", "devices", "--binary", fake, "--devices", "cuda:0,cuda:1")
        self.assertEqual(status, 0, text)
        busy, most, begun = set(), 0, []
        for word, device in (line.split() for line in program.read_text("notes").splitlines()):
            self.assertEqual(device in busy, word == "end", "two runs on one device")
            busy ^= {device}
            most, begun = max(most, len(busy)), begun + [device] * (word == "begin")
        self.assertEqual((most, len(begun), set(begun)), (2, 5, {"cuda:0", "cuda:1"}))
        text, status = sweep("devices.json", "--out", "devices", "--binary", fake, "--devices", "cuda:0", "--jobs", "2")
        self.assertEqual(status, 2)
        self.assertIn("run.memory_budget", text)

    def test_changed_configuration(self):
        with open(path("own.json"), "w") as file:
            json.dump(program.CONFIG, file)
        file = write_sweep("own-sweep", config="own.json", seeds=[1], options={"steps": 2})
        self.assertEqual(sweep(file, "--out", "own")[1], 0)
        with open(path("own", "seed-1", "config.json")) as f:
            made = json.load(f)
        for value, refused in ((made["optimizer"]["beta2"], False), (0.95, True)):  # as by a program with another default
            with open(path("own", "seed-1", "config.json"), "w") as f:
                json.dump({**made, "optimizer": {**made["optimizer"], "beta2": value}}, f)
            text, status = sweep(file, "--out", "own")
            self.assertEqual(status, int(refused), text)
            self.assertEqual("seed-1: refused: made with optimizer.beta2 0.95, the default then; now it is 0.999; remove own/seed-1 to make it again" in text, refused, text)
        # A run of relora from before method.relora_gap restarted by merge_gap, whatever the default is now.
        with open(path("before.json"), "w") as f:
            json.dump({**program.CONFIG, "method": {key: value for key, value in program.CONFIG["method"].items() if key != "relora_gap"}}, f)
        before = write_sweep("before-sweep", config="before.json", seeds=[1], options={"steps": 2, "method": "relora", "lr": 0.001})
        self.assertEqual(sweep(before, "--out", "before")[1], 0)
        with open(path("before", "seed-1", "config.json")) as f:
            made = json.load(f)
        del made["method"]["relora_gap"]
        with open(path("before", "seed-1", "config.json"), "w") as f:
            json.dump(made, f)
        self.assertIn("seed-1: refused: made with method.relora_gap 6, the default then; now it is 2000", sweep(before, "--out", "before")[0])
        # Where the configuration has comments its own settings cannot be told from defaults: nothing is refused for that.
        with open(path("commented.json"), "w") as f:
            f.write("// ours\n" + json.dumps({**program.CONFIG, "optimizer": {**program.CONFIG.get("optimizer", {}), "beta2": 0.9}}))
        commented = write_sweep("commented-sweep", config="commented.json", seeds=[1], options={"steps": 2})
        self.assertEqual([sweep(commented, "--out", "commented")[1] for _ in range(2)], [0, 0])
        with open(path("own.json"), "w") as f:
            json.dump({**program.CONFIG, "optimizer": {"lr": 0.02}}, f)
        text, status = sweep(file, "--out", "own")
        self.assertEqual(status, 1)
        self.assertIn("seed-1: refused: made with another own.json; remove own/seed-1", text)
        os.rename(path("own", "seed-1.json"), path("own", "elsewhere"))
        self.assertIn("seed-1: refused: own/seed-1 holds a run that this sweep did not begin", sweep(file, "--out", "own")[0])
        text, status = sweep(file, "--out", "own/seed-1")
        self.assertEqual((status, text), (2, "sweep.py: own/seed-1 holds a run, not a sweep; choose another --out\n"))

    def test_mistakes_start_nothing(self):
        for fields, words in (({"runs": [{"name": "a"}, {"name": "b", "method": "lqot"}]}, ("b: ", "method.name", "lqot")),
                              ({"grid": {"rank": [100000]}}, ("rank-100000: ", "method.rank")),
                              ({"seeds": [1], "options": {"memory_budget": "1MiB"}}, ("seed-1: ", "does not fit")),
                              ({"seeds": [1], "options": {"data.val": "no*where"}}, ("seed-1: ", "data.val", "no*where")),
                              ({"seeds": [1], "config": "nothing"}, ("nothing",))):
            text, status = sweep(write_sweep("wrong", **fields), "--out", "wrong")
            self.assertEqual((status, len(text.splitlines())), (2, 1), text)
            for word in ("sweep.py: ", *words):
                self.assertIn(word, text)
        text, status = sweep(write_sweep("wrong", grid={"rank": [8, 16]}), "--out", "wrong", "--dry-run")
        self.assertEqual((status, len(re.findall(r"^rank-(?:8|16): 0\.\d\d GiB, ", text, re.M))), (0, 2), text)
        self.assertFalse(os.path.exists(path("wrong")))


if __name__ == "__main__":
    unittest.main()
