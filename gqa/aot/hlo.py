"""Read from XLA's text of a compiled program what it does with memory and the network.

The text is that of `jax.stages.Compiled.as_text()`: one device's part of the program, after fusion,
in the order in which it runs. An instruction inside a loop counts as often as the loop runs. An
array counts with the padding that fills up its tiles. Arrays with a memory space in their layout
("S(1)") lie on the chip, not in HBM, and cost no HBM traffic. `gqa/aot/chips.py` describes the
chips; experiments/aot turns both into times.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "token": 0, "opaque": 0} | {
    f"{sign}{bits}": bits for sign in "su" for bits in (2, 4, 8, 16, 32, 64)
}
COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
    *("collective-broadcast", "ragged-all-to-all"),
)
# Operations that move no data: they name or take apart existing arrays, or run other computations,
# whose instructions are counted themselves.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"),
    *("partition-id", "replica-id", "while", "conditional", "call", "optimization-barrier"),
    *("add-dependency", "opt-barrier"),
}
MOVES = {"copy", "transpose"}
# Operations that update an array in place; the number says which operand is the new part.
UPDATES = {"dynamic-update-slice": 1, "scatter": -1}
PASSIVE = {"parameter", "bitcast", "convert", "reshape"} | MOVES

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = ")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Shape(NamedTuple):
    """One array of the program: its type, sizes, and how it lies in memory."""

    dtype: str
    sizes: tuple[int, ...]
    layout: str

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in main memory."""
        return "S(" not in self.layout

    @property
    def nbytes(self) -> int:
        """Bytes in memory, with the padding that fills up the tiles."""
        order, _, tiling = self.layout.partition(":")
        minor = [int(axis) for axis in order.split(",") if axis]
        sizes = [self.sizes[axis] for axis in reversed(minor)] if minor else list(self.sizes)
        if tile := re.match(r"T\(([\d,]+)\)", tiling):
            tiles = [int(size) for size in tile[1].split(",")]
            for i, size in enumerate(reversed(tiles), 1):
                if i <= len(sizes):
                    sizes[-i] = -(-sizes[-i] // size) * size
        return math.prod(sizes) * BITS.get(self.dtype, 8) // 8


class Instruction(NamedTuple):
    """One line of the text.

    `results` are the arrays it makes, `operands` the names of those it reads, `inside` the text
    between the brackets and `rest` the text after them.
    """

    name: str
    op: str
    results: list[Shape]
    operands: list[str]
    inside: str
    rest: str

    @property
    def called(self) -> list[str]:
        """The computations that it runs."""
        names = _CALLED.findall(self.rest)
        if several := re.search(r"branch_computations=\{([^}]*)\}", self.rest):
            names += [name.strip().lstrip("%") for name in several[1].split(",")]
        return names


class Program(NamedTuple):
    """All computations by name, each with its instructions by name; `entry` runs first."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def executed(self) -> Iterator[tuple[Instruction, str, int]]:
        """Yield each instruction outside fusions, its computation's name, and how often it runs."""
        yield from self._executed(self.entry, 1)

    def _executed(self, name: str, times: int) -> Iterator[tuple[Instruction, str, int]]:
        for instruction in self.computations[name].values():
            yield instruction, name, times
            if instruction.op in ("while", "conditional", "call"):
                for called in instruction.called:
                    yield from self._executed(called, times * self._trips(instruction))

    def _trips(self, loop: Instruction) -> int:
        """Return how often a loop runs: as XLA states it, else the limit of the loop's counter."""
        if found := _TRIPS.search(loop.rest):
            return int(found[1])
        condition = re.search(r"condition=%?([\w.-]+)", loop.rest)
        if loop.op != "while" or condition is None:
            return 1
        inside = self.computations[condition[1]].values()
        limits = [int(it.inside) for it in inside if it.op == "constant" and it.inside.isdigit()]
        return max(limits, default=1)


class Collective(NamedTuple):
    """All operations of one kind: how often a device runs them, bytes of results, bytes sent."""

    count: int
    nbytes: int
    sent: float


class Transfer(NamedTuple):
    """One collective operation: times run, bytes of its result, and the devices that take part."""

    kind: str
    count: int
    nbytes: int
    devices: int


def parse(text: str) -> Program:
    """Parse the text of an HLO module.

    Raises:
        ValueError: if the text has no ENTRY computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if not line.startswith(" "):
            if head := _HEAD.match(line):
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif current is not None and (found := _LINE.match(line)):
            instruction = _instruction(found[1], line[found.end() :])
            current[found[1]] = instruction
    if not entry:
        raise ValueError("there is no ENTRY computation in the text")
    return Program(computations, entry)


def _instruction(name: str, line: str) -> Instruction:
    made = _closing(line, 0) + 1 if line.startswith("(") else line.index(" ")
    begin = line.index("(", made)
    end = _closing(line, begin)
    op, inside = line[made:begin].strip(), line[begin + 1 : end]
    results = shapes(line[:made])
    return Instruction(name, op, results, re.findall(r"%([\w.-]+)", inside), inside, line[end:])


def _closing(line: str, begin: int) -> int:
    depth = 0
    for i in range(begin, len(line)):
        depth += (line[i] == "(") - (line[i] == ")")
        if depth == 0:
            return i
    return len(line)


def shapes(text: str) -> list[Shape]:
    """Return the arrays that the text of a type names, in order; tuples are flattened."""
    return [
        Shape(dtype, tuple(int(n) for n in sizes.split(",") if n), layout)
        for dtype, sizes, layout in _SHAPE.findall(text)
    ]


def traffic(program: Program) -> int:
    """Return the bytes of HBM that the program reads and writes."""
    return sum(
        times * _moved(program, instruction, program.computations[where])
        for instruction, where, times in program.executed()
    )


def _moved(program: Program, it: Instruction, around: dict[str, Instruction]) -> int:
    if it.op in FREE or it.op.endswith(("-done", "-update")):
        return 0
    reads = (_read(program, it, i, around[name]) for i, name in enumerate(it.operands))
    return sum(reads) + _written(program, it, around)


def _read(program: Program, it: Instruction, i: int, operand: Instruction) -> int:
    """Return the bytes that an instruction reads of its i-th operand: all of it, or a slice."""
    size = _nbytes(operand.results)
    if not size or it.op in FREE:
        return 0
    if it.op == "fusion":
        inside = program.computations[it.called[0]]
        return _read_inside(inside, _parameter(inside, i), size)
    if it.op in ("copy-start", "slice-start"):
        return _made(it).nbytes
    if it.op in ("slice", "dynamic-slice", "gather"):
        return it.results[0].nbytes if i == 0 else 0
    if it.op in UPDATES:
        return size if i == UPDATES[it.op] % len(it.operands) else 0
    return size


def _written(program: Program, it: Instruction, around: dict[str, Instruction]) -> int:
    """Return the bytes that an instruction writes; of an array updated in place, the new part."""
    if it.op in UPDATES:
        return _nbytes(around[it.operands[UPDATES[it.op]]].results)
    if it.op in ("copy-start", "slice-start"):
        return _nbytes([_made(it)])
    writes = _nbytes(it.results[-1:] if it.op.endswith("-start") else it.results)
    if it.op != "fusion" or not writes:
        return writes
    inside = program.computations[it.called[0]]
    updates = [own for own in inside.values() if own.op == "dynamic-update-slice"]
    whole = sum(own.results[0].nbytes for own in updates)
    part = sum(_nbytes(inside[own.operands[1]].results) for own in updates)
    return max(writes - whole, 0) + min(part, writes) if updates else writes


def _made(it: Instruction) -> Shape:
    """Return the new array of a copy-start or slice-start, whose tuple also has the source."""
    return it.results[0 if it.op == "copy-start" else 1]


def _parameter(inside: dict[str, Instruction], i: int) -> Instruction:
    return next(it for it in inside.values() if it.op == "parameter" and int(it.inside) == i)


def _read_inside(inside: dict[str, Instruction], parameter: Instruction, size: int) -> int:
    """Return the bytes that a fusion reads of a parameter of `size` bytes: all, or its slices."""
    users = [it for it in inside.values() if parameter.name in it.operands]
    if not users or not all(_is_slice_of(it, parameter.name) for it in users):
        return size
    return min(size, sum(it.results[0].nbytes for it in users if _is_read(it)))


def _is_slice_of(it: Instruction, name: str) -> bool:
    if it.op in ("dynamic-update-slice", "dynamic-slice", "slice", "gather"):
        return it.operands[0] == name
    return False


def _is_read(it: Instruction) -> bool:
    return it.op != "dynamic-update-slice"


def _nbytes(results: list[Shape]) -> int:
    return sum(shape.nbytes for shape in results if shape.in_hbm)


def reads(program: Program, arguments: tuple[str, ...]) -> float:
    """Return the bytes read of some arguments over the arguments' bytes: 1 if each is read once.

    Args:
        arguments: what the arguments' names begin with, as JAX names them ("cache[").

    An array that is updated in place counts as the argument it was. Loops are not looked into.
    """
    around, size, read = program.computations[program.entry], 0, 0
    same: set[str] = set()
    for it in around.values():
        name = re.search(r'op_name="([^"]*)"', it.rest) if it.op == "parameter" else None
        if name and name[1].startswith(arguments):
            same.add(it.name)
            size += _nbytes(it.results)
        for i, operand in enumerate(it.operands):
            if operand in same:
                read += _read(program, it, i, around[operand])
                if _is_still(program, it, i):
                    same.add(it.name)
    return read / size


def _is_still(program: Program, it: Instruction, i: int) -> bool:
    """Whether the result is the i-th operand itself, renamed or updated in place."""
    if it.op == "fusion":
        inside = program.computations[it.called[0]]
        own = _parameter(inside, i).name
        return any(u.op == "dynamic-update-slice" and u.operands[0] == own for u in inside.values())
    return it.op == "bitcast" or (it.op == "dynamic-update-slice" and i == 0)


def moves(program: Program, least: int) -> list[Instruction]:
    """Return the copies and transposes, fused or not, that write `least` bytes or more to HBM."""
    found = []
    for it, _, _ in program.executed():
        if it.op in MOVES or (it.op == "fusion" and _only_moves(program, it)):
            found += [it] * (_nbytes(it.results) >= least)
    return found


def _only_moves(program: Program, it: Instruction) -> bool:
    ops = {inner.op for inner in program.computations[it.called[0]].values()}
    return bool(ops & MOVES) and ops <= PASSIVE


def collectives(program: Program) -> dict[str, Collective]:
    """Add up the communication of each kind, fused and asynchronously started ones included."""
    count, nbytes, sent = Counter(), Counter(), Counter()
    for transfer in transfers(program):
        kind, received = transfer.kind, transfer.count * transfer.nbytes
        count[kind] += transfer.count
        nbytes[kind] += received
        sent[kind] += received * _sent_per_received(kind, transfer.devices)
    return {kind: Collective(count[kind], nbytes[kind], sent[kind]) for kind in count}


def transfers(program: Program) -> Iterator[Transfer]:
    """Yield every collective operation that the program runs."""
    for it, times in _all(program):
        kind = it.op.removesuffix("-start")
        if kind in COLLECTIVES:
            yield Transfer(kind, times, _received(it), group_size(it.rest))


def _all(program: Program) -> Iterator[tuple[Instruction, int]]:
    """Yield every instruction that runs, also inside fusions and async calls, and how often."""
    for it, _, times in program.executed():
        yield it, times
        if it.op in ("fusion", "async-start"):
            for name in it.called:
                yield from ((inner, times) for inner in program.computations[name].values())


def _received(it: Instruction) -> int:
    results = it.results
    if it.op.endswith("-start") and len(results) > 1:
        # Operands first, then as many results, then handles; a variadic all-reduce has no operands.
        arrays = [shape for shape in results if shape.sizes]
        results = arrays[len(arrays) // 2 :] if len(arrays) > 1 else arrays
    return sum(shape.nbytes for shape in results)


def group_size(rest: str) -> int:
    """Return how many devices a collective joins; 2 for a permutation, which lists no group."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    return 2


def _sent_per_received(kind: str, n: int) -> float:
    """Return the bytes a device sends per byte of its result, on a ring of `n` devices."""
    if kind == "all-reduce":
        return 2 * (n - 1) / n
    if kind == "reduce-scatter":
        return float(n - 1)  # its result is an n-th of what is reduced
    return 1.0 if kind == "collective-permute" else (n - 1) / n
