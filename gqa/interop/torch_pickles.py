"""Walk the pickle of a state dict, as torch.save writes it, without executing anything.

A pickle is a program for a stack machine that may call any function of Python. Here its
instructions are read by `pickletools`, which only parses them, and the few that describe a dict of
tensors are obeyed. Names of functions stay names, and a call is obeyed only if it rebuilds a
tensor, a parameter or an OrderedDict. Every other instruction, name or call is refused by its name.
torch_files.py finds the bytes of the tensors.
"""

import math
import pickletools
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

from gqa.runtime.errors import CheckpointError

# Torch's types of storage: the dtype of safetensors, and the bytes of a number.
STORAGES = {
    "torch.DoubleStorage": ("F64", 8),
    "torch.FloatStorage": ("F32", 4),
    "torch.HalfStorage": ("F16", 2),
    "torch.BFloat16Storage": ("BF16", 2),
    "torch.LongStorage": ("I64", 8),
    "torch.IntStorage": ("I32", 4),
    "torch.ShortStorage": ("I16", 2),
    "torch.CharStorage": ("I8", 1),
    "torch.ByteStorage": ("U8", 1),
    "torch.BoolStorage": ("BOOL", 1),
}
ORDERED_DICT = "collections.OrderedDict"
TENSOR, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
NAMES = (*STORAGES, ORDERED_DICT, TENSOR, PARAMETER)
MAX_INSTRUCTIONS = 2**20  # a tensor takes about 30
MAX_AXES = 8
MAX_SIZE = 2**63 - 1  # of anything that is counted

# Instructions that put their argument on the stack, or a constant, or a tuple of the last values.
ARGUMENTS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Name(NamedTuple):
    """The name of a function or class; it is never looked up."""

    text: str


class Storage(NamedTuple):
    """A stretch of numbers, to which one or several tensors refer.

    Attributes:
        dtype: safetensors' name of it, such as "BF16".
        itemsize: bytes of a number.
        key: torch's name of the stretch in the file.
        numel: how many numbers it has.
    """

    dtype: str
    itemsize: int
    key: str
    numel: int


class View(NamedTuple):
    """A tensor: the place of its numbers in a storage.

    Attributes:
        offset, strides: in numbers.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """The numbers from the tensor's first one to its last one."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))


def views(value: Any) -> dict[str, View]:
    """Return the tensors of a state dict that has been read.

    Raises:
        CheckpointError: if the value is no dict of tensors by name, naming the entry that is none.
    """
    if not isinstance(value, dict):
        raise CheckpointError("does not hold a state dict; save model.state_dict()")
    for name, entry in value.items():
        if not isinstance(entry, View):
            raise CheckpointError(
                f"entry {name!r:.100} is not a tensor; save model.state_dict() alone"
            )
    return value


def read(stream: BinaryIO) -> Any:
    """Return the value of the next pickle of a stream: constants, lists, dicts, names and views.

    Raises:
        CheckpointError: naming the first instruction, name or call that describes no tensor.
    """
    machine = _Machine()
    try:
        with warnings.catch_warnings():
            # `pickletools` warns of odd texts in instructions that are refused by their names.
            warnings.simplefilter("ignore", DeprecationWarning)
            for count, (instruction, argument, _) in enumerate(pickletools.genops(stream)):
                if count >= MAX_INSTRUCTIONS:
                    raise CheckpointError(
                        f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions"
                    )
                if instruction.name == "STOP":
                    return machine.stack.pop()
                machine.obey(instruction.name, argument)
    except (ValueError, LookupError) as error:
        # A damaged pickle ends early, or takes more from the stack than there is.
        raise CheckpointError(f"its pickle is damaged ({error}); copy the file again") from error
    raise CheckpointError("its pickle is damaged; copy the file again")


