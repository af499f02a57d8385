"""Causal attention: ctq by each of its kernels beside scaled_dot_product_attention of torch, backend by backend."""

import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from peers.linears import random, same_paths
from peers.timing import Missing, ctq_bench, forget, seconds_of, tried

# Query heads, heads of keys and values, dimensions: of a Llama 1B, a Llama 8B and a Gemma 2 9B.
HEADS = ((32, 8, 64), (32, 8, 128), (16, 8, 256))
CONTEXTS = (2048, 8192)
TOKENS = 16384
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
KERNELS = ("mma", "hopper")


def operations(heads, context, windows):
    """Two products of the half of all pairs that the mask leaves."""
    queries, _, dimensions = heads
    return 2 * windows * context * context * queries * dimensions


def sdpa(backend, heads, context, windows):
    """A call; heads of keys are repeated beforehand where the backend takes no groups."""
    queries, keys, dimensions = heads
    q = random(windows, queries, context, dimensions)
    k, v = (random(windows, keys, context, dimensions) for _ in range(2))
    attend = torch.nn.functional.scaled_dot_product_attention

    def grouped():
        with sdpa_kernel(BACKENDS[backend]):
            return attend(q, k, v, is_causal=True, enable_gqa=True)

    try:
        grouped()
        return grouped
    except RuntimeError:
        k, v = (x.repeat_interleave(queries // keys, dim=1) for x in (k, v))

    def repeated():
        with sdpa_kernel(BACKENDS[backend]):
            return attend(q, k, v, is_causal=True)

    return repeated


class Attention:
    """Rounds of all, in turn."""

    def __init__(self, options, budget):
        self.options, self.budget = options, budget
        # By what, heads and context: seconds of every round.
        self.found = {}
        self.missing = {}
        # What ctq said of itself, by kernel.
        self.identities = {}
        self.contexts = options.contexts or CONTEXTS
        self.tokens = options.attention_tokens or TOKENS

    def one(self, what, heads, context):
        windows = max(1, self.tokens // context)
        if what in BACKENDS:
            call = tried(lambda: sdpa(what, heads, context, windows))
            seconds = tried(lambda: seconds_of(call))
            del call
            forget()
            return seconds
        options = ["--device", self.options.device, "--only", "attention", "--compute", "bf16", "--heads",
                   "/".join(map(str, heads)), "--ctx", context, "--rows", windows * context, "--rounds", 5]  # fmt: skip
        told = ctq_bench(self.options.ctq, options, self.budget, CTQ_ATTENTION=what)
        (timing,) = told["timings"]
        self.identities[what] = told["isa"]
        return timing["seconds"]

    def run(self):
        for _ in range(self.options.rounds):
            for heads in HEADS:
                for context in self.contexts:
                    for what in (*BACKENDS, *KERNELS):
                        self.turn(what, heads, context)
        self.missing |= same_paths("CTQ_ATTENTION", self.identities)
        return self

    def turn(self, what, heads, context):
        key = f"attention {what}, {'/'.join(map(str, heads))} heads, {context} tokens"
        if key in self.missing:
            return
        try:
            self.budget.need(10)
            self.found.setdefault((what, heads, context), []).append(self.one(what, heads, context))
        except Missing as reason:
            self.missing[key] = str(reason)

    def seconds(self, what, heads, context):
        rounds = self.found.get((what, heads, context))
        return statistics.median(rounds) if rounds else None

    def best(self, names, heads, context):
        times = [self.seconds(name, heads, context) for name in names]
        return min((seconds for seconds in times if seconds), default=None)

    def share(self, heads, context):
        """Of the speed of torch's faster backend, of ctq's faster kernel."""
        own, other = (self.best(names, heads, context) for names in (KERNELS, BACKENDS))
        return other / own if own and other else None

    def goals(self):
        shares = {context: self.share((32, 8, 128), context) for context in self.contexts}
        return {f"attention_{context}": shares.get(context) for context in CONTEXTS}

    def markdown(self):
        names = (*BACKENDS, *KERNELS)
        lines = ["| heads | window | " + " | ".join(f"{name} TFLOP/s" for name in names) + " | ctq by SDPA |"]
        lines.append("|" + "---|" * (len(names) + 3))
        for heads in HEADS:
            for context in self.contexts:
                windows = max(1, self.tokens // context)
                cells = ["/".join(map(str, heads)), f"{windows} x {context}"]
                for name in names:
                    seconds = self.seconds(name, heads, context)
                    rate = operations(heads, context, windows) / seconds / 1e12 if seconds else None
                    cells.append("-" if rate is None else f"{rate:.0f}")
                share = self.share(heads, context)
                lines.append("| " + " | ".join([*cells, "-" if share is None else f"{share:.2f}"]) + " |")
        return (
            "## Attention\n\nCausal, operations of the half that the mask leaves. ctq takes f32 and rounds keys and"
            " values itself, which is in its time; torch is given bf16.\n\n" + "\n".join(lines)
        )

    def json(self):
        rounds = [[list(map(str, key)), value] for key, value in self.found.items()]
        return {"identities": self.identities, "rounds": rounds}
