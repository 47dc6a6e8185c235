"""bench/scaling.py: figures and rows on made-up events, whole tables and killed ranks on a stand-in for train_loqt, and all of it on the program itself."""
import contextlib
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.join(ROOT, "bench"), os.path.join(ROOT, "scripts")]
import measure  # noqa: E402
import scaling  # noqa: E402

GIB = 2**30
PROGRAM = os.path.join(ROOT, "train_loqt")
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")

PLAN = {"model": {"vocab": 50}, "seq_len": 16, "choices": {"train.recompute": {"value": "light", "auto": True}}}

# A train_loqt that is two processes under a launcher, trains by waiting, and resumes. A step of 8 sequences on one GPU takes 80 ms, communication 2 ms, a merge 100 ms on one GPU
# and 50 on two, by its metrics. The learning rate is what is wrong with it.
STAND_IN = """#!{python}
import json, os, subprocess, sys, time
folder = sys.argv[sys.argv.index("--run.dir") + 1] if "--run.dir" in sys.argv else None
resume = "--resume" in sys.argv
stored = os.path.join(folder, "config.json") if folder else ""
arguments = json.load(open(stored)) if resume else dict(zip(sys.argv[1:], sys.argv[2:]))
gpus, steps, gap, batch = (int(arguments.get(key, usual)) for key, usual in (("--run.gpus", 1), ("--train.steps", 24), ("--method.merge_gap", 8), ("--train.batch", 8)))
every, wrong = int(arguments["--checkpoint.every"]), arguments["--optimizer.lr"]
if "--plan" in sys.argv:
    print(json.dumps(dict(json.loads('''{plan}'''), batch=batch, tokens_per_micro_batch=batch // 2 * 16)))
    sys.exit()
if wrong == "no second GPU" and gpus > 1:
    sys.exit("train_loqt: run.gpus: 2 GPUs wanted, 1 are visible here")
if "RANK" in os.environ:
    time.sleep(60)
    sys.exit()
if not resume:
    os.makedirs(os.path.join(folder, "checkpoints"))
    json.dump(arguments, open(stored, "w"))
saved = sorted(os.listdir(os.path.join(folder, "checkpoints")))
ranks = [subprocess.Popen([sys.executable, *sys.argv], env=dict(os.environ, RANK=str(r))) for r in range(gpus)] if gpus > 1 else []
with open(os.path.join(folder, "metrics.jsonl"), "a") as file:
    def write(event, **fields):
        file.write(json.dumps(dict(event=event, time=time.time(), **fields), separators=(",", ":")) + "\\n")
        file.flush()
    def save(step):
        with open(os.path.join(folder, "checkpoints", f"step-{{step:08d}}.safetensors"), "w") as checkpoint:
            checkpoint.write(f"weights of step {{step}} {{json.dumps(arguments)}}" + (" resumed" if wrong == "other weights" and resume else ""))
        write("checkpoint", step=step, seconds=0.1)
    write("resume" if resume else "start", step=0, device="stand-in", gpus=gpus, micro_batch=int(arguments["--train.micro_batch"]), planned_bytes=1)
    for step in range(int(saved[-1][5:13]) if saved else 0, steps):
        if wrong == "fails" and gpus > 1 and step == 3:
            for r in ranks: r.kill()
            sys.exit("train_loqt: something broke: try another")
        dead = [i for i, r in enumerate(ranks) if r.poll() is not None]
        if dead:
            if wrong == "hangs":
                time.sleep(60)
            for r in ranks: r.kill(), r.wait()
            sys.exit("" if wrong == "says nothing" else f"train_loqt: rank {{dead[0]}} was killed in the sum of gradients; --resume continues from the last checkpoint")
        merge = step % gap == 0 and (step == 0 or step + gap < steps)
        if merge:
            write("merge", step=step, seconds=0.1 / gpus, failed=0, quant_error=0.25)
        time.sleep(0.01 if every else 0)
        loss = 5 - step / 64 + (gpus - 1) / 1024 * (step == 9) + (wrong == "other losses" and resume)
        write("train", step=step + 1, loss=loss, grad_norm=1.0, step_ms=10.0 * batch / gpus + (2 if gpus > 1 else 0) + 120 / gpus * merge, memory_bytes=6 << 30)
        if every and (step + 1) % every == 0:
            save(step + 1)
    if not every or steps % every:
        save(steps)
for r in ranks: r.kill(), r.wait()
"""


