"""The rows of cpu_peers.py: which tool scores which weights in which mode, and how each tool is run once.

Knows commands and what they print; refuses to know rounds and tables. Standard library only.
"""

import json
import math
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from machine import shown

HERE = Path(__file__).resolve().parent
# Of a window of CTX tokens the last SCORED are scored: what a stride of SCORED makes of all windows but the first.
CTX, SCORED = 2048, 512


class Failed(Exception):
    """A run that gave no measurement, and why."""


class Row(NamedTuple):
    """One line of the table. `weights` are a scheme of synthetic_checkpoint.py, or a type of GGUF."""

    tool: str
    weights: str
    mode: str
    arithmetic: str
    choice: tuple = ()
    threads: int = 1

    @property
    def name(self):
        words = f"{self.tool} {self.weights} {self.mode}".strip()
        return words if self.threads == 1 else f"{words}, {self.threads} threads"


OFF, LIBRARY, KERNEL = ("--acts", "off"), ("--acts", "library"), ("--acts", "kernel")
BF16, F32 = ("--compute", "bf16"), ("--compute", "f32")
UNPACKS = "unpacks all weights to bf16, then bf16"

ONE_THREAD = [
    Row("ctq", "W4A16", "", "bf16 activations, packed weights", (*OFF, *BF16)),
    Row("transformers", "W4A16", "", UNPACKS, ("bfloat16",)),
    Row("llama-perplexity", "Q4_0", "", "int8 activations in groups of 32, head Q6_K"),
    Row("llama-bench", "Q4_0", "", "int8 activations in groups of 32, head Q6_K, nothing scored"),
    Row("ctq", "NVFP4", "library", "fp4 activations (W4A4), bf16 products", (*LIBRARY, *BF16)),
    Row("transformers", "NVFP4", "", "unpacks all weights, rounds activations to fp4 (W4A4), bf16", ("bfloat16",)),
    Row("llama-bench", "NVFP4", "", "int8 activations in groups of 32, nothing scored"),
    Row("ctq", "W8A8", "kernel", "int8 activations per token, exact integer products", (*KERNEL, *BF16)),
    Row("ctq", "W8A8", "library", "int8 activations per token, bf16 products", (*LIBRARY, *BF16)),
    Row("transformers", "W8A8", "", "unpacks all weights, rounds activations to int8, bf16", ("bfloat16",)),
    Row("llama-perplexity", "Q8_0", "", "int8 activations in groups of 32, head Q8_0"),
    Row("ctq", "FP8_DYNAMIC", "library", "fp8 activations per token, bf16 products", (*LIBRARY, *BF16)),
    Row("ctq", "MXFP4A16", "", "bf16 activations, packed weights", (*OFF, *BF16)),
    Row("ctq", "bf16", "", "bf16", (*OFF, *BF16)),
    Row("transformers", "bf16", "", "bf16", ("bfloat16",)),
    Row("llama-perplexity", "BF16", "", "bf16"),
    Row("ctq", "W4A16", "f32", "f32 activations, packed weights", (*OFF, *F32)),
    Row("transformers", "bf16", "f32", "f32 weights and activations", ("float32",)),
]
TWO_THREADS = ["ctq W4A16", "transformers W4A16", "transformers bf16", "llama-perplexity Q4_0"]
ROWS = ONE_THREAD + [row._replace(threads=2) for row in ONE_THREAD if row.name in TWO_THREADS]

# The first is to be so many times as fast as the second. None: no goal, to be read only.
COMPARED = [
    ("ctq W4A16", "llama-perplexity Q4_0", 1.8),
    ("ctq W4A16", "transformers W4A16", 1.4),
    ("ctq NVFP4 library", "transformers NVFP4", 2.9),
    ("ctq NVFP4 library", "llama-bench NVFP4", 7.7),
    ("ctq W8A8 kernel", "transformers W8A8", 2.3),
    ("ctq W8A8 kernel", "llama-perplexity Q8_0", None),
    ("ctq W8A8 library", "ctq W4A16", 1 / 1.15),
    ("ctq FP8_DYNAMIC library", "ctq W4A16", 1 / 1.1),
    ("ctq MXFP4A16", "ctq W4A16", 1 / 1.1),
    ("ctq bf16", "transformers bf16", None),
    ("ctq bf16", "llama-perplexity BF16", None),
    ("ctq W4A16 f32", "transformers bf16 f32", 2.25),
    ("ctq W4A16, 2 threads", "ctq W4A16", 1.9),
    ("ctq W4A16, 2 threads", "transformers W4A16, 2 threads", None),
    ("ctq W4A16, 2 threads", "llama-perplexity Q4_0, 2 threads", None),
]


class Run(NamedTuple):
    """A finished process: what it printed, its seconds, and the most memory it had, shared pages included."""

    stdout: str
    stderr: str
    wall: float
    cpu: float
    peak_bytes: int


def pinned(command, cores, **environment):
    """Runs a command on these cores alone; fails where it does."""
    command = ["taskset", "-c", ",".join(map(str, cores)), *map(str, command)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **environment})
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            # Who interrupts this script must not leave a row running.
            process.kill()
            raise
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        done = Run(out.read(), err.read(), wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)
    if process.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise Failed(f"{shown(command)}: exit code {process.returncode}: {''.join(last)}")
    return done


