"""Tables of a bench report (bench/run.py): Markdown from the JSON. As a program: report.py FILE.json prints them again."""
import json
import sys

# Tokens per second of `loqt` over those of the peer that this project wants at least, on one H200; of `full`: 1.
TARGETS = {"60m": 1.10, "130m": 1.12, "350m": 1.20, "1b": 1.25}
GIB = 2**30


def table(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def number(value, form="{:,.0f}"):
    return "-" if value is None else form.format(value)


def rate(run):
    return run.get("tokens_per_s") if run else None


def best_peer(entry):
    return entry.get("peer", {}).get("best")


def ratio(a, b):
    return a / b if a and b else None


def speed(report):
    """One row per preset: tokens per second of both sides, and what ours are of the peer's."""
    rows = []
    for preset, entry in report["presets"].items():
        loqt, full, peer = rate(entry["ours"].get("loqt")), rate(entry["ours"].get("full")), rate(best_peer(entry))
        rows.append([preset, number(loqt), number(full), number(peer), number(ratio(loqt, peer), "{:.3f}"), number(TARGETS.get(preset), "{:.2f}"),
                     number(ratio(full, peer), "{:.3f}"), "1.00"])
    return table(["preset", "loqt, tokens/s", "full, tokens/s", "PyTorch full, tokens/s", "loqt / PyTorch", "target", "full / PyTorch", "target"], rows)


def details(report):
    """One row per run of ours: how, how fast against the peak, merges in seconds and in steps."""
    rows = []
    for preset, entry in report["presets"].items():
        for method, run in entry["ours"].items():
            if "error" in run:
                rows.append([preset, method, run["error"]] + ["-"] * 7)
                continue
            merges = [run.get("merges", {}).get(mode, {}).get("seconds") for mode in ("gram", "subspace")]
            rows.append([preset, method, f"{run['micro_batch']} × {run['seq_len']}", number(1e3 * run["step_seconds"], "{:,.1f}"), len(run["steps"]),
                         number(None if run["mfu"] is None else 100 * run["mfu"], "{:.1f} %"), number(run["full_rank_equivalent_tflops"], "{:,.3g}"),
                         number(run["peak_bytes"] / GIB, "{:.2f}"),
                         *("-" if s is None else f"{s:.3g} s = {s / run['step_seconds']:.2f} steps" for s in merges)])
    return table(["preset", "method", "micro-batch", "step, ms", "steps", "MFU", "full-rank equivalent (6N), TFLOP/s", "peak memory, GiB", "merge, exact (gram)",
                  "merge, fast (subspace)"], rows)


def peers(report):
    rows = []
    for preset, entry in report["presets"].items():
        peer = entry.get("peer", {"error": "not asked for"})
        if "error" in peer:
            rows.append([preset, peer["error"]] + ["-"] * 6)
        for r in peer.get("results", []):
            rows.append([preset, r["kind"], r["micro_batch"], r["compile"], r.get("attention", "-"), number(r.get("compile_seconds")),
                         number(r.get("peak_bytes") and r["peak_bytes"] / GIB, "{:.1f}"), number(rate(r)) if rate(r) else r["error"]])
    return table(["preset", "PyTorch model", "micro-batch", "torch.compile", "attention", "compilation, s", "peak memory, GiB", "tokens/s"], rows)


def families(profile):
    """Operations summed by what they are for: products by the model's label, others by their name."""
    sums = {}
    for op in profile["operations"]:
        family = op["label"] if op["name"] == "matmul" and op["label"] else op["name"].replace("_", " ")
        total = sums.setdefault(family, {"seconds": 0, "flops": 0, "bytes": 0, "calls": 0})
        for key in total:
            total[key] += op[key]
    return dict(sorted(sums.items(), key=lambda item: -item[1]["seconds"]))


def breakdown(run):
    """Milliseconds of one step by family. The achieved rate is the one nearer to its ceiling: arithmetic or memory."""
    profile, rows = run["profile"], []
    for family, total in families(profile).items():
        seconds = total["seconds"] or 1e-12
        flops, byte_rate = total["flops"] / seconds, total["bytes"] / seconds
        arithmetic, memory = flops / run["product_flops"], byte_rate / run["copy_bytes_per_s"]
        achieved = number(flops / 1e12, "{:,.3g} TFLOP/s") if arithmetic >= memory else number(byte_rate / 1e9, "{:,.0f} GB/s")
        rows.append([family, f"{total['calls']:g}", f"{1e3 * seconds:.2f}", f"{100 * seconds / profile['step_seconds']:.1f} %", achieved,
                     f"{100 * max(arithmetic, memory):.0f} %"])
    rest = profile["step_seconds"] - sum(op["seconds"] for op in profile["operations"])
    rows.append(["not booked: gaps, copies, fills", "", f"{1e3 * rest:.2f}", f"{100 * rest / profile['step_seconds']:.1f} %", "", ""])
    return table(["operation", "calls", "ms", "share", "achieved", "of ceiling"], rows)


def markdown(report):
    runs = [(preset, method, run) for preset, entry in report["presets"].items() for method, run in entry["ours"].items() if "error" not in run]
    torch = {entry["peer"]["torch"] for entry in report["presets"].values() if "torch" in entry.get("peer", {})}
    text = f"Commit {report['commit']}, {report['date']}"
    if runs:
        first = runs[0][2]
        text += f", {first['device']}" + (f", PyTorch {', '.join(sorted(torch))}" if torch else "")
        if first["peak_source"]:
            text += f"; MFU against {first['peak_flops'] / 1e12:,.0f} TFLOP/s ({first['peak_source']})"
    text += f".\n`{report['command']}`\n\n" + speed(report) + "\n" + details(report) + "\n" + peers(report)
    for preset, method, run in runs:
        if "profile" in run:
            text += (f"\nOne step of {preset} by {method}, {1e3 * run['profile']['step_seconds']:.1f} ms under the profiler; ceilings measured in the same process: "
                     f"{run['product_flops'] / 1e12:,.3g} TFLOP/s ({'bf16' if run['gpu'] else 'fp32'} product), {run['copy_bytes_per_s'] / 1e9:,.0f} GB/s (copy, read + write)\n\n"
                     + breakdown(run))
    return text


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        print(markdown(json.load(file)))
