"""What an autoencoder loses on coloured shapes: detector accuracy on reconstructed scenes, edge width and roundness of circles.

    python benchmarks/autoencoder.py [--model FILE] [--sizes 256x256,512x512] [--n 100] [--noise 0.2] [--seed 123] [--json FILE]

Renders n scenes per task and size, encodes and decodes them, without noise and with Gaussian noise of `--noise` standard deviations of
the latents, and scores the result as samples are scored. Also printed, without noise, for the reconstruction and for the rendered truth:
the 10-90 % width of edges in pixels, and the overlap (intersection over union) of circles with the ideal circle in their bounding box;
and how local latents are: the fraction of the colours' variance that a linear map of the latents explains, the ratio of the latents'
variance within plain background to that of all latents (0: background has one latent everywhere), and the mean squared difference between
the latents of the central crop, half as high and wide, with and without the rest of the image, over the variance of all latents (0: they
do not depend on the rest).

The bar: accuracy of at least 0.97 in every task, 0.95 with noise, edges at most 1.5 times as wide as the renderer's, at every size.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.sharpness import circle_overlaps, edge_width
from tim_core.files import atomic_write  # noqa: E402
from tim_core.shapes import scenes  # noqa: E402
from tim_core.shapes.detector import is_correct  # noqa: E402
from tim_core.training.autoencoder import crop_error, unexplained_colors  # noqa: E402
from tim_core.training.samples import grid  # noqa: E402
from tim_core.weights.load import load_autoencoder  # noqa: E402

ACCURACY, NOISED_ACCURACY, EDGE_RATIO = 0.97, 0.95, 1.5
BATCH_PIXELS = 8 * 256 * 256


def truth(task: str, n: int, seed: int, size: tuple[int, int]) -> list[tuple[scenes.Prompt, np.ndarray]]:
    """n prompts of a task and their rendered scenes (height, width, 3) in [0, 1], the same for the same seed and size."""
    rng = np.random.default_rng([seed, scenes.TASKS.index(task), *size])
    prompts = scenes.scoring_prompts(task, n, seed)
    return [(prompt, scenes.render(scenes.place(rng, prompt, *size), *size)) for prompt in prompts]


def accuracy(correct: dict[str, list[bool]]) -> dict:
    """Accuracy per task, their mean and its standard error, sqrt(sum p (1 - p) / n) / tasks."""
    tasks = {task: float(np.mean(found)) for task, found in correct.items()}
    variance = sum(p * (1 - p) / len(correct[task]) for task, p in tasks.items())
    return {"mean": float(np.mean(list(tasks.values()))), "stderr": variance**0.5 / len(tasks), "tasks": tasks}


def background(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, h, w) for images (B, 3, H, W) in [-1, 1]: whether a latent's patch and the eight around it are plain background. size: (h, w)."""
    color = torch.tensor(scenes.BACKGROUND).view(3, 1, 1) / 127.5 - 1
    drawn = F.adaptive_max_pool2d(((images - color).abs() > 0.01).any(1, keepdim=True).float(), size)
    return F.max_pool2d(drawn, 3, 1, 1)[:, 0] == 0


def locality(latents: torch.Tensor, colors: torch.Tensor, plain: torch.Tensor) -> dict:
    """Of latents (B, C, h, w): the fraction of the variance of colours (B, 3, 4h, 4w) that a linear map of them explains, and the ratio of
    their variance where `plain` (B, h, w) to that of all: None if fewer than two are plain."""
    found = latents.permute(0, 2, 3, 1)[plain]
    ratio = float(found.var(0).sum() / latents.var((0, 2, 3)).sum()) if len(found) > 1 else None
    return {"colors_explained": 1 - float(unexplained_colors(latents, colors)), "background_variance_ratio": ratio}


