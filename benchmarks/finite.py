"""What the checks for NaN and infinite values cost: images with and without them, in pairs.

    python benchmarks/finite.py [--model tim-shapes] [--size 64x64] [--pairs 40] [--json FILE]

Prints the median time of a 4-step image with the checks over that without them. The goal: at most 1.01.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tim_core import Pipeline, pipeline  # noqa: E402
from tim_core.files import atomic_write  # noqa: E402


class Unrecorded:
    """Stands in for finite.StepRecorder and records nothing."""

    def __init__(self, model):
        self.model = model

    def __call__(self, *inputs):
        return self.model(*inputs)

    def first_bad(self) -> str:
        return "sampling"


@contextlib.contextmanager
def unchecked():
    """Pipeline without its checks."""
    with mock.patch.multiple(pipeline, check_finite=lambda *args, **options: None, StepRecorder=Unrecorded):
        yield


def seconds(pipe, width: int, height: int) -> float:
    if pipe.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    pipe("a red circle", steps=4, cfg=2.5, width=width, height=height)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tim-shapes", help="bundled name, checkpoint or folder of parts (default: tim-shapes)")
    parser.add_argument("--size", default="64x64", help="WIDTHxHEIGHT (default: 64x64)")
    parser.add_argument("--pairs", type=int, default=40, help="images of each kind (default: 40)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to FILE")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    pipe = Pipeline.load(args.model)
    times: dict[str, list[float]] = {"checked": [], "unchecked": []}
    for _ in range(3):
        seconds(pipe, width, height)  # warm-up
    for number in range(args.pairs):
        for kind in ("checked", "unchecked") if number % 2 else ("unchecked", "checked"):
            with unchecked() if kind == "unchecked" else contextlib.nullcontext():
                times[kind].append(seconds(pipe, width, height))
    checked, plain = (statistics.median(times[kind]) for kind in ("checked", "unchecked"))
    spread = statistics.quantiles([a / b for a, b in zip(times["checked"], times["unchecked"])], n=4)
    print(f"{args.model}, {args.size}: {1000 * checked:.2f} ms checked, {1000 * plain:.2f} ms unchecked, ratio {checked / plain:.4f} "
          f"(quartiles of the pairs {spread[0]:.4f} to {spread[2]:.4f})")
    if args.json:
        report = {"model": args.model, "size": args.size, "checked": checked, "unchecked": plain, "ratio": checked / plain}
        atomic_write(Path(args.json), lambda tmp: tmp.write_text(json.dumps(report, indent=1) + "\n"))


if __name__ == "__main__":
    main()
