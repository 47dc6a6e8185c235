#!/usr/bin/env python3
"""Our safetensors files and exports, read by the Python libraries; and the fixture that the C++ tests read.

    python test/test_safetensors_interop.py           after the C++ tests, which leave files in build/test-output/
    python test/test_safetensors_interop.py --make    writes test/fixtures/interop.safetensors (needs torch)
"""
import json
import pathlib
import sys
import unittest
import zlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "build" / "test-output"
FIXTURE = ROOT / "test" / "fixtures" / "interop.safetensors"

try:
    import numpy as np
    import safetensors
    import safetensors.numpy
except ImportError:
    safetensors = None
try:
    import torch
    import transformers
except ImportError:
    transformers = None


def bf16_bytes(values):
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def make_fixture():
    from safetensors.torch import save_file

    count = torch.arange(15).reshape(3, 5)
    halves = [1, -2, 65504, 2.0**-14, 2.0**-24, -1023 * 2.0**-24, float("inf"), float("-inf"), float("nan"), -0.0]
    save_file({"f64": count.double(), "f32": count.float(), "bf16": count.bfloat16(), "f16": torch.tensor(halves).half(),
               "i32": torch.arange(4).int(), "i16": torch.arange(4).short(), "u8": torch.arange(5).byte(), "empty": torch.zeros(0, 3),
               'scalar "ü"': torch.tensor(0.5)}, FIXTURE, metadata={"format": "np", "quote": '"ü"\n'})
    FIXTURE.chmod(0o644)


@unittest.skipIf(safetensors is None, "needs numpy and safetensors (pip install numpy safetensors)")
class WrittenByUs(unittest.TestCase):
    def setUp(self):
        self.path = OUTPUT / "written.safetensors"
        if not self.path.exists():
            self.skipTest(f"{self.path} is not there: run the C++ tests first")
        self.bytes = self.path.read_bytes()
        self.tensors = dict(safetensors.deserialize(self.bytes))

    def test_values(self):
        self.assertEqual(set(self.tensors), {"bytes", "f32", "empty", 'bf16 "ü"', "f64"})
        self.assertEqual(bytes(self.tensors["bytes"]["data"]), bytes(range(7)))
        self.assertEqual(bytes(self.tensors['bf16 "ü"']["data"]), bf16_bytes(range(6)))
        self.assertEqual(list(self.tensors['bf16 "ü"']["shape"]), [2, 3])
        with safetensors.safe_open(str(self.path), framework="numpy") as file:
            self.assertEqual(file.metadata()["step"], "17")
            self.assertEqual(file.get_tensor("f64").item(), 0.1)
            np.testing.assert_array_equal(file.get_tensor("f32"), np.arange(15, dtype=np.float32).reshape(3, 5))
            self.assertEqual(file.get_tensor("empty").shape, (0, 3))

    def test_checksums_are_zlib_crc32(self):
        length = int.from_bytes(self.bytes[:8], "little")
        metadata = json.loads(self.bytes[8:8 + length])["__metadata__"]
        for name, tensor in self.tensors.items():
            self.assertEqual(metadata["crc32." + name], f"{zlib.crc32(bytes(tensor['data'])):08x}", name)
        header = self.bytes[:8 + length].replace(f'"crc32":"{metadata["crc32"]}"'.encode(), b'"crc32":"00000000"', 1)
        self.assertEqual(metadata["crc32"], f"{zlib.crc32(header):08x}")


@unittest.skipIf(safetensors is None or transformers is None, "needs torch, transformers and safetensors")
class ExportedByUs(unittest.TestCase):
    """The fixture model, imported and exported again by test_hf.cpp, gives the same logits in transformers."""

    def check(self, name, dtype, tolerance):
        directory = OUTPUT / name
        if not (directory / "config.json").exists():
            self.skipTest(f"{directory} is not there: run the C++ tests first")
        model, info = transformers.LlamaForCausalLM.from_pretrained(directory, output_loading_info=True)
        self.assertEqual(model.dtype, dtype)
        self.assertFalse(info["missing_keys"] or info["unexpected_keys"], info)
        reference = safetensors.numpy.load_file(ROOT / "test" / "fixtures" / "llama_tiny" / "reference.safetensors")
        with torch.no_grad():
            logits = model.float()(torch.from_numpy(reference["tokens"]).long()).logits.numpy()
        error = np.linalg.norm(logits - reference["logits"]) / np.linalg.norm(reference["logits"])
        self.assertLess(error, tolerance)

    def test_fp32(self):
        self.check("export_f32", transformers and torch.float32, 1e-5)

    def test_bf16_in_shards(self):
        self.check("export_bf16", transformers and torch.bfloat16, 2e-2)


if __name__ == "__main__":
    if sys.argv[1:] == ["--make"]:
        make_fixture()
    else:
        unittest.main()
