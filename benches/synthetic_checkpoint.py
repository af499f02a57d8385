"""Writes Llamas of random weights in the shape of real ones, in several schemes, all quantized from the same weights.

    python synthetic_checkpoint.py FOLDER --shape llama-1b --schemes bf16 W4A16 NVFP4 [--layers 2]

Makes FOLDER/1b-bf16, FOLDER/1b-W4A16 and so on: compressed-tensors checkpoints as llm-compressor writes them, with
the tokenizer of golden/bundled, whose few ids are the first of the vocabulary. A shape is that of the model it is
named after, but for its rope, which is not scaled. Linears and embeddings are normal with a deviation of 0.02, norms
are 1; embeddings and head stay bf16. Seeded: a tensor's weights depend on its name alone, not on the schemes or layers
asked for, so what two schemes score differs by their rounding only. The perplexity itself means nothing.

One tensor is in memory at a time. Needs torch with numpy.
"""

import argparse
import json
import shutil
import struct
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import torch

BUNDLED = Path(__file__).resolve().parent.parent / "golden/bundled/bf16"
DEVIATION = 0.02
# What a calibration would have found as the largest input of a linear; that of these models stays below.
LARGEST_INPUT = 16.0
SHARD_BYTES = 4 << 30
HEADER_BYTES = 1 << 20


