"""bench/memory.py and scripts/plot_memory.py: figures and remarks on made-up events, whole cases on a stand-in for train_loqt, and one on the program itself."""
import contextlib
import io
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import unittest
import unittest.mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.join(ROOT, "bench"), os.path.join(ROOT, "scripts")]
import measure  # noqa: E402
import memory  # noqa: E402
import plot_memory  # noqa: E402

try:
    import matplotlib
except ImportError:
    matplotlib = None

GIB = 2**30
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
PROGRAM = os.path.join(ROOT, "train_loqt")
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive")

PLAN = {"device": "cuda", "model": {"vocab": 50}, "seq_len": 64, "batch": 8, "tokens_per_micro_batch": 256, "budget": None,
        "lines": [{"name": "frozen weights", "bytes": 2 * GIB}, {"name": "trained weights", "bytes": GIB}, {"name": "gradients", "bytes": GIB},
                  {"name": "merge workers", "bytes": GIB}, {"name": "something new", "bytes": GIB // 2}, {"name": "cuBLAS workspace", "bytes": GIB // 2}],
        "total": 6 * GIB, "weights_and_optimizer_bytes": 1000 * 2**20,
        "choices": {"train.recompute": {"value": "light", "auto": True}, "train.updates": {"value": "per_layer", "auto": False}}}

# A driver's library whose one GPU has as many bytes in use as a file says, and knows no processes.
NVML = r"""
#include <cstdio>
#include <cstdlib>
extern "C" {
struct Memory { unsigned long long total, free, used; };
int nvmlInit_v2() { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** handle) { *handle = (void*)0x1234567887654321; return index == 1 ? 0 : 6; }
int nvmlDeviceGetMemoryInfo(void* handle, Memory* memory) {
    std::FILE* file = handle == (void*)0x1234567887654321 ? std::fopen(std::getenv("GPU_IN_USE"), "r") : nullptr;
    if (!file) return 2;
    memory->used = 0;
    while (std::fscanf(file, "%llu", &memory->used) != 1) std::rewind(file);
    std::fclose(file);
    return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void*, unsigned* count, void*) { *count = 0; return 0; }
}
"""

# A train_loqt that plans PLAN and, by the mode in the learning rate, trains, fails, or never ends.
STAND_IN = """#!{python}
import json, os, sys, time
arguments = dict(zip(sys.argv[1:], sys.argv[2:]))
plan = json.loads('''{plan}''')
mode = arguments.get("--optimizer.lr")
if "--plan" in sys.argv:
    if arguments.get("--run.memory_budget") == "1MiB" or arguments.get("--method.name") == "loqt-nq":
        sys.exit("train_loqt: does not fit: 6.00 GiB planned")
    print(json.dumps(plan))
    sys.exit()
def gpu_in_use(size):
    if "GPU_IN_USE" in os.environ:
        with open(os.environ["GPU_IN_USE"], "w") as file:
            file.write(str((1 << 30) + size))
gpu_in_use(int(plan["total"] * 1.01))
run = arguments["--run.dir"]
os.makedirs(os.path.join(run, "checkpoints"))
ballast = bytearray(48 << 20)
for i in range(0, len(ballast), 4096):
    ballast[i] = 1
with open(os.path.join(run, "metrics.jsonl"), "w") as file:
    def write(event, **fields):
        file.write(json.dumps(dict(event=event, time=time.time(), **fields)) + "\\n")
        file.flush()
    write("start", step=0, device="stand-in", method="loqt", micro_batch=4, planned_bytes=plan["total"])
    for u in range(20):
        if u == 10 and mode == "fail":
            sys.stderr.write("step 10\\ntrain_loqt: something broke: try another\\n")
            sys.exit(2)
        if u == 10 and mode == "hang":
            time.sleep(60)
        merge = u in (0, 8)
        if merge:
            write("merge", step=u, seconds=1.0, failed=0)
        write("train", step=u + 1, loss=5 - 0.1 * u, tokens_per_s=50.0 if merge else 1000.0, step_ms=2512.0 if merge else 512.0, memory_bytes=6 << 30)
    time.sleep(0.3)
    write("checkpoint", step=20, seconds=3.5)
gpu_in_use(0)
"""


def events(losses, merges=(0, 8), planned=6 * GIB, failed=0):
    """Events as read_events gives them, of one run; None is a loss that was not finite."""
    train = [{"step": i + 1, "loss": loss, "tokens_per_s": 100.0 if i in merges else 1000.0 + i, "step_ms": 5000.0 if i in merges else 1000.0, "memory_bytes": 7 * GIB}
             for i, loss in enumerate(losses)]
    return {"start": [{"step": 0, "device": "H200", "method": "loqt", "micro_batch": 4, "planned_bytes": planned}], "train": train,
            "merge": [{"step": u, "seconds": 3.0, "failed": failed} for u in merges], "checkpoint": [{"step": len(losses), "seconds": 2.0}]}


def result(found, **more):
    """A case that ran with these events, as measure() makes it."""
    return {"name": "x", "budget": "", "plan": PLAN, "planned_bytes": PLAN["total"], "driver_peak_bytes": int(6.06 * GIB), **memory.figures(found), **more}


FALLING = [5.0 - 0.1 * i for i in range(20)]


def cells(text):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(rows[0], row)) for row in rows[2:]]


