"""Times PyTorch's causal attention on the shapes of bench/kernels/bench_attention.cu: one table to hold ours against.

    python3 bench/peer_attention.py [--tokens 16384] [--columns 2048] [--runs 20]

Forward and forward+backward of scaled_dot_product_attention in bf16 with the FlashAttention-2 and the cuDNN backend; medians of
`runs` measurements by CUDA events. FLOPs by the convention of the FlashAttention papers: 2·batch·heads·seq²·head_dim forward
(causal), 2.5 times that backward. Inputs are (batch, heads, seq, head_dim) views of token-major memory, as a model's would be.
"""
import argparse
import statistics

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"FlashAttention-2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


def median_ms(work, runs, warm_up=3):
    times = []
    for i in range(warm_up + runs):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        if i >= warm_up:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def measure(backend, batch, heads, seq, head_dim, runs):
    """Milliseconds of the forward and of the backward pass alone."""

    def leaf():
        x = torch.randn(batch, seq, heads, head_dim, device="cuda", dtype=torch.bfloat16)
        return x.transpose(1, 2).requires_grad_()

    q, k, v = leaf(), leaf(), leaf()
    d_o = torch.randn(batch, seq, heads, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    with sdpa_kernel(backend):
        forward = median_ms(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), runs)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        backward = median_ms(lambda: torch.autograd.grad(o, (q, k, v), d_o, retain_graph=True), runs)
    return forward, backward


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--columns", type=int, default=2048, help="heads times head_dim")
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {args.tokens} tokens, {args.columns} columns of heads")
    print("backend           head_dim   seq   forward ms  TFLOP/s   backward ms  TFLOP/s   both ms")
    for name, backend in BACKENDS.items():
        for head_dim in (64, 128):
            for seq in (256, 512, 1024, 2048, 4096):
                batch, heads = args.tokens // seq, args.columns // head_dim
                flops = 2 * batch * heads * seq**2 * head_dim
                try:
                    forward, backward = measure(backend, batch, heads, seq, head_dim, args.runs)
                except RuntimeError as error:  # the backend does not take this shape or is not built in
                    print(f"{name:16s}  {head_dim:8d}  {seq:4d}   {str(error).splitlines()[0]}")
                    continue
                print(f"{name:16s}  {head_dim:8d}  {seq:4d}   {forward:10.3f}  {flops / forward * 1e-9:7.1f}   "
                      f"{backward:11.3f}  {2.5 * flops / backward * 1e-9:7.1f}   {forward + backward:7.3f}")


if __name__ == "__main__":
    main()
