"""A float32 Hugging Face model whose weights are exactly what compressed-tensors decompresses.

This is the oracle's definition, in one place, for every script in this folder:

* a weight is what the library's own `decompress` yields, in the dtype it yields (so `scale * code` is rounded to bf16 where
  the scale is bf16), then upcast to float32, which is exact; every other parameter is upcast to float32;
* everything else (products, norms, rope, softmax, gates) is transformers in float32, eager attention, CPU;
* activation and kv-cache quantization is the library's own fake quantization in float32, and can be switched off;
* the tensors are read by hand from the safetensors files, so that no loader can quietly leave something out: every tensor of
  the checkpoint must be used and every parameter of the model must be set, or loading fails;
* experts, which transformers 5 fuses into one parameter, are unrolled into `nn.Linear`s, as the checkpoint stores them and as
  the library needs them to quantize their input. An expert sees its tokens as [1, tokens, hidden], so that "per token"
  means per token (the library would take a two-dimensional input for a single token).
"""

import json
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

WEIGHT_PREFIX = "weight"  # what belongs to a compressed weight: weight, weight_packed, weight_scale, ...


class UnrolledExperts(nn.ModuleDict):
    """The experts of one layer as separate Linears, in place of transformers' fused module."""

    def __init__(self, fused):
        super().__init__()
        self.act_fn = fused.act_fn
        for index in range(fused.num_experts):
            hidden, inner = fused.hidden_dim, fused.intermediate_dim
            self[str(index)] = nn.ModuleDict(
                {
                    "gate_proj": nn.Linear(hidden, inner, bias=False),
                    "up_proj": nn.Linear(hidden, inner, bias=False),
                    "down_proj": nn.Linear(inner, hidden, bias=False),
                }
            )

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """The same sum as the fused module: ascending experts, each weighted after its down projection."""
        total = torch.zeros_like(hidden_states)
        for index in range(len(self)):
            token, slot = torch.where(top_k_index == index)
            if len(token) == 0:
                continue
            expert, x = self[str(index)], hidden_states[token][None]
            y = expert["down_proj"](self.act_fn(expert["gate_proj"](x)) * expert["up_proj"](x))[0]
            total.index_add_(0, token, y * top_k_weights[token, slot, None])
        return total


def unroll_experts(model):
    """Replace every fused experts module of `model` by `UnrolledExperts`."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts"):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, UnrolledExperts(module))


MODULE_NAMES = [  # checkpoint spelling -> name in the model
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.experts\.(\d+)\.w1\.", r".experts.\1.gate_proj."),
    (r"\.experts\.(\d+)\.w2\.", r".experts.\1.down_proj."),
    (r"\.experts\.(\d+)\.w3\.", r".experts.\1.up_proj."),
]


def read_tensors(folder):
    """Every tensor of a checkpoint, under the names that the model uses."""
    tensors = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                renamed = name
                for pattern, replacement in MODULE_NAMES:
                    renamed = re.sub(pattern, replacement, renamed)
                assert renamed not in tensors, f"{renamed} occurs twice"
                tensors[renamed] = file.get_tensor(name)
    return tensors


def quantization_config(folder):
    """The library's view of a checkpoint's quantization_config, or None for a dense one."""
    raw = json.loads((Path(folder) / "config.json").read_text()).get("quantization_config")
    if raw is None:
        return None
    return QuantizationConfig.model_validate({k: v for k, v in raw.items() if k in QuantizationConfig.model_fields})


def decompressed(local, scheme, config):
    """The dense weight of one module, as the library yields it, from the tensors stored under its name."""
    form = scheme.format or config.format
    compressor = BaseCompressor.get_value_from_registry(getattr(form, "value", form))
    return compressor.decompress(dict(local), scheme)["weight"].data


def load(folder, weight_filter=None):
    """The oracle model of a checkpoint folder.

    `weight_filter(name, weight)` may replace a decompressed weight (used to measure what rounding is worth).
    """
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    unroll_experts(model)
    model.requires_grad_(False)
    scheme_config = quantization_config(folder)
    apply_quantization_config(model, scheme_config, show_progress=False)

    tensors, used, dtypes = read_tensors(folder), set(), set()
    for name, module in model.named_modules():
        local = {key[len(name) + 1 :]: key for key in tensors if key.rpartition(".")[0] == name}
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None and "weight_scale" in local:
            stored = {leaf: tensors[key] for leaf, key in local.items() if leaf.startswith(WEIGHT_PREFIX)}
            weight = decompressed(stored, scheme, scheme_config)
            dtypes.add(str(weight.dtype))
            for leaf in [leaf for leaf, _ in list(module.named_parameters(recurse=False)) if leaf.startswith(WEIGHT_PREFIX)]:
                delattr(module, leaf)
            module.weight = nn.Parameter(weight.float(), requires_grad=False)
            used |= {local[leaf] for leaf in stored}
        for leaf, key in local.items():
            if key in used:
                continue
            if getattr(module, leaf, None) is None:
                raise KeyError(f"{key}: the model has no such parameter")
            assert getattr(module, leaf).shape == tensors[key].shape, key
            setattr(module, leaf, nn.Parameter(tensors[key].float(), requires_grad=False))
            if leaf == "weight":
                dtypes.add(str(tensors[key].dtype))
            used.add(key)
        if weight_filter is not None and isinstance(module, nn.Linear):
            module.weight.data = weight_filter(name, module.weight.data)
    model.tie_weights()
    missing = set(tensors) - used
    unset = [
        name
        for name, _ in model.named_parameters()
        if name not in used and name + "_packed" not in used and not (name == "lm_head.weight" and config.tie_word_embeddings)
    ]
    assert not missing and not unset, f"unused tensors {sorted(missing)}, unset parameters {unset}"
    model.weight_dtypes = sorted(dtypes)
    return model


def quantizes_activations(model):
    """Whether any module of the model quantizes what flows through it."""
    schemes = [getattr(module, "quantization_scheme", None) for module in model.modules()]
    return any(s is not None and (s.input_activations or s.output_activations) for s in schemes)


@contextmanager
def activation_quantization(model, enabled):
    """Run a block with the library's activation and kv-cache quantization on or off."""
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = enabled
    try:
        yield
    finally:
        for module in model.modules():
            if hasattr(module, "quantization_scheme"):
                del module.quantization_enabled


