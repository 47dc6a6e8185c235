"""What report.py tells about runs: the figures of one run, from its metrics.jsonl and config.json, and those of runs that differ only in their seed."""
import json
import math
import os
import re
import statistics

from merge_jumps import SAMPLES, MergeJumps
from summary import read_config, read_events

SPIKE_NATS, SPIKE_WINDOW, SPIKE_LEAST = 0.5, 50, 10
# Keys that leave the training and its evaluations as they are.
NO_DIFFERENCE = re.compile(r"train\.seed|run\.(dir|device|memory_budget|log_every)|checkpoint\.")


def interpolate(xs, ys, x):
    """Linear between points with rising xs; None outside."""
    for i in range(1, len(xs)):
        if xs[i - 1] <= x <= xs[i]:
            return ys[i - 1] + (ys[i] - ys[i - 1]) * ((x - xs[i - 1]) / (xs[i] - xs[i - 1]) if xs[i] > xs[i - 1] else 0.0)
    return None


def count_spikes(steps, warmup):
    """Steps after the warm-up whose loss exceeds the median of the 50 before by more than 0.5 nats."""
    losses, count = [], 0
    for step in steps:
        if step["loss"] is None:
            continue
        before = losses[-SPIKE_WINDOW:]
        if step["step"] > warmup and len(before) >= SPIKE_LEAST and step["loss"] > statistics.median(before) + SPIKE_NATS:
            count += 1
        losses.append(step["loss"])
    return count


def training_seconds(steps):
    """Seconds of training, evaluations and checkpoints left out, up to each line. Steps without a line count as the next line's."""
    total, last, sums = 0.0, 0, []
    for step in steps:
        total += step["step_ms"] * 1e-3 * (step["step"] - last)
        last = step["step"]
        sums.append(total)
    return sums


class Run:
    """Figures of one run directory. Raises OSError where it holds no metrics.jsonl."""

    def __init__(self, path):
        self.path, self.name = path, os.path.basename(os.path.abspath(path))
        self.config = read_config(os.path.join(path, "config.json"))
        events = read_events(path)
        self.steps, self.evals, self.merges = events.get("train", []), events.get("eval", []), events.get("merge", [])
        starts = sorted(events.get("start", []) + events.get("resume", []), key=lambda e: e["time"])
        self.method = starts[-1]["method"] if starts else "-"
        self.device = starts[-1].get("device", "an unnamed device") if starts else "an unnamed device"
        self.planned = starts[-1]["planned_bytes"] if starts else None
        self.seed = self.config.get("train.seed")
        self.step = self.steps[-1]["step"] if self.steps else 0
        self.step_limit = self.config.get("train.steps", self.step)
        self.tokens_per_step = self.steps[-1]["tokens"] / self.step if self.steps else 0
        self.peak = max((s["memory_bytes"] for s in self.steps), default=None)
        # A train line counts steps done, a merge line the step it happened in: line u + 1 contains merge u.
        merged = {m["step"] + 1 for m in self.merges}
        usual = [s for s in self.steps if s["step"] not in merged]
        self.rate = statistics.median(s["tokens_per_s"] for s in usual) if usual else None
        # What a merge costs is what its step takes longer. The first step is slow for other reasons too.
        usual_ms = statistics.median(s["step_ms"] for s in usual) if usual else 0.0
        self.merge_seconds = [(s["step_ms"] - usual_ms) * 1e-3 for s in self.steps if s["step"] in merged and s["step"] > 1] if usual else []
        self.merge_jumps = MergeJumps(self.steps, [m["step"] for m in self.merges], tuple(self.config.get(key) for key in SAMPLES) if self.config else self.path)
        self.skipped = self.steps[-1].get("skipped", 0) if self.steps else 0
        self.spikes = count_spikes(self.steps, self.config.get("optimizer.warmup_ratio", 0.1) * self.step_limit)
        self.step_axis = [0] + [s["step"] for s in self.steps]
        self.seconds = [0.0] + training_seconds(self.steps)

    def position(self, step, axis):
        """Where a step lies on an axis: "steps", "tokens", or "seconds" of training; None after the last line."""
        if axis == "seconds":
            return interpolate(self.step_axis, self.seconds, step)
        return step * (self.tokens_per_step if axis == "tokens" else 1)

    def perplexity_at(self, seconds):
        """Validation perplexity after so much training, its loss interpolated between the evaluations before and after; None if not both are there."""
        points = [(self.position(e["step"], "seconds"), e["loss"]) for e in self.evals if e["loss"] is not None]
        points = [p for p in points if p[0] is not None]
        loss = interpolate([p[0] for p in points], [p[1] for p in points], seconds)
        return None if loss is None else math.exp(loss)


