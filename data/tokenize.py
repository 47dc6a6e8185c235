#!/usr/bin/env python3
"""Text to token shards.

    python3 data/tokenize.py books/*.txt --tokenizer bytes --val-fraction 0.02 --out data/shards/books
    python3 data/tokenize.py train.jsonl.xz --val val.jsonl.xz --tokenizer t5/spiece.model --out data/shards/t5
    python3 data/tokenize.py --dataset allenai/c4 --tokenizer t5/spiece.model --max-tokens 2000000000 --out data/shards/c4
    python3 data/tokenize.py --tokenizer t5/spiece.model --encode "A prompt"      (prints ids; --decode "71 9" prints text)

Writes OUT/NAME_train_000000.bin, ..., OUT/NAME_val_000000.bin, ... in the llm.c format (data/README.md), a copy of the tokenizer file and
OUT/manifest.json. A run that was interrupted continues when the same command is given again: finished shards are kept. The shards are the
same, byte for byte, whatever the number of workers and however often the run was interrupted. Bad input: one line on stderr, exit code 2.
"""
import sys

# This file has the name of a standard module that others (inspect, linecache) import: keep its folder off the import path.
sys.path = [p for p in sys.path if p != __file__.rpartition("/")[0]]

import argparse
import array
import collections
import concurrent.futures
import concurrent.futures.process
import glob
import gzip
import hashlib
import json
import lzma
import os
import shutil
import signal
import struct
import threading
import time
import zlib

FORMAT_VERSION = 1
CHUNK_BYTES = 1 << 18  # text handed to a worker at a time
PROGRESS_FILE = "tokenize_progress.json"


class InputError(Exception):
    """The user's mistake: one line that names the thing, the value and the remedy."""


def require(module, purpose):
    """Imports an optional module, or says how to install it."""
    try:
        return __import__(module)
    except ImportError:
        raise InputError("%s needs the Python module %s: python3 -m pip install %s" % (purpose, module, module))


# ---- Tokenizers: encode(str) -> ids, decode(ids) -> str, vocab_size, eos_id, pad_id (None: has none) ----


class ByteTokenizer:
    """ByT5's vocabulary (Xue et al. 2022) without its sentinels: pad 0, eos 1, unk 2, byte b is b + 3."""

    kind, vocab_size, pad_id, eos_id = "bytes", 259, 0, 1

    def encode(self, text):
        return [b + 3 for b in text.encode("utf-8")]

    def decode(self, ids):
        return bytes(i - 3 for i in ids if 3 <= i < 259).decode("utf-8", "replace")

    def token_id(self, token):
        return {"<pad>": 0, "</s>": 1, "<unk>": 2}.get(token)


class SentencePieceTokenizer:
    kind = "sentencepiece"

    def __init__(self, path):
        sentencepiece = require("sentencepiece", path)
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as e:
            raise InputError("%s: not a SentencePiece model (%s)" % (path, " ".join(str(e).split())))
        self.vocab_size = self.model.get_piece_size()
        self.eos_id, self.pad_id = (i if i >= 0 else None for i in (self.model.eos_id(), self.model.pad_id()))

    def encode(self, text):
        return self.model.encode(text)

    def decode(self, ids):
        return self.model.decode(ids)

    def token_id(self, token):
        i = self.model.piece_to_id(token)
        return i if self.model.id_to_piece(i) == token else None


class HuggingFaceTokenizer:
    kind = "hf"

    def __init__(self, path):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes here are the parallelism
        tokenizers = require("tokenizers", path)
        try:
            self.model = tokenizers.Tokenizer.from_file(path)
        except Exception as e:  # the library raises bare Exception
            raise InputError("%s: not a Hugging Face tokenizer.json (%s)" % (path, " ".join(str(e).split())))
        self.model.no_truncation()
        self.model.no_padding()
        self.vocab_size = max(self.model.get_vocab().values(), default=-1) + 1
        self.eos_id = self.first_of("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")
        self.pad_id = self.first_of("<pad>", "[PAD]", "<|pad|>", "<|padding|>")

    def first_of(self, *names):
        return next((i for i in map(self.token_id, names) if i is not None), None)

    def encode(self, text):
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.model.decode(ids)

    def token_id(self, token):
        return self.model.token_to_id(token)


