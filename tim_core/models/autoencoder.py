"""DC-AE: the deep-compression autoencoder (arXiv 2410.10733), encoder, decoder and blended tiles.

Parameter names are those of diffusers' AutoencoderDC, so its checkpoints load as they are.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TimError
from .config import AutoencoderConfig, StageConfig

Pair = tuple[int, int]


class ChannelRMSNorm(nn.Module):
    """RMS norm over the channels of (B, C, H, W), with gain and bias; statistics in float32."""

    def __init__(self, channels: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(1, keepdim=True) + 1e-5)
        weight, bias = self.weight.to(x)[:, None, None], self.bias.to(x)[:, None, None]
        return (x * scale).to(x.dtype) * weight + bias


def _norm(kind: str, channels: int, device, dtype) -> nn.Module:
    if kind == "batch_norm":
        return nn.BatchNorm2d(channels, device=device, dtype=dtype)
    return ChannelRMSNorm(channels, device, dtype)


class ResBlock(nn.Module):
    """conv - activation - conv - norm, plus the input."""

    def __init__(self, channels: int, norm: str, activation: str, operations, device=None, dtype=None):
        super().__init__()
        self.activation = getattr(F, activation)
        self.conv1 = operations.Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype)
        self.conv2 = operations.Conv2d(channels, channels, 3, padding=1, bias=False, device=device, dtype=dtype)
        self.norm = _norm(norm, channels, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(self.activation(self.conv1(x))))


class MultiscaleProjection(nn.Module):
    """Aggregates q, k and v over a k x k neighbourhood: a depthwise convolution, then one per head."""

    def __init__(self, channels: int, heads: int, kernel: int, operations, device=None, dtype=None):
        super().__init__()
        factory = {"bias": False, "device": device, "dtype": dtype}
        self.proj_in = operations.Conv2d(3 * channels, 3 * channels, kernel, padding=kernel // 2, groups=3 * channels, **factory)
        self.proj_out = operations.Conv2d(3 * channels, 3 * channels, 1, groups=3 * heads, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(x))


class LinearAttention(nn.Module):
    """Multi-scale ReLU attention (EfficientViT): linear in the number of pixels, but quadratic on the smallest maps."""

    def __init__(self, channels: int, head_dim: int, kernels: tuple[int, ...], norm: str, operations, device=None, dtype=None):
        super().__init__()
        heads = channels // head_dim
        inner = heads * head_dim
        factory = {"bias": False, "device": device, "dtype": dtype}
        self.head_dim = head_dim
        self.to_q = operations.Linear(channels, inner, **factory)
        self.to_k = operations.Linear(channels, inner, **factory)
        self.to_v = operations.Linear(channels, inner, **factory)
        self.to_qkv_multiscale = nn.ModuleList(MultiscaleProjection(inner, heads, k, operations, device, dtype) for k in kernels)
        self.to_out = operations.Linear(inner * (1 + len(kernels)), channels, **factory)
        self.norm_out = _norm(norm, channels, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        rows = x.movedim(1, -1)                                                                     # (B, H, W, C)
        qkv = torch.cat([self.to_q(rows), self.to_k(rows), self.to_v(rows)], -1).movedim(-1, 1)     # (B, 3C, H, W)
        qkv = torch.cat([qkv, *(scale(qkv) for scale in self.to_qkv_multiscale)], 1)                # (B, 3C * scales, H, W)
        linear = height * width > self.head_dim
        if linear:
            qkv = qkv.float()
        # each run of 3 * head_dim channels is one head's q, k, v, even across the q | k | v border: the trained layout
        q, k, v = qkv.reshape(batch, -1, 3 * self.head_dim, height * width).chunk(3, 2)             # (B, heads, head_dim, HW)
        q, k = F.relu(q), F.relu(k)
        if linear:
            v = F.pad(v, (0, 0, 0, 1), value=1.0)                                                   # a row of ones sums the weights
            out = (v @ k.transpose(-1, -2)) @ q
            out = (out[:, :, :-1] / (out[:, :, -1:] + 1e-15)).to(x.dtype)
        else:
            scores = (k.transpose(-1, -2) @ q).float()
            scores = scores / (scores.sum(2, keepdim=True) + 1e-15)
            out = v @ scores.to(v.dtype)
        out = out.reshape(batch, -1, height, width).movedim(1, -1)
        return x + self.norm_out(self.to_out(out).movedim(-1, 1))


class GatedConv(nn.Module):
    """Gated linear unit with a depthwise convolution (GLUMBConv), plus the input."""

    def __init__(self, channels: int, operations, device=None, dtype=None):
        super().__init__()
        hidden, factory = 4 * channels, {"device": device, "dtype": dtype}
        self.conv_inverted = operations.Conv2d(channels, 2 * hidden, 1, **factory)
        self.conv_depth = operations.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, **factory)
        self.conv_point = operations.Conv2d(hidden, channels, 1, bias=False, **factory)
        self.norm = ChannelRMSNorm(channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, 1)
        return x + self.norm(self.conv_point(h * F.silu(gate)))


class EfficientViTBlock(nn.Module):
    """Multi-scale linear attention, then a gated convolution; x (B, C, H, W) keeps its shape."""

    def __init__(self, channels: int, head_dim: int, kernels: tuple[int, ...], norm: str, operations, device=None, dtype=None):
        super().__init__()
        self.attn = LinearAttention(channels, head_dim, kernels, norm, operations, device, dtype)
        self.conv_out = GatedConv(channels, operations, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.attn(x))


class Downsample(nn.Module):
    """Halves the sides; the shortcut is the channel mean of the unshuffled input (DC-AE 3.2)."""

    def __init__(self, channels: int, out_channels: int, kind: str, shortcut: bool, operations, device=None, dtype=None):
        super().__init__()
        self.unshuffle, self.shortcut, self.out_channels = kind == "pixel_unshuffle", shortcut, out_channels
        self.conv = operations.Conv2d(
            channels, out_channels // 4 if self.unshuffle else out_channels, 3, stride=1 if self.unshuffle else 2, padding=1,
            device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        if self.unshuffle:
            out = F.pixel_unshuffle(out, 2)
        if self.shortcut:
            out = out + F.pixel_unshuffle(x, 2).unflatten(1, (self.out_channels, -1)).mean(2)
        return out


class Upsample(nn.Module):
    """Doubles the sides; the shortcut is the shuffled, repeated input (DC-AE 3.2)."""

    def __init__(self, channels: int, out_channels: int, kind: str, shortcut: bool, operations, device=None, dtype=None):
        super().__init__()
        self.interpolate, self.repeats = kind == "interpolate", 4 * out_channels // channels if shortcut else 0
        self.conv = operations.Conv2d(
            channels, out_channels if self.interpolate else 4 * out_channels, 3, padding=1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.interpolate:
            out = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        else:
            out = F.pixel_shuffle(self.conv(x), 2)
        if self.repeats:
            out = out + F.pixel_shuffle(x.repeat_interleave(self.repeats, 1), 2)
        return out


def _blocks(stage: StageConfig, head_dim: int, operations, device, dtype) -> list[nn.Module]:
    if stage.block == "ResBlock":
        return [ResBlock(stage.width, stage.norm, stage.activation, operations, device, dtype) for _ in range(stage.layers)]
    return [EfficientViTBlock(stage.width, head_dim, stage.kernels, stage.norm, operations, device, dtype) for _ in range(stage.layers)]


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, C, H / factor, W / factor)."""

    def __init__(self, config: AutoencoderConfig, operations, device=None, dtype=None):
        super().__init__()
        stages, factory = config.encoder, {"device": device, "dtype": dtype}
        if stages[0].layers:
            self.conv_in = operations.Conv2d(config.in_channels, stages[0].width, 3, padding=1, **factory)
        else:
            self.conv_in = Downsample(config.in_channels, stages[1].width, config.downsample, False, operations, **factory)
        self.down_blocks = nn.ModuleList()
        for i, stage in enumerate(stages):
            blocks = _blocks(stage, config.head_dim, operations, device, dtype)
            if blocks and i + 1 < len(stages):
                blocks.append(Downsample(stage.width, stages[i + 1].width, config.downsample, True, operations, **factory))
            self.down_blocks.append(nn.Sequential(*blocks))
        self.conv_out = operations.Conv2d(stages[-1].width, config.latent_channels, 3, padding=1, **factory)
        self.latent_channels, self.shortcut = config.latent_channels, config.out_shortcut

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        out = self.conv_out(x)
        return out + x.unflatten(1, (self.latent_channels, -1)).mean(2) if self.shortcut else out


