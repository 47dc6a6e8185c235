#!/usr/bin/env python3
"""Draws what GPU memory goes to: a bar per method and model size, stacked by component, from train_loqt --plan --json, with a line at 24 GiB.

    python3 scripts/plot_memory.py                                 planned bars for 1b, 7b and 13b, into memory.png
    python3 scripts/plot_memory.py --measured build/memory.json    and the runs of bench/memory.py: their plan, and a mark at the measured peak

docs/memory.md says what the planned bars stand for. Needs matplotlib and a built ./train_loqt, no GPU.
"""
import argparse
import importlib.util
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GIB = 2**30
CARD = 24  # GiB
COMMON = "--run.device cuda --train.seq_len 256 --train.batch 1 --train.micro_batch 1 --train.gradients bf16 --optimizer.embedding_moments bf16 --train.recompute light --optimizer.clip 0"
LOQT = "--method.name loqt --method.projection_gradient last --train.effective_weights factored"
METHODS = {
    "full, bf16 Adam": "--method.name full --optimizer.moments bf16",
    "full, 8-bit Adam": "--method.name full --optimizer.moments int8",
    "full, 8-bit Adam, per layer": "--method.name full --optimizer.moments int8 --train.updates per_layer",
    "loqt, bf16 Adam": LOQT + " --optimizer.moments bf16",
    "loqt, 8-bit Adam": LOQT + " --optimizer.moments int8",
    # Two micro-batches: sums in 8 bits are for what there is to sum.
    "loqt, 8-bit Adam, 8-bit gradient sums": LOQT + " --optimizer.moments int8 --train.gradients int8 --train.batch 2",
    "loqt, 8-bit Adam, per layer": LOQT + " --optimizer.moments int8 --train.updates per_layer",
}
# Component: colour (of Okabe and Ito, told apart by colour-blind people), lines of the plan. A line that is in none counts as scratch.
COMPONENTS = {
    "weights": ("#0072B2", ["frozen weights", "trained weights"]),
    "gradients": ("#E69F00", ["gradients"]),
    "optimizer moments": ("#009E73", ["optimizer moments"]),
    "activations": ("#CC79A7", ["activations"]),
    "merges, scratch": ("#F0E442", []),
    "CUDA context, libraries": ("#999999", ["cuBLAS workspace", "CUDA context and libraries (estimate)"]),
}
SCRATCH = "merges, scratch"


def components(lines):
    """{component: bytes} of the lines of a plan."""
    sums = dict.fromkeys(COMPONENTS, 0)
    for entry in lines:
        sums[next((c for c, (_, names) in COMPONENTS.items() if entry["name"] in names), SCRATCH)] += entry["bytes"]
    return sums


def read_plan(command):
    """The plan of a command, without merge workers. Raises ValueError with the program's message."""
    result = subprocess.run([*command, "--plan", "--json"], capture_output=True, text=True)
    if result.returncode:
        raise ValueError(result.stderr.strip())
    plan = json.loads(result.stdout)
    workers, count = sum(entry["bytes"] for entry in plan["lines"] if entry["name"] == "merge workers"), plan["choices"]["merge_workers"]["value"]
    if not workers or "--run.memory_budget" in command:
        return plan
    # Two workers are the fewest. Room for one is room for what they would take off the main thread's scratch, but not for two.
    return read_plan([*command, "--run.memory_budget", f"{(plan['total'] - (count - 1) * workers // count) / GIB:.6f}GiB"])


def planned_bars(binary, size):
    """[(label, {component: bytes}, None)] of every method; one that cannot be planned is left out with a word on stderr."""
    bars = []
    for label, options in METHODS.items():
        try:
            bars.append((label, components(read_plan([binary, "--config", size, *COMMON.split(), *options.split()])["lines"]), None))
        except ValueError as error:
            print(f"plot_memory.py: {size}, {label}: {error}", file=sys.stderr)
    return bars


