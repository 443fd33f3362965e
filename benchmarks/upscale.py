"""What upscaling at native resolution does to right pictures: how many stay right, and how sharp their edges are beside bicubic.

    python benchmarks/upscale.py [--model M] [--sizes 128,256] [--strengths 0.3,0.5] [--prompts-per-task 15] [--seed 0]

Pictures of 64 x 64 are made (4 guided steps), those that the detector calls right are upscaled, and judged again. An edge's width is
the distance between 10 % and 90 % of the way from the background to the object's colour, on a line through its middle.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tim_core import Pipeline, shapes  # noqa: E402
from tim_core.evaluate import draws  # noqa: E402
from tim_core.upscale import enlarge  # noqa: E402


def edge_widths(picture: np.ndarray) -> list[float]:
    """10-90 % widths in pixels of the edges that lie across the axes: the sides of squares and circles, the base of triangles."""
    widths = []
    background = np.array(shapes.BACKGROUND) / 255
    for thing in shapes.detect(picture):
        if thing.shape is None or thing.color is None:
            continue
        way = np.array(shapes.COLORS[thing.color]) / 255 - background
        reach = int(0.8 * thing.radius)
        x, y = int(thing.x), int(thing.y)
        across = (picture[y] - background) @ way / (way @ way)
        down = (picture[:, x] - background) @ way / (way @ way)
        lines = [(down, thing.y + thing.radius)]
        if thing.shape != "triangle":
            lines += [(across[::-1], picture.shape[1] - thing.x + thing.radius), (across, thing.x + thing.radius)]
        for line, edge in lines:
            low, high = max(0, int(edge - reach)), min(len(line), int(edge + reach) + 1)
            falling = line[low:high]
            ten, ninety = crossing(falling, 0.1), crossing(falling, 0.9)
            if ten is not None and ninety is not None and ten > ninety:
                widths.append(ten - ninety)
    return widths


def crossing(line: np.ndarray, level: float) -> float | None:
    """Where a line that falls from 1 to 0 goes below the level for the first time, between pixels."""
    below = np.flatnonzero(line < level)
    if not len(below) or below[0] == 0:
        return None
    i = int(below[0])
    return i - 1 + (line[i - 1] - level) / (line[i - 1] - line[i])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tim-shapes")
    parser.add_argument("--sizes", default="128,256")
    parser.add_argument("--strengths", default="0.3,0.5,0.7")
    parser.add_argument("--steps", default="8")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--prompts-per-task", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipe = Pipeline.load(args.model)
    made = []
    for draw in tqdm(draws(prompts_per_task=args.prompts_per_task, images=2, seed=args.seed), desc="64 x 64", leave=False):
        picture = pipe(draw.prompt.text, steps=4, cfg=2.5, seed=draw.seed)
        if shapes.judge(draw.prompt, picture[0].numpy()):
            made.append((draw.prompt, picture))
    print(f"{len(made)} right pictures of 64 x 64 (seed {args.seed}), {args.steps} steps, {args.stages} stages")
    print("size  strength  still right  +-stderr  edge width, px   bicubic, px   ratio")
    for side in map(int, args.sizes.split(",")):
        plain = [width for _, picture in made for width in edge_widths(enlarge(picture, side, side)[0].numpy())]
        for strength in map(float, args.strengths.split(",")):
            right, widths = 0, []
            for prompt, picture in tqdm(made, desc=f"{side}, {strength}", leave=False):
                options = dict(width=side, steps=args.steps, stages=args.stages, strength=strength)
                large = pipe.upscale(picture, prompt.text, **options)[0].numpy()
                if shapes.judge(prompt, large):
                    right += 1
                    widths += edge_widths(large)
            share = right / len(made)
            error = (share * (1 - share) / len(made)) ** 0.5
            width, bicubic = statistics.median(widths) if widths else float("nan"), statistics.median(plain)
            sharp = f"{width:14.2f}  {bicubic:12.2f}  {bicubic / width:6.2f}"
            print(f"{side:4}  {strength:8.2f}  {share:11.3f}  {error:8.3f}  {sharp}", flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
