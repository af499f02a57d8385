"""Whole windows: ctq on models of random codes beside transformers, resident and streamed, and the memory that it takes."""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from peers.timing import Missing, ctq_bench, device, finish, forget, seconds_of, tried

HERE = Path(__file__).resolve().parent.parent
CONTEXT, SCORED = 2048, 512
BATCHES = (1, 2, 4, 8, 16)
# Layers of the checkpoints whose difference says what a layer takes: a whole one would take minutes to write.
FEW = (2, 6)
SIZES = {
    "llama-8b": {"layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
    "tiny": {"layers": 3, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320},
}  # fmt: skip


def scored(model, ids, count):
    """What a window costs: log-likelihoods of its last tokens."""
    logits = model(ids, use_cache=False, logits_to_keep=count + 1).logits[:, :-1]
    targets = ids[:, -count:].reshape(-1)
    return torch.nn.functional.cross_entropy(logits.reshape(len(targets), -1).float(), targets)


def dense_model(sizes):
    """A Llama of random bf16 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {key: value for key, value in sizes.items() if key != "layers"}
    config = LlamaConfig(num_hidden_layers=sizes["layers"], tie_word_embeddings=False, **shape)
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device()):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


class Models:
    """Everything once, ctq before and after what it is held against."""

    def __init__(self, options, budget):
        self.options, self.budget = options, budget
        self.found = {}
        self.missing = {}
        self.shape = "tiny" if options.tiny else "llama-8b"
        self.context = 64 if options.tiny else CONTEXT
        self.scored = 16 if options.tiny else SCORED

    def attempt(self, name, seconds, call):
        """Measures where there is time; a reason where it does not come to that."""
        try:
            self.budget.need(seconds)
            self.found.setdefault(name, []).append(tried(call))
        except Missing as reason:
            self.missing[name] = str(reason)

    def window(self, path, windows, weights="device", shape=None, scored=None, layers=None, rounds=3):
        options = ["--device", self.options.device, "--window", "--shape", shape or self.shape, "--scheme", "w4a16",
                   "--ctx", self.context, "--scored", scored or self.scored, "--windows", windows, "--weights", weights,
                   "--rounds", rounds]  # fmt: skip
        options += ["--layers", layers] if layers else []
        environment = {"CTQ_LINEAR": path} if path else {}
        told = ctq_bench(self.options.ctq, options, self.budget, **environment)
        return {**told["windows"][0], "isa": told["isa"], "peak_device_bytes": told["peak_device_bytes"]}

    # transformers.

    def rate(self, model, batch):
        """Tokens a second of a batch of windows."""
        ids = torch.randint(0, model.config.vocab_size, (batch, self.context), device=device())
        with torch.inference_mode():
            return batch * self.context / seconds_of(lambda: scored(model, ids, self.scored))

    def dense(self):
        model = dense_model(SIZES[self.shape])
        rates = {}
        try:
            for batch in BATCHES:
                try:
                    self.budget.need(20)
                    rates[batch] = tried(lambda: self.rate(model, batch))  # noqa: B023: called at once
                except Missing as reason:
                    self.missing[f"transformers bf16 dense, {batch} windows"] = str(reason)
        finally:
            del model
            forget()
        if not rates:
            raise Missing("no batch of windows ran")
        return rates

    def packed(self):
        """transformers with compressed-tensors: seconds of a window by layers, first pass and later ones."""
        import compressed_tensors  # noqa: F401: transformers needs it
        from transformers import AutoModelForCausalLM

        if self.options.tiny:
            raise Missing("not tried with --tiny")
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            for layers in FEW:
                script = [sys.executable, HERE / "synthetic_checkpoint.py", folder, "--shape", self.shape, "--schemes",
                          "W4A16", "--layers", layers]  # fmt: skip
                limit = max(self.budget.left, 1)
                subprocess.run(list(map(str, script)), check=True, capture_output=True, timeout=limit)
                path = next(Path(folder).glob(f"*-{layers}layers"))
                model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device()).eval()
                ids = torch.randint(0, model.config.vocab_size, (1, self.context), device=device())
                with torch.inference_mode():
                    start = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    start[0].record()
                    scored(model, ids, self.scored)
                    start[1].record()
                    finish()
                    first = start[0].elapsed_time(start[1]) / 1e3
                    later = seconds_of(lambda: scored(model, ids, self.scored))  # noqa: B023: called at once
                found[layers] = {"first": first, "later": later}
                del model
                forget()
        return {kind: self.whole({layers: one[kind] for layers, one in found.items()}) for kind in ("first", "later")}

    def whole(self, seconds):
        """Tokens a second of all layers, from the seconds of a few and of some more."""
        few, more = FEW
        layer = (seconds[more] - seconds[few]) / (more - few)
        return self.context / (seconds[few] + (SIZES[self.shape]["layers"] - few) * layer)

    # What is run.

    def run_model(self):
        windows = 4 if self.options.tiny else 16
        for path in self.options.paths:
            self.attempt(f"ctq {path}", 40, lambda: self.window(path, windows))  # noqa: B023: called at once
        self.attempt("transformers bf16 dense", 60, self.dense)
        self.attempt("transformers compressed-tensors", 120, self.packed)
        for path in self.options.paths:
            self.attempt(f"ctq {path}", 40, lambda: self.window(path, windows))  # noqa: B023: called at once
        whole = self.context - 1
        self.attempt("73 windows", 60, lambda: self.window(self.fastest(), 73, scored=whole, rounds=2))
        return self

    def run_stream(self):
        shape, layers = ("tiny", 3) if self.options.tiny else ("mistral-123b", self.options.layers)
        windows = 20
        for weights in ("device", "host", "device", "host"):
            name = f"123B {weights}"

            def run(weights=weights):
                return self.window(self.options.paths[0], windows, weights, shape, layers=layers, rounds=2)

            self.attempt(name, 60, run)
        return self

    def fastest(self):
        rates = {path: self.tokens(f"ctq {path}") for path in self.options.paths}
        rates = {path: rate for path, rate in rates.items() if rate}
        return max(rates, key=rates.get) if rates else None

    def tokens(self, name):
        """Median tokens a second."""
        rounds = self.found.get(name)
        return statistics.median(one["tokens_per_second"] for one in rounds) if rounds else None

    def goals(self):
        found = {}
        fastest = self.fastest()
        if fastest:
            own = self.tokens(f"ctq {fastest}")
            found["model"] = own if not self.options.tiny else None
            for dense in self.found.get("transformers bf16 dense", []):
                found["model_dense"] = own / max(dense.values())
            for packed in self.found.get("transformers compressed-tensors", []):
                found["model_packed"] = own / packed["later"]
            runs = self.found[f"ctq {fastest}"]
            found["memory"] = over_packed(runs[0], SIZES[self.shape])
        if "73 windows" in self.found:
            found["windows"] = self.found["73 windows"][0]["seconds"]
        device_rate, host_rate = self.tokens("123B device"), self.tokens("123B host")
        if device_rate and host_rate:
            found["stream"] = host_rate / device_rate
        return found

    def markdown(self):
        lines = ["| what | tokens/s | s | loading s | peak device GiB |", "|---|---|---|---|---|"]
        for name, rounds in self.found.items():
            for one in rounds:
                if "tokens_per_second" in one:
                    loading = one["loading_seconds"]
                    cells = [f"{name}: {one['windows']} x {one['context']}, {one['scored']} scored, weights {one['weights']}"]
                    cells += [f"{one['tokens_per_second']:,.0f}", f"{one['seconds']:.3f}"]
                    cells += ["-" if loading is None else f"{loading:.1f}", gibibytes(one["peak_device_bytes"])]
                    lines.append("| " + " | ".join(cells) + " |")
                    continue
                for key, rate in one.items():
                    what = f"{name}, {key} windows" if isinstance(key, int) else f"{name}, {key} pass, reckoned"
                    lines.append(f"| {what} | {rate:,.0f} | - | - | - |")
        return (
            "## Whole windows\n\nctq: weights of random codes, 8B and 123B of real shape; transformers: random weights,"
            f" sdpa, {self.scored} rows of logits; with compressed-tensors reckoned from {FEW[0]} and {FEW[1]} layers,"
            " its first pass unpacks.\n\n" + "\n".join(lines)
        )

    def json(self):
        return {"rounds": [[name, value] for name, value in self.found.items()]}


def gibibytes(count):
    return "-" if count is None else f"{count / (1 << 30):.2f}"


def over_packed(run, sizes):
    """GiB beyond the packed weights: layers, embedding and head."""
    if run["peak_device_bytes"] is None:
        return None
    ends = 2 * 2 * sizes["vocab_size"] * sizes["hidden_size"]
    return (run["peak_device_bytes"] - run["layer_bytes"] * run["layers"] - ends) / (1 << 30)
