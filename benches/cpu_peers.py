"""Scores one window of one synthetic model with ctq, transformers and llama.cpp, side by side: see README.md.

    python cpu_peers.py --ctq target/release/ctq --python venv/bin/python --llama llama.cpp --cores 0,1

Standard library only, on Linux with `taskset`. `--python` is an interpreter with torch, transformers and
compressed-tensors; it also makes the checkpoints. `--llama` is llama.cpp's source folder, built in `build` there. A
peer that is not there is left out, and the results say so. llama.cpp comes with the sdist of llama-cpp-python; cmake
is quickest had by `pip install cmake`:

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
    tar xzf llama_cpp_python-0.3.36.tar.gz && cd llama_cpp_python-0.3.36/vendor/llama.cpp
    find . -exec touch {} +          # the files carry times to come, which make would wait for
    cmake -S . -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON -DGGML_OPENMP=ON \\
        -DGGML_LLAMAFILE=ON -DGGML_CPU_REPACK=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \\
        -DLLAMA_BUILD_SERVER=OFF -DLLAMA_OPENSSL=OFF -DCMAKE_SUPPRESS_REGENERATION=ON
    cmake --build build -j --target llama-bench llama-perplexity llama-quantize
"""

import argparse
import fnmatch
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.dont_write_bytecode = True
from machine import ROOT, commit, cpuinfo, instructions, load, memory, processor, run, shown  # noqa: E402
from peer_rows import COMPARED, CTX, ROWS, SCORED, Bench, Failed  # noqa: E402

HERE = Path(__file__).resolve().parent
STEMS = {"llama-1b": "1b", "llama-8b": "8b"}
QUANTIZED = {"Q4_0", "Q8_0"}
MIB = 1 << 20


def say(text):
    print(text, file=sys.stderr, flush=True)


# What there is to compare.


def absent(options):
    """Why a tool's rows cannot run, by tool."""
    missing = {}
    wanted = "import torch, transformers, compressed_tensors"
    done = subprocess.run([options.python, "-c", wanted], capture_output=True, text=True)
    if done.returncode != 0:
        missing["transformers"] = f"{done.stderr.strip().splitlines()[-1]}; give --python an interpreter that has it"
    for tool in ("llama-perplexity", "llama-bench"):
        if not options.llama:
            missing[tool] = "no --llama was given"
        elif not (options.llama / "build/bin" / tool).exists():
            missing[tool] = f"{options.llama.name} has no build/bin/{tool}; cpu_peers.py --help tells how to build it"
    return missing


def chosen(options, missing):
    """Rows that are asked for and can run."""
    rows = [row for row in ROWS if row.threads in options.threads]
    if options.only:
        rows = [row for row in rows if any(fnmatch.fnmatchcase(row.name, word) for word in options.only)]
    if not rows:
        sys.exit("--only and --threads leave no rows; there are:\n" + "\n".join(row.name for row in ROWS))
    for row in rows:
        if row.tool in missing:
            say(f"left out: {row.name}: {missing[row.tool]}")
    return [row for row in rows if row.tool not in missing]


def prepare(bench, rows, options):
    """Makes what is not there: checkpoints, containers, GGUF files."""
    files = {row.weights for row in rows if row.tool.startswith("llama")}
    schemes = {row.weights for row in rows if not row.tool.startswith("llama")}
    # Whatever llama.cpp quantizes itself comes of the dense weights.
    schemes |= {"NVFP4" if kind == "NVFP4" else "bf16" for kind in files if not bench.gguf(kind).exists()}
    lacking = sorted(scheme for scheme in schemes if not (bench.checkpoint(scheme) / "config.json").exists())
    if lacking:
        say(f"making checkpoints: {', '.join(lacking)}")
        layers = ["--layers", options.layers] if options.layers else []
        script = HERE / "synthetic_checkpoint.py"
        run([options.python, script, bench.folder, "--shape", options.shape, "--schemes", *lacking, *layers])
    for scheme in sorted({row.weights for row in rows if row.tool == "ctq"}):
        if not (bench.container(scheme) / "ctq.json").exists():
            say(f"converting {scheme}")
            run([bench.ctq, "convert", bench.checkpoint(scheme), bench.container(scheme), "--quiet"])
    for kind in sorted(files):
        make_gguf(bench, kind)


def make_gguf(bench, kind):
    """A GGUF file; it is written beside and renamed."""
    target = bench.gguf(kind)
    if target.exists():
        return
    say(f"making {target.name}")
    part = target.with_suffix(".part")
    if kind in QUANTIZED:
        make_gguf(bench, "BF16")
        run([bench.tool("llama-quantize"), bench.gguf("BF16"), part, kind])
    else:
        scheme = "NVFP4" if kind == "NVFP4" else "bf16"
        run([bench.python, HERE / "peer_gguf.py", bench.llama, bench.checkpoint(scheme), part])
    part.rename(target)


