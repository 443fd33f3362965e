"""Checks a torch file before torch reads it: what it would call, and whether every tensor's bytes are there.

The pickle is run with inert stand-ins in place of all that it names; no tensor is made. So sizes are known before anything is expanded,
and a file of a few kilobytes cannot ask for gigabytes.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch

from ..errors import TimError

CHUNK = 2**22  # bytes of a record read at a time
MOST_PICKLE = 2**21  # bytes; 18,000 tensors have as many
MOST_DIRECTORY = 2**23  # bytes of a zip archive's directory; 80,000 tensors have as many
MOST_COPIED = 2**28  # bytes that the calls of a pickle may copy
MOST_NAMES, MOST_NAME_CHARACTERS, MOST_DEPTH = 300_000, 10**8, 64
MOST_SHARED = 16  # times that the tensors of a file may be larger than their storages, which several may share
MAGIC = 0x1950A86A20F9469CFC6C  # of torch's old format

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


class _NotTensors(Exception):
    """A pickle that names code or objects; the message says which."""


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    size: int  # bytes
    itemsize: int


@dataclass(frozen=True, eq=False)
class _Tensor:
    storage: _Storage
    size: int  # bytes
    problem: str


def check_torch_file(path: Path, checksums: bool = True) -> None:
    """TimError naming the file, and the tensor where it can, unless all is there that torch will read.

    checksums: whether to compare every record of a zip archive with its CRC-32, which takes about half a second a gigabyte; torch does
    not. Archives saved without checksums, and files in torch's old format, have none to compare.
    """
    try:
        with open(path, "rb") as file:
            if file.read(2) == b"PK":
                _check_zip(file, path, checksums)
            else:
                file.seek(0)
                _check_old(file, path)
    except TimError:
        raise
    except _NotTensors as error:
        raise TimError(f"{path}: contains code or objects ({error}), not tensors alone; it was not opened") from None
    except MemoryError:
        raise
    except Exception as error:  # zipfile and pickle raise many kinds on damaged files
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise TimError(f"{path}: damaged or truncated torch file ({reason}); download or copy it again") from None


def leaves(value: Mapping, kind: type | tuple[type, ...], name: str) -> Iterator[tuple[str, Any]]:
    """The objects of a kind in nested dicts, with their dotted keys. TimError if there are too many or they are nested too deeply."""
    names = characters = 0
    stack: list[tuple[str, Iterator]] = [("", iter(value.items()))]
    while stack:
        prefix, items = stack[-1]
        for key, item in items:
            if not isinstance(item, kind) and not isinstance(item, Mapping) or not isinstance(key, (str, int, float, tuple)):
                continue
            key = f"{prefix}{key}"
            names, characters = names + 1, characters + len(key)
            if names > MOST_NAMES or characters > MOST_NAME_CHARACTERS or len(stack) > MOST_DEPTH:
                raise TimError(f"{name}: too many or too deeply nested keys; this is not a state dict")
            if not isinstance(item, Mapping):
                yield key, item
            else:
                stack.append((f"{key}.", iter(item.items())))
                break
        else:
            stack.pop()


def _check_zip(file: BinaryIO, path: Path, checksums: bool) -> None:
    file.seek(max(0, path.stat().st_size - 2**16 - 100))
    tail = file.read()
    for signature, place, width in ((b"PK\5\6", 12, 4), (b"PK\6\6", 40, 8)):  # the end of a directory, and that of a large one
        start = tail.rfind(signature) + place
        size = int.from_bytes(tail[start : start + width], "little")
        if start >= place and MOST_DIRECTORY < size < path.stat().st_size:
            raise ValueError(f"its directory has {size} bytes")
    with zipfile.ZipFile(file) as archive:
        records = {record.filename.lower(): record for record in archive.infolist()}  # torch takes names in either case for the same
        if len(records) < len(archive.infolist()):
            raise ValueError("two records of one name")
        for name, record in records.items():
            if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
                raise ValueError(f"record {name} is compressed or encrypted")
        pickles = [name for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"has {len(pickles)} records named data.pkl")
        top = pickles[0].removesuffix("data.pkl")
        summed = any(record.CRC for record in records.values())  # all are 0 after torch.serialization.set_crc32_options(False)
        if records[pickles[0]].file_size > MOST_PICKLE:
            raise ValueError(f"data.pkl has {records[pickles[0]].file_size} bytes")
        order = records.get(f"{top}byteorder")
        if order is not None and (order.file_size > 16 or _read(file, order, summed).decode() != sys.byteorder):
            raise ValueError(f"its byte order is not {sys.byteorder}-endian")
        reader = _Reader(io.BytesIO(_read(file, records[pickles[0]], summed)), old=False)
        end = archive.start_dir
    file.seek(0)
    seen: Any = torch._C.PyTorchFileReader(file)  # which may find another directory in the file than zipfile does
    for name, record in records.items():
        if name.startswith(top) and seen.get_record_offset(name.removeprefix(top)) != _start(file, record):
            raise ValueError(f"record {record.filename} is in two places")
    names = _check_tensors(reader.load(), reader.tensors, path)
    places = []
    for key, storage in reader.storages.items():
        record, owner = records.get(f"{top}data/{key}".lower()), names.get(key, "a tensor")
        found = -1 if record is None else record.file_size
        if record is None or not found == record.compress_size == storage.size:
            raise TimError(f"{path}: damaged torch file: {owner} has {max(found, 0)} of {storage.size} bytes; download or copy it again")
        start = _start(file, record)
        file.seek(start + found)
        after = (b"PK\7\x08",) if record.flag_bits & 8 else (b"PK\3\4", b"PK\1\2")  # its descriptor, or what comes next
        if file.read(4) not in after:
            raise TimError(f"{path}: damaged torch file: {owner} does not end where its record ends; download or copy it again")
        places.append((start, start + found, owner))
    places.sort()
    for (_, stop, owner), (start, *_) in zip(places, [*places[1:], (end,)]):
        if stop > start:
            raise TimError(f"{path}: damaged torch file: {owner} and another record share bytes; download or copy it again")
    for record in records.values() if checksums and summed else ():
        if _checksum(file, record) != record.CRC:
            owner = names.get(record.filename.rpartition("/")[2], "no tensor") if "/data/" in record.filename else "no tensor"
            problem = f"record {record.filename} ({owner}) does not match its checksum"
            raise TimError(f"{path}: damaged torch file: {problem}; download or copy it again")


def _start(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored record begin."""
    file.seek(record.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\3\4":
        raise ValueError(f"record {record.filename} not found")
    return record.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _read(file: BinaryIO, record: zipfile.ZipInfo, summed: bool) -> bytes:
    """The bytes of a stored record that is known to be small. summed: whether it has a checksum."""
    file.seek(_start(file, record))
    data = file.read(record.file_size)
    if summed and zlib.crc32(data) != record.CRC:
        raise ValueError(f"record {record.filename} does not match its checksum")
    return data


def _checksum(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """The CRC-32 of a stored record's bytes."""
    file.seek(_start(file, record))
    left, checksum = record.file_size, 0
    while left and (data := file.read(min(left, CHUNK))):
        left, checksum = left - len(data), zlib.crc32(data, checksum)
    return checksum


def _check_old(file: BinaryIO, path: Path) -> None:
    """Torch's format before version 1.6: five pickles, then each storage after its number of elements."""
    limited = _Limited(file, MOST_PICKLE)
    first = _Reader(limited, old=True).load()
    if first != MAGIC:
        raise ValueError("not a torch file")
    for _ in range(2):  # the protocol, and the byte order
        _Reader(limited, old=True).load()
    reader = _Reader(limited, old=True)
    names = _check_tensors(reader.load(), reader.tensors, path)
    keys = _Reader(limited, old=True).load()
    if not isinstance(keys, list) or len(keys) != len(reader.storages) or not all(isinstance(key, str) for key in keys):
        raise ValueError("the storages are not those of the tensors")
    if set(keys) != reader.storages.keys():
        raise ValueError("the storages are not those of the tensors")
    end = path.stat().st_size
    for storage in map(reader.storages.get, keys):
        count = int.from_bytes(file.read(8), "little")
        if count * storage.itemsize != storage.size or file.tell() + storage.size > end:
            owner = names.get(storage.key, "a tensor")
            raise TimError(f"{path}: damaged or truncated torch file: the bytes of {owner} are not all there; download or copy it again")
        file.seek(storage.size, 1)


def _check_tensors(value: Any, tensors: list[_Tensor], path: Path) -> dict[str, str]:
    """Check that every tensor lies inside its storage -> one tensor name per storage."""
    named = list(leaves(value, _Tensor, str(path))) if isinstance(value, Mapping) else []
    for name, tensor in [*named, *(("a tensor", tensor) for tensor in tensors)]:
        if tensor.problem:
            raise TimError(f"{path}: {name}: {tensor.problem}; download the file again, or save it again from contiguous tensors")
    total = sum(storage.size for storage in {tensor.storage for tensor in tensors})
    if sum(tensor.size for _, tensor in named) > MOST_SHARED * total + 2**26:
        raise TimError(f"{path}: {len(named)} names share the same {total / 2**20:.0f} MiB; this is not a state dict")
    return {tensor.storage.key: name for name, tensor in reversed(named)}


class _Limited:
    """A file of which at most `left` bytes can be read."""

    def __init__(self, file: BinaryIO, left: int):
        self.file, self.left = file, left

    def _count(self, data: bytes) -> bytes:
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"its pickle has more than {MOST_PICKLE} bytes")
        return data

    def read(self, size: int = -1) -> bytes:
        return self._count(self.file.read(self.left + 1 if size < 0 else min(size, self.left + 1)))

    def readline(self) -> bytes:
        return self._count(self.file.readline(self.left + 1))


class _Reader(pickle._Unpickler):  # in Python: the one in C allocates whatever index a memo opcode names
    """Runs a pickle with stand-ins. After `load`: `storages` by key, and all `tensors`."""

    dispatch: ClassVar[dict[int, Any]]
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file, old: bool):
        super().__init__(file, encoding="utf-8")
        self.old, self.copied = old, 0
        self.storages: dict[str, _Storage] = {}
        self.tensors: list[_Tensor] = []

    def find_class(self, module: str, name: str) -> _Global:
        found = f"{module}.{name}".replace("__builtin__.", "builtins.")
        if found in STORAGES or found in CALLS or found.startswith("torch.") and found.removeprefix("torch.") in DTYPES:
            return _Global(found)
        raise _NotTensors(f"GLOBAL {found}"[:200])

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 + self.old or (self.old and pid[5] is not None):
            raise ValueError("unknown kind of storage")
        kind, type_, key, _, count = pid[:5]
        if kind != "storage" or not isinstance(type_, _Global) or type_.name not in STORAGES or not isinstance(key, str):
            raise ValueError("unknown kind of storage")
        itemsize = STORAGES[type_.name]
        storage = _Storage(key, _whole(count) * itemsize, itemsize)
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
        if isinstance(self.stack[-1], _Tensor):
            raise ValueError("sets the state of a tensor")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2]):
            self.stack[-1][_key(key)] = value

    def refuse(self) -> None:
        raise _NotTensors("a pickle that is none of torch.save's")


