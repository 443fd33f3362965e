"""Options that several commands share."""

from __future__ import annotations

import argparse
import logging
import re
import time
from pathlib import Path

from ..errors import TimError

INTERVAL_HELP = "guide only at times above LOW and below HIGH; 0,1.1 guides the first step too (default: the model's, else 0,1)"
SHIFT_HELP = "above 1: denser steps at high noise (default: 1, equal steps)"


# Types


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not WIDTHxHEIGHT in pixels, such as 64x64")
    return int(match[1]), int(match[2])


def whole_numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of whole numbers, such as 1,2,4,8") from None


def interval(text: str) -> tuple[float, float]:
    try:
        low, high = (float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not LOW,HIGH, such as 0,1") from None
    return low, high


def lora(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH; a file whose own name ends in a colon and a number goes first."""
    name, _, strength = text.rpartition(":")
    try:
        value = float(strength)
    except ValueError:
        return text, 1.0
    return (text, 1.0) if not name or Path(text).exists() else (name, value)


def tile(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


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
                       help="float32 (fp32), bfloat16 (bf16) or float16 (fp16) (default: auto, float32 on a CPU, bfloat16 on a GPU)")
    group.add_argument("--tile", type=tile, default="auto", metavar="T",
                       help="decode in tiles: auto (where memory is short), off, or their side in pixels (default: auto)")
    group.add_argument("--attention", default="auto", choices=["auto", "sdpa", "flash"],
                       help="attention kernel; flash needs the flash-attn package (default: auto)")
    group.add_argument("--compile", action="store_true", help="compile the network; worth it for many images of one size (default: off)")


def add_guidance(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--negative", default="", metavar="TEXT", help="negative prompt (default: empty)")
    group.add_argument("--cfg", type=float, metavar="C", help="guidance scale; 1 is no guidance (default: the model's, else 2.5)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="noise seed (default: 0)")
    group.add_argument("--guidance-interval", type=interval, metavar="LOW,HIGH", help=INTERVAL_HELP)
    group.add_argument("--stochasticity", type=float, default=0.0, metavar="S", help="share of fresh noise per step, 0 to 1 (default: 0)")


def add_image(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("image")
    group.add_argument("--size", type=size, metavar="WxH", help="width and height in pixels (default: the model's, 64x64 for tim-shapes)")
    group.add_argument("--shift", type=float, default=1.0, metavar="S", help=SHIFT_HELP)
    group.add_argument("--mode", default="transition", choices=["transition", "diffusion"],
                       help="diffusion runs the network as ordinary flow matching (default: transition)")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", metavar="D", help="float32 (fp32), bfloat16 (bf16) or float16 (fp16) (default: as stored)")


# Values


def warn_of_replacing(path: Path) -> None:
    """Say that a file which is there will be replaced."""
    if path.expanduser().is_file():
        logging.warning(f"{path}: exists; replacing it")


def load_pipeline(args: argparse.Namespace, size: tuple[int, int] | None = None):
    """Load --model with --lora and --tile; TimError for a `size` or a tile that it cannot make, before the weights are loaded."""
    from ..pipeline import Pipeline, check_size, check_tile, size_multiple
    from ..weights.parts import read_parts

    parts = read_parts(args.model)
    if size is not None:
        check_size(*size, size_multiple(parts))
    check_tile(args.tile, parts.latent_factor)
    pipe = Pipeline.load(parts, args.device, args.dtype, args.attention, args.lora, args.compile)
    if args.compile:
        logging.warning("--compile: the first image of each size and batch waits for the compiler, up to some minutes")
    pipe.tile = args.tile
    return pipe


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


def storage_dtype(name: str | None):
    if name is None:
        return None
    from ..pipeline import DTYPES

    if name not in DTYPES:
        raise TimError(f"--dtype: '{name}' is unknown; choose from {', '.join(DTYPES)}")
    return DTYPES[name]