@torch.no_grad()
def measure(model, size: tuple[int, int], n: int, noise: float, seed: int) -> tuple[dict, list[np.ndarray]]:
    """The scores of one (width, height), and rows of images to look at: truth, reconstruction, reconstruction from a noised latent."""
    generator = torch.Generator().manual_seed(seed)
    items = [(task, *item) for task in scenes.TASKS for item in truth(task, n, seed, size)]
    correct: dict[str, dict[str, list[bool]]] = {kind: {task: [] for task in scenes.TASKS} for kind in ("clean", "noised")}
    reconstructed, noised, latents, colors, plain, crop = [], [], [], [], [], 0.0
    step = max(1, BATCH_PIXELS // (size[0] * size[1]))
    for i in tqdm(range(0, len(items), step), desc="x".join(map(str, size)), leave=False):
        images = torch.from_numpy(np.stack([image for _, _, image in items[i : i + step]])).permute(0, 3, 1, 2) * 2 - 1
        latents.append(model.encode(images))
        height, width = latents[-1].shape[2:]
        colors.append(F.adaptive_avg_pool2d(images, (4 * height, 4 * width)))
        plain.append(background(images, (height, width)))
        crop += float(crop_error(model, images, latents[-1], (0.5, 0.5))) * len(images) / len(items)
        reconstructed += decoded(model, latents[-1])
    latent = torch.cat(latents)
    spread = float(latent.std())
    for some in latent.split(step):
        noised += decoded(model, some + noise * spread * torch.randn(some.shape, generator=generator))
    for (task, prompt, _), clean, shaken in zip(items, reconstructed, noised):
        correct["clean"][task].append(is_correct(prompt, clean))
        correct["noised"][task].append(is_correct(prompt, shaken))
    rendered = [image for _, _, image in items]
    widths = edge_width(rendered), edge_width(reconstructed)
    circles = [[overlap for image in images for overlap in circle_overlaps(image)] for images in (rendered, reconstructed)]
    found = {
        "n": n, "latent_std": spread, **locality(latent, torch.cat(colors), torch.cat(plain)),
        "crop_error": crop / float(latent.var((0, 2, 3)).mean()),
        "clean": accuracy(correct["clean"]), "noised": accuracy(correct["noised"]),
        "edge_width": {"truth": widths[0], "reconstructed": widths[1], "ratio": widths[1] / widths[0] if widths[1] else None},
        "circle_overlap": {"truth": float(np.mean(circles[0])), "n_truth": len(circles[0]),
                           "reconstructed": float(np.mean(circles[1])) if circles[1] else None, "n_reconstructed": len(circles[1])},
    }
    places = range(0, len(items), max(1, len(items) // 12))
    return found, [np.stack([images[i] for i in places][:12]) for images in (rendered, reconstructed, noised)]


def decoded(model, latent: torch.Tensor) -> list[np.ndarray]:
    """Images (height, width, 3) in [0, 1] of latents (B, C, h, w)."""
    return list(model.decode(latent).add(1).div(2).clamp(0, 1).permute(0, 2, 3, 1).contiguous().numpy())


def failures(found: dict[str, dict]) -> list[str]:
    """What is below the bar, one line each, of {size: scores}."""
    lines = []
    for size, scores in found.items():
        for kind, least in (("clean", ACCURACY), ("noised", NOISED_ACCURACY)):
            lines += [f"{size}: {task}, {kind}: {p:.3f} is below {least}" for task, p in scores[kind]["tasks"].items() if p < least]
        ratio = scores["edge_width"]["ratio"]
        if ratio is None:
            lines.append(f"{size}: no edges found in the reconstruction")
        elif ratio > EDGE_RATIO:
            lines.append(f"{size}: edges {ratio:.2f} times as wide as the renderer's, above {EDGE_RATIO}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tim-shapes", help="a file that holds an autoencoder (default: tim-shapes)")
    parser.add_argument("--sizes", default="256x256,192x384,384x192,512x512", help="WIDTHxHEIGHT, comma-separated (default: %(default)s)")
    parser.add_argument("--n", type=int, default=100, help="scenes per task and size (default: 100)")
    parser.add_argument("--noise", type=float, default=0.2, help="in standard deviations of the latents (default: 0.2)")
    parser.add_argument("--seed", type=int, default=123, help="of scenes and noise (default: 123)")
    parser.add_argument("--json", metavar="FILE", help="write the results to FILE")
    parser.add_argument("--sheet", metavar="FILE", help="write a contact sheet of the first size: truth, reconstruction, with noise")
    args = parser.parse_args()
    model = load_autoencoder(args.model, dtype=torch.float32).eval()
    found: dict[str, dict] = {}
    print(f"{args.model}: n = {args.n} per task, seed {args.seed}, noise {args.noise}")
    names = " ".join(f"{task:>11}" for task in scenes.TASKS)
    print(f"size     | mean          | noised        | {names} | edges (px, ratio) | circles (truth) | colours | background | crop")
    for size in args.sizes.split(","):
        width, height = map(int, size.split("x"))
        scores, rows = measure(model, (width, height), args.n, args.noise, args.seed)
        if args.sheet and not found:
            sheet = grid([torch.from_numpy(row).permute(0, 3, 1, 2) * 2 - 1 for row in rows])
            sheet.save(args.sheet)
        found[size] = scores
        clean, noised, edge, circle = (scores[name] for name in ("clean", "noised", "edge_width", "circle_overlap"))
        tasks = " ".join(f"{clean['tasks'][task]:5.3f}/{noised['tasks'][task]:5.3f}" for task in scenes.TASKS)
        means = " | ".join(f"{score['mean']:.3f} ± {score['stderr']:.3f}" for score in (clean, noised))
        edges_found = f"{edge['reconstructed']:10.2f} {edge['ratio']:6.2f}" if edge["ratio"] else f"{'-':>17}"
        circles_found = f"{circle['reconstructed']:.3f}" if circle["n_reconstructed"] else "-"
        ratio = scores["background_variance_ratio"]
        local = f"{scores['colors_explained']:7.3f} | " + ("-" if ratio is None else f"{ratio:.3f}") + f" | {scores['crop_error']:.3f}"
        print(f"{size:8} | {means} | {tasks} | {edges_found} | {circles_found} ({circle['truth']:.3f}) | {local}", flush=True)
    wrong = failures(found)
    print("\n".join(wrong) if wrong else "passes the bar")
    if args.json:
        report = {"model": str(args.model), "seed": args.seed, "noise": args.noise, "passes": not wrong, "sizes": found}
        atomic_write(Path(args.json), lambda tmp: tmp.write_text(json.dumps(report, indent=1) + "\n"))


if __name__ == "__main__":
    main()
