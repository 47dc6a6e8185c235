#!/usr/bin/env python3
"""Compares runs: a Markdown table from their metrics.jsonl and config.json, and with -o their curves in one picture.

    python3 scripts/report.py runs/full runs/loqt -o loss.png
    python3 scripts/report.py --sweep runs/table1 --csv table1.csv --at-seconds 60
    python3 scripts/report.py --page docs/experiments.md

Runs that differ only in the seed make one row:
  perplexity     of the last evaluation, exp(loss), mean ± standard error over the seeds. Runs that came less far than others of their row do not
                 count: "seeds" then says "1 of 2"
  ratio          perplexity over that of the reference after the same number of tokens; ± its standard error, seed by seed, where both have the same seeds
  at S s         perplexity after S seconds of training (--at-seconds), evaluations and checkpoints left out: the validation loss interpolated between
                 the evaluations before and after. A schedule that is longer than S has not lowered its learning rate by then
  tokens/s       median of the steps without a merge; of several runs the median
  planned, peak  memory, the largest of the runs
  merges, s/merge  merges (restarts, refreshes) of a run, and what the median merge adds to its step; that of the first step is left out
  merge jump     by how many nats the training loss is higher in the ten steps after a merge than in the ten before, less what it does in the 20 steps
                 on either side, where nothing is merged; mean ± standard error over the merges but the first, all seeds together
  net jump       in place of merge jump, where possible: less what the loss of the reference's runs, or of those --beside, does at the same steps on the
                 same samples, without a merge near. Some samples are harder than others, and where an epoch begins any loss falls: what remains is
                 the merge's doing
  skipped        steps left out as not finite, all seeds together
  spikes         steps after the warm-up whose loss exceeds the median of the 50 before by more than 0.5 nats, all seeds together
Of a page, Markdown with blocks

    <!-- report: ARGUMENTS -->
    <!-- end of report -->

--page makes every block anew: what stands between the two lines becomes the table for these arguments, which are the ones above (paths seen from the current
folder, patterns such as runs/*/loqt* too), how many runs on which device, and the picture of -o. Text outside the blocks is left alone; unless all can be
made, nothing is written.

Picture (needs matplotlib): training loss, smoothed, mean over the seeds, with a band from the lowest to the highest; evaluations as dots; merges as ticks.
"""
import argparse
import csv
import glob
import json
import os
import re
import shlex
import statistics
import sys

from run_groups import Group, Run, compare_merges, group_runs

# Of Okabe and Ito, told apart by colour-blind people; the yellow is too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
LINES = ("-", "--", ":", "-.")
BLOCK_END = "<!-- end of report -->"
AXES = {"steps": "step", "tokens": "training tokens", "seconds": "seconds of training"}


def known(value, text):
    return "-" if value is None else format(value, text) if isinstance(text, str) else text(value)


def gib(size):
    return f"{size / 2**30:.2f} GiB"


def plus_minus(mean, error, digits=2, sign=""):
    return "-" if mean is None else f"{mean:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def setting(groups, name):
    """What the groups have for a configuration key, by its full name or its last part; [] if there is no one such key."""
    keys = {key for group in groups for key in group.runs[0].config if key == name or key.endswith("." + name)}
    key = keys.pop() if len(keys) == 1 else None
    return [known(group.runs[0].config.get(key), str) for group in groups] if key else []


