#!/usr/bin/env python3
"""Instruction mix of the inner loops of the CPU's products, from the disassembly of a binary.

    cargo build --release
    python scripts/inner_loops.py target/release/ctq

Finds every loop without a loop inside it that holds at least MIN multiply-adds, and prints as a Markdown table how many
instructions it has of which kind and how many touch the stack: a sum that was spilled would be read from and written to
it. Exit 1 where one of them does. Needs objdump and Python 3.9 or later.
"""

import argparse
import re
import subprocess
import sys
from collections import Counter

MIN = 12
DOTS = ("vdpbf16ps", "vpdpbusd", "vfmadd", "vpmaddwd")


def functions(binary):
    """(name, [(address, mnemonic, operands)]) of each function that multiplies."""
    command = ["objdump", "-d", "--no-show-raw-insn", "-C", binary]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    name, body = None, []
    for line in lines:
        head = re.match(r"[0-9a-f]+ <(.*)>:$", line)
        if head:
            if body:
                yield name, body
            name, body = head.group(1), []
            continue
        found = re.match(r"\s*([0-9a-f]+):\s+(\S+)\s*(.*)$", line)
        if found:
            body.append((int(found.group(1), 16), found.group(2), found.group(3)))
    if body:
        yield name, body


def inner_loops(body):
    """Runs of instructions that a jump at their end goes back to, and that hold no other such run."""
    index = {address: at for at, (address, _, _) in enumerate(body)}
    spans = []
    for at, (_, mnemonic, operands) in enumerate(body):
        target = re.match(r"([0-9a-f]+) ", operands) if mnemonic.startswith("j") else None
        start = index.get(int(target.group(1), 16)) if target else None
        if start is not None and start <= at:
            spans.append((start, at))
    for start, end in spans:
        if not any(other != (start, end) and start <= other[0] and other[1] <= end for other in spans):
            yield body[start : end + 1]


def describe(loop):
    kinds = Counter()
    for _, mnemonic, operands in loop:
        if mnemonic.startswith(DOTS):
            kinds["dot"] += 1
        elif "broadcast" in mnemonic:
            kinds["broadcast"] += 1
        elif mnemonic.startswith("prefetch"):
            kinds["prefetch"] += 1
        elif mnemonic.startswith(("vmov", "vpmov")):
            kinds["load or store"] += 1
        else:
            kinds["other"] += 1
        if "(%rsp" in operands and re.search(r"%[xyz]mm", operands):
            kinds["stack"] += 1
    return kinds


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("binary", help="a release build of ctq")
    binary = arguments.parse_args().binary
    rows = []
    for name, body in functions(binary):
        if "cpu::product::" not in name:
            continue
        for loop in inner_loops(body):
            kinds = describe(loop)
            if kinds["dot"] >= MIN:
                dot = next(mnemonic for _, mnemonic, _ in loop if mnemonic.startswith(DOTS))
                rows.append((re.sub(r"^ctq_kernels::", "", name), dot, len(loop), kinds))
    if not rows:
        sys.exit(f"{binary}: no loop of {MIN} multiply-adds; is it a release build with its symbols?")
    print("| function | multiply-add | instructions | of them multiply-adds | broadcasts | loads and stores | prefetches | other | on the stack |")
    print("|---|---|---|---|---|---|---|---|---|")
    # One loop for each place where it is inlined; most are the same.
    seen = set()
    for name, dot, length, kinds in sorted(rows, key=lambda row: row[:3]):
        if (name, length, tuple(sorted(kinds.items()))) in seen:
            continue
        seen.add((name, length, tuple(sorted(kinds.items()))))
        counts = [kinds[kind] for kind in ("dot", "broadcast", "load or store", "prefetch", "other", "stack")]
        print(f"| `{name}` | `{dot}` | {length} | " + " | ".join(map(str, counts)) + " |")
    sys.exit(1 if any(kinds["stack"] for *_, kinds in rows) else 0)


if __name__ == "__main__":
    main()