# Rounds.


def read(path):
    """Has the system hold a model's files in memory, so that no row waits for the disk."""
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.read(MIB):
                pass


def measure(bench, rows, rounds, report):
    """A B C A B C; what there is goes to `report` each time. Rows that fail are not tried again."""
    measured, failed = {row.name: [] for row in rows}, {}
    for number in range(1, rounds + 1):
        for row in rows:
            if row.name in failed:
                continue
            read(bench.model(row))
            try:
                one = bench.run(row)
            except Failed as error:
                failed[row.name] = str(error)
                say(f"round {number} of {rounds}, {row.name}: {error}")
                continue
            measured[row.name].append(one)
            say(f"round {number} of {rounds}, {row.name}: {one['seconds']:.2f} s, busy {one['busy']:.0%}")
            report(measured, failed)


def llama_nll(bench, rows):
    """Mean nll of every GGUF that the rows use."""
    found = {}
    for kind in sorted({row.weights for row in rows if row.tool.startswith("llama")}):
        say(f"nll of {kind}")
        try:
            found[kind] = bench.gguf_nll(kind)
        except Failed as error:
            say(str(error))
    return found


# Tables.


def spread(values, digits=2):
    return [f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))]


def nll_of(row, rounds, gguf_nll):
    if row.tool.startswith("llama"):
        return gguf_nll.get(row.weights)
    return rounds[-1]["nll"]


