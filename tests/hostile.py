"""Builders of files that are damaged, or made to harm the program that reads them."""

import os
import socket
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