def markdown(groups, reference, at_seconds, net, wanted=None):
    """The table; columns that say nothing of any run are left out. net: merge jumps are net ones. wanted: names of the columns beside the run's, in their
    order; else all."""
    columns = {
        "run": [g.label for g in groups],
        "method": [g.method for g in groups],
        "seeds": [str(g.planned_runs) if len(g.losses) in (0, g.planned_runs) else f"{len(g.losses)} of {g.planned_runs}" for g in groups],
        "steps": [str(g.step) if g.step == g.step_limit else f"{g.step} of {g.step_limit}" for g in groups],
        "tokens": [f"{g.step * g.tokens_per_step / 1e6:,.1f} M" for g in groups],
        "validation loss": [known(g.loss, ".4f") for g in groups],
        "perplexity": [plus_minus(g.perplexity, g.perplexity_error) for g in groups],
        "ratio": [plus_minus(g.ratio_to(reference), g.ratio_error_to(reference), 3) for g in groups] if reference else [],
        f"at {at_seconds or 0:g} s": [plus_minus(*g.perplexity_at(at_seconds)) for g in groups] if at_seconds else [],
        "tokens/s": [known(g.rate, ",.0f") for g in groups],
        "planned": [known(g.planned, gib) for g in groups],
        "peak": [known(g.peak, gib) for g in groups],
        "merges": [str(g.merges) for g in groups],
        "s/merge": [known(g.merge_seconds, ".2f") for g in groups],
        "merge jump": [plus_minus(g.merge_jump, g.merge_jump_error, 3, "+") for g in groups] if any(g.merge_jump is not None for g in groups) else [],
        "skipped": [str(g.skipped) for g in groups],
        "spikes": [str(g.spikes) for g in groups],
    }
    if wanted:
        columns.update({name: cells for name in wanted if name not in columns and (cells := setting(groups, name))})
        unknown = [name for name in wanted if name not in columns]
        if unknown:
            raise ValueError(f"--columns: no column and no key of the configuration \"{unknown[0]}\"; there are {', '.join(columns)}")
        columns = {name: columns[name] for name in ["run", *(name for name in wanted if name != "run")]}
    if wanted:  # what was asked for is there, if only to say that there is nothing
        columns = {name: cells or ["-"] * len(groups) for name, cells in columns.items()}
    columns = {"net jump" if net and name == "merge jump" else name: cells for name, cells in columns.items() if cells}
    rows = [columns, ["---"] * len(columns), *zip(*columns.values())]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def write_csv(groups, reference, at_seconds, net, path):
    """One line a group, unrounded; bytes, seconds and nats. Empty: not known. net: merge jumps are net ones."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["run", "method", "seeds", "runs", "step", "steps", "tokens", "eval_step", "loss", "loss_error", "perplexity", "perplexity_error",
                        "reference", "ratio", "ratio_error", "at_seconds", "perplexity_at", "perplexity_at_error", "tokens_per_s", "training_seconds", "planned_bytes",
                        "peak_bytes", "merges", "merge_seconds", "merge_jump", "merge_jump_error", "merge_jump_net", "skipped", "spikes"])
        for g in groups:
            at = g.perplexity_at(at_seconds) if at_seconds else (None, None)
            table.writerow([g.label, g.method, len(g.losses), g.planned_runs, g.step, g.step_limit, round(g.step * g.tokens_per_step), g.eval_step, g.loss,
                            g.loss_error, g.perplexity, g.perplexity_error, reference.label if reference else None, g.ratio_to(reference), g.ratio_error_to(reference),
                            at_seconds, *at,
                            g.rate, g.seconds, g.planned, g.peak, g.merges, g.merge_seconds, g.merge_jump, g.merge_jump_error, int(net), g.skipped, g.spikes])


def smoothed(values, window):
    """Mean of the last `window` values at every point."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def over_seeds(series):
    """[(step, mean, lowest, highest)] at the steps that every {step: value} has."""
    steps = sorted(set.intersection(*(set(s) for s in series))) if series else []
    return [(step, statistics.fmean(s[step] for s in series), min(s[step] for s in series), max(s[step] for s in series)) for step in steps]