def events(step_ms, merges=(0, 6, 12), seconds=1.0, losses=None, gpus=1):
    """Events as read_events gives them, of a run of 24 steps. seconds: that a merge adds to its step."""
    losses = losses or [5 - i / 10 for i in range(24)]
    return {"start": [{"step": 0, "device": "H200", "gpus": gpus, "micro_batch": 64}],
            "train": [{"step": i + 1, "loss": loss, "step_ms": step_ms + (1000 * seconds if i in merges else 0) + (1000 if i < 3 else 0), "memory_bytes": 7 * GIB} for i, loss in enumerate(losses)],
            "merge": [{"step": u, "seconds": 0.01, "failed": 0} for u in merges], "checkpoint": [{"step": 24, "seconds": 2.0}]}


def run(found, peaks=(), **more):
    return {**scaling.figures(found), "driver_peaks": list(peaks), "driver_left": [0] * len(peaks), "error": None, **more}


def entry(**more):
    return {"preset": "1b", "gpus": 2, "device": "cuda", "batch": 512, "tokens": 131072, **more}


def by_figure(rows):
    return {r["figure"]: r for r in rows}


def cells(text):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(rows[0], row)) for row in rows[2:]]


class Figures(unittest.TestCase):
    def test_plain_steps(self):
        """Neither the first three, nor lines with a merge or just after an evaluation or a checkpoint."""
        found = events(100.0)
        found["train"] = [dict(e, step_ms=float(e["step"])) for e in found["train"]]
        found["eval"], found["checkpoint"] = [{"step": 9}], [{"step": 10}, {"step": 24}]
        self.assertEqual(scaling.plain_steps(found), [4, 5, 6, 8, 9, 12, *range(14, 25)])
        self.assertEqual(scaling.plain_steps({}), [])

    def test_figures(self):
        f = scaling.figures(events(100.0))
        self.assertEqual((f["step_ms"], len(f["plain_ms"]), f["gpus"], f["micro_batch"], f["program_peak_bytes"]), (100.0, 19, 1, 64, 7 * GIB))
        self.assertEqual([m["added_seconds"] for m in f["merges"]], [2, 1, 1])
        self.assertEqual(scaling.later_merges(f), 1)
        nothing = scaling.figures({})
        self.assertEqual((nothing["step_ms"], nothing["merges"], scaling.later_merges(nothing)), (None, [], None))

    def test_weak(self):
        """Twice the work in 102 ms in place of 100."""
        rows = by_figure(scaling.weak_rows(entry(), run(events(102.0, seconds=0.55, gpus=2), [30.6 * GIB, 30 * GIB]), run(events(100.0), [30 * GIB])))
        speed = rows["tokens/s, equal work per GPU"]
        self.assertEqual([speed[key] for key in ("one", "many", "result", "wanted")], ["655,360", "1,285,020", "1.961", "≥ 1.95"])
        hidden = rows["communication not hidden, of a step"]
        self.assertEqual((hidden["many"], hidden["wanted"]), ("2.0 %", "≤ 3 %"))
        merge = rows["exact merge, s"]
        self.assertEqual([merge[key] for key in ("one", "many", "result", "wanted")], ["1.000", "0.550", "0.550", "-"])
        memory = rows["peak memory per GPU, GiB"]
        self.assertEqual([memory[key] for key in ("one", "many", "result", "wanted")], ["30.00", "30.60, 30.00", "1.020", "≤ 1.03"])
        self.assertFalse(any(r["failed"] for r in rows.values()), rows)

    def test_missed(self):
        slow = run(events(104.0, seconds=0.7), [31 * GIB, 30 * GIB])
        rows = scaling.weak_rows(entry(), slow, run(events(100.0), [30 * GIB]))
        self.assertEqual([r["figure"] for r in rows if r["failed"]], ["tokens/s, equal work per GPU", "communication not hidden, of a step", "peak memory per GPU, GiB"])
        self.assertTrue(all(r["note"].startswith("missed") for r in rows if r["failed"]))
        # 60m is to reach 1.90 only; nothing is said of four GPUs' throughput, and nothing of a CPU.
        self.assertEqual([r["figure"] for r in scaling.weak_rows(entry(preset="60m"), slow, run(events(100.0), [30 * GIB])) if r["failed"]], ["peak memory per GPU, GiB"])
        four = by_figure(scaling.weak_rows(entry(gpus=4), slow, run(events(100.0), [30 * GIB])))
        self.assertEqual((four["tokens/s, equal work per GPU"]["result"], four["tokens/s, equal work per GPU"]["wanted"]), ("3.846", "-"))
        self.assertFalse(any(r["failed"] for r in scaling.weak_rows(entry(device="cpu"), slow, run(events(100.0)))))

    def test_above_the_plan(self):
        one, many = (run(events(100.0), [peak], planned_bytes=8 * GIB) for peak in (8 * GIB, 8 * GIB + 2**25))
        memory = by_figure(scaling.weak_rows(entry(), many, one))["peak memory per GPU, GiB"]
        self.assertEqual((memory["result"], memory["note"], memory["failed"]), ("1.004", "32 MiB above the plan", True))
        self.assertFalse(by_figure(scaling.weak_rows(entry(), one, one))["peak memory per GPU, GiB"]["failed"])

    def test_other_programs(self):
        rows = by_figure(scaling.weak_rows(entry(), run(events(102.0), [GIB, GIB], driver_left=[0, 2**27]), run(events(100.0), [GIB])))
        self.assertIn("+128 MiB by other programs", rows["peak memory per GPU, GiB"]["note"])

    def test_strong(self):
        losses = [5 - i / 10 for i in range(24)]
        other = list(losses)
        other[3] += 0.24
        other[7] -= 0.48
        rows = by_figure(scaling.strong_rows(entry(), run(events(100.0, seconds=0.6, losses=other)), run(events(198.0, losses=losses))))
        self.assertEqual(rows["tokens/s, same batch"]["result"], "1.980")
        merge = rows["exact merge, same batch, s"]
        self.assertEqual((merge["result"], merge["wanted"], merge["failed"]), ("0.600", "≤ 0.60", False))
        slow = by_figure(scaling.strong_rows(entry(), run(events(100.0, seconds=0.61)), run(events(198.0))))["exact merge, same batch, s"]
        self.assertEqual((slow["note"], slow["failed"]), ("missed", True))
        loss = rows["loss, same batch"]
        self.assertEqual((loss["one"], loss["many"], loss["result"], loss["note"]), ("2.7000", "2.7000", "-0.01000 on average, 0.48000 at most", "over 24 steps; most at step 8"))
        other[7] = None  # not finite
        self.assertEqual(scaling.difference(run(events(1.0, losses=losses)), run(events(1.0, losses=other)))["step"], 4)

    def test_nothing_happened(self):
        for part in scaling.PARTS:
            nothing = entry(runs={name: run({}) for name in scaling.RUNS})
            self.assertTrue(scaling.rows_of(nothing, part))
            nothing["runs"][scaling.PARTS[part][1]]["error"] = "it broke"
            (r,) = scaling.rows_of(nothing, part)
            self.assertEqual((r["figure"], r["failed"], r["note"]), (part, True, f"{scaling.PARTS[part][1]}: it broke"))

    def test_complaints(self):
        message = "train_loqt: rank 1 was killed"
        self.assertEqual(scaling.complaints(1, 2.0, 30, [message]), [])
        for words, found in (("did not end", (1, None, 30, [message])), ("ended late", (1, 31.0, 30, [message])), ("2 lines on stderr", (1, 2.0, 30, [message, "more"])),
                             ("no message names rank 0", (0, 2.0, 30, [message])), ("no message names rank 1", (1, 2.0, 30, ["train_loqt: rank 11 was killed"]))):
            self.assertEqual(scaling.complaints(*found), [words])


