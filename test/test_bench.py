"""bench/: the tables on a made-up report, and the whole of it on the tiny preset on this machine's CPU (with PyTorch where it is installed)."""
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "bench"))
import report  # noqa: E402

BUILT = [p for p in (os.path.join(ROOT, folder, "bench_step") for folder in ("build", "build-cpu")) if os.path.exists(p)]
BINARY = max(BUILT, key=os.path.getmtime, default=None)  # the one that was just built
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive")


def operation(label, name, seconds, flops, byte_count, calls=1):
    return {"label": label, "name": name, "calls": calls, "seconds": seconds, "flops": flops, "bytes": byte_count}


def our_run(rate, **more):
    return {"device": "NVIDIA H200", "gpu": True, "micro_batch": 256, "seq_len": 256, "tokens_per_s": rate, "step_seconds": 0.1, "steps": [0.1] * 7,
            "mfu": 0.5, "full_rank_equivalent_tflops": 512.3, "peak_bytes": 2 * 2**30, "product_flops": 800e12, "copy_bytes_per_s": 4e12,
            "peak_flops": 989e12, "peak_source": "data sheet", **more}


def made_up():
    profile = {"step_seconds": 0.1, "operations": [operation("linear forward", "matmul", 0.04, 16e12, 4e9, 32), operation("LM head", "matmul", 0.02, 16e12, 4e9),
                                                   operation("", "rms_norm", 0.01, 0, 20e9, 4), operation("LM head", "rms_norm", 0.01, 0, 20e9, 1)]}
    merges = {"gram": {"seconds": 0.25, "all": [0.2, 0.3]}, "subspace": {"seconds": 0.05, "all": [0.05]}}
    peer = {"torch": "2.9", "results": [{"kind": "lean", "micro_batch": 128, "compile": "default", "error": "out of memory"},
                                        {"kind": "lean", "micro_batch": 64, "compile": "default", "attention": "cudnn", "tokens_per_s": 800.0}]}
    peer["best"] = peer["results"][1]
    return {"commit": "abc", "date": "2030-01-01", "command": "run", "presets": {
        "60m": {"ours": {"loqt": our_run(1000.0, profile=profile, merges=merges), "full": our_run(880.0)}, "peer": peer},
        "1b": {"ours": {"loqt": {"error": "does not fit"}, "full": our_run(10.0, mfu=None)}, "peer": {"error": "python3 has no PyTorch"}}}}


def cells(text):
    """Rows of the tables as {column: text}, without the rules under the heads. A head that occurs twice keeps its first cell."""
    rows, head = [], None
    for line in text.splitlines():
        parts = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = None
        elif head is None:
            head = parts
        elif not line.startswith("| ---"):
            rows.append(dict(reversed(list(zip(head, parts)))))
    return rows


