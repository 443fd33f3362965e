"""A folder of pictures for fine-tuning: found, fitted to native sizes, encoded once, and drawn in batches of one size."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..errors import TimError, one_line
from ..files import atomic_write
from ..processes import Processes
from .config import FolderConfig

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Kept = tuple[Tensor, list[Tensor], Tensor | None]  # latents, what they were told, an image encoder's features
VERSION = "2"  # of what is made of a picture: others in the cache are made again
BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for pictures that it cannot read


@dataclass(frozen=True)
class Item:
    """One picture: its file, what it is told to show (a caption, or a class's number), and the size it trains at, in pixels.

    problem: why it cannot be used, if so.
    """

    file: Path
    told: str | int
    width: int = 0
    height: int = 0
    problem: str = ""


def class_folders(config: FolderConfig) -> list[Path]:
    """The folders of classes, from number 0 on: those in `path`, by name, but hidden ones and the cache."""
    place = Path(config.path).expanduser()
    inside = sorted(place.iterdir()) if place.is_dir() else []
    return [one for one in inside if one.is_dir() and not one.name.startswith(".") and one.resolve() != config.cache_folder.resolve()]


def scan(config: FolderConfig, labels: bool) -> list[Item]:
    """What a folder or a .jsonl names, in order. TimError if there is no such place, for a line that makes no sense, or unclear classes."""
    place = Path(config.path).expanduser()
    if place.is_file():
        lines = enumerate(_text(place).split("\n"), 1)
        return [_line(place, number, line, labels) for number, line in lines if line.strip()]
    if not place.is_dir():
        raise TimError(f"data.path: {place}: found no such folder, expected one with pictures, or a .jsonl that names them")
    files = sorted(file for file in place.rglob("*") if file.suffix.lower() in ENDINGS)
    if labels:
        classes = class_folders(config)
        loose = [file.name for file in files if file.parent == place]
        if loose or not classes:
            raise TimError(f"{place}: found {f'{loose[0]} outside of them' if loose else 'no folders'}, expected pictures in a folder for "
                           "each class")
        found = {folder: [file for file in files if folder in file.parents] for folder in classes}
        if empty := [folder.name for folder in classes if not found[folder]]:
            logging.warning(f"{place}: {len(empty)} folders have no pictures, and count as classes; first {empty[0]}")
        return [Item(file, number) for number, folder in enumerate(classes) for file in found[folder]]
    captions = {file: file.with_suffix(".txt") for file in files}
    without = [file for file, caption in captions.items() if not caption.is_file()]
    if without:
        logging.warning(f"{place}: {len(without)} pictures have no .txt beside them and are left out, first {without[0].name}")
    items = []
    for file, caption in captions.items():
        try:
            items += [Item(file, _text(caption).strip())] if caption.is_file() else []
        except TimError as error:
            items.append(Item(file, "", problem=str(error)))
    return items


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # some editors put a mark first that is no part of the caption
    except UnicodeDecodeError:
        raise TimError(f"{file}: found bytes that are no UTF-8, expected text") from None


def _line(place: Path, number: int, line: str, labels: bool) -> Item:
    name, kind = ("label", int) if labels else ("caption", str)
    try:
        values = json.loads(line)
        file, told = values["image"], values[name]
    except (ValueError, TypeError, LookupError):
        file = told = None
    if not isinstance(file, str) or not isinstance(told, kind) or isinstance(told, bool):
        raise TimError(f'{place}: line {number}: found {line[:60]}, expected {{"image": path, "{name}": {kind.__name__}}}')
    return Item(place.parent / file, told)


def native_size(width: int, height: int, unit: int, max_pixels: int) -> tuple[int, int]:
    """The size a picture trains at: its own, or smaller to have max_pixels, cut to multiples of `unit` (paper C.2); 0, 0 for none."""
    scale = min(1.0, (max_pixels / (width * height)) ** 0.5)
    across, down = (int(side * scale + 1e-6) // unit * unit for side in (width, height))
    return (across, down) if across and down else (0, 0)


def similar_sizes(items: list[Item], least: int) -> list[Item]:
    """Sizes that fewer than `least` pictures have give theirs to the most similar other one.

    Of a picture at least 0.8 stay uncut, and of its pixels 0.75 to 1.1 times as many; a size without such a neighbour stays. A batch is of
    one size: many sizes of one picture each are many batches of copies.
    """
    members: dict[tuple[int, int], dict[tuple[int, int], int]] = {}  # size -> the sizes that train at it, and how many pictures have them
    for item in items:
        own = members.setdefault((item.width, item.height), {(item.width, item.height): 0})
        own[(item.width, item.height)] += 1

    def uncut(size: tuple[int, int], other: tuple[int, int]) -> float:
        across, down = size[0] * other[1], size[1] * other[0]
        alike = 0.75 <= other[0] * other[1] / (size[0] * size[1]) <= 1.1
        return min(across, down) / max(across, down) if alike else 0.0

    for size in sorted(members, key=lambda size: (sum(members[size].values()), size)):
        if sum(members[size].values()) < least:
            fits = {other: min(uncut(one, other) for one in members[size]) for other in members if other != size}
            fits = {other: fit for other, fit in fits.items() if fit >= 0.8}
            if fits:
                best = max(fits, key=lambda other: (sum(members[other].values()) >= least, fits[other], other))
                members[best] |= members.pop(size)
    trains_at = {one: size for size, ones in members.items() for one in ones}
    return [Item(item.file, item.told, *trains_at[item.width, item.height]) for item in items]


def in_colour(picture: Image.Image) -> Image.Image:
    """Eight bits of red, green and blue; deeper grey is scaled, what is transparent shows white."""
    if picture.mode.startswith("I"):  # 16 bits; Pillow's own conversion cuts them off at 255
        return Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def open_picture(item: Item) -> Tensor:
    """(3, H, W) in [-1, 1] at the item's size: scaled until it covers it, the rest cut off evenly."""
    with Image.open(item.file) as picture:
        fitted = ImageOps.fit(in_colour(ImageOps.exif_transpose(picture)), (item.width, item.height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted, np.float32)).permute(2, 0, 1) / 127.5 - 1


class Broken(Exception):
    """A picture that cannot be read."""


class FolderBatches(torch.utils.data.Dataset):
    """batches[k] -> latents (B, C, h, w), what each was told, and the image encoder's features (B, N, z_dim) or None.

    One size a batch, a pure function of (seed, k); every picture is as likely as any other. Told: text features (M, D), or a label.
    """

    def __init__(self, config: FolderConfig, items: list[Item], encode: "Encoder", batch: int, seed: int, parts: int):
        self.files = {}
        for item in items:
            self.files.setdefault((item.width, item.height), []).append(encode.place(item))
        self.sizes = sorted(self.files)
        tokens = [batch * config.base_pixels / (width * height) for width, height in self.sizes]
        self.counts = [max(parts, round(count)) for count in tokens]
        weights = np.array([len(self.files[size]) / count for size, count in zip(self.sizes, self.counts)])
        self.weights, self.seed = weights / weights.sum(), seed

    def __str__(self) -> str:
        """What there is to train on, for people: the sizes that most pictures have, and how many of them are a batch."""
        order = sorted(range(len(self.sizes)), key=lambda k: -len(self.files[self.sizes[k]]))
        found = [f"{len(self.files[self.sizes[k]])} of {'x'.join(map(str, self.sizes[k]))} in batches of {self.counts[k]}" for k in order]
        return f"{sum(map(len, self.files.values()))} pictures: " + ", ".join(found[:6] + ["..."] * (len(found) > 6))

    def __getitem__(self, step: int) -> "Kept":
        rng = np.random.default_rng([self.seed, step])
        which = int(rng.choice(len(self.sizes), p=self.weights))
        files, count = self.files[self.sizes[which]], self.counts[which]
        # without repeats as far as they go: a small folder is seen several times in one batch
        order = np.concatenate([rng.permutation(len(files)) for _ in range(-(-count // len(files)))])[:count]
        kept = [load_file(files[i]) for i in order]
        features = torch.stack([one["features"] for one in kept]) if "features" in kept[0] else None
        return torch.stack([one["latent"].float() for one in kept]), [one["told"] for one in kept], features


def readable(file: Path) -> bool:
    """Whether it is a whole safetensors file."""
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


class Encoder:
    """What networks make of pictures and captions, each encoded once and kept in the cache."""

    def __init__(self, cache: Path, identity: str, look: Callable[[Tensor], dict[str, Tensor]], told: Callable[[str | int], Tensor]):
        """identity: what the encoders are; other encoders find nothing of these in the cache. look: (1, 3, H, W) -> tensors by name."""
        self.cache, self.identity, self.look, self.told = cache, identity, look, told

    def place(self, item: Item) -> Path:
        stat = item.file.stat()
        words = (self.identity, str(item.file.resolve()), stat.st_size, stat.st_mtime_ns, item.told, item.width, item.height)
        return self.cache / f"{hashlib.sha256(repr(words).encode()).hexdigest()[:32]}.safetensors"

    @torch.no_grad()
    def keep(self, item: Item) -> None:
        """Encodes a picture unless it is in the cache. Broken for one that cannot be read."""
        if not readable(place := self.place(item)):
            try:
                picture = open_picture(item)[None]
            except BROKEN as error:
                raise Broken(str(error)) from error
            tensors = {name: value[0] for name, value in self.look(picture).items()} | {"told": self.told(item.told)}
            tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            atomic_write(place, lambda tmp: save_file(tensors, tmp))


def prepare(config: FolderConfig, encode: Encoder, unit: int, labels: bool, processes: Processes) -> list[Item]:
    """The usable pictures of a folder, all of them in the cache; each that is broken or too small is named in one warning, and counted.

    The processes share the encoding. TimError where nothing is left.
    """
    items, fitted = scan(config, labels), []
    for item in items:
        if item.problem:
            _skip(item, item.problem, processes)
            continue
        try:
            with Image.open(item.file) as picture:
                turned = picture.getexif().get(0x0112, 1) >= 5
                width, height = picture.size[::-1] if turned else picture.size
        except BROKEN as error:
            _skip(item, one_line(error), processes)
            continue
        size = native_size(width, height, unit, config.max_pixels)
        if not all(size):
            cut = "" if min(width, height) < unit else f" within max_pixels {config.max_pixels}"
            _skip(item, f"{width}x{height} pixels, expected at least {unit}x{unit}{cut}", processes)
            continue
        fitted.append(Item(item.file, item.told, *size))
    fitted = similar_sizes(fitted, config.least)
    encode.cache.mkdir(parents=True, exist_ok=True)
    own = processes.shard(list({encode.place(item): item for item in fitted}.values()))  # the same twice is one in the cache
    for item in tqdm(own, desc="encode", unit="picture", disable=not processes.is_main):
        try:
            encode.keep(item)
        except Broken as error:
            logging.warning(f"{item.file}: left out ({one_line(error)})")
    processes.wait()
    usable = [item for item in fitted if encode.place(item).is_file()]  # files of the cache are written whole
    if not usable:
        raise TimError(f"{config.path}: found no usable picture of {len(items)}, expected some ({', '.join(ENDINGS)})")
    if processes.is_main and len(usable) < len(items):
        logging.warning(f"{config.path}: {len(items) - len(usable)} of {len(items)} pictures were left out")
    return usable


def _skip(item: Item, reason: str, processes: Processes) -> None:
    if processes.is_main:
        logging.warning(f"{item.file}: left out ({reason})")