class Figures(unittest.TestCase):
    def test_falling(self):
        self.assertTrue(memory.falling(FALLING))
        self.assertTrue(memory.falling([5.0, 4.0]))
        # One lucky last batch is not falling; nor is a run that blew up, or one that stands still.
        self.assertFalse(memory.falling([5.0] * 15 + [6.0, 6.0, 6.0, 6.0, 4.9]))
        for losses in ([], [5.0], FALLING[::-1], [5.0] * 20, FALLING[:19] + [None]):
            self.assertFalse(memory.falling(losses), losses)

    def test_figures(self):
        f = memory.figures(events(FALLING))
        self.assertEqual((f["steps"], f["run_planned_bytes"], f["program_peak_bytes"], f["checkpoint_seconds"]), (20, 6 * GIB, 7 * GIB, 2.0))
        # Steps 0 and 8 merged: of 1001 … 1007, 1009 … 1019 the median is 1010.5.
        self.assertEqual((f["tokens_per_s"], f["step_seconds"]), (1010.5, 1.0))
        self.assertEqual([(m["step"], m["seconds"], m["step_seconds_more"]) for m in f["merges"]], [(0, 3.0, 4.0), (8, 3.0, 4.0)])
        self.assertEqual(memory.remarks(result(events(FALLING))), [])

    def test_nothing_happened(self):
        for found in ({}, {"start": events([])["start"]}, events([5.0], merges=[0])):
            r = result(found, error="it broke")
            self.assertEqual(memory.remarks(r)[0], "it broke")
            r["remarks"] = memory.remarks(r)
            self.assertLessEqual({*memory.COLUMNS, *memory.PLANNED, *memory.BRIEF}, memory.cells(r).keys())

    def test_remarks(self):
        small = dict(PLAN, budget=6 * GIB)
        for words, r in (("does not fall", result(events(FALLING[::-1]))), ("not finite", result(events(FALLING[:19] + [None]))),
                         ("not finite", result({**events(FALLING), "nonfinite": [{"step": 3}]})),
                         ("no merge in the middle", result(events(FALLING, merges=[0]))), ("no merge in the middle", result(events(FALLING, merges=[0, 19]))),
                         ("6 matrices were not merged", result(events(FALLING, failed=3))),
                         ("the run planned 6.500 GiB, --plan 6.000", result(events(FALLING, planned=6.5 * GIB))),
                         ("above its budget", result(events(FALLING), plan=small)),
                         ("not within 2 % of the plan", result(events(FALLING), driver_peak_bytes=int(6.13 * GIB))),
                         ("not within 2 % of the plan", result(events(FALLING), driver_peak_bytes=int(5.87 * GIB))),
                         ("more than 8 GiB of host memory", result(events(FALLING), host_own_bytes=8.1 * GIB)),
                         ("changed by -100 MiB", result(events(FALLING), driver_left_bytes=-100 * 2**20))):
            self.assertEqual(len(memory.remarks(r)), 1, words)
            self.assertIn(words, memory.remarks(r)[0])
        full = events(FALLING, merges=[])
        full["start"][0]["method"] = "full"
        self.assertEqual(memory.remarks(result(full, driver_left_bytes=2**20, plan=dict(PLAN, budget=7 * GIB))), [])

    def test_cells(self):
        r = result(events(FALLING), budget="24GiB", host_rss_bytes=3 * GIB, host_own_bytes=2 * GIB, start_seconds=1.25, wall_seconds=30.0, remarks=["a", "b"])
        found = memory.cells(r)
        self.assertEqual([found[column] for column in memory.COLUMNS],
                         ["x", "24GiB", "4 × 64", "light, -, per_layer, -, -, -", "6.00", "6.06", "+1.00 %", "7.00", "5.000 → 3.100", "1,010", "4.0, 4.0",
                          "3.00, 2.00", "1.2", "2.0", "30.0", "a; b"])
        self.assertEqual([found[column] for column in memory.BRIEF], ["x", "24GiB", "4 × 64", "light, -, per_layer, -, -, -", "6.00", "6.06", "1,010", "4.0", "2.00"])
        self.assertEqual(memory.line(r, ["case", "remarks"]), "| x | a; b |")
        del r["driver_peak_bytes"]  # no GPU: the program's own, which counts more than the plan
        self.assertEqual([memory.cells(r)[column] for column in ("peak, GiB", "difference")], ["7.00", "-"])
        # Without a budget of the case's: what the plan took for one.
        self.assertEqual(memory.cells(dict(r, budget=""))["budget"], "-")
        self.assertEqual(memory.cells(dict(r, budget="", plan=dict(PLAN, budget=24 * GIB)))["budget"], "(24.00 GiB)")

    def test_cases(self):
        """Every case has a preset and options in pairs; merges leave room for one in the middle, whatever the number of steps."""
        for name, (preset, _, options) in memory.CASES.items():
            self.assertTrue(os.path.exists(memory.config_path(preset)), name)
            words = options.split()
            self.assertTrue(all(key.startswith("--") for key in words[::2]), name)
        self.assertEqual(memory.merge_gap(20), 8)
        for steps in range(3, 200):
            gap = memory.merge_gap(steps)
            self.assertTrue(0 < gap < steps - gap, steps)


