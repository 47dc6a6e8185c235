"""Tests of data/tokenize.py and data/quickstart_text.py: python3 test/test_tokenize.py

Shards are read back here with struct and array alone and compared with ids worked out from the text.
"""
import array
import glob
import gzip
import importlib.util
import json
import lzma
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.join(ROOT, "data", "tokenize.py")
SEED = int(os.environ.get("LOQT_TEST_SEED", random.SystemRandom().randrange(2**32)))


def has(module):
    return importlib.util.find_spec(module) is not None


def byte_ids(text):
    return [b + 3 for b in text.encode("utf-8")]


def read_shard(path):
    with open(path, "rb") as f:
        data = f.read()
    magic, version, count = struct.unpack("<3i", data[:12])
    kind = {(20240520, 1): "H", (20240801, 7): "I"}[magic, version]
    tokens = array.array(kind)
    tokens.frombytes(data[1024:])
    assert len(tokens) == count and not any(data[12:1024]), path
    return list(tokens)


def random_documents(rng, count, longest=300):
    letters = "abcdefghij KLMNOP  .,'äπ漢😀"
    return ["".join(rng.choice(letters) for _ in range(rng.randrange(1, longest))).strip() or "x" for _ in range(count)]


class TokenizeTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.rng = random.Random(SEED)

    def path(self, name):
        return os.path.join(self.folder.name, name)

    def write(self, name, content):
        with open(self.path(name), "wb") as f:
            f.write(content if isinstance(content, bytes) else content.encode("utf-8"))
        return self.path(name)

    def jsonl(self, name, documents, key="text"):
        return self.write(name, "".join(json.dumps({"other": 1, key: d}, ensure_ascii=i % 2 == 0) + "\n" for i, d in enumerate(documents)))

    def run_script(self, *args, **kwargs):
        return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, encoding="utf-8", **kwargs)

    def tokenize(self, *args, out="out", **kwargs):
        result = self.run_script(*args, "--out", self.path(out), "--quiet", **kwargs)
        self.assertEqual(result.returncode, 0, result.stderr)
        return result

    def shards(self, split, out="out"):
        return [read_shard(p) for p in sorted(glob.glob(os.path.join(self.path(out), "*_%s_*.bin" % split)))]

    def files(self, out):
        """Every file that a run left, by name."""
        found = {}
        for name in os.listdir(self.path(out)):
            with open(os.path.join(self.path(out), name), "rb") as f:
                found[name] = f.read()
        return found

    def manifest(self, out="out"):
        with open(os.path.join(self.path(out), "manifest.json")) as f:
            return json.load(f)

    def check_error(self, args, *parts):
        result = self.run_script(*args)
        self.assertEqual(result.returncode, 2, (args, result.stdout, result.stderr))
        self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)
        for part in parts:
            self.assertIn(part, result.stderr)

    # ---- layouts ----

    def test_packed(self):
        documents = random_documents(self.rng, 200)
        source = self.jsonl("a.jsonl", documents[:120] + ["", "  \n"] + documents[120:])
        val = self.jsonl("v.jsonl", documents[:9])
        self.tokenize(source, "--val", val, "--tokenizer", "bytes", "--shard-tokens", 5000)
        shards = self.shards("train")
        self.assertEqual(sum(shards, []), sum((byte_ids(d) + [1] for d in documents), []))
        self.assertEqual(sum(self.shards("val"), []), sum((byte_ids(d) + [1] for d in documents[:9]), []))
        self.assertGreater(len(shards), 3)
        for shard in shards[:-1]:  # ends with the document that reaches 5000
            self.assertGreaterEqual(len(shard), 5000)
            self.assertLess(len(shard) - 1 - shard[:-1][::-1].index(1), 5000)
            self.assertEqual(shard[-1], 1)
        m = self.manifest()
        self.assertEqual((m["vocab_size"], m["eos_id"], m["pad_id"], m["layout"], m["seq_len"]), (259, 1, 0, "packed", None))
        self.assertEqual([s["tokens"] for s in m["splits"]["train"]["shards"]], list(map(len, shards)))
        self.assertEqual([s["documents"] for s in m["splits"]["train"]["shards"]], [s.count(1) for s in shards])
        self.assertEqual(m["splits"]["train"]["documents"], 200)
        self.assertEqual(m["splits"]["train"]["tokens"], sum(map(len, shards)))
        self.assertEqual(m["tokenizer"], {"kind": "bytes", "file": None, "sha256": None})
        self.assertEqual([n for n in os.listdir(self.path("out")) if not n.endswith(".bin")], ["manifest.json"])

    def test_rows(self):
        documents = ["", "abc", "x" * 15, "y" * 16, "z" * 17, "é" * 40, "end"]
        self.tokenize(self.jsonl("a.jsonl", documents), "--tokenizer", "bytes", "--layout", "rows", "--seq-len", 16, "--shard-tokens", 48)
        expected = []
        for d in documents[1:]:
            ids = (byte_ids(d) + [1])[:16]
            expected.append(ids + [0] * (16 - len(ids)))
        shards = self.shards("train")
        self.assertEqual(shards, [sum(expected[:3], []), sum(expected[3:], [])])
        m = self.manifest()
        self.assertEqual((m["layout"], m["seq_len"], m["splits"]["train"]["documents"]), ("rows", 16, 6))

    def test_documents_of_text_files(self):
        content = "\ufeffone\ntwo\r\n\r\n \nthree\n\n\nfour\n"
        source = self.write("a.txt", content)
        for mode, expected in [("line", ["one", "two", "three", "four"]), ("paragraph", ["one\ntwo", "three", "four"]),
                               ("file", ["one\ntwo\r\n\r\n \nthree\n\n\nfour"])]:
            self.tokenize(source, "--tokenizer", "bytes", "--document", mode, out=mode)
            self.assertEqual(self.shards("train", mode), [sum((byte_ids(d) + [1] for d in expected), [])], mode)

    def test_several_files_glob_and_key(self):
        for i in range(3):
            self.jsonl("part%d.jsonl" % i, ["doc %d" % i], key="body")
        self.tokenize(self.path("part*.jsonl"), self.write("b.txt", "tail"), "--text-key", "body", "--tokenizer", "bytes")
        self.assertEqual(self.shards("train"), [sum((byte_ids(d) + [1] for d in ["doc 0", "doc 1", "doc 2", "tail"]), [])])

    def test_compressed(self):
        documents = random_documents(self.rng, 30)
        plain = self.jsonl("a.jsonl", documents)
        with open(plain, "rb") as f:
            data = f.read()
        half = len(data) // 2
        sources = [self.write("a.jsonl.gz", gzip.compress(data[:half]) + gzip.compress(data[half:])), self.write("a.jsonl.xz", lzma.compress(data))]
        if has("zstandard"):
            import zstandard
            sources.append(self.write("a.jsonl.zst", zstandard.compress(data[:half]) + zstandard.compress(data[half:])))
        for i, source in enumerate(sources):
            self.tokenize(source, "--tokenizer", "bytes", out="o%d" % i)
            self.assertEqual(self.shards("train", "o%d" % i), [sum((byte_ids(d) + [1] for d in documents), [])], source)
        for source in sources:
            with open(source, "rb") as f:
                cut = self.write("cut" + os.path.basename(source), f.read()[:-9])
            if not cut.endswith(".zst"):  # its reader takes a short last frame for the end
                self.check_error([cut, "--tokenizer", "bytes", "--out", self.path("cut")], cut, "damaged or truncated")

    # ---- splits, limits, order ----

    def test_val_fraction_holds_out_whole_documents(self):
        documents = ["document number %d" % i for i in range(2000)]
        source = self.jsonl("a.jsonl", documents)
        self.tokenize(source, "--tokenizer", "bytes", "--val-fraction", 0.1, "--shard-tokens", 9000)
        found = {s: bytes(t - 3 if t != 1 else 10 for shard in self.shards(s) for t in shard).decode().splitlines() for s in ("train", "val")}
        self.assertEqual(sorted(found["train"] + found["val"]), sorted(documents))
        self.assertEqual(found["train"], [d for d in documents if d in set(found["train"])])  # in order
        self.assertTrue(140 < len(found["val"]) < 260, len(found["val"]))
        more = self.jsonl("b.jsonl", documents + ["another"] * 50)  # text that follows changes nothing
        self.tokenize(more, "--tokenizer", "bytes", "--val-fraction", 0.1, out="more")
        self.assertTrue(set(found["val"]) <= set(bytes(t - 3 if t != 1 else 10 for t in self.shards("val", "more")[0]).decode().splitlines()))

    def test_parallel_equals_serial(self):
        source = self.jsonl("a.jsonl", random_documents(self.rng, 6000))  # several chunks
        val = self.write("v.txt", "one\n\ntwo\n")
        for extra in (["--val-fraction", "0.05"], ["--val", val, "--layout", "rows", "--seq-len", "64"], ["--val-fraction", "0.3", "--max-tokens", "400000"]):
            outs = []
            for workers in (1, 2, 5):
                outs.append("w%d%s" % (workers, len(extra) + len(extra[1])))
                self.tokenize(source, "--tokenizer", "bytes", "--shard-tokens", 60000, "--workers", workers, *extra, out=outs[-1])
            self.assertGreater(len(self.shards("train", outs[0])), 3)
            for out in outs[1:]:
                self.assertEqual(self.files(outs[0]), self.files(out), (SEED, out))

    def test_limits(self):
        documents = ["%04d" % i for i in range(100)]  # five tokens each
        source = self.jsonl("a.jsonl", documents)
        self.tokenize(source, "--tokenizer", "bytes", "--max-tokens", 51, out="t")
        self.assertEqual(self.shards("train", "t"), [sum((byte_ids(d) + [1] for d in documents[:11]), [])])
        self.tokenize(source, "--tokenizer", "bytes", "--max-documents", 7, "--val", source, "--max-val-tokens", 10, out="d")
        self.assertEqual(self.shards("train", "d"), [sum((byte_ids(d) + [1] for d in documents[:7]), [])])
        self.assertEqual(self.shards("val", "d"), [sum((byte_ids(d) + [1] for d in documents[:2]), [])])

    # ---- interruption ----

    def killed(self, after, out, args, methods=("add",)):
        """Runs the script and kills it hard when it has called these methods of SplitWriter `after` times. Returns whether it was killed."""
        driver = (
            "import importlib.util, multiprocessing, os, signal, sys\n"
            "multiprocessing.set_start_method('fork')\n"
            "spec = importlib.util.spec_from_file_location('shards', %r)\n"
            "m = sys.modules['shards'] = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)\n"
            "calls = [0]\n"
            "def counting(method):\n"
            "    def call(self, *a):\n"
            "        calls[0] += 1\n"
            "        if calls[0] > %d: self.file and self.file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
            "        method(self, *a)\n"
            "    return call\n"
            "for name in %r: setattr(m.SplitWriter, name, counting(getattr(m.SplitWriter, name)))\n"
            "sys.exit(m.main(sys.argv[1:]))\n" % (SCRIPT, after, methods))
        result = subprocess.run([sys.executable, "-c", driver, *map(str, args), "--out", self.path(out), "--quiet"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.assertIn(result.returncode, (0, -signal.SIGKILL))
        return result.returncode != 0

    def test_resume_after_kill(self):
        source, val = self.jsonl("a.jsonl", random_documents(self.rng, 3000)), self.jsonl("v.jsonl", random_documents(self.rng, 400))
        for number, extra in enumerate((["--val", val], ["--val-fraction", "0.2"], ["--val-fraction", "0.2", "--max-tokens", "250000"])):
            args = [source, "--tokenizer", "bytes", "--shard-tokens", "20000", "--workers", number % 2 + 1, *extra]
            self.tokenize(*args, out="whole%d" % number)
            whole, out, kills = self.files("whole%d" % number), "cut%d" % number, 0
            while self.killed(self.rng.randrange(300, 1200), out, args):
                kills += 1
                for name, data in self.files(out).items():  # what is there under its name is whole
                    if name.endswith(".bin"):
                        self.assertEqual(data, whole[name], (SEED, name))
                self.assertLess(kills, 50, SEED)
            self.assertGreater(kills, 0)
            self.assertEqual(self.files(out), whole, SEED)

    def test_resume_at_every_shard_end(self):
        source = self.jsonl("a.jsonl", ["%03d" % i for i in range(60)])
        # 28 training documents of four tokens end with document 33, and 34 is held out: it must stay out after a resume too
        args = [source, "--tokenizer", "bytes", "--shard-tokens", "28", "--workers", 1, "--val-fraction", "0.3", "--max-tokens", "112"]
        self.tokenize(*args, out="whole")
        kills = 0
        while self.killed(kills, "cut%d" % kills, args, ("finish_shard", "complete")):
            self.tokenize(*args, out="cut%d" % kills)
            self.assertEqual(self.files("cut%d" % kills), self.files("whole"), kills)
            kills += 1
        self.assertGreaterEqual(kills, 6)

    def test_workers_leave_with_a_killed_parent(self):
        source = self.jsonl("a.jsonl", random_documents(self.rng, 3000))
        self.assertTrue(self.killed(500, "o", [source, "--tokenizer", "bytes", "--workers", 2]))
        begin = time.time()
        while any(self.path("o") in command for command in self.commands()):
            self.assertLess(time.time() - begin, 20)
            time.sleep(0.1)

    @staticmethod
    def commands():
        for path in glob.glob("/proc/[0-9]*/cmdline"):
            try:
                with open(path) as f:
                    yield f.read()
            except OSError:
                pass

    def test_finished_and_overwrite(self):
        source = self.jsonl("a.jsonl", ["one", "two"])
        args = [source, "--tokenizer", "bytes"]
        self.tokenize(*args, "--shard-tokens", 1)
        before = self.files("out")
        self.assertIn("nothing to do", self.tokenize(*args, "--shard-tokens", 1).stdout)
        self.assertEqual(self.files("out"), before)
        self.check_error([*args, "--out", self.path("out")], self.path("out"), "--overwrite")
        self.tokenize(*args, "--overwrite")
        self.assertEqual(len(self.shards("train")), 1)
        os.remove(os.path.join(self.path("out"), "text_train_000000.bin"))
        self.check_error([*args, "--out", self.path("out")], "text_train_000000.bin", "--overwrite")

    # ---- other sources and tokenizers ----

    def test_dataset_is_streamed(self):
        """With a stand-in for the datasets library that serves what load_dataset(name, config, split=, streaming=) is asked for."""
        self.write("datasets.py", (
            "class Stream:\n"
            "    def __init__(self, split, first=0): self.split, self.first = split, first\n"
            "    def skip(self, n): return Stream(self.split, self.first + n)\n"
            "    def __iter__(self): return ({'text': '%s %d' % (self.split, i), 'url': ''} for i in range(self.first, 10 ** 9))\n"
            "def load_dataset(name, config, split, streaming):\n"
            "    assert (name, config, streaming) == ('allenai/c4', 'en', True), name\n"
            "    return Stream(split)\n"))
        environment = dict(os.environ, PYTHONPATH=self.folder.name)
        self.tokenize("--dataset", "allenai/c4", "--tokenizer", "bytes", "--max-documents", 30, "--max-val-tokens", 100, env=environment)
        self.assertEqual(self.shards("train"), [sum((byte_ids("train %d" % i) + [1] for i in range(30)), [])])
        val = self.shards("val")[0]
        self.assertEqual(val, sum((byte_ids("validation %d" % i) + [1] for i in range(8)), []))
        self.assertEqual(self.manifest()["source"]["dataset"], "allenai/c4/en")
        result = self.run_script("--dataset", "nobody/nothing", "--tokenizer", "bytes", "--out", self.path("n"), env=environment)
        self.assertEqual((result.returncode, len(result.stderr.splitlines())), (2, 1), result.stderr)
        self.assertIn("nobody/nothing", result.stderr)

    def test_encode_and_decode_bytes(self):
        text = "Grüße, 世界 😀\nline"
        ids = self.run_script("--tokenizer", "bytes", "--encode", text)
        self.assertEqual(list(map(int, ids.stdout.split())), byte_ids(text))
        self.assertEqual(self.run_script("--tokenizer", "bytes", "--encode", "-", input=text).stdout, ids.stdout)
        for result in (self.run_script("--tokenizer", "bytes", "--decode", ids.stdout), self.run_script("--tokenizer", "bytes", "--decode", "-", input=ids.stdout)):
            self.assertEqual(result.stdout, text + "\n")
        self.assertEqual(self.run_script("--tokenizer", "bytes", "--decode", "0 75 1 2").stdout, "H\n")
        self.check_error(["--tokenizer", "bytes", "--decode", "3 259"], "'259'", "258")
        self.check_error(["--tokenizer", "bytes", "--decode", "x"], "'x'")

    @unittest.skipUnless(has("sentencepiece"), "the Python module sentencepiece is not installed")
    def test_sentencepiece(self):
        import sentencepiece
        documents = ["the cat sat on the mat number %d and ate %d fish" % (i, i * 7 % 31) for i in range(300)]
        corpus, model = self.write("corpus.txt", "\n".join(documents)), self.path("tiny.model")
        train = lambda prefix, **k: sentencepiece.SentencePieceTrainer.train(input=corpus, model_prefix=self.path(prefix), vocab_size=60, minloglevel=2, **k)
        train("tiny", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
        processor = sentencepiece.SentencePieceProcessor(model_file=model)
        self.tokenize(self.jsonl("a.jsonl", documents), "--tokenizer", model)
        self.assertEqual(self.shards("train"), [sum((processor.encode(d) + [1] for d in documents), [])])
        m = self.manifest()
        self.assertEqual((m["vocab_size"], m["tokenizer"]["kind"], m["tokenizer"]["file"]), (60, "sentencepiece", "tiny.model"))
        with open(model, "rb") as f:
            self.assertEqual(self.files("out")["tiny.model"], f.read())
        ids = self.run_script("--tokenizer", model, "--encode", documents[3]).stdout
        self.assertEqual(list(map(int, ids.split())), processor.encode(documents[3]))
        self.assertEqual(self.run_script("--tokenizer", model, "--decode", ids).stdout, documents[3] + "\n")
        train("nopad")  # SentencePiece's default: unk 0, bos 1, eos 2, no pad, as in Llama's
        rows = [self.path("a.jsonl"), "--layout", "rows", "--seq-len", 32, "--tokenizer", self.path("nopad.model")]
        self.check_error([*rows, "--out", self.path("r")], "nopad.model", "--pad-token")
        self.tokenize(*rows, "--pad-token", "<unk>", out="rows")
        self.assertEqual((self.manifest("rows")["pad_id"], self.manifest("rows")["eos_id"]), (0, 2))
        self.check_error([*rows, "--pad-token", "<nix>", "--out", self.path("r")], "<nix>")
        bad = self.write("bad.model", "nonsense")
        self.check_error([self.path("a.jsonl"), "--tokenizer", bad, "--out", self.path("r")], bad, "not a SentencePiece model")

    @unittest.skipUnless(has("tokenizers"), "the Python module tokenizers is not installed")
    def test_hugging_face(self):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        documents = ["the cat sat on the mat number %d and ate %d fish" % (i, i * 7 % 31) for i in range(300)]
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        bpe.train_from_iterator(documents, trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
                                                               initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        bpe.enable_truncation(4)  # a setting of the file that must not cut documents
        bpe.save(self.path("tokenizer.json"))
        bpe.no_truncation()
        self.tokenize(self.jsonl("a.jsonl", documents), "--tokenizer", self.path("tokenizer.json"))
        self.assertEqual(self.shards("train"), [sum((bpe.encode(d).ids + [0] for d in documents), [])])
        m = self.manifest()
        self.assertEqual((m["vocab_size"], m["eos_id"], m["pad_id"], m["tokenizer"]["kind"]), (bpe.get_vocab_size(), 0, None, "hf"))
        ids = self.run_script("--tokenizer", self.path("tokenizer.json"), "--encode", documents[5]).stdout
        self.assertEqual(self.run_script("--tokenizer", self.path("tokenizer.json"), "--decode", ids).stdout, documents[5] + "\n")

        words = {"w%d" % i: i for i in range(70000)}  # ids past 16 bits
        words.update({"<unk>": 70000, "[E]": 70001})
        large = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        large.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        large.save(self.path("large.json"))
        source = self.write("b.txt", "w1 w69999 nothing")
        self.check_error([source, "--tokenizer", self.path("large.json"), "--out", self.path("l")], "large.json", "--eos-token")
        self.tokenize(source, "--tokenizer", self.path("large.json"), "--eos-token", "[E]", out="large")
        self.assertEqual(self.shards("train", "large"), [[1, 69999, 70000, 70001]])
        with open(os.path.join(self.path("large"), "text_train_000000.bin"), "rb") as f:
            self.assertEqual(struct.unpack("<3i", f.read(12)), (20240801, 7, 4))
        bad = self.write("bad.json", "{}")
        self.check_error([source, "--tokenizer", bad, "--out", self.path("r")], bad, "tokenizer.json")

    # ---- errors ----

    def test_errors(self):
        good, out = self.jsonl("good.jsonl", ["text"]), ["--out", self.path("e")]
        common = ["--tokenizer", "bytes", *out]
        self.check_error([self.path("none.txt"), *common], "none.txt", "no such file")
        self.check_error([good, "--val", self.path("none.txt"), *common], "none.txt")
        self.check_error(common, "--dataset")
        self.check_error([good, "--tokenizer", "bytes"], "--out")
        self.check_error([good, *out], "--tokenizer")
        self.check_error([good, "--tokenizer", "words", *out], "words", ".model")
        self.check_error([good, "--tokenizer", self.path("x.model"), *out], "x.model", "no such file")
        self.check_error([good, *common, "--layout", "rows"], "--seq-len")
        self.check_error([good, *common, "--seq-len", "8"], "--seq-len 8")
        self.check_error([good, *common, "--layout", "rows", "--seq-len", "0"], "positive number", "'0'")
        self.check_error([good, *common, "--shard-tokens", "3000000000"], "3000000000")
        self.check_error([good, *common, "--val-fraction", "1.5"], "1.5")
        self.check_error([good, *common, "--val-fraction", "0.5", "--val", good], "--val-fraction 0.5")
        self.check_error([good, *common, "--val-fraction", "0.0001"], "no document fell into the val split", "--val-fraction")
        self.check_error([self.write("empty.txt", " \n\n"), *common], "train split", "no text")
        self.check_error([self.write("bad.jsonl", '{"text": "a"}\n{"text": \n'), *common], "bad.jsonl:2", "not JSON")
        self.check_error([self.write("list.jsonl", '["a"]\n'), *common], "list.jsonl:1", "list")
        self.check_error([self.jsonl("key.jsonl", ["a"], key="body"), *common], "key.jsonl:1", "'text'", "body", "--text-key")
        self.check_error([self.write("latin.txt", b"fine\n\nstra\xdfe\n"), *common], "latin.txt:3", "UTF-8", "0xdf")
        self.check_error([self.write("fake.jsonl.gz", "not gzip"), *common], "fake.jsonl.gz", "damaged")
        self.check_error([self.write("fake.jsonl.xz", "not xz"), *common], "fake.jsonl.xz", "damaged")
        self.check_error([good, "--tokenizer", "bytes", "--out", good], good)
        for module, flag in (("sentencepiece", "x.model"), ("tokenizers", "x.json")):
            if not has(module):
                self.check_error([good, "--tokenizer", self.write(flag, "x"), *out], "pip install " + module)
        if not has("datasets"):
            self.check_error(["--dataset", "allenai/c4", *common], "pip install datasets")

    def test_a_worker_error_is_one_line_too(self):
        source = self.jsonl("a.jsonl", random_documents(self.rng, 4000))
        with open(source, "ab") as f:
            f.write(b"oops\n")
        self.check_error([source, "--tokenizer", "bytes", "--workers", 3, "--quiet", "--out", self.path("e")], "a.jsonl:4001", "not JSON")

    def test_quickstart_text(self):
        script, target = os.path.join(ROOT, "data", "quickstart_text.py"), self.path("q/text.txt")
        result = subprocess.run([sys.executable, script, target], capture_output=True, text=True)
        if result.returncode == 0:
            with open(target, encoding="utf-8") as f:
                text = f.read()
            self.assertGreater(len(text), 1_000_000)
            self.assertEqual(len(result.stdout.splitlines()), 1)
            self.assertIn(format(len(text), ","), result.stdout)
            self.assertGreater(text.count("\n\n"), 100)
            if "Bible" in result.stdout:
                self.assertIn("And God said, Let there be light: and there was light. And God saw", text)
                self.assertFalse(any(c.isdigit() for c in text))
        else:  # a machine without enough text
            self.assertEqual((result.returncode, len(result.stderr.splitlines())), (2, 1), result.stderr)


if __name__ == "__main__":
    print("seed", SEED)
    unittest.main()
