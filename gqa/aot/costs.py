"""Count what a parsed program costs one device: bytes of HBM, copies, and communication.

An instruction inside a loop counts as often as the loop runs. An array counts with the padding that
fills up its tiles. Arrays that lie on the chip cost no HBM traffic. `gqa/aot/hlo.py` parses the
program; experiments/aot turns these counts into times.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from gqa.aot.hlo import Computation, Instruction, Program, Shape

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
# Operations that copy an array without computing, and those that a fusion may have beside them and
# still be a mere copy.
MOVES = {"copy", "transpose"}
PASSIVE = {"parameter", "bitcast", "convert", "reshape"} | MOVES
# Operations that update an array in place; the number says which operand is the new part.
UPDATES = {"dynamic-update-slice": 1, "scatter": -1}


class Collective(NamedTuple):
    """All operations of one kind: how often a device runs them, bytes of results, bytes sent."""

    runs: int
    nbytes: int
    sent: float


class Transfer(NamedTuple):
    """One collective operation: times run, bytes of its result, and the devices that take part."""

    kind: str
    runs: int
    nbytes: int
    devices: int


def traffic(program: Program) -> int:
    """Return the bytes of HBM that the program reads and writes."""
    return sum(
        times * accessed(program, instruction, program.computations[name])
        for instruction, name, times in program.executed()
    )


def accessed(program: Program, instruction: Instruction, computation: Computation) -> int:
    """Return the bytes of HBM that one run of an instruction of `computation` reads and writes."""
    # An asynchronous operation is counted where it starts.
    if instruction.op in FREE or instruction.op.endswith(("-done", "-update")):
        return 0
    read = sum(
        _read(program, instruction, i, computation[name])
        for i, name in enumerate(instruction.operands)
    )
    return read + _written(program, instruction, computation)


def _read(program: Program, instruction: Instruction, i: int, operand: Instruction) -> int:
    """Return the bytes that an instruction reads of its i-th operand: all of it, or a slice."""
    op, size = instruction.op, _nbytes(operand.results)
    if not size or op in FREE:
        return 0
    if op == "fusion":
        fused = program.fused(instruction)
        return _read_by_fusion(fused, _parameter(fused, i), size)
    if op in ("copy-start", "slice-start"):
        return _copied(instruction).nbytes

    # Operand 0 is the array; the others are indices, too small to count.
    if op in ("slice", "dynamic-slice", "gather"):
        return instruction.results[0].nbytes if i == 0 else 0

    # Of an update in place only the new part is read; the array stays where it is.
    if op in UPDATES:
        return size if i == UPDATES[op] % len(instruction.operands) else 0
    return size


def _written(program: Program, instruction: Instruction, computation: Computation) -> int:
    """Return the bytes that an instruction writes; of an array updated in place, the new part."""
    op = instruction.op
    if op in UPDATES:
        return _nbytes(computation[instruction.operands[UPDATES[op]]].results)
    if op in ("copy-start", "slice-start"):
        return _nbytes([_copied(instruction)])

    # The result of another "-start" is a tuple that lists the operands before the new array.
    results = instruction.results[-1:] if op.endswith("-start") else instruction.results
    written = _nbytes(results)
    if op != "fusion" or not written:
        return written

    # A fusion that updates arrays in place writes their new parts instead of the whole arrays.
    fused = program.fused(instruction)
    updates = [each for each in fused.values() if each.op == "dynamic-update-slice"]
    if not updates:
        return written
    whole_arrays = sum(update.results[0].nbytes for update in updates)
    new_parts = sum(_nbytes(fused[update.operands[1]].results) for update in updates)
    return max(written - whole_arrays, 0) + min(new_parts, written)


def _copied(start: Instruction) -> Shape:
    """Return the new array of a copy-start or slice-start, whose tuple also has the source."""
    return start.results[0 if start.op == "copy-start" else 1]


def _parameter(fused: Computation, i: int) -> Instruction:
    """Return the i-th parameter of a fusion's computation."""
    return next(
        each for each in fused.values() if each.op == "parameter" and int(each.operand_text) == i
    )


def _read_by_fusion(fused: Computation, parameter: Instruction, size: int) -> int:
    """Return the bytes that a fusion reads of a parameter of `size` bytes: all, or its slices."""
    users = [each for each in fused.values() if parameter.name in each.operands]
    if not users or not all(_is_slice_of(user, parameter.name) for user in users):
        return size

    # An update in place overwrites its slice without reading it.
    slices = [user for user in users if user.op != "dynamic-update-slice"]
    return min(size, sum(each.results[0].nbytes for each in slices))


def _is_slice_of(instruction: Instruction, name: str) -> bool:
    """Return whether an instruction reads or overwrites only a slice of the array `name`."""
    if instruction.op in ("dynamic-update-slice", "dynamic-slice", "slice", "gather"):
        return instruction.operands[0] == name
    return False


def _nbytes(results: list[Shape]) -> int:
    return sum(shape.nbytes for shape in results if shape.in_hbm)


