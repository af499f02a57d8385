"""How fast a multiprocessor does what its instructions say: rates of the pipes, with their sources, and what a run of
instructions takes of each. Static: knows nothing of latencies, waits, bank conflicts or caches.

Sources. Arithmetic: the table "Throughput of Native Arithmetic Instructions" of the CUDA C++ Programming Guide (results
a clock and multiprocessor, divided by 32 lanes and four schedulers). Tensor cores: 312 TFLOP/s dense bf16 of an A100
(108 multiprocessors, 1.41 GHz: 1024 multiply-adds a clock) and 989 of an H100 or H200 (132, 1.83 GHz: 2048), by their
datasheets; 8-bit operands twice that. mma.sync on Hopper: 0.63 of wgmma on the average of its shapes (Luo et al., arXiv
2402.13499, table of dense mma), at best about 0.75 (ThunderKittens' authors). Shared memory: 128 bytes a clock. H200:
989 TFLOP/s nominal, about 780 reached by a dense product of a library on random data (power), 4.3 TB/s by a copy.
"""

import re
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    name: str
    multiprocessors: int
    # Under load.
    clock: float
    # Multiply-adds of bf16 a clock and multiprocessor.
    tensor: int
    # Of `tensor`, what mma.sync reaches.
    warp_share: float
    registers: int
    shared: int
    # What a library's dense product and a copy reach: operations and bytes a second.
    dense: float
    memory: float


CHIPS = {
    "80": Chip("A100", 108, 1.41e9, 1024, 1.0, 65536, 164 << 10, 270e12, 1.4e12),
    "90a": Chip("H200", 132, 1.755e9, 2048, 0.63, 65536, 228 << 10, 780e12, 4.3e12),
}

SCHEDULERS = 4
SHARED_BYTES = 128

# Clocks of a scheduler that one instruction of a warp keeps the pipe for: 32 lanes by lanes a clock.
FMA = ("FFMA", "FADD", "FMUL", "FFMA32I", "FADD32I", "FMUL32I", "HFMA2", "HMUL2", "HADD2", "FSWZADD")
INTEGER_FMA = ("IMAD", "IMUL", "IDP")
ALU = (
    "LOP3 SHF SHL SHR IADD3 IADD VIADD VIADDMNMX VIMNMX VIMNMX3 VABSDIFF IMNMX ISETP FSETP FMNMX SEL FSEL PRMT LEA MOV "
    "IABS PLOP3 P2R R2P LOP BMSK SGXT F2FP I2FP F2IP PSETP FSET FCHK VOTE HSETP2 HMNMX2 ICMP MOV32I LOP32I"
).split()
XU = ("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV", "I2I")
DOUBLE = ("DADD", "DMUL", "DFMA", "DSETP")
SHARED = ("LDS", "STS", "LDSM", "STSM", "SHFL", "ATOMS", "MOVM")
GLOBAL = ("LDG", "STG", "LD", "ST", "LDGSTS", "RED", "ATOMG", "ATOM")
BULK = ("UTMALDG", "UTMASTG", "UBLKCP", "UTMAPF", "UBLKPF", "UTMACCTL", "UTMACMDFLUSH")
LOCAL = ("LDL", "STL")
TENSOR_WARP = ("HMMA", "IMMA", "QMMA", "OMMA", "BMMA", "DMMA")
TENSOR_GROUP = ("HGMMA", "IGMMA", "QGMMA")
CONTROL = (
    "BRA EXIT BSSY BSYNC BREAK BAR WARPSYNC NOP DEPBAR LDGDEPBAR SYNCS WARPGROUP WARPGROUPSET CALL RET BRX KILL "
    "NANOSLEEP YIELD ERRBAR MEMBAR FENCE CCTL ENDCOLLECTIVE ELECT USETMAXREG CGAERRBAR UCGABAR_ARV UCGABAR_WAIT JMP "
    "ARRIVES ACQBULK B2R R2B S2R CS2R GETLMEMBASE"
).split()
KINDS = {
    **dict.fromkeys(FMA, "fma"), **dict.fromkeys(INTEGER_FMA, "imad"), **dict.fromkeys(ALU, "alu"),
    **dict.fromkeys(XU, "xu"), **dict.fromkeys(DOUBLE, "f64"), **dict.fromkeys(SHARED, "shared"),
    **dict.fromkeys(GLOBAL, "global"), **dict.fromkeys(BULK, "bulk"), **dict.fromkeys(LOCAL, "local"),
    **dict.fromkeys(TENSOR_WARP, "tensor"), **dict.fromkeys(TENSOR_GROUP, "tensor"),
    **dict.fromkeys(CONTROL, "control"),
}  # fmt: skip