class Parts(unittest.TestCase):
    def test_shard(self):
        with tempfile.TemporaryDirectory() as folder:
            path = measure.synthetic_shards(folder, 50, 3000)
            with open(os.path.join(path, os.listdir(path)[0]), "rb") as file:
                data = file.read()
            self.assertEqual(measure.synthetic_shards(folder, 50, 3000), path)
        self.assertEqual(struct.unpack("<4i", data[:16]), (20240520, 1, 3000, 0))
        tokens = struct.unpack("<3000H", data[1024:])
        self.assertLess(max(tokens), 50)
        # Rank 0 comes more often than rank 40, and the next rank after about half of all tokens.
        self.assertGreater(tokens.count(0), 3 * tokens.count(40))
        self.assertAlmostEqual(sum(b == (a + 1) % 50 for a, b in zip(tokens, tokens[1:])) / 3000, 0.5, delta=0.1)

    def test_host_memory(self):
        found = measure.host_memory(os.getpid())
        self.assertGreater(found["VmHWM"], found["RssAnon"])
        self.assertGreater(found["RssAnon"], 2**20)
        self.assertEqual(measure.host_memory(2**30), {})

    def test_watch(self):
        """The highest readings count, above what was used before; processes that were there before do not."""
        class Driver:
            readings = iter([10 * GIB, 11 * GIB, 14 * GIB, 12 * GIB, 10 * GIB])

            def used(self):
                return next(self.readings)

            def by_process(self):
                return {1: 10 * GIB, **({2: 3 * GIB} if watch else {})}

        watch = None
        watch = measure.Watch(Driver(), interval=60)
        watch.pid = os.getpid()
        watch.start()
        for _ in range(3):
            watch.read()
        peaks = watch.finish()
        self.assertEqual((peaks["driver_peak_bytes"], peaks["driver_process_bytes"], peaks["driver_left_bytes"]), (4 * GIB, 3 * GIB, 0))