class _Machine:
    """The stack machine of pickles, with the instructions that torch.save uses."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        # The stacks below each mark: a mark begins a new one.
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def obey(self, instruction: str, argument: Any) -> None:
        """Do what one instruction says."""
        if instruction in ARGUMENTS:
            self.stack.append(argument)
        elif instruction in CONSTANTS:
            self.stack.append(CONSTANTS[instruction]())
        elif instruction in TUPLES:
            self.stack.append(tuple(self._pop(TUPLES[instruction])))
        elif instruction in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif instruction == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif instruction in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif instruction == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif instruction == "GLOBAL":
            self.stack.append(_name(*argument.split(" ")))
        elif instruction == "STACK_GLOBAL":
            self.stack.append(_name(*self._pop(2)))
        elif instruction == "BINPERSID":
            self.stack.append(_storage(*self._pop(1)))
        elif instruction not in ("PROTO", "FRAME"):
            self._combine(instruction)

    def _combine(self, instruction: str) -> None:
        """Do what an instruction says that combines values of the stack."""
        if instruction == "REDUCE":
            self.stack.append(_call(*self._pop(2)))
        elif instruction == "TUPLE":
            values = self._pop_to_mark()
            self.stack.append(tuple(values))
        elif instruction == "APPEND":
            self._extend(self._pop(1))
        elif instruction == "APPENDS":
            self._extend(self._pop_to_mark())
        elif instruction == "SETITEM":
            self._set_items(self._pop(2))
        elif instruction == "SETITEMS":
            self._set_items(self._pop_to_mark())
        elif instruction == "BUILD":
            # A state dict carries the versions of its modules as an attribute, which nothing needs.
            self._pop(1)
            self._top(dict)
        else:
            raise CheckpointError(
                f"its pickle has the instruction {instruction}, which describes no tensor; save "
                "model.state_dict() alone"
            )

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise LookupError("its stack is empty")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.below.pop()
        return values

    def _top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"no {kind.__name__} where one is needed")
        return self.stack[-1]

    def _extend(self, values: list[Any]) -> None:
        self._top(list).extend(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._top(dict)
        for name, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(name, str):
                raise CheckpointError("its dict has a key that is no text; save a state dict")
            if name in target:
                raise CheckpointError(f"has two entries {name!r:.100}; save the model again")
            target[name] = value


def _name(*parts: Any) -> Name:
    """Return the name MODULE.NAME if it is one that a state dict needs."""
    text = ".".join(parts) if all(isinstance(part, str) for part in parts) else ""
    if text not in NAMES:
        raise CheckpointError(
            f"its pickle asks for {text!r:.100}, which is not needed for tensors and is not "
            f"executed; save model.state_dict() of a T5 as safetensors instead"
        )
    return Name(text)


def _storage(pid: Any) -> Storage:
    """Return the storage that a persistent id describes: a tuple that torch.save writes."""
    match pid:
        # The sixth is None, in files older than torch 1.6 alone.
        case ("storage", Name(kind), str(key), str(_), numel, *rest) if kind in STORAGES:
            if rest in ([], [None]):
                return Storage(*STORAGES[kind], key, _size(numel))
    raise CheckpointError(
        "its pickle refers to something else than a storage; save the model again"
    )


def _call(function: Any, arguments: Any) -> Any:
    """Return what a call of one of the known functions gives."""
    match function, arguments:
        case Name(text), () if text == ORDERED_DICT:
            return {}
        case Name(text), (View() as view, _, _) if text == PARAMETER:
            return view
        case Name(text), (Storage() as storage, offset, tuple(shape), tuple(strides), _, _, *rest):
            if text == TENSOR and len(rest) <= 1:
                return _view(storage, offset, shape, strides)
    called = function.text if isinstance(function, Name) else "something that has no name"
    raise CheckpointError(f"its pickle calls {called} in an unknown way; save the model again")


def _view(storage: Storage, offset: Any, shape: tuple, strides: tuple) -> View:
    """Return a tensor whose numbers all lie in its storage."""
    if len(shape) != len(strides) or len(shape) > MAX_AXES:
        raise CheckpointError(f"a tensor has {len(shape)} sizes and {len(strides)} strides")
    view = View(storage, _size(offset), tuple(map(_size, shape)), tuple(map(_size, strides)))

    # Strides of 0 could make any number of numbers out of one.
    if view.offset + view.span > storage.numel or math.prod(view.shape) > storage.numel:
        raise CheckpointError(
            f"a tensor of shape {view.shape} lies outside of its storage of {storage.numel} "
            "numbers; save the model again"
        )
    return view


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_SIZE:
        raise CheckpointError("a size, stride or offset is not a whole number that can be right")
    return value
