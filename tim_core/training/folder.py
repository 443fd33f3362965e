"""A folder of images for fine-tuning: scanned, cropped to native sizes, encoded once, and drawn in batches of one size."""

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ..errors import TimError
from ..files import digest, make_folder, parse_json, read_text, user_path
from ..images import ENDINGS, image_size, open_image
from ..processes import ALONE, Processes, Shard
from .cached_files import damaged, read_cached, write_cached
from .config import MOST_ITEMS, FolderConfig

VERSION = "5"  # of cached files; files of another version are encoded again
ENCODE_PIXELS = 2 * 1024 * 1024  # pixels of the images that are encoded together
MOST_CAPTION, MOST_LIST = 2**16, 2**27  # bytes of a caption and of a .jsonl
MOST_SKIPPED = 20  # images that are named; the rest are counted
IMAGE_DIGEST = "image"  # key in the metadata of cached files


@dataclass(frozen=True)
class Item:
    """An image file, its caption or class number, and the size in pixels that it trains at.

    problem: why it cannot be used, with the file; empty if it can.
    """

    file: Path
    caption_or_label: str | int
    width: int = 0
    height: int = 0
    problem: str = ""


def count_images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"


def class_folders(config: FolderConfig) -> list[Path]:
    """The folders in `path`, by name, without hidden ones and the cache; their positions are the class numbers."""
    place = user_path(config.path)
    inside = sorted(place.iterdir()) if place.is_dir() else []
    return [one for one in inside if one.is_dir() and not one.name.startswith(".") and one.resolve() != config.cache_folder.resolve()]


def scan(config: FolderConfig, labels: bool) -> list[Item]:
    """The images of a folder or a .jsonl, in order. TimError if there is none, for an invalid line, or for images outside class folders."""
    place = user_path(config.path)
    if not place.exists():
        raise TimError(f"data.path: {place} does not exist; name a folder of images, or a .jsonl that lists them")
    if not place.is_dir():
        lines = enumerate(read_text(place, MOST_LIST).split("\n"), 1)
        return [_line(place, number, line, labels) for number, line in lines if line.strip()]
    files = sorted(file for file in place.rglob("*") if file.suffix.lower() in ENDINGS)
    if labels:
        classes = class_folders(config)
        loose = [file.name for file in files if file.parent == place]
        if loose or not classes:
            reason = f"{loose[0]} is in no class folder" if loose else "no class folders"
            raise TimError(f"{place}: {reason}; put the images of each class into a folder of their own")
        found = {folder: [file for file in files if folder in file.parents] for folder in classes}
        if empty := [folder.name for folder in classes if not found[folder]]:
            logging.warning(f"{place}: {len(empty)} class folders have no images, but keep their class numbers; the first is {empty[0]}")
        return [Item(file, number) for number, folder in enumerate(classes) for file in found[folder]]
    captions = {file: file.with_suffix(".txt") for file in files}
    without = [file for file, caption in captions.items() if not caption.exists()]
    if without:
        logging.warning(f"{place}: skipped {count_images(len(without))} without a .txt caption; the first is {without[0].name}")
    items = []
    for file, caption in captions.items():
        try:
            items += [Item(file, read_text(caption, MOST_CAPTION).strip())] if caption.exists() else []
        except TimError as error:
            items.append(Item(file, "", problem=str(error)))
    return items


def _line(place: Path, number: int, line: str, labels: bool) -> Item:
    name, kind = ("label", int) if labels else ("caption", str)
    try:
        values = parse_json(line, str(place))
        file, value = values["image"], values[name]
    except (TimError, TypeError, LookupError):
        file = value = None
    if isinstance(value, str) and len(value) > MOST_CAPTION:
        raise TimError(f"{place}: line {number} has a caption of {len(value)} characters; use at most {MOST_CAPTION}")
    if not isinstance(file, str) or not isinstance(value, kind) or isinstance(value, bool):
        raise TimError(f'{place}: line {number} is {line[:60]}; write {{"image": path, "{name}": {kind.__name__}}}')
    return Item(place.parent / file, value)


