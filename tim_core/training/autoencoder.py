"""Trains a DC-AE with latents of mean 0, variance 1 on average, and a decoder that is robust to noise on them."""

import functools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..errors import TimError, one_line
from ..files import digest, user_path
from ..models.autoencoder import Autoencoder
from ..models.config import AutoencoderConfig, StageConfig
from ..processes import Shard, find_processes
from ..shapes.batches import ShapesBatches, ShapesPart
from ..weights.load import load_autoencoder
from .config import recorded
from .loop import Task
from .resume import init_from
from .samples import grid
from .shapes_config import AutoencoderTraining
from .writing import write_tensors


def architecture(config: AutoencoderTraining) -> AutoencoderConfig:
    """The AutoencoderConfig of a training configuration: EfficientViT blocks in the last `attention_stages`, residual blocks before."""
    def stages(widths, layers):
        kinds = ["ResBlock"] * (len(widths) - config.attention_stages) + ["EfficientViTBlock"] * config.attention_stages
        return tuple(StageConfig(w if n else 0, n, k if n else "ResBlock", (5,) if n and k == "EfficientViTBlock" else ())
                     for w, n, k in zip(widths, layers, kinds))

    return AutoencoderConfig(
        stages(config.encoder_widths, config.encoder_layers), stages(config.decoder_widths, config.decoder_layers),
        latent_channels=config.latent_channels, head_dim=config.head_dim, downsample="pixel_unshuffle", upsample="pixel_shuffle")


def edge_map(images: Tensor) -> Tensor:
    """Contrast (B, 1, H, W) of images (B, 3, H, W): the largest range of a channel within 2 pixels, 0 where it is uniform."""
    def highest(values: Tensor) -> Tensor:  # five shifted copies per axis take a tenth of max_pool2d's time on a CPU
        for dim, padding in ((-2, (0, 0, 2, 2)), (-1, (2, 2, 0, 0))):
            values = functools.reduce(torch.maximum, F.pad(values, padding, mode="replicate").unfold(dim, 5, 1).unbind(-1))
        return values

    return (highest(images) + highest(-images)).amax(1, keepdim=True)


def unexplained_colors(latent: Tensor, images: Tensor, cells: int = 4) -> Tensor:
    """The fraction, 0 to 1, of the variance of images' colours that the best linear map of their latents leaves unexplained.

    latent: (B, C, h, w) float32; images: (B, 3, H, W). The colours of a latent's patch are the means of its `cells` x `cells` parts. The
    map is a ridge regression for latents of variance about 1. N patches should be many more than C: about C / N is explained by chance.
    """
    _, channels, height, width = latent.shape
    x = latent.permute(0, 2, 3, 1).flatten(0, 2)
    colors = F.pixel_unshuffle(F.adaptive_avg_pool2d(images.float(), (height * cells, width * cells)), cells)
    y = colors.permute(0, 2, 3, 1).flatten(0, 2)
    x, y = x - x.mean(0), y - y.mean(0)
    with torch.autocast(x.device.type, enabled=False):
        ridge = 1e-3 * len(x) * torch.eye(channels, device=x.device)  # some channels may be constant
        fitted = x @ torch.linalg.solve(x.T @ x + ridge, x.T @ y)
    return (y - fitted).square().sum() / y.square().sum().clamp_min(1e-6)


def crop_error(model: nn.Module, images: Tensor, latent: Tensor, corner: tuple[float, float]) -> Tensor:
    """The mean squared difference between a crop of images' latents and the latents of the same crop of the images: 0 if they are local.

    images: (B, 3, H, W); latent: (B, C, h, w) of them, float32. corner: where the crop lies, from 0 (top, left) to 1. It is half as high
    and wide, rounded up to whole cells.
    """
    height, width = latent.shape[2:]
    factor = images.shape[-1] // width
    sides = (height + 1) // 2, (width + 1) // 2
    top, left = (round(place * (whole - part)) for place, whole, part in zip(corner, (height, width), sides))
    rows, columns = slice(top, top + sides[0]), slice(left, left + sides[1])
    pixel_rows, pixel_columns = (slice(part.start * factor, part.stop * factor) for part in (rows, columns))
    return (model.encode(images[..., pixel_rows, pixel_columns]).float() - latent[..., rows, columns]).square().mean()


