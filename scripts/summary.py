#!/usr/bin/env python3
"""Prints what a run did, from its metrics.jsonl: loss at start and end, merges, speed, memory. Usage: summary.py RUN_DIR"""
import json
import os
import sys


def read_events(run):
    """Events of a run by kind; a step that was trained again after a crash counts once, the last time. Torn lines are passed over."""
    events = {}
    with open(os.path.join(run, "metrics.jsonl"), encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            key = event.get("step", len(events))
            events.setdefault(event["event"], {})[key] = event
    return {kind: [by_step[s] for s in sorted(by_step)] for kind, by_step in events.items()}


def read_config(path):
    """{"section.key": value} of a config.json or a preset; {} where it cannot be read as plain JSON (a preset may have comments)."""
    try:
        with open(path, encoding="utf-8") as file:
            return {f"{section}.{key}": value for section, keys in json.load(file).items() for key, value in keys.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def bar(value, low, high, width=46):
    return "#" * round(width * (value - low) / (high - low)) if high > low else ""


def median(steps, key):
    values = sorted(s[key] for s in steps if s.get(key) is not None)
    return values[len(values) // 2] if values else None


def speed_figures(steps):
    """What the hardware reached by the method's own FLOPs, and full-rank training of this speed: docs/formats.md tells them apart."""
    mfu, equivalent = median(steps, "mfu"), median(steps, "full_rank_equivalent_tflops")
    text = f", MFU {100 * mfu:.1f} %" if mfu is not None else ""
    return text + (f", full-rank equivalent (6N) {equivalent:.3g} TFLOP/s" if equivalent is not None else "")


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        events = read_events(sys.argv[1])
    except OSError as error:
        print(f"summary.py: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    merges, steps = events.get("merge", []), events.get("train", [])
    evals = [e for e in events.get("eval", []) if e["loss"] is not None]  # null: it was not finite
    for e in evals:
        print(f"  step {e['step']:>6}  validation loss {e['loss']:.4f}  perplexity {e['perplexity'] or float('inf'):>8.2f}  {bar(e['loss'], 0, evals[0]['loss'])}")
    if len(evals) > 1:
        change = evals[0]["loss"] - evals[-1]["loss"]
        print(f"validation loss {'fell' if change >= 0 else 'ROSE'} by {abs(change):.2f} nats")
    if merges:
        error = ""
        if merges[-1]["quant_error_uncompensated"]:  # 0: the method does not quantize
            error = f"; NF4 error after compensation {merges[-1]['quant_error']:.3f} (without: {merges[-1]['quant_error_uncompensated']:.3f})"
        print(f"{len(merges)} merge{'s' if len(merges) > 1 else ''} at step{'s' if len(merges) > 1 else ''} {', '.join(str(m['step']) for m in merges)}{error}")
    if steps:
        rate = median(steps, "tokens_per_s")
        print(f"{rate:,.0f} tokens/s (median step){speed_figures(steps)}, peak memory {max(s['memory_bytes'] for s in steps) / 2**30:.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
