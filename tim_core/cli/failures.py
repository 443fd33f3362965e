"""How a command fails: one line on stderr."""

from __future__ import annotations

import argparse
import sys
import traceback


def failed(message: str, args: argparse.Namespace) -> int:
    if getattr(args, "verbose", False):
        traceback.print_exc()
    print(f"tim: error: {' '.join(message.split())}", file=sys.stderr)
    return 1


def out_of_memory(error: Exception) -> bool:
    """On any device; torch is not imported to ask."""
    text = str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and ("allocate memory" in text or "not enough memory" in text or "out of memory" in text))
