"""DC-AE: the deep-compression autoencoder (arXiv 2410.10733), encoder, decoder and blended tiles.

Parameter names are those of diffusers' AutoencoderDC, so its checkpoints load as they are.
"""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TimError
from .config import AutoencoderConfig, StageConfig

Pair = tuple[int, int]
CPU_BAND, GPU_BAND = 8 * 2**20, 128 * 2**20  # bytes of the widest tensor of a band; on a CPU it stays in the cache


def _infers(module: nn.Module) -> bool:
    """Whether tensors may be overwritten and work be done in bands of rows: nothing is differentiated, no batch norm learns."""
    return not torch.is_grad_enabled() and not module.training


def _bands(x: Tensor, channels: int) -> Iterator[tuple[slice, int, int]]:
    """Images, top and bottom row of the bands of x, in each of which a tensor of `channels` channels takes CPU_BAND or GPU_BAND bytes."""
    height = x.shape[-2]
    row = channels * x.shape[-1] * x.element_size()
    budget = CPU_BAND if x.device.type == "cpu" else GPU_BAND
    if len(x) * height * row <= budget:
        yield slice(None), 0, height
        return
    count = -(-height // max(4, budget // row))
    for image in range(len(x)):
        for i in range(count):
            yield slice(image, image + 1), i * height // count, (i + 1) * height // count


def _rows(x: Tensor, top: int, bottom: int) -> Tensor:
    """Rows top to bottom of x, zero where they lie outside."""
    above, below = max(-top, 0), max(bottom - x.shape[-2], 0)
    return _pad_rows(x[..., top + above : bottom - below, :], above, below)


def _pad_rows(x: Tensor, above: int = 1, below: int = 1) -> Tensor:
    return F.pad(x, (0, 0, above, below)) if above or below else x


def _overwrite(
    x: Tensor, expand: Callable[[Tensor], Tensor], contract: Callable[[Tensor], Tensor], halo: int, channels: int
) -> Tensor:
    """x + contract(expand(x)), written over x band by band.

    expand: rows of x, with `halo` more above and below -> rows of up to `channels` channels; contract: these, with one more row above
    and below -> what is added to x. Rows outside the image are zero for both.
    """
    height, held = x.shape[-2], x[..., :0, :]
    for images, top, bottom in _bands(x, channels):
        band, end = x[images], min(bottom + 1, height)
        start = top + 1 if top else 0  # rows before were expanded for the band above
        expanded = _pad_rows(expand(_rows(band, start - halo, end + halo)), not top, bottom == height)
        if top:
            expanded = torch.cat((held, expanded), -2)
        held = expanded[..., -2:, :].clone()  # the band below needs them, and not the rest
        band[..., top:bottom, :].add_(contract(expanded))
    return x


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

    def overwrite(self, x: Tensor) -> Tensor:
        """The norm of x; it may be written over x."""
        rows = x.movedim(1, -1).to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        scale = length.square_().div_(rows.shape[-1]).add_(1e-5).rsqrt_()
        return torch.addcmul(self.bias.to(rows), rows.mul_(scale), self.weight.to(rows), out=rows).to(x.dtype).movedim(-1, 1)


def _norm(kind: str, channels: int, device, dtype) -> nn.Module:
    if kind == "batch_norm":
        return nn.BatchNorm2d(channels, device=device, dtype=dtype)
    return ChannelRMSNorm(channels, device, dtype)


def _normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x), which may be written over x."""
    return norm.overwrite(x) if isinstance(norm, ChannelRMSNorm) else norm(x)


def _activate(activation: Callable[..., Tensor], x: Tensor) -> Tensor:
    """activation(x), written over x where nothing is differentiated."""
    return activation(x, inplace=True) if activation is not F.gelu and not torch.is_grad_enabled() else activation(x)


class ResBlock(nn.Module):
    """conv - activation - conv - norm, plus the input; over which the result is written in inference, as in every block here."""

    def __init__(self, channels: int, norm: str, activation: str, operations, device=None, dtype=None):
        super().__init__()
        self.channels, self.activation = channels, getattr(F, activation)
        # rows are padded by hand, so that bands have the rows that they need and no others
        self.conv1 = operations.Conv2d(channels, channels, 3, padding=(0, 1), device=device, dtype=dtype)
        self.conv2 = operations.Conv2d(channels, channels, 3, padding=(0, 1), bias=False, device=device, dtype=dtype)
        self.norm = _norm(norm, channels, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if _infers(self):
            return _overwrite(x, self._expand, lambda h: _normalize(self.norm, self.conv2(h)), 1, self.channels)
        return x + self.norm(self.conv2(_pad_rows(self._expand(_pad_rows(x)))))

    def _expand(self, x: Tensor) -> Tensor:
        return _activate(self.activation, self.conv1(x))


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
        scales = [qkv, *(scale(qkv) for scale in self.to_qkv_multiscale)]
        # each run of 3 * head_dim channels is one head's q, k, v, even across the q | k | v border: the trained layout
        out = torch.cat([self._attend(one.reshape(batch, -1, 3 * self.head_dim, height * width)) for one in scales], 1)
        out = self.to_out(out.reshape(batch, -1, height, width).movedim(1, -1)).movedim(-1, 1)
        return x.add_(_normalize(self.norm_out, out)) if _infers(self) else x + self.norm_out(out)

    def _attend(self, qkv: Tensor) -> Tensor:
        """(B, heads, 3 * head_dim, HW) -> (B, heads, head_dim, HW)."""
        dtype, linear = qkv.dtype, qkv.shape[-1] > self.head_dim
        q, k, v = (qkv.float() if linear else qkv).chunk(3, 2)
        q, k = F.relu(q), F.relu(k)
        if not linear:
            scores = (k.transpose(-1, -2) @ q).float()
            scores = scores / (scores.sum(2, keepdim=True) + 1e-15)
            return v @ scores.to(v.dtype)
        v = F.pad(v, (0, 0, 0, 1), value=1.0)                                                       # a row of ones sums the weights
        out = (v @ k.transpose(-1, -2)) @ q
        return (out[:, :, :-1] / (out[:, :, -1:] + 1e-15)).to(dtype)


class GatedConv(nn.Module):
    """Gated linear unit with a depthwise convolution (GLUMBConv), plus the input."""

    def __init__(self, channels: int, operations, device=None, dtype=None):
        super().__init__()
        self.hidden, factory = 4 * channels, {"device": device, "dtype": dtype}
        self.conv_inverted = operations.Conv2d(channels, 2 * self.hidden, 1, **factory)
        self.conv_depth = operations.Conv2d(2 * self.hidden, 2 * self.hidden, 3, padding=(0, 1), groups=2 * self.hidden, **factory)
        self.conv_point = operations.Conv2d(self.hidden, channels, 1, bias=False, **factory)
        self.norm = ChannelRMSNorm(channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        if _infers(self):
            return _overwrite(x, self._expand, lambda h: _normalize(self.norm, self._contract(h)), 0, 2 * self.hidden)
        return x + self.norm(self._contract(_pad_rows(self._expand(x))))

    def _expand(self, x: Tensor) -> Tensor:
        return _activate(F.silu, self.conv_inverted(x))

    def _contract(self, x: Tensor) -> Tensor:
        h, gate = self.conv_depth(x).chunk(2, 1)
        gate = _activate(F.silu, gate)
        return self.conv_point(h * gate if torch.is_grad_enabled() else gate.mul_(h))


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
        if self.unshuffle:
            self.conv = operations.Conv2d(channels, out_channels // 4, 3, padding=(0, 1), device=device, dtype=dtype)
        else:
            self.conv = operations.Conv2d(channels, out_channels, 3, stride=2, padding=1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not _infers(self):
            out = F.pixel_unshuffle(self.conv(_pad_rows(x)), 2) if self.unshuffle else self.conv(x)
            return out + self._shortcut(x) if self.shortcut else out
        out = _empty_like(x, self.out_channels, x.shape[-2] // 2, x.shape[-1] // 2) if self.unshuffle else self.conv(x)
        for images, top, bottom in _bands(out, 4 * max(self.out_channels // 4, x.shape[1])):
            band = out[images, :, top:bottom]
            if self.unshuffle:
                band.copy_(F.pixel_unshuffle(self.conv(_rows(x[images], 2 * top - 1, 2 * bottom + 1)), 2))
            if self.shortcut:
                band.add_(self._shortcut(x[images, :, 2 * top : 2 * bottom]))
        return out

    def _shortcut(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, 2).unflatten(1, (self.out_channels, -1)).mean(2)


@cache
def _enlarging(conv: type[nn.Conv2d]) -> type[nn.Conv2d]:
    """The layer conv(F.interpolate(x, scale_factor=2)) for a 3x3 convolution.

    In inference it runs 2x2 kernels on x itself, with 4/9 of the products: of three neighbours along an axis two are the same pixel of x.
    """

    class Enlarging(conv):  # type: ignore[valid-type, misc]
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if torch.is_grad_enabled() or x.shape[-2] * x.shape[-1] < MIN_PIXELS:
                return super()._conv_forward(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias)
            kernels, bias = _phase_kernels(weight), None if bias is None else bias.repeat(4)
            out = _empty_like(x, len(weight), 2 * x.shape[-2], 2 * x.shape[-1])
            for images, top, bottom in _bands(x, len(kernels)):
                padded = F.pad(_rows(x[images], top - 1, bottom + 1), (1, 1))
                made = F.conv2d(padded, kernels, bias).unflatten(1, (4, -1))  # has one row and one column more than x
                for row, column in product((0, 1), repeat=2):
                    phase = made[:, 2 * row + column, :, row : row + bottom - top, column : column + x.shape[-1]]
                    out[images, :, 2 * top + row : 2 * bottom : 2, column::2] = phase
            return out

    return Enlarging


MIN_PIXELS = 1024  # of an image to enlarge; with fewer, adding the weights takes longer than it saves


def _phase_kernels(weight: Tensor) -> Tensor:
    """Kernels (O, I, 3, 3) for an enlarged image -> (4 * O, I, 2, 2) for the image: even rows (even, odd columns), odd rows."""
    sums = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], device=weight.device)  # phase, tap, tap of the 3x3 kernel
    sums = torch.einsum("apr,bqs->rsabpq", sums, sums).reshape(9, 16)
    return (weight.flatten(2) @ sums.to(weight)).unflatten(-1, (4, 2, 2)).movedim(2, 0).flatten(0, 1)


def _empty_like(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Memory for a tensor of another size in x's layout."""
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return torch.empty((len(x), channels, height, width), dtype=x.dtype, device=x.device, memory_format=layout)


