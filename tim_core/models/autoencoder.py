"""DC-AE: the deep-compression autoencoder (arXiv 2410.10733), encoder, decoder and blended tiles.

Parameter names are those of diffusers' AutoencoderDC, so its checkpoints load as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bands import band_bytes, bands, infers
from .config import AutoencoderConfig, StageConfig
from .dcae_blocks import ChannelRMSNorm, Downsample, EfficientViTBlock, ResBlock, Upsample, activate, normalize
from .tiles import TiledAutoencoder


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
        if not infers(self):
            return self.conv_out(self.activation(self.norm_out(x)))
        for images, top, bottom in bands(x, x.shape[1]):
            band = x[images, :, top:bottom]
            band.copy_(activate(self.activation, normalize(self.norm_out, band)))
        return self.conv_out(x)


class Autoencoder(TiledAutoencoder):
    """DC-AE with its latent scale: images (B, 3, H, W) in [-1, 1] <-> latents (B, C, H / factor, W / factor) of unit variance.

    Computes in float32 or bfloat16; float16 overflows in the deep stages.
    """

    def __init__(self, config: AutoencoderConfig, operations=nn, device=None, dtype=None):
        super().__init__(config)
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
        band = min(whole, band_bytes(device))
        in_bands = whole + (2.5 if dtype == torch.float32 else 5) * band  # below float32, the norms compute in it
        return int(max(1.5 * whole + 2.6 * band, in_bands)) + 3 * 3 * 4 * height * width