class Shape(NamedTuple):
    """Sizes of a Llama."""

    short: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    def linears(self):
        """Name within its layer, rows n and columns k of every linear."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            ("self_attn.q_proj", queries, self.hidden),
            ("self_attn.k_proj", keys, self.hidden),
            ("self_attn.v_proj", keys, self.hidden),
            ("self_attn.o_proj", self.hidden, queries),
            ("mlp.gate_proj", self.inner, self.hidden),
            ("mlp.up_proj", self.inner, self.hidden),
            ("mlp.down_proj", self.hidden, self.inner),
        ]


SHAPES = {
    "llama-1b": Shape("1b", 16, 2048, 8192, 32, 8, 64, 128256, True),
    "llama-8b": Shape("8b", 32, 4096, 14336, 32, 8, 128, 128256, False),
}


def tensor(shape, name, rows, columns):
    """Normal numbers of bf16, [rows, columns]: those that belong to this name in this shape."""
    source = torch.Generator().manual_seed(zlib.crc32(f"{shape.short}/{name}".encode()))
    return torch.empty(rows, columns).normal_(0.0, DEVIATION, generator=source).to(torch.bfloat16)


# Encoders: weights [n, k] of bf16 to what is stored in their place, by suffix. Scales are those of a plain min-max
# calibration, in the formulas of compressed-tensors.


def dense(weights):
    return {"weight": weights}


def largest(weights, group):
    """Largest magnitude in each group of k: [n, k / group, 1]; and the weights, [n, k / group, group]."""
    groups = weights.float().reshape(weights.shape[0], -1, group)
    return groups.abs().amax(-1, keepdim=True), groups


def pack_int4(weights):
    """Groups of 128, symmetric; eight codes a word, the first in the lowest bits, 8 added to each."""
    most, groups = largest(weights, 128)
    scale = (most / 7.5).to(torch.bfloat16)
    codes = (groups / scale.float()).round().clamp(-8, 7).to(torch.int8) + 8
    pairs = codes.reshape(weights.shape[0], -1, 2).to(torch.uint8)
    packed = pairs[..., 0] | pairs[..., 1] << 4
    return {
        "weight_packed": packed.contiguous().view(torch.int32),
        "weight_scale": scale.squeeze(-1),
        "weight_shape": torch.tensor(weights.shape, dtype=torch.int64),
    }


def int8(weights):
    """One scale a row."""
    most, rows = largest(weights, weights.shape[1])
    scale = (most / 127.5).to(torch.bfloat16)
    codes = (rows / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": codes.reshape(weights.shape), "weight_scale": scale.squeeze(-1)}


def fp8(weights):
    """E4M3, one scale a row."""
    most, rows = largest(weights, weights.shape[1])
    scale = (most / 448.0).to(torch.bfloat16)
    codes = (rows / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes.reshape(weights.shape), "weight_scale": scale.squeeze(-1)}


def e2m1(values):
    """Codes of the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6, ties to the even code; two a byte, first in the low half."""
    size = values.abs().clamp(max=6)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    halves = ((size / step).round() * step * 2).to(torch.int64)
    code_of = torch.tensor([0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7], dtype=torch.uint8)
    codes = code_of[halves] | (values < 0).to(torch.uint8) << 3
    pairs = codes.reshape(values.shape[0], -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def nvfp4(weights):
    """Groups of 16 with a scale of E4M3 and one f32 for all; inputs have one too, the rest of their scales is found at
    run time."""
    most, groups = largest(weights, 16)
    whole = 448.0 * 6.0 / most.max()
    scale = (whole * most / 6.0).clamp(max=448).to(torch.float8_e4m3fn)
    return {
        "weight_packed": e2m1(groups / (scale.float() / whole)),
        "weight_scale": scale.squeeze(-1),
        "weight_global_scale": whole.reshape(1),
        "input_global_scale": torch.tensor([448.0 * 6.0 / LARGEST_INPUT]),
    }


def mxfp4(weights):
    """Groups of 32 with a power of two; a largest weight of mantissa 1.75 and more counts as the next power."""
    most, groups = largest(weights, 32)
    exponent = torch.floor(torch.log2(most * (8 / 7))) - 2
    packed = e2m1(groups / torch.exp2(exponent))
    return {"weight_packed": packed, "weight_scale": (exponent + 127).to(torch.uint8).squeeze(-1)}


class Scheme(NamedTuple):
    """How linears are stored, and what the config says of it."""

    encode: object
    format: str
    weights: dict
    inputs: dict


PER_TOKEN = {"dynamic": True, "strategy": "token"}
LOCAL = {"num_bits": 4, "type": "float", "dynamic": "local", "group_size": 16, "strategy": "tensor_group"}
NV_SCALE, MX_SCALE = {"scale_dtype": "torch.float8_e4m3fn"}, {"scale_dtype": "torch.uint8"}

SCHEMES = {
    "bf16": Scheme(dense, None, None, None),
    "W4A16": Scheme(pack_int4, "pack-quantized", {"num_bits": 4, "group_size": 128, "strategy": "group"}, None),
    "W8A8": Scheme(int8, "int-quantized", {"strategy": "channel"}, PER_TOKEN),
    "FP8_DYNAMIC": Scheme(
        fp8, "float-quantized", {"type": "float", "strategy": "channel"}, {"type": "float", **PER_TOKEN}
    ),
    "NVFP4": Scheme(nvfp4, "nvfp4-pack-quantized", {**LOCAL, **NV_SCALE, "dynamic": False}, {**LOCAL, **NV_SCALE}),
    "MXFP4A16": Scheme(
        mxfp4,
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "group_size": 32, "strategy": "group", **MX_SCALE},
        None,
    ),
}


def config(shape, scheme, layers):
    """config.json as transformers and llm-compressor write it."""
    found = json.loads((BUNDLED / "config.json").read_text())
    found.pop("quantization_config", None)
    found |= {
        "dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "tie_word_embeddings": shape.tied,
    }
    if scheme.format:
        found["quantization_config"] = quantization(scheme)
    return found


def quantization(scheme):
    usual = {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8,
        "observer": None, "observer_kwargs": {}, "scale_dtype": None, "strategy": None, "symmetric": True,
        "type": "int", "zp_dtype": None,
    }  # fmt: skip
    group = {
        "format": scheme.format,
        "input_activations": scheme.inputs and usual | scheme.inputs,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": usual | {"observer": "memoryless_minmax"} | scheme.weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": scheme.format,
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    }


NAMES = {
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8", torch.int8: "I8",
    torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip


class Shards:
    """Safetensors files of one checkpoint, written as tensors come: the header's place is kept free and filled last."""

    def __init__(self, folder):
        self.folder, self.file, self.headers = folder, None, []

    def add(self, name, values):
        content = values.contiguous().view(torch.uint8).numpy()
        if self.file is not None and self.at + content.nbytes > SHARD_BYTES:
            self.close()
        if self.file is None:
            self.file, self.at = open(self.path(len(self.headers)), "wb"), 0
            self.file.seek(8 + HEADER_BYTES)
            self.headers.append({})
        offsets = [self.at, self.at + content.nbytes]
        self.headers[-1][name] = {"dtype": NAMES[values.dtype], "shape": list(values.shape), "data_offsets": offsets}
        self.file.write(content.data)
        self.at += content.nbytes

    def path(self, number):
        return self.folder / f"shard-{number}.part"

    def close(self):
        header = json.dumps(self.headers[-1] | {"__metadata__": {"format": "pt"}}).encode()
        assert len(header) <= HEADER_BYTES, "more tensors in one file than its header has place for"
        self.file.seek(0)
        self.file.write(struct.pack("<Q", HEADER_BYTES) + header.ljust(HEADER_BYTES))
        self.file.close()
        self.file = None

    def finish(self):
        """Gives the files their names, and an index where there are several."""
        self.close()
        count = len(self.headers)
        if count == 1:
            self.path(0).rename(self.folder / "model.safetensors")
            return
        places = {}
        for number, header in enumerate(self.headers):
            name = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self.path(number).rename(self.folder / name)
            places |= dict.fromkeys(header, name)
        sizes = (entry["data_offsets"] for header in self.headers for entry in header.values())
        index = {"metadata": {"total_size": sum(end - start for start, end in sizes)}, "weight_map": places}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write(folder, shape, schemes, layers=None):
    """The checkpoints that are not there yet, by scheme; their folders."""
    layers = layers or shape.layers
    paths = {name: folder / f"{shape.short}-{name}" for name in schemes}
    if layers != shape.layers:
        paths = {name: path.with_name(f"{path.name}-{layers}layers") for name, path in paths.items()}
    # The config is written last: a folder without it is one that was not finished.
    missing = {name: path for name, path in paths.items() if not (path / "config.json").exists()}
    files = {}
    for name, path in missing.items():
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        files[name] = Shards(path)
    if missing:
        tensors(shape, layers, files)
    for name, path in missing.items():
        files[name].finish()
        for copied in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(BUNDLED / copied, path / copied)
        (path / "config.json").write_text(json.dumps(config(shape, SCHEMES[name], layers), indent=2) + "\n")
    return paths


