"""Stable Diffusion's VAE: the KL autoencoder of latent diffusion (arXiv 2112.10752), encoder and decoder.

Parameter names are those of diffusers' AutoencoderKL; `diffusers_names` makes them of older and of the original names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TimError
from .bands import GPU_BAND
from .released import SD_VAE, SD_VAE_CHANNELS, SD_VAE_SCALE
from .tiles import TiledAutoencoder

LEVELS = 4  # resolutions
OTHER_SCALES = {0.13025: "SDXL", 0.3611: "Flux", 1.5305: "SD3", 0.08333: "the x4 upscaler"}
GROUPS = 32  # of the norms
FINEST_TENSORS = 4.75  # as wide as the finest level, that are alive at the peak: 5 of a decode, 4 of an encode
# what diffusers' config.json may not set otherwise, with the defaults of its class
REQUIRED = {
    "in_channels": 3, "out_channels": 3, "latent_channels": SD_VAE_CHANNELS, "act_fn": "silu", "norm_num_groups": GROUPS,
    "scaling_factor": SD_VAE_SCALE, "shift_factor": None, "latents_mean": None, "latents_std": None, "use_quant_conv": True,
    "use_post_quant_conv": True, "mid_block_add_attention": True,
}  # fmt: skip


@dataclass(frozen=True)
class KLAutoencoderConfig:
    """Architecture of Stable Diffusion's VAE; widths[0] is that of the finest resolution. TimError for other KL autoencoders."""

    TITLE: ClassVar = "Stable Diffusion VAE"
    DIFFUSERS: ClassVar = ("AutoencoderKL", "block_out_channels")  # its class there, and a key of every config.json
    RECORD: ClassVar = ("scaling_factor", "force_upcast")

    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2  # residual blocks per resolution of the encoder; the decoder has one more
    latent_channels: int = SD_VAE_CHANNELS
    scaling_factor: float = SD_VAE_SCALE
    force_upcast: bool = False  # compute in float32 only

    def __post_init__(self) -> None:
        if self.latent_channels != SD_VAE_CHANNELS:
            raise _other("latent_channels", self.latent_channels, SD_VAE_CHANNELS)
        if self.scaling_factor != SD_VAE_SCALE:
            raise _other("scaling_factor", self.scaling_factor, SD_VAE_SCALE)
        if not isinstance(self.force_upcast, bool):
            raise TimError(f"{self.TITLE}: force_upcast is {self.force_upcast!r}; it must be true or false")
        if len(self.widths) != LEVELS:
            raise _other("number of resolutions", len(self.widths), LEVELS)
        if self.layers < 1 or any(width < 1 or width % GROUPS for width in self.widths):
            raise TimError(f"{self.TITLE}: {self.layers} layers of widths {list(self.widths)}; widths must be multiples of {GROUPS}")

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.widths) - 1)

    def record(self) -> dict[str, Any]:
        """The settings that tensor shapes do not determine, as from_state_dict takes them in metadata."""
        return {name: getattr(self, name) for name in self.RECORD}

    @classmethod
    def from_diffusers(cls, config: dict) -> KLAutoencoderConfig:
        """Reads the config.json of a diffusers AutoencoderKL. TimError naming a key that Stable Diffusion's VAE has otherwise."""
        _check_required(config)
        widths, layers = config["block_out_channels"], config.get("layers_per_block", 1)
        if not isinstance(widths, (list, tuple)) or not all(_is_whole(width) for width in widths):
            raise TimError(f"SD VAE: block_out_channels is {widths!r}; it must be a list of whole numbers")
        if not _is_whole(layers):
            raise TimError(f"SD VAE: layers_per_block is {layers!r}; it must be a whole number")
        return cls(tuple(widths), layers, force_upcast=config.get("force_upcast") or False)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> KLAutoencoderConfig:
        """Reads the architecture from key names and shapes. metadata: what `record` writes. TimError for other KL autoencoders."""
        metadata = metadata or {}
        _check_required(metadata)
        places = set()
        for name in state_dict:
            if match := re.match(r"encoder\.down_blocks\.([0-9]{1,3})\.resnets\.([0-9]{1,3})\.conv1\.weight$", name):
                places.add((int(match[1]), int(match[2])))
        levels, layers = len({level for level, _ in places}), len({layer for level, layer in places if not level})
        widths = []
        for name in [*(f"encoder.down_blocks.{level}.resnets.0.conv1.weight" for level in range(levels)), "post_quant_conv.weight"]:
            if name not in state_dict or state_dict[name].ndim != 4:
                shape = list(state_dict[name].shape) if name in state_dict else "missing"
                raise TimError(f"not a complete {cls.TITLE}: tensor '{name}' is {shape}; it must have 4 dimensions")
            widths.append(state_dict[name].shape[0])
        *widths, channels = widths
        scale, upcast = metadata.get("scaling_factor", SD_VAE_SCALE), metadata.get("force_upcast") or False
        return cls(tuple(widths), layers, channels, scale, upcast)


