"""Pictures of a prompt file, in the folders that other benchmarks' own evaluators read: GenEval (arXiv 2310.11513) and DPG-Bench
(arXiv 2403.05135)."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import TimError
from ..files import atomic_write, make_folder
from ..images import to_pil
from ..processes import ALONE, Processes

LAYOUTS = ("geneval", "dpg")


@dataclass(frozen=True)
class Line:
    """One line of a prompt file: its number from 0, its prompt, its name in a DPG layout, and all that it says."""

    number: int
    prompt: str
    name: str
    metadata: dict


def read_prompts(path: str | Path, named: bool = False) -> list[Line]:
    """A .jsonl of {"prompt": ...} (or "text"), with "item_id" (or "id") where pictures are `named` by it. TimError names a bad line.

    A name has no dot: DPG-Bench's evaluator takes what is before the first one.
    """
    path = Path(path).expanduser()
    try:
        texts = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise TimError(f"{path}: cannot be read ({reason}), expected a .jsonl of prompts") from None
    lines = []
    for place, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            metadata = json.loads(text)
            prompt = metadata["prompt"] if "prompt" in metadata else metadata["text"]
            name = str(metadata.get("item_id", metadata.get("id", "")) if named else len(lines))
        except (ValueError, TypeError, LookupError, AttributeError):
            prompt = name = None
        if not isinstance(prompt, str) or not re.fullmatch(r"[\w-]+", name):
            wanted = ' and "item_id": a name without dots' if named else ""
            raise TimError(f'{path}: line {place}: found {text[:60]}, expected {{"prompt": text}}{wanted}')
        lines.append(Line(len(lines), prompt, name, metadata))
    if not lines:
        raise TimError(f"{path}: found no prompts, expected a line for each")
    if len({line.name for line in lines}) < len(lines):
        raise TimError(f"{path}: found an item_id twice, expected one for each line")
    return lines


def write_geneval(folder: Path, line: Line, pictures: Sequence) -> None:
    """00000/samples/00000.png, ..., and then 00000/metadata.jsonl."""
    own = folder / f"{line.number:05d}"
    make_folder(own / "samples")
    for k, picture in enumerate(pictures):
        atomic_write(own / "samples" / f"{k:05d}.png", lambda tmp: picture.save(tmp, format="PNG"))
    atomic_write(own / "metadata.jsonl", lambda tmp: tmp.write_text(json.dumps(line.metadata), encoding="utf-8"))


def write_dpg(folder: Path, line: Line, pictures: Sequence) -> None:
    """metadata/NAME.json, and then pictures/NAME.png: the four in a square, as the evaluator cuts them."""
    from PIL import Image

    make_folder(folder / "pictures")
    make_folder(folder / "metadata")
    width, height = pictures[0].size
    square = Image.new("RGB", (2 * width, 2 * height))
    for k, picture in enumerate(pictures):
        square.paste(picture, (k % 2 * width, k // 2 * height))
    atomic_write(folder / "metadata" / f"{line.name}.json", lambda tmp: tmp.write_text(json.dumps(line.metadata), encoding="utf-8"))
    atomic_write(folder / "pictures" / f"{line.name}.png", lambda tmp: square.save(tmp, format="PNG"))


def make_pictures(
    pipe, prompts: str | Path, layout: str, output: str | Path, *, model: str = "", steps: int = 4, cfg: float = 2.5, images: int = 4,
    seed: int = 0, width: int = 1024, height: int = 1024, batch: int = 4, progress: bool = True, processes: Processes = ALONE, **options
) -> Path:
    """Makes `images` pictures of every prompt that has none yet, and returns the folder to give to the evaluator.

    Each picture has its own noise, fixed by `seed`, the prompt's line and its own number. What was made is kept when the same call is
    made again; TimError where the folder holds pictures of other settings, other prompts or another `model` (`Pipeline.fingerprint`).
    Several processes share the prompts.
    """
    from tqdm import tqdm

    if layout not in LAYOUTS:
        raise TimError(f"layout: found '{layout}', expected one of {', '.join(LAYOUTS)}")
    for name, value in (("steps", steps), ("images", images), ("batch", batch)):
        if value < 1:
            raise TimError(f"{name}: found {value}, expected at least 1")
    if layout == "dpg" and (images != 4 or width != height):
        raise TimError(f"layout: found {images} pictures of {width}x{height}, expected 4 square ones for dpg: its evaluator cuts a square")
    lines, folder = read_prompts(prompts, named=layout == "dpg"), Path(output).expanduser()
    bare = [line for line in lines if not {"tag", "include"} <= line.metadata.keys()]
    if layout == "geneval" and bare and processes.is_main:
        first = repr(bare[0].prompt[:40])
        logging.warning(f'{prompts}: {len(bare)} lines have no "tag" and "include", first {first}: GenEval cannot judge them')
    make_folder(folder)
    asked = hashlib.sha256(repr(lines).encode()).hexdigest()
    settings = {"model": model, "prompts": asked, "layout": layout, "steps": steps, "cfg": cfg, "images": images, "seed": seed,
                "width": width, "height": height}
    settings |= {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    _keep_settings(folder / "settings.json", settings, processes)
    geneval, square = (lambda line: folder / f"{line.number:05d}"), (lambda line: folder / "pictures" / f"{line.name}.png")
    samples = [f"samples/{k:05d}.png" for k in range(images)]
    files = {"geneval": lambda line: [geneval(line) / name for name in ("metadata.jsonl", *samples)],
             "dpg": lambda line: [square(line)]}[layout]
    write = {"geneval": write_geneval, "dpg": write_dpg}[layout]
    left = [line for line in processes.shard(lines) if not all(file.is_file() for file in files(line))]
    with tqdm(total=len(left), unit="prompt", disable=not (progress and processes.is_main)) as bar:
        for line in left:
            made = []
            for start in range(0, images, batch):
                numbers = range(start, min(images, start + batch))
                noise = torch.cat([pipe.noise(1, width, height, (seed * 1_000_003 + line.number * images + k) % 2**63) for k in numbers])
                prompt = [line.prompt] * len(numbers)
                made += pipe(prompt, steps=steps, cfg=cfg, width=width, height=height, noise=noise, **options)
            write(folder, line, [to_pil(picture) for picture in made])
            bar.update()
    processes.wait()
    return folder / "pictures" if layout == "dpg" else folder


def _keep_settings(path: Path, settings: dict, processes: Processes) -> None:
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        wrong = [name for name in settings if found.get(name) != settings[name]]
        if wrong:
            raise TimError(f"{path}: {wrong[0]}: found {found.get(wrong[0])}, expected {settings[wrong[0]]}, or another folder for it")
    processes.wait()
    if processes.is_main:
        atomic_write(path, lambda tmp: tmp.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8"))
