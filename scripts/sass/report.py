"""The budget as Markdown: what each kernel takes, and what that predicts on whole models. Says of every prediction that
it is one."""

import re

from sass import budget, shapes

HEAD = """# Budget of the CUDA kernels from their machine code, sm_{arch}

**Predictions, not measurements**: made without a GPU by `scripts/sass_budget.py --nvcc nvcc --arch {arch}` from the
machine code of NVIDIA's compiler. What is measured on one goes to `cuda_peers.md` and replaces these numbers.

Reckoned with: {chip}, {mps} multiprocessors at {clock:.3f} GHz under load, {tensor} multiply-adds of bf16 a clock and
multiprocessor by wgmma, {warp:.0%} of that by mma.sync, {dense:.0f} TFLOP/s by a library's dense product, {memory:.1f}
TB/s by a copy. Rates of the other pipes and where they come from: `scripts/sass/rates.py`.

What a static count cannot know, all of it to the kernel's disadvantage: latencies (a warp that waits for its own result
issues nothing, and few warps hide little), barriers, bank conflicts, misses of caches, what comes before and after the
loop, clocks that power takes away; and, to its advantage, reads of shared memory that several lanes share. So a share of
peak is a bound from above. Where a loop has branches, two numbers are given: the least (every instruction in the loop is
gone through) and the most (the cheapest way that does all of its products)."""


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def span(pair, scale=1.0, digits=2):
    """Least to most, once where they are the same."""
    least, most = (f"{value * scale:.{digits}f}" for value in pair)
    return least if least == most else f"{least} to {most}"


def resources(found):
    kernel = found.kernel
    shared = "-" if kernel.dynamic_shared is None else f"{kernel.dynamic_shared / 1024:.1f}"
    return [f"`{kernel.name}`", kernel.threads or "-", kernel.registers, shared, found.blocks or "-"]


RESOURCES = ["kernel", "threads", "registers", "shared KiB", "blocks"]
PIPES = ("tensor", "issue", "fma", "alu", "xu", "f64", "shared")


def clocks(found):
    return [f"{found.best.clocks[pipe]:.0f}" if found.best.clocks[pipe] else "-" for pipe in PIPES]


def products(budgets):
    rows = []
    for found in budgets:
        if found.taken != "products":
            continue
        every = sum(found.worst.counts.values())
        rows.append([*resources(found), found.best.counts["tensor"], found.best.clocks["issue"], every,
                     *clocks(found), found.best.bound, span(found.share)])  # fmt: skip
    header = [*RESOURCES, "tensor instructions", "instructions", "with every branch", *PIPES, "bound", "share of peak"]
    return (
        "## Kernels of tensor cores\n\nInstructions of one trip through the loop, and clocks of a multiprocessor for one"
        " warp on each of its four schedulers.\n\n" + table(header, rows)
    )


def sums(budgets):
    rows = [
        [*resources(found), found.best.clocks["issue"], *clocks(found), found.best.bound]
        for found in budgets
        if found.taken == "sums"
    ]
    text = "## Kernels of plain arithmetic\n\nOne trip through the loop, as above.\n\n"
    return text + table([*RESOURCES, "instructions", *PIPES, "bound"], rows)


def passes(chip, budgets):
    rows = []
    for found in budgets:
        if found.taken in ("products", "sums") or not found.best.global_bytes:
            continue
        room = sorted(found.bandwidth)
        verdict = "memory" if room[0] >= chip.memory else "either" if room[1] >= chip.memory else found.best.bound
        every = sum(found.worst.counts.values())
        rows.append([*resources(found), found.best.clocks["issue"], every, found.best.bound, span(room, 1e-12, 1),
                     verdict])  # fmt: skip
    header = [*RESOURCES, "instructions", "with every branch", "busiest pipe", "room TB/s", "bound by"]
    return (
        "## Kernels that pass over memory\n\nRoom: bytes that the kernel moves by the time that its instructions take at"
        f" the least. Above {chip.memory / 1e12:.1f} TB/s memory is what it waits for; at most, that is.\n\n"
        + table(header, rows)
    )


