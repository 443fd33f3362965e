"""Builders of files that are damaged, or made to harm the program that reads them."""

import os
import socket
import struct
import zlib
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


def png_bomb(width: int = 12_000, height: int = 12_000) -> bytes:
    """A small PNG of one bit per pixel, all black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(((width + 7) // 8 + 1) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def postscript(marker: Path) -> bytes:
    """A PostScript program with the start of an EPS image, which writes a file when Ghostscript runs it."""
    return (f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n({marker}) (w) file closefile\nshowpage\n%%EOF\n").encode()
