"""Walk the opcodes of a pickle and count what it would build, before anything is built.

Values may share parts: 60 nested tuples, each with the one before it twice, are 60 objects, but hashing, copying or
printing them visits 2^60. So each value has a weight, which counts every part as often as it is visited, and a depth.
Both are final when a value becomes part of another, because the walk refuses later changes: only cycles need them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection
from typing import NoReturn

from starling.core.errors import CheckpointError
from starling.core.words import shown

MAX_OPCODES = 4_000_000
"""Maximum number of opcodes; the largest official checkpoint has 200,000, and 100,000 class names take 400,000."""
MAX_CONTAINERS = 1_000_000
MAX_DEPTH = 400
"""Maximum depth of values; a module takes five levels, so that 80 nested modules are possible."""
MAX_WEIGHT = 8_000_000
"""Maximum weight of one value, and of all keys together. A number weighs 1, a string 1 more per 16 bytes."""
MAX_KEY_WEIGHT = 64
MAX_KEY_DEPTH = 4
_MOST_LONG_BYTES = 32
_MOST_NAME_BYTES = 256
_TEXT_UNIT = 16
_UINT32 = struct.Struct("<I").unpack_from
_STOP, _BINGET, _BINPUT, _LONG_BINPUT = b".hqr"
_SCALARS = [-1] * 256
"""Opcode -> number of operand bytes, for opcodes that push one plain value; -1 for all others."""
for _code, _size in zip(b"N\x88\x89KMJG", (0, 0, 0, 1, 2, 4, 8), strict=True):
    _SCALARS[_code] = _size


class _Node:
    """A list, tuple, dict, set or object, with the properties that the walk needs."""

    __slots__ = ("depth", "sealed", "weight")

    def __init__(self) -> None:
        self.depth = 1
        self.weight = 1
        self.sealed = False
        """Whether the value is part of another value."""


_Value = _Node | int
"""An entry of the stack: a node, or the weight of a number, a string or a global."""


class PickleWalk:
    """One pickle in `content`, from byte `start` on, which may name only globals in `known`."""

    def __init__(self, content: bytes, start: int, known: Collection[tuple[str, str]]) -> None:
        self._content, self._start, self._at, self._known = content, start, start, known
        self._stack: list[_Value] = []
        self._marks: list[int] = []
        self._memo: dict[int, _Value] = {}
        self._containers = self._keys_weight = 0
        self._steps: list[Callable[[], None] | None] = [None] * 256
        for code, step in self._table().items():
            self._steps[code[0]] = step

    def end(self) -> int:
        """Walk to the STOP opcode and return the position behind it.

        Raises CheckpointError for an opcode, a global, a number or a size that a checkpoint does not need, and
        IndexError, KeyError or ValueError for a damaged pickle.
        """
        content, steps, stack, memo = self._content, self._steps, self._stack, self._memo
        at = self._at
        for _ in range(MAX_OPCODES):
            code = content[at]
            at += 1
            size = _SCALARS[code]
            if size >= 0:  # the four kinds of nine in ten opcodes are inlined here, for speed
                at += size
                stack.append(1)
            elif code == _BINGET:
                stack.append(memo[content[at]])
                at += 1
            elif code == _BINPUT:
                self._remember(content[at])
                at += 1
            elif code == _LONG_BINPUT:
                self._remember(_UINT32(content, at)[0])
                at += 4
            elif code == _STOP:
                return at
            else:
                step = steps[code]
                if step is None:
                    _refuse_opcode(code)
                self._at = at
                step()
                at = self._at
        raise CheckpointError(f"the pickle has more than {MAX_OPCODES} opcodes")

    def _table(self) -> dict[bytes, Callable[[], None]]:
        push = self._push_container
        return {
            b"\x80": lambda: self._take_bytes(1),  # PROTO
            b"(": lambda: self._marks.append(len(self._stack)),
            b"\x8a": self._long,
            b"X": self._text,
            b"c": self._global,
            b")": lambda: push([]),
            b"]": lambda: push([]),
            b"}": lambda: push([]),
            b"\x85": lambda: push(self._pop_many(1)),
            b"\x86": lambda: push(self._pop_many(2)),
            b"\x87": lambda: push(self._pop_many(3)),
            b"t": lambda: push(self._pop_to_mark()),
            b"a": lambda: self._extend(self._pop_many(1)),
            b"e": lambda: self._extend(self._pop_to_mark()),
            b"s": lambda: self._set(self._pop_many(2)),
            b"u": lambda: self._set(self._pop_to_mark()),
            b"j": lambda: self._stack.append(self._memo[self._number(4)]),  # LONG_BINGET
            b"R": self._call,
            b"\x81": self._call,  # NEWOBJ
            b"b": lambda: self._extend(self._pop_many(1)),  # BUILD
            b"Q": self._storage,
        }

    def _number(self, size: int) -> int:
        at, self._at = self._at, self._at + size
        return int.from_bytes(self._content[at : at + size], "little")

    def _take_bytes(self, size: int) -> None:
        self._at += size
        if self._at > len(self._content):
            raise ValueError("the pickle is cut short")

    def _long(self) -> None:
        size = self._number(1)
        if size > _MOST_LONG_BYTES:
            raise CheckpointError(f"the pickle holds a whole number of {size} bytes")
        self._take_bytes(size)
        self._stack.append(1)

    def _text(self) -> None:
        size = self._number(4)
        self._take_bytes(size)
        self._stack.append(1 + size // _TEXT_UNIT)

    def _global(self) -> None:
        names = []
        for _ in range(2):
            line = self._content.find(b"\n", self._at, self._at + _MOST_NAME_BYTES)
            if line < 0:
                raise ValueError("a global without a name")
            names.append(self._content[self._at : line].decode())
            self._at = line + 1
        if (names[0], names[1]) not in self._known:
            raise refused_global(*names)
        self._stack.append(1)

    def _remember(self, index: int) -> None:
        # Picklers count from 0 or from 1. The unpickler reserves a table as long as the largest index.
        if index > len(self._memo) + 1:
            raise CheckpointError("the pickle's memo is larger than what it holds")
        self._memo[index] = self._stack[-1]

    def _pop_many(self, count: int) -> list[_Value]:
        values = self._stack[-count:]
        if len(values) < count:
            raise ValueError("the pickle pops more values than it has pushed")
        del self._stack[-count:]
        return values

    def _pop_to_mark(self) -> list[_Value]:
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def _push_container(self, values: list[_Value]) -> None:
        self._containers += 1
        if self._containers > MAX_CONTAINERS:
            raise CheckpointError(f"the pickle builds more than {MAX_CONTAINERS} lists, dicts and objects")
        node = _Node()
        self._stack.append(node)
        if values:
            self._extend(values)

    def _extend(self, values: list[_Value]) -> None:
        """Add `values` to the container on top of the stack."""
        node = self._stack[-1]
        if not isinstance(node, _Node):
            raise ValueError("the pickle adds values to an object that is no container")
        for value in values:
            if type(value) is int:
                node.weight += value
                continue
            assert isinstance(value, _Node)
            value.sealed = True
            node.weight += value.weight
            if value.depth >= node.depth:
                node.depth = value.depth + 1
        if node.sealed:
            raise CheckpointError("the pickle changes a value that is already part of another one")
        if node.depth > MAX_DEPTH:
            raise CheckpointError(f"the pickle nests values deeper than {MAX_DEPTH}")
        if node.weight > MAX_WEIGHT:
            raise CheckpointError("the pickle holds a value that unfolds beyond reason")

    def _set(self, values: list[_Value]) -> None:
        """Add alternating keys and values to the dict on top of the stack."""
        for key in values[::2]:
            self._weigh_key(key)
        self._extend(values)

    def _weigh_key(self, key: _Value) -> None:
        if isinstance(key, _Node) and (key.weight > MAX_KEY_WEIGHT or key.depth > MAX_KEY_DEPTH):
            raise CheckpointError("the pickle has a key that is neither a text nor a number")

    def _call(self) -> None:
        """Pop a callable and its arguments; a set or an OrderedDict would hash the arguments."""
        _, arguments = self._pop_many(2)
        self._keys_weight += arguments.weight if isinstance(arguments, _Node) else arguments
        if self._keys_weight > MAX_WEIGHT:
            raise CheckpointError("the pickle hashes more than a checkpoint needs")
        self._push_container([arguments])

    def _storage(self) -> None:
        self._pop_many(1)
        self._stack.append(1)


def refused_global(module: str, name: str) -> CheckpointError:
    """Return the error for a global outside the table."""
    words = shown(f"{module}.{name}")
    return CheckpointError(
        f"the pickle names {words}, which a YOLOv5 checkpoint does not need; nothing was loaded"
    )


def _refuse_opcode(code: int) -> NoReturn:
    import pickletools

    names = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
    name = names.get(code, f"the unknown opcode {code}")
    raise CheckpointError(f"the pickle uses {name}, which a YOLOv5 checkpoint does not need")
