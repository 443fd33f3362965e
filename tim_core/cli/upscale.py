"""`tim upscale`: re-render an image at a larger size."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from . import options
from .image_files import check_picture, read_picture, write_picture

SUMMARY = "a picture at a larger size"

DESCRIPTION = """\
Draws a picture again at a larger size, by the same prompt: it is enlarged, noised to the time --strength, and sampled at the new size
as a whole, no tiles. A low strength keeps more of the picture, a high one draws more of it anew; all steps run either way."""

EXAMPLES = """\
examples:
  tim upscale picture.png "a red circle left of a blue square" -o large.png            twice as large
  tim upscale picture.png "a red circle left of a blue square" --size 128x128 --strength 0.3 --steps 8 -o large.png

The bundled model was trained little beyond 64x64: strength 0.3 suits it, and sizes up to 128x128."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_guidance(parser)
    parser.add_argument("image", type=Path, metavar="IMAGE", help="a picture of any kind that Pillow reads")
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--size", type=options.size, metavar="WxH", help="in pixels; what other proportions leave over is cut off")
    parser.add_argument("--factor", type=float, default=2.0, metavar="F", help="in place of --size (2)")
    parser.add_argument("--steps", default="4", metavar="N", help="number of transitions, or one for each stage: 8,4 (4)")
    parser.add_argument("--stages", type=int, default=1, metavar="K", help="enlargements on the way, by equal factors (1)")
    parser.add_argument("--strength", type=float, default=0.5, metavar="T", help="the time that the picture is noised to, up to 1 (0.5)")
    parser.add_argument("-o", "--output", type=Path, default=Path("upscaled.png"), metavar="FILE",
                        help=".png, .jpg or .webp (upscaled.png)")


def run(args: argparse.Namespace) -> None:
    check_picture(args.output)
    picture = read_picture(args.image)
    from ..upscale import stage_steps, target_size

    total = sum(stage_steps(args.steps, args.stages)) if args.stages > 0 else 0
    pipe = options.load_pipeline(args)
    from tqdm import tqdm

    from ..images import to_pil

    width, height = args.size or (0, 0)
    settings = {name: getattr(args, name) for name in ("negative", "cfg", "seed", "guidance_interval", "stochasticity")}
    with tqdm(total=total, unit="step", leave=False) as bar:
        started = time.perf_counter()
        image = pipe.upscale(
            picture, args.prompt, width=width, height=height, steps=args.steps, strength=args.strength, factor=args.factor,
            stages=args.stages, callback=lambda state: bar.update(), **settings)[0]
        seconds = time.perf_counter() - started
    write_picture(to_pil(image), args.output)
    print(args.output)
    asked = target_size(picture.shape[2], picture.shape[1], width, height, args.factor)
    made = image.shape[1], image.shape[0]
    rounded = "" if made == asked else f" (asked for {asked[0]}x{asked[1]}; sides are multiples of {pipe.unit})"
    print(f"{made[0]}x{made[1]}{rounded}, {pipe.nfe} NFE, {seconds:.2f} s")