def load_tokenizer(name, eos_token=None, pad_token=None):
    if name == "bytes":
        tokenizer = ByteTokenizer()
    elif not name.endswith((".model", ".json")):
        raise InputError("--tokenizer %s: give 'bytes', a SentencePiece .model file or a Hugging Face tokenizer .json file" % name)
    elif not os.path.isfile(name):
        raise InputError("--tokenizer %s: no such file" % name)
    else:
        tokenizer = (SentencePieceTokenizer if name.endswith(".model") else HuggingFaceTokenizer)(name)
    for flag, token, attribute in (("--eos-token", eos_token, "eos_id"), ("--pad-token", pad_token, "pad_id")):
        if token is not None:
            if tokenizer.token_id(token) is None:
                raise InputError("%s %s: not a token of %s" % (flag, token, name))
            setattr(tokenizer, attribute, tokenizer.token_id(token))
    return tokenizer


# ---- Reading documents. A document stays raw bytes here; the workers parse and tokenize. ----


def open_compressed(path, raw):
    """Bytes of a plain, .gz, .xz or .zst file; `raw` is the open file, whose position tells the progress."""
    if path.endswith(".gz"):
        return gzip.open(raw)
    if path.endswith(".xz"):
        return lzma.open(raw)
    if path.endswith(".zst"):
        import io
        return io.BufferedReader(require("zstandard", path).ZstdDecompressor().stream_reader(raw, read_across_frames=True), 1 << 20)
    return raw


def is_jsonl(path):
    stem, suffix = os.path.splitext(path)
    return (stem if suffix in (".gz", ".xz", ".zst") else path).endswith((".jsonl", ".json", ".ndjson"))


def split_documents(lines, mode):
    """(line number, bytes) of every document that is not blank; mode: line, paragraph (ended by blank lines) or file."""
    if mode == "line":
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line.rstrip(b"\r\n")
        return
    begin, parts = 1, []
    for number, line in enumerate(lines, 1):
        if mode == "paragraph" and not line.strip():
            if parts:
                yield begin, b"".join(parts).rstrip(b"\r\n")
            begin, parts = number + 1, []
        elif parts or line.strip():
            parts.append(line)
        else:
            begin = number + 1
    if parts:
        yield begin, b"".join(parts).rstrip()


class FileSource:
    """Documents of files, in the order of the files."""

    def __init__(self, paths, document_mode):
        self.paths, self.document_mode = paths, document_mode
        self.total_bytes = sum(os.path.getsize(p) for p in paths)
        self.done_bytes, self.raw = 0, None

    def documents(self, skip):
        """(index, origin, line, is JSON, bytes) from document `skip` on; index counts the documents of all files."""
        index = 0
        for path in self.paths:
            json_lines = is_jsonl(path)
            with open(path, "rb") as self.raw:
                try:
                    lines = open_compressed(path, self.raw)
                    for line, data in split_documents(lines, "line" if json_lines else self.document_mode):
                        if index >= skip:
                            yield index, path, line, json_lines, data[3:] if data.startswith(b"\xef\xbb\xbf") else data
                        index += 1
                except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as e:
                    raise InputError("%s: damaged or truncated compressed file (%s): fetch it again" % (path, e))
                except Exception as e:
                    if type(e).__name__ == "ZstdError":
                        raise InputError("%s: damaged or truncated compressed file (%s): fetch it again" % (path, e))
                    raise
                self.done_bytes += os.path.getsize(path)
                self.raw = None

    def fraction(self):
        position = self.raw.tell() if self.raw and not self.raw.closed else 0
        return min(1.0, (self.done_bytes + position) / max(1, self.total_bytes))