class Decoder(nn.Module):
    """(B, C, h, w) -> (B, 3, h * factor, w * factor)."""

    def __init__(self, config: AutoencoderConfig, operations, device=None, dtype=None):
        super().__init__()
        stages, factory = config.decoder, {"device": device, "dtype": dtype}
        self.conv_in = operations.Conv2d(config.latent_channels, stages[-1].width, 3, padding=1, **factory)
        self.repeats = stages[-1].width // config.latent_channels if config.in_shortcut else 0
        self.up_blocks = nn.ModuleList()
        for i, stage in enumerate(stages):
            blocks = _blocks(stage, config.head_dim, operations, device, dtype)
            if blocks and i + 1 < len(stages):
                blocks.insert(0, Upsample(stages[i + 1].width, stage.width, config.upsample, True, operations, **factory))
            self.up_blocks.append(nn.Sequential(*blocks))
        width = stages[0].width if stages[0].layers else stages[1].width
        self.norm_out = ChannelRMSNorm(width, **factory)
        self.activation = getattr(F, config.out_activation)
        if stages[0].layers:
            self.conv_out = operations.Conv2d(width, config.in_channels, 3, padding=1, **factory)
        else:
            self.conv_out = Upsample(width, config.in_channels, config.upsample, False, operations, **factory)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        if self.repeats:
            x = x + z.repeat_interleave(self.repeats, 1)
        for stage in reversed(self.up_blocks):
            x = stage(x)
        return self.conv_out(self.activation(self.norm_out(x)))


