"""`tim inspect`: describe weight files."""

from __future__ import annotations

import argparse

from ..errors import TimError
from .failures import print_error

SUMMARY = "describe weight files"

DESCRIPTION = """\
Describe weight files: parts, architecture, dtypes, and how they were trained. No code in a file is run.
A file that cannot be read gives one error line; the others are still described."""

EXAMPLES = """\
examples:
  tim inspect tim-shapes
  tim inspect downloads/*.safetensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="file, folder in Hugging Face layout, or bundled name")


def run(args: argparse.Namespace) -> int:
    from ..weights.describe import describe

    code = 0
    for file in args.files:
        try:
            text = str(describe(file))
        except TimError as error:
            code = print_error(str(error), args)
        except Exception as error:  # still describe the other files
            code = print_error(f"{file}: {type(error).__name__}: {error}", args)
        else:
            print(text, flush=True)
    return code