def _check_required(config: Mapping[str, Any]) -> None:
    """TimError naming a setting that Stable Diffusion's VAE has otherwise. A shift of 0 is none."""
    for name, wanted in REQUIRED.items():
        if name in config and config[name] != wanted and not (wanted is None and config[name] == 0):
            raise _other(name, config[name], wanted)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _other(name: str, value: object, wanted: object) -> TimError:
    """The error about a KL autoencoder that is not Stable Diffusion's: SDXL's, Flux's, ..."""
    owner = next((f" ({owner})" for scale, owner in OTHER_SCALES.items() if name == "scaling_factor" and value == scale), "")
    return TimError(f"a KL autoencoder, but not Stable Diffusion's: {name} is {value!r}{owner} in place of {wanted}; use {SD_VAE}")


class ResnetBlock(nn.Module):
    """norm - silu - conv, twice, plus the input."""

    def __init__(self, channels: int, out_channels: int, operations, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.norm1 = operations.GroupNorm(GROUPS, channels, eps=1e-6, **factory)
        self.conv1 = operations.Conv2d(channels, out_channels, 3, padding=1, **factory)
        self.norm2 = operations.GroupNorm(GROUPS, out_channels, eps=1e-6, **factory)
        self.conv2 = operations.Conv2d(out_channels, out_channels, 3, padding=1, **factory)
        self.conv_shortcut = operations.Conv2d(channels, out_channels, 1, **factory) if channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(_silu(self.norm1(x)))
        h = self.conv2(_silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """One head over all pixels, plus the input; queries in parts, so that no matrix of all pixels by all pixels is made."""

    def __init__(self, channels: int, operations, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.group_norm = operations.GroupNorm(GROUPS, channels, eps=1e-6, **factory)
        self.to_q = operations.Linear(channels, channels, **factory)
        self.to_k = operations.Linear(channels, channels, **factory)
        self.to_v = operations.Linear(channels, channels, **factory)
        self.to_out = nn.ModuleList([operations.Linear(channels, channels, **factory)])

    def forward(self, x: Tensor) -> Tensor:
        rows = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1, H W, C)
        q, k, v = self.to_q(rows), self.to_k(rows), self.to_v(rows)
        count = max(1, GPU_BAND // (k[:, :, :, 0].numel() * k.element_size()))
        parts = [F.scaled_dot_product_attention(part, k, v) for part in q.split(count, 2)]
        return x + self.to_out[0](torch.cat(parts, 2)).squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """Halves the sides; the one row and column of padding are at the lower and right edge."""

    def __init__(self, channels: int, operations, device=None, dtype=None):
        super().__init__()
        self.conv = operations.Conv2d(channels, channels, 3, stride=2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the sides."""

    def __init__(self, channels: int, operations, device=None, dtype=None):
        super().__init__()
        self.conv = operations.Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, then the way to the next: `downsamplers` or `upsamplers`."""

    def __init__(
        self, channels: int, out_channels: int, layers: int, resample: type[nn.Module] | None, operations, device=None, dtype=None
    ):
        super().__init__()
        widths = [channels, *[out_channels] * layers]
        self.resnets = nn.ModuleList(ResnetBlock(*pair, operations, device, dtype) for pair in zip(widths, widths[1:]))
        if resample is not None:
            samplers = nn.ModuleList([resample(out_channels, operations, device, dtype)])
            self.add_module("downsamplers" if resample is Downsample else "upsamplers", samplers)

    def blocks(self) -> list[nn.Module]:
        return [block for blocks in self.children() for block in blocks.children()]


class Middle(nn.Module):
    """Attention between two residual blocks."""

    def __init__(self, channels: int, operations, device=None, dtype=None):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, operations, device, dtype)])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, operations, device, dtype) for _ in range(2))

    def blocks(self) -> list[nn.Module]:
        return [self.resnets[0], self.attentions[0], self.resnets[1]]


