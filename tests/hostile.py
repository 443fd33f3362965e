"""Builders of files that are damaged, or made to harm the program that reads them."""

import os
import socket
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

SPECIAL = ("FIFO", "device", "socket")
DEEP = 20_000


def special_file(kind: str, path: Path):
    """Makes a file that is not regular; returns what has to live as long as it. A socket's path must be short."""
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        return listener


def deep_json(depth: int = DEEP) -> str:
    """A JSON object that holds `depth` nested lists."""
    return '{"a":' + "[" * depth + "]" * depth + "}"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, kind: int, rows: bytes, key: Sequence[int] = (), more: bytes = b"") -> bytes:
    """A PNG of rows without filters. kind: 0 grey, 2 RGB; key: the transparent colour; more: chunks before the pixels."""
    size = len(rows) // height
    filtered = b"".join(b"\0" + rows[start : start + size] for start in range(0, len(rows), size))
    transparent = png_chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) if key else b""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + transparent + more + png_chunk(b"IDAT", zlib.compress(filtered, 9)) + png_chunk(b"IEND", b"")


def png_bomb(width: int = 12_000, height: int = 12_000) -> bytes:
    """A small PNG of one bit per pixel, all black."""
    return png(width, height, 1, 0, bytes((width + 7) // 8 * height))


def postscript(marker: Path) -> bytes:
    """A PostScript program with the start of an EPS image, which writes a file when Ghostscript runs it."""
    return (f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n({marker}) (w) file closefile\nshowpage\n%%EOF\n").encode()


def rezip(source: Path, target: Path, change, compress: int = zipfile.ZIP_STORED) -> Path:
    """Copies a zip archive; change(name, data) -> the data to write, or None to leave the record out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compress) as new:
        for name in old.namelist():
            if (data := change(name, old.read(name))) is not None:
                new.writestr(name, data)
    return target


def flip_storage(path: Path, number: int, place: float = 0.5, bit: int = 0) -> str:
    """Flips a bit of one storage of a torch file, which keeps its checksum -> the name of its record. place: 0 to 1."""
    with zipfile.ZipFile(path) as archive:
        record = next(record for record in archive.infolist() if record.filename.endswith(f"/data/{number}"))
    data = bytearray(path.read_bytes())
    names, extra = (int.from_bytes(data[record.header_offset + at :][:2], "little") for at in (26, 28))
    data[record.header_offset + 30 + names + extra + int(place * record.file_size)] ^= 1 << bit
    path.write_bytes(data)
    return record.filename


class Pickle:
    """Writes pickles as torch does, one opcode after the other."""

    def __init__(self):
        self.data = b"\x80\x02"

    def add(self, *values) -> "Pickle":
        for value in values:
            if isinstance(value, bytes):
                self.data += value  # opcodes
            elif isinstance(value, str):
                self.data += b"X" + struct.pack("<I", len(value.encode())) + value.encode()
            elif isinstance(value, tuple):
                self.add(b"(", *value, b"t")
            elif 0 <= value < 2**31:
                self.data += b"J" + struct.pack("<i", value)
            else:
                number = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
                self.data += b"\x8a" + bytes([len(number)]) + number
        return self

    def name(self, module: str, name: str) -> "Pickle":
        return self.add(f"c{module}\n{name}\n".encode())

    def storage(self, key: str, count: int, kind: str = "FloatStorage") -> "Pickle":
        return self.add(b"(", "storage").name("torch", kind).add(key, "cpu", count, b"tQ")

    def tensor(self, key: str, count: int, shape: tuple, stride: tuple, offset: int = 0) -> "Pickle":
        self.name("torch._utils", "_rebuild_tensor_v2").add(b"(").storage(key, count).add(offset, shape, stride, b"\x89")
        return self.name("collections", "OrderedDict").add(b")R", b"tR")

    def zip(self, path: Path, storages: dict[str, bytes], compress: int = zipfile.ZIP_STORED) -> Path:
        """A torch file of this pickle, ended, and of these storages."""
        with zipfile.ZipFile(path, "w", compress) as archive:
            archive.writestr("archive/data.pkl", self.data + b".")
            archive.writestr("archive/byteorder", b"little")
            for key, data in storages.items():
                archive.writestr(f"archive/data/{key}", data)
            archive.writestr("archive/version", b"3\n")
        return path


def one_tensor(path: Path, count: int, shape: tuple, stride: tuple, offset: int = 0, data: bytes | None = None, name: str = "w") -> Path:
    """A torch file of one tensor of float32."""
    data = bytes(4 * count) if data is None else data
    return Pickle().add(b"}", name).tensor("0", count, shape, stride, offset).add(b"s").zip(path, {"0": data})


def deep_dicts(depth: int = DEEP) -> Pickle:
    """{"a": {"a": ...}}"""
    return Pickle().add(*[b"}"] + [b"X\x01\0\0\0a}"] * depth + [b"s"] * depth)


def dict_lattice(depth: int = 60) -> Pickle:
    """Dicts that each hold the one before twice: 2**depth paths."""
    pickle = Pickle().add(b"}q\0")
    for k in range(depth):
        pickle.add(b"}", "a", b"h" + bytes([k]), b"s", "b", b"h" + bytes([k]), b"s", b"q" + bytes([k + 1]))
    return pickle


def dict_of_itself() -> Pickle:
    return Pickle().add(b"}q\0", "a", b"h\0s")


def tuple_lattice_key(depth: int = 60) -> Pickle:
    """A dict whose key is a tuple that takes 2**depth steps to hash."""
    pickle = Pickle().add(b"}", 1, b"q\0")
    for k in range(depth):
        pickle.add(b"h" + bytes([k]), b"h" + bytes([k]), b"\x86q" + bytes([k + 1]))
    return pickle.add(1, b"s")


def growing_bytes(times: int = 40) -> Pickle:
    """Bytes that double with every call."""
    pickle = Pickle().add(b"}", "a", "x" * 64)
    for _ in range(times):
        pickle.add(b"q\0").name("_codecs", "encode").add(b"(h\0", "hex_codec", b"tR")
    return pickle.add(b"s")


def huge_bytearray(size: int = 2**40) -> Pickle:
    return Pickle().add(b"}", "a").name("builtins", "bytearray").add((size,), b"Rs")


def huge_meta_tensor() -> Pickle:
    pickle = Pickle().add(b"}", "w").name("torch._utils", "_rebuild_meta_tensor_no_storage").add(b"(").name("torch", "float32")
    return pickle.add((10**6, 10**6), (10**6, 1), b"\x89tRs")


def large_memo_index() -> Pickle:
    return Pickle().add(b"}", b"r\xff\xff\xff\x7f")


def state_of_a_tensor(shape: tuple = (40_000, 40_000), stride: tuple = (0, 0)) -> Pickle:
    """{"w": a tensor of 4 elements whose state is then set to another shape}"""
    pickle = Pickle().add(b"}", "w").tensor("0", 4, (4,), (1,)).add(b"(").storage("0", 4)
    return pickle.add(0, shape, stride, b"tb", b"s")


def two_directories(path: Path, seen_by_zipfile: Pickle, seen_by_torch: Pickle, storage: bytes) -> Path:
    """A torch file with two archives: zipfile reads the directory before the end, torch the one that the end points to."""

    def archive(pickle: Pickle, base: int) -> tuple[bytes, bytes]:
        entries = directory = b""
        for name, data in ((b"archive/data.pkl", pickle.data + b"."), (b"archive/data/0", storage), (b"archive/version", b"3\n")):
            about = struct.pack("<5H3L", 20, 0, 0, 0, 33, zlib.crc32(data), len(data), len(data))
            where = struct.pack("<H", len(name)) + bytes(12) + struct.pack("<L", base + len(entries))
            directory += b"PK\1\2" + struct.pack("<H", 20) + about + where + name
            entries += b"PK\3\4" + about + struct.pack("<2H", len(name), 0) + name + data
        return entries, directory

    entries, directory = archive(seen_by_torch, 0)
    others, _ = archive(seen_by_zipfile, 0)
    shift = len(others) + len(directory)  # zipfile adds it to every place
    _, other_directory = archive(seen_by_zipfile, len(entries) + len(directory) - shift)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, len(directory), len(entries), 0)
    path.write_bytes(entries + directory + others + other_directory + end)
    return path
