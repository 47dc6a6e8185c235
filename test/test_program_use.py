"""Tests of the program as a user meets it: mistakes, reports, export, samples.

python3 test/test_program_use.py [CLASS[.TEST]], after make or make cpu. See program.py for settings.
"""
import array
import json
import math
import os
import shutil
import struct
import subprocess
import time
import unittest

from program import (checkpoint, checkpoints, CONFIG, DEVICE, metrics, new_run, non_finite, path, program, ProgramTest, read_safetensors, read_text, ROOT, series,
                     setUpModule, start, steps)


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
            (("--lr", 1e39), "optimizer.lr", "1e38"),
            (("--eps", 1e-50), "optimizer.eps", "1e-30"),
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
            (("--json",), "--json", "--plan"),
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
        config('{"method": {"name": "dora"}}', "method.name", "dora", "loqt")
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
        budget, long = "30MiB", ("--seq_len", 1024, "--eval.sequences", 1, "--steps", 1)
        line = self.mistake(new_run(self.name(), *long, "--device", DEVICE, "--memory_budget", "8MiB"), "does not fit", "8.00 MiB",
                            "it fits with --" if DEVICE == "cpu" else "choose a smaller model")
        self.assertRegex(line, r"[\d.]+ [MG]iB planned")
        # Start, merges, evaluation, checkpoints and a resume within exactly what was planned: the device lets no allocation pass its budget.
        planned = metrics(self.train("--eval.sequences", 1))[0]["planned_bytes"]
        name = self.train("--eval.sequences", 1, "--memory_budget", f"{planned}B")
        self.succeed("--resume", "--run.dir", name, "--steps", 16)
        self.assertEqual([e["planned_bytes"] for e in metrics(name) if e["event"] in ("start", "resume")], [planned] * 2)
        if DEVICE == "cpu":
            name = self.train(*long, "--memory_budget", "8MiB", *line.split("it fits with ")[1].split())
            self.assertLessEqual(metrics(name)[0]["planned_bytes"], 8 << 20)
            self.mistake(new_run(self.name(), *long, "--micro_batch", 4, "--memory_budget", budget), "--micro_batch auto")
            name = self.train(*long, "--micro_batch", "auto", "--memory_budget", budget)
            self.assertLessEqual(metrics(name)[0]["planned_bytes"], 30 << 20)

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


class BorrowedRateTest(ProgramTest):
    def test_another_method_without_a_rate_and_scale_of_its_own(self):
        for options, said in ((("--method.name", "full"), "has --lr 0.01; full did best with --lr 0.002"), (("--method.name", "full", "--lr", 0.003), None),
                              (("--method.name", "galore", "--scale", 1), None), (("--method.name", "galore"), "has --lr 0.01 --scale 0.5; galore did best with --lr 0.01 --scale 0.25"),
                              (("--method.name", "galore", "--lr", 0.01), "--scale 0.25"), (("--method.name", "lora", "--lr", 0.001), "has --lr 0.001 --lora_alpha 32"),
                              (("--method.name", "qlora", "--lora_alpha", 64), "best with --lr 0.001 --lora_alpha 128"), (("--method.name", "loftq", "--lr", 0.001, "--lora_alpha", 64), None),
                              (("--method.name", "loqt-nq"), None), ((), None)):
            result = program(*new_run(self.name(), *options, "--steps", 1))
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertEqual("did best" in result.stderr, said is not None, (options, result.stderr))
            self.assertIn(said or "", result.stderr)
        self.assertNotIn("did best", program("--config", "config.json", "--method.name", "full", "--plan").stderr)


class ReloraGapTest(ProgramTest):
    def test_what_is_said_of_restarts(self):
        for options, said in ((("--relora_gap", 2), None), (("--relora_gap", 2, "--merge_gap", 3), None), (("--relora_gap", 3), "relora without a restart"), (("--merge_gap", 2), "restarts every 6 steps, by method.relora_gap"),
                              (("--paper", "--data.train", "rows", "--data.val", "rows"), None)):  # its merge_gap is not one that was asked for
            steps = 6 if "--relora_gap" in options else 14
            result = program(*new_run(self.name(), "--method.name", "relora", "--lr", 0.001, "--lora_alpha", 64, "--relora_warmup", 1, "--steps", steps, *options))
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertEqual("relora_gap" in result.stderr, said is not None, (options, result.stderr))
            self.assertIn(said or "", result.stderr)