def floors(chip, m=8192):
    def micros(count):
        return f"{m * count / chip.memory * 1e6:.0f}"

    rows = []
    for model in shapes.MODELS:
        for name, *sizes, elements in shapes.PASSES:
            rows.append([model.name, name, *sizes, elements(model), *(micros(size * elements(model)) for size in sizes)])
        dense = sum(shapes.dense_seconds(chip, n, k, m) for _, n, k in model.linears())
        totals = [shapes.pass_bytes(model, how) for how in (shapes.COMPOSED, shapes.FUSED)]
        shares = [f"**{micros(total)}**, {m * total / chip.memory / dense:.0%}" for total in totals]
        rows.append([model.name, "**all**, of dense products", "", "", "", *shares])
    return (
        f"## Floors of passes over activations\n\nOf one layer and {m} tokens, at the rate of a copy: operations one after"
        " the other, and fused.\n\n"
        + table(["model", "pass", "bytes an element", "fused", "elements a token", "us", "us fused"], rows)
    )


def product_of(found):
    """What is reckoned with of a kernel of linears that decodes; `None`: it is none."""
    code = budget.code_of(found.kernel)
    if found.taken != "products" or code is None or found.is_bytes or not found.kernel.threads:
        return None
    # Of one warp in a trip, 16 rows of outputs: tokens by k. Warps that multiply alone take a tile's k at a time.
    outputs = found.best.multiply_adds // 4 // 16
    tokens = found.across or outputs // shapes.TILE
    k = outputs // tokens if tokens else 0
    clocks = found.best.most, found.worst.most
    return shapes.Product(found.kernel.name, code, 64 * found.groups, tokens, k, found.groups, *clocks)


def decode_rates(budgets):
    """(least, most) bytes a second of the kernels that decode rows, by code: those for any scheme, unless there is one for
    the usual ones."""
    rates = {}
    for prefix in ("decode_rows_", "decode_quick_"):
        found = {budget.kernel.name: sorted(budget.bandwidth) for budget in budgets}
        rates |= {name.removeprefix(prefix): rate for name, rate in found.items() if name.startswith(prefix)}
    return rates


def share(dense, pair):
    """Of the time of a dense product, least and most."""
    return span(sorted(dense / seconds for seconds in pair))


def products_by(budgets, code):
    """The kernels of linears that decode these codes."""
    return [p for p in map(product_of, budgets) if p and p.code == code and p.tokens]


def linears(chip, budgets, code):
    decode = decode_rates(budgets).get(code)
    if decode is None:
        return ""
    ways = [("path A", lambda n, k, m: shapes.library_seconds(chip, n, k, m, code, decode[1]))]
    ways += [(f"`{p.name}`", lambda n, k, m, p=p: p.range(chip, n, k, m)) for p in products_by(budgets, code)]
    rows = []
    for model in shapes.MODELS:
        for part, n, k in model.linears():
            dense = [shapes.dense_seconds(chip, n, k, m) for m in shapes.TOKENS]
            name = f"{model.name} {part} {n} x {k}"
            rows.append([name, "dense, ms", *(f"{seconds * 1e3:.3f}" for seconds in dense)])
            for way, seconds in ways:
                cells = [share(one, seconds(n, k, m)) for one, m in zip(dense, shapes.TOKENS)]
                rows.append(["", way, *cells])
    return (
        f"## Linears from {code}: share of a dense product's speed, by tokens at a time\n\nPath A: least, decoded and"
        " multiplied one after the other; most, decoded beside the product before it as if that cost nothing, at"
        f" {span(decode, 1e-12, 1)} TB/s of which the most is taken. Kernels: least, every branch, and outputs written"
        " when nothing else runs; most, neither. A predicted time is the dense one by the share.\n\n"
        + table(["linear", "by", *map(str, shapes.TOKENS)], rows)
    )