class DatasetSource:
    """Documents of a Hugging Face dataset, streamed (nothing is kept on disk)."""

    def __init__(self, name, config, split, text_key):
        self.name, self.config, self.split, self.text_key = name, config, split, text_key

    def documents(self, skip):
        datasets = require("datasets", "--dataset")
        origin = "%s (%s, %s)" % (self.name, self.config, self.split)
        try:
            stream = datasets.load_dataset(self.name, self.config, split=self.split, streaming=True)
            for index, row in enumerate(stream.skip(skip), skip):
                if self.text_key not in row:
                    raise InputError("no key '%s' (it has: %s): give --text-key" % (self.text_key, ", ".join(row)))
                yield index, origin, index, False, row[self.text_key].encode("utf-8", "replace")
        except Exception as e:  # wrong name, no network, a server that gave up: the library raises many kinds
            raise InputError("--dataset %s: %s (the same command continues)" % (origin, " ".join(str(e).split())[:300]))

    def fraction(self):
        return None  # unknown


def chunks(documents, end):
    """Groups documents of one origin: (first index, origin, is JSON, [(line, bytes)]), stopping before document `end`."""
    chunk, size = None, 0
    for index, origin, line, json_lines, data in documents:
        if index >= end:
            break
        if chunk and (chunk[1] != origin or size >= CHUNK_BYTES):
            yield chunk
            chunk = None
        if not chunk:
            chunk, size = (index, origin, json_lines, []), 0
        chunk[3].append((line, data))
        size += len(data)
    if chunk:
        yield chunk


# ---- Tokenizing, in worker processes ----


def held_out(index, fraction):
    """Whether document `index` belongs to the validation split: a hash of the index, so no other document matters."""
    return int.from_bytes(hashlib.blake2b(str(index).encode(), digest_size=8).digest(), "big") < fraction * 2.0**64


def document_text(origin, json_lines, text_key, line, data):
    where = "%s:%d" % (origin, line)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise InputError("%s: not UTF-8 (byte 0x%02x): convert the file, e.g. with iconv" % (where, data[e.start]))
    if not json_lines:
        return text
    try:
        record = json.loads(text)
    except ValueError as e:
        raise InputError("%s: not JSON (%s): one JSON object per line is expected" % (where, e))
    if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
        keys = ", ".join(list(record)[:8]) if isinstance(record, dict) else type(record).__name__
        raise InputError("%s: no text under key '%s' (it has: %s): give --text-key" % (where, text_key, keys))
    return record[text_key]


class ChunkTokenizer:
    """Settings of a pass, and what a worker does with a chunk."""

    def __init__(self, args, splits, skip):
        self.args, self.splits, self.skip = args, splits, skip  # skip[split]: documents before this index are done
        self.tokenizer = None

    def __call__(self, chunk):
        """[(document index, split, tokens)], and the tokens of all as one byte string. Blank documents are left out."""
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.args.tokenizer, self.args.eos_token, self.args.pad_token)
        first, origin, json_lines, documents = chunk
        entries, tokens = [], array.array(token_type(self.tokenizer.vocab_size))
        for index, (line, data) in enumerate(documents, first):
            split = self.splits[-1 if len(self.splits) > 1 and held_out(index, self.args.val_fraction) else 0]
            if index < self.skip[split]:
                continue
            text = document_text(origin, json_lines, self.args.text_key, line, data)
            if not text.strip():
                continue
            ids = self.tokenizer.encode(text.encode("utf-8", "replace").decode("utf-8"))  # JSON may hold lone surrogates
            ids.append(self.tokenizer.eos_id)
            if self.args.layout == "rows":
                ids = ids[: self.args.seq_len] + [self.tokenizer.pad_id] * (self.args.seq_len - len(ids))
            entries.append((index, split, len(ids)))
            tokens.extend(ids)
        return entries, tokens.tobytes()


def token_type(vocab_size):
    return "H" if vocab_size <= 65536 else "I"


worker_task = None


def start_worker(task):
    global worker_task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says what happened
    threading.Thread(target=leave_with_parent, args=(os.getppid(),), daemon=True).start()
    worker_task = task


