"""Time and memory on a GPU: calls of torch by events, programs by what they print, memory by what the driver says. Knows
nothing of what is measured. Without a GPU everything runs on the CPU, to try it out."""

import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import torch

# Calls before the first that counts, and least seconds of the calls of one round.
WARM_UP = 3
LEAST = 0.15


class Missing(Exception):
    """What is to be measured is not there, or does not run; says why."""


class Budget:
    """Seconds that are left."""

    def __init__(self, seconds):
        self.end = time.monotonic() + seconds

    @property
    def left(self):
        return self.end - time.monotonic()

    def need(self, seconds):
        if self.left < seconds:
            raise Missing(f"{max(self.left, 0):.0f} s are left of --seconds; it takes about {seconds:.0f}")


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def finish():
    if device() == "cuda":
        torch.cuda.synchronize()


def forget():
    """Gives memory back, so that other programs find it free."""
    if device() == "cuda":
        torch.cuda.empty_cache()


def seconds_of(call):
    """Median seconds of one call: calls are queued, each between two events."""
    for _ in range(WARM_UP):
        call()
    finish()
    start = time.perf_counter()
    call()
    finish()
    count = max(5, min(100, int(LEAST / max(time.perf_counter() - start, 1e-6))))
    if device() == "cpu":
        rounds = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            rounds.append(time.perf_counter() - start)
        return statistics.median(rounds)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    finish()
    return statistics.median(one.elapsed_time(other) / 1e3 for one, other in zip(marks, marks[1:]))


def tried(call):
    """What a call gives; whatever it fails with is a reason."""
    try:
        return call()
    except Missing:
        raise
    except Exception as error:  # noqa: BLE001: a peer may fail with anything, and the others go on
        forget()
        lines = str(error).strip().splitlines()
        raise Missing(f"{type(error).__name__}: {lines[0][:200] if lines else ''}") from None


def libraries():
    """Folders of NVIDIA's libraries beside torch, for a program that looks for them."""
    packages = Path(torch.__file__).resolve().parent.parent / "nvidia"
    found = [str(folder) for folder in sorted(packages.glob("*/lib"))]
    return ":".join(found + [os.environ[name] for name in ["LD_LIBRARY_PATH"] if os.environ.get(name)])


class Watch:
    """Most memory of the device in use while something runs, beyond what was before: looked at every 10 ms."""

    def __init__(self):
        self.most = self.before = None
        self.handle = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self.handle, self.nvml = pynvml.nvmlDeviceGetHandleByIndex(0), pynvml
        except Exception:  # noqa: BLE001: without the driver's library memory is not told
            return

    def used(self):
        return self.nvml.nvmlDeviceGetMemoryInfo(self.handle).used

    def __enter__(self):
        if self.handle:
            self.before = self.most = self.used()
            self.done = threading.Event()
            self.thread = threading.Thread(target=self.look, daemon=True)
            self.thread.start()
        return self

    def look(self):
        while not self.done.wait(0.01):
            self.most = max(self.most, self.used())

    def __exit__(self, *_):
        if self.handle:
            self.done.set()
            self.thread.join()

    @property
    def peak(self):
        return None if self.most is None else self.most - self.before


def ctq_bench(ctq, options, budget, **environment):
    """What `ctq bench` measured, as its JSON, with the most memory of the device that was in use."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        command = [ctq, "--quiet", "bench", *options, "--json", path]
        command = [str(word) for word in command]
        given = {**os.environ, "LD_LIBRARY_PATH": libraries(), **environment}
        with Watch() as watch:
            try:
                limit = max(budget.left, 1)
                done = subprocess.run(command, capture_output=True, text=True, env=given, timeout=limit)
            except subprocess.TimeoutExpired:
                raise Missing(f"`{' '.join(command[1:])}` had not ended when --seconds were over") from None
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise Missing(f"ctq: exit code {done.returncode}: {''.join(said)[:300]}")
        return {**json.loads(path.read_text()), "peak_device_bytes": watch.peak}
