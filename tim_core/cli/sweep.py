"""`tim sweep`: one prompt and noise at several step counts."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import TimError
from ..files import check_separate
from . import options
from .failures import print_result
from .image_files import check_output_image, write_image

SUMMARY = "compare step counts on one labelled sheet"

DESCRIPTION = """\
Make the same image, from the same noise, at several step counts, and write
one labelled sheet."""

EXAMPLES = """\
examples:
  tim sweep "a red circle and a blue square" --steps 1,2,4,8,16,32
  tim sweep "a circle" --mode diffusion                      flow matching"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_guidance(parser)
    options.add_image(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="text to draw; for a class-conditional model a class name or number")
    parser.add_argument("--steps", type=options.step_list, default=[1, 2, 4, 8, 16, 32], metavar="LIST",
                        help="step counts: a list, 1-8, or 1-32 x2 (default: 1,2,4,8,16,32)")
    parser.add_argument("--columns", type=options.whole, metavar="C", help="images per row (default: even rows of at most 4)")
    parser.add_argument("-o", "--output", type=Path, default=Path("sweep.png"), metavar="FILE",
                        help="image to write, .png, .jpg or .webp (default: sweep.png)")


def run(args: argparse.Namespace) -> None:
    check_output_image(args.output)
    if args.columns is not None and args.columns < 1:
        raise TimError(f"--columns: {args.columns} is not a whole number of at least 1")
    check_separate(args.output, options.input_files(args))
    options.check_sampling(args, args.steps)
    check = options.check_size_of(args.size, len(args.steps), "--steps", "fewer step counts or a smaller --size")
    pipe = options.load_pipeline(args, check)
    from ..images import contact_sheet, step_label

    pipe([args.prompt], steps=1, **options.settings(args))  # warm-up, so that the first time on the sheet is right
    images, labels = [], []
    for steps in args.steps:
        image, seconds = options.timed(pipe, [args.prompt], steps=steps, **options.settings(args))
        images.append(image[0])
        labels.append(step_label(steps, pipe.nfe, seconds))
    write_image(contact_sheet(images, labels, args.columns), args.output)
    print_result(args.output)
    for label in labels:
        print(label.replace(" · ", ", "))