class Processes(unittest.TestCase):
    def test_ranks(self):
        """Children with a rank in their environment, and none that have ended."""
        with subprocess.Popen([sys.executable, "-c", "import os, subprocess, sys, time\n"
                               "c = [subprocess.Popen(['sleep', '60'], env=dict(os.environ, **e)) for e in ({'RANK': '0'}, {'RANK': '1'}, {'NO_RANK': '2'})]\nprint('there', flush=True)\ntime.sleep(60)"],
                              stdout=subprocess.PIPE) as parent:
            try:
                parent.stdout.readline()
                found = measure.ranks_of(parent.pid)
                self.assertEqual(sorted(found), [0, 1])
                self.assertTrue(measure.alive(found[1]))
                measure.kill([found[1]])
                time.sleep(0.1)
                self.assertFalse(measure.alive(found[1]))  # though its parent has not waited for it
                self.assertEqual(measure.ranks_of(parent.pid), {0: found[0]})
            finally:
                subprocess.run(["sh", "-c", f"kill $(cat /proc/{parent.pid}/task/*/children)"])
                measure.kill_all(parent)
        self.assertEqual(measure.ranks_of(2**30), {})


class Bench(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder, self.out = folder.name, os.path.join(folder.name, "sub", "scaling.json")
        self.stand_in = os.path.join(self.folder, "train_loqt")
        with open(self.stand_in, "w", encoding="utf-8") as file:
            file.write(STAND_IN.format(python=sys.executable, plan=json.dumps(PLAN)))
        os.chmod(self.stand_in, os.stat(self.stand_in).st_mode | stat.S_IXUSR)

    def bench(self, *arguments, binary=None, status=0):
        """(rows, presets of the JSON if any) of bench/scaling.py."""
        command = [sys.executable, os.path.join(ROOT, "bench", "scaling.py"), "--device", "cpu", "--binary", binary or self.stand_in, "--out", self.out, *arguments]
        done = subprocess.run(command, cwd=self.folder, env=dict(ENVIRONMENT, TMPDIR=self.folder), capture_output=True, text=True, timeout=300)
        self.stdout, self.stderr = done.stdout, done.stderr
        if binary and (reason := re.search(r"run\.gpus: (.*)", done.stderr)):
            self.skipTest(f"runs by several processes: {reason[1]}")
        self.assertEqual(done.returncode, status, done.stdout + done.stderr)
        written = []
        if os.path.exists(self.out):
            with open(self.out, encoding="utf-8") as file:
                written = json.load(file)["presets"]
        return cells(done.stdout), written

    def processes(self):
        """Those that run something in the test's folder."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
                if self.folder.encode() in file.read():
                    found.append(pid)
        return found

    def test_table(self):
        rows, (found,) = self.bench("--presets", "60m")
        first, shown = {r["figure"]: r for r in rows}, self.stdout
        self.assertEqual([first["step, ms"][key] for key in ("preset", "1 process", "2 processes", "2 ÷ 1")], ["60m", "40.0", "42.0", "1.050"])
        self.assertEqual(first["tokens/s, equal work per GPU"]["2 ÷ 1"], f"{80 / 42:.3f}")
        self.assertEqual(first["communication not hidden, of a step"]["2 processes"], f"{200 / 42:.1f} %")
        self.assertEqual(first["tokens/s, same batch"]["2 ÷ 1"], f"{80 / 42:.3f}")
        self.assertEqual([first[f"{kind} merge, s"]["2 ÷ 1"] for kind in ("exact", "fast")], ["0.500", "0.500"])
        self.assertEqual(first["exact merge, s"]["1 process"], "0.120")
        self.assertEqual(first["loss, same batch"]["2 ÷ 1"], "+0.00004 on average, 0.00098 at most")
        # The same micro-batch and choices in all runs: those planned for one GPU with its share.
        self.assertEqual({(r["micro_batch"], "--train.recompute light" in r["command"]) for r in found["runs"].values()}, {(2, True)})
        self.assertEqual([len(r["losses"]) for r in found["runs"].values()], [24, 24, 24, 8, 8])
        self.assertTrue(all(len([m for m in r["merges"] if m["step"]]) == 2 for r in found["runs"].values()))
        self.assertEqual([n for n in os.listdir(self.folder) if n.startswith("train_loqt-")], [])
        self.bench("--show", self.out)
        self.assertEqual(self.stdout, shown)

    def test_failures_do_not_end_the_table(self):
        rows, _ = self.bench("--presets", "60m,1b", "--parts", "weak,fast", "--", "--optimizer.lr", "fails", status=1)
        self.assertEqual([(r["preset"], r["figure"]) for r in rows], [("60m", "weak"), ("60m", "fast"), ("1b", "weak"), ("1b", "fast")])
        self.assertIn("many: something broke: try another", rows[0]["notes"])

    def test_mistakes(self):
        rows, _ = self.bench("--", "--optimizer.lr", "no second GPU", status=1)
        self.assertEqual((rows, self.stderr), ([], "scaling.py: run.gpus: 2 GPUs wanted, 1 are visible here\n"))
        self.bench("--parts", "", "--kill", "1", "--", "--optimizer.lr", "no second GPU", status=1)
        self.assertEqual(self.stderr, "scaling.py: run.gpus: 2 GPUs wanted, 1 are visible here\n")
        self.bench("--gpus", "3", status=1)
        self.assertIn("3 GPUs cannot share 8 sequences", self.stderr)
        for arguments in (("--gpus", "1"), ("--steps", "7"), ("--parts", "week")):
            self.bench(*arguments, status=2)

    def test_kills(self):
        rows, (found,) = self.bench("--parts", "", "--kill", "3")
        self.assertEqual([k["rank"] for k in found["kills"]], [0, 1, 0])
        for r in rows:
            self.assertEqual((r["2 ÷ 1"], r["wanted"]), ("resumed to the same bits", "≤ 30 s"))
            self.assertRegex(r["2 processes"], r"^ended in \d\.\d s$")
            self.assertRegex(r["notes"], r"^train_loqt: rank \d was killed in the sum of gradients;")
        shown = self.stdout
        self.bench("--show", self.out)
        self.assertEqual(self.stdout, shown)

    def test_kills_that_go_wrong(self):
        for wrong, words in (("other losses", r"train loss of step \d+ is .*, undisturbed"), ("other weights", "the last checkpoint is another"),
                             ("says nothing", "no message names rank 0"), ("hangs", "did not end")):
            with self.subTest(wrong):
                (r,), _ = self.bench("--parts", "", "--kill", "1", "--comm-timeout", "1", "--", "--optimizer.lr", wrong, status=1)
                self.assertRegex(r["notes"], words)
                self.assertEqual(r["2 ÷ 1"], "-")
        self.assertEqual(self.processes(), [])

    @unittest.skipUnless(os.path.exists(PROGRAM), "no ./train_loqt; build it with make, or make cpu")
    def test_program(self):
        """The tiny preset by two processes on the CPU: every row, and two killed ranks."""
        rows, (found,) = self.bench("--gpus", "2", "--kill", "2", binary=PROGRAM)
        figures = {r["figure"]: r for r in rows}
        self.assertEqual([run["gpus"] for run in found["runs"].values()], [2, 1, 1, 2, 1])
        self.assertEqual({run["micro_batch"] for run in found["runs"].values()}, {found["runs"]["one"]["micro_batch"]})
        self.assertTrue(all(run["error"] is None and run["step_ms"] > 0 and run["merges"] for run in found["runs"].values()))
        self.assertGreater(float(figures["tokens/s, equal work per GPU"]["2 ÷ 1"]), 0)
        self.assertLess(scaling.difference(found["runs"]["whole"], found["runs"]["many"])["largest"], 0.01)
        self.assertEqual([(k["rank"], k["remarks"]) for k in found["kills"]], [(0, []), (1, [])])


if __name__ == "__main__":
    unittest.main()
