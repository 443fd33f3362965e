"""Options that several commands share: their types, and what is made of them."""

from __future__ import annotations

import argparse
import re
import time

from ..errors import TimError

INTERVAL_HELP = "times between which guidance acts, ends excluded; an upper end above 1 takes in time 1, the first step (0,1)"
SHIFT_HELP = "more than 1: times nearer to noise (1, equal steps)"


# Types


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"found '{text}', expected WIDTHxHEIGHT in pixels, such as 64x64")
    return int(match[1]), int(match[2])


def whole_numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"found '{text}', expected whole numbers between commas, such as 1,2,4,8") from None


def interval(text: str) -> tuple[float, float]:
    try:
        low, high = (float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"found '{text}', expected LOW,HIGH such as 0,1") from None
    return low, high


def words(text: str) -> list[str]:
    return [word for word in re.split(r"[,\s]+", text) if word]


# Groups


def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the model")
    group.add_argument("--model", default="tim-shapes", metavar="M", help="a bundled name or a one-file checkpoint (tim-shapes)")
    group.add_argument("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda, cuda:1, mps")
    group.add_argument("--dtype", default="auto", help="auto (float32 on a CPU, bfloat16 on a GPU), float32, bfloat16, float16")
    group.add_argument("--attention", default="auto", choices=["auto", "sdpa", "flash"], help="flash needs the flash-attn package")


def add_guidance(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--negative", default="", metavar="N", help="what guidance leads away from (nothing)")
    group.add_argument("--cfg", type=float, default=2.5, help="strength of guidance, 1 is none (2.5)")
    group.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    group.add_argument("--guidance-interval", type=interval, default=(0.0, 1.0), metavar="LOW,HIGH",
                       help=INTERVAL_HELP)
    group.add_argument("--stochasticity", type=float, default=0.0, metavar="S", help="share of fresh noise at each step (0)")


def add_image(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the picture")
    group.add_argument("--size", type=size, default=(64, 64), metavar="WxH", help="width and height in pixels (64x64)")
    group.add_argument("--shift", type=float, default=1.0, metavar="S", help=SHIFT_HELP)
    group.add_argument("--mode", default="transition", choices=["transition", "diffusion"],
                       help="diffusion: the network is not told where it jumps to, as in ordinary flow matching")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", metavar="D", help="float32, bfloat16 or float16 (fp32, bf16, fp16); as stored if not given")


# Use


def load_pipeline(args: argparse.Namespace):
    from ..pipeline import Pipeline

    return Pipeline.load(args.model, args.device, args.dtype, args.attention)


def settings(args: argparse.Namespace) -> dict:
    width, height = args.size
    names = ("negative", "cfg", "seed", "guidance_interval", "stochasticity", "shift", "mode")
    return {"width": width, "height": height, **{name: getattr(args, name) for name in names}}


def timed(pipe, prompts: list[str], steps: int, times: str | None = None, **options):
    """-> pictures, seconds; with a progress bar over the steps."""
    from tqdm import tqdm

    from .. import schedule

    total = steps if times is None else len(schedule.parse(times)) - 1
    with tqdm(total=max(0, total), unit="step", desc=f"{total} step{'s' if total != 1 else ''}", leave=False) as bar:
        started = time.perf_counter()
        images = pipe(prompts, steps=steps, times=times, callback=lambda state: bar.update(), **options)
        return images, time.perf_counter() - started


def storage_dtype(name: str | None):
    if name is None:
        return None
    from ..pipeline import DTYPES

    if name not in DTYPES:
        raise TimError(f"--dtype: found '{name}', expected {', '.join(DTYPES)}")
    return DTYPES[name]
