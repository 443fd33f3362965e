"""Scores in the small world by GenEval's protocol: report.json and curve.png."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import TimError
from ..files import atomic_write, make_folder
from ..processes import ALONE, Processes
from ..shapes.detector import judge
from ..shapes.scenes import TASKS, Prompt, scoring_prompts

STEPS = (1, 2, 4, 8, 16, 32, 64)
NAMES = ("name", "version")  # of what a report says of the model: nothing that pictures depend on
SAMPLING = ("mode", "shift", "guidance_interval", "stochasticity", "negative")  # what a report keeps of the pipeline's options


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
    pipe, wanted: Sequence[Draw], steps: int, cfg: float, width: int = 64, height: int = 64, batch: int = 120, bar=None,
    processes: Processes = ALONE, **options
) -> np.ndarray:
    """Makes and judges every picture -> (N,) bool, in the order of `wanted`. `options` go to the pipeline; `bar` is a tqdm bar.

    Several processes share the pictures, and all of them get the whole answer.
    """
    right = torch.zeros(len(wanted))
    order = sorted(range(len(wanted)), key=lambda i: len(wanted[i].prompt.text.split()))  # equal lengths run together
    own = processes.shard(order)
    for start in range(0, len(own), batch):
        some = own[start : start + batch]
        noise = torch.cat([pipe.noise(1, width, height, wanted[i].seed) for i in some])
        texts = [wanted[i].prompt.text for i in some]
        pictures = pipe(texts, steps=steps, cfg=cfg, width=width, height=height, noise=noise, **options)
        for i, picture in zip(some, pictures.numpy()):
            right[i] = float(judge(wanted[i].prompt, picture))
        if bar is not None:
            bar.update(len(some))
    return processes.total(right).cpu().numpy() > 0.5


def summarise(wanted: Sequence[Draw], right: np.ndarray) -> dict:
    """{"n", "overall", "stderr", "tasks"}: the plain mean of the tasks' shares, its error sqrt(sum p_k (1 - p_k) / n_k) / K."""
    shares = {task: float(values.mean()) for task, values in _by_task(wanted, right).items()}
    variance = sum(p * (1 - p) / len(values) for p, values in zip(shares.values(), _by_task(wanted, right).values()))
    return {"n": len(wanted), "overall": sum(shares.values()) / len(shares), "stderr": math.sqrt(variance) / len(shares), "tasks": shares}


def difference(wanted: Sequence[Draw], before: np.ndarray, after: np.ndarray) -> dict:
    """{"difference", "stderr"} of the overall score, over pictures of the same prompts and noise: the mean of the tasks' means."""
    changes = _by_task(wanted, after.astype(float) - before.astype(float)).values()
    variance = sum(float(values.var()) / len(values) for values in changes)
    return {"difference": sum(float(values.mean()) for values in changes) / len(changes), "stderr": math.sqrt(variance) / len(changes)}


def _by_task(wanted: Sequence[Draw], values: np.ndarray) -> dict[str, np.ndarray]:
    names = np.array([draw.prompt.task for draw in wanted])
    return {task: values[names == task] for task in TASKS if task in names}


def falls(wanted: Sequence[Draw], curve: Sequence[dict]) -> list[dict]:
    """Where more steps are worse: each pair of points of which the later is below the earlier by over two paired standard errors.

    A curve without any is monotone.
    """
    found = []
    for later, point in enumerate(curve):
        for earlier in curve[:later]:
            change = difference(wanted, unpack(earlier["right"]), unpack(point["right"]))
            if change["difference"] < -2 * change["stderr"]:
                found.append({"from": earlier["steps"], "to": point["steps"], **change})
    return found


def pack(right: np.ndarray) -> str:
    """Which pictures are right, in the order of `draws`: a 0 or a 1 for each."""
    return "".join("01"[int(one)] for one in right)


