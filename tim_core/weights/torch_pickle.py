"""Runs the pickle of a torch file with inert stand-ins in place of all that it names; no tensor is made."""

from __future__ import annotations

import math
import pickle
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

MOST_COPIED = 2**28  # bytes that the calls of a pickle may copy
ITEMSIZES = {
    "Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
    "ComplexFloat": 8, "ComplexDouble": 16,
}
STORAGES = {f"torch.{name}Storage": size for name, size in ITEMSIZES.items()} | {"torch.storage.UntypedStorage": 1}
OPCODES = (  # those that torch's weights-only loader knows
    "GLOBAL NEWOBJ REDUCE BUILD APPEND APPENDS SETITEM SETITEMS MARK TUPLE TUPLE1 TUPLE2 TUPLE3 NONE NEWFALSE NEWTRUE EMPTY_TUPLE "
    "EMPTY_LIST EMPTY_DICT EMPTY_SET BININT BININT1 BININT2 BINFLOAT BINUNICODE SHORT_BINSTRING BINPERSID BINGET LONG_BINGET BINPUT "
    "LONG_BINPUT LONG1 PROTO STOP"
).split()
NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}


class NotTensors(Exception):
    """A pickle that names code or objects; the message says which."""


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class StorageStandIn:
    key: str
    size: int  # bytes
    itemsize: int


@dataclass(frozen=True, eq=False)
class TensorStandIn:
    storage: StorageStandIn
    size: int  # bytes
    problem: str


class PickleReader(pickle._Unpickler):  # in Python: the one in C allocates whatever index a memo opcode names
    """Runs a pickle with stand-ins. After `load`: `storages` by key, and all `tensors`."""

    dispatch: ClassVar[dict[int, Any]]
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file, old: bool):
        super().__init__(file, encoding="utf-8")
        self.old, self.copied = old, 0
        self.storages: dict[str, StorageStandIn] = {}
        self.tensors: list[TensorStandIn] = []

    def find_class(self, module: str, name: str) -> _Global:
        found = f"{module}.{name}".replace("__builtin__.", "builtins.")
        if found in STORAGES or found in CALLS or found.startswith("torch.") and found.removeprefix("torch.") in DTYPES:
            return _Global(found)
        raise NotTensors(f"GLOBAL {found}"[:200])

    def persistent_load(self, pid: Any) -> StorageStandIn:
        if not isinstance(pid, tuple) or len(pid) != 5 + self.old or (self.old and pid[5] is not None):
            raise ValueError("unknown kind of storage")
        kind, type_, key, _, count = pid[:5]
        if kind != "storage" or not isinstance(type_, _Global) or type_.name not in STORAGES or not isinstance(key, str):
            raise ValueError("unknown kind of storage")
        itemsize = STORAGES[type_.name]
        storage = StorageStandIn(key, _whole(count) * itemsize, itemsize)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError("a storage of two sizes")
        return storage

    def count_copy(self, value: Any) -> Any:
        """`value`, after counting the bytes of a copy of it."""
        self.copied += len(value) if isinstance(value, (str, bytes)) else 64 * len(value)
        if self.copied > MOST_COPIED:
            raise ValueError("its pickle copies without end")
        return value

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global) or function.name not in CALLS or not isinstance(arguments, tuple):
            raise ValueError("calls something that is not a function")
        return CALLS[function.name](self, *arguments)

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], arguments)

    def load_build(self) -> None:
        self.stack.pop()  # attributes: of no concern to dicts
        if isinstance(self.stack[-1], TensorStandIn):
            raise ValueError("sets the state of a tensor")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2]):
            self.stack[-1][_key(key)] = value

    def refuse(self) -> None:
        raise NotTensors("a pickle that is none of torch.save's")


PickleReader.dispatch = {code: pickle._Unpickler.dispatch[code] if name in OPCODES else PickleReader.refuse for code, name in NAMES.items()}
PickleReader.dispatch |= {ord("R"): PickleReader.load_reduce, 0x81: PickleReader.load_reduce, ord("b"): PickleReader.load_build}
PickleReader.dispatch |= {ord("s"): PickleReader.load_setitem, ord("u"): PickleReader.load_setitems}


def _key(key: Any) -> Any:
    """A key of a dict: not a nested tuple, whose hash can take for ever."""
    flat = key if isinstance(key, tuple) and len(key) < 100 else (key,)
    if not all(part is None or isinstance(part, (str, int, float)) for part in flat):
        raise ValueError(f"a dict has a key of type {type(key).__name__}")
    return key


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise ValueError("a size that is not a whole number")
    return value


def _dict(reader: PickleReader, items: Any = ()) -> dict:
    reader.count_copy(items)
    return {_key(key): value for key, value in (items.items() if isinstance(items, Mapping) else items)}


def _set(reader: PickleReader, items: Any = ()) -> None:
    for item in reader.count_copy(items):
        _key(item)


def _encode(reader: PickleReader, text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):  # what pickle writes for bytes; others can multiply
        raise ValueError("an unusual encoding of bytes")
    return reader.count_copy(text).encode("latin1")


def _bytearray(reader: PickleReader, data: Any = b"", *encoding: Any) -> bytes:
    if not isinstance(data, bytes) or encoding:
        raise ValueError("a bytearray that is not made of bytes")
    return reader.count_copy(data)


def _size(reader: PickleReader, items: Any = ()) -> tuple:
    return reader.count_copy(items)


def _ignored(reader: PickleReader, *arguments: Any) -> None:
    if any(isinstance(value, (list, dict, bytes)) for value in arguments):
        raise ValueError("an unusual call")


def _tensor(reader: PickleReader, storage: Any, offset: Any, size: Any, stride: Any, *others: Any) -> TensorStandIn:
    return _make_tensor(reader, storage, offset, size, stride, storage.itemsize)


def _tensor_of_dtype(reader: PickleReader, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: _Global,
                     *others: Any) -> TensorStandIn:
    return _make_tensor(reader, storage, offset, size, stride, DTYPES[dtype.name.removeprefix("torch.")])


def _make_tensor(reader: PickleReader, storage: StorageStandIn, offset: Any, size: Any, stride: Any, itemsize: int) -> TensorStandIn:
    if len(size) != len(stride) or len(size) > 64 or not isinstance(storage, StorageStandIn):
        raise ValueError("a tensor without shape")
    count, last = math.prod(map(_whole, size)), _whole(offset) + sum((n - 1) * _whole(step) for n, step in zip(size, stride))
    problem = ""
    if count and (last + 1) * itemsize > storage.size:
        problem = f"its shape {list(size)} needs more than the {storage.size} bytes that are there"
    elif count * itemsize > storage.size:
        problem = f"its shape {list(size)} repeats the {storage.size} bytes that are there"
    made = TensorStandIn(storage, count * itemsize, problem)
    reader.tensors.append(made)
    return made


def _parameter(reader: PickleReader, data: Any, *others: Any) -> TensorStandIn:
    if not isinstance(data, TensorStandIn):
        raise ValueError("a parameter that is not a tensor")
    return data


DTYPES = {
    "float64": 8, "double": 8, "float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2, "int64": 8, "long": 8, "int32": 4,
    "int": 4, "int16": 2, "short": 2, "int8": 1, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "bool": 1, "complex64": 8,
    "complex128": 16, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
}
CALLS: dict[str, Callable] = {  # what torch's loader may call for a state dict; it knows more
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "builtins.set": _set,
    "builtins.complex": _ignored,
    "builtins.bytearray": _bytearray,
    "_codecs.encode": _encode,
    "torch.Size": _size,
    "torch.device": _ignored,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
}
