"""Linears: ctq by each path beside dense products of torch and the kernels of others for packed weights, interleaved."""

import statistics

import torch

from peers.timing import Missing, ctq_bench, device, forget, seconds_of, tried

# (n, k) of linears that share their inputs, as `ctq bench` fuses them.
SHAPES = {
    "llama-8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "mistral-123b": [(14336, 12288), (12288, 12288), (57344, 12288), (12288, 28672)],
    "tiny": [(256, 128), (128, 128), (512, 128), (128, 256)],
}
PATHS = ("library", "hopper", "fused")
# ctq's names of weights, by those of the schemes.
WEIGHTS = {"w4a16": "int4 g128", "nvfp4": "nvfp4", "bf16": "bf16", "fp8": "fp8 channel"}
GROUP = 128


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device=device(), dtype=torch.float32 if device() == "cpu" else dtype).to(dtype)


def dense(n, k, m):
    x, w = random(m, k), random(n, k)
    return lambda: x @ w.T


def torch_int4(n, k, m):
    x = random(m, k)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device())
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = random(k // GROUP, n, 2)
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales)


def torch_fp8(n, k, m):
    x, w = random(m, k).to(torch.float8_e4m3fn), random(n, k).to(torch.float8_e4m3fn)
    of_x = torch.ones(m, 1, device=device())
    of_w = torch.ones(1, n, device=device())
    return lambda: torch._scaled_mm(x, w.T, scale_a=of_x, scale_b=of_w, out_dtype=torch.bfloat16)


def humming(config):
    def make(n, k, m):
        from humming.layer import HummingLayer

        layer = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.bfloat16).to(device())
        layer.load_from_unquantized(random(n, k))
        layer.transform()
        x = random(m, k)
        return lambda: layer(x)

    return make