def losses(model: nn.Module, images: Tensor, noise: Tensor, config: AutoencoderTraining,
           corner: tuple[float, float] = (0.5, 0.5)) -> dict[str, Tensor]:
    """L1 error of the decoded noisy latent, plus the distance of the shard's latents from mean 0 per channel and variance 1 on average.

    config.color_weight and crop_weight favour local latents: a linear map of the noised latent must give the colours of its patch, so what
    noise hides does not count; and the crop at `corner` of `crop_error` must have the same latents without the rest of the image.
    """
    latent = model.encode(images).float()
    noisy = latent + noise.to(latent)
    decoded = model.decode(noisy).float()
    difference = (decoded - images).abs()
    error = difference.mean()
    mean, var = latent.mean((0, 2, 3)), latent.var((0, 2, 3)).mean()
    prior = mean.square().mean() + (var - 1).square()
    found = {"loss": error + config.latent_weight * prior, "l1": error, "prior": prior}
    if config.color_weight:
        found["color"] = unexplained_colors(noisy, images)
        found["loss"] = found["loss"] + config.color_weight * found["color"]
    if config.crop_weight:
        found["crop"] = crop_error(model, images, latent, corner)
        found["loss"] = found["loss"] + config.crop_weight * found["crop"]
    if config.edge_weight:
        found["edge"] = (difference * edge_map(images)).mean()
        found["loss"] = found["loss"] + config.edge_weight * found["edge"]
    return found


class AutoencoderTask(Task[Autoencoder]):
    """Trains a DC-AE on images of coloured shapes, `kind: autoencoder`."""

    def __init__(self, config: AutoencoderTraining):
        self.config, loop = config, config.loop
        torch.manual_seed(loop.seed)
        try:
            self.model = Autoencoder(architecture(config))
            with torch.no_grad():
                self.model.decode(self.model.encode(torch.zeros(1, 3, *(2 * self.model.config.factor,) * 2)))
        except (RuntimeError, ValueError, ZeroDivisionError) as error:
            reason = one_line(error)
            raise TimError(f"training config: no DC-AE has these widths, layers and head_dim ({reason}); change them") from error
        if config.start:
            start = load_autoencoder(user_path(config.start), dtype=torch.float32)
            init_from(self.model, start.state_dict(), config.start)
            self.fixed = digest(start.state_dict().items())
        self.model.encoder.requires_grad_(not config.freeze_encoder)
        self.folder, self.settings = user_path(config.output), recorded(config)
        self.batches = ShapesBatches(config.data, loop.batch, loop.seed, find_processes().shards(loop.accumulate))

    def loss(self, average: Autoencoder, part: ShapesPart, step: int, shard: Shard) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        images = part.images.to(device, non_blocking=True).contiguous()
        total, factor = part.total, self.model.config.factor
        level = torch.rand(total, 1, 1, 1) * self.config.latent_noise
        noise = level * torch.randn(total, self.config.latent_channels, *(side // factor for side in images.shape[2:]))
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.loop.autocast):
            found = losses(self.model, images, shard.take(noise), self.config, corner=tuple(torch.rand(2).tolist()))
        return {name: value * shard.loss_weight(total) for name, value in found.items()}

    def sample(self, average: Autoencoder, step: int) -> Image.Image:
        """Held-out images above, decoded ones below."""
        held_out = ShapesBatches(self.config.data, 8, self.config.loop.seed + 1)[0][0].images
        with torch.no_grad():
            decoded = average.decode(average.encode(held_out.to(next(average.parameters()).device)))
        return grid([held_out, decoded])

    def export(self, average: dict[str, Tensor], record: dict) -> Path:
        path = self.config.export_path(record["step"])
        tensors = {name: value.contiguous() for name, value in average.items()}
        metadata = {"tim": json.dumps({"format": 1, **self.model.config.record()})}
        write_tensors(path, tensors, metadata)
        return path
