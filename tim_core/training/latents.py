"""Batches of coloured shapes as cached latents: drawn and encoded once, then trained on again and again."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import TimError
from ..files import digest, make_folder
from ..models.autoencoder import Autoencoder
from ..processes import Shard
from ..shapes.batches import ShapesBatches, render_samples
from .cached_files import read_cached, write_cached


class LatentPart(NamedTuple):
    """A shard of a batch: its latents (B, C, h, w) float16, and the captions of the whole batch."""

    latents: Tensor
    captions: list[str]

    @property
    def total(self) -> int:
        """The number of items in the whole batch."""
        return len(self.captions)


class CachedLatents(torch.utils.data.Dataset):
    """batches[k]: the shards of batch k modulo `count`, which are encoded when they are first asked for and kept in `folder`."""

    def __init__(self, batches: ShapesBatches, count: int, autoencoder: Autoencoder, folder: Path, autocast: bool = False):
        """A file's name changes with the autoencoder, the images and captions of its batch, its shard and some rendered samples, so
        that no run reads another's.

        autocast: encode in bfloat16 where autocast does.
        """
        self.batches, self.count, self.autoencoder, self.folder, self.autocast = batches, count, autoencoder, folder, autocast
        settings = batches.sizes, batches.weights, batches.forms, batches.relations, batches.batch, batches.seed
        renderer = digest(("", image) for image in render_samples(40, 64))
        self.identity = f"{digest(autoencoder.state_dict().items())} {autoencoder.config} {autocast} {settings} {renderer}"
        make_folder(folder)

    def __getitem__(self, step: int) -> list[LatentPart]:
        index = step % self.count
        captions = self.batches.captions(index)
        files = [self._file(index, captions, shard) for shard in self.batches.shards]
        try:
            kept = [read_cached(file)["latents"] for file in files]
        except TimError:  # missing or damaged
            kept = self._encode(index)
            for file, latents in zip(files, kept):
                write_cached(file, {"latents": latents})
        return [LatentPart(latents, captions) for latents in kept]

    def _encode(self, index: int) -> list[Tensor]:
        """The latents of the shards of a batch. TimError if float16 does not hold them."""
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            encoded = [self.autoencoder.encode(part.images.contiguous()).half() for part in self.batches[index]]
        if not all(bool(latents.isfinite().all()) for latents in encoded):
            raise TimError(
                f"cached_batches: latents of batch {index} are not finite in float16; train the autoencoder to latents of "
                "variance 1, or set cached_batches: 0"
            )
        return encoded

    def _file(self, index: int, captions: list[str], shard: Shard) -> Path:
        name = hashlib.sha256(f"{self.identity} {index} {captions} {shard}".encode()).hexdigest()
        return self.folder / f"{name[:32]}.safetensors"