_Reader.dispatch = {code: pickle._Unpickler.dispatch[code] if name in OPCODES else _Reader.refuse for code, name in NAMES.items()}
_Reader.dispatch |= {ord("R"): _Reader.load_reduce, 0x81: _Reader.load_reduce, ord("b"): _Reader.load_build}
_Reader.dispatch |= {ord("s"): _Reader.load_setitem, ord("u"): _Reader.load_setitems}


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


def _dict(reader: _Reader, items: Any = ()) -> dict:
    reader.count_copy(items)
    return {_key(key): value for key, value in (items.items() if isinstance(items, Mapping) else items)}


def _set(reader: _Reader, items: Any = ()) -> None:
    for item in reader.count_copy(items):
        _key(item)


def _encode(reader: _Reader, text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):  # what pickle writes for bytes; others can multiply
        raise ValueError("an unusual encoding of bytes")
    return reader.count_copy(text).encode("latin1")


def _bytearray(reader: _Reader, data: Any = b"", *encoding: Any) -> bytes:
    if not isinstance(data, bytes) or encoding:
        raise ValueError("a bytearray that is not made of bytes")
    return reader.count_copy(data)


def _size(reader: _Reader, items: Any = ()) -> tuple:
    return reader.count_copy(items)


def _ignored(reader: _Reader, *arguments: Any) -> None:
    if any(isinstance(value, (list, dict, bytes)) for value in arguments):
        raise ValueError("an unusual call")