class PaperTest(ProgramTest):
    def test_paper_is_a_set_of_options_that_others_override(self):
        name = self.train("--paper", "--data.train", "rows", "--data.val", "rows", "--moments", "bf16", "--steps", 4)
        config = json.loads(read_text(name, "config.json"))
        self.assertEqual((config["optimizer"]["rounding"], config["train"]["gradients"], config["data"]["layout"]), ("nearest", "bf16", "rows"))
        self.assertTrue(config["eval"]["official_perplexity"])
        self.assertEqual((config["optimizer"]["moments"], config["optimizer"]["clip"], config["method"]["projection_gradient"]), ("bf16", 0, "last"))
        self.assertEqual((config["method"]["merge_gap"], config["method"]["merge_growth"]), (100, 1.2))
        config = json.loads(read_text(self.train("--paper", "--data.train", "rows", "--data.val", "rows", "--merge_gap", 3, "--steps", 4), "config.json"))
        self.assertEqual((config["method"]["merge_gap"], config["method"]["merge_growth"]), (3, 1.2))
        last = [e for e in metrics(name) if e["event"] == "eval"][-1]
        self.assertLess(float(last["perplexity_official_biased"]), float(last["perplexity"]))


class MetricsTest(ProgramTest):
    KEYS = {
        "start": "step device method parameters micro_batch effective_weights recompute merge_workers peak_tflops peak_source train_tokens planned_bytes",
        "train": "step loss lr grad_norm tokens tokens_per_s mfu full_rank_equivalent_tflops step_ms memory_bytes",
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

        # Gap k is tau + floor(psi^k), the first tau; no merge in the last tau steps.
        schedule, gap = [0], 3
        while schedule[-1] + gap + 3 < 20:
            schedule.append(schedule[-1] + gap)
            gap = 3 + math.floor(1.5 ** (len(schedule) - 1))
        self.assertEqual(steps(name, "merge"), schedule)
        self.assertEqual(steps(name, "train"), list(range(1, 21)))
        self.assertEqual(steps(name, "eval"), [0, 5, 10, 15, 20])
        self.assertEqual(steps(name, "checkpoint"), [3, 6, 9, 12, 15, 18, 20])
        for e in events:
            if e["event"] == "train":
                self.assertEqual(e["tokens"], e["step"] * 4 * 32)
                self.assertGreater(e["memory_bytes"], 0)
                # On a CPU there is no peak to be a share of.
                self.assertAlmostEqual(e["full_rank_equivalent_tflops"] / (6e-12 * events[0]["parameters"] * e["tokens_per_s"]), 1, places=9)
                self.assertEqual(e["mfu"] is None, DEVICE == "cpu")
            elif e["event"] == "start":
                self.assertEqual((e["peak_tflops"] is None, e["peak_source"] == ""), (DEVICE == "cpu",) * 2)
            elif e["event"] == "eval":
                self.assertAlmostEqual(math.log(e["perplexity"]), e["loss"], places=9)
                self.assertEqual(e["tokens"], 8 * 32)
            elif e["event"] == "merge":
                self.assertTrue(0 < e["quant_error"] < e["quant_error_uncompensated"] < 0.12 and 0 < e["captured_energy"] <= 1.0001, e)
                self.assertEqual((e["matrices"], e["failed"]), (14, 0))
                if e["step"] == 0:  # from the true weights: their NF4 round trip would quantize with hardly an error
                    self.assertGreater(e["quant_error_uncompensated"], 0.08)
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
        self.assertEqual(json.loads(metadata["config"]), json.loads(read_text(name, "config.json")))
        self.assertIn("model.layers.1.mlp.down_proj.weight.B", tensors)

    def test_config_round_trip(self):
        name = self.train("--steps", 2)
        again = self.name()
        self.succeed("--config", path(name, "config.json"), "--run.dir", again)
        first, second = (json.loads(read_text(n, "config.json")) for n in (name, again))
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
                    self.assertIn({"cuda": "planned for a GPU", "cpu": "planned for the CPU"}[device], result.stdout)
                    self.assertEqual(result.stderr, "")
                    result = self.succeed("--config", preset[:-5], "--device", device, "--plan", "--json", *budget, *micro_batch)
                    plan = json.loads(result.stdout)
                    self.assertEqual(sum(line["bytes"] for line in plan["lines"]), plan["total"])
                    self.assertLessEqual(plan["total"], plan["budget"] or plan["total"])
                    self.assertEqual((plan["run_dir"], plan["device"], plan["method"]), ("runs/" + preset[:-5], device, "loqt"))
                    self.assertEqual(plan["tokens_per_micro_batch"], plan["choices"]["train.micro_batch"]["value"] * plan["seq_len"])
                    self.assertEqual(plan["choices"]["train.micro_batch"]["auto"], not micro_batch)
                    self.assertIn(plan["choices"]["train.recompute"]["value"], ("none", "light", "block"))
                    with open(os.path.join(ROOT, "docs", "formats.md")) as f:
                        documented = f.read().split("## The plan as JSON")[1].split("\n## ")[0]
                    for name in (*plan, *plan["choices"], *plan["model"], *(f'"{line["name"]}"' for line in plan["lines"])):
                        self.assertIn(name, documented)
        self.assertFalse(os.path.exists(path("runs")))

    def test_plan_that_does_not_fit(self):
        # All sequences at once, which nobody asked for: a plan without a word about its budget would look like one that fits. So many fit into no GPU.
        self.mistake(("--config", "13b", "--device", "cuda", "--updates", "per_layer", "--batch", 16384, "--plan"), "does not fit", "it fits with --batch")
        self.mistake(("--config", "13b", "--device", "cuda", "--memory_budget", "24GiB", "--method", "relora", "--plan"), "does not fit", "it fits with --method loqt")
        arguments = ("--config", "13b", "--device", "cuda", "--memory_budget", "14GiB", "--plan")
        line = self.mistake((*arguments, "--json"), "does not fit", "14.00 GiB allowed", "it fits with --")
        advice = line.split("it fits with ")[1].split()
        self.assertIn("of 14.00 GiB allowed", self.succeed(*arguments, *advice).stdout)


class UseTest(ProgramTest):
    """What comes after training: export and samples."""

    def test_export_and_start_from_it(self):
        for method in ("full", "loqt", "loqt-nq", "galore", "lora", "relora", "qlora", "loftq"):
            with self.subTest(method):
                run, target = self.train("--method.name", method, "--relora_warmup", 2), self.name()
                self.succeed("--run.dir", run, "--export", target, "--export-dtype", "f32")
                self.mistake(("--run.dir", run, "--export", target), target, "not empty", before=("checkpoint ",))
                exported = json.loads(read_text(target, "config.json"))
                self.assertEqual((exported["hidden_size"], exported["num_key_value_heads"], exported["vocab_size"], exported["eos_token_id"]), (128, 1, 259, 1))
                self.mistake(new_run(self.name(), "--init-from", target, "--layers", 1), "--model.layers 1 contradicts", target)
                again = self.train("--method.name", "full", "--init-from", target, "--steps", 1)
                final, begin = float(series(run, "eval")[12]), float(series(again, "eval")[0])
                self.assertAlmostEqual(begin, final, delta=(1e-5 if DEVICE == "cpu" else 2e-3) * final)
                self.assertLess(final, 4)
                shutil.rmtree(path(target))  # the first merge is done: nothing of the imported model is needed any more
                self.succeed("--resume", "--run.dir", again, "--steps", 2)

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


if __name__ == "__main__":
    unittest.main()
