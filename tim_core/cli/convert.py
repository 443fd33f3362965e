"""`tim convert`: rewrite weights as safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import options
from .failures import print_result

SUMMARY = "rewrite weights as safetensors"

DESCRIPTION = """\
Convert weights (TiM transformer, Gemma 3, VAE, or several in one file) to
one safetensors file. SRC is a .bin, .pt or .safetensors file, or a Hugging
Face folder. Other tensors are left out and listed. A LoRA gets the key names
that ComfyUI reads. The same SRC and options give the same bytes.

If SRC holds one part, --dtype applies to it, whichever it is. If it holds
several, the VAE keeps its own dtype unless --vae-dtype is given."""

EXAMPLES = """\
examples:
  tim convert t2i_model.bin transformer.safetensors --dtype bf16
  tim convert t2i_model.bin transformer-fp8.safetensors --dtype fp8
  tim convert pytorch_lora_weights.safetensors lora.safetensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_dtype(parser)
    parser.add_argument("source", metavar="SRC", help="file or folder to read")
    parser.add_argument("target", type=Path, metavar="DST", help=".safetensors file to write")


def run(args: argparse.Namespace) -> None:
    from ..weights.save import convert

    options.check_target(args.target, [args.source])
    with options.report_bytes(args.target) as report:
        made = convert(args.source, args.target, **options.storage(args), report=report)
    print_result(made)
