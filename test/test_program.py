"""Tests of the program: it survives what can happen to a run, and trains by every method.

python3 test/test_program.py [CLASS[.TEST]], after make or make cpu. See program.py for settings.
"""
import glob
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import time
import unittest

from program import (checkpoint, checkpoints, DEVICE, ENVIRONMENT, KILLS, metrics, new_run, non_finite, path, PROGRAM, ProgramTest, read_safetensors, read_text,
                     SEED, series, setUpModule, start, steps)


class KillTest(ProgramTest):
    """kill -9 at random moments, and what else can interrupt a run."""

    def kill_once(self, name, startup):
        """Starts or resumes the run and kills it at a random moment; False if it came to its end before."""
        log, fresh = path(name, "metrics.jsonl"), not os.path.exists(path(name, "config.json"))
        lines = lambda: read_text(log).count("\n") if os.path.exists(log) else 0
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
        self.assertGreater(len(steps(reference, "merge")), 4)
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
        lines = read_text(name, "metrics.jsonl").splitlines(keepends=True)
        cut = next(i for i, line in enumerate(lines) if '"train"' in line and '"step": 11' in line)
        with open(path(name, "metrics.jsonl"), "w") as f:
            f.write("".join(lines[:cut]) + lines[cut][:self.rng.randrange(1, len(lines[cut]) - 1)])
        self.succeed("--resume", "--run.dir", name)
        self.assert_same_run(name, reference)
        total = read_text(name, "metrics.jsonl").count("\n")
        self.assertEqual(len(metrics(name)), total - 1)  # every line but the cut one can be read

    def test_relora_run_from_before_relora_gap(self):
        reference = self.train("--method.name", "relora", "--relora_gap", 4, "--relora_warmup", 2, "--checkpoint.every", 2, "--keep_last", 9)
        self.assertEqual(steps(reference, "merge"), [4])
        name = self.copy_until(reference, 2)
        stored = json.loads(read_text(name, "config.json"))
        del stored["method"]["relora_gap"]
        stored["method"]["merge_gap"] = 4  # what restarts went by then
        with open(path(name, "config.json"), "w") as f:
            json.dump(stored, f)
        self.succeed("--resume", "--run.dir", name)
        self.assert_same_run(name, reference)

    def test_run_of_another_method_from_before_relora_gap(self):
        config = json.loads(read_text("config.json"))
        del config["method"]["relora_gap"]
        with open(path("old.json"), "w") as f:
            json.dump(config, f)
        name = self.copy_until(self.train("--config", "old.json"), 6)
        stored = json.loads(read_text(name, "config.json"))
        del stored["method"]["relora_gap"]
        with open(path(name, "config.json"), "w") as f:
            json.dump(stored, f)
        self.assertEqual(self.succeed("--config", "old.json", "--resume", "--run.dir", name).stderr, "")  # no difference to speak of

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

    def test_repeated_signals_still_save(self):
        for which in (signal.SIGTERM, signal.SIGINT):  # launchers send pairs; fingers stutter
            name = self.name()
            process = start(*new_run(name, "--steps", 150, "--eval.every", 0, "--checkpoint.every", 0))
            while process.poll() is None and not (os.path.exists(path(name, "metrics.jsonl")) and len(series(name)) > 2):
                time.sleep(0.001)
            for _ in range(3):
                process.send_signal(which)
                time.sleep(0.02)
            output, errors = process.communicate(timeout=60)
            self.assertEqual((process.returncode, errors), (0, ""))
            self.assertTrue(os.path.exists(checkpoint(name, metrics(name)[-1]["step"])))

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
                self.assertEqual(json.loads(read_text(name, "config.json"))["train"]["micro_batch"], micro_batch)  # for the next resume

    def test_resume_with_other_data_says_so(self):
        name = self.train()
        result = self.succeed("--resume", "--run.dir", name, "--steps", 14, "--data.train", "shards/text_val_000000.bin")
        self.assertIn("other data than the checkpoint saw", result.stderr)
        self.assertEqual(self.succeed("--resume", "--run.dir", name, "--steps", 16).stderr, "")

    def test_a_reader_of_the_output_may_leave(self):
        name = self.name()
        process = start(*new_run(name))
        process.stdout.close()
        self.assertEqual((process.wait(60), process.stderr.read()), (0, ""))
        process.stderr.close()
        self.assertEqual(max(series(name)), 12)

    def test_a_finished_run_has_nothing_to_resume(self):
        name = self.train()
        before = series(name), checkpoints(name)
        again = self.succeed("--resume", "--run.dir", name)
        self.assertEqual((series(name), checkpoints(name)), before)
        self.assertIn("already finished: ", again.stdout)
        before = read_text(name, "config.json")
        self.mistake(("--resume", "--run.dir", name, "--steps", 5), "train.steps: 5", "12 steps already")
        self.assertEqual(read_text(name, "config.json"), before)


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
        for method in ("lora", "galore"):
            with self.subTest(method):
                name, other = (self.train("--steps", 3, "--method", method, "--rank", rank) for rank in (32, 8))
                shutil.copy(checkpoint(other, 3), checkpoint(name, 3))
                self.mistake(("--resume", "--run.dir", name), "step-00000003.safetensors", "method.rank")
        name = self.train("--steps", 3)
        self.mistake(("--resume", "--run.dir", name, "--scale", 0.25), "--resume cannot change method.scale")

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
            cp -r small/run """ + self.name() + "; exit 0"
        result = subprocess.run(["unshare", "-rm", "sh", "-c", script, PROGRAM], cwd=path(), env=ENVIRONMENT,
                                capture_output=True, text=True) if shutil.which("unshare") else None
        if not result or result.returncode in (1, 77):
            self.skipTest("cannot mount a small file system here")
        lines = read_text("errors").splitlines()
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
        for options in ((), ("--clip", 0), ("--method.name", "full"), ("--moments", "int8", "--method.name", "loqt-nq")):
            name = self.name()
            line = self.mistake(new_run(name, *options, "--lr", 1e30), "not finite", "lr")
            step = int(re.search(r"step (\d+)", line)[1])
            event = next(e for e in metrics(name) if e["event"] == "nonfinite")
            self.assertEqual((event["step"], event["policy"]), (step, "stop"))
            self.assertEqual(max(series(name)), step)  # steps done
            self.assertEqual(checkpoints(name)[-1], os.path.basename(checkpoint(name, step)))
            self.assertEqual(non_finite(checkpoint(name, step)), [])

    @unittest.skipUnless(DEVICE == "cpu", "where bf16 overflows is another matter")
    def test_stop_after_updates_inside_the_backward_pass(self):
        # At some of these learning rates the loss stays finite for a step while the gradient does not (with most data): what was updated by then is not saved.
        for lr in (1e20, 1e22, 1e25, 1e28, 1e31):
            name = self.name()
            line = self.mistake(new_run(name, "--updates", "per_layer", "--clip", 0, "--micro_batch", "auto", "--lr", lr, "--warmup_ratio", 0, "--checkpoint.every", 1), "not finite")
            self.assertNotIn("clip", line)  # which updates per layer refuse
            last = re.search(r"the checkpoint of step (\d+) is the last", line)
            step = int((last or re.search(r"step (\d+)", line))[1])
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


class MethodTest(ProgramTest):
    """Every method and storage format trains, is deterministic, and resumes exactly."""

    VARIANTS = {
        "loqt": (), "loqt-nq": ("--method.name", "loqt-nq"), "full": ("--method.name", "full"),
        "galore": ("--method.name", "galore", "--scale", 1), "galore reset": ("--method.name", "galore", "--scale", 1, "--moments_at_merge", "reset", "--moments", "int8"),
        "galore per layer": ("--method.name", "galore", "--scale", 1, "--updates", "per_layer", "--clip", 0, "--micro_batch", 4),
        "bf16 P": ("--quantize_projection", "false"), "lora": ("--method.name", "lora"), "qlora": ("--method.name", "qlora", "--effective_weights", "factored"), "loftq": ("--method.name", "loftq"),
        "relora": ("--method.name", "relora", "--relora_gap", 3, "--relora_warmup", 2), "relora int8": ("--method.name", "relora", "--relora_gap", 3, "--relora_warmup", 2, "--moments", "int8"),
        "clipped": ("--clip", 0.1), "unclipped": ("--clip", 0),
        "block": ("--recompute", "block"), "none": ("--recompute", "none"),
        "bf16": ("--moments", "bf16"), "bf16-nearest": ("--moments", "bf16-nearest"), "int8": ("--moments", "int8"),
        "nearest": ("--rounding", "nearest"), "stochastic": ("--rounding", "stochastic"), "master": ("--rounding", "master"),
        "subspace": ("--projection", "subspace"), "last": ("--projection_gradient", "last"), "one micro-batch": ("--micro_batch", 4),
        "reset": ("--moments_at_merge", "reset"), "project": ("--moments_at_merge", "project"),
        "project int8": ("--moments_at_merge", "project", "--moments", "int8"), "single quantization": ("--double_quant", "false"),
        "no compensation": ("--compensation_rounds", 0), "bf16 gradients": ("--gradients", "bf16"), "rebuilt": ("--effective_weights", "rebuilt"),
        "factored": ("--effective_weights", "factored"), "factored nq": ("--effective_weights", "factored", "--method.name", "loqt-nq"),
        "per layer": ("--updates", "per_layer", "--clip", 0, "--micro_batch", "auto"), "int8 gradients": ("--gradients", "int8"), "int8 gradients, unclipped": ("--gradients", "int8", "--clip", 0),
        "none again": ("--recompute", "none", "--effective_weights", "factored"), "blocks again": ("--recompute", "block"),
        "rows": ("--data.train", "rows", "--data.val", "rows", "--data.layout", "rows"),
    }

    def test_variants(self):
        share, of = map(int, os.environ.get("LOQT_TEST_SHARE", "0/1").split("/"))  # every of-th: gpu_program.sh runs several at once
        for title, options in list(self.VARIANTS.items())[share::of]:
            with self.subTest(title):
                options = ("--steps", 8, "--merge_gap", 3, "--checkpoint.every", 1, *options)
                first, second = self.train(*options), self.train(*options)
                merges = {"full": [], "lora": [], "qlora": [], "loftq": [], "relora": [3]}.get(title.split()[0], [0, 3])
                self.assertEqual(steps(first, "merge"), merges)
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

    def test_8_bit_moments_are_stored_as_such(self):
        run = self.train("--steps", 3, "--moments", "int8")
        tensors, _ = read_safetensors(checkpoint(run, 3))
        name = "model.layers.0.mlp.up_proj.weight.B.adam_v"
        self.assertEqual((tensors[name][0], tensors[name + ".absmax"][0]), ("U8", "F32"))

    def test_same_loss_however_effective_weights_are_kept(self):
        cached, rebuilt = (self.train("--effective_weights", way) for way in ("cached", "rebuilt"))
        self.assert_same_run(cached, rebuilt)
        factored = series(self.train("--effective_weights", "factored"))
        for step, loss in series(cached).items():
            self.assertAlmostEqual(float(factored[step]), float(loss), delta=0.02)


if __name__ == "__main__":
    unittest.main()
