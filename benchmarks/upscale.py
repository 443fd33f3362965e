"""Score upscaling at native resolution: how many correct images stay correct, how sharp their edges are, and how round their circles.

    python benchmarks/upscale.py [--model M] [--sizes 512,1024] [--strengths 0.3,0.5] [--prompts-per-task 15] [--seed 0]

Images of the model's native size are made (4 guided steps); those that the detector finds correct are upscaled and checked again, with one
stage per doubling. An edge's width is the distance between 10 % and 90 % of the way from the background to the object's colour, on the
profile that all lines across edges sample together; the median width of single lines is printed next to it. Images rendered at 128 have
0.87 px by the first and 1.46 px by the second. A circle's overlap is its intersection over union with the ideal circle in its bounding
box, a mean over circles, before and after.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.sharpness import circle_overlaps, edges, line_width, width
from tim_core import Pipeline  # noqa: E402
from tim_core.evaluation.curve import eval_samples  # noqa: E402
from tim_core.shapes import detector  # noqa: E402
from tim_core.upscale import enlarge  # noqa: E402

BATCH = 16


def roundness(images: list[np.ndarray]) -> str:
    """The mean overlap of circles, and how many there are."""
    found = [overlap for image in images for overlap in circle_overlaps(image)]
    return f"{statistics.mean(found):.3f} (n = {len(found)})" if found else "no circles"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tim-shapes")
    parser.add_argument("--sizes", help="sides in pixels (default: twice and four times the native side)")
    parser.add_argument("--strengths", help="start times, comma-separated (default: the model's)")
    parser.add_argument("--steps", default="8", help="steps of a stage (default: 8)")
    parser.add_argument("--stages", type=int, help="number of stages (default: one per doubling)")
    parser.add_argument("--cfg", type=float, default=2.5)
    parser.add_argument("--first-steps", type=int, default=4, help="steps of the images that are upscaled (default: 4)")
    parser.add_argument("--prompts-per-task", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipe = Pipeline.load(args.model)
    native = pipe.defaults.width
    sides = [int(side) for side in args.sizes.split(",")] if args.sizes else [2 * native, 4 * native]
    strengths = [float(strength) for strength in args.strengths.split(",")] if args.strengths else [pipe.defaults.strength]
    made = []
    for sample in tqdm(eval_samples(prompts_per_task=args.prompts_per_task, images=2, seed=args.seed), desc=f"{native}", leave=False):
        image = pipe(sample.prompt.text, steps=args.first_steps, seed=sample.seed)
        if detector.is_correct(sample.prompt, image[0].numpy()):
            made.append((sample.prompt, image))
    before = roundness([image[0].numpy() for _, image in made])
    print(f"{len(made)} correct images of {native}x{native} (seed {args.seed}), {args.steps} steps a stage; circles overlap by {before}")
    print("size  stages  strength  stay correct  +-stderr  edge width, px   bicubic   ratio  |  by single lines   bicubic   ratio"
          "  |  circles")
    for side in sides:
        stages = args.stages or max(1, math.ceil(math.log2(side / native)))
        plain = [line for _, image in made for line in edges(enlarge(image, side, side)[0].numpy())]
        for strength in strengths:
            correct, lines = [], []
            batch = max(1, BATCH * 256**2 // side**2)
            for some in tqdm([made[i : i + batch] for i in range(0, len(made), batch)], desc=f"{side}, {strength}", leave=False):
                options = dict(width=side, steps=args.steps, stages=stages, strength=strength, cfg=args.cfg, seed=args.seed)
                images = torch.cat([image for _, image in some])
                for (prompt, _), large in zip(some, pipe.upscale(images, [prompt.text for prompt, _ in some], **options).numpy()):
                    if detector.is_correct(prompt, large):
                        correct.append(large)
                        lines += edges(large)
            accuracy = len(correct) / len(made)
            error = (accuracy * (1 - accuracy) / len(made)) ** 0.5
            row = f"{side:4}  {stages:6}  {strength:8.2f}  {accuracy:12.3f}  {error:8.3f}"
            if lines:
                row += f"  {width(lines):14.2f}  {width(plain):8.2f}  {width(plain) / width(lines):6.2f}"
                row += f"  |  {line_width(lines):15.2f}  {line_width(plain):8.2f}  {line_width(plain) / line_width(lines):6.2f}"
                row += f"  |  {roundness(correct)}"
            print(row, flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
