"""Which instructions of a kernel count, and what they take of a multiprocessor. Chooses by what loops hold, never by
names: a kernel that is new needs nothing here."""

from dataclasses import dataclass

from sass import listing, rates

# What a kernel of products is called by the codes that it decodes.
CODES = ("int4", "e2m1", "int8", "e4m3", "bf16", "f16", "f32")


@dataclass
class Budget:
    """A kernel and the run of its instructions that counts."""

    kernel: listing.Kernel
    chip: rates.Chip
    # `products`: the loop with most tensor instructions; `sums`: with most arithmetic; `loop`: with most bytes; `whole`:
    # there is none.
    taken: str
    # The cheapest way through it that does all of its work, and every instruction that lies in it.
    best: rates.Load
    worst: rates.Load
    # Whether warps of their own copy for those that multiply.
    has_producer: bool
    # Loads and stores of local memory.
    spills: int
    # On a multiprocessor at a time; `None` where the launch is not stated.
    blocks: int
    # Operands have 8 bits.
    is_bytes: bool
    # Outputs across that one warpgroup's instruction has, tokens of a product; `None`: warps multiply alone.
    across: int

    @property
    def peak(self):
        """Multiply-adds a clock of these operands."""
        return self.chip.tensor * (2 if self.is_bytes else 1)

    @property
    def share(self):
        """(least, most) of the peak; `None` where nothing is multiplied on tensor cores."""
        if not self.best.multiply_adds:
            return None
        return tuple(load.multiply_adds / self.peak / load.most for load in (self.worst, self.best))

    @property
    def bandwidth(self):
        """(least, most) bytes a second that its instructions leave room for."""
        rate = self.chip.multiprocessors * self.chip.clock
        return tuple(load.global_bytes / max(load.most, 1) * rate for load in (self.worst, self.best))

    @property
    def groups(self):
        """Groups of four warps that multiply."""
        groups, left = divmod(self.kernel.threads or 128, 128)
        # A single warp that copies makes no group.
        return max(1, groups - 1 if self.has_producer and left == 0 else groups)


# Arithmetic instructions that make a loop one of sums.
SUMS = 64


def bytes_of(block):
    return sum(rates.width(i) for i in block.instructions if rates.kind(i) == "global")


def wide_of(block):
    """Bytes of wide accesses: what a kernel is there to move. Narrow ones look up scales, of one type or another."""
    return sum(rates.width(i) for i in block.instructions if rates.kind(i) == "global" and rates.width(i) == 16)


def products_of(block):
    """Products, and with them the wide loads that feed the next: a way without these is the last trip's."""
    return 1000 * sum(map(rates.multiply_adds, block.instructions)) + wide_of(block)


def sums_of(block):
    return sum(rates.kind(i) in ("fma", "f64") for i in block.instructions)


def hot_loop(blocks, loops, worth):
    """The innermost loop that is worth most; of equals the smallest. `None` where none is worth anything."""

    def sum_of(loop):
        return sum(worth(blocks[at]) for at in loop.members)

    loops = [loop for loop in loops if sum_of(loop)]
    inner = [one for one in loops if not any(other.members < one.members for other in loops)]
    return max(inner, key=lambda loop: (sum_of(loop), -len(loop.members)), default=None)


def chosen(blocks):
    """What counts: its name, the cheapest way through it, and all of it."""
    order, loops = listing.loops_of(blocks)
    def has_products(members):
        return any(map(rates.multiply_adds, (i for at in members for i in blocks[at].instructions)))

    moved = wide_of if any(map(wide_of, blocks)) else bytes_of
    for taken, worth in (("products", products_of), ("sums", sums_of), ("loop", moved)):
        loop = hot_loop(blocks, loops, worth)
        if loop is None or (taken == "products" and not has_products(loop.members)):
            continue
        if taken != "sums" or sum(sums_of(blocks[at]) for at in loop.members) >= SUMS:
            every = [i for at in sorted(loop.members) for i in blocks[at].instructions]
            best = listing.cheapest_way(blocks, order, loop.head, loop.ends, loop.members, worth, length)
            return taken, best, every
    every = [i for at in order for i in blocks[at].instructions]
    ends = [at for at in order if blocks[at].instructions[-1].base == "EXIT"]
    return "whole", listing.cheapest_way(blocks, order, 0, ends, set(order), moved, length), every


def length(block):
    return len(block.instructions)


def of(kernel, chip):
    """The budget of a kernel."""
    blocks = listing.blocks_of(kernel.instructions)
    taken, best, every = chosen(blocks)
    bulk = {i.address for i in kernel.instructions if rates.kind(i) == "bulk"}
    tensor = [i for i in every if rates.kind(i) == "tensor"]
    return Budget(
        kernel=kernel,
        chip=chip,
        taken=taken,
        best=rates.load_of(best, chip),
        worst=rates.load_of(every, chip),
        has_producer=bool(bulk - {i.address for i in every}) and taken == "products",
        spills=sum(rates.kind(i) == "local" for i in kernel.instructions),
        blocks=rates.blocks_of_multiprocessor(kernel, chip),
        is_bytes=bool(tensor) and all(map(rates.is_bytes, tensor)),
        across=next((rates.shape_of(i)[1] for i in tensor if i.base in rates.TENSOR_GROUP), None),
    )


def code_of(kernel):
    """The codes that a kernel of linears decodes to multiply them with values, by its name; `None`: it is no such kernel."""
    if not kernel.file.startswith("linear") or kernel.name.startswith("codes"):
        return None
    return next((code for code in CODES if kernel.name.endswith(f"_{code}")), None)
