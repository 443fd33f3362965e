"""`tim sample`: make images from a prompt."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import TimError
from . import options
from .image_files import check_picture, write_picture

SUMMARY = "pictures of a prompt"

DESCRIPTION = """\
Makes pictures of a prompt.

TiM jumps from any noise level to any lower one, so --steps is a free choice: 1 is fastest, 4 is good, 16 is better.
Guidance (--cfg) acts inside --guidance-interval, whose ends are excluded: by default the first step, at time 1, is not guided, and 4
guided steps cost 7 network evaluations (NFE). The same prompt, seed, size, steps and cfg give the same picture here, in Python and in
ComfyUI."""

EXAMPLES = """\
examples:
  tim sample "a red circle left of a blue square" --steps 4 --seed 0 -o picture.png
  tim sample "three squares" --batch 4 -o squares.png        writes squares-0.png to squares-3.png
  tim sample "a circle" --size 96x64 --seed 2 --cfg 1
  tim sample "a circle" --times "1, 0.6, 0.2, 0"             steps of your own"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_guidance(parser)
    options.add_image(parser)
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--steps", type=int, default=4, help="number of transitions (4)")
    parser.add_argument("--times", metavar="LIST", help="times of your own from 1 to 0, in place of --steps")
    parser.add_argument("--batch", type=int, default=1, metavar="B",
                        help="number of pictures; more than one are numbered: out-0.png ... (1)")
    parser.add_argument("-o", "--output", type=Path, default=Path("out.png"), metavar="FILE", help=".png, .jpg or .webp (out.png)")


def run(args: argparse.Namespace) -> None:
    check_picture(args.output)
    if args.batch < 1:
        raise TimError(f"--batch: found {args.batch}, expected at least 1")
    pipe = options.load_pipeline(args)
    from ..images import to_pil

    images, seconds = options.timed(pipe, [args.prompt] * args.batch, steps=args.steps, times=args.times, **options.settings(args))
    names = [args.output] if args.batch == 1 else [args.output.with_stem(f"{args.output.stem}-{k}") for k in range(args.batch)]
    for name, image in zip(names, images):
        write_picture(to_pil(image), name)
        print(name)
    print(f"{pipe.nfe} NFE, {seconds:.2f} s")
