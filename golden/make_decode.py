"""Makes `decode/`: for each way a weight is stored, one small module and the weight the library decompresses from it.

    python make_decode.py         the cases that the installed compressed-tensors can make

compressed-tensors writes and reads different things in different releases, so three of them make the whole folder, each its
own cases (the `library` of a case): 0.19 nearly everything, 0.20 mxfp6, 0.12 what later releases dropped (act-order by group,
3/5/6/7-bit words with unused bits).

`<case>.safetensors` holds the tensors of one Linear under their local names (`weight_packed`, `weight_scale`, ...) and
`expected`, the weight from the library's own decompress, in the dtype it yields. `<case>.json` holds the scheme as a config
group and the shapes. A case is made by the library's quantize and pack from nasty values; those named `fuzz` then get random
codes and scales of every bit pattern that is allowed, so that their values need not look like weights.
"""

import hashlib
import json
import zlib
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parent / "decode"
RELEASE = ".".join(version("compressed-tensors").split(".")[:2])
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass
class Case:
    """One golden: how the weight is stored, its shape, and what is done to the stored tensors before they are decompressed."""

    name: str
    format: str
    weights: dict
    shape: tuple
    dtype: torch.dtype = BF16
    input_activations: dict | None = None
    poison: list = field(default_factory=list)
    shuffled_groups: bool = False  # act-order by group: any column may belong to any group, weight_g_idx says to which
    library: str = "0.19"
    note: str = ""

    def scheme(self):
        acts = QuantizationArgs(**self.input_activations) if self.input_activations else None
        return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**self.weights), input_activations=acts)

    def generator(self):
        return torch.Generator().manual_seed(zlib.crc32(self.name.encode()))


# --- values ---------------------------------------------------------------------------------------------------------


