"""Options that several commands share."""

from __future__ import annotations

import argparse
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import TimError, printable
from ..files import check_separate, user_path
from ..ranges import check_counts, parse_numbers

INTERVAL_HELP = "guide only at times above LOW and below HIGH; 0,1.1 guides the first step too (default: the model's, else 0,1)"
SHIFT_HELP = "above 1: denser steps at high noise (default: 1, equal steps)"


# Types


def whole(text: str) -> int:
    if not re.fullmatch(r"[-+]?[0-9]{1,40}", text):  # int() takes 1_0 and digits of other scripts too
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number")
    return int(text)


def number(text: str) -> float:
    try:
        if not re.fullmatch(r"[-+.0-9a-zA-Z]+", text):
            raise ValueError
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,20})[xX]([0-9]{1,20})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not WIDTHxHEIGHT in pixels, such as 64x64")
    return int(match[1]), int(match[2])


def step_list(text: str) -> list[int | float]:
    """Numbers in any notation of `ranges`; check_sampling says which are no step counts."""
    try:
        return parse_numbers(text, "steps") if text.strip(" ,;") else []
    except TimError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("steps: ")) from None


def interval(text: str) -> tuple[float, float]:
    try:
        low, high = (number(word.strip()) for word in text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"'{text}' is not LOW,HIGH, such as 0,1") from None
    return low, high