def marlin(folder):
    """IST-DASLab's kernel from its sources; f16 alone."""
    kernel = {}

    def make(n, k, m):
        if folder is None:
            raise Missing("no --marlin was given: the folder with marlin_cuda.cpp and marlin_cuda_kernel.cu")
        if not kernel:
            from torch.utils.cpp_extension import load

            sources = [str(folder / name) for name in ("marlin_cuda.cpp", "marlin_cuda_kernel.cu")]
            flags = ["-O3", "-gencode=arch=compute_90,code=sm_90"]
            kernel["module"] = load("marlin_cuda", sources, extra_cuda_cflags=flags)
        x = random(m, k, dtype=torch.float16)
        y = torch.empty(m, n, dtype=torch.float16, device=device())
        codes = torch.randint(-(2**31), 2**31 - 1, (k // 16, 2 * n), dtype=torch.int32, device=device())
        scales = random(k // GROUP, n, dtype=torch.float16)
        workspace = torch.zeros(n // 128 * 16, dtype=torch.int32, device=device())
        return lambda: kernel["module"].mul(x, codes, y, scales, workspace, -1, -1, -1, 16)

    return make


def peers(options):
    """What is called, and what makes a call for an n, a k and an m."""
    return {
        "torch int4 g128": torch_int4,
        "torch fp8": torch_fp8,
        "humming int4 g128": humming({"dtype": "int4", "group_size": GROUP}),
        "humming e2m1 g16": humming({"dtype": "float4e2m1", "group_size": 16, "scale_dtype": "float8e4m3"}),
        "Marlin int4 g128": marlin(options.marlin),
    }


def same_paths(variable, identities):
    """Paths of which ctq says the same as of an earlier one: it may not know them, and then their numbers are no others."""
    seen, doubtful = {}, {}
    for path, identity in identities.items():
        if identity in seen:
            doubtful[f"{variable}={path}"] = f"ctq calls itself {identity!r} as with {seen[identity]}: is it another path?"
        seen.setdefault(identity, path)
    return doubtful


# Which of them multiply the weights that a scheme has.
RIVALS = {"w4a16": ["torch int4 g128", "humming int4 g128", "Marlin int4 g128"], "nvfp4": ["humming e2m1 g16"]}


class Linears:
    """Rounds of all, in turn: of a model's shapes torch's dense products, a peer or a path of ctq, and so on."""

    def __init__(self, options, budget):
        self.options, self.budget = options, budget
        # By what and (model, n, k, m): seconds, and the dense product's in the same round.
        self.found = {}
        self.missing = {}
        # What ctq said of itself, by path.
        self.identities = {}

    def keep(self, what, shape, seconds, dense_seconds):
        rows = self.found.setdefault((what, *shape), [])
        rows.append((seconds, dense_seconds))

    def dense_of(self, model, m):
        times = {}
        for n, k in SHAPES[model]:
            times[n, k] = seconds_of(dense(n, k, m))
            forget()
        return times

    def peer(self, what, make, model, m, dense_seconds):
        for n, k in SHAPES[model]:
            call = tried(lambda: make(n, k, m))  # noqa: B023: called at once
            self.keep(what, (model, n, k, m), tried(lambda: seconds_of(call)), dense_seconds[n, k])  # noqa: B023
            del call
            forget()

    def ctq(self, path, model, m, dense_seconds):
        schemes = self.options.schemes
        told = ctq_bench(
            self.options.ctq,
            ["--device", self.options.device, "--only", "linear,decode", "--shape", model, "--rows", m, "--scheme",
             ",".join(schemes), "--compute", "bf16", "--acts", "off", "--rounds", 5],
            self.budget, CTQ_LINEAR=path,
        )  # fmt: skip
        names = {WEIGHTS[scheme]: scheme for scheme in schemes}
        for timing in told["timings"]:
            scheme = names[timing["what"]]
            if timing["operation"] == "decode":
                rate = timing["bytes"] / timing["seconds"]
                self.found.setdefault(("decode", scheme, model), []).append(rate)
            else:
                n, k = timing["n"], timing["k"]
                # A product of bf16 weights has no path of its own.
                self.keep(f"ctq {scheme} {path}", (model, n, k, m), timing["seconds"], dense_seconds[n, k])
        self.identities[path] = told["isa"]

    def turn(self, model, m):
        """One round on the shapes of a model."""
        runs = [(f"ctq {path}", path, None) for path in self.options.paths]
        runs += [(name, None, make) for name, make in peers(self.options).items()]
        for name, path, make in runs:
            key = f"{name}, {model}, {m} tokens"
            if key in self.missing or name in self.missing:
                continue
            try:
                self.budget.need(15)
                dense_seconds = self.dense_of(model, m)
                for (n, k), seconds in dense_seconds.items():
                    self.keep("torch.matmul bf16", (model, n, k, m), seconds, seconds)
                if path:
                    self.ctq(path, model, m, dense_seconds)
                else:
                    self.peer(name, make, model, m, dense_seconds)
            except Missing as reason:
                self.missing[key] = str(reason)

    def run(self):
        for _ in range(self.options.rounds):
            for model in self.options.models:
                for m in self.options.rows:
                    self.turn(model, m)
        self.missing |= same_paths("CTQ_LINEAR", self.identities)
        return self

    # What came of it.

    def share(self, what, shape):
        """Median over the rounds of the dense product's seconds by these."""
        rounds = self.found.get((what, *shape))
        return statistics.median(dense_seconds / seconds for seconds, dense_seconds in rounds) if rounds else None

    def shapes(self):
        return [(model, n, k, m) for model in self.options.models for n, k in SHAPES[model] for m in self.options.rows]

    def columns(self):
        names = [f"ctq {scheme} {path}" for scheme in self.options.schemes for path in self.options.paths]
        return [name for name in [*names, *peers(self.options)] if any(self.share(name, s) for s in self.shapes())]

    def table(self):
        columns = self.columns()
        lines = ["| model | n x k | tokens | torch.matmul ms | TFLOP/s | " + " | ".join(columns) + " |"]
        lines.append("|" + "---|" * (5 + len(columns)))
        for shape in self.shapes():
            model, n, k, m = shape
            rounds = self.found.get(("torch.matmul bf16", *shape))
            if not rounds:
                continue
            seconds = statistics.median(one for one, _ in rounds)
            cells = [model, f"{n} x {k}", m, f"{seconds * 1e3:.3f}", f"{2 * n * k * m / seconds / 1e12:.0f}"]
            shares = [self.share(name, shape) for name in columns]
            cells += ["-" if share is None else f"{share:.2f}" for share in shares]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        return "\n".join(lines)

    def decode(self):
        """Most bytes a second of decoding, by scheme and model."""
        found = {key[1:]: statistics.median(rates) for key, rates in self.found.items() if key[0] == "decode"}
        lines = ["| scheme | model | TB/s |", "|---|---|---|"]
        lines += [f"| {scheme} | {model} | {rate / 1e12:.2f} |" for (scheme, model), rate in found.items()]
        return found, "\n".join(lines)

    def goals(self):
        """Of the target's shapes: 8192 tokens, packed weights of 4 bits."""
        shapes = [shape for shape in self.shapes() if shape[3] == 8192 and shape[0] != "tiny"]
        packed = [scheme for scheme in ("w4a16", "nvfp4") if scheme in self.options.schemes]

        def least(path):
            shares = [self.share(f"ctq {scheme} {path}", shape) for scheme in packed for shape in shapes]
            return min(shares) if shares and None not in shares else None

        def beside_peers(path):
            ratios = []
            for scheme in packed:
                for shape in shapes:
                    own = self.share(f"ctq {scheme} {path}", shape)
                    others = [self.share(name, shape) for name in RIVALS[scheme]]
                    others = [share for share in others if share]
                    if own is None:
                        return None
                    ratios += [own / max(others)] if others else []
            return min(ratios, default=None)

        decoded, _ = self.decode()
        rates = [rate for (scheme, _), rate in decoded.items() if scheme in packed]
        # Path B is whichever kernel works on packed weights; the one made for this chip first.
        path_b = "hopper" if least("hopper") is not None else "fused"
        return {
            "path_a": least("library"),
            "path_b": least(path_b),
            "path_b_peers": beside_peers(path_b),
            "decode": min(rates) / 1e12 if rates else None,
        }

    def markdown(self):
        _, decode = self.decode()
        return (
            "## Linears: share of a dense product's speed\n\nMedian over the rounds of torch.matmul's seconds by those of"
            f" the row, measured right before.\n\n{self.table()}\n\n## Decoding to bf16\n\n{decode}"
        )

    def json(self):
        rounds = [[list(map(str, key)), value] for key, value in self.found.items()]
        return {"identities": self.identities, "rounds": rounds}