def attention_rates(chip, budgets, head_dim, context):
    """Operations a second, least and most, of the kernels for heads of so many dimensions, by name."""
    rates = {}
    for found in budgets:
        size = re.fullmatch(r"attend_\w*?_(\d+)", found.kernel.name)
        if found.taken != "products" or not size or int(size[1]) != head_dim or not found.kernel.threads:
            continue
        keys = found.best.multiply_adds // 4 // (32 * head_dim)
        queries = 64 * found.groups
        if not keys or not queries:
            continue
        tiles = sum(-(-min(first + queries, context) // keys) for first in range(0, context, queries))
        useful = context * context / 2 / (tiles * keys * queries)
        peak = 2 * chip.tensor * chip.multiprocessors * chip.clock
        # Nothing of a tile's products beside a softmax, or all.
        alone = found.best.multiply_adds / found.peak
        alone /= found.best.clocks["tensor"] + found.best.clocks["issue"] - found.best.counts["tensor"]
        rates[found.kernel.name] = (min(alone, found.share[1]) * useful * peak, found.share[1] * useful * peak)
    return rates


def attention(chip, budgets):
    rows = []
    for head_dim in (64, 128, 256):
        for context in (2048, 8192):
            for name, rate in attention_rates(chip, budgets, head_dim, context).items():
                rows.append([f"`{name}`", head_dim, context, span(rate, 1e-12, 0)])
    return (
        "## Attention: TFLOP/s of causal operations\n\nLeast: a warp's products and its softmax one after the other;"
        " most: one warp's products beside another's softmax, as far as pipes allow. Tiles that the mask cuts are counted"
        " whole, without what masking them takes. FlashAttention-3 is reported at 566 to 614 for heads of 128 (pytorch/benchmark PR 2391); the target is"
        " 0.6 of what torch reaches beside it.\n\n" + table(["kernel", "head", "context", "TFLOP/s"], rows)
    )


def library_with(chip, code, rate, rest, m):
    """Path A as it is dispatched: matrices of few rows go through the kernel `rest`."""

    def seconds(n, k):
        if n < shapes.LIBRARY_ROWS and rest:
            return rest.range(chip, n, k, m)
        return shapes.library_seconds(chip, n, k, m, code, rate)

    return seconds


def ways_of(chip, budgets, code, m):
    """How the linears of a model can be multiplied: (what it is called, seconds at best and at worst of an n and a k)."""
    kernels = products_by(budgets, code)
    ways = [(f"`{p.name}`", lambda n, k, p=p: p.range(chip, n, k, m)) for p in kernels]
    decode = decode_rates(budgets).get(code)
    if not decode:
        return ways
    library = [("path A, all of them", library_with(chip, code, decode[1], None, m))]
    for rest in kernels:
        name = f"path A, k and v by `{rest.name}`"
        library.append((name, library_with(chip, code, decode[1], rest, m)))
    return library + ways


def models(chip, budgets, context=2048, m=8192):
    attend = attention_rates(chip, budgets, 128, context)
    if not attend:
        return ""
    rows = []
    for model in shapes.MODELS:
        for code in ("int4", "e2m1"):
            for name, way in ways_of(chip, budgets, code, m):
                for kernel, rates in attend.items():

                    def tokens(side, rate, way=way):
                        def linears(n, k):
                            return side(way(n, k))

                        return m / shapes.model_seconds(chip, model, linears, rate, shapes.FUSED, context, m)

                    ends = tokens(max, rates[0]), tokens(min, rates[1])
                    rows.append([model.name, code, name, f"`{kernel}`", span(ends, 1, 0)])
        products = model.layers * model.weights() + model.vocabulary * model.hidden
        rows.append([model.name, "-", "the rate of a library, nothing but products", "-",
                     f"{chip.dense / (2 * products):.0f}"])  # fmt: skip
    return (
        f"## Whole models: tokens a second, windows of {context}, {m} tokens at a time, weights resident\n\n"
        "The least and the most of linears and attention. Fused passes over activations, at the rate of a copy; every row"
        " through the head, which the library multiplies. Target: 38,000 for 8B from int4. Matrices of fewer than"
        f" {shapes.LIBRARY_ROWS} rows are not decoded for the library: k and v of both models.\n\n"
        + table(["model", "weights", "linears by", "attention by", "tokens/s"], rows)
    )


def markdown(arch, chip, budgets):
    head = HEAD.format(
        arch=arch, chip=chip.name, mps=chip.multiprocessors, clock=chip.clock / 1e9, tensor=chip.tensor,
        warp=chip.warp_share, dense=chip.dense / 1e12, memory=chip.memory / 1e12,
    )  # fmt: skip
    spilled = [f"`{found.kernel.name}`" for found in budgets if found.spills]
    spills = f"Registers are spilled by {', '.join(spilled)}." if spilled else "No kernel spills registers."
    parts = [f"{head}\n\n{len(budgets)} kernels. {spills}", products(budgets), attention(chip, budgets),
             models(chip, budgets), linears(chip, budgets, "int4"), linears(chip, budgets, "e2m1"),
             passes(chip, budgets), floors(chip), sums(budgets)]  # fmt: skip
    return "\n\n".join(part for part in parts if part)
