"""Images to latents and back: batches about a megapixel at a time, whole or in blended tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .finite import check_finite
from .models.tiles import TILE, TiledAutoencoder


@dataclass(frozen=True)
class Codec:
    """How an autoencoder is run on a device.

    factor: pixels per latent cell. tile: "auto", "off", or the side of tiles in pixels. make_room(network, bytes): brings a network to
    the device, where a run of it takes that many bytes.
    """

    autoencoder: TiledAutoencoder
    factor: int
    tile: str | int
    device: torch.device
    make_room: Callable[[nn.Module, int], None]

    def encode(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> latents (B, C, H / factor, W / factor) float32, on the CPU."""
        pixels = images.movedim(-1, 1) * 2 - 1
        size = images.shape[1], images.shape[2]
        return self._run("encoder", pixels, size, self.autoencoder.encode, self.autoencoder.tiled_encode)

    def decode(self, latent: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, H, W, 3) float32 in [0, 1], on the CPU."""
        size = latent.shape[-2] * self.factor, latent.shape[-1] * self.factor
        pixels = self._run("decoder", latent, size, self.autoencoder.decode, self.autoencoder.tiled_decode)
        return pixels.add_(1).div_(2).clamp_(0, 1).movedim(1, -1).contiguous()

    @torch.no_grad()
    def _run(
        self, half: str, batch: Tensor, size: tuple[int, int], whole: Callable[[Tensor], Tensor], tiled: Callable[..., Tensor]
    ) -> Tensor:
        """Run the autoencoder over a batch -> float32 on the CPU. size: height and width in pixels."""
        dtype = next(self.autoencoder.parameters()).dtype
        count = max(1, min(len(batch), 2**20 // (size[0] * size[1])))
        self.make_room(self.autoencoder, count * self.autoencoder.peak_bytes(*size, dtype, self.device))
        tile = self._tile(size, dtype)
        parts = []
        for some in batch.split(count):
            some = some.to(self.device, dtype)
            done = whole(some) if tile is None else tiled(some, tile, (tile - tile // 8) // self.factor * self.factor)
            check_finite(done, f"VAE {half}", self.autoencoder.stage(half))
            parts.append(done.float().cpu())
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _tile(self, size: tuple[int, int], dtype: torch.dtype) -> int | None:
        """The side of tiles in pixels; None for whole images."""
        if self.tile == "off":
            return None
        if self.tile != "auto":
            return int(self.tile)
        return TILE if self.autoencoder.needs_tiles(*size, dtype, self.device) else None