def training_curve(run):
    """{step: smoothed loss}, a hundredth of the run in every mean."""
    steps = [s for s in run.steps if s["loss"] is not None]
    return dict(zip((s["step"] for s in steps), smoothed([s["loss"] for s in steps], max(1, len(steps) // 100))))


def draw_group(axes, group, number, height, x_axis):
    """Draws one group, its merges at this height (of 1); returns the losses that the picture should show."""
    style = {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number // len(COLOURS) % len(LINES)]}

    runs = [run for run in group.runs if run.steps]

    def place(step):  # seconds differ from seed to seed
        return statistics.fmean(run.position(step, x_axis) for run in runs)

    curve = over_seeds([training_curve(run) for run in runs])
    xs = [place(step) for step, *_ in curve]
    axes.plot(xs, [mean for _, mean, _, _ in curve], linewidth=1.2, label=group.label, **style)
    if len(runs) > 1:
        axes.fill_between(xs, [low for _, _, low, _ in curve], [high for _, _, _, high in curve], color=style["color"], alpha=0.2, linewidth=0)
    evals = over_seeds([{e["step"]: e["loss"] for e in run.evals if e["loss"] is not None and e["step"] <= run.step} for run in runs])
    axes.plot([place(step) for step, *_ in evals], [mean for _, mean, _, _ in evals], "o", color=style["color"], markersize=4)
    ticks = [m["step"] for m in runs[0].merges if all(m["step"] <= run.step for run in runs)] if runs else []
    axes.plot([place(step) for step in ticks], [height] * len(ticks), "|", color=style["color"], markersize=6, transform=axes.get_xaxis_transform())
    return [mean for _, mean, _, _ in curve] + [mean for _, mean, _, _ in evals]


def draw(groups, x_axis, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    many = len(groups) > 8  # too many for a legend within the axes
    figure, axes = pyplot.subplots(figsize=(11, 5.5) if many else (8, 4.5), dpi=120)
    shown = [draw_group(axes, group, i, 0.02 + i * min(0.025, 0.25 / len(groups)), x_axis) for i, group in enumerate(groups)]
    lowest = [min(losses) for losses in shown if losses]
    if lowest:  # from just below the best value to where training is past its first fall
        axes.set_ylim(min(lowest) * 0.95, min(lowest) * 1.8)
    axes.set(xlabel=AXES[x_axis], ylabel="loss (nats per token)", title="lines: training, mean and range of the seeds; dots: validation; ticks: merges")
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, **({"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if many else {}))
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def read_sweep(folder):
    """([Group], name of the reference or None) of a folder that sweep.py made. Runs that have not begun are passed over."""
    with open(os.path.join(folder, "sweep.json"), encoding="utf-8") as file:
        sweep = json.load(file)
    members = {}
    for run in sweep["runs"]:
        members.setdefault(run["group"], []).append(os.path.join(folder, run["name"]))
    groups = []
    for label, paths in members.items():
        begun = [Run(path) for path in paths if os.path.exists(os.path.join(path, "metrics.jsonl"))]
        if begun:
            groups.append(Group(label, begun, len(paths)))
    return groups, sweep["reference"]


def best_of_methods(groups):
    """Of every method the group with the lowest perplexity; those without one are left out."""
    best = {}
    for group in groups:
        if group.perplexity is not None and (group.method not in best or group.perplexity < best[group.method].perplexity):
            best[group.method] = group
    return list(best.values())


def find_reference(groups, name):
    """The only group of that label, else the only one whose label is a path that ends so, else the best of that method; None where there is none."""
    same = [g for g in groups if g.label == name] or [g for g in groups if os.path.basename(g.label) == name]
    if same:
        return same[0] if len(same) == 1 else None
    of_method = [g for g in groups if g.method == name]
    return of_method[0] if len(of_method) == 1 else min((g for g in of_method if g.perplexity is not None), key=lambda g: g.perplexity, default=None)


def parser(kind=argparse.ArgumentParser):
    options = kind(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", nargs="*", metavar="RUN_DIR")
    options.add_argument("--beside", nargs="+", default=[], metavar="RUN_DIR", help="what net jumps compare with [the reference's runs]")
    options.add_argument("--sweep", metavar="DIR", help="all runs of a folder that sweep.py made, as it groups them")
    options.add_argument("-o", "--output", metavar="FILE.png", help="draw the curves into this file; .svg works too")
    options.add_argument("--x", choices=AXES, default="steps", help="what the picture's x axis shows [steps]")
    options.add_argument("--csv", metavar="FILE", help="write all figures, unrounded, into this file")
    options.add_argument("--markdown", metavar="FILE", help="write the table into this file too")
    options.add_argument("--page", metavar="FILE", help="make the tables and pictures of this page anew")
    options.add_argument("--columns", metavar="NAME,NAME", help="only these columns, in this order; keys of the configuration such as lr too [all]")
    options.add_argument("--reference", metavar="NAME", help="the row, or the method whose best row, that ratio compares with [the sweep's, or full]")
    options.add_argument("--best", action="store_true", help="of every method only the row with the lowest perplexity: each at its own best learning rate")
    options.add_argument("--at-seconds", type=float, metavar="S", help="a column with the perplexity after S seconds of training")
    return options


def report(args):
    """([Group], the table); writes the files that were asked for. Raises ValueError for what cannot be."""
    if bool(args.runs) == bool(args.sweep):
        raise ValueError("give run directories, or --sweep DIR")
    for path in args.runs:
        if os.path.exists(os.path.join(path, "sweep.json")):
            raise ValueError(f"{path} holds the runs of a sweep: --sweep {path}")
    groups, name = read_sweep(args.sweep) if args.sweep else (group_runs([Run(run) for run in args.runs]), None)
    if not groups:
        raise ValueError(f"{args.sweep}: no run has begun")
    if args.best:
        groups = best_of_methods(groups) or groups
    reference = find_reference(groups, args.reference or name or "full")
    if args.reference and not reference:
        raise ValueError(f"--reference {args.reference}: not exactly one row has this name, and none with a perplexity this method; there are {', '.join(g.label for g in groups)}")
    net = compare_merges(groups, [Run(run) for run in args.beside] or (reference.runs if reference else []))
    table = markdown(groups, reference, args.at_seconds, net, args.columns.split(",") if args.columns else None)
    if args.markdown:
        with open(args.markdown, "w", encoding="utf-8") as file:
            file.write(table)
    if args.csv:
        write_csv(groups, reference, args.at_seconds, net, args.csv)
    if args.output:
        draw(groups, args.x, args.output)
    return groups, table


class BlockParser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def block(arguments, page):
    """What stands in a block of a page: table, where it comes from, picture."""
    args = parser(BlockParser).parse_args(shlex.split(arguments))
    if args.page:
        raise ValueError("a page within a page")
    # What a pattern does not find stays as it is, to be complained about.
    args.runs, args.beside = ([path for pattern in patterns for path in sorted(glob.glob(pattern)) or [pattern]] for patterns in (args.runs, args.beside))
    groups, table = report(args)
    runs = [run for group in groups for run in group.runs]
    text = f"{table}\n{len(runs)} run{'s' if len(runs) > 1 else ''} on {', '.join(sorted({run.device for run in runs}))}.\n"
    if args.output:
        text += f"\n![Loss curves]({os.path.relpath(args.output, os.path.dirname(page) or '.')})\n"
    return text


def make_page(path):
    """Puts every block's table where it belongs. Raises ValueError, and leaves the page alone, if one cannot be made."""
    with open(path, encoding="utf-8") as file:
        lines = file.read().split("\n")
    made, opened = [], None
    for number, line in enumerate(lines, 1):
        begin = re.fullmatch(r"<!-- report: (.*) -->", line)
        if begin and opened or line == BLOCK_END and not opened:
            raise ValueError(f"{path}: line {number}: " + (f"the block of line {opened} has no \"{BLOCK_END}\"" if begin else "ends a block that did not begin"))
        if begin:
            opened = number
            try:
                made += [line, *block(begin[1], path).split("\n")]
            except (ValueError, OSError) as error:
                raise ValueError(f"{path}: line {number}: {reason(error)}")
        if line == BLOCK_END:
            opened = None
        if not opened:
            made.append(line)
    if opened:
        raise ValueError(f"{path}: the block of line {opened} has no \"{BLOCK_END}\"")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(made))
    return sum(line.startswith("<!-- report: ") for line in made)


def reason(error):
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)


def main(argv=None):
    args = parser().parse_args(argv)
    try:
        if args.page:
            if (args.runs, args.sweep) != ([], None):
                raise ValueError("--page: the runs stand in the page's own blocks")
            print(f"{args.page}: tables made anew: {make_page(args.page)}")
        else:
            print(report(args)[1], end="")
    except ImportError as error:
        print(f"report.py: {error}; -o needs it: python3 -m pip install matplotlib", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"report.py: {reason(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
