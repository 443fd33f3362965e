"""Checks a torch file before torch reads it: what it would call, and whether every tensor's bytes are there.

The pickle is run with inert stand-ins in place of all that it names; no tensor is made. So sizes are known before anything is expanded,
and a file of a few kilobytes cannot ask for gigabytes.
"""

from __future__ import annotations

import io
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import TimError
from .torch_pickle import NotTensors, PickleReader, TensorStandIn

CHUNK = 2**22  # bytes of a record read at a time
MOST_PICKLE = 2**21  # bytes; 18,000 tensors have as many
MOST_DIRECTORY = 2**23  # bytes of a zip archive's directory; 80,000 tensors have as many
MOST_NAMES, MOST_NAME_CHARACTERS, MOST_DEPTH = 300_000, 10**8, 64
MOST_SHARED = 16  # times that the tensors of a file may be larger than their storages, which several may share
MAGIC = 0x1950A86A20F9469CFC6C  # of torch's old format


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
    except NotTensors as error:
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
        reader = PickleReader(io.BytesIO(_read(file, records[pickles[0]], summed)), old=False)
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
    first = PickleReader(limited, old=True).load()
    if first != MAGIC:
        raise ValueError("not a torch file")
    for _ in range(2):  # the protocol, and the byte order
        PickleReader(limited, old=True).load()
    reader = PickleReader(limited, old=True)
    names = _check_tensors(reader.load(), reader.tensors, path)
    keys = PickleReader(limited, old=True).load()
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


def _check_tensors(value: Any, tensors: list[TensorStandIn], path: Path) -> dict[str, str]:
    """Check that every tensor lies inside its storage -> one tensor name per storage."""
    named = list(leaves(value, TensorStandIn, str(path))) if isinstance(value, Mapping) else []
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
