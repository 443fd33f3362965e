"""Measure which words of a caption the network reads: is its error smaller with an image's own caption than with one word replaced?

    python benchmarks/words.py [--model M] [--n 64] [--times 0.75,0.8,0.85,0.9] [--seed 0] [--device cuda]

For every word, n images of the model's native size, of captions with it, are noised to --times. Printed: the fraction of images whose
error is smaller with the word than with its replacement (0.5 where the network does not read the word), and the mean difference of the
errors, ± one standard error.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tim_core import Pipeline
from tim_core.shapes import scenes  # noqa: E402
from tim_core.transport import OTFM  # noqa: E402

# word -> the form of caption that has it, and its replacement
EXCHANGES = {
    "left of": ("full position", "right of"), "right of": ("full position", "left of"),
    "above": ("full position", "below"), "below": ("full position", "above"),
    "two": ("full counting", "three"), "three": ("full counting", "four"), "four": ("full counting", "three"),
    "red": ("colors", "purple"), "green": ("colors", "blue"), "blue": ("colors", "green"),
    "yellow": ("colors", "white"), "purple": ("colors", "red"), "white": ("colors", "yellow"),
    "circle": ("single", "square"), "square": ("single", "triangle"), "triangle": ("single", "circle"),
}


@torch.no_grad()
def gaps(pipe: Pipeline, word: str, n: int, times: list[float], seed: int = 0) -> np.ndarray:
    """(n,) increase of the velocity's error when the word is replaced, averaged over the times."""
    form, other = EXCHANGES[word]
    rng, generator, transport = np.random.default_rng([seed, list(EXCHANGES).index(word)]), torch.Generator().manual_seed(seed), OTFM()
    prompts = []
    while len(prompts) < n:
        prompt = scenes.sample_prompt(rng, form)
        prompts += [prompt] if f" {word} " in f" {prompt.text} " else []
    size = pipe.defaults.width, pipe.defaults.height
    images = np.stack([scenes.render(scenes.place(rng, prompt, *size), *size) for prompt in prompts])
    latents = pipe.encode(torch.from_numpy(images))
    captions = [prompt.text for prompt in prompts], [prompt.text.replace(word, other) for prompt in prompts]
    total = torch.zeros(n)
    for time in times:
        noise, t = torch.randn(latents.shape, generator=generator), torch.full((n,), time)
        where = t.view(-1, 1, 1, 1)
        x_t, velocity = transport.interpolate(latents, noise, where), transport.velocity(latents, noise, where)
        errors = []
        for texts in captions:
            y = pipe.text_encoder.conditioning(texts)[0].to(pipe.device, pipe.dtype)
            c_noise = transport.c_noise(t).to(pipe.device)
            F = pipe.transformer(x_t.to(pipe.device, pipe.dtype), c_noise, c_noise, y).float().cpu()
            errors.append((F - velocity).square().mean((1, 2, 3)))
        total += errors[1] - errors[0]
    return total.numpy() / len(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tim-shapes")
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--times", default="0.75,0.8,0.85,0.9")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    pipe = Pipeline.load(args.model, args.device)
    print(f"{args.model}, n = {args.n} per word, seed {args.seed}\n")
    print("| word | replacement | fraction | increase of the error |\n|---|---|---|---|")
    for word, (_, other) in EXCHANGES.items():
        found = gaps(pipe, word, args.n, [float(time) for time in args.times.split(",")], args.seed)
        fraction, mean = (found > 0).mean(), found.mean()
        errors = (fraction * (1 - fraction) / len(found)) ** 0.5, found.std() / len(found) ** 0.5
        print(f"| {word} | {other} | {fraction:.2f} ± {errors[0]:.2f} | {mean:+.4f} ± {errors[1]:.4f} |", flush=True)


if __name__ == "__main__":
    main()