def reads(program: Program, arguments: tuple[str, ...]) -> float:
    """Return how often the program reads some of its arguments: 1 if it reads each byte once.

    An array that is updated in place still counts as the argument. Reads inside loops do not count.

    Args:
        program: a program with at least one such argument.
        arguments: what the arguments' names begin with, as JAX names them ("cache[").
    """
    entry = program.computations[program.entry]
    argument_bytes = read_bytes = 0
    aliases: set[str] = set()  # names of the instructions whose result is an argument's array
    for instruction in entry.values():
        is_parameter = instruction.op == "parameter"
        name = re.search(r'op_name="([^"]*)"', instruction.attributes) if is_parameter else None
        if name and name[1].startswith(arguments):
            aliases.add(instruction.name)
            argument_bytes += _nbytes(instruction.results)

        for i, operand in enumerate(instruction.operands):
            if operand in aliases:
                read_bytes += _read(program, instruction, i, entry[operand])
                if _is_alias(program, instruction, i):
                    aliases.add(instruction.name)
    return read_bytes / argument_bytes


def _is_alias(program: Program, instruction: Instruction, i: int) -> bool:
    """Return whether the result is the i-th operand's array, renamed or updated in place."""
    if instruction.op == "fusion":
        fused = program.fused(instruction)
        parameter = _parameter(fused, i).name
        updates = (each for each in fused.values() if each.op == "dynamic-update-slice")
        return any(update.operands[0] == parameter for update in updates)
    return instruction.op == "bitcast" or (instruction.op == "dynamic-update-slice" and i == 0)


def moves(program: Program, min_nbytes: int) -> list[Instruction]:
    """Return the copies and transposes, fused or not, that write `min_nbytes` or more to HBM."""
    return [
        instruction
        for instruction, _, _ in program.executed()
        if _is_move(program, instruction) and _nbytes(instruction.results) >= min_nbytes
    ]


def _is_move(program: Program, instruction: Instruction) -> bool:
    """Return whether an instruction only copies its operand, perhaps in another order or type."""
    if instruction.op != "fusion":
        return instruction.op in MOVES
    ops = {each.op for each in program.fused(instruction).values()}
    return bool(ops & MOVES) and ops <= PASSIVE


def collectives(program: Program) -> dict[str, Collective]:
    """Add up the communication of each kind, fused and asynchronously started ones included."""
    runs: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    sent: dict[str, float] = {}
    for transfer in transfers(program):
        kind, received = transfer.kind, transfer.runs * transfer.nbytes
        runs[kind] += transfer.runs
        nbytes[kind] += received
        sent[kind] = sent.get(kind, 0) + received * _sent_per_received(kind, transfer.devices)
    return {kind: Collective(runs[kind], nbytes[kind], sent[kind]) for kind in runs}


def transfers(program: Program) -> Iterator[Transfer]:
    """Yield every collective operation that the program runs."""
    for instruction, times in _executed_and_fused(program):
        kind = instruction.op.removesuffix("-start")
        if kind in COLLECTIVES:
            devices = group_size(instruction.attributes)
            yield Transfer(kind, times, _received(instruction), devices)


def _executed_and_fused(program: Program) -> Iterator[tuple[Instruction, int]]:
    """Yield every instruction that runs, also inside fusions and async calls, and how often."""
    for instruction, _, times in program.executed():
        yield instruction, times
        if instruction.op in ("fusion", "async-start"):
            for name in instruction.called:
                yield from ((inner, times) for inner in program.computations[name].values())


def _received(collective: Instruction) -> int:
    """Return the bytes of a collective's results on one device."""
    results = collective.results
    if collective.op.endswith("-start") and len(results) > 1:
        # The tuple lists the operands, then as many results, then handles without sizes. That of a
        # variadic all-reduce lists no operands.
        arrays = [shape for shape in results if shape.sizes]
        results = arrays[len(arrays) // 2 :] if len(arrays) > 1 else arrays
    return sum(shape.nbytes for shape in results)


def group_size(attributes: str) -> int:
    """Return how many devices take part in a collective, from any of XLA's three notations.

    A permutation lists pairs of devices instead of groups: 2.
    """
    # mesh['a'=2,'b'=4] {'b'}: groups along named axes of a mesh.
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    # [2,4]<=[8]: 2 groups of 4.
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(iota[2])
    # {{0,1,2},{3,4,5}}: the groups' devices; the first group is as large as every other.
    if lists := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(lists[1].split(","))
    return 2


def _sent_per_received(kind: str, n: int) -> float:
    """Return the bytes a device sends per byte of its result, on a ring of `n` devices."""
    # An all-reduce is a reduce-scatter followed by an all-gather.
    if kind == "all-reduce":
        return 2 * (n - 1) / n
    # The result of a reduce-scatter is an n-th of the array that is reduced.
    if kind == "reduce-scatter":
        return float(n - 1)
    return 1.0 if kind == "collective-permute" else (n - 1) / n