class Cases(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder, self.out = folder.name, os.path.join(folder.name, "sub", "memory.json")
        self.stand_in = os.path.join(self.folder, "train_loqt")
        with open(self.stand_in, "w", encoding="utf-8") as file:
            file.write(STAND_IN.format(python=sys.executable, plan=json.dumps(PLAN)))
        os.chmod(self.stand_in, os.stat(self.stand_in).st_mode | stat.S_IXUSR)

    def bench(self, *arguments, binary=None, status=0):
        """(rows, cases of the JSON if any) of bench/memory.py."""
        command = [sys.executable, os.path.join(ROOT, "bench", "memory.py"), "--device", "cpu", "--binary", binary or self.stand_in, "--out", self.out, *arguments]
        done = subprocess.run(command, cwd=self.folder, env=dict(ENVIRONMENT, TMPDIR=self.folder), capture_output=True, text=True, timeout=120)
        self.assertEqual(done.returncode, status, done.stdout + done.stderr)
        written = []
        if os.path.exists(self.out):
            with open(self.out, encoding="utf-8") as file:
                written = json.load(file)["cases"]
        self.stdout, self.stderr = done.stdout, done.stderr
        return cells(done.stdout), written

    def left_over(self):
        return [name for name in os.listdir(self.folder) if name.startswith("train_loqt-memory-")]

    def test_case(self):
        rows, (case,) = self.bench("--cases", "60m")
        self.assertEqual((rows[0]["loss"], rows[0]["tokens/s"], rows[0]["merge, s: first, later"]), ("5.000 → 3.100", "1,000", "2.0, 2.0"))
        self.assertEqual((rows[0]["planned, GiB"], rows[0]["checkpoint, s"], rows[0]["remarks"]), ("6.00", "3.5", ""))
        self.assertGreater(case["host_own_bytes"], 48 << 20)
        self.assertGreater(case["host_rss_bytes"], case["host_own_bytes"])
        self.assertIn("--config", case["command"])
        self.assertEqual(self.left_over(), [])

    def test_failures_do_not_end_the_table(self):
        rows, _ = self.bench("--cases", "60m,7b-1280,130m", "--", "--optimizer.lr", "fail", status=1)
        self.assertEqual([r["remarks"] for r in rows], ["something broke: try another"] * 3)
        self.assertEqual(rows[0]["loss"], "5.000 → 4.100")
        rows, _ = self.bench("--cases", "60m", "--timeout", "1.5", "--", "--optimizer.lr", "hang", status=1)
        self.assertEqual(rows[0]["remarks"], "stopped after 2 s")
        rows, _ = self.bench("--cases", "60m", "--budget", "1MiB", status=1)
        self.assertEqual((rows[0]["remarks"], rows[0]["budget"], rows[0]["loss"]), ("does not fit: 6.00 GiB planned", "1MiB", "- → -"))
        rows, _ = self.bench("--cases", "60m", binary=os.path.join(self.folder, "nowhere"), status=1)
        self.assertIn("No such file", rows[0]["remarks"])
        self.assertEqual(self.left_over(), [])

    def test_plan_only_and_show(self):
        rows, written = self.bench("--cases", "60m,1b", "--plan-only")
        self.assertEqual([list(r) for r in rows], [memory.PLANNED] * 2)
        self.assertEqual([(r["case"], r["planned, GiB"]) for r in rows], [("60m", "6.00"), ("1b", "6.00")])
        other = os.path.join(self.folder, "other.json")
        with open(other, "w", encoding="utf-8") as file:
            json.dump({"cases": [dict(written[1], planned_bytes=GIB)]}, file)
        rows, _ = self.bench("--show", self.out, other)
        self.assertEqual([(r["case"], r["planned, GiB"], r["peak, GiB"]) for r in rows], [("60m", "6.00", "-"), ("1b", "1.00", "-")])
        with open(other, "w", encoding="utf-8") as file:
            json.dump({"cases": [dict(written[0], remarks=["it broke"])]}, file)
        rows, _ = self.bench("--show", other, "--brief")
        self.assertEqual([list(r) for r in rows], [memory.BRIEF])
        self.assertEqual(self.stderr, "60m: it broke\n")

    def test_list_and_mistakes(self):
        self.bench("--list", "--cases", "13b-per-layer", "--steps", "10", "--", "--seed", "7")
        comment, command = self.stdout.splitlines()
        self.assertTrue(comment.startswith("# DATA: "))
        self.assertRegex(command, r"^13b-per-layer +\./train_loqt --config 13b --train.steps 10 --method.merge_gap 4 .*--train.updates per_layer "
                                  r"--run.memory_budget 20.5GiB --seed 7 --data.train DATA --data.val '' --run.dir runs/13b-per-layer$")
        self.bench("--list")
        self.assertEqual([text.split()[0] for text in self.stdout.splitlines()[1:]], list(memory.CASES))
        self.bench("--steps", "2", status=2)
        self.bench("--cases", "14b", status=2)
        self.bench("--show", "nowhere.json", status=1)

    @unittest.skipUnless(COMPILER, "no compiler")
    def test_driver(self):
        """The whole way of a GPU's figures, on a library that stands in for the driver's."""
        library, in_use = os.path.join(self.folder, "libnvidia-ml.so.1"), os.path.join(self.folder, "in_use")
        with open(library + ".cpp", "w", encoding="utf-8") as file:
            file.write(NVML)
        subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, library + ".cpp"], check=True)
        with open(in_use, "w", encoding="utf-8") as file:
            file.write(str(GIB))
        with unittest.mock.patch.dict(ENVIRONMENT, LD_LIBRARY_PATH=self.folder, GPU_IN_USE=in_use, CUDA_VISIBLE_DEVICES="0,1"):
            rows, (case,) = self.bench("--device", "cuda:1", "--cases", "60m")
            self.assertEqual((rows[0]["peak, GiB"], rows[0]["difference"], rows[0]["remarks"]), ("6.06", "+1.00 %", ""))
            self.assertEqual((case["driver_peak_bytes"], case["driver_left_bytes"]), (int(6 * GIB * 1.01), 0))
            self.bench("--device", "cuda:0", "--cases", "60m", status=1)  # which it does not have
        self.assertIn("nvmlDeviceGetHandleByIndex_v2: status 6", self.stderr)

    def test_table1(self):
        args = memory.parse_arguments(["--table1", "--device", "cpu", "--binary", self.stand_in])
        with self.assertRaisesRegex(ValueError, "does not fit"):  # the stand-in cannot plan loqt-nq
            memory.table1(args)

    @unittest.skipUnless(os.path.exists(PROGRAM), "no ./train_loqt; build it with make, or make cpu")
    def test_program(self):
        """The tiny preset on the CPU, from the shards to the table, fewer steps, and Table 1."""
        _, (case,) = self.bench("--steps", "7", binary=PROGRAM)
        self.assertEqual((case["steps"], [m["step"] for m in case["merges"]], case["remarks"]), (7, [0, 2], []))
        rows, (case,) = self.bench("--keep", binary=PROGRAM)
        self.assertEqual(rows[0]["remarks"], "")
        self.assertEqual((rows[0]["case"], rows[0]["micro-batch"], case["steps"], [m["step"] for m in case["merges"]]), ("tiny", "4 × 64", 20, [0, 8]))
        self.assertEqual(case["planned_bytes"], case["run_planned_bytes"])
        self.assertLess(case["losses"][-1], case["losses"][0] - 0.2)
        self.assertGreater(case["host_rss_bytes"], 2**22)
        self.assertEqual(len(self.left_over()), 1)
        rows, _ = self.bench("--table1", binary=PROGRAM)
        for row in rows:  # the paper's own figures have two digits
            self.assertAlmostEqual(float(row["loqt"]), float(row["loqt, paper"]), delta=0.01)
            self.assertAlmostEqual(float(row["loqt-nq"]), float(row["loqt-nq, paper"]), delta=0.03)


