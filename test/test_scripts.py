"""scripts/summary.py, scripts/plot_runs.py and scripts/compare_runs.py on made-up run directories."""
import contextlib
import io
import json
import math
import os
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "scripts"))
import compare_runs  # noqa: E402
import plot_runs  # noqa: E402
import summary  # noqa: E402

try:
    import matplotlib
except ImportError:
    matplotlib = None

GIB = 2**30


def write_run(folder, name, events, tail=""):
    """A run directory whose metrics.jsonl holds events = [(kind, fields)], then tail as it is."""
    run = os.path.join(folder, name)
    os.makedirs(run)
    with open(os.path.join(run, "metrics.jsonl"), "w", encoding="utf-8") as file:
        for i, (kind, fields) in enumerate(events):
            file.write(json.dumps({"event": kind, "time": 1000.0 + i, **fields}) + "\n")
        file.write(tail)
    return run


def train(step, loss, rate, memory=GIB):
    return "train", {"step": step, "loss": loss, "tokens_per_s": rate, "memory_bytes": memory}


def evaluation(step, loss):
    return "eval", {"step": step, "loss": loss, "perplexity": math.exp(loss)}


def merge(step, seconds):
    return "merge", {"step": step, "seconds": seconds, "quant_error": 0.07, "quant_error_uncompensated": 0.09}


def loqt_run(folder, name="a"):
    """Merges at steps 0 and 2 (slow lines 1 and 3), killed after line 4, resumed from step 3 with a larger plan."""
    return write_run(folder, name, [
        ("start", {"step": 0, "method": "loqt", "planned_bytes": 2 * GIB}),
        evaluation(0, 6.0), merge(0, 9.0), train(1, 6.0, 10.0), train(2, 5.0, 1000.0), merge(2, 3.0), train(3, 4.0, 20.0), train(4, 9.9, 777.0),
        ("resume", {"step": 3, "method": "loqt", "planned_bytes": 3 * GIB}),
        train(4, 3.0, 3000.0, 4 * GIB), train(5, 2.0, 2000.0), evaluation(5, 2.5)])


def cells(text):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(rows[0], row)) for row in rows[2:]]