class Report(unittest.TestCase):
    def test_speed(self):
        small, large = cells(report.speed(made_up()))
        self.assertEqual(small["loqt, tokens/s"], "1,000")
        self.assertEqual(small["PyTorch full, tokens/s"], "800")
        self.assertEqual(small["loqt / PyTorch"], "1.250")
        self.assertEqual(small["target"], "1.10")
        self.assertEqual(small["full / PyTorch"], "1.100")
        self.assertEqual((large["loqt, tokens/s"], large["PyTorch full, tokens/s"], large["loqt / PyTorch"], large["full / PyTorch"]), ("-", "-", "-", "-"))

    def test_details(self):
        loqt, full, failed, unknown_peak = cells(report.details(made_up()))
        self.assertEqual((loqt["step, ms"], loqt["MFU"], loqt["peak memory, GiB"]), ("100.0", "50.0 %", "2.00"))
        self.assertEqual(loqt["full-rank equivalent (6N), TFLOP/s"], "512")
        self.assertEqual(loqt["merge, exact (gram)"], "0.25 s = 2.50 steps")
        self.assertEqual(loqt["merge, fast (subspace)"], "0.05 s = 0.50 steps")
        self.assertEqual(full["merge, exact (gram)"], "-")
        self.assertEqual(failed["micro-batch"], "does not fit")
        self.assertEqual(unknown_peak["MFU"], "-")

    def test_peers(self):
        rows = cells(report.peers(made_up()))
        self.assertEqual([r["tokens/s"] for r in rows], ["out of memory", "800", "-"])
        self.assertIn("no PyTorch", rows[2]["PyTorch model"])

    def test_breakdown(self):
        rows = {r["operation"]: r for r in cells(report.breakdown(made_up()["presets"]["60m"]["ours"]["loqt"]))}
        # 16 TFLOP in 40 ms and in 20 ms against 800 TFLOP/s; 40 GB in 20 ms against 4 TB/s, whatever the label.
        self.assertEqual((rows["linear forward"]["achieved"], rows["linear forward"]["of ceiling"]), ("400 TFLOP/s", "50 %"))
        self.assertEqual(rows["LM head"]["of ceiling"], "100 %")
        self.assertEqual((rows["rms norm"]["calls"], rows["rms norm"]["achieved"], rows["rms norm"]["of ceiling"]), ("5", "2,000 GB/s", "50 %"))
        rest = next(r for name, r in rows.items() if name.startswith("not booked"))
        self.assertEqual((rest["ms"], rest["share"]), ("20.00", "20.0 %"))

    def test_whole(self):
        text = report.markdown(made_up())
        for word in ("Commit abc", "NVIDIA H200", "PyTorch 2.9", "800 TFLOP/s (bf16 product)", "989 TFLOP/s (data sheet)", "One step of 60m by loqt"):
            self.assertIn(word, text)
        report.markdown({"commit": "abc", "date": "", "command": "", "presets": {"x": {"ours": {"loqt": {"error": "no"}}}}})