def leave_with_parent(parent):
    """A worker whose parent was killed would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def run_task(chunk):
    return worker_task(chunk)


def tokenized(task, work, workers):
    """task(chunk) for every chunk, in order; in `workers` processes with a bounded number of chunks under way."""
    if workers == 1:
        yield from map(task, work)
        return
    with concurrent.futures.ProcessPoolExecutor(workers, initializer=start_worker, initargs=(task,)) as pool:
        pending = collections.deque()
        try:
            for chunk in work:
                pending.append(pool.submit(run_task, chunk))
                if len(pending) >= 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


# ---- Writing ----


def write_json(path, value):
    with open(path + ".part", "w") as f:
        json.dump(value, f, indent=1)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".part", path)


class SplitWriter:
    """Writes the shards of one split. `state` is what a resumed run needs to know, and is saved as each shard is finished:
    {"shards": [{file, tokens, documents}], "next_document": index, "complete": bool}."""

    def __init__(self, args, split, vocab_size, limit, state, save):
        self.prefix, self.args = "%s_%s" % (args.name, split), args
        self.itemsize, self.limit, self.state, self.save = array.array(token_type(vocab_size)).itemsize, limit, state, save
        self.file, self.tokens, self.documents = None, 0, 0  # of the shard being written
        self.total_tokens, self.total_documents = (sum(shard[key] for shard in state["shards"]) for key in ("tokens", "documents"))

    def full(self):
        return self.total_tokens >= self.limit

    def add(self, index, data):
        if self.file is None:
            self.path = os.path.join(self.args.out, "%s_%06d.bin" % (self.prefix, len(self.state["shards"])))
            self.file = open(self.path + ".part", "wb", buffering=1 << 20)
            self.file.write(bytes(1024))
        self.file.write(data)
        count = len(data) // self.itemsize
        self.tokens, self.documents = self.tokens + count, self.documents + 1
        self.total_tokens, self.total_documents = self.total_tokens + count, self.total_documents + 1
        if self.tokens >= self.args.shard_tokens:
            self.finish_shard(index + 1)

    def finish_shard(self, next_document):
        """A shard appears under its name only when it is whole."""
        magic, version = (20240520, 1) if self.itemsize == 2 else (20240801, 7)
        self.file.seek(0)
        self.file.write(struct.pack("<iiI", magic, version, self.tokens))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.path + ".part", self.path)
        self.state["shards"].append({"file": os.path.basename(self.path), "tokens": self.tokens, "documents": self.documents})
        self.state["next_document"] = next_document
        self.file, self.tokens, self.documents = None, 0, 0
        self.save()

    def complete(self, next_document):
        if self.file:
            self.finish_shard(next_document)
        self.state.update(next_document=next_document, complete=True)
        self.save()


class Progress:
    """One line on stderr: redrawn on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self, quiet):
        self.tty, self.quiet, self.drawn = sys.stderr.isatty(), quiet, False
        self.begin = self.last = time.time()
        self.first_tokens = None  # a resumed run starts with some; they do not count for the speed

    def update(self, label, fraction, documents, tokens, last=False):
        now = time.time()
        self.first_tokens = tokens if self.first_tokens is None else self.first_tokens
        if self.quiet or (not (last and self.tty) and now - self.last < (0.2 if self.tty else 10)):
            return
        self.last = now
        speed = (tokens - self.first_tokens) / max(now - self.begin, 1e-9) / 1e6
        line = "%s: %s documents, %s tokens, %.2f M tokens/s" % (label, format(documents, ","), format(tokens, ","), speed)
        if fraction is not None:
            filled = int(30 * fraction)
            line = ("[%s%s] " % ("#" * filled, "." * (30 - filled)) if self.tty else "") + "%3d%% %s" % (100 * fraction, line)
        sys.stderr.write("\r\x1b[K" + line if self.tty else line + "\n")
        sys.stderr.flush()
        self.drawn = self.tty

    def finish(self):
        if self.drawn:
            sys.stderr.write("\n")


