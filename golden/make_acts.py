"""Makes `acts/`: what the library's fake quantization does to an activation, scheme by scheme, in float32.

    python make_acts.py           the cases that the installed compressed-tensors can make (0.19 all but mxfp6, which needs 0.20)

`<case>.safetensors` holds `x` [1, T, K] float32, the library's `expected` of the same shape, the `scale` and `zero_point` it
used and, where the scheme has them, the static parameters a checkpoint stores (`input_scale`, `input_zero_point`,
`input_global_scale`, or `k_scale` for the key/value cases, where x is [1, heads, T, head dimension]). `<case>.json` holds the
quantization arguments. Everything comes out of `forward_quantize`, the function that the library's own Linear calls.

Bits, not only values: a symmetric dynamic scheme adds a zero point of zeros, so -0 in becomes +0 before rounding, while a
small negative number still rounds to -0; a static symmetric scheme has no zero point and keeps -0.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parent / "acts"
RELEASE = ".".join(version("compressed-tensors").split(".")[:2])
COLUMNS = 128
E4M3 = torch.float8_e4m3fn


# --- inputs ---------------------------------------------------------------------------------------------------------


def nasty_rows(columns=COLUMNS):
    """Rows [T, K], each with its own way to go wrong. The comments say which."""
    generator = torch.Generator().manual_seed(7)
    normal = lambda: torch.randn(columns, generator=generator)  # noqa: E731
    rows = [normal() for _ in range(6)]
    rows.append(torch.zeros(columns))  # nothing but zeros
    rows.append(torch.full((columns,), -0.0))  # negative zeros
    rows.append(normal() * 1e-37)  # subnormal scales
    rows.append(normal() * 1e-44)  # subnormal values, scales that underflow to nothing
    rows.append(normal() * 1e30)
    rows.append(normal().abs() + 0.5)  # all positive
    rows.append(-normal().abs() - 0.5)  # all negative, so the largest magnitude is
    rows.append(torch.full((columns,), 0.1))  # one value
    ties = torch.arange(columns).float() * 2 - 127.5  # the largest magnitude is a tie of the int8 grid
    rows.append(ties)
    halves = (torch.arange(columns) % 64).float() / 4 - 8  # exact binary fractions: ties for fp4 and int4
    rows.append(halves)
    rows.append(
        torch.exp2(torch.randint(-24, 9, (columns,), generator=generator).float())
        * (1 + torch.randint(0, 16, (columns,), generator=generator) / 16)
    )  # ties of fp8, and its subnormals
    outlier = normal() * 0.01
    outlier[77] = -300.0
    rows.append(outlier)  # everything but one rounds to nothing
    steps = normal()
    steps[::16] = torch.tensor([1.0, 1.4999999, 1.5, 1.7499999, 1.75, 1.7500001, 1.9999999, 2.0] * (columns // 128)) * 2
    rows.append(steps.clamp(-1.0, 4.0))  # group maxima around the bump of MX exponents
    rows.append(
        torch.tensor(
            [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, -6.0] * (columns // 16)
        )
    )  # midpoints of fp4
    return torch.stack(rows)


def tame_rows():
    """The rows that a single scale for the whole tensor can serve; ties for scales that are powers of two among them."""
    rows = nasty_rows()
    return torch.cat([rows[:8], rows[11:16], rows[17:]])


# --- schemes --------------------------------------------------------------------------------------------------------


def args(bits, kind, strategy, dynamic, **more):
    """Not yet a `QuantizationArgs`: a release refuses the arguments of another."""
    return {"num_bits": bits, "type": kind, "strategy": strategy, "dynamic": dynamic, **more}


def scalar(value, dtype=torch.float32):
    return torch.tensor([value], dtype=dtype)


def cases():
    """(release, name, input, arguments, name of the value, static parameters)"""
    nasty, tame, two_groups = nasty_rows()[None], tame_rows()[None], nasty_rows(256)[None]
    now = "0.19"
    yield now, "int8-token-sym-dynamic", nasty, args(8, "int", "token", True), "input", {}
    yield now, "int8-token-asym-dynamic", nasty, args(8, "int", "token", True, symmetric=False), "input", {}
    yield now, "int8-tensor-sym-dynamic", tame, args(8, "int", "tensor", True), "input", {}
    yield now, "int8-tensor-asym-dynamic", tame, args(8, "int", "tensor", True, symmetric=False), "input", {}
    yield now, "int4-token-sym-dynamic", nasty, args(4, "int", "token", True), "input", {}
    yield now, "int8-group128-sym-dynamic", two_groups, args(8, "int", "group", True, group_size=128), "input", {}
    yield now, "int8-tensor-sym-static", nasty, args(8, "int", "tensor", False), "input", {"input_scale": scalar(0.0390625)}
    yield (
        now,
        "int8-tensor-asym-static",
        nasty,
        args(8, "int", "tensor", False, symmetric=False),
        "input",
        {"input_scale": scalar(0.0227), "input_zero_point": scalar(-31, torch.int8)},
    )
    yield (
        now,
        "int8-tensor-asym-static-extreme-zero",
        nasty,
        args(8, "int", "tensor", False, symmetric=False),
        "input",
        {"input_scale": scalar(0.03125), "input_zero_point": scalar(-128, torch.int8)},
    )
    yield now, "fp8-token-dynamic", nasty, args(8, "float", "token", True), "input", {}
    yield now, "fp8-tensor-dynamic", tame, args(8, "float", "tensor", True), "input", {}
    yield now, "fp8-group128-dynamic", two_groups, args(8, "float", "group", True, group_size=128), "input", {}
    yield now, "fp8-tensor-static", nasty, args(8, "float", "tensor", False), "input", {"input_scale": scalar(0.0117)}
    yield now, "fp8-tensor-static-power-of-two", nasty, args(8, "float", "tensor", False), "input", {"input_scale": scalar(0.5)}
    nvfp4 = {"group_size": 16, "scale_dtype": E4M3}
    yield (
        now,
        "nvfp4-local",
        nasty,
        args(4, "float", "tensor_group", "local", **nvfp4),
        "input",
        {"input_global_scale": scalar(448.0 * 6.0 / 5.37)},
    )
    yield (
        now,
        "nvfp4-local-large-input",
        nasty,
        args(4, "float", "tensor_group", "local", **nvfp4),
        "input",
        {"input_global_scale": scalar(448.0 * 6.0 / 300.0)},
    )
    mx = {"group_size": 32, "scale_dtype": torch.uint8}
    yield now, "mxfp4-dynamic", nasty, args(4, "float", "group", True, **mx), "input", {}
    yield now, "mxfp8-dynamic", nasty, args(8, "float", "group", True, **mx), "input", {}
    yield "0.20", "mxfp6-dynamic", nasty, args(6, "float", "group", True, **mx), "input", {}
    heads = nasty.reshape(1, -1, 4, 32).transpose(1, 2)
    yield now, "kv-fp8-tensor-static", heads, args(8, "float", "tensor", False), "k", {"k_scale": scalar(0.0133)}
    yield (
        now,
        "kv-fp8-head-static",
        heads,
        args(8, "float", "attn_head", False),
        "k",
        {"k_scale": torch.tensor([0.0133, 0.25, 1.7, 0.004]).reshape(4, 1, 1)},
    )
    yield now, "kv-int8-tensor-static", heads, args(8, "int", "tensor", False), "k", {"k_scale": scalar(0.0227)}


# --- one case -------------------------------------------------------------------------------------------------------


def module_with(parameters):
    """A module that looks to the library like one of a loaded checkpoint."""
    module = torch.nn.Module()
    module.quantization_status = QuantizationStatus.COMPRESSED
    for name, value in parameters.items():
        module.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    return module


def make(name, x, arguments, base, parameters):
    """Writes the two files of a case and returns their size in bytes."""
    module, x = module_with(parameters), x.contiguous()
    expected = forward_quantize(module, x.clone(), base, arguments)
    assert expected.dtype == torch.float32 and expected.shape == x.shape, name
    assert torch.isfinite(expected).all(), name
    tensors = {"x": x, "expected": expected.contiguous()} | {key: value.contiguous() for key, value in parameters.items()}
    if arguments.dynamic:
        scale, zero = compute_dynamic_scales_and_zp(
            x.clone(), arguments, module, global_scale=parameters.get("input_global_scale")
        )
        tensors |= {"scale": scale.contiguous(), "zero_point": zero.to(torch.int8).contiguous()}
    path = OUT / f"{name}.safetensors"
    save_file(tensors, path)
    about = {
        "case": name,
        "args": arguments.model_dump(mode="json"),
        "shape": list(x.shape),
        "static": {key: value.flatten().tolist() for key, value in parameters.items()},
        "expected_sha256": hashlib.sha256(expected.contiguous().numpy().tobytes()).hexdigest(),
        "compressed_tensors": version("compressed-tensors"),
        "torch": version("torch"),
    }
    (OUT / f"{name}.json").write_text(json.dumps(about) + "\n")
    return path.stat().st_size


def main():
    torch.set_num_threads(2)
    OUT.mkdir(exist_ok=True)
    sizes = []
    for release, name, x, arguments, base, parameters in cases():
        if release == RELEASE:
            sizes.append(make(name, x, QuantizationArgs(**arguments), base, parameters))
    print(f"compressed-tensors {version('compressed-tensors')}: {len(sizes)} cases, {sum(sizes)} bytes")


if __name__ == "__main__":
    main()
