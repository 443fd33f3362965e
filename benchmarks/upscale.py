"""Score upscaling at native resolution: how many correct images stay correct, and how sharp their edges are compared with bicubic.

    python benchmarks/upscale.py [--model M] [--sizes 128,256] [--strengths 0.3,0.5] [--prompts-per-task 15] [--seed 0]

Images of 64x64 are made (4 guided steps, cfg 2.5); those that the detector finds correct are upscaled and checked again. An edge's width
is the distance between 10 % and 90 % of the way from the background to the object's colour, on the profile that all lines across edges
sample together; the median width of single lines is printed next to it. Images rendered at 128 have 0.87 px by the first and 1.46 px by
the second.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.sharpness import edges, line_width, width
from tim_core import Pipeline  # noqa: E402
from tim_core.evaluation.curve import eval_samples  # noqa: E402
from tim_core.shapes import detector  # noqa: E402
from tim_core.upscale import enlarge  # noqa: E402

BATCH = 16


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