def kind(instruction):
    """The pipe of an instruction; what begins with U is done once for a warp, what reads constants apart."""
    base = instruction.base
    if base in KINDS:
        return KINDS[base]
    if base in ("LDC", "ULDC", "LDCU"):
        return "constant"
    if base.startswith(("U", "R2UR", "S2UR", "REDUX")):
        return "uniform"
    return "other"


def shape_of(instruction):
    """m, n, k of a tensor instruction: `HGMMA.64x256x16`, `HMMA.16816`, `IMMA.16832`."""
    found = re.search(r"\.(\d+)x(\d+)x(\d+)", instruction.opcode)
    if found:
        return tuple(map(int, found.groups()))
    digits = re.search(r"\.(\d{4,5})(?:\.|$)", instruction.opcode)
    # m16 n8, and k is what is left.
    return (16, 8, int(digits[1][3:])) if digits and digits[1].startswith("168") else None


def multiply_adds(instruction):
    """Of one warp: a quarter of those of a warpgroup."""
    if kind(instruction) != "tensor":
        return 0
    shape = shape_of(instruction)
    if shape is None:
        raise SystemExit(f"{instruction.opcode}: a tensor instruction of a shape that is not known here; add it")
    m, n, k = shape
    return m * n * k // (4 if instruction.base in TENSOR_GROUP else 1)


def is_bytes(instruction):
    """Whether operands have 8 bits, which are multiplied at twice the rate."""
    return instruction.base in ("IMMA", "QMMA", "IGMMA", "QGMMA")


def tensor_clocks(instruction, chip):
    """Clocks of the multiprocessor's tensor cores, where four warps issue it."""
    rate = chip.tensor * (2 if is_bytes(instruction) else 1)
    rate *= 1.0 if instruction.base in TENSOR_GROUP else chip.warp_share
    return SCHEDULERS * multiply_adds(instruction) / rate


def width(instruction):
    """Bytes of one lane of a load or store."""
    suffixes = instruction.opcode.split(".")
    for suffix, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if suffix in suffixes:
            return size
    return 4


def shared_clocks(instruction):
    """Clocks of shared memory, where four warps issue it, without bank conflicts."""
    base = instruction.base
    if base in TENSOR_GROUP:
        m, n, k = shape_of(instruction)
        size = 1 if is_bytes(instruction) else 2
        # B lies there, and A where no register comes first.
        operands = [operand.strip() for operand in instruction.operands.split(",")]
        from_registers = len(operands) > 1 and operands[1].startswith("R")
        return (n + (0 if from_registers else m)) * k * size / SHARED_BYTES
    if base in ("LDSM", "STSM"):
        matrices = next((int(part) for part in instruction.opcode.split(".") if part in ("1", "2", "4")), 1)
        return SCHEDULERS * matrices
    if base in ("LDS", "STS", "LDGSTS"):
        return SCHEDULERS * max(1, width(instruction) // 4)
    return SCHEDULERS if base in SHARED else 0


@dataclass
class Load:
    """What a run of instructions takes where one warp of each scheduler goes through it: clocks of the multiprocessor."""

    counts: Counter
    clocks: dict
    multiply_adds: int
    global_bytes: int

    @property
    def bound(self):
        return max(self.clocks, key=self.clocks.get)

    @property
    def most(self):
        return self.clocks[self.bound]


def load_of(instructions, chip):
    counts = Counter(kind(instruction) for instruction in instructions)
    fused = counts["fma"] + counts["imad"]
    clocks = {
        "tensor": sum(tensor_clocks(i, chip) for i in instructions if kind(i) == "tensor"),
        "issue": len(instructions),
        # Half of the lanes multiply integers.
        "fma": max(fused, 2 * counts["imad"]),
        "alu": 2 * counts["alu"],
        "xu": 8 * counts["xu"],
        "f64": 2 * counts["f64"],
        "shared": sum(shared_clocks(instruction) for instruction in instructions),
    }
    lanes = 32 * SCHEDULERS
    moved = sum(width(i) for i in instructions if kind(i) == "global")
    return Load(counts, clocks, SCHEDULERS * sum(map(multiply_adds, instructions)), lanes * moved)


def blocks_of_multiprocessor(kernel, chip):
    """Blocks that fit on a multiprocessor at a time; `None` where the launch is not known."""
    if not kernel.threads:
        return None
    warps = -(-kernel.threads // 32)
    registers = warps * -(-kernel.registers * 32 // 256) * 256
    shared = kernel.dynamic_shared + kernel.static_shared
    shared = -(-shared // 128) * 128 if kernel.static_shared else shared + 1024
    limits = [chip.registers // registers if registers else 32, chip.shared // max(shared, 1), 64 // warps, 32]
    return min(limits)
