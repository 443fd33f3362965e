"""The layers of a DC-AE (arXiv 2410.10733). Parameter names are those of diffusers' AutoencoderDC."""

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bands import bands, empty_like, infers, overwrite, pad_rows, take_rows

MIN_PIXELS = 1024  # of an image to enlarge; with fewer, adding the weights takes longer than it saves


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


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x), which may be written over x."""
    return norm.overwrite(x) if isinstance(norm, ChannelRMSNorm) else norm(x)


def activate(activation: Callable[..., Tensor], x: Tensor) -> Tensor:
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
        if infers(self):
            return overwrite(x, self._expand, lambda h: normalize(self.norm, self.conv2(h)), 1, self.channels)
        return x + self.norm(self.conv2(pad_rows(self._expand(pad_rows(x)))))

    def _expand(self, x: Tensor) -> Tensor:
        return activate(self.activation, self.conv1(x))


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
        return x.add_(normalize(self.norm_out, out)) if infers(self) else x + self.norm_out(out)

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
        if infers(self):
            return overwrite(x, self._expand, lambda h: normalize(self.norm, self._contract(h)), 0, 2 * self.hidden)
        return x + self.norm(self._contract(pad_rows(self._expand(x))))

    def _expand(self, x: Tensor) -> Tensor:
        return activate(F.silu, self.conv_inverted(x))

    def _contract(self, x: Tensor) -> Tensor:
        h, gate = self.conv_depth(x).chunk(2, 1)
        gate = activate(F.silu, gate)
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
        if not infers(self):
            out = F.pixel_unshuffle(self.conv(pad_rows(x)), 2) if self.unshuffle else self.conv(x)
            return out + self._shortcut(x) if self.shortcut else out
        out = empty_like(x, self.out_channels, x.shape[-2] // 2, x.shape[-1] // 2) if self.unshuffle else self.conv(x)
        for images, top, bottom in bands(out, 4 * max(self.out_channels // 4, x.shape[1])):
            band = out[images, :, top:bottom]
            if self.unshuffle:
                band.copy_(F.pixel_unshuffle(self.conv(take_rows(x[images], 2 * top - 1, 2 * bottom + 1)), 2))
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
            out = empty_like(x, len(weight), 2 * x.shape[-2], 2 * x.shape[-1])
            for images, top, bottom in bands(x, len(kernels)):
                padded = F.pad(take_rows(x[images], top - 1, bottom + 1), (1, 1))
                made = F.conv2d(padded, kernels, bias).unflatten(1, (4, -1))  # has one row and one column more than x
                for row, column in product((0, 1), repeat=2):
                    phase = made[:, 2 * row + column, :, row : row + bottom - top, column : column + x.shape[-1]]
                    out[images, :, 2 * top + row : 2 * bottom : 2, column::2] = phase
            return out

    return Enlarging


def _phase_kernels(weight: Tensor) -> Tensor:
    """Kernels (O, I, 3, 3) for an enlarged image -> (4 * O, I, 2, 2) for the image: even rows (even, odd columns), odd rows."""
    sums = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], device=weight.device)  # phase, tap, tap of the 3x3 kernel
    sums = torch.einsum("apr,bqs->rsabpq", sums, sums).reshape(9, 16)
    return (weight.flatten(2) @ sums.to(weight)).unflatten(-1, (4, 2, 2)).movedim(2, 0).flatten(0, 1)


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
        if not infers(self):
            out = self.conv(x) if self.interpolate else F.pixel_shuffle(self.conv(pad_rows(x)), 2)
            return out + self._shortcut(x) if self.repeats else out
        out = self.conv(x) if self.interpolate else empty_like(x, self.out_channels, 2 * x.shape[-2], 2 * x.shape[-1])
        if self.interpolate and not self.repeats:
            return out
        for images, top, bottom in bands(x, 4 * self.out_channels):
            band = out[images, :, 2 * top : 2 * bottom]
            if not self.interpolate:
                band.copy_(F.pixel_shuffle(self.conv(take_rows(x[images], top - 1, bottom + 1)), 2))
            if self.repeats:
                band.add_(self._shortcut(x[images, :, top:bottom]))
        return out

    def _shortcut(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(x.repeat_interleave(self.repeats, 1), 2)
