"""The command line: `tim COMMAND`, one module per command."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Sequence
from itertools import groupby

from .. import __version__
from ..errors import TimError, printable
from . import convert, download, evaluate, inspect, pack, previews, sample, sweep, train, upscale
from .failures import LogHandler, LogLine, is_out_of_memory, print_error

COMMANDS = {
    "sample": sample, "sweep": sweep, "upscale": upscale, "evaluate": evaluate, "inspect": inspect, "convert": convert, "pack": pack,
    "previews": previews, "download": download, "train": train,
}

MEMORY_ADVICE = {
    "sample": "try a smaller --size or --batch",
    "sweep": "try a smaller --size",
    "upscale": "try a smaller --size or --factor",
    "evaluate": "try a smaller --batch or --size",
    "train": "reduce loop.batch, raise loop.accumulate, or set loop.checkpointing: true",
}
WRITING = {errno.ENOSPC, errno.EBADF, errno.EFBIG}  # how writing to stdout fails where it is not buffered
MAX_WIDTH = 78  # columns of wrapped help, on wider terminals too

EXAMPLES = """\
examples:
  tim sample "a red circle left of a blue square" --seed 0 -o circle.png
  tim sweep "two green triangles" --steps 1,2,4,8,16,32 -o sweep.png
  tim inspect tim-shapes
  tim evaluate --steps 1,4 -o scores

Run `tim COMMAND --help` for the options of a command. The demo model,
tim-shapes, is included; it draws circles, squares and triangles in six
colours, one to four of a kind or two kinds."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps the paragraphs of a description or epilog; indented lines, such as examples, stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled = []
        for paragraph in text.split("\n\n"):
            lines: list[str] = []
            for is_indented, group in groupby(paragraph.splitlines(), lambda line: line.startswith(" ")):
                lines += group if is_indented else textwrap.wrap(
                    " ".join(group), min(width, MAX_WIDTH), break_long_words=False, break_on_hyphens=False)
            filled.append("\n".join(indent + line for line in lines))
        return "\n\n".join(filled)


class Parser(argparse.ArgumentParser):
    """A parser that reports wrong usage in one line."""

    def _get_values(self, action, arg_strings):
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:  # for which Python before 3.13 gives []
            self.error(f"argument {'/'.join(action.option_strings)}: '--' is not a value")
        return super()._get_values(action, arg_strings)

    def error(self, message: str):
        self.exit(2, f"tim: error: {printable(message)} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    common = Parser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
    parser = Parser(prog="tim", description="Run, inspect and train Transition Models: text to image in any number of steps.",
                    epilog=EXAMPLES, parents=[common], formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=f"tim {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.SUMMARY, description=module.DESCRIPTION, epilog=module.EXAMPLES, parents=[common],
                                      formatter_class=HelpFormatter)
        module.add_arguments(command)
        command.set_defaults(run=module.run, command=name)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command -> 0, or 1 after one line `tim: error: ...` on stderr; SystemExit(2) for wrong usage."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # the terminal's encoding may lack characters of a prompt
    handler = LogHandler()
    handler.setFormatter(LogLine())
    logging.basicConfig(handlers=[handler])
    args = build_parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: logging.warning(message)  # as one line, without a path of the library
            code = args.run(args) or 0
        if reason := _output_error():
            return print_error(f"standard output: cannot be written ({reason}); write it to another file", args)
        return code
    except KeyboardInterrupt:
        return print_error("interrupted", args)
    except BrokenPipeError:
        _drop_output()  # its reader has gone: stop silently
        return 1
    except TimError as error:
        return print_error(str(error), args)
    except Exception as error:
        if is_out_of_memory(error):
            advice = MEMORY_ADVICE.get(args.command, "close other programs, or use a computer with more memory")
            return print_error(f"out of memory: {advice}", args)
        if isinstance(error, OSError) and error.filename is None and error.errno in WRITING:  # files are named by their writers
            _drop_output()
            return print_error(f"standard output: cannot be written ({error.strerror}); write it to another file", args)
        if isinstance(error, OSError) and error.strerror:
            return print_error(": ".join(filter(None, [error.filename and str(error.filename), error.strerror])), args)
        return print_error(f"{type(error).__name__}: {error} (-v shows where)", args)


def _output_error() -> str | None:
    """Why stdout cannot be written, after which it is dropped; None if it can. BrokenPipeError if its reader has gone."""
    try:
        sys.stdout.flush()
        return None
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        return error.strerror


def _drop_output() -> None:
    """Lets what is still to be written to stdout vanish, so that the flush at the interpreter's end does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
