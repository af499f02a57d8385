"""The full table: every model, protocol and arithmetic that an oracle knows, scored by ctq and set beside it.

    python3 golden/perplexity_table.py --ctq target/release/ctq --assets DIR > golden/perplexity_table.md

DIR holds `models/tiny-llama-wiki/*/oracle.json` (perplexities computed by Hugging Face transformers on the weights
that compressed-tensors decompresses) and `data/wikitext-2-raw/wiki.test.raw`. Needs nothing but Python's library.

Bounds, relative to the oracle's perplexity: f32 off 1e-5, f32 library 1e-4, bf16 off 3e-4, bf16 library 1e-3; each
window's mean nll: f32 off 1e-5, f32 library 3e-4. Exits 1 if one is broken.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile

PROTOCOLS = {
    "exl3-2025-small": ["--preset", "exl3-2025-small"],
    "exl3-compareq-2026": ["--preset", "exl3-compareq-2026"],
    "exl3-ppl (10 rows)": ["--preset", "exl3-ppl", "--rows", "10"],
    "disjoint (10 windows)": ["--preset", "disjoint", "--rows", "10"],
    "llamacpp (ctx 512, 40 chunks)": ["--preset", "llamacpp", "--ctx", "512", "--rows", "40"],
    "hf-strided (2048/512, first 12000 tokens)": ["--preset", "hf-strided", "--max-tokens", "12000"],
}
BOUNDS = {("f32", "off"): 1e-5, ("f32", "library"): 1e-4, ("bf16", "off"): 3e-4, ("bf16", "library"): 1e-3}
WINDOW_BOUNDS = {"off": 1e-5, "library": 3e-4}


def window_sums(path):
    """Sum of nll and number of positions of each window, from a ctq nll file."""
    with open(path, "rb") as file:
        data = file.read()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])

    def column(name, code):
        begin, end = header[name]["data_offsets"]
        body = data[8 + length + begin : 8 + length + end]
        return struct.unpack(f"<{len(body) // 8}{code}", body)

    sums = {}
    for window, nll in zip(column("window", "q"), column("nll", "d")):
        total, count = sums.get(window, (0.0, 0))
        sums[window] = (total + nll, count + 1)
    return [sums[window] for window in sorted(sums)]


def score(ctq, model, data, protocol, acts, compute, folder):
    """One record, and the worst difference of a window's mean nll from the oracle's."""
    out, nll = os.path.join(folder, "record.json"), os.path.join(folder, "nll.safetensors")
    command = [ctq, "-q", "eval", model, "--data", data, "--acts", acts, "--compute", compute]
    command += PROTOCOLS[protocol] + ["--json", out, "--nll", nll]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with open(out, encoding="utf-8") as file:
        return json.load(file)[0], window_sums(nll)


def rows(arguments):
    models = os.path.join(arguments.assets, "models", "tiny-llama-wiki")
    data = os.path.join(arguments.assets, "data", "wikitext-2-raw", "wiki.test.raw")
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(os.listdir(models)):
            model = os.path.join(models, name)
            with open(os.path.join(model, "oracle.json"), encoding="utf-8") as file:
                oracle = json.load(file)
            for acts, results in oracle["results"].items():
                for protocol, expected in results.items():
                    computes = ["f32", "bf16"] if protocol == "exl3-2025-small" else ["f32"]
                    for compute in computes:
                        record, windows = score(arguments.ctq, model, data, protocol, acts, compute, folder)
                        same_ids = record["tokens_sha256"] == oracle["tokens_sha256_int32le"][protocol]
                        worst = max(
                            abs(total / count - theirs / count)
                            for (total, count), theirs in zip(windows, expected["per_window_nll"], strict=True)
                        )
                        relative = abs(record["perplexity"] / expected["ppl"] - 1)
                        good = same_ids and record["count"] == expected["count"]
                        good = good and relative <= BOUNDS[compute, acts]
                        good = good and (compute == "bf16" or worst <= WINDOW_BOUNDS[acts])
                        yield name, protocol, acts, compute, record, expected["ppl"], relative, worst, good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ctq", required=True, help="the ctq binary")
    parser.add_argument("--assets", required=True, help="folder that holds models/ and data/")
    arguments = parser.parse_args()
    version = subprocess.run([arguments.ctq, "--version"], check=True, capture_output=True, text=True).stdout.strip()
    print(f"# Perplexities beside their oracles ({version})\n")
    print("Made by `golden/perplexity_table.py`; the oracle is Hugging Face transformers in f32 on the weights that")
    print("compressed-tensors decompresses. `worst window`: largest difference of a window's mean nll, nats.\n")
    print("| model | protocol | acts | compute | ctq | oracle | relative | worst window | within bounds |")
    print("|---|---|---|---|---|---|---|---|---|")
    broken = 0
    for name, protocol, acts, compute, record, theirs, relative, worst, good in rows(arguments):
        broken += not good
        print(
            f"| {name} | {protocol} | {acts} | {compute} | {record['perplexity']:.6f} | {theirs:.6f} "
            f"| {relative:.1e} | {worst:.1e} | {'yes' if good else 'NO'} |",
            flush=True,
        )
    print(f"\n{'All within bounds.' if not broken else f'{broken} rows out of bounds.'}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