class Upsample(nn.Module):
    """Doubles the sides; the shortcut is the shuffled, repeated input (DC-AE 3.2)."""

    def __init__(self, channels: int, out_channels: int, kind: str, shortcut: bool, operations, device=None, dtype=None):
        super().__init__()
        self.interpolate, self.repeats = kind == "interpolate", 4 * out_channels // channels if shortcut else 0
        self.out_channels = out_channels
        if self.interpolate:
            self.conv = _enlarging(operations.Conv2d)(channels, out_channels, 3, padding=1, device=device, dtype=dtype)
        else:
            self.conv = operations.Conv2d(channels, 4 * out_channels, 3, padding=(0, 1), device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not _infers(self):
            out = self.conv(x) if self.interpolate else F.pixel_shuffle(self.conv(_pad_rows(x)), 2)
            return out + self._shortcut(x) if self.repeats else out
        out = self.conv(x) if self.interpolate else _empty_like(x, self.out_channels, 2 * x.shape[-2], 2 * x.shape[-1])
        if self.interpolate and not self.repeats:
            return out
        for images, top, bottom in _bands(x, 4 * self.out_channels):
            band = out[images, :, 2 * top : 2 * bottom]
            if not self.interpolate:
                band.copy_(F.pixel_shuffle(self.conv(_rows(x[images], top - 1, bottom + 1)), 2))
            if self.repeats:
                band.add_(self._shortcut(x[images, :, top:bottom]))
        return out

    def _shortcut(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(x.repeat_interleave(self.repeats, 1), 2)


def _as_computed(x: Tensor) -> Tensor:
    """x in the layout in which inference is fastest: channels last on a CPU and on CUDA."""
    return x if torch.is_grad_enabled() or x.device.type not in ("cpu", "cuda") else x.contiguous(memory_format=torch.channels_last)


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
        x = self.conv_in(_as_computed(x))
        for stage in self.down_blocks:
            for block in stage.children():  # one by one, so that no name holds a tensor that is not needed any more
                x = block(x)
        out = self.conv_out(x)
        out = out + x.unflatten(1, (self.latent_channels, -1)).mean(2) if self.shortcut else out
        return out.contiguous()


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
        z = _as_computed(z)
        x = self.conv_in(z)
        if self.repeats:
            x = x + z.repeat_interleave(self.repeats, 1)
        for stage in reversed(self.up_blocks):
            for block in stage.children():  # one by one, so that no name holds a tensor that is not needed any more
                x = block(x)
        if not _infers(self):
            return self.conv_out(self.activation(self.norm_out(x)))
        for images, top, bottom in _bands(x, x.shape[1]):
            band = x[images, :, top:bottom]
            band.copy_(_activate(self.activation, _normalize(self.norm_out, band)))
        return self.conv_out(x)


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
        return (self.encoder(x) * self.config.scaling_factor).contiguous()

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z / self.config.scaling_factor)

    def peak_bytes(self, height: int, width: int, dtype: torch.dtype, device: torch.device = torch.device("cuda")) -> int:
        """Bytes that one image (height, width in pixels) takes at its peak, whole, in inference.

        Counted as live tensors, see benchmarks/memory.py: a tensor as wide as the finest stage, and half of it while that is made from the
        stage below, or the tensors of a band; and three float32 copies of the image.
        """
        config = self.config
        channels = max(config.encoder[0].width, config.decoder[0].width, config.decoder[1].width // 4)
        whole = channels * dtype.itemsize * height * width
        band = min(whole, CPU_BAND if device.type == "cpu" else GPU_BAND)
        in_bands = whole + (2.5 if dtype == torch.float32 else 5) * band  # below float32, the norms compute in it
        return int(max(1.5 * whole + 2.6 * band, in_bands)) + 3 * 3 * 4 * height * width

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