TILE, STRIDE = 1024, 896  # pixels; smaller tiles show, because attention in the deep stages spans the tile


class Autoencoder(nn.Module):
    """DC-AE with its latent scale: images (B, 3, H, W) in [-1, 1] <-> latents (B, C, H / factor, W / factor) of unit variance.

    Computes in float32 or bfloat16; float16 overflows in the deep stages.
    """

    def __init__(self, config: AutoencoderConfig, operations=nn, device=None, dtype=None):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, operations, device, dtype)
        self.decoder = Decoder(config, operations, device, dtype)

    def encode(self, x: Tensor) -> Tensor:
        self._check(x)
        return self.encoder(x) * self.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z / self.config.scaling_factor)

    def peak_bytes(self, height: int, width: int, dtype: torch.dtype) -> int:
        """Bytes that one image (height, width in pixels) takes at its peak.

        Live tensors were counted in a CPU run: as wide as the first stage 5 of float32, or 7 of bfloat16, whose norms compute in float32;
        and three float32 copies of the image.
        """
        config = self.config
        channels = max(config.encoder[0].width, config.decoder[0].width, config.decoder[1].width // 4)
        return ((5 if dtype == torch.float32 else 7) * channels * dtype.itemsize + 3 * 3 * 4) * height * width

    def tiled_encode(self, x: Tensor, tile: int | Pair = TILE, stride: int | Pair = STRIDE) -> Tensor:
        """Encodes in tiles of `tile` pixels (or (height, width)), one every `stride` pixels, blended linearly where they overlap."""
        self._check(x)
        return _tiled(self.encode, x, *self._tiles(tile, stride), lambda pixels: pixels, lambda pixels: pixels // self.config.factor)

    def tiled_decode(self, z: Tensor, tile: int | Pair = TILE, stride: int | Pair = STRIDE) -> Tensor:
        """Decodes in tiles of `tile` pixels (or (height, width)), one every `stride` pixels, blended linearly where they overlap."""
        return _tiled(self.decode, z, *self._tiles(tile, stride), lambda pixels: pixels // self.config.factor, lambda pixels: pixels)

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


def _tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile: Pair, stride: Pair, into: Callable[[int], int],
           out: Callable[[int], int]) -> Tensor:
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
            made = function(x[..., top:top + tile_h, left:left + tile_w])
            if above:
                made = _blend(above[j], made, blend_h, -2)
            if row:
                made = _blend(row[-1], made, blend_w, -1)
            row.append(made)
        rows.append(torch.cat([made[..., :keep_h, :keep_w] for made in row], -1))
        above = row
    blended = torch.cat(rows, -2)
    return blended[..., :height * out(tile[0]) // tile_h, :width * out(tile[1]) // tile_w]


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
