"""Score upscaling at native resolution: how many correct images stay correct, and how sharp their edges are compared with bicubic.

    python benchmarks/upscale.py [--model M] [--sizes 128,256] [--strengths 0.3,0.5] [--prompts-per-task 15] [--seed 0]

Images of 64x64 are made (4 guided steps, cfg 2.5); those that the detector finds correct are upscaled and checked again. An edge's width
is the distance between 10 % and 90 % of the way from the background to the object's colour, on the profile that all lines across edges
sample together; the median width of single lines is printed next to it. Images rendered at 128 have 0.87 px by the first and 1.46 px by
the second.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tim_core import Pipeline
from tim_core.evaluation.curve import eval_samples  # noqa: E402
from tim_core.shapes import detector, scenes  # noqa: E402
from tim_core.upscale import enlarge  # noqa: E402

BATCH = 16


def edges(image: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Lines across the edges that lie along the axes (the sides of squares and circles, the base of triangles).

    Each is (offsets in pixels from where it falls through 50 %, values from 1 on the object to 0 on the background).
    """
    found = []
    background = np.array(scenes.BACKGROUND) / 255
    for thing in detector.detect(image):
        if thing.shape is None or thing.color is None:
            continue
        way = np.array(scenes.COLORS[thing.color]) / 255 - background
        reach = int(0.8 * thing.radius)
        x, y = int(thing.x), int(thing.y)
        across = (image[y] - background) @ way / (way @ way)
        down = (image[:, x] - background) @ way / (way @ way)
        lines = [(down, thing.y + thing.radius)]
        if thing.shape != "triangle":
            lines += [(across[::-1], image.shape[1] - thing.x + thing.radius), (across, thing.x + thing.radius)]
        for line, edge in lines:
            low, high = max(0, int(edge - reach)), min(len(line), int(edge + reach) + 1)
            falling = line[low:high]
            if (middle := crossing(falling, 0.5)) is not None:
                found.append((np.arange(len(falling)) - middle, falling))
    return found


def crossing(line: np.ndarray, level: float) -> float | None:
    """Where a line that falls from 1 to 0 goes below the level for the first time, between pixels."""
    below = np.flatnonzero(line < level)
    if not len(below) or below[0] == 0:
        return None
    i = int(below[0])
    return i - 1 + (line[i - 1] - level) / (line[i - 1] - line[i])


def width(lines: list[tuple[np.ndarray, np.ndarray]], cell: float = 0.125, reach: float = 8.0) -> float:
    """10-90 % width in pixels of the edge profile that the lines together sample finer than a pixel, as in ISO 12233."""
    offsets, values = (np.concatenate(parts) for parts in zip(*lines))
    cells = np.round(offsets / cell).astype(int)
    used = [k for k in range(int(-reach / cell), int(reach / cell) + 1) if (cells == k).any()]
    profile = np.array([np.median(values[cells == k]) for k in used])

    def at(level: float) -> float:
        place = crossing(profile, level)
        return cell * (used[int(place)] + place % 1 * (used[int(place) + 1] - used[int(place)]))

    return at(0.1) - at(0.9)


def line_width(lines: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """The median over lines of each one's own 10-90 % width, between pixels: an edge narrower than a pixel looks up to twice as wide."""
    places = [(crossing(line, 0.1), crossing(line, 0.9)) for _, line in lines]
    return statistics.median(ten - ninety for ten, ninety in places if ten is not None and ninety is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tim-shapes")
    parser.add_argument("--sizes", default="128,256")
    parser.add_argument("--strengths", default="0.3,0.5,0.7")
    parser.add_argument("--steps", default="8")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--cfg", type=float, default=2.5)
    parser.add_argument("--first-steps", type=int, default=4, help="steps of the images that are upscaled (default: 4)")
    parser.add_argument("--prompts-per-task", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipe = Pipeline.load(args.model)
    made = []
    for sample in tqdm(eval_samples(prompts_per_task=args.prompts_per_task, images=2, seed=args.seed), desc="64x64", leave=False):
        image = pipe(sample.prompt.text, steps=args.first_steps, seed=sample.seed)
        if detector.is_correct(sample.prompt, image[0].numpy()):
            made.append((sample.prompt, image))
    print(f"{len(made)} correct images of 64x64 (seed {args.seed}), {args.steps} steps, {args.stages} stages")
    print("size  strength  stay correct  +-stderr  edge width, px   bicubic   ratio  |  by single lines   bicubic   ratio")
    for side in map(int, args.sizes.split(",")):
        plain = [line for _, image in made for line in edges(enlarge(image, side, side)[0].numpy())]
        for strength in map(float, args.strengths.split(",")):
            correct, lines = 0, []
            for some in tqdm([made[i : i + BATCH] for i in range(0, len(made), BATCH)], desc=f"{side}, {strength}", leave=False):
                options = dict(width=side, steps=args.steps, stages=args.stages, strength=strength, cfg=args.cfg, seed=args.seed)
                images = torch.cat([image for _, image in some])
                for (prompt, _), large in zip(some, pipe.upscale(images, [prompt.text for prompt, _ in some], **options).numpy()):
                    if detector.is_correct(prompt, large):
                        correct += 1
                        lines += edges(large)
            accuracy = correct / len(made)
            error = (accuracy * (1 - accuracy) / len(made)) ** 0.5
            row = f"{side:4}  {strength:8.2f}  {accuracy:12.3f}  {error:8.3f}"
            if lines:
                row += f"  {width(lines):14.2f}  {width(plain):8.2f}  {width(plain) / width(lines):6.2f}"
                row += f"  |  {line_width(lines):15.2f}  {line_width(plain):8.2f}  {line_width(plain) / line_width(lines):6.2f}"
            print(row, flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
