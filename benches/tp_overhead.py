"""Measures what ranks and stages cost on the CPU: see README.md. Standard library only.

    python tp_overhead.py --ctq target/release/ctq

The same model, text and number of threads as one rank, as several, and as stages; all in turn, again and again. The
scores must be the same bits, or nothing is written.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.dont_write_bytecode = True
import wide_checkpoint  # noqa: E402
from machine import ROOT, commit, load, processor, run  # noqa: E402

HERE = Path(__file__).resolve().parent

# Name, and what `ctq eval` is given. The first is what the others are held against.
SETTINGS = [("tp 1", ["--tp", 1]), ("tp 2", ["--tp", 2]), ("tp 4", ["--tp", 4]), ("pp 2", ["--pp", 2])]
TEAMS = [2, 4]


def evaluate(options, model, choice, folder):
    """One scoring run, in a cache of its own so that none goes on from another: its record."""
    path = folder / "record.json"
    path.unlink(missing_ok=True)
    cache = tempfile.mkdtemp(dir=folder)
    command = [
        options.ctq, "eval", model, "--data", options.data, "--preset", "disjoint", "--ctx", options.ctx,
        "--rows", options.rows, "--acts", "off", "--device", "cpu", "--threads", options.threads, *choice,
        "--json", path, "--quiet",
    ]
    run(command, env={**os.environ, "CTQ_CACHE": cache})
    shutil.rmtree(cache)
    return json.loads(path.read_text())[0]


def overhead(options, model, folder):
    """Seconds of every round for each setting: A B C A B C ..., after one round that does not count."""
    seconds = {name: [] for name, _ in SETTINGS}
    scores = set()
    for number in range(options.rounds + 1):
        for name, choice in SETTINGS:
            record = evaluate(options, model, choice, folder)
            scores.add((record["total_nll"], record["perplexity"], record["method_id"]))
            if number > 0:
                seconds[name].append(record["seconds"])
            told = "warm-up" if number == 0 else f"round {number} of {options.rounds}"
            print(f"{told}, {name}: {record['seconds']:.2f} s", file=sys.stderr, flush=True)
    if len(scores) != 1:
        sys.exit(f"the scores differ, so there is nothing to compare: {sorted(scores)}")
    return seconds


def overhead_table(seconds):
    first = seconds[SETTINGS[0][0]]
    lines = [
        "| ranks and stages | median s | fastest | slowest | to tp 1 | least | most |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, rounds in seconds.items():
        # Round against round: what slows the machine for a while slows both.
        ratios = [own / one for own, one in zip(rounds, first)]
        cells = [name, *(f"{value:.2f}" for value in (statistics.median(rounds), min(rounds), max(rounds)))]
        cells += [f"{value:.3f}" for value in (statistics.median(ratios), min(ratios), max(ratios))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def collectives(options, ranks, folder):
    path = folder / "bench.json"
    print(f"collectives of {ranks} ranks", file=sys.stderr, flush=True)
    run([
        options.ctq, "bench", "--collective", "--tp", ranks, "--device", "cpu", "--threads", options.threads,
        "--rounds", options.rounds, "--json", path, "--quiet",
    ])
    return json.loads(path.read_text())


def collective_table(measured):
    team = measured["team"]
    lines = [
        f"{team['ranks']} ranks, {team['threads']} thread(s) each. Floor: {team['floor']}.",
        "",
        "| operation | of | model | tokens | MB | ms | fastest | slowest | GB/s | x floor |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for timing in measured["collectives"]:
        seconds, floor = timing["seconds"], timing["floor_seconds"]
        cells = [timing["operation"], timing["what"], timing["model"] or "", timing["tokens"] or ""]
        cells.append(f"{timing['bytes'] / 1e6:.3f}")
        cells += [f"{timing[key] * 1e3:.4f}" for key in ("seconds", "fastest_seconds", "slowest_seconds")]
        cells += [f"{timing['bytes'] / seconds / 1e9:.2f}", f"{seconds / floor:.1f}" if floor else "-"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def conditions(options, before):
    model = options.model.name if options.model else "made by wide_checkpoint.py"
    return [
        "| | |",
        "|---|---|",
        f"| date | {time.strftime('%Y-%m-%d', time.gmtime())} |",
        f"| machine | {processor()}, {os.cpu_count()} threads, {platform.system()} {platform.release()} |",
        f"| load before and after | {before} and {load()} |",
        f"| ctq | {run([options.ctq, '--version'])}, source {commit()} |",
        f"| Python | {platform.python_version()} |",
        f"| model | {model} |",
        f"| text | {options.data.name}, {options.rows} windows of {options.ctx} tokens |",
        f"| threads | {options.threads} in all, shared among the ranks |",
        f"| rounds | {options.rounds} of all settings in turn, after one that does not count |",
        f"| command | `{shlex.join(['python', 'benches/tp_overhead.py', *sys.argv[1:]])}` |",
    ]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("CTQ") or shutil.which("ctq") or ROOT / "target/release/ctq"
    parser.add_argument("--ctq", default=default, type=Path, help="the ctq binary, of a release build")
    parser.add_argument("--model", type=Path, help="checkpoint or container [default: wide_checkpoint.py makes one]")
    parser.add_argument("--data", type=Path, default=ROOT / "golden/bundled/text.txt", help="text to score")
    parser.add_argument("--ctx", type=int, default=512, help="tokens of a window")
    parser.add_argument("--rows", type=int, default=16, help="windows")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of all ranks together")
    parser.add_argument("--rounds", type=int, default=5, help="times that each setting is measured")
    parser.add_argument("--out", type=Path, default=HERE / "results/tp_overhead.md", help="Markdown file to write")
    options = parser.parse_args()
    if not options.ctq.exists():
        sys.exit(f"{options.ctq}: no ctq binary; build it with `cargo build --release` and name it with --ctq")
    if options.rounds < 1:
        sys.exit("--rounds: at least 1")
    options.ctq = options.ctq.resolve()
    return options


def main():
    options = arguments()
    before = load()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = options.model
        if source is None:
            source = folder / "wide"
            wide_checkpoint.write(source)
        model = source
        if not (source / "ctq.json").exists():
            # Every run would tile it anew otherwise.
            model = folder / "model.ctq"
            run([options.ctq, "convert", source, model, "--quiet"])
        seconds = overhead(options, model, folder)
        teams = [collectives(options, ranks, folder) for ranks in TEAMS]
    lines = ["# What ranks cost on the CPU", "", *conditions(options, before), ""]
    lines += ["## One model, scored", "", *overhead_table(seconds), ""]
    for measured in teams:
        lines += [f"## What {measured['team']['ranks']} ranks hand one another", "", *collective_table(measured), ""]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines))
    print("\n".join([*overhead_table(seconds), "", f"{options.out}"]))


if __name__ == "__main__":
    main()
