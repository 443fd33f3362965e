"""Images for other benchmarks, in the folders that their own evaluators read: GenEval (arXiv 2310.11513), DPG-Bench (arXiv 2403.05135)."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import TimError
from ..files import atomic_write, check_new_output, make_folder, parse_json, read_text, user_path
from ..images import to_pil
from ..limits import MAX_BATCH, MAX_STEPS
from ..processes import ALONE, Processes

LAYOUTS = ("geneval", "dpg")
MOST_PROMPT = 2**16  # characters


@dataclass(frozen=True)
class PromptRecord:
    """One line of a prompt file: its number from 0, prompt, file name in a DPG layout, and full content."""

    number: int
    prompt: str
    name: str
    metadata: dict


def read_prompts(path: str | Path, layout: str = "geneval") -> list[PromptRecord]:
    """Read a .jsonl of {"prompt": ...} (or "text"); for dpg, "item_id" (or "id") is required and unique.

    An item_id has no dots: DPG-Bench's evaluator takes what is before the first one. TimError names a bad line.
    """
    path, named = user_path(path), layout == "dpg"
    records = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            metadata = json.loads(line)
            prompt = metadata["prompt"] if "prompt" in metadata else metadata["text"]
            name = metadata.get("item_id", metadata.get("id", "")) if named else len(records)
            name = "" if isinstance(name, bool) or not isinstance(name, (int, str)) else str(name)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            prompt = name = None
        if isinstance(prompt, str) and len(prompt) > MOST_PROMPT:
            raise TimError(f"{path}: line {number} has a prompt of {len(prompt)} characters; use at most {MOST_PROMPT}")
        if not isinstance(prompt, str) or not re.fullmatch(r"[\w-]{1,240}", name) or len(name.encode()) > 240:
            wanted = ' and "item_id", a name without dots' if named else ""
            raise TimError(f'{path}: line {number}: {line[:60]} is not a JSON object with "prompt"{wanted}')
        records.append(PromptRecord(len(records), prompt, name, metadata))
    if not records:
        raise TimError(f"{path}: has no prompts; write one JSON object per line")
    if len({record.name for record in records}) < len(records):
        raise TimError(f"{path}: an item_id appears twice; each line needs its own")
    return records


def write_geneval(folder: Path, record: PromptRecord, images: Sequence) -> None:
    """Write 00000/samples/00000.png, ..., then 00000/metadata.jsonl."""
    prompt_folder = folder / f"{record.number:05d}"
    make_folder(prompt_folder / "samples")
    for k, image in enumerate(images):
        atomic_write(prompt_folder / "samples" / f"{k:05d}.png", lambda tmp: image.save(tmp, format="PNG"))
    atomic_write(prompt_folder / "metadata.jsonl", lambda tmp: tmp.write_text(json.dumps(record.metadata), encoding="utf-8"))


def write_dpg(folder: Path, record: PromptRecord, images: Sequence) -> None:
    """Write metadata/NAME.json, then pictures/NAME.png with the four images in a square, which the evaluator cuts apart."""
    from PIL import Image

    make_folder(folder / "pictures")
    make_folder(folder / "metadata")
    width, height = images[0].size
    square = Image.new("RGB", (2 * width, 2 * height))
    for k, image in enumerate(images):
        square.paste(image, (k % 2 * width, k // 2 * height))
    text = json.dumps(record.metadata)
    atomic_write(folder / "metadata" / f"{record.name}.json", lambda tmp: tmp.write_text(text, encoding="utf-8"))
    atomic_write(folder / "pictures" / f"{record.name}.png", lambda tmp: square.save(tmp, format="PNG"))


def check_amounts(layout: str, steps: Sequence[int], images: int, batch: int) -> None:
    """TimError for an unknown layout, and for amounts that `export_images` cannot make."""
    if layout not in LAYOUTS:
        raise TimError(f"layout: '{layout}' is unknown; choose from {', '.join(LAYOUTS)}")
    most = {"steps": MAX_STEPS, "images": MAX_BATCH, "batch": MAX_BATCH}
    for name, value in (*(("steps", count) for count in steps), ("images", images), ("batch", batch)):
        if not 1 <= value <= most[name]:
            raise TimError(f"{name}: {value} is not a whole number from 1 to {most[name]}")


def files_of(folder: Path, layout: str, record: PromptRecord, images: int) -> Iterator[Path]:
    """The files of a prompt, beginning with the one that is written last."""
    if layout == "dpg":
        yield folder / "pictures" / f"{record.name}.png"
        yield folder / "metadata" / f"{record.name}.json"
    else:
        yield folder / f"{record.number:05d}" / "metadata.jsonl"
        yield from (folder / f"{record.number:05d}" / "samples" / f"{k:05d}.png" for k in range(images))


def check_folder(
    folder: str | Path, layout: str, records: Sequence[PromptRecord], images: int, inputs: Sequence[str | Path | None]
) -> None:
    """TimError if `export_images` cannot write its files to a folder, or would replace an input. Makes nothing."""
    folder = user_path(folder)
    check_new_output(folder / "settings.json", inputs)
    for record in records if folder.exists() else ():
        for path in files_of(folder, layout, record, images):
            check_new_output(path, inputs)
            if not path.parent.exists():  # nor is there any other file of this prompt
                break


def export_images(
    pipe, prompts: str | Path, layout: str, output: str | Path, *, model: str = "", steps: int = 4, cfg: float = 2.5, images: int = 4,
    seed: int = 0, width: int | None = None, height: int | None = None, batch: int = 4, progress: bool = True,
    processes: Processes = ALONE, **options
) -> Path:
    """Make `images` images per prompt -> the folder to give to the evaluator.

    Noise depends on `seed`, the line and the image's number. Prompts whose images exist are skipped; several processes share the rest.
    width, height: in pixels (default: the model's native size). model: `Pipeline.fingerprint`. `options` go to the pipeline.
    TimError for unusable values, or where the folder holds images of another model, other settings or other prompts.
    """
    from tqdm import tqdm

    check_amounts(layout, [steps], images, batch)
    width, height = pipe.defaults.size(width, height)
    if layout == "dpg" and (images != 4 or width != height):
        raise TimError(f"layout: dpg needs 4 square images per prompt, not {images} of {width}x{height}")
    records, folder = read_prompts(prompts, layout), user_path(output)
    bare = [record for record in records if not {"tag", "include"} <= record.metadata.keys()]
    if layout == "geneval" and bare and processes.is_main:
        first = repr(bare[0].prompt[:40])
        lines = "1 line has" if len(bare) == 1 else f"{len(bare)} lines have"
        logging.warning(f'{prompts}: {lines} no "tag" and "include", first {first}: GenEval cannot score them')
    check_folder(folder, layout, records, images, [prompts])
    make_folder(folder)
    settings = {"model": model, "prompts": hashlib.sha256(repr(records).encode()).hexdigest(), "layout": layout, "steps": steps, "cfg": cfg,
                "images": images, "seed": seed, "width": width, "height": height}
    settings |= {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    _keep_settings(folder / "settings.json", settings, processes)

    write = {"geneval": write_geneval, "dpg": write_dpg}[layout]
    left = [record for record in processes.shard(records) if not all(file.is_file() for file in files_of(folder, layout, record, images))]
    with tqdm(total=len(left), unit="prompt", disable=not (progress and processes.is_main)) as bar:
        for record in left:
            made = []
            for start in range(0, images, batch):
                numbers = range(start, min(images, start + batch))
                seeds = [(seed * 1_000_003 + record.number * images + k) % 2**63 for k in numbers]
                made += pipe([record.prompt] * len(numbers), steps=steps, cfg=cfg, width=width, height=height, seed=seeds, **options)
            write(folder, record, [to_pil(image) for image in made])
            bar.update()
    processes.wait()
    return folder / "pictures" if layout == "dpg" else folder


def _keep_settings(path: Path, settings: dict, processes: Processes) -> None:
    """Write the settings beside the images; TimError if the file there has others."""
    if path.is_file():
        try:
            found = parse_json(read_text(path), str(path))
        except TimError:
            found = None
        found = found if isinstance(found, dict) else {}
        if name := next((name for name in settings if found.get(name) != settings[name]), None):
            raise TimError(f"{path}: its {name} is {found.get(name)}, this run's is {settings[name]}; write to another folder")
    processes.wait()
    if processes.is_main:
        atomic_write(path, lambda tmp: tmp.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8"))
