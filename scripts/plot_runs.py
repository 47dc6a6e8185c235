#!/usr/bin/env python3
"""Compares runs: prints a Markdown table from their metrics.jsonl, and with -o draws their loss curves into one PNG.

Usage: plot_runs.py RUN_DIR... [-o loss.png]
Table: last validation loss and perplexity, median tokens/s of the steps that did not merge, memory as planned and at its peak, merges.
Picture (needs matplotlib): training loss, smoothed; evaluations as dots; a tick at the bottom for every merge.
"""
import argparse
import os
import statistics
import sys

from summary import read_events

COLUMNS = ("run", "method", "steps", "validation loss", "perplexity", "tokens/s", "planned memory", "peak memory", "merges", "s/merge")


def labels(runs):
    """The last part of each path, or the whole path where that is not unique."""
    names = [os.path.basename(os.path.abspath(run)) for run in runs]
    return [run if names.count(name) > 1 else name for run, name in zip(runs, names)]


def gib(size):
    return f"{size / 2**30:.2f} GiB"


def row(label, events):
    """One table row, as text; "-" for what the run has not done."""
    steps, evals, merges = events.get("train", []), events.get("eval", []), events.get("merge", [])
    starts = sorted(events.get("start", []) + events.get("resume", []), key=lambda e: e["time"])
    # A train line counts steps done, a merge line the step it happened in: line u + 1 contains merge u.
    merged = {m["step"] + 1 for m in merges}
    rates = [s["tokens_per_s"] for s in steps if s["step"] not in merged]
    loss = evals[-1]["loss"] if evals else None
    cells = {
        "run": label,
        "method": starts[-1]["method"] if starts else "-",
        "steps": str(steps[-1]["step"]) if steps else "0",
        "validation loss": "-" if loss is None else f"{loss:.4f}",
        "perplexity": "-" if loss is None else f"{evals[-1]['perplexity']:.2f}",
        "tokens/s": f"{statistics.median(rates):,.0f}" if rates else "-",
        "planned memory": gib(starts[-1]["planned_bytes"]) if starts else "-",
        "peak memory": gib(max(s["memory_bytes"] for s in steps)) if steps else "-",
        "merges": str(len(merges)),
        "s/merge": f"{statistics.median(m['seconds'] for m in merges):.2f}" if merges else "-",
    }
    return [cells[name] for name in COLUMNS]


def table(names, runs):
    lines = [COLUMNS, ["---"] * len(COLUMNS)] + [row(name, events) for name, events in zip(names, runs)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def smoothed(values, window):
    """Mean of the last `window` values at every point."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def draw(names, runs, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    low = []
    for i, (name, events) in enumerate(zip(names, runs)):
        color = f"C{i}"
        steps = [s for s in events.get("train", []) if s["loss"] is not None]
        evals = [e for e in events.get("eval", []) if e["loss"] is not None]
        if steps:
            losses = smoothed([s["loss"] for s in steps], max(1, len(steps) // 100))
            axes.plot([s["step"] for s in steps], losses, color=color, linewidth=1, label=name)
            low.append(min(losses))
        axes.plot([e["step"] for e in evals], [e["loss"] for e in evals], "o", color=color, markersize=4, label=None if steps else name)
        low += [e["loss"] for e in evals]
        merges = events.get("merge", [])
        axes.plot([m["step"] for m in merges], [0.02 + 0.03 * i] * len(merges), "|", color=color, markersize=7, transform=axes.get_xaxis_transform())
    if low:  # from just below the best value to where training is past its first fall
        axes.set_ylim(min(low) * 0.95, min(low) * 1.8)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="lines: training, dots: validation, ticks: merges")
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("-o", "--output", metavar="FILE.png", help="draw the loss curves into this file")
    args = parser.parse_args(argv)
    try:
        runs = [read_events(run) for run in args.runs]
        names = labels(args.runs)
        print(table(names, runs))
        if args.output:
            draw(names, runs, args.output)
    except ImportError as error:
        print(f"plot_runs.py: {error}; -o needs it: python3 -m pip install matplotlib", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"plot_runs.py: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
