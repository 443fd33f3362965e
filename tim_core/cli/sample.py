"""`tim sample`: make images from a prompt."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import TimError
from ..files import check_separate
from . import options
from .failures import print_result
from .image_files import check_output_image, write_image

SUMMARY = "make images from a prompt"

DESCRIPTION = """\
Make images from a prompt.

Any number of steps works: 1 is fastest, 4 give a better image, 16 to 64 the
best. With CFG every step but the first runs the network twice, so 4 steps are
7 network evaluations (NFE). The same prompt, seed, size, steps and cfg give
the same image here, in Python and in ComfyUI."""

EXAMPLES = """\
examples:
  tim sample "a red circle left of a blue square" --steps 4 -o circle.png
  tim sample "three squares" --batch 4 -o squares.png        numbered from 0
  tim sample "a circle" --size 80x80 --seed 2 --cfg 1
  tim sample "a circle" --times "1, 0.6, 0.2, 0"             custom times"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_guidance(parser)
    options.add_image(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="text to draw; for a class-conditional model a class name or number")
    parser.add_argument("--steps", type=options.whole, metavar="N", help="number of steps (default: the model's, else 4)")
    parser.add_argument("--times", metavar="LIST", help="falling times from 1 to 0, instead of --steps (default: none)")
    parser.add_argument("--batch", type=options.whole, default=1, metavar="B",
                        help="number of images; several are numbered: out-0.png, out-1.png (default: 1)")
    parser.add_argument("-o", "--output", type=Path, default=Path("out.png"), metavar="FILE",
                        help="image to write, .png, .jpg or .webp (default: out.png)")


def run(args: argparse.Namespace) -> None:
    check_output_image(args.output)
    from .. import schedule
    from ..images import to_pil
    from ..limits import check_batch

    check_batch(args.batch, "--batch")
    names = [args.output] if args.batch == 1 else [args.output.with_stem(f"{args.output.stem}-{k}") for k in range(args.batch)]
    for name in names[1:]:
        check_output_image(name)
    for name in names:
        check_separate(name, options.input_files(args))
    options.check_sampling(args, [1 if args.steps is None else args.steps])
    if None not in (args.steps, args.times) and args.steps != (count := len(schedule.parse(args.times)) - 1):
        raise TimError(f"--steps: {args.steps} contradicts --times (number of steps: {count}); leave out one of the two")
    pipe = options.load_pipeline(args, options.check_size_of(args.size, args.batch))

    images, seconds = options.timed(pipe, [args.prompt] * args.batch, steps=args.steps, times=args.times, **options.settings(args))
    for name, image in zip(names, images):
        write_image(to_pil(image), name)
        print_result(name)
    print(f"{pipe.nfe} NFE, {seconds:.2f} s")