def mean_and_error(values):
    """Mean, and its standard error: standard deviation (n − 1) over √n, None of a single value. (None, None) of no value."""
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


class Group:
    """Runs that differ only in their seed. planned_runs: how many there will be, if not all have begun."""

    def __init__(self, label, runs, planned_runs=None):
        self.label, self.runs, self.planned_runs = label, runs, planned_runs or len(runs)
        self.method = runs[0].method
        self.step = max(r.step for r in runs)
        self.step_limit = max(r.step_limit for r in runs)
        self.tokens_per_step = runs[0].tokens_per_step
        # Only runs that came equally far may be averaged.
        self.eval_step = max((r.evals[-1]["step"] for r in runs if r.evals), default=0)
        last = [(r.seed, r.evals[-1]["loss"]) for r in runs if r.evals and r.evals[-1]["step"] == self.eval_step and (self.eval_step or not r.step)]  # not the first one's of a run under way
        self.losses = [loss for _, loss in last if loss is not None]
        self.loss_of_seed = {seed: loss for seed, loss in last if loss is not None}
        self.loss, self.loss_error = mean_and_error(self.losses)
        self.perplexity, self.perplexity_error = mean_and_error([math.exp(x) for x in self.losses])
        self.eval_tokens = round(self.eval_step * self.tokens_per_step)
        rates = [r.rate for r in runs if r.rate is not None]
        self.rate = statistics.median(rates) if rates else None
        self.planned = max((r.planned for r in runs if r.planned is not None), default=None)
        self.peak = max((r.peak for r in runs if r.peak is not None), default=None)
        self.merges = max(len(r.merges) for r in runs)
        merge_seconds = [s for r in runs for s in r.merge_seconds]
        self.merge_seconds = statistics.median(merge_seconds) if merge_seconds else None
        self.merge_jump, self.merge_jump_error = mean_and_error([jump for r in runs for jump in r.merge_jumps.plain()])
        self.seconds = statistics.fmean(r.seconds[-1] for r in runs)
        self.skipped, self.spikes = sum(r.skipped for r in runs), sum(r.spikes for r in runs)

    def net_jumps(self, beside):
        """The jumps of all seeds less those of runs beside them (MergeJumps.net); None unless every run has something to compare with."""
        jumps = [run.merge_jumps.net([other.merge_jumps for other in beside]) for run in self.runs]
        return None if None in jumps else [jump for own in jumps for jump in own]

    def perplexity_at(self, seconds):
        """Mean and standard error over the seeds; (None, None) unless every run was evaluated both before and after."""
        values = [r.perplexity_at(seconds) for r in self.runs]
        return (None, None) if None in values else mean_and_error(values)

    def ratio_to(self, reference):
        """Perplexity over the reference's, after the same number of tokens; else None."""
        if not reference or None in (self.perplexity, reference.perplexity) or self.eval_tokens != reference.eval_tokens:
            return None
        return self.perplexity / reference.perplexity

    def ratio_error_to(self, reference):
        """Standard error of that ratio, seed by seed: of what each perplexity differs from ratio × the reference's of the same seed. None unless both have the
        same seeds, two or more."""
        ratio, own = self.ratio_to(reference), self.loss_of_seed
        if ratio is None or self is reference or own.keys() != reference.loss_of_seed.keys():
            return None
        _, error = mean_and_error([math.exp(own[seed]) - ratio * math.exp(reference.loss_of_seed[seed]) for seed in own])
        return None if error is None else error / reference.perplexity


def compare_merges(groups, beside):
    """Makes the merge_jump of all groups the net one (MergeJumps.net) if all can be compared with the runs beside. True if so."""
    jumps = [group.net_jumps(beside) for group in groups]
    if None in jumps or not any(jumps):
        return False
    for group, own in zip(groups, jumps):
        group.merge_jump, group.merge_jump_error = mean_and_error(own)
    return True


def group_runs(runs):
    """[Group] of runs whose config.json differ only in the seed and in what no result depends on, in the order given. Of a seed that is there twice the
    second run begins another group: repeating a run is not another seed."""
    members, seen = {}, {}
    for run in runs:
        key = json.dumps({k: v for k, v in run.config.items() if not NO_DIFFERENCE.match(k)}, sort_keys=True) if run.config else run.path
        repeat = seen[key, run.seed] = seen.get((key, run.seed), 0) + 1
        members.setdefault((key, repeat), []).append(run)
    labels = [common_name(group) for group in members.values()]
    return [Group(group[0].path if labels.count(label) > 1 else label, group) for label, group in zip(labels, members.values())]


def common_name(runs):
    """The run's name; of several what is left of it without the seed."""
    return runs[0].name if len(runs) == 1 else re.sub(r"[-_.]?seed[-_=]?\d+", "", runs[0].name) or runs[0].name
