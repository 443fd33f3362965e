"""Images in overlapping tiles, blended where they overlap, and what the autoencoders that run in them share."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import TimError
from ..memory import fits

TILE, STRIDE = 1024, 896  # pixels; smaller tiles show, because attention in the deep stages spans the tile
Pair = tuple[int, int]


def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, tile: Pair, stride: Pair, into: Callable[[int], int], out: Callable[[int], int]
) -> Tensor:
    """Runs `function` on overlapping tiles and blends each with its upper and left neighbours.

    Tile and stride are in pixels; `into` and `out` convert pixels to cells of the input and of the output.
    """
    height, width = x.shape[-2:]
    (tile_h, tile_w), (stride_h, stride_w) = map(into, tile), map(into, stride)
    if height <= tile_h and width <= tile_w:
        return function(x)
    keep_h, keep_w = map(out, stride)
    blend_h, blend_w = out(tile[0]) - keep_h, out(tile[1]) - keep_w
    above: list[Tensor] = []
    rows = []
    for top in range(0, height, stride_h):
        row: list[Tensor] = []
        for j, left in enumerate(range(0, width, stride_w)):
            made = function(x[..., top : top + tile_h, left : left + tile_w])
            if above:
                made = _blend(above[j], made, blend_h, -2)
            if row:
                made = _blend(row[-1], made, blend_w, -1)
            row.append(made)
        rows.append(torch.cat([made[..., :keep_h, :keep_w] for made in row], -1))
        above = row
    blended = torch.cat(rows, -2)
    return blended[..., : height * out(tile[0]) // tile_h, : width * out(tile[1]) // tile_w]


def _blend(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """Fades from the last `extent` lines of `before` along `dim` into the first lines of `after` -> all of `after`."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    if not extent:
        return after
    fade = torch.arange(extent, device=after.device, dtype=after.dtype) / extent
    fade = fade.view(-1, 1) if dim == -2 else fade
    tail = before.narrow(dim, before.shape[dim] - extent, extent)
    head = after.narrow(dim, 0, extent)
    return torch.cat([torch.lerp(tail, head, fade.expand_as(head)), after.narrow(dim, extent, after.shape[dim] - extent)], dim)


class TiledAutoencoder(nn.Module):
    """Base of the autoencoders: images (B, 3, H, W) in [-1, 1] <-> latents (B, C, H / factor, W / factor), whole or in blended tiles.

    A subclass has `encode`, `decode` and `peak_bytes`, and a config with `factor`, `latent_channels` and `scaling_factor`.
    damaged_weights: of its file, by half; set by loaders, see tim_core.finite.
    """

    HALVES: ClassVar[dict[str, tuple[str, ...]]] = {"encoder": ("encoder",), "decoder": ("decoder",)}  # the modules of each
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    peak_bytes: Callable[..., int]

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.damaged_weights: dict[str, str | None] = {}

    def half(self, name: str) -> nn.Module:
        """The modules of the encoder or of the decoder under their names, with the damaged weight of that half, if there is one."""
        half = nn.ModuleDict({module: getattr(self, module) for module in self.HALVES[name]})
        half.damaged_weight = self.damaged_weights.get(name)
        return half

    def needs_tiles(self, height: int, width: int, dtype: torch.dtype, device: torch.device, available: int | None = None) -> bool:
        """Whether one image (height, width in pixels) does not fit a device whole. available: bytes there, see `memory.fits`."""
        return max(height, width) > TILE and not fits(self.peak_bytes(height, width, dtype, device), device, available)

    def tiled_encode(self, x: Tensor, tile: int | Pair = TILE, stride: int | Pair = STRIDE) -> Tensor:
        """Encodes in tiles of `tile` pixels (or (height, width)), one every `stride` pixels, blended linearly where they overlap."""
        self._check(x)
        return tiled(self.encode, x, *self._tiles(tile, stride), lambda pixels: pixels, lambda pixels: pixels // self.config.factor)

    def tiled_decode(self, z: Tensor, tile: int | Pair = TILE, stride: int | Pair = STRIDE) -> Tensor:
        """Decodes in tiles of `tile` pixels (or (height, width)), one every `stride` pixels, blended linearly where they overlap."""
        return tiled(self.decode, z, *self._tiles(tile, stride), lambda pixels: pixels // self.config.factor, lambda pixels: pixels)

    def _check(self, x: Tensor) -> None:
        factor = self.config.factor
        if x.shape[-2] % factor or x.shape[-1] % factor:
            raise TimError(f"image to encode: {x.shape[-1]}x{x.shape[-2]} is not a multiple of {factor} on both sides")

    def _tiles(self, tile: int | Pair, stride: int | Pair) -> tuple[Pair, Pair]:
        """Both as (height, width) in pixels."""
        tile, stride = ((side, side) if isinstance(side, int) else tuple(side) for side in (tile, stride))
        factor = self.config.factor
        if any(t % factor or s % factor or not 0 < s <= t for t, s in zip(tile, stride)):
            raise TimError(f"tiles: tile {tile} and stride {stride} must be multiples of {factor}, with 0 < stride <= tile")
        return tile, stride
