"""Fine-tunes a TiM transformer, text-to-image or class-conditional, on a folder of images: all weights, or a LoRA."""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import TimError
from ..files import digest
from ..models.attention import get_attention
from ..processes import Shard, find_processes
from ..transport import OTFM
from ..weights.load import load_autoencoder, load_text_encoder, load_transformer
from ..weights.parts import TRANSFORMER, read_parts
from ..weights.save import check_output_path, pack
from .config import FineTuning, export_path, recorded, time_shift
from .folder import VERSION, CachedBatch, Encoder, FolderBatches, class_folders, prepare
from .loop import train
from .lora import add_lora, save_lora
from .noise import draw_noise
from .objectives.transition import transition_loss
from .repa import ImageEncoder, check_projector, image_features, name_of
from .samples import sample_grid


class Conditional(nn.Module):
    """The transformer that is trained, on encoded conditions."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer


def padded(conditions: list[Tensor], null: Tensor, dropped: list[bool], length: int = 0) -> Tensor:
    """Text features (M_i + 1, D), each ending in one pad row -> (B, M, D), M being the longest text or `length`.

    Dropped conditions are replaced by `null`.
    """
    conditions = [null if drop else rows for drop, rows in zip(dropped, conditions)]
    length = length or max(len(rows) for rows in conditions) - 1
    return torch.stack([torch.cat((rows, rows[-1:].expand(max(0, length - len(rows)), -1)))[:length] for rows in conditions])


def train_finetuning(config: FineTuning, image_encoder: ImageEncoder | None = None) -> Path:
    """Runs a `kind: finetune` configuration; returns the safetensors file of the transformer, or of the LoRA."""
    loop, folder, processes = config.loop, Path(config.output).expanduser(), find_processes()
    if config.checkpoint:
        check_output_path(config.checkpoint)
    sources = {"model": config.model, "text-encoder": config.text_encoder, "vae": config.autoencoder}
    parts = read_parts(
        {name: path for name, path in sources.items() if path} if config.text_encoder or config.autoencoder else config.model)
    model = Conditional(load_transformer(parts, attention=get_attention(config.attention), dtype=torch.float32, projector=True))
    architecture = model.transformer.config
    check_projector(model.transformer, image_encoder, config.objective)
    autoencoder = load_autoencoder(parts, dtype=torch.float32).to(processes.device).requires_grad_(False)
    factor = autoencoder.config.factor
    transport = OTFM(P_mean=config.p_mean, P_std=config.p_std)

    labels = architecture.text_dim is None
    text = None if labels else load_text_encoder(parts, dtype=torch.float32).to(processes.device).requires_grad_(False)
    pad = None if labels else text.encode([""]).rows[0, -1:].cpu()

    def encode_condition(value: str | int) -> Tensor:
        if labels:
            if not 0 <= value < architecture.num_classes:
                raise TimError(f"{config.data.path}: class {value} is not in the model; use 0 to {architecture.num_classes - 1}")
            return torch.tensor(value)
        features = text.encode([value])
        return torch.cat((features.rows[0, : features.lengths[0]].cpu(), pad))  # all pad rows are equal

    def encode_image(image: Tensor) -> dict[str, Tensor]:
        image = image.to(processes.device)
        tensors = {"latent": autoencoder.encode(image)}
        if image_encoder is not None:
            tensors["features"] = image_features(image_encoder, image, tensors["latent"], architecture)
        return tensors

    identity = " ".join([VERSION, digest(autoencoder.state_dict().items()), str(autoencoder.config), name_of(image_encoder),
                         "" if labels else text.fingerprint()])
    encode = Encoder(config.data.cache_folder, identity, encode_image, encode_condition)
    items = prepare(config.data, encode, factor * architecture.patch_size, labels, processes)
    null = torch.tensor(architecture.num_classes) if labels else encode_condition("")
    some = [item for item in items if (item.width, item.height) == (items[0].width, items[0].height)][:4]
    conds, nulls = [encode_condition(item.caption_or_label) for item in some], [null] * len(some)
    sample_conditions = (
        (torch.stack(conds), torch.stack(nulls)) if labels else padded(conds + nulls, null, [False] * 2 * len(some)).chunk(2))
    if text is not None:
        text.cpu()  # its features are cached
    batches = FolderBatches(config.data, items, encode, loop.batch, loop.seed, processes.count * loop.accumulate)
    if processes.is_main:
        tqdm.write(f"{config.data.path}: {batches}", file=sys.stderr)
        if labels and (classes := class_folders(config.data)):
            tqdm.write("classes: " + ", ".join(f"{number} {folder.name}" for number, folder in enumerate(classes)), file=sys.stderr)

    if config.lora:
        torch.manual_seed(loop.seed)
        add_lora(model.transformer, config.lora)

    def loss_of(model: Conditional, average: Conditional, batch: CachedBatch, step: int, shard: Shard) -> dict[str, Tensor]:
        latents, conditions, features = batch
        total, device = len(latents), next(model.parameters()).device
        height, width = latents.shape[2] * factor, latents.shape[3] * factor
        drawn = draw_noise(latents.shape, config.dropout, transport, config.objective, time_shift(height, width, config.shift_base))
        if labels:
            y = torch.stack([null if drop else number for drop, number in zip(drawn.dropped, conditions)])
        else:
            y = padded(conditions, null, drawn.dropped)
        latents, y, own = shard.take(latents).to(device), shard.take(y).to(device), drawn.take(shard, device)
        more: dict = {}
        if config.objective.enhance_target or config.objective.target == "composed":
            more["ema_model"] = average.transformer
        if config.objective.enhance_target:
            nothing = null.expand(len(y)) if labels else padded([null] * len(y), null, [False] * len(y), y.shape[1])
            more["y_null"] = nothing.to(device)
        if features is not None:
            more["h_target"] = shard.take(features).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=loop.autocast):
            losses = transition_loss(
                model.transformer, latents, own.noise, y, transport=transport, config=config.objective,
                times=(own.t, own.r, own.n_diffusion), transitions=drawn.n_diffusion < total, between=own.between, **more)
        return {"loss": losses.total * shard.loss_weight(total), **drawn.mean_errors(losses.denoising_loss, shard)}

    def sample(average: Conditional, step: int) -> Image.Image:
        """The first four captions at the size of their images."""
        noise = torch.randn(len(some), architecture.in_channels, some[0].height // factor, some[0].width // factor,
                            generator=torch.Generator().manual_seed(loop.seed))
        inputs = [value.to(next(average.parameters()).device) for value in (noise, *sample_conditions)]
        return sample_grid(average.transformer, autoencoder.decode, *inputs, transport, loop.autocast)

    plain = load_transformer(parts, dtype=torch.float32, device="meta", projector=True)

    def export(average: dict[str, Tensor], training: dict) -> Path:
        weights = {name.removeprefix("transformer."): value for name, value in average.items()}
        name = "lora.safetensors" if config.lora else "model.safetensors"
        to = export_path(config, training["step"], name)
        if config.lora:
            return save_lora(weights, config.lora, to, json.dumps(training))
        trained = plain.to_empty(device="cpu")
        trained.load_state_dict(weights)
        record = {**parts[TRANSFORMER].record, "latent_factor": parts.latent_factor, "escape_prompts": parts.escape,
                  "training": training}
        return pack({"transformer": trained}, to, dtype=torch.bfloat16, metadata=record, keep_projector=True)

    return train(loop, model, batches, loss_of, folder, sample, export, recorded(config))