def lora(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH; a file whose own name ends in a colon and a number goes first."""
    if not text:
        raise argparse.ArgumentTypeError("no file is named")
    name, _, strength = text.rpartition(":")
    try:
        value = number(strength)
    except argparse.ArgumentTypeError:
        return text, 1.0
    return (text, 1.0) if not name or os.path.exists(text) else (name, value)


def tile(text: str) -> str | int:
    return int(text) if re.fullmatch(r"[0-9]{1,20}", text) else text


def words(text: str) -> list[str]:
    return [word for word in re.split(r"[,\s]+", text) if word]


# Groups


def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="tim-shapes", metavar="M",
                       help="bundled name, one-file checkpoint or folder of parts (default: tim-shapes)")
    group.add_argument("--lora", type=lora, action="append", default=[], metavar="FILE[:STRENGTH]",
                       help="add a LoRA (default strength: 1); may be repeated (default: none)")
    group.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, cuda:1 or mps (default: auto, the GPU if there is one)")
    group.add_argument("--dtype", default="auto", metavar="T",
                       help="float32 (fp32), bfloat16 (bf16) or float16 (fp16) (default: auto, bfloat16 on a GPU and float32 on a CPU; a "
                       "large model stored in bfloat16 or fp8 runs in bfloat16 on a CPU that has instructions for it)")
    group.add_argument("--tile", type=tile, default="auto", metavar="T",
                       help="decode in tiles: auto (where memory is short), off, or their side in pixels (default: auto)")
    group.add_argument("--attention", default="auto", choices=["auto", "sdpa", "flash"],
                       help="attention kernel; flash needs the flash-attn package (default: auto)")
    group.add_argument("--compile", action="store_true", help="compile the network; worth it for many images of one size (default: off)")


def add_guidance(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--negative", default="", metavar="TEXT", help="negative prompt (default: empty)")
    group.add_argument("--cfg", type=number, metavar="C", help="guidance scale; 1 is no guidance (default: the model's, else 2.5)")
    group.add_argument("--seed", type=whole, default=0, metavar="N", help="noise seed (default: 0)")
    group.add_argument("--guidance-interval", type=interval, metavar="LOW,HIGH", help=INTERVAL_HELP)
    group.add_argument("--stochasticity", type=number, default=0.0, metavar="S", help="share of fresh noise per step, 0 to 1 (default: 0)")


def add_image(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("image")
    group.add_argument("--size", type=size, metavar="WxH", help="width and height in pixels (default: the model's, 64x64 for tim-shapes)")
    group.add_argument("--shift", type=number, default=1.0, metavar="S", help=SHIFT_HELP)
    group.add_argument("--mode", default="transition", choices=["transition", "diffusion"],
                       help="diffusion runs the network as ordinary flow matching (default: transition)")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", metavar="D",
                        help="dtype of transformer and text model: fp32, bf16, fp16 (or the long names), or fp8: the transformer's "
                        "large weights as float8_e4m3fn with scales, the rest in bfloat16 (default: as stored)")
    parser.add_argument("--vae-dtype", metavar="D", help="dtype of the VAE in a file of several parts: fp32 or bf16 (default: as stored)")


# Values


def check_target(path: Path, sources: list[str | None]) -> None:
    """TimError if a weight file to write is one of its sources. Say that a file which is there will be replaced."""
    from ..weights.parts import BUNDLED

    check_separate(user_path(path), [BUNDLED.get(source, source) for source in sources])
    if user_path(path).is_file():
        logging.warning(f"{path}: exists; replacing it")


def input_files(args: argparse.Namespace) -> list[str | Path]:
    """The weight files that the options of `add_model` name."""
    from ..weights.parts import BUNDLED

    return [BUNDLED.get(args.model, args.model), *(file for file, _ in args.lora)]


def check_sampling(args: argparse.Namespace, steps: list[int], distinct: bool = True) -> None:
    """TimError for sampling options that no model takes. steps: the step counts of the runs, which may have to be distinct."""
    from ..sampler import check_guidance, check_seed
    from ..schedule import time_grid

    check_seed(args.seed)
    check_guidance(1.0 if args.cfg is None else args.cfg, args.guidance_interval or (0.0, 1.0), getattr(args, "stochasticity", 0.0))
    for count in check_counts(steps, "--steps", distinct):
        time_grid(count, getattr(args, "shift", 1.0), getattr(args, "times", None))


def load_pipeline(args: argparse.Namespace, check_with: Callable[[Any], None] = lambda parts: None):
    """Load --model with --lora and --tile. check_with(parts) and the check of the tile come before the weights are loaded."""
    from ..limits import check_tile
    from ..pipeline import Pipeline
    from ..weights.read import read_parts

    parts = read_parts(args.model)
    check_with(parts)
    check_tile(args.tile, parts.latent_factor)
    pipe = Pipeline.load(parts, args.device, args.dtype, args.attention, args.lora, args.compile)
    if args.compile:
        logging.warning("--compile: the first image of each size and batch waits for the compiler, up to some minutes")
    pipe.tile = args.tile
    return pipe


def check_size_of(
    size: tuple[int, int] | None, count: int = 1, option: str = "--batch", advice: str = "a smaller --batch or --size"
) -> Callable[[Any], None]:
    """For `load_pipeline`: TimError for a size that the model cannot make, or for `count` images of it that are too many pixels.

    option: what sets the count. advice: what to use then.
    """
    from ..images import check_pixels
    from ..limits import check_size
    from ..weights.defaults import read_defaults

    def check(parts: Any) -> None:
        defaults = read_defaults(parts)
        width, height = size or (defaults.width, defaults.height)
        check_size(width, height, parts.size_multiple)
        check_pixels(option, count, width, height, advice)

    return check


def settings(args: argparse.Namespace) -> dict:
    width, height = args.size or (None, None)
    names = ("negative", "cfg", "seed", "guidance_interval", "stochasticity", "shift", "mode")
    return {"width": width, "height": height, **{name: getattr(args, name) for name in names}}


def timed(pipe, prompts: list[str], steps: int | None, times: str | None = None, **options):
    """Run the pipeline with a progress bar -> images, seconds."""
    from tqdm import tqdm

    from .. import schedule

    steps = pipe.defaults.steps if steps is None else steps
    total = steps if times is None else len(schedule.parse(times)) - 1
    bars = []  # one, made by the first step: errors come before it

    def show(state: dict) -> None:
        if not bars:
            bars.append(tqdm(total=total, unit="step", desc=f"{total} step{'s' if total != 1 else ''}", leave=False))
        bars[0].update()

    started = time.perf_counter()
    try:
        images = pipe(prompts, steps=steps, times=times, callback=show, **options)
    finally:
        for bar in bars:
            bar.close()
    return images, time.perf_counter() - started


def storage(args: argparse.Namespace) -> dict:
    """The dtypes of `add_dtype`, as `pack` and `convert` take them."""
    from ..weights.save import STORAGE_DTYPES

    chosen = {"dtype": args.dtype, "vae_dtype": args.vae_dtype}
    for option, name in chosen.items():
        if name is not None and name not in STORAGE_DTYPES:
            raise TimError(f"--{option.replace('_', '-')}: '{name}' is unknown; choose from {', '.join(STORAGE_DTYPES)}")
    return {option: None if name is None else STORAGE_DTYPES[name] for option, name in chosen.items()}


@contextmanager
def report_bytes(path: Path) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar in bytes -> what to call with the bytes written so far and in all."""
    from tqdm import tqdm

    bars = []  # one, made by the first call: errors come before it

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(total=total, unit="B", unit_scale=True, desc=printable(path.name), leave=False))
        bars[0].update(done - bars[0].n)

    try:
        yield show
    finally:
        for bar in bars:
            bar.close()
