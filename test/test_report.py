"""scripts/report.py on made-up run directories; its figures against ones made by hand."""
import contextlib
import csv
import importlib.util
import io
import json
import math
import os
import random
import sys
import tempfile
import unittest

from test_scripts import GIB, evaluation, loqt_run, train, write_run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "scripts"))
import run_groups  # noqa: E402
from merge_jumps import MergeJumps  # noqa: E402

# bench/ has a report too.
spec = importlib.util.spec_from_file_location("run_report", os.path.join(ROOT, "scripts", "report.py"))
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)
MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def cells(text):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(rows[0], row)) for row in rows[2:]]


class ReportTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def run_report(self, *args):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = report.main([str(a) for a in args])
        return status, out.getvalue(), err.getvalue()

    def table(self, *args):
        status, out, err = self.run_report(*args)
        self.assertEqual(status, 0, err)
        return cells(out)

    def csv(self, *args):
        path = os.path.join(self.folder, "table.csv")
        self.table(*args, "--csv", path)
        with open(path, newline="") as file:
            return list(csv.DictReader(file))

    def run_of(self, name, seed, final, method="loqt", steps=4, lr=0.01, limit=4, rate=1000.0, **keys):
        """A run of 1000 tokens a step at `rate`, evaluated at its begin with loss 6 and at its end."""
        run = write_run(self.folder, name, [("start", {"step": 0, "device": "a GPU", "method": method, "planned_bytes": GIB}), evaluation(0, 6.0),
                                            *(train(u, 6.0 - u, rate) for u in range(1, steps + 1)), evaluation(steps, final)])
        config = {"train": {"seed": seed, "steps": limit}, "optimizer": {"lr": lr, "warmup_ratio": 0.0}, "run": {"dir": name, "device": "cuda:0", **keys}}
        with open(os.path.join(run, "config.json"), "w") as file:
            json.dump(config, file)
        return run

    def test_table(self):
        full = write_run(self.folder, "b", [("start", {"step": 0, "method": "full", "planned_bytes": GIB}), train(1, 5.0, 1234567.0)])
        a, b = self.table(loqt_run(self.folder), full)
        # The median of 1000, 2000, 3000: lines with a merge and the first try at step 4 do not count. Step 3 took 50 s, the others 1, 1/2 and 1/3 s.
        self.assertEqual(a, {"run": "a", "method": "loqt", "seeds": "1", "steps": "5", "tokens": "0.0 M", "validation loss": "2.5000", "perplexity": "12.18", "ratio": "-",
                             "tokens/s": "2,000", "planned": "3.00 GiB", "peak": "4.00 GiB", "merges": "2", "s/merge": "49.50", "skipped": "0", "spikes": "0"})
        self.assertEqual(b, {"run": "b", "method": "full", "seeds": "1", "steps": "1", "tokens": "0.0 M", "validation loss": "-", "perplexity": "-", "ratio": "-",
                             "tokens/s": "1,234,567", "planned": "1.00 GiB", "peak": "1.00 GiB", "merges": "0", "s/merge": "-", "skipped": "0", "spikes": "0"})

    def test_columns(self):
        run = self.run_of("a", 1, 3.0)
        self.assertEqual(list(self.table(run, "--columns", "perplexity,steps")[0].items()), [("run", "a"), ("perplexity", f"{math.exp(3):.2f}"), ("steps", "4")])
        status, _, err = self.run_report(run, "--columns", "perplexity,stepps")
        self.assertEqual(status, 2)
        self.assertIn("no column and no key of the configuration \"stepps\"; there are run, method, seeds", err)
        rows = self.table(run, self.run_of("b", 1, 3.0, lr=0.5), "--columns", "lr,train.seed,warmup_ratio")
        self.assertEqual([list(row.values()) for row in rows], [["a", "0.01", "1", "0.0"], ["b", "0.5", "1", "0.0"]])
        self.assertEqual(list(rows[0]), ["run", "lr", "train.seed", "warmup_ratio"])
        self.assertEqual(self.run_report(run, "--columns", "r")[0], 2)

    def test_page(self):
        """Only what stands in the blocks changes, and nothing unless all of them can be made."""
        for seed in (1, 2):
            self.run_of(f"a_seed-{seed}", seed, math.log(10 * seed))
        page, picture = os.path.join(self.folder, "docs", "page.md"), os.path.join(self.folder, "docs", "curves.png")
        os.makedirs(os.path.dirname(page))

        def write(*blocks):
            with open(page, "w", encoding="utf-8") as file:
                file.write("# Title\n\n" + "\n".join(blocks) + "\nlast words\n")

        def text():
            with open(page, encoding="utf-8") as file:
                return file.read()

        first = f"<!-- report: '{self.folder}/a_seed-*' --columns seeds,perplexity -->"
        end = "<!-- end of report -->"
        draw = f"<!-- report: {self.folder}/a_seed-1 --columns seeds -o {picture} -->" if MATPLOTLIB else f"<!-- report: {self.folder}/a_seed-1 --columns seeds -->"
        table = "| run | seeds | perplexity |\n| --- | --- | --- |\n| a | 2 | 15.00 ± 5.00 |\n\n2 runs on a GPU.\n"
        shown = "\n![Loss curves](curves.png)\n" if MATPLOTLIB else ""
        write(first, "an old table", end, "words", draw, end)
        for _ in range(2):  # made twice it is the same
            status, out, err = self.run_report("--page", page)
            self.assertEqual((status, out), (0, f"{page}: tables made anew: 2\n"), err)
            self.assertEqual(text(), f"# Title\n\n{first}\n{table}\n{end}\nwords\n{draw}\n| run | seeds |\n| --- | --- |\n| a_seed-1 | 1 |\n\n1 run on a GPU.\n{shown}\n{end}\nlast words\n")
        for blocks, words in (((first, end, f"<!-- report: {self.folder}/nothing-* -->", end), ("line 5", "nothing-*")), ((first,), ("line 3", "no \"<!-- end")),
                              ((end,), ("line 3", "did not begin")), ((first, first, end), ("line 4", "block of line 3")), (("<!-- report: --colums x -->", end), ("line 3", "--colums"))):
            write(*blocks)
            before = text()
            status, out, err = self.run_report("--page", page)
            self.assertEqual((status, out, len(err.splitlines())), (2, "", 1), err)
            for word in words:
                self.assertIn(word, err)
            self.assertEqual(text(), before)
        self.assertEqual(self.run_report("--page", page, "run")[0], 2)

    def test_merge_jumps(self):
        """Losses on a line rise nowhere; a step of 0.25 at every merge but the first is found, and so is none between them."""
        def jumps(loss, merges, last=500):
            return MergeJumps([{"step": step, "loss": loss(step)} for step in range(1, last + 1)], merges, None).plain()
        for got in jumps(lambda step: 7 - 0.01 * step, [0, 100, 201, 302]):
            self.assertAlmostEqual(got, 0)
        # The line of step u + 1 says the loss before the merge of step u.
        found = jumps(lambda step: 7 - 0.01 * step + sum(0.25 for u in (100, 201, 302) if step > u + 1), [0, 100, 201, 302])
        self.assertEqual(len(found), 3)
        for got in found:
            self.assertAlmostEqual(got, 0.25)
        self.assertAlmostEqual(jumps(lambda step: 7.0 + (step > 150), [0, 100, 200])[0], 0)  # elsewhere: none of a merge's
        for got in jumps(lambda step: 8 * step**-0.15, [0, 100, 201, 302]):  # a curve that falls as losses do
            self.assertLess(abs(got), 0.004)
        self.assertEqual(jumps(lambda step: None if step == 105 else 7.0, [0, 100, 201]), [0.0])
        self.assertEqual(jumps(lambda step: 7.0, [0, 2]), [])  # no room for a window
        self.assertEqual(MergeJumps([], [0, 3], None).plain(), [])
        runs = [write_run(self.folder, f"m{i}", [("start", {"step": 0, "method": "loqt", "planned_bytes": GIB}), *(("merge", {"step": u}) for u in (0, 100, 201)),
                                                 *(train(step, 5.0 + rise * ((step > 101) + (step > 202)), 1000.0) for step in range(1, 401))]) for i, rise in ((1, 0.5), (2, 0.25))]
        self.assertEqual([row["merge jump"] for row in self.table(*runs)], ["+0.500 ± 0.000", "+0.250 ± 0.000"])

    def test_net_jumps(self):
        """Samples that are 0.3 harder from step 102 on, in every run of their seed, are no merge's doing, which is 0.1 here."""
        def run(name, seed, method, merges, batch=8):
            losses = {step: 5.0 + (0.3 if seed == 1 and step > 101 else 0.0) + 0.1 * sum(step > u + 1 for u in merges) for step in range(1, 401)}
            path = write_run(self.folder, name, [("start", {"step": 0, "method": method, "planned_bytes": GIB}), *(("merge", {"step": u}) for u in merges),
                                                 *(train(step, loss, 1000.0) for step, loss in losses.items())])
            with open(os.path.join(path, "config.json"), "w") as file:
                json.dump({"train": {"seed": seed, "batch": batch}, "method": {"name": method}}, file)
            return path
        loqt, full, full_2, other = run("loqt", 1, "loqt", [0, 100, 250]), run("full", 1, "full", []), run("full-2", 2, "full", []), run("other", 1, "full", [], batch=4)
        near, second, far = (run(f"merges-{step}", 1, "galore", [0, step]) for step in (130, 275, 175))
        plain, net = {"run": "loqt", "merge jump": "+0.250 ± 0.150"}, {"run": "loqt", "net jump": "+0.100 ± 0.000"}
        columns = ("--columns", "merge jump")
        self.assertEqual(self.table(loqt, *columns), [plain])
        self.assertEqual(self.table(loqt, full, *columns)[0], net)
        self.assertEqual(self.table(loqt, "--beside", full, full_2, *columns), [net])
        for beside in (full_2, other, near, second):  # other samples; a merge near the first; one near the second
            self.assertEqual(self.table(loqt, *columns, "--beside", beside), [plain], beside)
        self.assertEqual(self.table(loqt, *columns, "--beside", full_2, other, far), [net])
        self.assertEqual([(row["merge_jump_net"], row["merge_jump"][:5]) for row in self.csv(loqt, full)], [("1", "0.100"), ("1", "")])
        self.assertEqual([row["merge_jump_net"] for row in self.csv(loqt)], ["0"])

    def test_seeds(self):
        """Perplexities 10, 20 and 60: mean 30, deviation √700, standard error √(700/3) = 15.2753."""
        runs = [self.run_of(f"loqt_seed-{i}", i, math.log(p)) for i, p in enumerate((10, 20, 60))]
        full = [self.run_of(f"full_seed-{i}", i, math.log(20), "full", lr=0.001, device=f"cuda:{i}") for i in range(2)]
        rows = self.table(*runs, *full)
        self.assertEqual([(r["run"], r["seeds"], r["perplexity"], r["ratio"]) for r in rows], [("loqt", "3", "30.00 ± 15.28", "1.500"), ("full", "2", "20.00 ± 0.00", "1.000")])
        loqt, _ = self.csv(*runs, *full)
        self.assertAlmostEqual(float(loqt["perplexity"]), 30, places=9)
        self.assertAlmostEqual(float(loqt["perplexity_error"]), math.sqrt(700 / 3), places=9)
        losses = [math.log(p) for p in (10, 20, 60)]
        mean = sum(losses) / 3
        self.assertAlmostEqual(float(loqt["loss"]), mean, places=9)
        self.assertAlmostEqual(float(loqt["loss_error"]), math.sqrt(sum((x - mean)**2 for x in losses) / 6), places=9)
        self.assertEqual((loqt["reference"], loqt["tokens"], loqt["peak_bytes"], loqt["training_seconds"]), ("full", "4000", str(GIB), "4.0"))
        self.assertEqual([r["ratio"] for r in self.table(*runs, *full, "--reference", "loqt")], ["1.000", "0.667"])
        self.assertEqual(self.run_report(*runs, "--reference", "lora")[0], 2)

    def test_jumps_of_random_losses(self):
        """Against sums written out: w lines after the merge's own and w up to it, the same 2·w earlier and later, w at most ten and a quarter of the way to the next merge."""
        seed = random.randrange(2**32)
        rng = random.Random(seed)
        for _ in range(20):
            last = rng.randrange(150, 400)
            merges = sorted({0, *rng.sample(range(4, last - 4), rng.randrange(1, 8))})
            loss, other, third = ({line: rng.gauss(5, 1) for line in range(1, last + 1)} for _ in range(3))
            quiet = [rng.randrange(1, last)]  # where the third run merges

            def jump(of, u, w):
                total = 0.0
                for shift, factor in ((0, 1.0), (-2 * w, -0.5), (2 * w, -0.5)):
                    for k in range(w):
                        total += factor * (of[u + shift + 2 + k] - of[u + shift + 1 - k]) / w
                return total
            plain, net = [], []
            for before, u, after in zip([0, *merges], merges, [*merges[1:], last]):
                w = min(10, (u - before) // 4, (after - u) // 4)
                if w > 0 and u + 3 * w + 1 <= last:
                    plain.append(jump(loss, u, w))
                    beside = [jump(other, u, w)] + ([jump(third, u, w)] if abs(u - quiet[0]) > 3 * w else [])
                    net.append(plain[-1] - sum(beside) / len(beside))

            def made(losses, where):
                return MergeJumps([{"step": step, "loss": value} for step, value in losses.items()], where, "same")
            own, beside = made(loss, merges), [made(other, []), made(third, quiet)]
            for got, expected in ((own.plain(), plain), (own.net(beside), net)):
                self.assertEqual(len(got), len(expected), seed)
                for a, b in zip(got, expected):
                    self.assertAlmostEqual(a, b, places=9, msg=f"seed {seed}")

    def test_same_samples(self):
        """Runs are compared only if nothing differs that decides on samples; and either all rows are compared or none."""
        def run(name, merges, rise, **keys):
            path = write_run(self.folder, name, [("start", {"step": 0, "method": "loqt", "planned_bytes": GIB}), *(("merge", {"step": u}) for u in merges),
                                                 *(train(step, 5.0 + rise * (step > 101), 1000.0) for step in range(1, 301))])
            config = {"train": {"seed": 1, "seq_len": 16, "batch": 8}, "data": {"train": "a", "layout": "packed", "shuffle": True, "pad_id": -1}}
            for key, value in keys.items():
                section, name = key.split("__")
                config[section][name] = value
            with open(os.path.join(path, "config.json"), "w") as file:
                json.dump(config, file)
            return path
        loqt = run("loqt", [0, 100], 0.5)
        for number, keys in enumerate(({}, {"train__seed": 2}, {"train__seq_len": 8}, {"train__batch": 4}, {"data__train": "b"}, {"data__layout": "rows"}, {"data__shuffle": False}, {"data__pad_id": 0})):
            quiet, moving = run(f"quiet{number}", [], 0.2, **keys), run(f"moving{number}", [0, 100], 0.5, **keys)
            rows = self.table(loqt, "--beside", quiet, "--columns", "merge jump")
            self.assertEqual(rows, [{"run": "loqt", "net jump": "+0.300"} if not keys else {"run": "loqt", "merge jump": "+0.500"}], keys)
            rows = self.table(loqt, moving, "--beside", os.path.join(self.folder, "quiet0"), "--columns", "merge jump")
            self.assertEqual("net jump" in rows[0], not keys, keys)
        other = run("full", [], 0.4)
        self.assertEqual([self.table(loqt, other, "--reference", "full", *beside, "--columns", "merge jump")[0]["net jump"] for beside in ((), ("--beside", os.path.join(self.folder, "quiet0")))],
                         ["+0.100", "+0.300"])
        page = os.path.join(self.folder, "page.md")
        with open(page, "w") as file:
            file.write(f"<!-- report: {loqt} --beside '{self.folder}/quiet[0]' --columns 'merge jump' -->\n<!-- end of report -->\n")
        self.assertEqual(self.run_report("--page", page)[0], 0)
        with open(page) as file:
            self.assertIn("| loqt | +0.300 |", file.read())
        unnamed = [write_run(self.folder, name, [("start", {"step": 0, "method": "loqt", "planned_bytes": GIB}), *(("merge", {"step": u}) for u in merges),
                                                 *(train(step, 5.0, 1000.0) for step in range(1, 301))]) for name, merges in (("x", [0, 100]), ("y", []))]
        self.assertIn("merge jump", self.table(unnamed[0], "--beside", unnamed[1])[0])  # without config.json nothing is known of samples

    def test_error_of_a_ratio(self):
        """What one seed does to both does not count: 1.1 times the reference with every seed has no error. Apart from that by 1 and -1: √(2/2) over the mean of 60."""
        full = [self.run_of(f"full_seed-{i}", i, math.log(p), "full", lr=0.001) for i, p in enumerate((20, 100))]
        same = [self.run_of(f"same_seed-{i}", i, math.log(1.1 * p), lr=0.02) for i, p in enumerate((20, 100))]
        other = [self.run_of(f"other_seed-{i}", i, math.log(p), lr=0.03) for i, p in enumerate((23, 109))]
        third = [self.run_of(f"third_seed-{i}", i, math.log(60), lr=0.04) for i in (0, 2)]
        self.assertEqual([row["ratio"] for row in self.table(*full, *same, *other, *third)], ["1.000", "1.100 ± 0.000", "1.100 ± 0.017", "1.000"])
        self.assertAlmostEqual(float(self.csv(*full, *other)[1]["ratio_error"]), 1 / 60, places=9)
        self.assertEqual([row["ratio_error"] for row in self.csv(full[0], same[0])], ["", ""])  # one seed
        with open(os.path.join(other[1], "metrics.jsonl"), "a") as file:  # one seed diverged
            file.write('{"event": "eval", "time": 9e9, "step": 4, "loss": null, "perplexity": null}\n')
        self.assertEqual(self.table(*full, *other)[1]["ratio"], "0.383")

    def test_what_is_not_another_seed(self):
        runs = [self.run_of("a", 1, 3.0), self.run_of("b", 1, 3.0), self.run_of("c", 2, 3.0, lr=0.02), self.run_of("d", 2, 3.0, init_from="model")]
        self.assertEqual([r["run"] for r in self.table(*runs)], ["a", "b", "c", "d"])

    def test_runs_that_came_less_far(self):
        """They are not averaged with the others, and nothing is divided by them."""
        short, long, full = self.run_of("x_seed-1", 1, 5.0, steps=2), self.run_of("x_seed-2", 2, 3.0), self.run_of("full", 1, 4.0, "full", steps=3)
        x, f = self.table(short, long, full)
        self.assertEqual((x["seeds"], x["validation loss"], x["steps"], x["ratio"]), ("1 of 2", "3.0000", "4", "-"))
        self.assertEqual((f["steps"], f["ratio"]), ("3 of 4", "1.000"))
        diverged = self.run_of("diverged", 1, 3.0)
        with open(os.path.join(diverged, "metrics.jsonl"), "a") as file:
            file.write('{"event": "eval", "time": 9e9, "step": 5, "loss": null, "perplexity": null}\n')
        self.assertEqual(self.table(diverged)[0]["perplexity"], "-")

    def test_at_seconds(self):
        """Four steps of half a second each: loss 6 at 0 s, 2 at 2 s, on a line 5 at 0.5 s."""
        run = self.run_of("a", 1, 2.0, rate=2000.0)
        self.assertEqual(self.table(run, "--at-seconds", 0.5)[0]["at 0.5 s"], f"{math.exp(5):.2f}")
        self.assertEqual(self.table(run, "--at-seconds", 2)[0]["at 2 s"], f"{math.exp(2):.2f}")
        self.assertEqual(self.table(run, "--at-seconds", 2.1)[0]["at 2.1 s"], "-")  # it did not train so long

    def test_interpolation(self):
        self.assertEqual([run_groups.interpolate([1, 2, 4], [10, 20, 0], x) for x in (0.9, 1, 1.5, 3, 4, 4.1)], [None, 10, 15, 10, 0, None])
        self.assertIsNone(run_groups.interpolate([1], [10], 1))

    def test_spikes(self):
        """Sixty losses of 3, then 3.4 (too little), 3.6 and 3.7 (two), and one within the warm-up."""
        losses = [3.0] * 15 + [9.0] + [3.0] * 44 + [3.4, 3.6, 3.7, None]
        steps = [{"step": i, "loss": loss} for i, loss in enumerate(losses, 1)]
        self.assertEqual(run_groups.count_spikes(steps, 16), 2)
        self.assertEqual(run_groups.count_spikes(steps, 15), 3)

    def test_seconds_of_steps_without_a_line(self):
        steps = [{"step": 1, "step_ms": 100.0}, {"step": 4, "step_ms": 10.0}]
        for got, expected in zip(run_groups.training_seconds(steps), (0.1, 0.13)):
            self.assertAlmostEqual(got, expected)

    def test_best_of_every_method(self):
        runs = [self.run_of("f1", 1, 3.0, "full", lr=1), self.run_of("f2", 1, 2.9, "full", lr=2), self.run_of("l1", 1, 2.95, lr=1), self.run_of("l2", 1, 3.5, lr=2)]
        rows = self.table(*runs)  # of two rows of method full the better one is the reference
        self.assertEqual([(row["run"], row["ratio"]) for row in rows if row["method"] == "full"], [("f1", f"{math.exp(0.1):.3f}"), ("f2", "1.000")])
        begun = self.run_of("begun", 1, 9.0, steps=3)
        with open(os.path.join(begun, "metrics.jsonl")) as file:
            lines = file.read().splitlines()
        with open(os.path.join(begun, "metrics.jsonl"), "w") as file:
            file.write("\n".join(lines[:-1]) + "\n")  # evaluated at its begin only
        self.assertEqual(self.table(begun, "--columns", "perplexity,merge jump"), [{"run": "begun", "perplexity": "-", "merge jump": "-"}])
        with open(os.path.join(self.folder, "sweep.json"), "w") as file:
            file.write("{}")
        self.assertIn(f"--sweep {self.folder}", self.run_report(self.folder)[2])
        self.assertEqual([(r["run"], r["ratio"]) for r in self.table(*runs, "--best")], [("f2", "1.000"), ("l1", f"{math.exp(0.05):.3f}")])

    def test_sweep(self):
        """Groups are the sweep's; a run that has not begun counts among its seeds."""
        for name, seed, final in (("a_seed-1", 1, 3.0), ("b", 1, 2.0)):
            self.run_of(name, seed, final)
        sweep = {"name": "s", "reference": "base", "runs": [{"name": "a_seed-1", "group": "base"}, {"name": "a_seed-2", "group": "base"}, {"name": "b", "group": "other"}]}
        with open(os.path.join(self.folder, "sweep.json"), "w") as file:
            json.dump(sweep, file)
        a, b = self.table("--sweep", self.folder)
        self.assertEqual((a["run"], a["seeds"], b["run"], b["ratio"]), ("base", "1 of 2", "other", f"{math.exp(-1):.3f}"))

    def test_unfinished_runs(self):
        """An empty file, a torn line, a loss that was not finite: nothing may stop the comparison."""
        empty = write_run(self.folder, "empty", [])
        torn = write_run(self.folder, "torn", [evaluation(0, 3.0), ("eval", {"step": 1, "loss": None, "perplexity": None})], '{"event": "tra')
        self.assertEqual([c["validation loss"] for c in self.table(empty, torn, "--at-seconds", 1)], ["-", "-"])

    def test_same_names(self):
        runs = [loqt_run(self.folder, "x/run"), loqt_run(self.folder, "y/run")]
        self.assertEqual([r["run"] for r in self.table(*runs)], runs)
        status, _, err = self.run_report(*runs, "--reference", "run")
        self.assertEqual(status, 2)
        for run in runs:
            self.assertIn(run, err)

    def test_mistakes(self):
        for args, word in (([os.path.join(self.folder, "nowhere")], "nowhere"), ([], "--sweep"), (["--sweep", self.folder], "sweep.json")):
            status, _, err = self.run_report(*args)
            self.assertEqual((status, len(err.splitlines())), (2, 1))
            self.assertIn(word, err)

    def test_smoothed(self):
        self.assertEqual(report.smoothed([4.0, 2.0, 6.0, 0.0], 2), [4.0, 3.0, 4.0, 3.0])
        self.assertEqual(report.smoothed([4.0, 2.0], 1), [4.0, 2.0])

    def test_over_seeds(self):
        """Only where every seed has a value."""
        self.assertEqual(report.over_seeds([{1: 2.0, 2: 4.0, 3: 1.0}, {2: 8.0, 1: 2.0}]), [(1, 2.0, 2.0, 2.0), (2, 6.0, 4.0, 8.0)])

    @unittest.skipUnless(MATPLOTLIB, "no matplotlib")
    def test_picture(self):
        runs = [loqt_run(self.folder), write_run(self.folder, "empty", []), self.run_of("x_seed-1", 1, 3.0), self.run_of("x_seed-2", 2, 3.5, steps=3)]
        for x in ("steps", "tokens", "seconds"):
            path = os.path.join(self.folder, x + ".png")
            self.table(*runs, "-o", path, "--x", x)
            with open(path, "rb") as file:
                self.assertEqual(file.read(8), b"\x89PNG\r\n\x1a\n")
            self.assertGreater(os.path.getsize(path), 5000)


if __name__ == "__main__":
    unittest.main()
