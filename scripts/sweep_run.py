"""One run of a sweep: what its folder says of it, and its process."""
import ctypes
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import time

from summary import read_config, read_events

# Keys that change no result: they may differ when a run goes on.
FREE_TO_CHANGE = re.compile(r"checkpoint\.|run\.(memory_budget|log_every)")
RESOLVED = re.compile(r"run\.|model\.kv_heads|train\.(micro_batch|recompute|effective_weights)")  # keys of config.json that the program fills in
SAME_SPEED = re.compile(r"checkpoint\.|eval\.|optimizer\.lr|method\.scale|train\.(seed|steps)|run\.log_every")  # keys that a step takes no longer for, or hardly
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


def lock(path, flags=os.O_RDONLY):
    """The descriptor that holds the lock on a file or folder; None if another process does."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass  # a file system without locks cannot tell
    return descriptor


def write_json(path, value):
    """Whole or not at all."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
    os.replace(path + ".new", path)


def read_json(path):
    """None where there is nothing to read."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def tail(path, size=16384):
    """The last lines of a file, [] if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - size))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def same_value(a, b):
    if a is None or b is None or a == b:
        return a == b
    try:
        return float(a) == float(b)
    except ValueError:
        return False


def words(options):
    """Options as the program's arguments."""
    return [word for key, value in options.items() for word in ([f"--{key}={value}"] if value else [f"--{key}", ""])]


class Run:
    """One run. state: waiting, running, done, failed, stopped, or refused, as its folder was made with other options."""

    def __init__(self, planned, sweep, title):
        self.name, self.title, self.options, self.turn, self.keep = planned.name, title, planned.options, planned.turn, sweep.keep
        self.folder = os.path.join(sweep.folder, self.name)
        self.log, self.record = self.folder + ".log", self.folder + ".json"
        self.configured, self.defaults = read_config(sweep.path), sweep.defaults
        self.made_with = {"config": sweep.config, "config_sha256": sweep.config_hash, "options": self.options}
        self.steps = float(self.options.get("train.steps") or self.configured.get("train.steps") or 0)
        self.what_counts_for_speed = (sweep.config, {key: value for key, value in self.options.items() if not SAME_SPEED.match(key)})
        self.state, self.detail, self.process, self.device = "waiting", "", None, None
        self.seconds_per_step = None  # of a finished run's last process, evaluations and merges included

    def begun(self):
        return os.path.exists(os.path.join(self.folder, "config.json"))

    def events(self):
        """The last few, newest first."""
        found = []
        for line in reversed(tail(os.path.join(self.folder, "metrics.jsonl"))):
            try:
                found.append(json.loads(line))
            except ValueError:  # cut short by a crash, or by the beginning of the tail
                pass
        return found

    def finished(self):
        return next((event.get("finished", False) for event in self.events()), False)

    def difference(self):
        """What the run's folder was made with and the sweep file now says otherwise; "" if nothing that counts."""
        made = read_json(self.record)
        if not self.begun():
            return ""
        if not made:
            return f"{self.folder} holds a run that this sweep did not begin"
        if (made["config"], made["config_sha256"]) != (self.made_with["config"], self.made_with["config_sha256"]):
            return f"made with another {made['config']}" if made["config"] == self.made_with["config"] else f"made with {made['config']}, now {self.made_with['config']}"
        for key in sorted({*made["options"], *self.options}):
            before, now = made["options"].get(key), self.options.get(key)
            if not FREE_TO_CHANGE.match(key) and not same_value(before, now):
                return f"made with {key} {before if before is not None else 'as the configuration has it'}, now {now if now is not None else 'as the configuration has it'}"
        return self.other_default()

    def other_default(self):
        """A setting that the run has from a program with another default; "" if there is none, or if the sweep's configuration cannot be read to tell.
        Such a run must not be averaged with new ones."""
        made = read_config(os.path.join(self.folder, "config.json")) if self.configured else {}
        if made.get("method.name") == "relora":
            made.setdefault("method.relora_gap", made.get("method.merge_gap"))  # a run from before the key, as train_loqt resumes it
        for key, value in made.items():
            ours = RESOLVED.match(key) or key.startswith("model.") and self.options.get("run.init_from", self.configured.get("run.init_from"))
            if not ours and key not in self.options and key not in self.configured and value != self.defaults.get(key, value):
                return f"made with {key} {value}, the default then; now it is {self.defaults[key]}"
        return ""

    def check(self):
        """Finished, refused, or waiting to be run."""
        difference = self.difference()
        if difference:
            self.state, self.detail = "refused", f"{difference}; remove {self.folder} to make it again, or take another --out"
        elif self.begun() and self.finished():
            self.finish()

    def finish(self):
        if self.keep == "metrics":
            shutil.rmtree(os.path.join(self.folder, "checkpoints"), ignore_errors=True)
        by_kind = read_events(self.folder)
        begun = max(by_kind.get("start", []) + by_kind.get("resume", []), key=lambda event: event["time"])["step"]
        end = by_kind["end"][-1]
        self.seconds_per_step = end["seconds"] / (end["step"] - begun) if end["step"] > begun else None
        evals = [event for event in self.events() if event["event"] == "eval"]
        perplexity = evals[0].get("perplexity") if evals else None
        self.state, self.detail = "done", f"validation perplexity {perplexity:.2f}" if perplexity is not None else "no validation perplexity"

    def arguments(self, device):
        resumed = self.begun()
        options = {k: v for k, v in self.options.items() if not resumed or FREE_TO_CHANGE.match(k)}
        begin = ["--resume"] if resumed else ["--config", self.made_with["config"]]
        return [*begin, *words(options), "--run.dir", self.folder, "--run.device", device]

    def start(self, program, device, environment):
        command, resumed = [program, *self.arguments(device)], self.begun()
        if not resumed:
            write_json(self.record, self.made_with)
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(time.strftime("--- %Y-%m-%d %H:%M:%S ") + " ".join(command) + "\n")
            log.flush()
            # In a session of its own Ctrl-C reaches it only through us. Should we be killed, it saves and leaves.
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
                                            preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGINT)))
        self.state, self.detail, self.device = "running", "resumed" if resumed else "begun", device

    def poll(self):
        """Follows a running process; True when it has ended."""
        status = self.process.poll()
        if status is None:
            step = next((event for event in self.events() if event["event"] == "train"), None)
            if step:
                limit = read_config(os.path.join(self.folder, "config.json")).get("train.steps", "?")
                loss = "not finite" if step["loss"] is None else f"{step['loss']:.4f}"
                self.detail = f"step {step['step']}/{limit}  loss {loss}"
            return False
        self.process = None
        if status == 0 and self.finished():
            self.finish()
        elif status == 0 or status == -signal.SIGINT:
            self.state, self.detail = "stopped", "will go on when the sweep is started again"
        else:
            said = [line for line in tail(self.log) if line.strip() and not line.startswith("--- ")]
            reason = f"killed by signal {-status}" if status < 0 else said[-1].strip() if said else f"exit status {status}"
            self.state, self.detail = "failed", f"{reason} ({self.log})"
        return True

    def line(self):
        return f"{self.state}{' on ' + self.device if self.state == 'running' else ''}{': ' if self.detail else ''}{self.detail}"
