"""`tim pack`: join the parts of a model in one file."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import options
from .failures import print_result

SUMMARY = "join three parts in one file"

DESCRIPTION = """\
Join a transformer, a text model and an autoencoder in one file, for `--model`
and for Load TiM Checkpoint in ComfyUI. The same files and options give the
same bytes.

--dtype applies to the transformer and the text model. The VAE keeps its own
dtype unless --vae-dtype is given; the official code decodes in float32."""

EXAMPLES = """\
example:
  tim pack --model t2i_model.bin --text-encoder gemma-3-1b-it \\
    --vae dc-ae-f32c32-sana-1.1-diffusers tim-t2i.safetensors --dtype bf16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_dtype(parser)
    parser.add_argument("--model", required=True, metavar="FILE", help="TiM transformer (required)")
    parser.add_argument("--text-encoder", metavar="FILE",
                        help="Gemma 3 text model: folder with its tokenizer, or one-file checkpoint (default: none)")
    parser.add_argument("--vae", metavar="FILE", help="DC-AE or SD VAE (default: none)")
    parser.add_argument("target", type=Path, metavar="DST", help=".safetensors file to write")


def run(args: argparse.Namespace) -> None:
    from ..weights.save import pack

    options.check_target(args.target, [args.model, args.text_encoder, args.vae])
    sources = {"model": args.model, "text-encoder": args.text_encoder, "vae": args.vae}
    parts = {name: source for name, source in sources.items() if source is not None}
    with options.report_bytes(args.target) as report:
        made = pack(parts, args.target, **options.storage(args), report=report)
    print_result(made)