def _tensor(reader: _Reader, storage: Any, offset: Any, size: Any, stride: Any, *others: Any) -> _Tensor:
    return _make_tensor(reader, storage, offset, size, stride, storage.itemsize)


def _tensor_of_dtype(reader: _Reader, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: _Global,
                     *others: Any) -> _Tensor:
    return _make_tensor(reader, storage, offset, size, stride, DTYPES[dtype.name.removeprefix("torch.")])


def _make_tensor(reader: _Reader, storage: _Storage, offset: Any, size: Any, stride: Any, itemsize: int) -> _Tensor:
    if len(size) != len(stride) or len(size) > 64 or not isinstance(storage, _Storage):
        raise ValueError("a tensor without shape")
    count, last = math.prod(map(_whole, size)), _whole(offset) + sum((n - 1) * _whole(step) for n, step in zip(size, stride))
    problem = ""
    if count and (last + 1) * itemsize > storage.size:
        problem = f"its shape {list(size)} needs more than the {storage.size} bytes that are there"
    elif count * itemsize > storage.size:
        problem = f"its shape {list(size)} repeats the {storage.size} bytes that are there"
    made = _Tensor(storage, count * itemsize, problem)
    reader.tensors.append(made)
    return made


def _parameter(reader: _Reader, data: Any, *others: Any) -> _Tensor:
    if not isinstance(data, _Tensor):
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