def run_pass(args, source, splits, writers, end):
    """Tokenizes one source into one split, or into two (train first) with --val-fraction. Ends when the first split is full."""
    main = writers[splits[0]]
    if all(writers[s].state["complete"] for s in splits):
        return
    if main.full() or main.state["complete"]:
        end = main.state["next_document"]  # interrupted while finishing: the other split ends where this one did
    skip = {s: writers[s].state["next_document"] for s in splits}
    task = ChunkTokenizer(args, splits, skip)
    index = min(skip.values()) - 1
    results = tokenized(task, chunks(source.documents(min(skip.values())), end), args.workers)
    stop = False
    progress = Progress(args.quiet)
    progress.update(splits[0], None, main.total_documents, main.total_tokens)
    try:
        for entries, data in results:
            view, offset = memoryview(data), 0
            for index, split, count in entries:
                writer, size = writers[split], count * writers[split].itemsize
                if not writer.full():
                    writer.add(index, view[offset:offset + size])
                offset += size
                if split == splits[0] and main.full():
                    stop = True
                    break
            progress.update(splits[0], source.fraction(), main.total_documents, main.total_tokens)
            if stop:
                break
        progress.update(splits[0], None, main.total_documents, main.total_tokens, last=True)
    finally:
        progress.finish()
        results.close()
    for s in splits:
        if not writers[s].state["complete"]:
            writers[s].complete(max(index + 1, writers[s].state["next_document"]))


# ---- Command line ----


def expand(patterns):
    """Files of a list of paths and glob patterns; a pattern's matches are sorted."""
    paths = []
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else sorted(p for p in glob.glob(pattern) if os.path.isfile(p))
        if not found:
            raise InputError("%s: no such file" % pattern)
        paths += found
    return paths


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def positive(text):
    value = int(text.replace("_", ""))
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "positive number"  # argparse puts this name into its message


