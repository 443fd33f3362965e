"""Scores in the small world by GenEval's protocol: report.json and curve.png."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .errors import TimError
from .files import write_whole
from .shapes import TASKS, Prompt, judge, scoring_prompts

STEPS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Draw:
    """One picture to make: the prompt, and the seed of its noise (`tim sample` with that seed makes the same picture)."""

    prompt: Prompt
    seed: int


def draws(tasks: Sequence[str] = TASKS, prompts_per_task: int = 60, images: int = 4, seed: int = 0) -> list[Draw]:
    """The pictures of a score, fixed by `seed`: `images` for each of `prompts_per_task` prompts a task, each with its own noise."""
    return [
        Draw(prompt, ((seed * len(TASKS) + TASKS.index(task)) * 100_000 + n * images + k) % 2**63)
        for task in tasks
        for n, prompt in enumerate(scoring_prompts(task, prompts_per_task, seed))
        for k in range(images)
    ]


def score(
    pipe, wanted: Sequence[Draw], steps: int, cfg: float, width: int = 64, height: int = 64, batch: int = 120, bar=None, **options
) -> np.ndarray:
    """Makes and judges every picture -> (N,) bool, in the order of `wanted`. `options` go to the pipeline; `bar` is a tqdm bar."""
    right = np.zeros(len(wanted), bool)
    order = sorted(range(len(wanted)), key=lambda i: len(wanted[i].prompt.text.split()))  # equal lengths run together
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        noise = torch.cat([pipe.noise(1, width, height, wanted[i].seed) for i in some])
        texts = [wanted[i].prompt.text for i in some]
        pictures = pipe(texts, steps=steps, cfg=cfg, width=width, height=height, noise=noise, **options)
        for i, picture in zip(some, pictures.numpy()):
            right[i] = judge(wanted[i].prompt, picture)
        if bar is not None:
            bar.update(len(some))
    return right


def summarise(wanted: Sequence[Draw], right: np.ndarray) -> dict:
    """{"n", "overall", "stderr", "tasks"}: the plain mean of the tasks' shares, its error sqrt(sum p_k (1 - p_k) / n_k) / K."""
    names = np.array([draw.prompt.task for draw in wanted])
    shares = {task: right[names == task] for task in TASKS if task in names}
    tasks = {task: float(some.mean()) for task, some in shares.items()}
    variance = sum(p * (1 - p) / len(shares[task]) for task, p in tasks.items())
    return {"n": len(wanted), "overall": sum(tasks.values()) / len(tasks), "stderr": math.sqrt(variance) / len(tasks), "tasks": tasks}


def evaluate(
    pipe,
    steps: Sequence[int] = STEPS,
    cfg: float = 2.5,
    prompts_per_task: int = 60,
    images: int = 4,
    seed: int = 0,
    output: str | Path | None = None,
    *,
    tasks: Sequence[str] = TASKS,
    width: int = 64,
    height: int = 64,
    batch: int = 120,
    progress: bool = True,
    **options,
) -> dict:
    """The curve over `steps`, as report.json holds it; written to the folder `output`, with curve.png, after every point.

    All points have the same prompts and noise. 1 step runs without guidance (its one step, at t = 1, has none anyway).
    `options` go to the pipeline (mode, negative, ...). TimError for values that cannot be used or a folder that cannot be written.
    """
    from tqdm import tqdm

    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise TimError(f"tasks: found {', '.join(unknown) or 'none'}, expected some of {', '.join(TASKS)}")
    for name, values in (("steps", steps), ("prompts per task", [prompts_per_task]), ("images", [images]), ("batch", [batch])):
        if not values or any(value < 1 for value in values):
            raise TimError(f"{name}: found {', '.join(map(str, values)) or 'none'}, expected whole numbers of at least 1")
    for name, value in (("seed", seed), ("cfg", cfg)):
        if not (math.isfinite(value) and value >= 0):
            raise TimError(f"{name}: found {value}, expected a number of at least 0")
    folder = None if output is None else Path(output).expanduser()
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TimError(f"{folder}: cannot be made ({error.strerror}), expected a folder to write the report into") from None
    wanted = draws(tasks, prompts_per_task, images, seed)
    steps = sorted(set(steps))
    report: dict = {"curve": []}
    with tqdm(total=len(wanted) * len(steps), unit="picture", disable=not progress) as bar:
        for count in steps:
            guided = cfg if count > 1 else 1.0
            bar.set_description(f"{count} step{'s' if count > 1 else ''}")
            right = score(pipe, wanted, count, guided, width, height, batch, bar, **options)
            report["curve"].append({"steps": count, "cfg": guided, "nfe": pipe.nfe, **summarise(wanted, right)})
            if folder is not None:
                write_report(report, folder)
    return report


def write_report(report: dict, folder: Path) -> None:
    """report.json and curve.png; TimError if they cannot be written."""
    text, picture = json.dumps(report, indent=2) + "\n", draw_curve(report["curve"])
    write_whole(folder / "report.json", lambda beside: beside.write_text(text, encoding="utf-8"))
    write_whole(folder / "curve.png", lambda beside: picture.save(beside, format="PNG"))


def draw_curve(curve: Sequence[dict], width: int = 900, height: int = 600):
    """Score against network evaluations (log axis), with two standard errors up and down -> PIL picture."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (width, height), "white")
    pen, font, small = ImageDraw.Draw(picture), ImageFont.load_default(size=18), ImageFont.load_default(size=15)
    left, top, right, bottom = 80, 50, width - 30, height - 80
    first, last = left + 50, right - 50  # of the axis of evaluations
    most = max(2.0, *(point["nfe"] for point in curve))

    def at(nfe: float, value: float) -> tuple[float, float]:
        return first + (last - first) * math.log(nfe) / math.log(most), bottom - (bottom - top) * value

    for tenth in range(0, 11, 2):
        _, y = at(1, tenth / 10)
        pen.line((left, y, right, y), "#dddddd")
        pen.text((left - 12, y), f"{tenth / 10:.1f}", "#444444", font, "rm")
    for power in range(int(math.log2(most)) + 1):
        x, _ = at(2**power, 0)
        pen.line((x, top, x, bottom), "#eeeeee")
        pen.text((x, bottom + 8), str(2**power), "#444444", font, "mt")
    pen.rectangle((left, top, right, bottom), outline="#888888")
    pen.text(((left + right) / 2, height - 20), "network evaluations per picture", "#222222", font, "mb")
    pen.text((left, 14), "share of right pictures, mean of the tasks (bars: two standard errors)", "#222222", font)
    places = [at(point["nfe"], point["overall"]) for point in curve]
    pen.line(places, "#2060c0", 3)
    for (x, y), point in zip(places, curve):
        up, down = (at(1, min(1, max(0, point["overall"] + sign * 2 * point["stderr"])))[1] for sign in (1, -1))
        pen.line((x, up, x, down), "#2060c0", 2)
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), "#2060c0")
        steps = f"{point['steps']} step{'s' if point['steps'] > 1 else ''}"
        above = y - top > 50
        pen.multiline_text((x, up - 6 if above else down + 6), f"{steps}\n{point['overall']:.2f}", "#222222", small,
                           "md" if above else "ma", align="center")
    return picture