def native_size(width: int, height: int, unit: int, max_pixels: int) -> tuple[int, int]:
    """Training size: scaled down to max_pixels and cropped to multiples of `unit` (paper C.2); (0, 0) if the image is too small."""
    scale = min(1.0, (max_pixels / (width * height)) ** 0.5)
    across, down = (int(side * scale + 1e-6) // unit * unit for side in (width, height))
    return (across, down) if across and down else (0, 0)


def similar_sizes(items: list[Item], min_bucket_size: int) -> list[Item]:
    """Merges every size with fewer than `min_bucket_size` images into the most similar other size.

    A batch has one size, so a rare size would fill a batch with duplicates. An image keeps at least 0.8 of its area when cropped and 0.75
    to 1.1 of its pixels; a size without such a neighbour stays.
    """
    members: dict[tuple[int, int], dict[tuple[int, int], int]] = {}  # training size -> original size -> number of images
    for item in items:
        sizes = members.setdefault((item.width, item.height), {(item.width, item.height): 0})
        sizes[(item.width, item.height)] += 1

    def uncropped(size: tuple[int, int], other: tuple[int, int]) -> float:
        """The fraction of an image of one size that is left at the aspect ratio of another; 0 for too different areas."""
        across, down = size[0] * other[1], size[1] * other[0]
        similar = 0.75 <= other[0] * other[1] / (size[0] * size[1]) <= 1.1
        return min(across, down) / max(across, down) if similar else 0.0

    for size in sorted(members, key=lambda size: (sum(members[size].values()), size)):
        if sum(members[size].values()) < min_bucket_size:
            fits = {other: min(uncropped(one, other) for one in members[size]) for other in members if other != size}
            fits = {other: fit for other, fit in fits.items() if fit >= 0.8}
            if fits:
                best = max(fits, key=lambda other: (sum(members[other].values()) >= min_bucket_size, fits[other], other))
                members[best] |= members.pop(size)
    trains_at = {one: size for size, ones in members.items() for one in ones}
    return [Item(item.file, item.caption_or_label, *trains_at[item.width, item.height]) for item in items]


def load_image(item: Item) -> Tensor:
    """The image (3, H, W) in [-1, 1], scaled and centre-cropped to the item's size. TimError as images.open_image."""
    fitted = ImageOps.fit(open_image(item.file), (item.width, item.height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted, np.float32)).permute(2, 0, 1) / 127.5 - 1


class FolderPart(NamedTuple):
    """A shard of a batch: latents (B, C, h, w), B conditions (text features (M, D), or labels), features (B, N, z_dim) or None.

    lengths: the rows of every condition in the whole batch, 1 for a label.
    """

    latents: Tensor
    conditions: list[Tensor]
    features: Tensor | None
    lengths: list[int]

    @property
    def total(self) -> int:
        """The number of items in the whole batch."""
        return len(self.lengths)


class FolderBatches(torch.utils.data.Dataset):
    """batches[k]: the `shards` of batch k. A batch has one size and is a pure function of (seed, k). All images are equally likely."""

    def __init__(self, config: FolderConfig, items: list[Item], encode: "Encoder", batch: int, seed: int, shards: Sequence[Shard]):
        self.files, self.shards, self.labels = {}, shards, isinstance(items[0].caption_or_label, int)
        for item in items:
            self.files.setdefault((item.width, item.height), []).append(encode.cache_path(item))
        self.sizes = sorted(self.files)
        tokens = [batch * config.base_pixels / (width * height) for width, height in self.sizes]
        self.counts = [max(shards[0].count, round(count)) for count in tokens]
        if (most := max(self.counts)) > MOST_ITEMS:
            size = "x".join(map(str, self.sizes[self.counts.index(most)]))
            raise TimError(f"data.base_pixels: {config.base_pixels} makes batches of {most} images of {size}; use fewer, or a smaller "
                           "loop.batch")
        weights = np.array([len(self.files[size]) / count for size, count in zip(self.sizes, self.counts)])
        self.weights, self.seed = weights / weights.sum(), seed

    def __str__(self) -> str:
        """The number of images, and the most frequent sizes with their batch sizes."""
        order = sorted(range(len(self.sizes)), key=lambda k: -len(self.files[self.sizes[k]]))
        found = [f"{len(self.files[self.sizes[k]])} of {'x'.join(map(str, self.sizes[k]))} in batches of {self.counts[k]}" for k in order]
        return f"{count_images(sum(map(len, self.files.values())))}: " + ", ".join(found[:6] + ["..."] * (len(found) > 6))

    def __getitem__(self, step: int) -> list[FolderPart]:
        rng = np.random.default_rng([self.seed, step])
        which = int(rng.choice(len(self.sizes), p=self.weights))
        files, count = self.files[self.sizes[which]], self.counts[which]
        # no repeats before all images were drawn; a small folder is drawn several times per batch
        order = np.concatenate([rng.permutation(len(files)) for _ in range(-(-count // len(files)))])[:count]
        lengths = [1 if self.labels else condition_rows(files[i]) for i in order]
        return [self.load([files[i] for i in shard.take(order)], lengths) for shard in self.shards]

    def load(self, files: list[Path], lengths: list[int]) -> FolderPart:
        """The shard with these cached files."""
        kept = [read_cached(file) for file in files]
        features = torch.stack([one["features"] for one in kept]) if "features" in kept[0] else None
        return FolderPart(torch.stack([one["latent"].float() for one in kept]), [one["condition"] for one in kept], features, lengths)


@functools.cache
def condition_rows(file: Path) -> int:
    """The rows of the text features in a cached file. Reads its header alone."""
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_slice("condition").get_shape()[0]
    except (OSError, SafetensorError, IndexError):
        raise damaged(file) from None


def image_digest(file: Path) -> str | None:
    """The hash of the image in a cached file; None if the file is not complete. Reads its header alone."""
    try:
        if not file.is_file():  # a FIFO would wait
            return None
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get(IMAGE_DIGEST)
    except (OSError, SafetensorError):
        return None


class Encoder:
    """Encodes every image and its caption or label once, images of one size together, and caches the results."""

    def __init__(
        self, cache: Path, identity: str, encode_images: Callable[[Tensor], dict[str, Tensor]],
        encode_conditions: Callable[[list[str | int]], list[Tensor]],
    ):
        """identity: changes with the encoders, so that they do not share cached files.

        encode_images: (B, 3, H, W) -> tensors (B, ...) by name. encode_conditions: captions or labels -> a tensor each.
        """
        self.cache, self.identity = cache, identity
        self.encode_images, self.encode_conditions, self.skipped = encode_images, encode_conditions, 0

    def skip(self, reason: str, processes: Processes = ALONE) -> None:
        """Warns of an image that cannot be used, of the first MOST_SKIPPED ones."""
        self.skipped += 1
        if processes.is_main and self.skipped <= MOST_SKIPPED:
            logging.warning(f"skipped {reason}" + (" (more are not listed)" if self.skipped == MOST_SKIPPED else ""))

    def cache_path(self, item: Item) -> Path:
        """The cached file of an item. Its name changes with the encoders, the image file, the caption or label, and the size."""
        stat = item.file.stat()
        key = (self.identity, str(item.file.resolve()), stat.st_size, stat.st_mtime_ns, item.caption_or_label, item.width, item.height)
        return self.cache / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.safetensors"

    @torch.no_grad()
    def keep(self, items: list[Item]) -> None:
        """Encodes items of one size into the cache. Unreadable images are skipped with a warning.

        TimError if what an encoder returns is not finite.
        """
        images = {}
        for item in items:
            try:
                images[item] = load_image(item)
            except TimError as error:
                self.skip(str(error))
        if not images:
            return
        encoded = {name: value.cpu() for name, value in self.encode_images(torch.stack(list(images.values()))).items()}
        conditions = self.encode_conditions([item.caption_or_label for item in images])
        for k, (item, condition) in enumerate(zip(images, conditions, strict=True)):
            tensors = {**{name: value[k].clone() for name, value in encoded.items()}, "condition": condition.cpu().contiguous()}
            for name, value in tensors.items():
                if not value.isfinite().all():
                    source = {"latent": "the autoencoder's latent", "condition": "the text model's features"}.get(name, name)
                    raise TimError(f"{item.file}: {source} has values that are not finite; the weights may be damaged, download them again")
            write_cached(self.cache_path(item), tensors, {IMAGE_DIGEST: digest([("image", images[item])])})


def digest_data(items: list[Item], encode: Encoder) -> str:
    """A hash of the encoded items: of their pixels, captions or labels, and order. Their paths do not matter."""
    found = hashlib.sha256()
    for item in items:
        found.update(repr((image_digest(encode.cache_path(item)), item.caption_or_label, item.width, item.height)).encode())
    return found.hexdigest()


def same_size(items: list[Item], max_pixels: int) -> list[list[Item]]:
    """Groups of items of one size, each of at most `max_pixels` in all, or of one item."""
    members: dict[tuple[int, int], list[Item]] = {}
    for item in items:
        members.setdefault((item.width, item.height), []).append(item)
    groups = []
    for (width, height), same in members.items():
        count = max(1, max_pixels // (width * height))
        groups += [same[k : k + count] for k in range(0, len(same), count)]
    return groups


def prepare(config: FolderConfig, encode: Encoder, unit: int, labels: bool, processes: Processes) -> list[Item]:
    """The usable images of a folder, after encoding them into the cache. Each unreadable or small image is skipped with one warning.

    The processes share the encoding. TimError if no image is usable.
    """
    items, fitted = scan(config, labels), []
    if labels:
        encode.encode_conditions(sorted({item.caption_or_label for item in items}))  # names a class that the model lacks
    for item in items:
        if item.problem:
            encode.skip(item.problem, processes)
            continue
        try:
            width, height = image_size(item.file)
        except TimError as error:
            encode.skip(str(error), processes)
            continue
        size = native_size(width, height, unit, config.max_pixels)
        if not all(size):
            limit = "" if min(width, height) < unit else f" within max_pixels {config.max_pixels}"
            encode.skip(f"{item.file}: {width}x{height} pixels; at least {unit}x{unit} are needed{limit}", processes)
            continue
        fitted.append(Item(item.file, item.caption_or_label, *size))
    none = f"{config.path}: none of {len(items)} images is usable; add some ({', '.join(ENDINGS)})"
    if not fitted:
        raise TimError(none)
    fitted = similar_sizes(fitted, config.min_bucket_size)
    make_folder(encode.cache)
    mine = processes.shard(list({encode.cache_path(item): item for item in fitted}.values()))  # duplicates share a cached file
    missing = [item for item in mine if image_digest(encode.cache_path(item)) is None]
    with tqdm(total=len(missing), desc="encode", unit="image", disable=not processes.is_main) as bar:
        for group in same_size(missing, ENCODE_PIXELS):
            encode.keep(group)
            bar.update(len(group))
    processes.wait()
    usable = [item for item in fitted if encode.cache_path(item).is_file()]  # cached files are complete
    if not usable:
        raise TimError(none)
    if processes.is_main and len(usable) < len(items):
        logging.warning(f"{config.path}: skipped {len(items) - len(usable)} of {count_images(len(items))}")
    return usable
