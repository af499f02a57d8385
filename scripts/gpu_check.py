"""Checks and measures the CUDA engine: see gpu-check.sh. Standard library only; PyTorch is used where it is there."""

import argparse
import array
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ["bf16", "W4A16", "FP8", "NVFP4"]

# Relative error of bf16 logits against the CPU engine, weights only; difference of the mean nll in nats.
LOGITS_BOUND = 2e-3
NLL_BOUND = 2e-4


class Checks:
    """Runs the steps, keeps what came of them."""

    def __init__(self, ctq, device, out):
        self.ctq, self.device, self.out = str(ctq), device, out
        self.steps = []
        self.results = {"gpu_check_version": 1, "steps": self.steps}

    def run(self, *arguments, timeout=240, **environment):
        """One ctq command: its exit code, what it printed, its seconds."""
        start = time.time()
        try:
            done = subprocess.run(
                [self.ctq, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, cwd=ROOT,
                env={**os.environ, **environment},
            )  # fmt: skip
            code, told = done.returncode, (done.stdout, done.stderr)
        except subprocess.TimeoutExpired:
            code, told = 124, ("", f"no end after {timeout} s")
        return code, told[0], told[1], time.time() - start

    def step(self, name, good, detail, **data):
        verdict = "ok" if good else "FAILED"
        self.steps.append({"name": name, "passed": bool(good), "detail": detail, **data})
        print(f"{verdict:6} {name}: {detail}", flush=True)

    def note(self, name, detail, **data):
        """Something found out that is neither good nor bad."""
        self.steps.append({"name": name, "passed": None, "detail": detail, **data})
        print(f"note   {name}: {detail}", flush=True)


def last_line(text):
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def doctor(checks):
    code, told, error, _ = checks.run("doctor", "--json")
    found = json.loads(told) if code == 0 else {}
    checks.results["machine"] = found
    checks.step("doctor", code == 0, last_line(error) or "found the machine")


def kernels(checks, size, **environment):
    """Every kernel against the CPU backend, by the paths that the environment names."""
    path = checks.out / f"kernels-{size}.json"
    path.unlink(missing_ok=True)  # what an earlier run found is not what this one finds
    code, _, error, seconds = checks.run(
        "doctor", "--check", size, "--device", checks.device, "--findings", path, timeout=420, **environment
    )
    findings = json.loads(path.read_text()) if path.exists() else {}
    wrong = [f for f in findings.get("findings", []) if f["failure"]]
    detail = f"{len(findings.get('findings', []))} cases, {len(wrong)} wrong, {seconds:.0f} s"
    if wrong:
        first = wrong[0]
        detail += f"; first: {first['operation']} {first['case']}: {first['failure']}"
    elif code != 0:
        detail += f"; {last_line(error)}"
    paths = "".join(f", {name}={value}" for name, value in environment.items())
    checks.step(f"kernels, {size} cases{paths}", code == 0, detail, findings=wrong[:20])
    for observation in findings.get("observations", []):
        checks.note(observation["name"], observation["detail"])


def tensor(path, name):
    """One F32 tensor of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    start, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    return array.array("f", data[8 + length + start : 8 + length + end])


def logits(checks):
    """Full logits of the tiny families, bf16, weights only, against the CPU engine."""
    worst, where, wrong = 0.0, "", []
    folders = sorted(p.parent for p in (ROOT / "golden/families").glob("*/oracle.safetensors"))
    for folder in folders:
        found = {}
        for device in ("cpu", checks.device):
            path = checks.out / f"logits-{device.replace(':', '')}.safetensors"
            code, _, error, _ = checks.run(
                "logits", folder, "--ids", folder / "oracle.safetensors", "--out", path, "--device", device,
                "--compute", "bf16", "--quiet",
            )
            if code != 0:
                wrong.append(f"{folder.name}: {last_line(error)}")
                break
            found[device] = tensor(path, "logits")
        if len(found) < 2:
            continue
        expected, actual = found["cpu"], found[checks.device]
        error = math.sqrt(sum((a - b) ** 2 for a, b in zip(actual, expected)) / sum(b * b for b in expected))
        if error > worst:
            worst, where = error, folder.name
        if not error <= LOGITS_BOUND:
            wrong.append(f"{folder.name}: {error:.1e}")
    detail = f"{len(folders)} families, largest error {worst:.1e} ({where or 'none'}), bound {LOGITS_BOUND:.0e}"
    if wrong:
        detail += f", {len(wrong)} wrong; first: {wrong[0]}"
    checks.step("bf16 logits against the CPU engine", folders and not wrong, detail, wrong=wrong)


def verify(checks):
    """f32, layer by layer, against the f64 reference."""
    for name in BUNDLED:
        code, told, error, seconds = checks.run("verify", ROOT / "golden/bundled" / name, "--device", checks.device)
        checks.step(f"verify {name}", code == 0, f"{last_line(told) or last_line(error)}, {seconds:.0f} s")


def scores(checks, models, text, options):
    """Mean nll on the device and on the CPU."""
    for folder in models:
        means = {}
        for device in ("cpu", checks.device):
            path = checks.out / "record.json"
            code, _, error, seconds = checks.run(
                "eval", folder, "--data", text, "--acts", "off", "--compute", "bf16", "--device", device,
                "--json", path, "--quiet", *options,
            )
            if code != 0:
                checks.step(f"nll of {folder.name}", False, last_line(error))
                break
            record = json.loads(path.read_text())[0]
            means[device] = (record["total_nll"] / record["count"], seconds)
        if len(means) == 2:
            (cpu, _), (gpu, seconds) = means["cpu"], means[checks.device]
            detail = f"{gpu:.6f} and {cpu:.6f} on the CPU, bound {NLL_BOUND:.0e}, {seconds:.1f} s"
            checks.step(f"nll of {folder.name}", abs(gpu - cpu) <= NLL_BOUND, detail)


def layouts(checks):
    """The same bits for every layout: ranks and stages that share the device, or all devices there are."""
    plain = None
    for options in ([], ["--tp", 2], ["--tp", 3], ["--pp", 2], ["--tp", 2, "--pp", 2]):
        path = checks.out / "layout.json"
        code, _, error, seconds = checks.run(
            "eval", ROOT / "golden/bundled/NVFP4", "--data", ROOT / "golden/bundled/text.txt", "--ctx", 256,
            "--stride", 64, "--device", checks.device.split(":")[0], "--json", path, "--quiet", *options,
        )
        name = "eval " + (" ".join(map(str, options)) or "as it chooses")
        if code != 0:
            checks.step(name, False, last_line(error))
            continue
        nll = [record["total_nll"] for record in json.loads(path.read_text())]
        plain = plain or nll
        checks.step(name, nll == plain, f"{'the same' if nll == plain else 'other'} bits, {seconds:.1f} s")


def collectives(checks):
    """What ranks hand one another, in one process."""
    path = checks.out / "collectives.json"
    code, _, error, seconds = checks.run(
        "bench", "--collective", "--device", checks.device.split(":")[0], "--json", path, "--quiet", timeout=300
    )
    checks.step("bench --collective", code == 0, last_line(error) or f"{seconds:.0f} s")
    if code == 0:
        checks.results["collectives"] = json.loads(path.read_text())


def sanitizer(checks):
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return checks.note("compute-sanitizer", "not there")
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", checks.ctq, "doctor", "--check", "small",
                   "--device", checks.device]
        start = time.time()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
            summary = [line for line in (done.stdout + done.stderr).splitlines() if "SUMMARY" in line]
            detail = f"{last_line(chr(10).join(summary))} {time.time() - start:.0f} s"
            checks.step(f"compute-sanitizer {kind}", done.returncode == 0, detail)
        except subprocess.TimeoutExpired:
            checks.note(f"compute-sanitizer {kind}", "no end after 200 s")


def torch_speed(shapes, m):
    """Seconds of a dense bf16 product by torch for each (n, k)."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    seconds = {}
    for n, k in shapes:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        for _ in range(3):
            x @ w.T
        rounds = []
        for _ in range(20):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            x @ w.T
            end.record()
            torch.cuda.synchronize()
            rounds.append(start.elapsed_time(end) / 1e3)
        seconds[(n, k)] = sorted(rounds)[len(rounds) // 2]
        del x, w
    return seconds


def speed(checks, m):
    path = checks.out / "bench.json"
    code, _, error, seconds = checks.run(
        "bench", "--device", checks.device, "--rows", m, "--json", path, "--quiet", timeout=300
    )
    checks.step("bench", code == 0, last_line(error) or f"{seconds:.0f} s")
    if code != 0:
        return []
    timings = json.loads(path.read_text())["timings"]
    linears = [t for t in timings if t["operation"] == "linear"]
    dense = torch_speed(sorted({(t["n"], t["k"]) for t in linears}), m)
    rows = []
    for timing in timings:
        reference = dense.get((timing["n"], timing["k"])) if timing["operation"] == "linear" else None
        rows.append({
            **timing,
            "tflops": timing["operations"] / timing["seconds"] / 1e12,
            "torch_seconds": reference,
            "share_of_torch": reference / timing["seconds"] if reference else None,
        })
    checks.results["speed"] = rows
    return rows


def table(rows):
    print(f"\n{'operation':32} {'m':>6} {'n':>6} {'k':>6} {'ms':>9} {'TFLOP/s':>8} {'TB/s':>6} {'of torch dense':>15}")
    for row in rows:
        share = f"{row['share_of_torch']:.2f}" if row["share_of_torch"] else "-"
        name = f"{row['operation']} {row['what']}"
        print(f"{name[:32]:32} {row['m']:6} {row['n']:6} {row['k']:6} {row['seconds'] * 1e3:9.3f} "
              f"{row['tflops']:8.1f} {row['bytes'] / row['seconds'] / 1e12:6.2f} {share:>15}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    default = os.environ.get("CTQ") or shutil.which("ctq") or ROOT / "target/release/ctq"
    parser.add_argument("--ctq", default=default, type=Path, help="the ctq binary")
    parser.add_argument("--out", default=Path("gpu-check"), type=Path, help="folder for the results")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--paths", default="library/mma,hopper/hopper,fused/mma",
                        help="of linears and attention, each pair checked with small cases: CTQ_LINEAR/CTQ_ATTENTION")
    parser.add_argument("--quick", action="store_true", help="no large cases, no sanitizer, no speed")
    options = parser.parse_args()
    if not options.ctq.exists():
        sys.exit(f"{options.ctq}: no ctq binary; build it with `cargo build --release` and name it with --ctq")
    options.out.mkdir(parents=True, exist_ok=True)
    checks = Checks(options.ctq.resolve(), options.device, options.out.resolve())
    start = time.time()
    doctor(checks)
    for pair in options.paths.split(","):
        linear, attention = pair.split("/")
        kernels(checks, "small", CTQ_LINEAR=linear, CTQ_ATTENTION=attention)
    verify(checks)
    logits(checks)
    scores(checks, [ROOT / "golden/bundled" / name for name in BUNDLED], ROOT / "golden/bundled/text.txt",
           ["--ctx", 256, "--stride", 64])
    layouts(checks)
    rows = []
    if not options.quick:
        collectives(checks)
        kernels(checks, "large")
        rows = speed(checks, 8192)
        sanitizer(checks)
    failed = [step["name"] for step in checks.steps if step["passed"] is False]
    checks.results["seconds"] = time.time() - start
    checks.results["passed"] = not failed
    (checks.out / "gpu-check.json").write_text(json.dumps(checks.results, indent=1))
    if rows:
        table(rows)
    print(f"\n{'PASSED' if not failed else 'FAILED: ' + ', '.join(failed)} in {time.time() - start:.0f} s; "
          f"{checks.out / 'gpu-check.json'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
