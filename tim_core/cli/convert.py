"""`tim convert`: rewrite weights as safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import options

SUMMARY = "weights as safetensors"

DESCRIPTION = """\
Rewrites a TiM transformer, a Gemma-3 text model, a DC-AE, or a file with several of them (.bin, .pt, .safetensors, or a folder in
Hugging Face layout) as one safetensors file. Nothing is dropped."""

EXAMPLES = """\
example:
  tim convert t2i_model.bin transformer.safetensors --dtype bf16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_dtype(parser)
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("target", type=Path, metavar="DST", help="a .safetensors file")


def run(args: argparse.Namespace) -> None:
    from ..weights.save import convert

    print(convert(args.source, args.target, options.storage_dtype(args.dtype)))
