"""Makes `families/`: tiny random checkpoints of every architecture feature, with logits by Hugging Face.

    python make_families.py [NAME...]      all cases, or those named

A folder holds the checkpoint (`config.json`, `model*.safetensors`; where two spellings of a config exist, the older one as
`config.legacy.json`, which means the same model), `oracle.safetensors` (`input_ids` [2, 48], `logits_f32` [2, 48, V], and
`logits_weight_only_f32` where activations or the kv cache are quantized) and `oracle.json` (what was made, and how sharp the
logits are). What the oracle is: see `oracle_hf.py`. Quantized weights are min-max, packed by the library's own compressors.

Rounding of activations is discontinuous, so the input ids are chosen from left to right such that noise of about one unit in
the last place does not move the logits; `stability_search.ulp_noise` says what is left of it.
"""

import json
import shutil
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.modeling import register_key_hook, register_value_hook
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

import oracle_hf
from make_decode import parameters

OUT = Path(__file__).resolve().parent / "families"
ROWS, LENGTH = 2, 48
SEARCH_SEEDS, SEARCH_ULPS = range(1, 25), 4.0  # more noise while searching than afterwards leaves a margin
STABLE, ATTEMPTS, RESTARTS = 8e-6, 200, 4  # a position is stable below this relative move; tokens tried for it; rows begun


@dataclass
class Family:
    """One case: a config, the dtype on disk, what is quantized, how it is written."""

    name: str
    config: transformers.PretrainedConfig
    feature: str
    dtype: torch.dtype = torch.bfloat16
    groups: dict = field(default_factory=dict)  # config group -> scheme as a dict
    ignore: list = field(default_factory=lambda: ["lm_head"])
    kv_cache: dict | None = None
    legacy: str = ""  # "": one spelling; "beside": both; "only": the older one alone
    shard_bytes: int | None = None

    @property
    def folder(self):
        return OUT / self.name

    @property
    def seed(self):
        return zlib.crc32(self.name.encode())


# --- the random model -----------------------------------------------------------------------------------------------


@torch.no_grad()
def random_model(family):
    """A model in the dtype of its file whose logits have a spread of a few units and whose every parameter matters."""
    generator = torch.Generator().manual_seed(family.seed)
    model = AutoModelForCausalLM.from_config(family.config, dtype=torch.float32, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        elif parameter.dim() == 1:
            parameter.copy_(1 + 0.2 * noise)
        elif "embed_tokens" in name:
            parameter.copy_(noise * (0.25 if family.config.tie_word_embeddings else 1.0))
        else:
            parameter.copy_(noise * 1.3 / parameter.shape[-1] ** 0.5)
    model.config.dtype = family.dtype
    return model.to(family.dtype).requires_grad_(False)


# --- quantization ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantize(model, family):
    """Put the family's schemes on the model, their parameters by min-max, and compress it with the library."""
    oracle_hf.unroll_experts(model)
    model.to(family.dtype)
    random_experts(model, family)
    groups = {name: QuantizationScheme(**scheme) for name, scheme in family.groups.items()}
    kv_cache = QuantizationArgs(**family.kv_cache) if family.kv_cache else None
    config = QuantizationConfig(
        config_groups=groups, ignore=family.ignore, kv_cache_scheme=kv_cache, quantization_status=QuantizationStatus.INITIALIZED
    )
    apply_quantization_config(model, config, show_progress=False)
    calibrate(model, family)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            continue
        for name, value in parameters(module.weight.data, scheme.weights).items():
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    return compressor


def random_experts(model, family):
    """Fresh random values for unrolled experts, whose Linears start with whatever torch gave them."""
    generator = torch.Generator().manual_seed(family.seed + 1)
    for name, module in model.named_modules():
        if ".experts." in name and isinstance(module, nn.Linear):
            noise = torch.randn(module.weight.shape, generator=generator)
            module.weight = nn.Parameter((noise * 1.3 / module.in_features**0.5).to(family.dtype), requires_grad=False)


@torch.no_grad()
def calibrate(model, family):
    """Static activation parameters from what a few random rows send through each module, activation quantization off."""
    seen, hooks = {}, []

    def watch(module, base, value):
        low, high = value.float().amin().reshape(1), value.float().amax().reshape(1)
        old = seen.get((module, base))
        seen[module, base] = (low, high) if old is None else (torch.minimum(old[0], low), torch.maximum(old[1], high))

    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.input_activations is None or scheme.input_activations.dynamic is True:
            continue
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(lambda m, inputs: watch(m, "input", inputs[0])))
        else:
            hooks.append(register_key_hook(module, lambda m, value: watch(m, "k", value)))
            hooks.append(register_value_hook(module, lambda m, value: watch(m, "v", value)))
    ids = torch.randint(0, family.config.vocab_size, (8, LENGTH), generator=torch.Generator().manual_seed(family.seed + 2))
    oracle_hf.logits(model, ids, False)
    for hook in hooks:
        hook.remove()
    for (module, base), (low, high) in seen.items():
        args = module.quantization_scheme.input_activations
        if args.strategy == "tensor_group":
            values = {"global_scale": generate_gparam(low, high)}
        else:
            scale, zero = calculate_qparams(low, high, args)
            values = {"scale": scale.to(family.dtype), "zero_point": zero}
        for name, value in values.items():
            if hasattr(module, f"{base}_{name}"):
                setattr(module, f"{base}_{name}", nn.Parameter(value, requires_grad=False))