def parse_arguments(argv):
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise InputError(message + " (--help lists the options)")

    p = Parser(prog="tokenize.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("inputs", nargs="*", metavar="FILE", help="training text: .jsonl or text, plain or .gz, .xz, .zst; glob patterns allowed")
    p.add_argument("--dataset", metavar="NAME", help="instead of files: a Hugging Face dataset, streamed, e.g. allenai/c4")
    p.add_argument("--dataset-config", default="en", metavar="NAME", help="configuration of --dataset (default en)")
    p.add_argument("--tokenizer", required=True, help="bytes, a SentencePiece .model or a Hugging Face tokenizer .json")
    p.add_argument("--out", metavar="DIR", help="folder for the shards and manifest.json")
    p.add_argument("--name", default="text", help="shards are called NAME_train_000000.bin (default text)")
    p.add_argument("--val", nargs="+", default=[], metavar="FILE", help="validation text (with --dataset: its validation split is taken)")
    p.add_argument("--val-fraction", type=float, default=0.0, metavar="F", help="hold out this share of the documents for validation")
    p.add_argument("--text-key", default="text", metavar="KEY", help="JSON key that holds the text (default text)")
    p.add_argument("--document", choices=["line", "paragraph", "file"], default="paragraph",
                   help="what a document is in a text file (default paragraph: ended by a blank line)")
    p.add_argument("--layout", choices=["packed", "rows"], default="packed",
                   help="packed: documents end to end, each ended by eos (default); rows: one document per row of --seq-len tokens, padded")
    p.add_argument("--seq-len", type=positive, metavar="N", help="row length of --layout rows")
    p.add_argument("--shard-tokens", type=positive, default=100_000_000, metavar="N", help="a shard ends with the document that reaches N (default 100M)")
    p.add_argument("--max-tokens", type=positive, metavar="N", help="stop with the training document that reaches N tokens")
    p.add_argument("--max-documents", type=positive, metavar="N", help="read at most N training documents")
    p.add_argument("--max-val-tokens", type=positive, metavar="N", help="stop with the validation document that reaches N tokens (--dataset: default 10M)")
    p.add_argument("--eos-token", metavar="TOKEN", help="token that ends a document, where the tokenizer's own is not wanted or not known")
    p.add_argument("--pad-token", metavar="TOKEN", help="padding token, likewise")
    p.add_argument("--workers", type=positive, default=os.cpu_count() or 1, metavar="N", help="processes (default: all cores)")
    p.add_argument("--overwrite", action="store_true", help="replace what an earlier run with other settings left in --out")
    p.add_argument("--quiet", action="store_true", help="no progress")
    p.add_argument("--encode", metavar="TEXT", help="only print the ids of TEXT ('-': of stdin), without eos")
    p.add_argument("--decode", metavar="IDS", help="only print the text of space separated IDS ('-': of stdin)")
    args = p.parse_intermixed_args(argv)
    if args.encode is not None or args.decode is not None:
        return args
    if bool(args.inputs) == bool(args.dataset):
        raise InputError("give text files or --dataset NAME, and not both")
    if not args.out:
        raise InputError("--out DIR is missing: where should the shards go?")
    if not 0 <= args.val_fraction < 1:
        raise InputError("--val-fraction %g: must be at least 0 and below 1" % args.val_fraction)
    if args.val_fraction and (args.val or args.dataset):
        raise InputError("--val-fraction %g: not together with --val or --dataset, which bring their own validation text" % args.val_fraction)
    if (args.layout == "rows") != (args.seq_len is not None):
        raise InputError("--layout rows needs --seq-len N" if args.layout == "rows" else "--seq-len %d: only for --layout rows; packed shards serve any length" % args.seq_len)
    if args.shard_tokens > 2_000_000_000:
        raise InputError("--shard-tokens %d: at most 2000000000 (the header counts tokens in 31 bits)" % args.shard_tokens)
    return args


def convert(args):
    """--encode and --decode: what the sampler of train_loqt calls for tokenizers that it does not read itself."""
    tokenizer = load_tokenizer(args.tokenizer)
    if args.encode is not None:
        text = sys.stdin.buffer.read().decode("utf-8", "replace") if args.encode == "-" else args.encode
        print(*tokenizer.encode(text))
        return
    words = (sys.stdin.read() if args.decode == "-" else args.decode).split()
    bad = next((w for w in words if not w.isdecimal() or int(w) >= tokenizer.vocab_size), None)
    if bad is not None:
        raise InputError("--decode: '%s' is not a token id of %s (0 to %d)" % (bad, args.tokenizer, tokenizer.vocab_size - 1))
    sys.stdout.buffer.write((tokenizer.decode([int(w) for w in words]) + "\n").encode("utf-8", "replace"))


def settings_of(args, tokenizer, inputs, val_files):
    """Everything that the shards depend on; two runs with equal settings write equal shards."""
    files = [[os.path.abspath(p), os.path.getsize(p), os.stat(p).st_mtime_ns] for p in inputs + val_files]
    kept = ("dataset", "dataset_config", "name", "val_fraction", "text_key", "document", "layout", "seq_len", "shard_tokens",
            "max_tokens", "max_documents", "max_val_tokens")
    settings = {k: getattr(args, k) for k in kept}
    settings.update(format_version=FORMAT_VERSION, files=files, val_files=len(val_files), eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id,
                    tokenizer=tokenizer.kind if args.tokenizer == "bytes" else sha256(args.tokenizer))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def read_json(path):
    try:
        with open(path) as f:
            return json.load(f)
    except FileNotFoundError:
        return None
    except ValueError:
        raise InputError("%s: not valid JSON: delete it, or give --overwrite" % path)


def prepare_out(args, settings):
    """Creates --out. Returns the progress of an interrupted run with the same settings, or None; "done" if it is finished."""
    os.makedirs(args.out, exist_ok=True)
    manifest_path, progress_path = (os.path.join(args.out, f) for f in ("manifest.json", PROGRESS_FILE))
    if args.overwrite:
        shards = os.path.join(glob.escape(args.out), glob.escape(args.name))
        for path in glob.glob(shards + "_train_[0-9]*.bin*") + glob.glob(shards + "_val_[0-9]*.bin*") + [manifest_path, progress_path]:
            if os.path.exists(path):
                os.remove(path)
        return None
    manifest, progress = read_json(manifest_path), read_json(progress_path)
    for found in (progress, manifest and manifest.get("source", {})):
        if found and found.get("settings") != settings:
            raise InputError("%s: holds shards of a run with other settings or inputs: give another --out, or --overwrite to replace them" % args.out)
    if manifest:
        for split in manifest["splits"].values():
            for shard in split["shards"]:
                if not os.path.exists(os.path.join(args.out, shard["file"])):
                    raise InputError("%s: %s of its manifest is missing: give --overwrite to write all shards again" % (args.out, shard["file"]))
        return "done"
    return progress


def tokenize(args):
    inputs, val_files = expand(args.inputs), expand(args.val)
    tokenizer = load_tokenizer(args.tokenizer, args.eos_token, args.pad_token)
    if tokenizer.eos_id is None:
        raise InputError("%s: no end-of-document token known: name one with --eos-token" % args.tokenizer)
    if args.layout == "rows" and tokenizer.pad_id is None:
        raise InputError("%s: has no pad token, which --layout rows needs: name one with --pad-token, or use --layout packed" % args.tokenizer)
    settings = settings_of(args, tokenizer, inputs, val_files)
    progress_state = prepare_out(args, settings)
    if progress_state == "done":
        print("%s: already tokenized with these settings, nothing to do" % args.out)
        return
    state = progress_state or {"settings": settings, "splits": {}}
    split_names = ["train"] + (["val"] if val_files or args.dataset or args.val_fraction else [])
    writers = {}
    for split in split_names:
        split_state = state["splits"].setdefault(split, {"shards": [], "next_document": 0, "complete": False})
        limit = args.max_tokens if split == "train" else args.max_val_tokens or (10_000_000 if args.dataset else None)
        writers[split] = SplitWriter(args, split, tokenizer.vocab_size, limit or sys.maxsize, split_state,
                                     lambda: write_json(os.path.join(args.out, PROGRESS_FILE), state))

    def source(split):
        if args.dataset:
            return DatasetSource(args.dataset, args.dataset_config, "train" if split == "train" else "validation", args.text_key)
        return FileSource(inputs if split == "train" else val_files, args.document)

    end = args.max_documents or sys.maxsize
    passes = [(["train", "val"], end)] if args.val_fraction else [([s], end if s == "train" else sys.maxsize) for s in reversed(split_names)]
    for splits, last in passes:
        run_pass(args, source(splits[0]), splits, writers, last)

    for split in split_names:
        if not writers[split].total_tokens:
            os.remove(os.path.join(args.out, PROGRESS_FILE))
            raise InputError("no document fell into the %s split: %s" % (split, "raise --val-fraction, or give --val FILE" if args.val_fraction else "the input holds no text"))
    manifest = {
        "format_version": FORMAT_VERSION,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "tokenizer": {"kind": tokenizer.kind, "file": None, "sha256": None},
        "layout": args.layout,
        "seq_len": args.seq_len,
        "splits": {s: {"tokens": w.total_tokens, "documents": w.total_documents, "shards": w.state["shards"]} for s, w in writers.items()},
        "source": {"dataset": args.dataset and "%s/%s" % (args.dataset, args.dataset_config), "files": [os.path.basename(p) for p in inputs],
                   "val_files": [os.path.basename(p) for p in val_files], "val_fraction": args.val_fraction, "settings": settings},
    }
    if args.tokenizer != "bytes":
        copy = os.path.join(args.out, os.path.basename(args.tokenizer))
        if not (os.path.exists(copy) and os.path.samefile(copy, args.tokenizer)):
            shutil.copyfile(args.tokenizer, copy)
        manifest["tokenizer"].update(file=os.path.basename(copy), sha256=sha256(copy))
    write_json(os.path.join(args.out, "manifest.json"), manifest)
    os.remove(os.path.join(args.out, PROGRESS_FILE))
    for split, writer in writers.items():
        print("%s: %s documents, %s tokens, %d shard%s in %s" % (split, format(writer.total_documents, ","), format(writer.total_tokens, ","),
              len(writer.state["shards"]), "s" if len(writer.state["shards"]) != 1 else "", args.out))


def main(argv):
    try:
        args = parse_arguments(argv)
        convert(args) if args.encode is not None or args.decode is not None else tokenize(args)
        return 0
    except (InputError, OSError) as e:
        print("tokenize.py: error: %s" % e, file=sys.stderr)
        return 2
    except concurrent.futures.process.BrokenProcessPool:
        print("tokenize.py: error: a worker process died (out of memory?): the same command continues; try fewer --workers", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tokenize.py: interrupted; the same command continues from the last finished shard", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
