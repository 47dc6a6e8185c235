#!/usr/bin/env python3
"""Times full-rank training of a LLaMA in PyTorch, the peer of build/bench_step, and prints one JSON object.

Pure low precision as it is commonly done: bf16 weights and gradients (fp32 on a CPU), fused AdamW, torch.compile, random tokens, no data loading.
Two models: `lean`, a minimal LLaMA written for speed below, and `hf`, LlamaForCausalLM of transformers where that is installed. The first is timed
at every micro-batch, the second at the one where the first is fastest. One optimizer step takes --batch sequences, accumulated over micro-batches.
"""
import argparse
import contextlib
import gc
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

WARM_UP, LEAST_STEPS = 2, 5
ATTENTION = {"default": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


class Attention(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x, cos, sin):
        batch, seq, hidden = x.shape
        q, k, v = self.qkv(x).view(batch, seq, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, seq, hidden))


def rotate(x, cos, sin):
    """Rotary embedding of (batch, heads, seq, size); cos and sin: (seq, size). One concatenation, which the compiler fuses with the rest: rotating
    the halves apart and joining them is slower."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class Feed(nn.Module):
    def __init__(self, hidden, intermediate):
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, hidden, intermediate, heads, eps):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(hidden, eps=eps), nn.RMSNorm(hidden, eps=eps)
        self.attention, self.feed = Attention(hidden, heads), Feed(hidden, intermediate)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.feed(self.norm2(x))


class Lean(nn.Module):
    """model: the section of a preset, but intermediate, which may be wider."""

    def __init__(self, model, seq_len, intermediate):
        super().__init__()
        hidden, heads, eps = model["hidden"], model["heads"], model.get("rms_eps", 1e-6)
        self.embedding, self.head = nn.Embedding(model["vocab"], hidden), nn.Linear(hidden, model["vocab"], bias=False)
        self.norm = nn.RMSNorm(hidden, eps=eps)
        self.blocks = nn.ModuleList(Block(hidden, intermediate, heads, eps) for _ in range(model["layers"]))
        size = hidden // heads
        angle = torch.outer(torch.arange(seq_len).double(), 10000.0 ** (-torch.arange(0, size, 2).double() / size)).repeat(1, 2)
        self.register_buffer("cos", angle.cos().float()), self.register_buffer("sin", angle.sin().float())

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def fastest_width(model, tokens, device):
    """The SwiGLU layer's width, or a padded one where its products are faster with that (timed on a GPU): odd widths slow tensor cores down."""
    hidden, width = model["hidden"], model["intermediate"]
    if device.type != "cuda":
        return width

    def seconds(width):
        def leaf(*shape):
            return torch.randn(*shape, device=device, dtype=torch.bfloat16, requires_grad=True)
        x, up, a, down = leaf(tokens, hidden), leaf(2 * width, hidden), leaf(tokens, width), leaf(hidden, width)

        def step():
            for inputs in ((x, up), (a, down)):
                y = F.linear(*inputs)
                torch.autograd.grad(y, inputs, y.detach())
        return statistics.median([timed(step, device) for _ in range(8)][3:])

    # In order: of equals the narrowest is taken.
    widths = [width] * (width % 8 == 0) + [-(-width // multiple) * multiple for multiple in (64, 128) if width % multiple]
    return min(widths, key=seconds) if len(set(widths)) > 1 else widths[0]


def build(kind, model, seq_len, intermediate):
    """The module and its loss as a function of (module, tokens, targets)."""
    if kind == "lean":
        return Lean(model, seq_len, intermediate), lambda m, tokens, targets: m(tokens, targets)
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(hidden_size=model["hidden"], intermediate_size=model["intermediate"], num_hidden_layers=model["layers"],
                         num_attention_heads=model["heads"], num_key_value_heads=model.get("kv_heads") or model["heads"], vocab_size=model["vocab"],
                         max_position_embeddings=seq_len, tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa")
    # It shifts labels itself: the tokens are their own labels.
    return LlamaForCausalLM(config), lambda m, tokens, targets: m(input_ids=tokens, labels=tokens).loss


def timed(step, device):
    synchronize(device)
    begin = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - begin


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(kind, micro_batch, mode, attention, model, args, device):
    """One result: tokens per second of whole optimizer steps (median), or why there is none."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    result = {"kind": kind, "micro_batch": micro_batch, "compile": mode, "attention": attention}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(1)
    width = model["intermediate"]
    if kind == "lean":
        result["width"] = width = fastest_width(model, micro_batch * args.seq_len, device)
    with device:
        module, loss_of = build(kind, model, args.seq_len, width)
    module = module.to(dtype).train()
    result["parameters"] = sum(p.numel() for p in module.parameters())
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    forward = module if mode == "none" else torch.compile(module, mode=None if mode == "default" else mode)
    pieces = args.batch // micro_batch
    text = torch.randint(0, model["vocab"], (pieces, micro_batch, args.seq_len + 1), device=device)
    batches = [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in text]
    parameters = list(module.parameters())

    def step():
        # The first micro-batch's gradients are taken as they are, the others' added by a few kernels for all tensors: cheaper than .backward().
        total = None
        for tokens, targets in batches:
            loss = loss_of(forward, tokens, targets)
            gradients = torch.autograd.grad(loss if pieces == 1 else loss / pieces, parameters)
            if total is None:
                total = list(gradients)
            else:
                torch._foreach_add_(total, gradients)
        for parameter, gradient in zip(parameters, total):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def steps():
        begin = time.perf_counter()
        step()
        synchronize(device)
        result["compile_seconds"] = time.perf_counter() - begin
        for _ in range(WARM_UP):
            step()
        times, begin = [], time.perf_counter()
        while len(times) < args.steps and (len(times) < LEAST_STEPS or time.perf_counter() - begin < args.seconds):
            times.append(timed(step, device))
        return times

    try:
        with sdpa_kernel(ATTENTION[attention]) if ATTENTION[attention] else contextlib.nullcontext():
            times = steps()
    except torch.OutOfMemoryError:
        return dict(result, error="out of memory")
    result.update(step_seconds=statistics.median(times), steps=times)
    result["tokens_per_s"] = args.batch * args.seq_len / result["step_seconds"]
    if device.type == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a preset's JSON file: the model's shape")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=512, help="sequences per optimizer step")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--micro-batches", default="256,128", help="sequences per pass, each tried")
    parser.add_argument("--kinds", default="lean,hf")
    parser.add_argument("--attention", default="default", help="kernels of scaled_dot_product_attention, each tried: default (PyTorch's choice), cudnn, flash [default]")
    parser.add_argument("--steps", type=int, default=30, help="timed steps at most")
    parser.add_argument("--seconds", type=float, default=6, help="stop timing after this long (but after five steps at the earliest)")
    parser.add_argument("--compile", help="modes of torch.compile, each tried: default, max-autotune-no-cudagraphs, ... or none [default; on a CPU default,none]")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    with open(args.config, encoding="utf-8") as file:
        model = json.load(file)["model"]
    micro_batches = [int(m) for m in args.micro_batches.split(",")]
    for m in micro_batches:
        if args.batch % m:
            parser.error(f"--micro-batches: {args.batch} is no multiple of {m}")
    kinds, modes = args.kinds.split(","), (args.compile or ("default" if device.type == "cuda" else "default,none")).split(",")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    report = {"torch": torch.__version__, "device": name, "results": []}

    def run(kind, micro_batch, mode, attention):
        print(f"  PyTorch {kind}, micro-batch {micro_batch}, compile {mode}, attention {attention} ...", end="", file=sys.stderr, flush=True)
        try:
            result = measure(kind, micro_batch, mode, attention, model, args, device)
        except (ImportError, RuntimeError) as error:  # no transformers; a kernel that this GPU or build does not have
            result = {"kind": kind, "micro_batch": micro_batch, "compile": mode, "attention": attention, "error": f"left out: {str(error).splitlines()[0]}"}
        report["results"].append(result)
        print(f" {result['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in result else f" {result['error']}", file=sys.stderr, flush=True)

    def best():
        return max((r for r in report["results"] if "tokens_per_s" in r), key=lambda r: r["tokens_per_s"], default=None)

    # Every micro-batch with the first mode and the first kernels; the others, and the other model, only where that was fastest.
    kernels = args.attention.split(",")
    for m in micro_batches:
        run(kinds[0], m, modes[0], kernels[0])
    for attention in kernels[1:] if best() else []:
        run(kinds[0], best()["micro_batch"], modes[0], attention)
    for mode in modes[1:] if best() else []:
        run(kinds[0], best()["micro_batch"], mode, best()["attention"])
    for kind in kinds[1:] if best() else []:
        run(kind, best()["micro_batch"], best()["compile"], best()["attention"])
    report["best"] = best()
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