@unittest.skipUnless(BINARY, "no bench_step; make test builds it")
class Program(unittest.TestCase):
    def bench_step(self, *arguments):
        return subprocess.run([BINARY, "--config", "tiny", "--run.device", "cpu", *arguments], cwd=tempfile.gettempdir(), env=ENVIRONMENT, capture_output=True,
                              text=True, timeout=300)

    def test_figures_agree(self):
        result = self.bench_step("--steps", "3", "--merges", "1", "--profile", "1", "--seq-len", "32", "--micro-batch=8", "--batch", "16")
        self.assertEqual(result.returncode, 0, result.stderr)
        run = json.loads(result.stdout)
        self.assertEqual((run["method"], run["micro_batch"], run["seq_len"], len(run["steps"])), ("loqt", 8, 32, 3))
        self.assertAlmostEqual(run["tokens_per_s"] * run["step_seconds"], 16 * 32)
        self.assertAlmostEqual(run["full_rank_equivalent_tflops"] * 1e12 / (6 * run["parameters"] * run["tokens_per_s"]), 1)
        self.assertIsNone(run["mfu"])
        self.assertEqual(set(run["merges"]), {"gram", "subspace"})
        labels = {op["label"] for op in run["profile"]["operations"] if op["name"] == "matmul"}
        self.assertEqual(labels, {"linear forward", "input gradients", "B gradients", "LM head", "effective weights"})
        self.assertLess(sum(op["seconds"] for op in run["profile"]["operations"]), run["profile"]["step_seconds"])

    def test_rank(self):
        """Of every method that has one, galore's too."""
        for method, rank in (("full", 0), ("galore", 24)):
            result = self.bench_step("--method", method, "--rank", "24", "--steps", "1", "--merges", "0", "--profile", "0", "--seq-len", "32", "--batch", "2", "--micro-batch", "2")
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertEqual(json.loads(result.stdout)["rank"], rank)

    def test_mistakes(self):
        for arguments, words in ((["--lrr", "1"], "--lrr"), (["--steps", "x"], "--steps x"), (["stray"], "stray"), (["--steps"], "needs a value")):
            result = self.bench_step(*arguments)
            self.assertEqual((result.returncode, len(result.stderr.splitlines())), (2, 1), result.stderr)
            self.assertIn(words, result.stderr)

    def run_all(self, *arguments):
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "sub", "bench")
            result = subprocess.run([sys.executable, os.path.join(ROOT, "bench", "run.py"), "--binary", BINARY, "--presets", "tiny", "--device", "cpu", "--steps", "2",
                                     "--merges", "1", "--profile", "1", "--sweep", "2", "--out", out, *arguments, "--", "--seq-len", "32"],
                                    cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
            self.assertEqual(result.returncode, 0, result.stderr)
            with open(out + ".json", encoding="utf-8") as data, open(out + ".md", encoding="utf-8") as text:
                return json.load(data), text.read(), result

    def test_without_pytorch(self):
        with tempfile.TemporaryDirectory() as folder:
            python = os.path.join(folder, "python")
            with open(python, "w", encoding="utf-8") as file:
                file.write("#!/bin/sh\nexit 1\n")
            os.chmod(python, 0o755)
            data, text, result = self.run_all("--torch-python", python)
        entry = data["presets"]["tiny"]
        self.assertEqual(set(entry["ours"]), {"loqt", "full"})
        self.assertEqual(entry["ours"]["loqt"]["seq_len"], 32)
        self.assertEqual(len(entry["ours"]["full"]["tried"]), 2)
        self.assertIn("has no PyTorch", entry["peer"]["error"])
        self.assertIn("the peer is left out", result.stderr)
        self.assertEqual(text, result.stdout.rstrip("\n") + "\n")
        self.assertIn("| weight gradients |", text)

    @unittest.skipUnless(importlib.util.find_spec("torch"), "no PyTorch")
    def test_beside_pytorch(self):
        data, text, _ = self.run_all("--peer-compile", "none", "--peer-kinds", "lean", "--methods", "full")
        entry = data["presets"]["tiny"]
        self.assertEqual(entry["peer"]["best"]["parameters"], entry["ours"]["full"]["parameters"])
        self.assertAlmostEqual(entry["peer"]["best"]["tokens_per_s"] * entry["peer"]["best"]["step_seconds"], 16 * 32)
        self.assertNotIn("left out", text)


@unittest.skipUnless(importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"), "no PyTorch or no transformers")
class Peer(unittest.TestCase):
    def test_lean_is_llama(self):
        """The same weights give the same loss as transformers' LLaMA, so what is timed is the model that it says it is."""
        import peer_torch
        import torch
        with open(os.path.join(ROOT, "configs", "tiny.json"), encoding="utf-8") as file:
            model = json.load(file)["model"]
        torch.manual_seed(2)
        lean, lean_loss = peer_torch.build("lean", model, 48, model["intermediate"])
        hf, hf_loss = peer_torch.build("hf", model, 48, model["intermediate"])
        theirs, mine = hf.state_dict(), lean.state_dict()
        for name, parameter in mine.items():
            if name not in ("cos", "sin"):
                parameter.uniform_(*((0.5, 1.5) if "norm" in name else (-0.2, 0.2)))
        theirs["model.embed_tokens.weight"].copy_(mine["embedding.weight"])
        theirs["lm_head.weight"].copy_(mine["head.weight"])
        theirs["model.norm.weight"].copy_(mine["norm.weight"])
        for i in range(model["layers"]):
            block, layer = f"blocks.{i}.", f"model.layers.{i}."
            for name, rows in zip("qkv", mine[block + "attention.qkv.weight"].chunk(3)):
                theirs[f"{layer}self_attn.{name}_proj.weight"].copy_(rows)
            for name, rows in zip(("gate", "up"), mine[block + "feed.gate_up.weight"].chunk(2)):
                theirs[f"{layer}mlp.{name}_proj.weight"].copy_(rows)
            for name, source in (("self_attn.o_proj", "attention.out"), ("mlp.down_proj", "feed.down"), ("input_layernorm", "norm1"), ("post_attention_layernorm", "norm2")):
                theirs[f"{layer}{name}.weight"].copy_(mine[f"{block}{source}.weight"])
        tokens = torch.randint(0, model["vocab"], (3, 48))
        with torch.no_grad():
            # transformers leaves the last position out, for which it has no next token.
            logits = hf(input_ids=tokens).logits
            expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.roll(-1, 1).flatten())
            self.assertAlmostEqual(lean_loss(lean, tokens, tokens.roll(-1, 1)).item(), expected.item(), places=4)
            shifted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
            self.assertAlmostEqual(hf_loss(hf, tokens, None).item(), shifted.item(), places=4)


if __name__ == "__main__":
    unittest.main()