def found(pattern, text, command):
    match = re.search(pattern, text)
    if not match:
        raise Failed(f"{command}: printed nothing like {pattern}")
    return float(match.group(1))


def filler(data):
    """The text behind SCORED tokens: the second window of a strided protocol then holds, after BOS, the first tokens of
    the text, and scores the last SCORED of them alone."""
    return " a" * (SCORED - 1) + "\n" + data.read_text()


class Bench(NamedTuple):
    """Where everything is: folder of the models and the names in it begin with, tools, text, cores."""

    folder: Path
    stem: str
    ctq: Path
    python: Path
    llama: Path
    data: Path
    scratch: Path
    cores: list

    def checkpoint(self, scheme):
        return self.folder / self.stem.format(scheme)

    def container(self, scheme):
        return self.folder / f"{self.stem.format(scheme)}.ctq"

    def gguf(self, kind):
        return self.folder / f"{self.stem.format(kind)}.gguf"

    def tool(self, name):
        return self.llama / "build/bin" / name

    def model(self, row):
        """What a row reads: files to be in memory before it starts."""
        if row.tool == "ctq":
            return self.container(row.weights)
        return self.checkpoint(row.weights) if row.tool == "transformers" else self.gguf(row.weights)

    def run(self, row):
        """One measurement: seconds of the window, and of the process."""
        cores = self.cores[: row.threads]
        told, done = RUNNERS[row.tool](self, row, cores)
        busy = {"busy": done.cpu / done.wall / row.threads}
        process = {"process_seconds": done.wall, "cpu_seconds": done.cpu, "peak_bytes": done.peak_bytes}
        return busy | told | process

    def run_ctq(self, row, cores):
        text, part = self.scratch / "filled.txt", self.scratch / "part.json"
        text.write_text(filler(self.data))
        part.unlink(missing_ok=True)
        # A cache of its own, so that no run goes on from another.
        cache = tempfile.mkdtemp(dir=self.scratch)
        command = [
            self.ctq, "eval", self.container(row.weights), "--data", text, "--preset", "hf-strided", "--ctx", CTX,
            "--stride", SCORED, "--rows", 2, "--bos", "every-window", "--shard", "2/2", "--device", "cpu",
            "--threads", row.threads, *row.choice, "--json", part, "--quiet",
        ]  # fmt: skip
        done = pinned(command, cores, CTQ_CACHE=cache)
        shutil.rmtree(cache)
        result = json.loads(part.read_text())["models"][0]["results"][0]
        scores = result["windows"][0]["nll"]
        assert len(scores) == SCORED, f"{len(scores)} positions are scored"
        told = {"isa": result["record"]["isa"]}
        return {"seconds": result["record"]["seconds"], "nll": sum(scores) / SCORED, "versions": told}, done

    def run_transformers(self, row, cores):
        command = [
            self.python, HERE / "peer_transformers.py", self.checkpoint(row.weights), self.data, "--dtype",
            *row.choice, "--threads", row.threads, "--ctx", CTX, "--scored", SCORED,
        ]  # fmt: skip
        done = pinned(command, cores, OMP_NUM_THREADS=str(row.threads), HF_HUB_OFFLINE="1")
        return json.loads(done.stdout.splitlines()[-1]), done

    def llama_threads(self, threads, cores):
        # Without a mask its threads may share one core.
        mask = sum(1 << core for core in cores)
        return ["-t", threads, "-C", hex(mask), "--cpu-strict", 1]

    def run_perplexity(self, row, cores):
        tool = self.tool("llama-perplexity")
        command = [tool, "-m", self.gguf(row.weights), "-f", self.data, "-c", CTX, "--chunks", 1]
        done = pinned([*command, *self.llama_threads(row.threads, cores)], cores)
        return {"seconds": found(r"([\d.]+) seconds per pass", done.stderr + done.stdout, tool.name)}, done

    def run_bench(self, row, cores):
        command = [
            self.tool("llama-bench"), "-m", self.gguf(row.weights), "-p", CTX, "-n", 0, "-r", 1, "--no-warmup",
            "-o", "json",
        ]  # fmt: skip
        done = pinned([*command, *self.llama_threads(row.threads, cores)], cores)
        return {"seconds": json.loads(done.stdout)[0]["avg_ns"] / 1e9}, done

    def gguf_nll(self, kind):
        """Mean nll of the positions that the others score, from a run that is not timed: strided, all rows of logits.
        The tool adds half a stride to the window."""
        tool = self.tool("llama-perplexity")
        command = [tool, "-m", self.gguf(kind), "-f", self.data, "-c", CTX - SCORED // 2, "--ppl-stride", SCORED]
        command += ["--chunks", 1, "-t", len(self.cores)]
        done = pinned(command, self.cores)
        return math.log(found(r"\[1\]([\d.]+),", done.stdout + done.stderr, tool.name))


RUNNERS = {
    "ctq": Bench.run_ctq,
    "transformers": Bench.run_transformers,
    "llama-perplexity": Bench.run_perplexity,
    "llama-bench": Bench.run_bench,
}
