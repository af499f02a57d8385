"""Scores the last tokens of one window with transformers, twice, and prints what it took as JSON.

    python peer_transformers.py CHECKPOINT TEXT --dtype bfloat16 --threads 1 --ctx 2048 --scored 512

The first pass unpacks a compressed-tensors checkpoint and is told apart. Only the scored rows go through the head, as
in ctq. Needs torch, transformers and, for packed checkpoints, compressed-tensors.
"""

import argparse
import importlib.metadata
import json
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], required=True, help="of weights and activations")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--ctx", type=int, required=True, help="tokens of the window")
    parser.add_argument("--scored", type=int, required=True, help="of these, the last so many are scored")
    return parser.parse_args()


def scored(model, ids, options):
    """Mean nll of the last tokens."""
    rows = torch.arange(options.ctx - options.scored, options.ctx) - 1
    logits = model(ids[None], use_cache=False, logits_to_keep=rows).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), ids[-options.scored :]).item()


def main():
    options = arguments()
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=getattr(torch, options.dtype)).eval()
    loaded = time.perf_counter() - began
    tokenizer = Tokenizer.from_file(str(options.checkpoint / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode(options.text.read_text()).ids[: options.ctx])
    seconds = []
    with torch.inference_mode():
        for _ in range(2):
            began, worked = time.perf_counter(), time.process_time()
            nll = scored(model, ids, options)
            seconds.append(time.perf_counter() - began)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "compressed-tensors")}
    found = {"load_seconds": loaded, "first_seconds": seconds[0], "seconds": seconds[1], "nll": nll}
    # Of the second pass: loading keeps one thread busy, however many there are.
    found["busy"] = (time.process_time() - worked) / seconds[1] / options.threads
    print(json.dumps(found | {"versions": versions}))


if __name__ == "__main__":
    main()
