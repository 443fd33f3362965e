"""Images in overlapping tiles, blended where they overlap."""

from collections.abc import Callable

import torch
from torch import Tensor

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
