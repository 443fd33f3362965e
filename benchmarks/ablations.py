"""Train variants of one small model from scratch on the same images, and score them.

    python benchmarks/ablations.py --seeds 0,1,2 --only paper,jvp,baseline    train and score what is missing, print the table
    python benchmarks/ablations.py --table                                    print the table of finished runs

Every run is a folder in --folder (~/tim-runs/ablations). To resume an interrupted run, repeat the command. The network is small and draws
single objects at 48x48; the tasks `single` and `colors` are scored.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tim_core import Pipeline  # noqa: E402
from tim_core.evaluation.curve import difference, eval_samples, evaluate, unpack  # noqa: E402
from tim_core.training import run  # noqa: E402

TASKS, STEPS, PROMPTS, IMAGES = ("single", "colors"), (1, 2, 4, 16), 60, 4
PAPER = {"epsilon": 0.005, "diffusion_ratio": 0.5, "consistency_ratio": 0.1}
FLOW_MATCHING = {"diffusion_ratio": 1.0, "consistency_ratio": 0.0}
VARIANTS: dict[str, dict] = {
    "paper": {},
    "baseline": {"objective": FLOW_MATCHING},
    "jvp": {"objective": {"derivative": "jvp"}},
    "no-interval-attention": {"transformer": {"distance_aware": False}},
    "no-decoupled-embedding": {"transformer": {"use_new_embed": False}},
    "no-time-weighting": {"objective": {"weight_time_type": "constant"}},
    "ratio-0": {"objective": {"diffusion_ratio": 0.0}},
    "ratio-0.8": {"objective": {"diffusion_ratio": 0.8}},
    "epsilon-0.0005": {"objective": {"epsilon": 0.0005}},
    "epsilon-0.05": {"objective": {"epsilon": 0.05}},
    "composed": {"objective": {"target": "composed", "adaptive_floor": 0.1}},
    "curriculum": {"objective": FLOW_MATCHING, "objective_from": {"600": PAPER}},
    "curriculum-one-embedding": {"objective": FLOW_MATCHING, "objective_from": {"600": PAPER}, "transformer": {"use_new_embed": False}},
    "nearer-noise": {"p_mean": 0.8},
    "matched": {"matching": {"batch_fraction": 0.5, "paths": [[1.0, 0.0], [0.75, 0.0]]}},
}


def configuration(variant: str, seed: int, folder: Path, steps: int, batch: int, compile: bool) -> dict:
    change = VARIANTS[variant]
    made = {
        "kind": "tim", "output": str(folder), "autoencoder": str(ROOT / "tim_core/bundled/tim-shapes.safetensors"),
        "transformer": {"hidden_size": 128, "depth": 4, "num_heads": 2, "lora_hidden_size": 32, **change.get("transformer", {})},
        "text": {"hidden_size": 64, "layers": 1, "heads": 1, "head_dim": 64, "intermediate_size": 128},
        "objective": {**PAPER, **change.get("objective", {})},
        "data": {"sizes": {"48x48": 1.0}, "forms": {"single": 0.5, "colors": 0.5}},
        "loop": {"steps": steps, "batch": batch, "optimizer": "muon", "lr": 0.003, "muon_lr": 0.03, "ema": 0.995, "seed": seed,
                 "warmup": 100, "save_every": 300, "keep": 1, "compile": compile},
    }
    return made | {key: value for key, value in change.items() if key not in ("transformer", "objective")}


def train_and_score(variant: str, seed: int, args: argparse.Namespace) -> None:
    folder = Path(args.folder).expanduser() / f"{variant}-{seed}"
    config, text = folder / "config.yaml", yaml.safe_dump(configuration(variant, seed, folder, args.steps, args.batch, args.compile))
    if config.exists() and config.read_text() != text:
        raise SystemExit(f"{config}: differs from the requested configuration; choose another --folder")
    if set(STEPS) <= scored(folder).keys():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config.write_text(text)
    (model,) = run([config])
    mode = "diffusion" if variant == "baseline" else "transition"
    evaluate(Pipeline.load(model, device=args.device), STEPS, 2.5, PROMPTS, IMAGES, seed=0, output=folder / "scores", tasks=TASKS,
             width=48, height=48, mode=mode)


def scored(folder: Path) -> dict[int, dict]:
    """Step count -> point of the report, for the step counts scored so far."""
    report = folder / "scores" / "report.json"
    return {point["steps"]: point for point in json.loads(report.read_text())["curve"]} if report.exists() else {}


def rows(folder: Path) -> list[str]:
    """Rows of a Markdown table: scores, and differences from `paper` on the same prompts and noise, over the seeds that both have."""
    found: dict[str, dict[str, dict]] = {}
    for variant in VARIANTS:
        for place in sorted(folder.glob(f"{variant}-[0-9]*")):
            name, seed = place.name.rsplit("-", 1)
            if name == variant and set(STEPS) <= (points := scored(place)).keys():
                found.setdefault(variant, {})[seed] = points
    samples = eval_samples(TASKS, PROMPTS, IMAGES, seed=0)
    lines = ["| variant | seeds | 1 step | 2 | 4 | 16 | over paper: 1 step | 2 | 4 | 16 |", "|---|---|---|---|---|---|---|---|---|---|"]
    for variant, runs in found.items():
        shared = [seed for seed in runs if seed in found.get("paper", {})] if variant != "paper" else []
        cells = [mean_over_seeds([(points[steps]["overall"], points[steps]["stderr"]) for points in runs.values()], "") for steps in STEPS]
        for steps in STEPS:
            pairs = [(unpack(found["paper"][seed][steps]["correct"]), unpack(runs[seed][steps]["correct"])) for seed in shared]
            cells.append(mean_over_seeds([tuple(difference(samples, *pair).values()) for pair in pairs], "+"))
        lines.append(f"| {variant} | {len(runs)} | {' | '.join(cells)} |")
    return lines


def mean_over_seeds(values: list[tuple[float, float]], sign: str) -> str:
    """Mean over seeds of (value, standard error); its error is the larger of the errors within and between seeds."""
    if not values:
        return ""
    mean = sum(value for value, _ in values) / len(values)
    within = sum(error**2 for _, error in values) / len(values) ** 2
    between = sum((value - mean) ** 2 for value, _ in values) / max(1, len(values) - 1) / len(values)
    return f"{mean:{sign}.3f} ± {math.sqrt(max(within, between)):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="~/tim-runs/ablations")
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, separated by commas (default: all)")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--table", action="store_true", help="print the table only")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.table:
        for seed in map(int, args.seeds.split(",")):
            for variant in args.only.split(","):
                train_and_score(variant, seed, args)
    print("\n".join(rows(Path(args.folder).expanduser())))


if __name__ == "__main__":
    main()