class Scripts(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def run_script(self, main, *args):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(*args)
        return status, out.getvalue(), err.getvalue()

    def test_table(self):
        full = write_run(self.folder, "b", [("start", {"step": 0, "method": "full", "planned_bytes": GIB}), train(1, 5.0, 1234567.0)])
        status, out, _ = self.run_script(plot_runs.main, [loqt_run(self.folder), full])
        self.assertEqual(status, 0)
        a, b = cells(out)
        # The median of 1000, 2000, 3000: lines with a merge and the first try at step 4 do not count.
        self.assertEqual(a, {"run": "a", "method": "loqt", "steps": "5", "validation loss": "2.5000", "perplexity": "12.18", "tokens/s": "2,000",
                             "planned memory": "3.00 GiB", "peak memory": "4.00 GiB", "merges": "2", "s/merge": "6.00"})
        self.assertEqual(b, {"run": "b", "method": "full", "steps": "1", "validation loss": "-", "perplexity": "-", "tokens/s": "1,234,567",
                             "planned memory": "1.00 GiB", "peak memory": "1.00 GiB", "merges": "0", "s/merge": "-"})

    def test_unfinished_runs(self):
        """An empty file, a torn line, a loss that was not finite: nothing may stop the comparison."""
        empty = write_run(self.folder, "empty", [])
        torn = write_run(self.folder, "torn", [evaluation(0, 3.0), ("eval", {"step": 1, "loss": None, "perplexity": None})], '{"event": "tra')
        status, out, _ = self.run_script(plot_runs.main, [empty, torn])
        self.assertEqual(status, 0)
        self.assertEqual([c["validation loss"] for c in cells(out)], ["-", "-"])
        for run in (empty, torn):
            self.assertEqual(self.run_script(self.summary_of, run)[0], 0)

    def test_same_names(self):
        runs = [loqt_run(self.folder, "x/run"), loqt_run(self.folder, "y/run")]
        self.assertEqual(plot_runs.labels(runs), runs)

    def test_missing_run(self):
        status, _, err = self.run_script(plot_runs.main, [os.path.join(self.folder, "nowhere")])
        self.assertEqual(status, 2)
        self.assertIn("nowhere", err)
        self.assertEqual(len(err.splitlines()), 1)

    def test_smoothed(self):
        self.assertEqual(plot_runs.smoothed([4.0, 2.0, 6.0, 0.0], 2), [4.0, 3.0, 4.0, 3.0])
        self.assertEqual(plot_runs.smoothed([4.0, 2.0], 1), [4.0, 2.0])

    @unittest.skipUnless(matplotlib, "no matplotlib")
    def test_picture(self):
        path = os.path.join(self.folder, "loss.png")
        empty = write_run(self.folder, "empty", [])
        status, _, _ = self.run_script(plot_runs.main, [loqt_run(self.folder), empty, "-o", path])
        self.assertEqual(status, 0)
        with open(path, "rb") as file:
            self.assertEqual(file.read(8), b"\x89PNG\r\n\x1a\n")
        self.assertGreater(os.path.getsize(path), 5000)

    @staticmethod
    def summary_of(run):
        argv, sys.argv = sys.argv, ["summary.py", run]
        try:
            return summary.main()
        finally:
            sys.argv = argv

    def test_summary(self):
        status, out, _ = self.run_script(self.summary_of, loqt_run(self.folder))
        self.assertEqual(status, 0)
        self.assertIn("fell by 3.50 nats", out)
        self.assertIn("2 merges at steps 0, 2", out)
        self.assertIn("tokens/s (median step), peak memory 4.00 GiB", out)

    def test_summary_of_speed(self):
        """MFU and the full-rank equivalent stand apart; a run on a CPU has no MFU."""
        def run(name, mfu):
            return write_run(self.folder, name, [("train", {**train(i + 1, 5.0, 10.0)[1], "mfu": mfu and mfu * (i + 1), "full_rank_equivalent_tflops": 500.0 + i})
                                                 for i in range(3)])
        self.assertIn("tokens/s (median step), MFU 40.0 %, full-rank equivalent (6N) 501 TFLOP/s, peak", self.run_script(self.summary_of, run("gpu", 0.2))[1])
        self.assertIn("tokens/s (median step), full-rank equivalent (6N) 501 TFLOP/s, peak", self.run_script(self.summary_of, run("cpu", None))[1])

    def test_comparison_of_losses(self):
        def run(name, losses, final):
            return write_run(self.folder, name, [*(train(step, loss, 1.0) for step, loss in enumerate(losses, 1)), evaluation(len(losses), final)])

        base = [5.0 - 0.1 * step for step in range(20)]
        reference = run("reference", base, 2.0)
        same, moved = run("same", base, 2.0), run("moved", [x + (0.25 if i == 14 else 0.0) for i, x in enumerate(base)], 2.5)
        status, out, _ = self.run_script(compare_runs.main, [reference, same, moved])
        self.assertEqual(status, 0)
        first, second = out.split("moved against")
        self.assertIn("the same bits in all 20 common steps", first)
        self.assertIn("mean +0.00000, largest 0.00000", first)
        self.assertIn("first different loss at step 15", second)
        self.assertRegex(second, r"steps +1 to +10 +loss: mean \+0\.00000, largest 0\.00000")
        self.assertRegex(second, r"steps +11 to +20 +loss: mean \+0\.02500, largest 0\.25000")
        self.assertIn("validation loss at step 20: 2.0000 and 2.5000, perplexity 7.39 and 12.18", second)
        status, _, err = self.run_script(compare_runs.main, [reference, os.path.join(self.folder, "absent")])
        self.assertEqual((status, len(err.splitlines())), (1, 1))


if __name__ == "__main__":
    unittest.main()