def nasty_weight(shape, dtype, generator):
    """Rows of very different size, a row and a stretch of zeros, outliers of either sign, negative zeros, many exact ties."""
    rows, columns = shape
    weight = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-12, 4, (rows, 1), generator=generator).float())
    weight[rows // 3] = 0
    weight[rows // 2, : columns // 2] = 0
    weight[rows // 2, 1] = -0.0
    weight[0, columns // 2] = 40.0
    weight[-1, columns // 3] = -77.0
    weight[1] = torch.randint(-15, 16, (columns,), generator=generator) / 2
    weight[2, ::2] = weight[2, ::2].abs()
    return weight.to(dtype)


def extremes(weight, args):
    """Minimum and maximum of each tensor, channel, group or block, shaped as the library shapes the scale."""
    rows, columns = weight.shape
    if args.strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if args.strategy in ("group", "tensor_group"):
        groups = weight.reshape(rows, columns // args.group_size, args.group_size)
        return groups.amin(-1), groups.amax(-1)
    height, width = args.block_structure
    padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
    blocks = padded.reshape(-(-rows // height), height, -(-columns // width), width)
    return blocks.amin((1, 3)), blocks.amax((1, 3))


def parameters(weight, args):
    """Scale, zero point and (where the scheme has one) global scale, by the library's min-max rule."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    low, high = extremes(weight, args)
    found = {}
    if args.strategy == "tensor_group":
        found["weight_global_scale"] = generate_gparam(weight.float().amin(), weight.float().amax())
    scale, zero = calculate_qparams(low, high, args, global_scale=found.get("weight_global_scale"))
    if args.strategy != "tensor_group" and not (args.type == "float" and args.group_size == 32):
        scale = scale.to(weight.dtype)
    return found | {"weight_scale": scale, "weight_zero_point": zero.to(getattr(args, "zp_dtype", None) or zero.dtype)}


# --- what may be done to stored tensors -----------------------------------------------------------------------------

ODD_SCALES = {  # zero, subnormal, smallest normal, plain odd, large: no product with a code overflows
    BF16: [0.0, 9.2e-41, 3e-39, 1.1754944e-38, 1.0 / 3, 0.1, 1e30, 2.0**118],
    F16: [0.0, 6e-8, 3e-5, 6.1035156e-05, 1.0 / 3, 0.1, 37.3, 255.0],
    F32: [0.0, 1.4e-45, 3e-39, 1.1754944e-38, 1.0 / 3, 0.1, 1e30, 2.0**118],
}


def odd_scales(case, stored, generator):
    """Every third scale replaced by one that breaks careless code. Codes under a zero scale stay as they were."""
    scale = stored["weight_scale"]
    flat, odd = scale.reshape(-1), torch.tensor(ODD_SCALES[scale.dtype], dtype=scale.dtype)
    where = torch.arange(0, len(flat), 3)
    flat[where] = odd[torch.randint(0, len(odd), (len(where),), generator=generator)]


def random_bytes(tensor, generator, exclude=()):
    """Random bytes in place of a tensor's, some values left out."""
    allowed = torch.tensor([b for b in range(256) if b not in exclude], dtype=torch.uint8)
    raw = tensor.view(torch.uint8)
    raw.copy_(allowed[torch.randint(0, len(allowed), raw.shape, generator=generator)])


def fuzz_fp8(case, stored, generator):
    """Every byte that is not a NaN, as FP8 code."""
    random_bytes(stored["weight"], generator, exclude=(0x7F, 0xFF))


def fuzz_int8(case, stored, generator):
    """Every byte as int8 code."""
    random_bytes(stored["weight"], generator)


def fuzz_packed(case, stored, generator):
    """Every byte as packed code (only for widths that fill their words)."""
    random_bytes(stored["weight_packed"], generator)


def fuzz_fp8_scales(case, stored, generator):
    """Each of the 127 non-negative finite FP8 scales, zero, subnormals and 448 included, in random order."""
    raw = stored["weight_scale"].view(torch.uint8).reshape(-1)
    order = torch.randperm(len(raw), generator=generator)
    raw[order] = (torch.arange(len(raw)) % 127).to(torch.uint8)


def odd_global_scale(case, stored, generator):
    """A divisor with a full mantissa: multiplying by its reciprocal gives other bits."""
    stored["weight_global_scale"] = torch.tensor([2688.0 / 0.7310586], dtype=F32)


def telling_global_scale(case, stored, generator):
    """A divisor found by search, which tells formulas apart after rounding to bf16: with it `code * (scale * (1 / divisor))` and
    `(code * scale) / divisor` differ from the library's `code * (scale / divisor)` in more than fifty pairs of code and scale."""
    stored["weight_global_scale"] = torch.tensor([1.8070586919784546 * 2048], dtype=F32)


def every_code(case, stored, generator):
    """All sixteen fp4 codes under every scale."""
    raw = stored["weight_packed"].view(torch.uint8)
    raw.copy_(
        torch.tensor([2 * i + 16 * (2 * i + 1) for i in range(8)], dtype=torch.uint8).repeat(raw.numel() // 8).view(raw.shape)
    )


def no_global_scale(case, stored, generator):
    """Without a divisor the library multiplies in bf16 by the bare FP8 scale, which is exact."""
    del stored["weight_global_scale"]


def fuzz_exponents(case, stored, generator):
    """E8M0 exponents from 0 up to the largest whose product with the largest code is finite."""
    top = {"mxfp4-pack-quantized": 252, "mxfp6-pack-quantized": 252, "mxfp8-quantized": 245}[case.format]
    raw = stored["weight_scale"].reshape(-1)
    order = torch.randperm(len(raw), generator=generator)
    raw[order] = torch.cat([torch.arange(0, 24), torch.arange(top - 7, top + 1), torch.arange(100, 100 + len(raw))])[
        : len(raw)
    ].to(torch.uint8)


# --- one case -------------------------------------------------------------------------------------------------------


def compress_now(case, weight, scheme):
    """Stored tensors and a decompress function by the class methods of 0.13 and later."""
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(case.format)
    stored = compressor.compress({"weight": weight} | parameters(weight, scheme.weights), scheme)
    return stored, lambda tensors: compressor.decompress(tensors, scheme)["weight"].data


def compress_then(case, weight, scheme):
    """The same by 0.12. Its decompress refuses packed zero points, so those cases call the two steps it is made of."""
    from compressed_tensors.compressors.quantized_compressors import pack_quantized
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    args = scheme.weights
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=CompressionFormat.pack_quantized.value)
    compressor = pack_quantized.PackedQuantizationCompressor(config=config)
    found = parameters(weight, args)
    order = None
    if case.shuffled_groups:
        columns = case.shape[1]
        shuffled = torch.randperm(columns, generator=case.generator())
        order = torch.empty(columns, dtype=torch.int32)
        order[shuffled] = (torch.arange(columns) // args.group_size).to(torch.int32)
    stored = compressor.compress_weight(
        weight, found["weight_scale"], args, None if args.symmetric else found["weight_zero_point"], g_idx=order
    )
    stored["weight_scale"] = found["weight_scale"]
    if order is not None:
        stored["weight_g_idx"] = order

    def decompress(tensors):
        if args.symmetric:
            return compressor.decompress_weight(tensors, args)
        shape = torch.Size(tensors["weight_shape"])
        codes = pack_quantized.unpack_from_int32(tensors["weight_packed"], args.num_bits, shape)
        zero = pack_quantized.unpack_from_int32(
            tensors["weight_zero_point"], args.num_bits, (shape[0], tensors["weight_scale"].shape[-1]), packed_dim=0
        )
        return dequantize(codes, tensors["weight_scale"], zero, args)

    return stored, decompress


def make(case):
    """Writes the two files of a case and returns their size in bytes."""
    generator = case.generator()
    weight = nasty_weight(case.shape, case.dtype, generator)
    if case.format == "dense":
        stored, decompress, group = {"weight": weight}, lambda tensors: tensors["weight"], None
    else:
        scheme = case.scheme()
        stored, decompress = (compress_then if case.library == "0.12" else compress_now)(case, weight, scheme)
        group = scheme.model_dump(mode="json") | {"format": case.format}
    stored = {name: tensor.detach().clone().contiguous() for name, tensor in stored.items()}
    for poison in case.poison:
        poison(case, stored, generator)
    expected = decompress(dict(stored)).detach().contiguous()
    assert expected.shape == case.shape and torch.isfinite(expected.float()).all(), case.name
    path = OUT / f"{case.name}.safetensors"
    save_file(stored | {"expected": expected.clone()}, path)
    about = {
        "case": case.name,
        "format": case.format,
        "config_group": group,
        "shape": list(case.shape),
        "model_dtype": str(case.dtype),
        "tensors": {name: [str(t.dtype), list(t.shape)] for name, t in sorted(stored.items())},
        "expected_dtype": str(expected.dtype),
        "expected_sha256": hashlib.sha256(expected.view(torch.uint8).numpy().tobytes()).hexdigest(),
        "compressed_tensors": version("compressed-tensors"),
        "torch": version("torch"),
        "note": case.note,
    }
    (OUT / f"{case.name}.json").write_text(json.dumps(about) + "\n")
    return path.stat().st_size


# --- the list -------------------------------------------------------------------------------------------------------


def integer(bits, group=None, symmetric=True, **more):
    """Weight args of an integer scheme: a group size, "channel" or "tensor"."""
    strategy = {"strategy": "group", "group_size": group} if isinstance(group, int) else {"strategy": group}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy, **more}


def fp8(strategy, **more):
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **more}


NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": torch.float8_e4m3fn,
}
MXFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
MXFP6, MXFP8 = MXFP4 | {"num_bits": 6}, MXFP4 | {"num_bits": 8}
INT8_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FP8_TOKEN = INT8_TOKEN | {"type": "float"}
PACK, INT, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
RAGGED = (33, 96)


def packed_cases():
    yield Case("pack-int4-sym-g128", PACK, integer(4, 128), (16, 256))
    yield Case("pack-int4-sym-g32", PACK, integer(4, 32), RAGGED)
    yield Case("pack-int4-sym-channel", PACK, integer(4, "channel"), (80, 64))
    yield Case("pack-int4-sym-tensor", PACK, integer(4, "tensor"), (16, 64))
    yield Case(
        "pack-int4-sym-g128-actorder-weight",
        PACK,
        integer(4, 128, actorder="weight"),
        (16, 256),
        note="act-order that leaves no trace in the file",
    )
    yield Case("pack-int4-asym-g128", PACK, integer(4, 128, False), (24, 256))
    yield Case(
        "pack-int4-asym-g32-ragged",
        PACK,
        integer(4, 32, False),
        RAGGED,
        note="33 rows: the last word of the zero points is part empty",
    )
    yield Case("pack-int4-asym-channel", PACK, integer(4, "channel", False), (80, 64))
    yield Case(
        "pack-int4-asym-tensor", PACK, integer(4, "tensor", False), (16, 64), note="a per-tensor zero point is not packed"
    )
    yield Case(
        "pack-int4-odd-columns",
        PACK,
        integer(4, "channel"),
        (5, 37),
        note="37 columns: the last word of each row is part empty",
    )
    yield Case("pack-int4-tiny", PACK, integer(4, "channel"), (3, 8))
    yield Case("pack-int8-sym-g128", PACK, integer(8, 128), (24, 256))
    yield Case("pack-int8-sym-channel", PACK, integer(8, "channel"), (80, 64))
    yield Case("pack-int8-asym-g64", PACK, integer(8, 64, False), (33, 128))
    yield Case("pack-int8-asym-channel", PACK, integer(8, "channel", False), (80, 64))
    for bits in (2, 3, 5, 6, 7):
        yield Case(f"pack-int{bits}-sym-g32", PACK, integer(bits, 32), RAGGED)
        yield Case(f"pack-int{bits}-asym-g32", PACK, integer(bits, 32, False), RAGGED)
        yield Case(f"pack-int{bits}-sym-channel", PACK, integer(bits, "channel"), (7, 352))
    yield Case("pack-int3-odd-columns", PACK, integer(3, "channel", False), (33, 301), note="a row ends in mid-word")
    for name, dtype in (("f16", F16), ("f32", F32)):
        yield Case(f"pack-int4-sym-g32-{name}", PACK, integer(4, 32), RAGGED, dtype)
        yield Case(f"pack-int4-asym-g32-{name}", PACK, integer(4, 32, False), RAGGED, dtype)
        yield Case(f"pack-int8-sym-channel-{name}", PACK, integer(8, "channel"), (24, 64), dtype)
    for name, dtype in (("bf16", BF16), ("f16", F16), ("f32", F32)):
        yield Case(f"pack-int4-sym-g32-fuzz-{name}", PACK, integer(4, 32), RAGGED, dtype, poison=[fuzz_packed, odd_scales])
        yield Case(
            f"pack-int8-asym-g32-fuzz-{name}", PACK, integer(8, 32, False), RAGGED, dtype, poison=[fuzz_packed, odd_scales]
        )


def plain_cases():
    token = {"input_activations": INT8_TOKEN}
    yield Case("int8-channel", INT, integer(8, "channel"), (80, 64), **token)
    yield Case("int8-tensor", INT, integer(8, "tensor"), RAGGED, **token)
    yield Case("int8-asym-channel", INT, integer(8, "channel", False), RAGGED, **token)
    yield Case("int8-asym-tensor", INT, integer(8, "tensor", False), RAGGED, **token)
    yield Case("int8-asym-g64", INT, integer(8, 64, False), (33, 128), **token)
    yield Case("int8-channel-f16", INT, integer(8, "channel"), RAGGED, F16, **token)
    yield Case("int8-channel-f32", INT, integer(8, "channel"), RAGGED, F32, **token)
    yield Case("int8-channel-fuzz", INT, integer(8, "channel"), RAGGED, poison=[fuzz_int8, odd_scales], **token)
    yield Case("w4a8-int4-in-int8-g128", INT, integer(4, 128), (16, 256), note="4-bit codes, one byte each", **token)
    yield Case(
        "w4afp8-int4-in-int8-g128",
        INT,
        integer(4, 128),
        (16, 256),
        input_activations=FP8_TOKEN,
        note="4-bit codes, one byte each",
    )
    yield Case("w3a8-int3-in-int8-g32", INT, integer(3, 32), RAGGED, note="3-bit codes, one byte each", **token)
    yield Case("naive-int8-channel", NAIVE, integer(8, "channel"), RAGGED)
    token = {"input_activations": FP8_TOKEN}
    yield Case("fp8-tensor", FLOAT, fp8("tensor"), RAGGED, **token)
    yield Case("fp8-channel", FLOAT, fp8("channel"), (80, 64), **token)
    yield Case("fp8-g128", FLOAT, fp8("group", group_size=128), (16, 256), **token)
    yield Case(
        "fp8-block-ragged",
        FLOAT,
        fp8("block", block_structure=[128, 128]),
        (140, 170),
        note="the last blocks are partial",
        **token,
    )
    yield Case("fp8-block-small", FLOAT, fp8("block", block_structure=[16, 32]), (50, 75), **token)
    yield Case("fp8-block-exact", FLOAT, fp8("block", block_structure=[32, 64]), (64, 128), **token)
    for name, dtype in (("f16", F16), ("f32", F32)):
        yield Case(f"fp8-channel-{name}", FLOAT, fp8("channel"), RAGGED, dtype, **token)
    for name, dtype in (("bf16", BF16), ("f32", F32)):
        yield Case(f"fp8-channel-fuzz-{name}", FLOAT, fp8("channel"), RAGGED, dtype, poison=[fuzz_fp8, odd_scales], **token)
    yield Case("naive-fp8-channel", NAIVE, fp8("channel"), RAGGED)
    yield Case("naive-fp8-tensor", NAIVE, fp8("tensor"), (16, 64))


def block_float_cases():
    yield Case("nvfp4", "nvfp4-pack-quantized", NVFP4, (16, 256))
    yield Case("nvfp4-ragged", "nvfp4-pack-quantized", NVFP4, (33, 208))
    yield Case(
        "nvfp4-f16-model", "nvfp4-pack-quantized", NVFP4, (16, 64), F16, note="bf16 comes out whatever the model's dtype is"
    )
    yield Case(
        "nvfp4-fuzz",
        "nvfp4-pack-quantized",
        NVFP4,
        (33, 208),
        poison=[fuzz_packed, fuzz_fp8_scales, odd_global_scale],
        note="every scale from 0 to 448, negative zeros, a divisor with a full mantissa",
    )
    yield Case(
        "nvfp4-division",
        "nvfp4-pack-quantized",
        NVFP4,
        (16, 256),
        poison=[every_code, fuzz_fp8_scales, telling_global_scale],
        note="every code under every scale, and a divisor whose reciprocal is not as good",
    )
    yield Case(
        "nvfp4-fuzz-unit-divisor",
        "nvfp4-pack-quantized",
        NVFP4,
        (16, 256),
        poison=[fuzz_packed, fuzz_fp8_scales, no_global_scale],
        note="no weight_global_scale: the library accepts that and divides by nothing",
    )
    yield Case("mxfp4", "mxfp4-pack-quantized", MXFP4, (16, 256))
    yield Case("mxfp4-ragged", "mxfp4-pack-quantized", MXFP4, RAGGED)
    yield Case(
        "mxfp4-fuzz",
        "mxfp4-pack-quantized",
        MXFP4,
        (16, 256),
        poison=[fuzz_packed, fuzz_exponents],
        note="exponents from 0 to 252",
    )
    yield Case("mxfp8", "mxfp8-quantized", MXFP8, RAGGED)
    yield Case(
        "mxfp8-fuzz",
        "mxfp8-quantized",
        MXFP8,
        (8, 256),
        poison=[fuzz_fp8, fuzz_exponents],
        note="exponents from 0 to 245; the smallest products underflow",
    )
    yield Case("mxfp6", "mxfp6-pack-quantized", MXFP6, RAGGED, library="0.20")
    yield Case("mxfp6-fuzz", "mxfp6-pack-quantized", MXFP6, (16, 256), library="0.20", poison=[fuzz_packed, fuzz_exponents])


def dense_cases():
    for name, dtype in (("bf16", BF16), ("f16", F16), ("f32", F32)):
        yield Case(f"dense-{name}", "dense", {}, (16, 48), dtype)


def legacy_cases():
    old = {"library": "0.12"}
    for group in (32, 128):
        yield Case(
            f"pack-int4-sym-g{group}-actorder-group",
            PACK,
            integer(4, group, actorder="group"),
            (9, 256),
            shuffled_groups=True,
            note="weight_g_idx",
            **old,
        )
    yield Case(
        "pack-int8-sym-g64-actorder-group",
        PACK,
        integer(8, 64, actorder="group"),
        (9, 256),
        shuffled_groups=True,
        note="weight_g_idx",
        **old,
    )
    for bits in (3, 5, 6, 7):
        yield Case(
            f"pack-int{bits}-sym-g32-padded",
            PACK,
            integer(bits, 32),
            RAGGED,
            note="floor(32/bits) codes a word, upper bits unused",
            **old,
        )
        yield Case(f"pack-int{bits}-sym-channel-padded", PACK, integer(bits, "channel"), (7, 352), **old)
        yield Case(
            f"pack-int{bits}-asym-g32-padded",
            PACK,
            integer(bits, 32, False),
            RAGGED,
            note="zero points in the padded layout too",
            **old,
        )
    yield Case(
        "pack-int4-sym-g128-0.12", PACK, integer(4, 128), (16, 256), note="the same bytes as later releases write", **old
    )


def main():
    torch.set_num_threads(2)
    OUT.mkdir(exist_ok=True)
    cases = [*packed_cases(), *plain_cases(), *block_float_cases(), *dense_cases(), *legacy_cases()]
    assert len({case.name for case in cases}) == len(cases)
    mine = [case for case in cases if case.library == RELEASE]
    size = sum(make(case) for case in mine)
    print(f"compressed-tensors {version('compressed-tensors')}: {len(mine)} of {len(cases)} cases, {size} bytes")


if __name__ == "__main__":
    main()
