"""What a compiled kernel is made of: its instructions, the loops among them, registers, shared memory. Knows SASS as
cuobjdump prints it and ELF; knows nothing of how fast anything is. Standard library only."""

import re
import struct
import subprocess
from dataclasses import dataclass, field

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


@dataclass
class Instruction:
    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def base(self):
        return self.opcode.split(".")[0]

    @property
    def is_conditional(self):
        """A branch that may also go on: by its guard, or by a predicate among its operands."""
        return bool(self.guard) or bool(re.match(r"!?U?P\d|UR\d", self.operands)) or ".DIV" in self.opcode

    @property
    def target(self):
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        return int(found.group(1), 16) if found else None


@dataclass
class Block:
    """Instructions that run one after the other."""

    instructions: list
    followers: list = field(default_factory=list)


@dataclass
class Kernel:
    name: str
    file: str
    instructions: list
    registers: int = 0
    stack: int = 0
    static_shared: int = 0
    # What the source states: None where it states nothing.
    threads: int = None
    dynamic_shared: int = None


def run(command):
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def disassemble(cuobjdump, cubin, file):
    """The kernels of a cubin, by the order of their names."""
    kernels = {}
    for chunk in re.split(r"^\s+Function : ", run([cuobjdump, "-sass", cubin]), flags=re.M)[1:]:
        name, body = chunk.split("\n", 1)
        found = (LINE.match(line) for line in body.splitlines())
        listed = [Instruction(int(m[1], 16), m[2] or "", m[3], m[4]) for m in found if m]
        kernels[name.strip()] = Kernel(name.strip(), file, listed)
    usage = run([cuobjdump, "-res-usage", cubin])
    for name, registers, stack, shared in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage):
        if name in kernels:
            kernel = kernels[name]
            kernel.registers, kernel.stack, kernel.static_shared = int(registers), int(stack), int(shared)
    for name, (threads, shared) in launches(cubin.read_bytes()).items():
        if name in kernels:
            kernels[name].threads, kernels[name].dynamic_shared = threads, shared
    return [kernels[name] for name in sorted(kernels)]


def launches(data):
    """Threads and dynamic shared memory of each kernel: the two numbers of its `<name>_launch`."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + index * entry) for index in range(count)]
    found = {}
    for _, kind, _, _, offset, size, link, _, _, _ in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        names = sections[link][4]
        for at in range(offset, offset + size, 24):
            name_at, _, _, section, value, length = struct.unpack_from("<IBBHQQ", data, at)
            name = data[names + name_at : data.index(b"\0", names + name_at)].decode()
            # SHT_PROGBITS: the numbers themselves.
            if name.endswith("_launch") and length == 8 and section < count and sections[section][1] == 1:
                found[name[: -len("_launch")]] = struct.unpack_from("<II", data, sections[section][4] + value)
    return found


def blocks_of(instructions):
    """Basic blocks with those that may come next; the first is where the kernel begins."""
    index = {instruction.address: at for at, instruction in enumerate(instructions)}
    jumps = {"BRA", "JMP", "BRX", "JMX", "EXIT", "RET", "BREAK", "KILL"}
    heads = {0}
    for at, instruction in enumerate(instructions):
        if instruction.base in jumps:
            heads.add(at + 1)
            if instruction.target in index:
                heads.add(index[instruction.target])
    starts = sorted(at for at in heads if at < len(instructions))
    place = {start: number for number, start in enumerate(starts)}
    blocks = []
    for number, start in enumerate(starts):
        end = starts[number + 1] if number + 1 < len(starts) else len(instructions)
        block = Block(instructions[start:end])
        last = block.instructions[-1]
        if last.base in ("BRA", "JMP") and last.target in index:
            block.followers.append(place[index[last.target]])
        ends = last.base in jumps - {"BREAK"} and not last.is_conditional
        if not ends and end in place:
            block.followers.append(place[end])
        blocks.append(block)
    # Where a table of jumps leads is not in the listing: to whatever nothing else leads to.
    reached = {0}.union(*(block.followers for block in blocks))
    tables = [block for block in blocks if block.instructions[-1].base in ("BRX", "JMX")]
    for block in tables:
        block.followers = sorted(set(range(len(blocks))) - reached)
    return blocks


def order_of(blocks):
    """Reachable blocks, each before those that follow it, but for the ends of loops."""
    done, order, stack = {0}, [], [(0, iter(blocks[0].followers))]
    while stack:
        at, left = stack[-1]
        following = next((to for to in left if to not in done), None)
        if following is None:
            order.append(at)
            stack.pop()
        else:
            done.add(following)
            stack.append((following, iter(blocks[following].followers)))
    return order[::-1]


def dominators(blocks, order):
    """Of each reachable block the nearest one through which all ways to it lead (Cooper, Harvey, Kennedy 2001)."""
    rank = {at: number for number, at in enumerate(order)}
    before = {at: [] for at in order}
    for at in order:
        for to in blocks[at].followers:
            before[to].append(at)
    nearest = {order[0]: order[0]}

    def common(one, other):
        while one != other:
            while rank[one] > rank[other]:
                one = nearest[one]
            while rank[other] > rank[one]:
                other = nearest[other]
        return one

    changed = True
    while changed:
        changed = False
        for at in order[1:]:
            known = [way for way in before[at] if way in nearest]
            new = known[0]
            for way in known[1:]:
                new = common(new, way)
            if nearest.get(at) != new:
                nearest[at], changed = new, True
    return nearest, before


@dataclass
class Loop:
    head: int
    # Blocks from which it begins anew.
    ends: set
    members: set


def loops_of(blocks):
    """Natural loops: what lies between a branch and the block before it that all ways to the branch lead through."""
    order = order_of(blocks)
    nearest, before = dominators(blocks, order)

    def dominates(one, other):
        while other != one and other != order[0]:
            other = nearest[other]
        return other == one

    loops = {}
    for at in order:
        for to in blocks[at].followers:
            if not dominates(to, at):
                continue
            loop = loops.setdefault(to, Loop(to, set(), {to}))
            loop.ends.add(at)
            left = [at]
            while left:
                member = left.pop()
                if member not in loop.members:
                    loop.members.add(member)
                    left.extend(before[member])
    return order, list(loops.values())


def cheapest_way(blocks, order, start, ends, members, worth, cost):
    """Of the ways from `start` to one of `ends` through `members`, those worth most, and of these the cheapest: its
    instructions. Loops inside are gone through once."""
    rank = {at: number for number, at in enumerate(order)}
    best = {start: ((-worth(blocks[start]), cost(blocks[start])), None)}
    for at in order:
        if at not in best or at not in members:
            continue
        (value, spent), _ = best[at]
        for to in blocks[at].followers:
            # Not back to the beginning of a loop.
            if to not in members or rank[to] <= rank[at]:
                continue
            there = (value - worth(blocks[to]), spent + cost(blocks[to]))
            if to not in best or there < best[to][0]:
                best[to] = (there, at)
    reached = [at for at in ends if at in best]
    if not reached:
        return []
    at, way = min(reached, key=lambda end: best[end][0]), []
    while at is not None:
        way.append(at)
        at = best[at][1]
    return [instruction for block in reversed(way) for instruction in blocks[block].instructions]
