"""`tim previews`: add live-preview colours to a model file."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from .failures import print_result

SUMMARY = "add live-preview colours to a model file"

DESCRIPTION = """\
Add live-preview colours for ComfyUI to a model file. The file is replaced
only if the new colours fit better.

The colours are fitted on the images of --images, which should look like what
the model makes; without it on rendered shapes, which suit tim-shapes only."""

EXAMPLES = """\
example:
  tim previews tim-t2i.safetensors --images photographs"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help=".safetensors file with a TiM transformer")
    parser.add_argument("--vae", metavar="FILE", help="DC-AE or SD VAE (default: the one in FILE)")
    parser.add_argument("--force", action="store_true", help="replace the colours even if the new ones fit worse (default: off)")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="images to fit on, at most 200 are read (default: rendered shapes)")


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ..shapes.batches import render_samples
    from ..weights import previews
    from ..weights.load import load_autoencoder
    from ..weights.parts import TRANSFORMER
    from ..weights.read import read_parts
    from ..weights.save import check_output_path, convert

    check_output_path(args.file)
    parts = read_parts(args.file)
    parts.require(TRANSFORMER)
    autoencoder = load_autoencoder(args.vae or parts)
    side = 8 * autoencoder.config.factor
    images = previews.photographs(args.images, side) if args.images else render_samples(200, side)
    preview = previews.fit(autoencoder, tqdm(images, unit="image", leave=False))
    before = (parts[TRANSFORMER].record.get("preview") or {}).get("r2", -math.inf)
    if before >= preview["r2"] and not args.force:
        print_result(f"{args.file}: kept the old preview colours (they explain {100 * before:.1f} %, the new ones "
                     f"{100 * preview['r2']:.1f} %); use --force to replace them")
        return
    print_result(convert(parts, args.file, metadata={"preview": preview}))
    print(f"the preview colours explain {100 * preview['r2']:.1f} % of the variance")