def measured_bars(paths):
    """[(case, {component: bytes}, measured peak in bytes)] of the cases in files of bench/memory.py that ran to their end."""
    bars = {}
    for path in paths:
        with open(path, encoding="utf-8") as file:
            for case in json.load(file)["cases"]:
                peak = case.get("driver_peak_bytes", case.get("program_peak_bytes"))
                if peak and not case.get("error"):
                    label = case["name"] + (f" ({case['budget']})" if case["budget"] else "")
                    bars[case["name"]] = (label, components(case["plan"]["lines"]), peak)
    return list(bars.values())


def draw_panel(axes, title, bars):
    peak_of = lambda bar: max(sum(bar[1].values()), bar[2] or 0) / GIB
    widest = max(CARD * 1.05, *map(peak_of, bars))
    for y, (_, parts, peak) in enumerate(bars):
        left = 0.0
        for name, (colour, _) in COMPONENTS.items():
            width = parts[name] / GIB
            axes.barh(y, width, left=left, color=colour, edgecolor="white", linewidth=0.6, height=0.72)
            if width > 0.045 * widest:
                axes.text(left + width / 2, y, f"{width:.1f}", ha="center", va="center", fontsize=7, color="black" if name != "weights" else "white",
                          bbox={"facecolor": colour, "edgecolor": "none", "pad": 1})
            left += width
        text = f"{left:.1f} GiB" + (f", measured {peak / GIB:.1f}" if peak else "")
        axes.text(peak_of(bars[y]) + 0.012 * widest, y, text, va="center", fontsize=8, bbox={"color": "white", "pad": 1.5})
        if peak:
            axes.plot(peak / GIB, y, "D", color="black", markersize=5, markeredgecolor="white")
    axes.axvline(CARD, color="black", linestyle="--", linewidth=1, zorder=2.5)  # over the bars, under the text and its boxes
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars], fontsize=8)
    axes.set(xlim=(0, 1.24 * widest), title=title)
    axes.title.set_fontsize(9)
    axes.tick_params(axis="x", labelsize=8)
    axes.invert_yaxis()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw(panels, path):
    """panels: [(title, bars)], each with a scale of its own."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import lines, patches, pyplot

    heights = [len(bars) for _, bars in panels]
    figure, all_axes = pyplot.subplots(len(panels), 1, figsize=(8.5, 1.0 + 0.55 * len(panels) + 0.27 * sum(heights)), dpi=120, squeeze=False,
                                       gridspec_kw={"height_ratios": heights}, layout="constrained")
    for axes, (title, bars) in zip(all_axes[:, 0], panels):
        draw_panel(axes, title, bars)
    all_axes[-1, 0].set_xlabel("GPU memory, GiB", fontsize=8)
    keys = [patches.Patch(color=colour, label=name) for name, (colour, _) in COMPONENTS.items()]
    keys.append(lines.Line2D([], [], color="black", linestyle="--", linewidth=1, label=f"{CARD} GiB"))
    if any(bar[2] for _, bars in panels for bar in bars):
        keys.append(lines.Line2D([], [], color="black", marker="D", linestyle="", markersize=5, label="measured peak"))
    figure.legend(handles=keys, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1b,7b,13b", help='configurations to plan; "" for none [1b,7b,13b]')
    parser.add_argument("--measured", nargs="+", default=[], metavar="FILE.json", help="what bench/memory.py wrote")
    parser.add_argument("--binary", default=os.path.join(ROOT, "train_loqt"), help="the program [./train_loqt]")
    parser.add_argument("-o", "--output", default="memory.png", metavar="FILE.png", help="the picture; FILE.svg works too [memory.png]")
    args = parser.parse_args(argv)
    if not importlib.util.find_spec("matplotlib"):
        print("plot_memory.py: needs matplotlib; make test puts it into .venv: use .venv/bin/python3", file=sys.stderr)
        return 2
    try:
        panels = [(f"{size}, one sequence of 256 tokens, planned", planned_bars(args.binary, size)) for size in args.sizes.split(",") if size]
        panels.append(("runs: planned, and measured by the driver", measured_bars(args.measured)))
        panels = [(title, bars) for title, bars in panels if bars]
        if not panels:
            print("plot_memory.py: nothing to draw", file=sys.stderr)
            return 2
        draw(panels, args.output)
    except OSError as error:
        print(f"plot_memory.py: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