def tensors(shape, layers, files):
    """Makes every tensor once and hands it to all checkpoints."""

    def same(name, values):
        for shards in files.values():
            shards.add(name, values)

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    table = "model.embed_tokens.weight"
    same(table, tensor(shape, table, shape.vocabulary, shape.hidden))
    for layer in range(layers):
        print(f"layer {layer + 1} of {layers}", file=sys.stderr, flush=True)
        name = f"model.layers.{layer}"
        for linear, n, k in shape.linears():
            weights = tensor(shape, f"{name}.{linear}", n, k)
            for scheme, shards in files.items():
                for suffix, values in SCHEMES[scheme].encode(weights).items():
                    shards.add(f"{name}.{linear}.{suffix}", values)
        same(f"{name}.input_layernorm.weight", ones)
        same(f"{name}.post_attention_layernorm.weight", ones)
    same("model.norm.weight", ones)
    if not shape.tied:
        same("lm_head.weight", tensor(shape, "lm_head.weight", shape.vocabulary, shape.hidden))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the checkpoints")
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b", help="whose sizes")
    parser.add_argument("--schemes", choices=SCHEMES, nargs="+", default=list(SCHEMES), help="how linears are stored")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    options = parser.parse_args()
    for path in write(options.folder, SHAPES[options.shape], options.schemes, options.layers).values():
        print(path)


if __name__ == "__main__":
    main()
