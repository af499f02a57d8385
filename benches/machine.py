"""What a benchmark ran on, for the head of its results. Standard library only."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What the kernels choose by.
INSTRUCTIONS = ["avx2", "fma", "avx512f", "avx512vl", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8"]


def shown(command):
    """A command line for a text: what lies elsewhere on this machine goes by its name alone."""
    words = (str(word) for word in command)
    return shlex.join(Path(word).name if word.startswith("/") else word for word in words)


def run(command, **options):
    """Runs a command that must succeed; what it printed."""
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"{shlex.join(command)}: exit code {done.returncode}\n{done.stderr.strip()}")
    return done.stdout.strip()


def cpuinfo(name):
    """The first line of that name in /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name)
    except (OSError, StopIteration):
        return None


def processor():
    return cpuinfo("model name") or platform.processor() or platform.machine()


def instructions():
    """Those of INSTRUCTIONS that the processor has."""
    known = (cpuinfo("flags") or "").split()
    return [name for name in INSTRUCTIONS if name in known]


def memory():
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def load():
    """Average number of tasks that wanted to run in the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


def commit():
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() or "unknown"
    except OSError:
        return "unknown"
