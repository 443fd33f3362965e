"""`tim inspect`: describe weight files."""

from __future__ import annotations

import argparse

from ..errors import TimError
from .failures import print_error

SUMMARY = "describe weight files"

DESCRIPTION = """\
Describe weight files: size, parts, architecture, dtypes, where a file belongs
in ComfyUI and on the command line, which parts are still missing to make an
image, and how the weights were trained. No code in a file is run. A file that
cannot be read gives one error line; the others are still described."""

EXAMPLES = """\
examples:
  tim inspect tim-shapes
  tim inspect downloads/*.safetensors
  tim inspect tim-t2i --json              a folder of parts, for scripts"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="file, folder of one or several parts, or bundled name")
    parser.add_argument("--json", action="store_true", help="print one line of JSON per file (default: text)")


def run(args: argparse.Namespace) -> int:
    from ..weights.describe import describe

    code = 0
    for file in args.files:
        try:
            description = describe(file)
            text = description.as_json() if args.json else str(description)
        except TimError as error:
            code = print_error(str(error), args)
        except Exception as error:  # still describe the other files
            code = print_error(f"{file}: {type(error).__name__}: {error}", args)
        else:
            print(text, flush=True)
    return code