class Coder(nn.Module):
    """Encoder or decoder: a convolution, blocks, a norm and a convolution."""

    def __init__(self, channels: int, first: int, last: int, out_channels: int, operations, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.conv_in = operations.Conv2d(channels, first, 3, padding=1, **factory)
        self.conv_norm_out = operations.GroupNorm(GROUPS, last, eps=1e-6, **factory)
        self.conv_out = operations.Conv2d(last, out_channels, 3, padding=1, **factory)

    def run(self, x: Tensor, parts: list[nn.Module]) -> Tensor:
        x = self.conv_in(x)
        for part in parts:
            for block in part.blocks():
                x = block(x)
        return self.conv_out(_silu(self.conv_norm_out(x)))


class Encoder(Coder):
    """(B, 3, H, W) -> mean and log variance (B, 2 C, H / factor, W / factor), before `quant_conv`."""

    def __init__(self, config: KLAutoencoderConfig, *context):
        widths = config.widths
        super().__init__(3, widths[0], widths[-1], 2 * config.latent_channels, *context)
        pairs, last = zip((widths[0], *widths), widths), len(widths) - 1
        self.down_blocks = nn.ModuleList(
            Level(*pair, config.layers, Downsample if i < last else None, *context) for i, pair in enumerate(pairs)
        )
        self.mid_block = Middle(widths[-1], *context)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, [*self.down_blocks, self.mid_block])


class Decoder(Coder):
    """(B, C, h, w), after `post_quant_conv` -> (B, 3, h * factor, w * factor)."""

    def __init__(self, config: KLAutoencoderConfig, *context):
        widths = config.widths[::-1]
        super().__init__(config.latent_channels, widths[0], widths[-1], 3, *context)
        pairs, last = zip((widths[0], *widths), widths), len(widths) - 1
        self.up_blocks = nn.ModuleList(
            Level(*pair, config.layers + 1, Upsample if i < last else None, *context) for i, pair in enumerate(pairs)
        )
        self.mid_block = Middle(widths[0], *context)

    def forward(self, z: Tensor) -> Tensor:
        return self.run(z, [self.mid_block, *self.up_blocks])


class KLAutoencoder(TiledAutoencoder):
    """Stable Diffusion's VAE with its latent scale; the latent of an image is the mean of its distribution."""

    HALVES = {"encoder": ("encoder", "quant_conv"), "decoder": ("decoder", "post_quant_conv")}

    def __init__(self, config: KLAutoencoderConfig, operations=nn, device=None, dtype=None):
        super().__init__(config)
        context, channels = (operations, device, dtype), config.latent_channels
        self.encoder, self.decoder = Encoder(config, *context), Decoder(config, *context)
        self.quant_conv = operations.Conv2d(2 * channels, 2 * channels, 1, device=device, dtype=dtype)
        self.post_quant_conv = operations.Conv2d(channels, channels, 1, device=device, dtype=dtype)

    def encode(self, x: Tensor) -> Tensor:
        self._check(x)
        return (self.quant_conv(self.encoder(x))[:, : self.config.latent_channels] * self.config.scaling_factor).contiguous()

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z / self.config.scaling_factor))

    def peak_bytes(self, height: int, width: int, dtype: torch.dtype, device: torch.device = torch.device("cuda")) -> int:
        """Bytes that one image (height, width in pixels) takes at its peak, whole, in inference, on any device.

        Counted as live tensors, in a decode where the finest level takes over from the one below; and three float32 copies of the image.
        """
        finest = max(self.config.widths[0], self.config.widths[1] // 2)
        return int(FINEST_TENSORS * finest * dtype.itemsize + 3 * 3 * 4) * height * width


def _silu(x: Tensor) -> Tensor:
    """silu(x), written over x where nothing is differentiated."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


ORIGINAL = "encoder.down.0.block.0.conv1.weight"  # tells the names of the original code
# of the original code, where a level of the decoder is counted from the finest
ORIGINAL_NAMES = (
    (r"\.down\.(\d)\.block\.", r".down_blocks.\1.resnets."), (r"\.down\.(\d)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d)\.block\.", r".up_blocks.<\1>.resnets."), (r"\.up\.(\d)\.upsample\.", r".up_blocks.<\1>.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."), (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."), (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.norm_out\.", ".conv_norm_out."), (r"\.nin_shortcut\.", ".conv_shortcut."),
)  # fmt: skip
# layers of attention as diffusers called them before version 0.17, and as the original code does
ATTENTION_NAMES = {
    "query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0",
}  # fmt: skip


def diffusers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a KL autoencoder under diffusers' present names; attention's weights, stored as 1x1 kernels by some, as matrices.

    TimError for a tensor that is there under two names.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = name
        for pattern, replacement in ORIGINAL_NAMES if ORIGINAL in tensors else ():
            new = re.sub(pattern, replacement, new)
        new = re.sub(r"<(\d)>", lambda match: str(LEVELS - 1 - int(match[1])), new)
        if match := re.fullmatch(r"(.*\.attentions\.0\.)(to_out\.0|\w+)(\.\w+)", new):
            new = match[1] + ATTENTION_NAMES.get(match[2], match[2]) + match[3]
            if tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
                tensor = tensor.flatten(1)
        if new in found:
            raise TimError(f"tensor '{new}' occurs twice, once under an older name; save the file again")
        found[new] = tensor
    return found