def row_table(rows, measured, gguf_nll):
    lines = [
        "| row | arithmetic | median s | fastest | slowest | first pass s | else s | busy | peak MiB | nll |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        rounds = measured[row.name]
        if not rounds:
            continue
        first = [one["first_seconds"] for one in rounds if "first_seconds" in one]
        other = [one["process_seconds"] - one["seconds"] - one.get("first_seconds", 0) for one in rounds]
        busy = min(one["busy"] for one in rounds)
        nll = nll_of(row, rounds, gguf_nll)
        cells = [row.name, row.arithmetic, *spread([one["seconds"] for one in rounds])]
        cells += [f"{statistics.median(first):.2f}" if first else "", f"{statistics.median(other):.2f}"]
        cells += [f"{busy:.0%}", f"{max(one['peak_bytes'] for one in rounds) / MIB:.0f}"]
        cells.append("" if nll is None else f"{nll:.5f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def ratios(rows, measured, gguf_nll):
    """For each pair of COMPARED that was measured: how many times as fast, round against round."""
    by_name, found = {row.name: row for row in rows}, []
    for own, other, goal in COMPARED:
        pairs = list(zip(measured.get(own, []), measured.get(other, [])))
        if not pairs:
            continue
        nll = [nll_of(by_name[name], measured[name], gguf_nll) for name in (own, other)]
        peaks = [max(one["peak_bytes"] for one in measured[name]) for name in (own, other)]
        found.append({
            "row": own,
            "against": other,
            "times_as_fast": [theirs["seconds"] / ours["seconds"] for ours, theirs in pairs],
            "goal": goal,
            "memory": peaks[0] / peaks[1],
            "nll_apart": None if None in nll else nll[0] - nll[1],
        })
    return found


def ratio_table(found):
    lines = [
        "| row | against | times as fast | least | most | goal | memory | nll apart |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for pair in found:
        goal, apart = pair["goal"], pair["nll_apart"]
        cells = [pair["row"], pair["against"], *spread(pair["times_as_fast"])]
        cells += [f"{goal:.2f}" if goal else "", f"{pair['memory']:.2f}", "" if apart is None else f"{apart:+.5f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def versions(measured):
    """What the tools said of themselves."""
    found = {}
    for rounds in measured.values():
        for one in rounds:
            found |= one.get("versions", {})
    return found


def llama_version(llama):
    text = (llama / "ggml/CMakeLists.txt").read_text()
    numbers = [re.search(rf"GGML_VERSION_{part} (\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    return "ggml " + ".".join(match.group(1) if match else "?" for match in numbers)


def conditions(options, bench, before, measured):
    """Name and value of what the numbers depend on."""
    told = versions(measured)
    layers = f"first {options.layers} layers, " if options.layers else ""
    sizes = f"{memory() / (1 << 30):.1f} GiB"
    clock = f"{float(cpuinfo('cpu MHz') or 0) / 1000:.2f} GHz as the system has it"
    found = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{processor()}, family {cpuinfo('cpu family')} model {cpuinfo('model')}, {clock}, "
        f"{os.cpu_count()} threads, {sizes}, {platform.system()} {platform.release()}",
        "instructions": " ".join(instructions()),
        "load before and after": f"{before} and {load()}",
        "cores": f"{', '.join(map(str, bench.cores))}; one thread takes the first",
        "ctq": f"{run([bench.ctq, '--version'])}, source {commit()}, kernels {told.pop('isa', 'not run')}",
        "transformers": ", ".join(f"{name} {number}" for name, number in told.items()) or "not run",
        "llama.cpp": llama_version(options.llama) if options.llama else "not run",
        "model": f"{options.shape}, {layers}made by synthetic_checkpoint.py",
        "text": f"{options.data.name}, one window of {CTX} tokens, the last {SCORED} scored",
        "rounds": f"{options.rounds} of all rows in turn",
        "command": f"`{shown(['python', 'benches/cpu_peers.py', *sys.argv[1:]])}`",
    }
    return found


def markdown(head, rows, measured, failed, missing, pairs, gguf_nll):
    lines = ["# One window on the CPU, beside others", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in head.items()]
    lines += ["", "## Seconds of the window", "", *row_table(rows, measured, gguf_nll)]
    if pairs:
        lines += ["", "## Times as fast", "", *ratio_table(pairs)]
    # One reason stands for all rows of a tool.
    reasons = {**failed, **{f"{tool} (all rows)": reason for tool, reason in missing.items()}}
    if reasons:
        lines += ["", "## Not measured", "", *(f"- {name}: {reason}" for name, reason in reasons.items())]
    return "\n".join([*lines, ""])


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("CTQ") or shutil.which("ctq") or ROOT / "target/release/ctq"
    parser.add_argument("--ctq", default=default, type=Path, help="the ctq binary, of a release build")
    parser.add_argument("--python", default=sys.executable, type=Path, help="interpreter with torch and transformers")
    parser.add_argument("--llama", type=Path, help="llama.cpp's source folder, with its build in `build`")
    parser.add_argument("--models", type=Path, default=ROOT / "target/bench-models", help="folder of the models")
    parser.add_argument("--shape", choices=STEMS, default="llama-1b", help="whose sizes the model has")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to try the script")
    parser.add_argument("--data", type=Path, default=ROOT / "golden/bundled/text.txt", help="4096 tokens or more")
    parser.add_argument("--cores", default=None, help="one thread takes the first [default: the first two]")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], choices=[1, 2], help="rows to run")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows by name, with *; a wrong name lists them")
    parser.add_argument("--rounds", type=int, default=3, help="times that each row is measured")
    parser.add_argument("--json", type=Path, help="write every round to this file too")
    parser.add_argument("--out", type=Path, default=HERE / "results/cpu_peers.md", help="Markdown file to write")
    return checked(parser.parse_args())


def checked(options):
    if not options.ctq.exists():
        sys.exit(f"{options.ctq}: no ctq binary; build it with `cargo build --release` and name it with --ctq")
    if options.rounds < 1:
        sys.exit("--rounds: at least 1")
    available = sorted(os.sched_getaffinity(0))
    cores = [int(core) for core in options.cores.split(",")] if options.cores else available[: max(options.threads)]
    if not set(cores) <= set(available):
        sys.exit(f"--cores {options.cores}: this process may use {available} only")
    if len(cores) < max(options.threads):
        sys.exit(f"{max(options.threads)} threads need as many cores, not {cores}; give --cores, or --threads 1")
    options.cores = cores
    # A link, as an interpreter of a virtual environment is, must stay one.
    options.python = options.python.absolute()
    options.ctq, options.models = options.ctq.resolve(), options.models.resolve()
    options.llama = options.llama and options.llama.resolve()
    return options


def main():
    # Ends by way of what is cleaned up, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = arguments()
    before = load()
    missing = absent(options)
    rows = chosen(options, missing)
    layers = f"-{options.layers}layers" if options.layers else ""
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(
            options.models, f"{STEMS[options.shape]}-{{}}{layers}", options.ctq, options.python, options.llama,
            options.data.resolve(), Path(scratch), options.cores,
        )  # fmt: skip
        prepare(bench, rows, options)
        gguf_nll = llama_nll(bench, rows)

        def report(measured, failed):
            head = conditions(options, bench, before, measured)
            pairs = ratios(rows, measured, gguf_nll)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(markdown(head, rows, measured, failed, missing, pairs, gguf_nll))
            if options.json:
                found = {"conditions": head, "rows": measured, "failed": failed, "missing": missing}
                found |= {"compared": pairs, "gguf_nll": gguf_nll}
                options.json.write_text(json.dumps(found, indent=1) + "\n")

        measure(bench, rows, options.rounds, report)
    print(options.out.read_text())


if __name__ == "__main__":
    main()