class Plot(unittest.TestCase):
    def test_components(self):
        parts = plot_memory.components(PLAN["lines"])
        self.assertEqual(parts, {"weights": 3 * GIB, "gradients": GIB, "optimizer moments": 0, "activations": 0, "merges, scratch": 3 * GIB // 2, "CUDA context, libraries": GIB // 2})
        self.assertEqual(sum(parts.values()), PLAN["total"])

    def write(self, folder, name, *found):
        path = os.path.join(folder, name)
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"cases": found}, file)
        return path

    def test_measured(self):
        with tempfile.TemporaryDirectory() as folder:
            bars = plot_memory.measured_bars([self.write(folder, "a.json", result(events(FALLING), name="a"), result({}, name="failed", error="it broke")),
                                              self.write(folder, "b.json", result(events(FALLING), name="a", budget="24GiB", driver_peak_bytes=GIB))])
        self.assertEqual([(label, peak) for label, _, peak in bars], [("a (24GiB)", GIB)])

    @unittest.skipUnless(matplotlib, "no matplotlib")
    def test_picture(self):
        with tempfile.TemporaryDirectory() as folder:
            measured = self.write(folder, "a.json", result(events(FALLING)))
            for name, begin in (("memory.png", b"\x89PNG\r\n\x1a\n"), ("memory.svg", b"<?xml")):
                path = os.path.join(folder, name)
                self.assertEqual(plot_memory.main(["--sizes", "", "--measured", measured, "-o", path]), 0)
                with open(path, "rb") as file:
                    self.assertTrue(file.read().startswith(begin))
                self.assertGreater(os.path.getsize(path), 5000)

    def test_no_matplotlib(self):
        """Said at once, before anything is planned."""
        with unittest.mock.patch("importlib.util.find_spec", return_value=None), contextlib.redirect_stderr(io.StringIO()) as err:
            self.assertEqual(plot_memory.main([]), 2)
        self.assertIn("use .venv/bin/python3", err.getvalue())

    @unittest.skipUnless(matplotlib, "no matplotlib")
    def test_mistakes(self):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as err:
            self.assertEqual(plot_memory.main(["--measured", os.path.join(folder, "nowhere.json"), "-o", "x.png"] + ["--sizes", ""]), 2)
            self.assertEqual(plot_memory.main(["--sizes", "", "-o", "x.png"]), 2)
        self.assertEqual(len(err.getvalue().splitlines()), 2)
        self.assertIn("nowhere.json", err.getvalue())

    @unittest.skipUnless(matplotlib and os.path.exists(PROGRAM), "no matplotlib or no ./train_loqt")
    def test_planned(self):
        """The program plans every bar, and the methods stand in the order that they should."""
        for method in plot_memory.METHODS.values():
            plan = plot_memory.read_plan([PROGRAM, "--config", "7b", *plot_memory.COMMON.split(), *method.split()])
            self.assertEqual(plan["choices"]["merge_workers"]["value"], 0)
            self.assertEqual(plan["tokens_per_micro_batch"], 256)
        bars = dict((label, sum(parts.values())) for label, parts, _ in plot_memory.planned_bars(PROGRAM, "1b"))
        self.assertEqual(list(bars), list(plot_memory.METHODS))
        self.assertGreater(bars["full, bf16 Adam"], 2 * bars["loqt, bf16 Adam"])
        self.assertGreaterEqual(bars["loqt, bf16 Adam"], bars["loqt, 8-bit Adam"])
        self.assertGreater(bars["loqt, 8-bit Adam"], bars["loqt, 8-bit Adam, 8-bit gradient sums"])


if __name__ == "__main__":
    unittest.main()
