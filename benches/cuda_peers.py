"""ctq on a GPU beside torch, transformers and the kernels of others, in one run: see README.md.

    python cuda_peers.py --ctq target/release/ctq --part linears --seconds 540 --out results

Needs python3 with torch, and no Rust. What else there is to compare with is found or said to be missing: transformers,
compressed-tensors, humming (wheels in `--wheels` are unpacked for the run), Marlin's sources in `--marlin`. Each part
fits one call of ten minutes: linears, attention, model, stream. Parts write `cuda_peers-PART.json` to `--out`; `--part
report` makes one Markdown file of all that is there. Where a GPU is missing everything can be tried with `--device cpu
--tiny`.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path

sys.dont_write_bytecode = True
from machine import ROOT, commit, shown  # noqa: E402
from peers import goals  # noqa: E402

PARTS = ("linears", "attention", "model", "stream")


def say(text):
    print(text, file=sys.stderr, flush=True)


def unpack(folder):
    """Puts what is in a folder of wheels before everything that is installed."""
    wheels = sorted(folder.glob("*.whl")) if folder else []
    if not wheels:
        return []
    place = Path(tempfile.mkdtemp(prefix="wheels-"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(place)
    sys.path.insert(0, str(place))
    os.environ["PYTHONPATH"] = f"{place}:{os.environ.get('PYTHONPATH', '')}"
    return [wheel.name for wheel in wheels]


def measured(part, options, budget):
    """Runs one part."""
    if part == "linears":
        from peers.linears import Linears

        return Linears(options, budget).run()
    if part == "attention":
        from peers.attention import Attention

        return Attention(options, budget).run()
    from peers.models import Models

    models = Models(options, budget)
    return models.run_model() if part == "model" else models.run_stream()


def head(options):
    """What the numbers depend on."""
    import torch

    found = {"date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "source": commit(), "torch": torch.__version__}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["GPU"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
        found["GPU memory"] = f"{properties.total_memory / (1 << 30):.0f} GiB"
    found["command"] = f"`{shown(['python', 'benches/cuda_peers.py', *sys.argv[1:]])}`"
    return found


def run_part(part, options):
    from peers.timing import Budget

    start = time.monotonic()
    wheels = unpack(options.wheels)
    done = measured(part, options, Budget(options.seconds))
    told = {
        "cuda_peers_version": 1,
        "part": part,
        "head": {**head(options), "wheels": ", ".join(wheels) or "none", "seconds": f"{time.monotonic() - start:.0f}"},
        # Tiny sizes reach or miss nothing.
        "goals": {} if options.tiny else {name: value for name, value in done.goals().items() if value is not None},
        "markdown": done.markdown(),
        "missing": done.missing,
        **done.json(),
    }
    path = options.out / f"cuda_peers-{part}.json"
    path.write_text(json.dumps(told, indent=1, default=str) + "\n")
    return told


def report(folder):
    """One Markdown text of all parts that there are."""
    parts = [folder / f"cuda_peers-{part}.json" for part in PARTS]
    told = [json.loads(path.read_text()) for path in parts if path.exists()]
    if not told:
        sys.exit(f"{folder}: no part has been measured there; run one with --part and --out {folder.name}")
    found = {name: value for one in told for name, value in one["goals"].items()}
    lines = ["# ctq on a GPU, beside others", "", "## Targets", "", goals.table(found), ""]
    for one in told:
        lines += [one["markdown"], "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in one["head"].items()]
        if one["missing"]:
            lines += ["", "Not measured:", ""]
            lines += [f"- {name}: {reason}" for name, reason in one["missing"].items()]
        lines.append("")
    return "\n".join(lines)


def integers(text):
    return [int(part) for part in text.split(",")]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("CTQ") or shutil.which("ctq") or ROOT / "target/release/ctq"
    parser.add_argument("--part", choices=[*PARTS, "report"], required=True, help="what is measured")
    parser.add_argument("--ctq", default=default, type=Path, help="the ctq binary, of a release build")
    parser.add_argument("--device", default="cuda:0", help="where ctq computes")
    parser.add_argument("--seconds", type=float, default=540, help="what is not begun by then is left out (540)")
    parser.add_argument("--rounds", type=int, default=2, help="of linears and attention (2)")
    parser.add_argument("--rows", type=integers, default=[8192], help="tokens of linears, such as 2048,8192 (8192)")
    parser.add_argument("--models", type=lambda text: text.split(","), default=["llama-8b", "mistral-123b"],
                        help="whose shapes linears have")  # fmt: skip
    parser.add_argument("--schemes", type=lambda text: text.split(","), default=["w4a16", "nvfp4"],
                        help="of ctq's linears: w4a16, nvfp4, fp8, bf16")  # fmt: skip
    parser.add_argument("--paths", type=lambda text: text.split(","), default=["library", "hopper", "fused"],
                        help="by which ctq multiplies: values of CTQ_LINEAR")  # fmt: skip
    parser.add_argument("--layers", type=int, default=24, help="of the 123B model, resident and streamed (24)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels: humming, compressed-tensors")
    parser.add_argument("--marlin", type=Path, help="folder with Marlin's sources")
    parser.add_argument("--out", type=Path, default=Path("cuda-peers"), help="folder for the results (cuda-peers)")
    parser.add_argument("--tiny", action="store_true", help="sizes of no size to speak of, to try it out")
    options = parser.parse_args()
    options.ctq = options.ctq.resolve()
    options.contexts = options.attention_tokens = None
    if options.tiny:
        options.models, options.rows = ["tiny"], [128]
        options.contexts, options.attention_tokens = (64, 128), 128
    return options


def main():
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part != "report":
        if not options.ctq.exists():
            sys.exit(f"{options.ctq}: no ctq binary; build it with `cargo build --release` and name it with --ctq")
        told = run_part(options.part, options)
        say("\n".join(f"not measured: {name}: {reason}" for name, reason in told["missing"].items()))
    text = report(options.out)
    (options.out / "cuda_peers.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