# --- files ----------------------------------------------------------------------------------------------------------


def write_checkpoint(family):
    """The checkpoint folder: dense ones by transformers, quantized ones tensor by tensor as the library left them."""
    shutil.rmtree(family.folder, ignore_errors=True)
    family.folder.mkdir(parents=True)
    model = random_model(family)
    if family.groups or family.kv_cache:
        compressor = quantize(model, family)
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        if family.config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        save_file(tensors, family.folder / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(family.folder)
        compressor.update_config(family.folder)
    else:
        model.save_pretrained(family.folder, max_shard_size=family.shard_bytes or "1GB")
        (family.folder / "generation_config.json").unlink(missing_ok=True)
    path = family.folder / "config.json"
    if family.legacy:
        older = json.dumps(legacy_spelling(json.loads(path.read_text())), indent=2, sort_keys=True) + "\n"
        (path if family.legacy == "only" else family.folder / "config.legacy.json").write_text(older)


def legacy_spelling(config):
    """A config of transformers 5 as transformers 4 wrote it: rope_theta and rope_scaling, torch_dtype, no layer types."""
    config = dict(config)
    config["torch_dtype"] = config.pop("dtype")
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config.pop("layer_types", None)
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts", config.get("num_experts"))
    config["transformers_version"] = "4.51.3"
    return config


# --- the oracle -----------------------------------------------------------------------------------------------------


def stable_at_the_end(model, row):
    """Whether noise leaves the logits of the last position of a row where they are."""
    plain = oracle_hf.logits(model, row[None], True)[0, -1]
    return all(
        oracle_hf.relative(plain, oracle_hf.logits_under_noise(model, row[None], True, seed, SEARCH_ULPS)[0, -1]) < STABLE
        for seed in SEARCH_SEEDS
    )


def stable_row(model, vocabulary, generator):
    """One row grown token by token, and at how many positions no stable token was found. What is once unstable spoils what follows."""
    row, unstable = torch.empty(0, dtype=torch.int64), 0
    for _ in range(LENGTH):
        for _ in range(ATTEMPTS):
            candidate = torch.cat([row, torch.randint(0, vocabulary, (1,), generator=generator)])
            if unstable or stable_at_the_end(model, candidate):
                break
        else:
            unstable = 1
        row = candidate
        unstable += unstable > 0
    return row, max(unstable - 1, 0)


def choose_ids(model, family):
    """Input ids; where activations are quantized, such that none sits on a rounding boundary if a few attempts can find them."""
    generator = torch.Generator().manual_seed(family.seed + 3)
    if not oracle_hf.quantizes_activations(model):
        return torch.randint(0, family.config.vocab_size, (ROWS, LENGTH), generator=generator), 0
    rows = []
    for _ in range(ROWS):
        best = None
        for _ in range(RESTARTS):
            row, unstable = stable_row(model, family.config.vocab_size, generator)
            if best is None or unstable < best[1]:
                best = (row, unstable)
            if unstable == 0:
                break
        rows.append(best)
    return torch.stack([row for row, _ in rows]), sum(unstable for _, unstable in rows)


@torch.no_grad()
def write_oracle(family):
    """`oracle.safetensors` and `oracle.json` of a checkpoint that is there."""
    model = oracle_hf.load(family.folder)
    quantizes = oracle_hf.quantizes_activations(model)
    ids, unstable = choose_ids(model, family)
    off = oracle_hf.logits(model, ids, False)
    tensors = {"input_ids": ids, "logits_f32": off}
    about = {
        "name": family.name,
        "feature": family.feature,
        "arch": family.config.model_type,
        "activation_quantization": quantizes,
        "kv_cache_quantization": family.kv_cache is not None,
        "weight_dtypes": model.weight_dtypes,
        "hf_loader_check": oracle_hf.loader_check(family.folder, ids, off),
        "logits_std": off.std().item(),
        "nll_weight_only": mean_nll(off, ids),
        "versions": oracle_hf.versions(),
        "seed": family.seed,
    }
    if quantizes:
        on = oracle_hf.logits(model, ids, True)
        tensors |= {"logits_f32": on, "logits_weight_only_f32": off}
        noisy = [oracle_hf.relative(on, oracle_hf.logits_under_noise(model, ids, True, seed)) for seed in (11, 12, 13, 14)]
        about["stability_search"] = {"ulp_noise": max(noisy), "positions_possibly_unstable": unstable}
        about["activation_quant_off_vs_on"] = {"rel_fro": oracle_hf.relative(on, off)}
        about["nll"] = mean_nll(on, ids)
    about["ulp_noise"] = about.get("stability_search", {}).get(
        "ulp_noise",
        max(oracle_hf.relative(off, oracle_hf.logits_under_noise(model, ids, False, seed)) for seed in (11, 12, 13, 14)),
    )
    double = oracle_hf.logits(oracle_hf.to_float64(model), ids, False)
    about["noise_floor_weight_only_f64"] = {"rel_fro": oracle_hf.relative(off, double)}
    if (family.folder / "config.legacy.json").exists():
        about["legacy_config_gives_the_same_logits"] = same_with_legacy_config(family, ids, off)
    save_file(tensors, family.folder / "oracle.safetensors")
    (family.folder / "oracle.json").write_text(json.dumps(about, indent=1) + "\n")
    return about


def same_with_legacy_config(family, ids, off):
    """Whether transformers reads the older spelling as the same model, bit for bit."""
    twin = family.folder.parent / f".{family.name}-legacy"
    shutil.copytree(family.folder, twin, dirs_exist_ok=True)
    shutil.copy(family.folder / "config.legacy.json", twin / "config.json")
    same = torch.equal(off, oracle_hf.logits(oracle_hf.load(twin), ids, False))
    shutil.rmtree(twin)
    return same


def mean_nll(logits, ids):
    """Mean of -ln p of the next token, in float64 of the float32 logits."""
    return nn.functional.cross_entropy(logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten()).item()


# --- schemes --------------------------------------------------------------------------------------------------------


def weights(bits, kind="int", **more):
    return {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False, **more}


INT8_CHANNEL = weights(8, strategy="channel")
INT4_G32 = weights(4, strategy="group", group_size=32)
INT8_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
INT8_STATIC_ASYM = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}
FP8_STATIC = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
NVFP4 = weights(4, "float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn)
MXFP4 = weights(4, "float", strategy="group", group_size=32, scale_dtype=torch.uint8)


def linear(weight, activations=None, targets=("Linear",)):
    return {"targets": list(targets), "weights": weight, "input_activations": activations}


# --- the list -------------------------------------------------------------------------------------------------------

SMALL = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)


