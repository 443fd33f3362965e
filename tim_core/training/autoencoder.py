"""Trains a DC-AE with latents of mean 0 and variance 1, and a decoder that is robust to noise on them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import TimError, one_line
from ..files import atomic_write
from ..models.autoencoder import Autoencoder
from ..models.config import AutoencoderConfig, StageConfig
from ..processes import find_processes
from ..shapes.batches import ShapesBatches
from ..weights.load import load_autoencoder
from .config import recorded
from .loop import train
from .resume import init_from
from .samples import grid
from .shapes_config import AutoencoderTraining


def architecture(config: AutoencoderTraining) -> AutoencoderConfig:
    """The AutoencoderConfig of a training configuration: EfficientViT blocks in the last `attention_stages`, residual blocks before."""
    def stages(widths, layers):
        kinds = ["ResBlock"] * (len(widths) - config.attention_stages) + ["EfficientViTBlock"] * config.attention_stages
        return tuple(StageConfig(w if n else 0, n, k if n else "ResBlock", (5,) if n and k == "EfficientViTBlock" else ())
                     for w, n, k in zip(widths, layers, kinds))

    return AutoencoderConfig(
        stages(config.encoder_widths, config.encoder_layers), stages(config.decoder_widths, config.decoder_layers),
        latent_channels=config.latent_channels, head_dim=config.head_dim, downsample="pixel_unshuffle", upsample="pixel_shuffle")


def losses(model: nn.Module, images: Tensor, noise: Tensor, config: AutoencoderTraining) -> dict[str, Tensor]:
    """L1 error of the decoded noisy latent, plus the distance of the shard's latents from mean 0 and variance 1 per channel."""
    latent = model.encode(images).float()
    decoded = model.decode(latent + noise.to(latent)).float()
    error = (decoded - images).abs().mean()
    mean, var = latent.mean((0, 2, 3)), latent.var((0, 2, 3))
    prior = (mean.square() + (var - 1).square()).mean()
    return {"loss": error + config.latent_weight * prior, "l1": error, "prior": prior}


def train_autoencoder(config: AutoencoderTraining, image_encoder=None) -> Path:
    """Runs a `kind: autoencoder` configuration; returns the safetensors file of the EMA. `image_encoder` is not used."""
    loop, folder = config.loop, Path(config.output).expanduser()
    torch.manual_seed(loop.seed)
    try:
        model = Autoencoder(architecture(config)).to(memory_format=torch.channels_last)
        with torch.no_grad():
            model.decode(model.encode(torch.zeros(1, 3, *(2 * model.config.factor,) * 2)))
    except (RuntimeError, ValueError, ZeroDivisionError) as error:
        reason = one_line(error)
        raise TimError(f"training config: no DC-AE has these widths, layers and head_dim ({reason}); change them") from error
    if config.start:
        init_from(model, load_autoencoder(Path(config.start).expanduser(), dtype=torch.float32).state_dict(), config.start)
    model.encoder.requires_grad_(not config.freeze_encoder)

    def loss_of(model, average, batch, step, shard):
        device = next(model.parameters()).device
        images = shard.take(batch[0]).to(device).contiguous(memory_format=torch.channels_last)
        total, factor = len(batch[0]), model.config.factor
        level = torch.rand(total, 1, 1, 1) * config.latent_noise
        noise = level * torch.randn(total, config.latent_channels, *(side // factor for side in images.shape[2:]))
        with torch.autocast(device.type, torch.bfloat16, enabled=loop.autocast):
            found = losses(model, images, shard.take(noise), config)
        return {name: value * shard.loss_weight(total) for name, value in found.items()}

    def sample(average, step):
        held_out = ShapesBatches(config.data, 8, loop.seed + 1)[0][0]
        with torch.no_grad():
            decoded = average.decode(average.encode(held_out.to(next(average.parameters()).device)))
        return grid([held_out, decoded])

    path = folder / "autoencoder.safetensors"

    def export(average, training):
        tensors = {name: value.contiguous() for name, value in average.items()}
        record = {"format": 1, **model.config.record()}
        atomic_write(path, lambda to: save_file(tensors, to, metadata={"tim": json.dumps(record)}))
        return path

    batches = ShapesBatches(config.data, loop.batch, loop.seed, find_processes().count * loop.accumulate)
    return train(loop, model, batches, loss_of, folder, sample, export, recorded(config))
