#!/usr/bin/env python3
"""Evaluates an exported model with transformers on the first sequences of a packed shard, to compare with the run's own evaluation.

Usage: check_export.py EXPORT_DIR SHARD SEQ_LEN SEQUENCES [--dtype float32|bfloat16]
Needs torch and transformers. Prints the mean loss per token.
"""
import argparse
import array
import sys

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("export_dir")
parser.add_argument("shard")
parser.add_argument("seq_len", type=int)
parser.add_argument("sequences", type=int)
parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
args = parser.parse_args()

try:
    import torch
    import transformers
except ImportError as error:
    sys.exit(f"check_export.py needs {error.name}")

with open(args.shard, "rb") as file:
    header = array.array("i", file.read(1024))
    width = {20240520: "H", 20240801: "I"}[header[0]]
    tokens = array.array(width)
    tokens.frombytes(file.read(tokens.itemsize * (args.seq_len * args.sequences + 1)))
tokens = torch.tensor(tokens, dtype=torch.long)

device = "cuda" if torch.cuda.is_available() else "cpu"
model = transformers.AutoModelForCausalLM.from_pretrained(args.export_dir, dtype=getattr(torch, args.dtype)).to(device).eval()
inputs = tokens[:-1].view(args.sequences, args.seq_len)
targets = tokens[1:].view(args.sequences, args.seq_len)
total = 0.0
with torch.no_grad():
    for i in range(0, args.sequences, 16):
        logits = model(inputs[i:i + 16].to(device)).logits.double()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[i:i + 16].flatten().to(device), reduction="sum").item()
print(f"{total / targets.numel():.6f}")