def unpack(text: str) -> np.ndarray:
    return np.array([letter == "1" for letter in text])


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
    twin: str | Path | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
    model: dict | None = None,
    **options,
) -> dict:
    """The curve over `steps`, as report.json holds it; written to the folder `output`, with curve.png, after every point.

    model: what the report says of the model ("name", "weights", "dtype", "version"). Points that `output` already holds of the same
    weights, pictures and sampling are kept, not made again; a report of anything else there is a TimError.

    All points have the same prompts and noise. 1 step runs without guidance (cfg 1).
    twin: another model's report.json of the same pictures, to be drawn beside this one and compared with picture by picture.
    `options` go to the pipeline (mode, guidance_interval, negative, ...). TimError for values that cannot be used or a folder that
    cannot be written.
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
    pictures = {"seed": seed, "prompts_per_task": prompts_per_task, "images": images, "width": width, "height": height,
                "tasks": [task for task in TASKS if task in tasks]}
    other = None if twin is None else read_report(twin, pictures)
    folder = None if output is None else Path(output).expanduser()
    if folder is not None:
        make_folder(folder)
    wanted = draws(pictures["tasks"], prompts_per_task, images, seed)
    steps = sorted(set(steps))
    sampling = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items() if name in SAMPLING}
    sampling["cfg"] = float(cfg)
    report: dict = {"model": model, "pictures": pictures, "sampling": sampling, "curve": []}
    if folder is not None and model is not None:
        report["curve"] = made_before(folder / "report.json", report)
    processes.wait()

    def keep() -> None:
        _compare(wanted, report, other)
        if folder is not None and processes.is_main:
            write_report(report, folder, other)

    if report["curve"]:
        keep()  # the twin may be another one now
    left = [count for count in steps if count not in {point["steps"] for point in report["curve"]}]
    with tqdm(total=len(processes.shard(wanted)) * len(left), unit="picture", disable=not (progress and processes.is_main)) as bar:
        for count in left:
            guided = cfg if count > 1 else 1.0
            bar.set_description(f"{count} step{'s' if count > 1 else ''}")
            right = score(pipe, wanted, count, guided, width, height, batch, bar, processes, **options)
            point = {"steps": count, "cfg": guided, "nfe": pipe.nfe, **summarise(wanted, right), "right": pack(right)}
            report["curve"] = sorted([*report["curve"], point], key=lambda point: point["steps"])
            keep()
    return report


def _compare(wanted: Sequence[Draw], report: dict, twin: dict | None) -> None:
    """Puts into a report where its curve falls and, at every point that the twin has too, by how much it is ahead."""
    report["falls"] = falls(wanted, report["curve"])
    theirs = {point["steps"]: point for point in twin["curve"]} if twin else {}
    for point in report["curve"]:
        point.pop("over_twin", None)
        if point["steps"] in theirs:
            point["over_twin"] = difference(wanted, unpack(theirs[point["steps"]]["right"]), unpack(point["right"]))


def made_before(path: Path, report: dict) -> list[dict]:
    """The points that a report.json holds, if any. TimError where its model, pictures or sampling are not those of `report`."""
    if not path.exists():
        return []
    found = read_report(path)
    before = {**(found.get("model") or {}), **found["pictures"], **found.get("sampling", {})}
    now = {**report["model"], **report["pictures"], **report["sampling"]}
    for name in before | now:
        if name not in NAMES and before.get(name) != now.get(name):
            raise TimError(f"{path}: {name}: found {before.get(name)}, expected {now.get(name)}, or another folder for it")
    return found["curve"]


def read_report(path: str | Path, pictures: dict | None = None) -> dict:
    """A report.json, of the same pictures where given. TimError if it cannot be read, or is of others."""
    try:
        report = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        found = report["pictures"]
        for point in report["curve"]:
            unpack(point["right"])
            if missing := {"steps", "cfg", "nfe", "overall", "stderr", "tasks"} - point.keys():
                raise KeyError(missing)
    except OSError as error:
        raise TimError(f"{path}: cannot be read ({error.strerror}), expected a report.json") from None
    except (ValueError, TypeError, LookupError):
        raise TimError(f"{path}: found something else, expected a report.json of tim evaluate") from None
    if pictures is not None and found != pictures:
        wrong = next(name for name in pictures if found.get(name) != pictures[name])
        raise TimError(f"{path}: {wrong}: found {found.get(wrong)}, expected {pictures[wrong]}: only the same pictures can be compared")
    return report


def write_report(report: dict, folder: Path, twin: dict | None = None) -> None:
    """report.json and curve.png; TimError if they cannot be written."""
    text = json.dumps(report, indent=2) + "\n"
    picture = draw_curve(report["curve"], twin["curve"] if twin else ())
    atomic_write(folder / "report.json", lambda tmp: tmp.write_text(text, encoding="utf-8"))
    atomic_write(folder / "curve.png", lambda tmp: picture.save(tmp, format="PNG"))


def draw_curve(curve: Sequence[dict], twin: Sequence[dict] = (), width: int = 900, height: int = 600):
    """Score against network evaluations (log axis), with two standard errors up and down -> PIL picture. The twin's is grey."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (width, height), "white")
    pen, font, small = ImageDraw.Draw(picture), ImageFont.load_default(size=18), ImageFont.load_default(size=15)
    left, top, right, bottom = 80, 50, width - 30, height - 80
    first, last = left + 50, right - 50  # of the axis of evaluations
    most = max(2.0, *(point["nfe"] for point in (*curve, *twin)))

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
    pen.text(((left + right) / 2, height - 20), "network evaluations per picture", "#222222", font, "mb")
    pen.text((left, 14), "share of right pictures, mean of the tasks (bars: two standard errors)", "#222222", font)
    if twin:
        pen.text((right - 8, 14), "grey: the twin", "#888888", font, "ra")
    for points, others, ink, named in ((twin, curve, "#999999", False), (curve, twin, "#2060c0", True)):
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
    return picture
