"""`tim train`: train from configurations."""

from __future__ import annotations

import argparse
from pathlib import Path

from .failures import print_result

SUMMARY = "train from configurations"

DESCRIPTION = """\
Train from YAML configurations, one after another: `kind: finetune` (your
images; all weights or a LoRA), `kind: tim` and `kind: autoencoder` (coloured
shapes). To resume an interrupted run, repeat the command.

For several GPUs run
`torchrun --nproc-per-node N -m tim_core train CONFIG.yaml`.
See docs/training.md for the keys and the files."""

EXAMPLES = """\
examples:
  tim train configs/t2i-lora.yaml            a LoRA of the released model
  tim train configs/tim-shapes/lora.yaml     a LoRA of the demo model, minutes
  tim train configs/tim-shapes/[1-9]-*.yaml configs/tim-shapes/10-*.yaml
                                             a model like it, from scratch

docs/research/tim-shapes.md lists all runs that made the included model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG.yaml", help="configuration to run")


def run(args: argparse.Namespace) -> None:
    from ..training import run

    for path in filter(None, run(args.configs)):
        print_result(path)
