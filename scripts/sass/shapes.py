"""What the kernels' counts come to on the shapes of whole models: floors, predicted times, tokens a second. Arithmetic
on numbers that others hand in; reads no listings. Every number here is a prediction and none is a measurement."""

from dataclasses import dataclass

# Tokens at a time that are reckoned with.
TOKENS = (2048, 4096, 8192, 16384)
# k of one tile of packed weights.
TILE = 64


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def linears(self):
        """(part, n, k), those of the same inputs as one: the shapes that are measured."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [("q+k+v", q + 2 * kv, self.hidden), ("o", self.hidden, q),
                ("gate+up", 2 * self.inner, self.hidden), ("down", self.hidden, self.inner)]  # fmt: skip

    def weights(self):
        """Of one layer's linears."""
        return sum(n * k for _, n, k in self.linears())

    def parts(self):
        """(n, k) of each linear by itself, as a layer multiplies them."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [(q, self.hidden), (kv, self.hidden), (kv, self.hidden), (self.hidden, q), (self.inner, self.hidden),
                (self.inner, self.hidden), (self.hidden, self.inner)]  # fmt: skip

    def attention_operations(self, context):
        """Of one layer and token: two products over half of the pairs."""
        return 2 * context * self.heads * self.head_dim


MODELS = (
    Model("8B", 32, 4096, 14336, 32, 8, 128, 128256),
    Model("123B", 88, 12288, 28672, 96, 8, 128, 32768),
)

# Bytes of a packed weight: codes and scales.
PACKED = {"int4": 4 / 8 + 2 / 128, "e2m1": 4 / 8 + 1 / 16, "int8": 1.0, "e4m3": 1.0, "bf16": 2.0, "f16": 2.0, "f32": 4.0}

# Passes over activations outside of products, of one layer: name, bytes an element by operations one after the other and
# by fused ones, elements of a token. f32 in and out, bf16 operands. Fused: a norm writes operands, a gate writes
# operands, and what is added to the hidden states is added where it is made.
COMPOSED, FUSED = 1, 2
PASSES = (
    ("norms", 4 + 4, 4 + 2, lambda m: 2 * m.hidden),
    ("operands of q, k, v, gate, up", 4 + 2, 0, lambda m: 2 * m.hidden),
    ("rotation", 4 + 4, 4 + 4, lambda m: (m.heads + m.kv_heads) * m.head_dim),
    ("keys and values to bf16", 4 + 2, 4 + 2, lambda m: 2 * m.kv_heads * m.head_dim),
    ("operand of o", 4 + 2, 4 + 2, lambda m: m.heads * m.head_dim),
    ("residuals", 4 + 4 + 4, 4, lambda m: 2 * m.hidden),
    ("checks for finite numbers", 4, 0, lambda m: 2 * m.hidden),
    ("gate", 4 + 4 + 4, 4 + 4 + 2, lambda m: m.inner),
    ("operand of down", 4 + 2, 0, lambda m: m.inner),
)


def pass_bytes(model, how):
    """Of one layer and token; `how` is COMPOSED or FUSED."""
    return sum(one[how] * one[-1](model) for one in PASSES)


def linear_bytes(n, k, m, packed):
    """Weights and bf16 inputs read once, f32 outputs written once."""
    return n * k * packed + 2 * m * k + 4 * m * n


@dataclass(frozen=True)
class Product:
    """A kernel of products as its loop has it."""

    name: str
    code: str
    # Outputs of a block.
    rows: int
    tokens: int
    # k of one trip through its loop.
    k: int
    # Groups of four warps that multiply, and clocks of one of them for a trip: at best, and with every branch taken.
    groups: int
    best: float
    worst: float

    def seconds(self, chip, n, k, m, clocks):
        """Tiles go round in whole rounds; what power allows is a bound of its own."""
        tiles = -(-n // self.rows) * -(-m // self.tokens)
        rounds = -(-tiles // chip.multiprocessors)
        loop = rounds * self.groups * -(-k // self.k) * clocks / chip.clock
        spread = rounds * chip.multiprocessors / tiles
        return max(loop, dense_seconds(chip, n, k, m) * spread, linear_bytes(n, k, m, PACKED[self.code]) / chip.memory)

    def range(self, chip, n, k, m):
        """At best; and with every branch taken and outputs written when nothing else runs."""
        stores = 4 * m * n / chip.memory
        return self.seconds(chip, n, k, m, self.best), self.seconds(chip, n, k, m, self.worst) + stores


def dense_seconds(chip, n, k, m):
    """What a library's dense product takes."""
    return 2 * n * k * m / chip.dense


def decode_seconds(chip, n, k, code, rate):
    """Packed weights read, bf16 written, at `rate` bytes a second."""
    return n * k * (PACKED[code] + 2) / min(rate, chip.memory)


def library_seconds(chip, n, k, m, code, rate):
    """Path A: decoded beside the product before, and one after the other."""
    dense, decode = dense_seconds(chip, n, k, m), decode_seconds(chip, n, k, code, rate)
    return max(dense, decode), dense + decode


# Fewest rows of a matrix that are decoded for the library: LARGE_N in kernels/src/cuda/linear/dense.rs.
LIBRARY_ROWS = 2048


def model_seconds(chip, model, linears, attention_rate, how, context, m):
    """Of `m` tokens through all layers and the head: `linears` is a function of (n, k), `how` that of the passes."""
    attention = m * model.attention_operations(context) / attention_rate
    passes = m * pass_bytes(model, how) / chip.memory
    layer = sum(linears(n, k) for n, k in model.parts()) + attention + passes
    head = dense_seconds(chip, model.vocabulary, model.hidden, m)
    return model.layers * layer + head
