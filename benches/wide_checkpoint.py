"""Writes a Llama of random int4 weights, wide enough to say something about speed and small enough to make in seconds.

    python wide_checkpoint.py FOLDER

Hidden 1024, feed-forward 2816, 4 layers, 16 heads of 64 over 4 key-value heads, vocabulary 4096, W4A16 in groups of 128
(compressed-tensors, pack-quantized). The tokenizer is that of golden/bundled. Seeded: always the same bytes. Its
perplexity means nothing. Standard library only.
"""

import json
import random
import shutil
import struct
import sys
from pathlib import Path

BUNDLED = Path(__file__).resolve().parent.parent / "golden/bundled/W4A16"
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCABULARY, GROUP = 1024, 2816, 4, 16, 4, 4096, 128
SEED = 20261


def bf16(value):
    """One number that bf16 holds exactly."""
    return struct.pack("<f", value)[2:]


def random_bf16(source, count):
    """Numbers of magnitude 2^-7 to 2^-5: sign and mantissa are random, the upper exponent bits are not."""
    numbers = bytearray(source.randbytes(2 * count))
    numbers[1::2] = numbers[1::2].translate(bytes(byte & 0x80 | 0x3C for byte in range(256)))
    return bytes(numbers)


def int4(source, name, n, k):
    """A linear of n x k: random codes, a scale that keeps outputs about as large as inputs."""
    assert k % GROUP == 0, f"{name}: {k} inputs are no whole groups"
    return {
        f"{name}.weight_packed": ("I32", [n, k // 8], source.randbytes(n * k // 2)),
        f"{name}.weight_scale": ("BF16", [n, k // GROUP], bf16(1 / 128) * (n * k // GROUP)),
        f"{name}.weight_shape": ("I64", [2], struct.pack("<qq", n, k)),
    }


def tensors():
    source = random.Random(SEED)
    dim = HIDDEN // HEADS
    ones = ("BF16", [HIDDEN], bf16(1.0) * HIDDEN)
    table = [VOCABULARY, HIDDEN]
    found = {
        "model.embed_tokens.weight": ("BF16", table, random_bf16(source, VOCABULARY * HIDDEN)),
        "lm_head.weight": ("BF16", table, random_bf16(source, VOCABULARY * HIDDEN)),
        "model.norm.weight": ones,
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        found[f"{name}.input_layernorm.weight"] = ones
        found[f"{name}.post_attention_layernorm.weight"] = ones
        for linear, n, k in [
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", KV_HEADS * dim, HIDDEN),
            ("self_attn.v_proj", KV_HEADS * dim, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", INNER, HIDDEN),
            ("mlp.up_proj", INNER, HIDDEN),
            ("mlp.down_proj", HIDDEN, INNER),
        ]:
            found |= int4(source, f"{name}.{linear}", n, k)
    return found


def config():
    found = json.loads((BUNDLED / "config.json").read_text())
    found |= {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
    }
    # No order of groups is stored.
    found["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = None
    return found


def write(folder):
    folder.mkdir(parents=True, exist_ok=True)
    header, data, at = {}, [], 0
    for name, (dtype, shape, content) in tensors().items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(content)]}
        data.append(content)
        at += len(content)
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.writelines(data)
    (folder / "config.json").write_text(json.dumps(config(), indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder / name)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