THIN = SMALL | {"intermediate_size": 48}  # for dense cases, which need no groups; 48 is no multiple of a tile


def llama(**more):
    return transformers.LlamaConfig(**SMALL | {"rms_norm_eps": 1e-5, "rope_parameters": rope()} | more)


def rope(theta=10000.0, kind="default", **more):
    return {"rope_type": kind, "rope_theta": theta, **more}


def moe(**more):
    return (
        SMALL | {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "rope_parameters": rope(1e6)} | more
    )


def families():
    yield Family(
        "llama2-f16",
        llama(num_key_value_heads=4, intermediate_size=48),
        "Llama 2: as many kv heads as heads, theta 10000, float16 weights, config as transformers 4 wrote it",
        torch.float16,
        legacy="only",
    )
    yield Family(
        "llama-f32", llama(intermediate_size=32, tie_word_embeddings=True), "float32 weights, tied head", torch.float32
    )
    yield Family(
        "llama-tied-linear-rope",
        llama(tie_word_embeddings=True, rope_parameters=rope(20000.0, "linear", factor=4.0)),
        "tied head, linear rope scaling",
        legacy="beside",
    )
    yield Family(
        "llama-bias",
        llama(tie_word_embeddings=True, intermediate_size=48, attention_bias=True, mlp_bias=True),
        "biases in attention and feed-forward",
    )
    yield Family(
        "llama3-rope",
        llama(
            intermediate_size=48,
            rope_parameters=rope(
                5e5, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
            ),
        ),
        "llama3 rope scaling, both spellings",
        legacy="beside",
    )
    yield Family(
        "mistral-sliding",
        transformers.MistralConfig(**THIN | {"sliding_window": 16, "rope_parameters": rope(1e6)}),
        "a window of 16 positions, four shards with an index",
        legacy="beside",
        shard_bytes=48_000,
    )
    yield Family(
        "qwen2-sliding",
        transformers.Qwen2Config(
            **{k: v for k, v in THIN.items() if k != "head_dim"}
            | {
                "tie_word_embeddings": True,
                "use_sliding_window": True,
                "sliding_window": 16,
                "max_window_layers": 1,
                "rope_parameters": rope(1e6),
            }
        ),
        "q, k, v biases; the first layer sees all, the second 16 positions",
        legacy="beside",
    )
    yield Family(
        "qwen3-yarn",
        transformers.Qwen3Config(
            **THIN
            | {
                "head_dim": 32,
                "tie_word_embeddings": True,
                "rope_parameters": rope(1e6, "yarn", factor=8.0, original_max_position_embeddings=16),
            }
        ),
        "qk-norm, yarn, heads wider than hidden / heads",
        legacy="beside",
    )
    yield Family(
        "mixtral-sliding",
        transformers.MixtralConfig(
            **SMALL
            | {
                "intermediate_size": 24,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "sliding_window": 16,
                "rope_parameters": rope(1e6),
            }
        ),
        "experts, a window of 16 positions",
        legacy="beside",
    )
    yield Family(
        "qwen3moe-mlp-only",
        transformers.Qwen3MoeConfig(
            **moe(mlp_only_layers=[0], norm_topk_prob=False, num_experts=6, moe_intermediate_size=24, intermediate_size=48)
        ),
        "a dense first layer; router weights not renormalised",
        legacy="beside",
    )
    yield Family(
        "qwen3moe-nvfp4",
        transformers.Qwen3MoeConfig(**moe(norm_topk_prob=True)),
        "NVFP4 experts with quantized activations",
        groups={"group_0": linear(NVFP4, NVFP4 | {"dynamic": "local"})},
    )
    yield Family(
        "llama-kv-fp8",
        llama(),
        "int8 weights, kv cache quantized to fp8 with static scales",
        groups={"group_0": linear(INT8_CHANNEL)},
        kv_cache=FP8_STATIC,
    )
    yield Family(
        "llama-kv-fp8-only",
        llama(tie_word_embeddings=True),
        "bf16 weights, nothing quantized but the kv cache",
        kv_cache=FP8_STATIC,
    )
    yield Family(
        "llama-head-w8",
        llama(),
        "int4 layers, int8 head: an exact name beats a class name",
        groups={"group_0": linear(INT4_G32), "group_1": linear(INT8_CHANNEL, targets=["lm_head"])},
        ignore=[],
    )
    yield Family(
        "llama-w4a8",
        llama(tie_word_embeddings=True),
        "int4 weights stored one per byte, int8 activations per token",
        groups={"group_0": linear(INT4_G32, INT8_TOKEN)},
    )
    yield Family(
        "llama-int8-static-asym",
        llama(tie_word_embeddings=True),
        "int8 weights, static asymmetric int8 activations",
        groups={"group_0": linear(INT8_CHANNEL, INT8_STATIC_ASYM)},
    )
    yield Family(
        "llama-mxfp4",
        llama(tie_word_embeddings=True),
        "MXFP4 weights and activations",
        groups={"group_0": linear(MXFP4, MXFP4 | {"dynamic": True})},
    )
    yield Family(
        "llama-embedding-w8-tied",
        llama(tie_word_embeddings=True),
        "an int8 embedding that is also the head",
        groups={"group_0": linear(INT4_G32), "group_1": linear(INT8_CHANNEL, targets=["re:.*embed_tokens$"])},
    )


def main():
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    wanted = sys.argv[1:]
    for family in families():
        if wanted and family.name not in wanted:
            continue
        write_checkpoint(family)
        about = write_oracle(family)
        size = sum(path.stat().st_size for path in family.folder.iterdir())
        print(
            f"{family.name:26s} {size:7d} bytes  std {about['logits_std']:.2f}  f64 {about['noise_floor_weight_only_f64']['rel_fro']:.1e}"
            f"  ulp {about['ulp_noise']:.1e}  loader {about['hf_loader_check']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
