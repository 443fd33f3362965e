"""Accuracy on coloured shapes by GenEval's protocol, over step counts: report.json and curve.png."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import TimError
from ..files import atomic_write, check_new_output, make_folder, parse_json, read_text, user_path
from ..limits import MAX_BATCH, MAX_CFG, MAX_STEPS
from ..processes import ALONE, Processes
from ..ranges import MOST_NUMBERS, check_counts
from ..sampler import check_guidance, check_seed
from ..shapes.detector import is_correct
from ..shapes.scenes import TASKS, Prompt, scoring_prompts

MOST_SEEDS = 100_000  # of a task's images, after which the next task's begin
STEPS = (1, 2, 4, 8, 16, 32, 64)
LABELS = ("name", "version")  # entries of a report's model that images do not depend on
FILES = ("report.json", "curve.png")
SAMPLING = ("mode", "shift", "guidance_interval", "stochasticity", "negative")  # pipeline options that a report records


@dataclass(frozen=True)
class EvalSample:
    """One image to make: its prompt, and the seed of its noise. `tim sample` with that seed makes the same image."""

    prompt: Prompt
    seed: int


def eval_samples(tasks: Sequence[str] = TASKS, prompts_per_task: int = 60, images: int = 4, seed: int = 0) -> list[EvalSample]:
    """The samples of a score: `images` per prompt, each with its own noise. They depend on the arguments alone."""
    return [
        EvalSample(prompt, ((seed * len(TASKS) + TASKS.index(task)) * MOST_SEEDS + n * images + k) % 2**63)
        for task in tasks
        for n, prompt in enumerate(scoring_prompts(task, prompts_per_task, seed))
        for k in range(images)
    ]


def score(
    pipe, samples: Sequence[EvalSample], steps: int, cfg: float, width: int | None = None, height: int | None = None, batch: int = 120,
    bar=None, processes: Processes = ALONE, **options
) -> np.ndarray:
    """Make every image and check it -> (N,) bool, in the order of `samples`. `options` go to the pipeline; `bar` is a tqdm bar.

    width, height: in pixels (default: the model's native size). Several processes share the images, and each returns the whole result.
    """
    correct = torch.zeros(len(samples))
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].prompt.text.split()))  # prompts of equal length share a batch
    shard = processes.shard(order)
    for start in range(0, len(shard), batch):
        indices = shard[start : start + batch]
        prompts, seeds = [samples[i].prompt.text for i in indices], [samples[i].seed for i in indices]
        images = pipe(prompts, steps=steps, cfg=cfg, width=width, height=height, seed=seeds, **options)
        for i, image in zip(indices, images.numpy()):
            correct[i] = float(is_correct(samples[i].prompt, image))
        if bar is not None:
            bar.update(len(indices))
    return processes.total(correct).cpu().numpy() > 0.5


def summarise(samples: Sequence[EvalSample], correct: np.ndarray) -> dict:
    """{"n", "overall", "stderr", "tasks"}: the mean of the tasks' accuracies, with standard error sqrt(sum p_k (1 - p_k) / n_k) / K."""
    by_task = _by_task(samples, correct)
    accuracy = {task: float(values.mean()) for task, values in by_task.items()}
    variance = sum(p * (1 - p) / len(by_task[task]) for task, p in accuracy.items())
    overall = sum(accuracy.values()) / len(accuracy)
    return {"n": len(samples), "overall": overall, "stderr": math.sqrt(variance) / len(accuracy), "tasks": accuracy}


def difference(samples: Sequence[EvalSample], before: np.ndarray, after: np.ndarray) -> dict:
    """{"difference", "stderr"} of the overall accuracy, paired by image: the same prompts and noise in both."""
    changes = _by_task(samples, after.astype(float) - before.astype(float)).values()
    variance = sum(float(values.var()) / len(values) for values in changes)
    return {"difference": sum(float(values.mean()) for values in changes) / len(changes), "stderr": math.sqrt(variance) / len(changes)}


def _by_task(samples: Sequence[EvalSample], values: np.ndarray) -> dict[str, np.ndarray]:
    names = np.array([sample.prompt.task for sample in samples])
    return {task: values[names == task] for task in TASKS if task in names}


def regressions(samples: Sequence[EvalSample], curve: Sequence[dict]) -> list[dict]:
    """Pairs of points where more steps are worse by over two paired standard errors; none if the curve is monotone."""
    found = []
    for later, point in enumerate(curve):
        for earlier in curve[:later]:
            change = difference(samples, unpack(earlier["correct"]), unpack(point["correct"]))
            if change["difference"] < -2 * change["stderr"]:
                found.append({"from": earlier["steps"], "to": point["steps"], **change})
    return found


def pack(correct: np.ndarray) -> str:
    """One character per sample, in the order of `eval_samples`: 1 if its image is correct, else 0."""
    return "".join("01"[int(one)] for one in correct)


def unpack(text: str) -> np.ndarray:
    """The inverse of `pack` -> (N,) bool."""
    return np.array([letter == "1" for letter in text])


def check_protocol(steps: Sequence[int], prompts_per_task: int, images: int, batch: int, tasks: Sequence[str]) -> None:
    """TimError for tasks that are unknown, and for amounts that `evaluate` cannot make."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        problem = f"{', '.join(map(repr, unknown))} {'is' if len(unknown) == 1 else 'are'} unknown" if unknown else "none given"
        raise TimError(f"tasks: {problem}; choose from {', '.join(TASKS)}")
    check_counts(steps, "steps", distinct=False)
    most = {"prompts per task": MOST_SEEDS, "images": MAX_BATCH, "batch": MAX_BATCH}
    for (name, limit), value in zip(most.items(), (prompts_per_task, images, batch)):
        if not 1 <= value <= limit:
            raise TimError(f"{name}: {value} is not a whole number from 1 to {limit}")
    if prompts_per_task * images > MOST_SEEDS:
        raise TimError(f"prompts per task: {prompts_per_task} with {images} images each; use at most {MOST_SEEDS // images}")


def check_folder(folder: str | Path, inputs: Sequence[str | Path | None]) -> None:
    """TimError if `evaluate` cannot write its files to a folder, or would replace an input. Makes nothing."""
    for name in FILES:
        check_new_output(user_path(folder) / name, inputs)


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
    width: int | None = None,
    height: int | None = None,
    batch: int = 120,
    baseline: str | Path | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
    model: dict | None = None,
    **options,
) -> dict:
    """Score `pipe` at several step counts -> the content of report.json.

    All step counts share prompts and noise. A point's "cfg" is 1 where no step was guided, as for 1 step by default.
    width, height: in pixels (default: the model's native size).
    output: folder for report.json and curve.png, written after every step count. Points that its report holds of the same weights,
    protocol and sampling are kept.
    baseline: report.json of another model, same protocol; compared image by image and drawn in the same chart.
    model: what the report says of the model ("name", "weights", "dtype", "version"). `options` go to the pipeline.
    TimError for unusable values, a folder that cannot be written, or one that holds a report of another model or other settings.
    """
    from tqdm import tqdm

    check_protocol(steps, prompts_per_task, images, batch, tasks)
    check_seed(seed)
    check_guidance(cfg)
    width, height = pipe.defaults.size(width, height)
    protocol = {"seed": seed, "prompts_per_task": prompts_per_task, "images": images, "width": width, "height": height,
                "tasks": [task for task in TASKS if task in tasks]}
    other = None if baseline is None else read_report(baseline, protocol)
    samples = eval_samples(protocol["tasks"], prompts_per_task, images, seed)
    if other is not None:
        _check_points(other["curve"], samples, baseline)
    folder = None if output is None else user_path(output)
    if folder is not None:
        check_folder(folder, [baseline])
        make_folder(folder)
    steps = sorted(set(steps))
    sampling = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items() if name in SAMPLING}
    sampling["cfg"] = float(cfg)
    report: dict = {"model": model, "protocol": protocol, "sampling": sampling, "curve": []}
    if folder is not None and model is not None:
        report["curve"] = read_points(folder / "report.json", report)
        _check_points(report["curve"], samples, folder / "report.json")
    processes.wait()

    def save() -> None:
        _compare(samples, report, other)
        if folder is not None and processes.is_main:
            write_report(report, folder, other)

    if report["curve"]:
        save()  # the baseline may have changed
    left = [count for count in steps if count not in {point["steps"] for point in report["curve"]}]
    with tqdm(total=len(processes.shard(samples)) * len(left), unit="image", disable=not (progress and processes.is_main)) as bar:
        for count in left:
            bar.set_description(f"{count} step{'s' if count > 1 else ''}")
            correct = score(pipe, samples, count, cfg, width, height, batch, bar, processes, **options)
            scale = cfg if pipe.nfe > count else 1.0
            point = {"steps": count, "cfg": scale, "nfe": pipe.nfe, **summarise(samples, correct), "correct": pack(correct)}
            report["curve"] = sorted([*report["curve"], point], key=lambda point: point["steps"])
            save()
    return report


def _compare(samples: Sequence[EvalSample], report: dict, baseline: dict | None) -> None:
    """Add to a report where its curve falls and, at every step count of the baseline, the difference from it."""
    report["regressions"] = regressions(samples, report["curve"])
    others = {point["steps"]: point for point in baseline["curve"]} if baseline else {}
    for point in report["curve"]:
        point.pop("vs_baseline", None)
        if point["steps"] in others:
            point["vs_baseline"] = difference(samples, unpack(others[point["steps"]]["correct"]), unpack(point["correct"]))


def read_points(path: Path, report: dict) -> list[dict]:
    """The curve that a report.json holds; empty if there is no file. TimError unless model, protocol and sampling are those of `report`."""
    if not path.exists():
        return []
    found = read_report(path)
    before = {**(found.get("model") or {}), **found["protocol"], **found.get("sampling", {})}
    now = {**report["model"], **report["protocol"], **report["sampling"]}
    for name in before | now:
        if name not in LABELS and before.get(name) != now.get(name):
            raise TimError(f"{path}: its {name} is {before.get(name)}, this run's is {now.get(name)}; write to another folder")
    return found["curve"]


def read_report(path: str | Path, protocol: dict | None = None) -> dict:
    """A report.json. TimError if it cannot be read, or is not of `protocol` where that is given."""
    try:
        report = parse_json(read_text(user_path(path)), str(path))
    except TimError as error:
        raise TimError(f"{error}; give a report.json of tim evaluate") from None
    if not _is_report(report):
        raise TimError(f"{path}: not a report.json of tim evaluate, or damaged; give another")
    found = report["protocol"]
    if protocol is not None:
        for name in protocol:
            if found.get(name) != protocol[name]:
                raise TimError(
                    f"{path}: its {name} is {found.get(name)}, this run's is {protocol[name]}; only the same prompts and noise compare")
    return report


def _is_report(report: Any) -> bool:
    """Whether a JSON value has what is read of a report."""
    if not isinstance(report, dict) or not isinstance(report.get("protocol"), dict) or not isinstance(report.get("sampling", {}), dict):
        return False
    curve = report.get("curve")
    if not isinstance(report.get("model"), (dict, type(None))) or not isinstance(curve, list) or len(curve) > MOST_NUMBERS:
        return False
    return all(map(_is_point, curve)) and len({point["steps"] for point in curve}) == len(curve)


def _is_point(point: Any) -> bool:
    def number(value: Any, least: float, most: float) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most

    if not isinstance(point, dict) or not isinstance(tasks := point.get("tasks"), dict) or not isinstance(point.get("correct"), str):
        return False
    whole = isinstance(point.get("steps"), int) and isinstance(point.get("nfe"), int)
    return (
        whole and number(point["steps"], 1, MAX_STEPS) and number(point["nfe"], 1, 2 * MAX_STEPS) and number(point.get("cfg"), 1, MAX_CFG)
        and all(number(point.get(name), 0, 1) for name in ("overall", "stderr")) and bool(tasks)
        and all(task in TASKS and number(value, 0, 1) for task, value in tasks.items()) and set(point["correct"]) <= {"0", "1"}
    )


def _check_points(curve: Sequence[dict], samples: Sequence[EvalSample], path: str | Path) -> None:
    """TimError for a point whose accuracy is not that of its images."""
    for point in curve:
        correct = unpack(point["correct"])
        found = summarise(samples, correct) if len(correct) == len(samples) else None
        if found is None or not math.isclose(found["overall"], point["overall"], abs_tol=1e-6) or found["tasks"] != point["tasks"]:
            raise TimError(f"{path}: at {point['steps']} steps, its accuracy is not that of its images; restore it, or use another folder")


def write_report(report: dict, folder: Path, baseline: dict | None = None) -> None:
    """Write report.json and curve.png; TimError if they cannot be written."""
    text = json.dumps(report, indent=2) + "\n"
    chart = draw_curve(report["curve"], baseline["curve"] if baseline else ())
    atomic_write(folder / "report.json", lambda tmp: tmp.write_text(text, encoding="utf-8"))
    atomic_write(folder / "curve.png", lambda tmp: chart.save(tmp, format="PNG"))


def draw_curve(curve: Sequence[dict], baseline: Sequence[dict] = (), width: int = 900, height: int = 600):
    """Accuracy against network evaluations (log axis), bars of two standard errors -> PIL image; the baseline in grey."""
    from PIL import Image, ImageDraw, ImageFont

    chart = Image.new("RGB", (width, height), "white")
    pen, font, small = ImageDraw.Draw(chart), ImageFont.load_default(size=18), ImageFont.load_default(size=15)
    left, top, right, bottom = 80, 50, width - 30, height - 80
    first, last = left + 50, right - 50  # ends of the horizontal axis
    most = max(2.0, *(point["nfe"] for point in (*curve, *baseline)))

    def at(nfe: float, value: float) -> tuple[float, float]:
        return first + (last - first) * math.log(nfe) / math.log(most), bottom - (bottom - top) * value

    for tenth in range(0, 11, 2):
        _, y = at(1, tenth / 10)
        pen.line((left, y, right, y), "#dddddd")
        pen.text((left - 12, y), f"{tenth / 10:.1f}", "#444444", font, "rm")
    for power in range(math.ceil(math.log2(most)) + 1):
        x = min(at(2**power, 0)[0], right)
        pen.line((x, top, x, bottom), "#eeeeee")
        pen.text((x, bottom + 8), str(2**power), "#444444", font, "mt")
    pen.rectangle((left, top, right, bottom), outline="#888888")
    pen.text(((left + right) / 2, height - 20), "network evaluations per image", "#222222", font, "mb")
    pen.text((left, 14), "accuracy, mean of the tasks (bars: two standard errors)", "#222222", font)
    if baseline:
        pen.text((right - 8, 14), "grey: baseline", "#888888", font, "ra")
    for points, others, ink, named in ((baseline, curve, "#999999", False), (curve, baseline, "#2060c0", True)):
        places = [at(point["nfe"], point["overall"]) for point in points]
        pen.line(places, ink, 3)
        for (x, y), point in zip(places, points):
            up, down = (at(1, min(1, max(0, point["overall"] + sign * 2 * point["stderr"])))[1] for sign in (1, -1))
            pen.line((x, up, x, down), ink, 2)
            pen.ellipse((x - 5, y - 5, x + 5, y + 5), ink)
            steps = f"{point['steps']} step{'s' if point['steps'] > 1 else ''}\n" if named else ""
            text = f"{steps}{point['overall']:.2f}"
            beaten = any(other["nfe"] == point["nfe"] and other["overall"] > point["overall"] for other in others)
            if beaten and bottom - down < 60:  # no room below its bars
                place, anchor = (x + 9, y), "lm"
            else:
                place, anchor = ((x, down + 6), "ma") if beaten or up - top < 50 else ((x, up - 6), "md")
            pen.multiline_text(place, text, "#222222" if named else ink, small, anchor, align="center")
    return chart
