#!/usr/bin/env python3
"""Says how far the training losses of runs lie apart, step by step: for a change that should leave results alone.

    python3 scripts/compare_runs.py runs/before runs/after ...

The first run is the reference. For each other one: mean and largest difference of the loss within stretches of steps, the same of the gradient
norm, the first step whose loss differs at all, and the validation losses at the last common evaluation.
"""
import argparse
import math
import sys

from summary import read_events


def series(events, event, field):
    return {e["step"]: e[field] for e in events.get(event, []) if e.get(field) is not None}


def stretches(last):
    """Ends of the stretches of steps that are reported apart: early steps move most."""
    return [end for end in (10, 100, 300, 1000, 3000, 10000, 30000) if end < last] + [last]


def compare(reference, other):
    """Lines that say how `other`'s events differ from `reference`'s."""
    a, b = series(reference, "train", "loss"), series(other, "train", "loss")
    common = sorted(a.keys() & b.keys())
    if not common:
        return ["no common step"]
    lines = []
    begin = common[0] - 1
    norms_a, norms_b = series(reference, "train", "grad_norm"), series(other, "train", "grad_norm")
    for end in stretches(common[-1]):
        steps = [s for s in common if begin < s <= end]
        if not steps:
            continue
        d = [b[s] - a[s] for s in steps]
        ratio = [abs(norms_b[s] / norms_a[s] - 1) for s in steps if norms_a.get(s) and s in norms_b]
        lines.append(f"steps {steps[0]:>6} to {steps[-1]:>6}   loss: mean {sum(d) / len(d):+.5f}, largest {max(map(abs, d)):.5f}"
                     + (f"   gradient norm: within {max(ratio):.1%}" if ratio else ""))
        begin = end
    different = [s for s in common if a[s] != b[s]]
    lines.append(f"first different loss at step {different[0]}" if different else f"the same bits in all {len(common)} common steps")
    eval_a, eval_b = series(reference, "eval", "loss"), series(other, "eval", "loss")
    if eval_a.keys() & eval_b.keys():
        step = max(eval_a.keys() & eval_b.keys())
        lines.append(f"validation loss at step {step}: {eval_a[step]:.4f} and {eval_b[step]:.4f}, perplexity {math.exp(eval_a[step]):.2f} and {math.exp(eval_b[step]):.2f}")
    return lines


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference")
    parser.add_argument("runs", nargs="+")
    args = parser.parse_args(arguments)
    runs = {}
    for run in [args.reference, *args.runs]:
        try:
            runs[run] = read_events(run)
        except OSError as error:
            print(f"{run}: {error.strerror}", file=sys.stderr)
            return 1
    for run in args.runs:
        print(f"{run} against {args.reference}")
        for line in compare(runs[args.reference], runs[run]):
            print("  " + line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