@torch.no_grad()
def logits(model, ids, quantize_activations):
    """Logits [rows, length, vocabulary] in the model's dtype; each row is a forward pass of its own."""
    with activation_quantization(model, quantize_activations):
        return torch.cat([model(row[None], use_cache=False).logits for row in ids])


def to_float64(model):
    """The model itself with parameters and products in float64 (norms, rope and softmax stay float32 in transformers' code).

    Weight only, it shows how far another exact implementation may come out from the float32 one. Call it last.
    """
    return model.double()


@torch.no_grad()
def logits_under_noise(model, ids, quantize_activations, seed, ulps=1.0):
    """Logits when the input of every Linear is disturbed by about `ulps` units in the last place of float32.

    Rounding of activations is discontinuous: where an activation sits on a rounding boundary this moves the logits by far more
    than the noise, and no other exact implementation can be expected to agree better than that.
    """
    generator = torch.Generator().manual_seed(seed)

    def disturb(_module, inputs):
        noise = 1 + (torch.rand(inputs[0].shape, generator=generator) * 2 - 1) * ulps * 2.0**-23
        return (inputs[0] * noise, *inputs[1:])

    hooks = [m.register_forward_pre_hook(disturb) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        return logits(model, ids, quantize_activations)
    finally:
        for hook in hooks:
            hook.remove()


def relative(a, b):
    """Relative Frobenius distance of `b` from `a`."""
    return ((a.double() - b.double()).norm() / a.double().norm()).item()


@torch.no_grad()
def loader_check(folder, ids, weight_only):
    """How transformers' own loader compares, weight only: the relative distance of its logits, or the error it raises."""
    from compressed_tensors.compressors import decompress_module

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager", local_files_only=True)
        if hasattr(model, "ct_decompress_hook"):
            model.ct_decompress_hook.remove()
        for module in model.modules():
            if getattr(module, "quantization_scheme", None) is not None and getattr(
                module.quantization_scheme, "weights", None
            ):
                decompress_module(module)
        nn.Module.float(model).eval()  # transformers refuses its own float() for a quantized model
        return {"relative": relative(weight_only, logits(model, ids, False)), "error": None}
    except Exception as error:  # the point is to record what it says
        return {"relative": None, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}


def versions():
    """The versions that made a value."""
    import platform
    from importlib.metadata import version

    names = ["torch", "transformers", "compressed-tensors", "llmcompressor", "safetensors", "tokenizers"]
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name.replace("-", "_")] = version(name)
        except Exception:
            pass
    return found
