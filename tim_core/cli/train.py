"""`tim train`: train from configurations."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import TimError

SUMMARY = "weights from a configuration"

DESCRIPTION = """\
Trains from YAML configurations, one after another: `kind: finetune` (your pictures; all weights, or a LoRA), `kind: tim` and `kind:
autoencoder` (the small world). A run that was stopped goes on from its last checkpoint when the same command is given again.

`accelerate launch -m tim_core.training CONFIG.yaml` runs on several GPUs. docs/training.md says what is read and written."""

EXAMPLES = """\
examples:
  tim train configs/t2i-lora.yaml                            a LoRA on a folder of pictures with captions
  tim train configs/tim-shapes-autoencoder.yaml configs/tim-shapes-decoder.yaml configs/tim-shapes.yaml
                                                             the small world's autoencoder, and a first network on it

docs/research/tim-shapes.md has the whole list that made the bundled model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG.yaml")


def run(args: argparse.Namespace) -> None:
    try:
        from ..training import run
    except ModuleNotFoundError as error:
        raise TimError(f'training: found no {error.name}, expected it from: pip install "transition-models[train]"') from None
    for path in filter(None, run(args.configs)):
        print(path)
