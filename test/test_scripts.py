"""scripts/summary.py and scripts/compare_runs.py on made-up run directories."""
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
import summary  # noqa: E402

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
    """A step of 1000 tokens."""
    return "train", {"step": step, "loss": loss, "tokens": 1000 * step, "tokens_per_s": rate, "step_ms": 1e6 / rate, "memory_bytes": memory, "skipped": 0}


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

    def test_unfinished_runs(self):
        """An empty file, a torn line, a loss that was not finite: nothing may stop the summary."""
        for run in (write_run(self.folder, "empty", []),
                    write_run(self.folder, "torn", [evaluation(0, 3.0), ("eval", {"step": 1, "loss": None, "perplexity": None})], '{"event": "tra')):
            self.assertEqual(self.run_script(self.summary_of, run)[0], 0)

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
