"""What a command prints: results on stdout, an error as one line on stderr."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from contextlib import nullcontext
from typing import TextIO

from ..errors import escaped, printable


class LogHandler(logging.StreamHandler):
    """Writes lines above the progress bars, not into them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")  # without it there are no bars
        with tqdm.tqdm.external_write_mode(file=self.stream) if tqdm else nullcontext():
            super().emit(record)


class LogLine(logging.Formatter):
    """`tim: MESSAGE` as one printable line: names in files and captions may hold control characters."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return f"tim: {printable(record.message)}"


def print_result(line: object, file: TextIO | None = None) -> None:
    """Print one line of a result, on stdout by default: names of files may hold control characters."""
    print(escaped(str(line)), file=file or sys.stdout)


def print_error(message: str, args: argparse.Namespace) -> int:
    """Print `tim: error: MESSAGE` on stderr, after the traceback with -v -> exit code 1."""
    if getattr(args, "verbose", False):
        traceback.print_exc()
    print(f"tim: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 1


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception means that a device or the computer has no memory left; does not import torch."""
    text = str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and ("allocate memory" in text or "not enough memory" in text or "out of memory" in text))
