"""`tim convert`: rewrite weights as safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import options

SUMMARY = "rewrite weights as safetensors"

DESCRIPTION = """\
Rewrite a TiM transformer, a Gemma 3 text model, a DC-AE, or a file with several of them as one safetensors file. The source is a .bin,
.pt or .safetensors file, or a folder in Hugging Face layout. Tensors that
belong to none of them are left out and named."""

EXAMPLES = """\
example:
  tim convert t2i_model.bin transformer.safetensors --dtype bf16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_dtype(parser)
    parser.add_argument("source", metavar="SRC", help="file or folder to read")
    parser.add_argument("target", type=Path, metavar="DST", help=".safetensors file to write")


def run(args: argparse.Namespace) -> None:
    from ..weights.save import convert

    options.warn_of_replacing(args.target)
    print(convert(args.source, args.target, options.storage_dtype(args.dtype)))
