"""Parse XLA's text of a compiled program into computations and instructions.

The text is that of `jax.stages.Compiled.as_text()`: one device's part of the program, after fusion,
in the order in which it runs. This file says what the program is; `gqa/aot/costs.py` adds up the
memory and the network that the program uses, and `gqa/aot/chips.py` describes the chips.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "token": 0, "opaque": 0} | {
    f"{sign}{bits}": bits for sign in "su" for bits in (2, 4, 8, 16, 32, 64)
}

# An array's type, such as bf16[24,16,128]{2,1,0:T(8,128)(2,1)S(3)}: type, sizes, layout.
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
# The first line of a computation, and the beginning of an instruction's line.
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = ")
# Attributes after an instruction's operands: the computations it runs, the iterations of a loop.
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Shape(NamedTuple):
    """One array of the program: its type, its sizes, and its layout in memory as XLA writes it."""

    dtype: str
    sizes: tuple[int, ...]
    layout: str

    @property
    def in_hbm(self) -> bool:
        """Whether the array lies in main memory; "S(1)" in a layout means memory on the chip."""
        return "S(" not in self.layout

    @property
    def nbytes(self) -> int:
        """Bytes in memory, with the padding that fills up the tiles."""
        # A layout lists the axes from minor to major; without a layout the order is the sizes'.
        order, _, tiling = self.layout.partition(":")
        minor_to_major = [int(axis) for axis in order.split(",") if axis]
        if minor_to_major:
            sizes = [self.sizes[axis] for axis in reversed(minor_to_major)]
        else:
            sizes = list(self.sizes)

        # Tiles cover the minor axes: T(8,128) pads the last axis to 128s and the one before to 8s.
        if tile := re.match(r"T\(([\d,]+)\)", tiling):
            tiles = [int(size) for size in tile[1].split(",")]
            for i, size in enumerate(reversed(tiles), 1):
                if i <= len(sizes):
                    sizes[-i] = -(-sizes[-i] // size) * size
        return math.prod(sizes) * BITS.get(self.dtype, 8) // 8


class Instruction(NamedTuple):
    """One line of the text.

    Args:
        name: its name, unique in its computation.
        op: the operation, such as "fusion".
        results: the arrays that it computes.
        operands: names of the instructions whose results it reads.
        operand_text: the text between its brackets; of a parameter or a constant, the number.
        attributes: the text after the brackets.
    """

    name: str
    op: str
    results: list[Shape]
    operands: list[str]
    operand_text: str
    attributes: str

    @property
    def called(self) -> list[str]:
        """Names of the computations that the instruction runs."""
        names = _CALLED.findall(self.attributes)
        if branches := re.search(r"branch_computations=\{([^}]*)\}", self.attributes):
            names += [name.strip().lstrip("%") for name in branches[1].split(",")]
        return names


# The instructions of one computation by name, in the order in which they run.
Computation = dict[str, Instruction]


class Program(NamedTuple):
    """All computations by name; `entry` names the computation that runs first."""

    computations: dict[str, Computation]
    entry: str

    def executed(self) -> Iterator[tuple[Instruction, str, int]]:
        """Yield each instruction outside fusions, its computation's name, and how often it runs."""
        yield from self._executed(self.entry, 1)

    def fused(self, fusion: Instruction) -> Computation:
        """Return the computation that a fusion runs."""
        return self.computations[fusion.called[0]]

    def _executed(self, name: str, times: int) -> Iterator[tuple[Instruction, str, int]]:
        for instruction in self.computations[name].values():
            yield instruction, name, times
            # A fusion runs as one operation; these run the instructions of other computations.
            if instruction.op in ("while", "conditional", "call"):
                for called in instruction.called:
                    yield from self._executed(called, times * self._trips(instruction))

    def _trips(self, loop: Instruction) -> int:
        """Return the iterations of a loop: as XLA states them, else the limit of its counter."""
        if stated := _TRIPS.search(loop.attributes):
            return int(stated[1])
        condition = re.search(r"condition=%?([\w.-]+)", loop.attributes)
        if loop.op != "while" or condition is None:
            return 1

        # JAX's loops count from 0; the condition compares the counter with a constant.
        compared = self.computations[condition[1]].values()
        constants = [each.operand_text for each in compared if each.op == "constant"]
        return max((int(number) for number in constants if number.isdigit()), default=1)


def parse(text: str) -> Program:
    """Parse the text of an HLO module.

    Raises:
        ValueError: if the text has no ENTRY computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        # Instructions are indented; the first line of a computation is not.
        if not line.startswith(" "):
            if head := _HEAD.match(line):
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif current is not None and (start := _LINE.match(line)):
            current[start[1]] = _instruction(start[1], line[start.end() :])
    if not entry:
        raise ValueError("the text has no ENTRY computation, so it is not a compiled HLO module")
    return Program(computations, entry)


def _instruction(name: str, line: str) -> Instruction:
    """Parse `line`, which is TYPE OP(OPERANDS)ATTRIBUTES; the type of several results is (...)."""
    type_end = _closing(line, 0) + 1 if line.startswith("(") else line.index(" ")
    begin = line.index("(", type_end)
    end = _closing(line, begin)
    operand_text = line[begin + 1 : end]
    return Instruction(
        name,
        op=line[type_end:begin].strip(),
        results=shapes(line[:type_end]),
        operands=re.findall(r"%([\w.-]+)", operand_text),
        operand_text=operand_text,
        attributes=line[end:],
    )


def _closing(line: str, begin: int) -> int:
    """Return the index of the bracket that closes the one at `begin`."""
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
