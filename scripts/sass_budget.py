#!/usr/bin/env python3
"""Budget of every CUDA kernel from its machine code, and what that predicts on the shapes of 8B and 123B models.

    scripts/sass_budget.py --nvcc PATH [--arch 90a] [--json FILE] > benches/results/cuda_sass.md

Needs NVIDIA's compiler with cuobjdump beside it (scripts/compile-kernels.sh says where from), and no GPU. Of each kernel
it takes the innermost loop that holds most tensor instructions, else the one that moves most bytes, else all of it. New
kernels are found by themselves. Exit 1 where a kernel spills registers.
"""

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sass import budget, listing, report
from sass.rates import CHIPS

ROOT = Path(__file__).resolve().parent.parent


def compiled(nvcc, arch, folder, source):
    """The kernels of one file, compiled as the engine compiles them."""
    cubin = folder / f"{source.stem}.cubin"
    listing.run([nvcc, "-std=c++17", "--fmad=false", "-cubin", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o",
                 cubin, source])  # fmt: skip
    beside = Path(nvcc).parent / "cuobjdump"
    return listing.disassemble(beside if beside.exists() else "cuobjdump", cubin, source.name)


def as_json(arch, budgets):
    rows = []
    for found in budgets:
        kernel = found.kernel
        loads = {name: vars(load) for name, load in (("best", found.best), ("worst", found.worst))}
        rows.append({
            "kernel": kernel.name, "file": kernel.file, "taken": found.taken, "registers": kernel.registers,
            "stack": kernel.stack, "threads": kernel.threads, "dynamic_shared": kernel.dynamic_shared,
            "blocks": found.blocks, "spills": found.spills, "share_of_peak": found.share, **loads,
        })  # fmt: skip
    return json.dumps({"sass_budget_version": 1, "arch": arch, "kernels": rows}, indent=1) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvcc", required=True, help="NVIDIA's compiler")
    parser.add_argument("--arch", default="90a", choices=sorted(CHIPS), help="what is compiled for (90a)")
    parser.add_argument("--json", type=Path, help="write the counts of every kernel to this file")
    parser.add_argument("--sources", type=Path, default=ROOT / "kernels/cuda", help="folder of the kernels")
    options = parser.parse_args()
    sources = sorted(options.sources.glob("*.cu"))
    if not sources:
        sys.exit(f"{options.sources}: no kernels there; name the folder with --sources")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(compiled, options.nvcc, options.arch, Path(folder), source) for source in sources]
        kernels = [kernel for job in jobs for kernel in job.result()]
    chip = CHIPS[options.arch]
    budgets = [budget.of(kernel, chip) for kernel in kernels]
    if options.json:
        options.json.write_text(as_json(options.arch, budgets))
    print(report.markdown(options.arch, chip, budgets))
    sys.exit(1 if any(found.spills for found in budgets) else 0)


if __name__ == "__main__":
    main()
