"""A pickle is a program. This runs what of it makes plain values, in time and memory linear in its length.

Python's own unpickler can be held to what it may call, and still hangs on 59 bytes (a tuple that holds a
tuple twice, and so on, is hashed leaf by leaf) or overflows the stack. So here keys are numbers, short texts
and tensors, and a value is refused that written out as a tree would be many times longer than its pickle.
"""

from __future__ import annotations

import pickle
import struct
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import torch

__all__ = ["PLAIN", "Call", "Inert", "Unpickler"]

DEEPEST = 100  # levels of a value
LONGEST = 4096  # characters of a key
REPEATED = 10  # how many times longer than its pickle a value may be
MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
KEYS = (str, int, float, bool, type(None), torch.Tensor, torch.nn.Parameter)

# What is written for plain values in protocols 2 to 5.
OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
    *(pickle.BINBYTES, pickle.SHORT_BINBYTES),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_SET, pickle.ADDITEMS),
    *(pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD, pickle.BINPERSID),
)


class Inert:
    """Stands for an object of a pickle: holds its attributes, runs nothing."""


class Call:
    """A function that a pickle may call: it takes time linear in what was spent on its arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


class Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Reads one pickle: plain values, and what `admitted` gives for a pair (module, name).

    That is a `Call`, a subclass of `Inert`, or a value that the pickle may hold. Raises UnpicklingError for
    all else, and what a broken pickle leads to besides (IndexError, EOFError, TypeError, ...).
    """

    def __init__(self, file: BinaryIO, admitted: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(file)
        self.file, self.admitted = file, admitted

    def load(self) -> Any:
        start = self.file.tell()
        try:
            value = super().load()
        except KeyError as error:
            raise pickle.UnpicklingError(f"it holds operation {error}, which no such file needs") from None
        _measure(value, 1000 + REPEATED * (self.file.tell() - start))
        return value

    def find_class(self, module: str, name: str) -> Any:
        found = self.admitted.get(("builtins" if module == "__builtin__" else module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no such file needs")
        return found

    def load_reduce(self) -> None:
        arguments, call = self.stack.pop(), self.stack[-1]
        if type(call) is not Call or type(arguments) is not tuple:
            raise pickle.UnpicklingError("it calls what is not a function")
        self.stack[-1] = call.function(*arguments)

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack[-1]
        if type(kind) is not type or not issubclass(kind, Inert) or type(arguments) is not tuple or arguments:
            raise pickle.UnpicklingError("it makes an object of what is not a class")
        self.stack[-1] = kind()

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert) and type(state) is dict:
            target.__dict__ = state  # not copied: one state may be given to many
        elif type(target) is OrderedDict and type(state) is dict and state.keys() == {"_metadata"}:
            target.__dict__.update(state)  # the versions of modules, beside their parameters
        elif not (type(target) is _Dtype and target.agrees(state)):
            raise pickle.UnpicklingError(f"it sets the state of a {type(target).__name__}")

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise pickle.UnpicklingError(f"it appends to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(values)

    def load_additems(self) -> None:
        values = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise pickle.UnpicklingError(f"it adds to a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(map(_key, values))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def load_setitems(self) -> None:
        self._update(self.pop_mark())

    def _update(self, values: list[Any]) -> None:
        if type(self.stack[-1]) not in MAPPINGS:
            raise pickle.UnpicklingError(f"it sets items of a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(zip(map(_key, values[::2]), values[1::2], strict=True))

    dispatch = {opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in OPCODES}  # type: ignore[attr-defined]  # noqa: RUF012
    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.ADDITEMS[0]: load_additems,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def _key(value: Any) -> Any:
    """The value, if to hash it and to compare it take no time."""
    if type(value) not in KEYS:
        raise pickle.UnpicklingError(f"it has a {type(value).__name__} as a key")
    if (type(value) is str and len(value) > LONGEST) or (type(value) is int and value.bit_length() > 64):
        raise pickle.UnpicklingError("it has a key of excessive length")
    return value


def _measure(value: Any, longest: int) -> None:
    """Refuse a value too deep, that holds itself, or as a tree has more parts and letters than `longest`."""
    known: dict[int, tuple[int, int]] = {}

    def measure(value: Any, depth: int) -> tuple[int, int]:
        """Its size and height. Each object is looked into once."""
        if isinstance(value, str | bytes):
            return 1 + len(value), 0
        if (parts := _parts(value)) is None:
            return 1, 0
        if id(value) not in known:
            size, height = 1, 1
            for part in parts if depth < DEEPEST else ():
                its_size, its_height = measure(part, depth + 1)
                size, height = size + its_size, max(height, its_height + 1)
                if size > longest:
                    raise pickle.UnpicklingError("it repeats itself beyond measure")
            known[id(value)] = size, height
        size, height = known[id(value)]
        if depth + height > DEEPEST:
            raise pickle.UnpicklingError(f"it is nested more than {DEEPEST} levels deep, or holds itself")
        return size, height

    if measure(value, 0)[0] > longest:
        raise pickle.UnpicklingError("it repeats itself beyond measure")


def _parts(value: Any) -> Any:
    if isinstance(value, MAPPINGS):
        return [*value.values(), *getattr(value, "__dict__", {}).values()]
    if isinstance(value, Inert):
        return vars(value).values()
    return value if type(value) in (list, tuple, set) else None


# Calls and names that plain values of Python and numpy need. Those that copy an argument empty it, lest it be
# copied time and again.


def _ordered() -> OrderedDict:
    return OrderedDict()


def _default(factory: Any = None) -> defaultdict:
    if factory not in (None, dict, list, int, float):
        raise pickle.UnpicklingError("it makes a defaultdict of an odd kind")
    return defaultdict(factory)


def _counter(counts: Any) -> Counter:
    if type(counts) is not dict:
        raise pickle.UnpicklingError("it counts what is not counted")
    made = Counter(counts)
    counts.clear()
    return made


def _set(values: Any) -> set:
    if type(values) is not list:
        raise pickle.UnpicklingError("it makes a set of what is not a list")
    made = set(map(_key, values))
    values.clear()
    return made


def _bytes(text: Any, encoding: Any) -> bytes:
    """Bytes as protocol 2 has them. Other encodings could double them, time and again."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}, which no such file needs")
    if type(text) is not str or len(text) > LONGEST:
        raise pickle.UnpicklingError("it has bytes that are not those of a number")
    return text.encode(encoding)


class _Dtype:
    """A numpy dtype of numbers: its letter in the struct module."""

    LETTERS: Mapping[str, str] = {
        **{"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"},
        **{"f2": "e", "f4": "f", "f8": "d"},
    }

    def __init__(self, name: Any, *flags: Any) -> None:
        if type(name) is not str or name not in self.LETTERS:
            raise pickle.UnpicklingError("it has numpy's objects, which no such file needs")
        self.letter = self.LETTERS[name]

    def agrees(self, state: Any) -> bool:
        """Whether the state says no more than that the numbers are little-endian."""
        flat = type(state) is tuple and {type(part) for part in state} <= {int, str, type(None)}
        return flat and state[1:] in [(order, None, None, None, -1, -1, 0) for order in "<|"]


def _number(dtype: Any, data: Any) -> Any:
    """A numpy number, as Python's."""
    if type(dtype) is not _Dtype or type(data) is not bytes:
        raise pickle.UnpicklingError("it has a number that is none")
    return struct.unpack("<" + dtype.letter, data)[0]


PLAIN: Mapping[tuple[str, str], Any] = {
    **{("builtins", kind.__name__): kind for kind in (dict, list, int, float)},
    ("builtins", "set"): Call(_set),
    ("collections", "OrderedDict"): Call(_ordered),
    ("collections", "defaultdict"): Call(_default),
    ("collections", "Counter"): Call(_counter),
    ("_codecs", "encode"): Call(_bytes),
    ("numpy", "dtype"): Call(_Dtype),
    ("numpy.core.multiarray", "scalar"): Call(_number),
    ("numpy._core.multiarray", "scalar"): Call(_number),
}
