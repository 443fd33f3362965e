"""`tim upscale`: re-render an image at a larger size."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ..errors import TimError
from ..files import check_separate
from . import options
from .failures import print_result
from .image_files import check_output_image, write_image

SUMMARY = "re-render an image at a larger size"

DESCRIPTION = """\
Re-render an image at a larger size, without tiles: enlarge it, add noise up
to the time --strength, and sample it with the same prompt. A low strength
keeps the image, a high one redraws more of it; all steps run either way."""

EXAMPLES = """\
examples:
  tim upscale small.png "three squares"                      twice as large
  tim upscale small.png "three squares" --size 128x128 --strength 0.2 \\
    --steps 8 -o large.png

For the demo model keep the strength at or below 0.3, its default, and the size
at or below 128x128."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_guidance(parser)
    parser.add_argument("image", type=Path, metavar="IMAGE", help="image to enlarge, in any format that Pillow reads")
    parser.add_argument("prompt", metavar="PROMPT", help="text that describes the image")
    parser.add_argument("--size", type=options.size, metavar="WxH",
                        help="target size in pixels; cropped if the aspect ratio differs (default: --factor)")
    parser.add_argument("--factor", type=options.number, default=2.0, metavar="F",
                        help="enlargement factor, 0.5 to 16, ignored with --size (default: 2)")
    parser.add_argument("--steps", default="4", metavar="N", help="number of steps, or one per stage: 8,4 (default: 4)")
    parser.add_argument("--stages", type=options.whole, default=1, metavar="K",
                        help="number of enlargements, by equal factors (default: 1)")
    parser.add_argument("--strength", type=options.number, metavar="T",
                        help="time up to which noise is added, above 0, up to 1 (default: the model's, else 0.5)")
    parser.add_argument("-o", "--output", type=Path, default=Path("upscaled.png"), metavar="FILE",
                        help="image to write, .png, .jpg or .webp (default: upscaled.png)")


def run(args: argparse.Namespace) -> None:
    check_output_image(args.output)
    check_separate(args.output, [args.image, *options.input_files(args)])
    if args.size and min(args.size) < 1:
        raise TimError(f"--size: {args.size[0]}x{args.size[1]} has no pixels; use a size such as 128x128, or --factor")
    from ..images import image_size, open_image, to_pil, to_tensor
    from ..upscale import check_strength, stage_sizes, stage_steps, target_size

    width, height = args.size or (0, 0)
    counts = stage_steps(args.steps, args.stages, "--steps")
    if args.strength is not None:
        check_strength(args.strength)
    options.check_sampling(args, counts, distinct=False)
    size = image_size(args.image)
    wanted = target_size(*size, width, height, args.factor)
    pipe = options.load_pipeline(args, lambda parts: stage_sizes(size, wanted, args.stages, parts.size_multiple))
    image = to_tensor(open_image(args.image))
    from tqdm import tqdm

    settings = {name: getattr(args, name) for name in ("negative", "cfg", "seed", "guidance_interval", "stochasticity")}
    with tqdm(total=sum(counts), unit="step", leave=False) as bar:
        started = time.perf_counter()
        large = pipe.upscale(
            image, args.prompt, width=width, height=height, steps=args.steps, strength=args.strength, factor=args.factor,
            stages=args.stages, callback=lambda state: bar.update(), **settings)[0]
        seconds = time.perf_counter() - started
    write_image(to_pil(large), args.output)
    print_result(args.output)
    made = large.shape[1], large.shape[0]
    rounded = "" if made == wanted else f" (asked for {wanted[0]}x{wanted[1]}; sides are multiples of {pipe.size_multiple})"
    print(f"{made[0]}x{made[1]}{rounded}, {pipe.nfe} NFE, {seconds:.2f} s")
