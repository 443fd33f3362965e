"""Fine-tunes a TiM transformer, text-to-image or class-conditional, on a folder of pictures: all of its weights, or a LoRA."""

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
from .config import FineTuning, recorded, target, time_shift
from .draws import draw
from .folder import VERSION, Encoder, FolderBatches, Kept, class_folders, prepare
from .loop import train
from .lora import add_lora, save_lora
from .objectives.transition import transition_loss
from .repa import ImageEncoder, check_projector, name_of, shown
from .samples import show_steps


class Conditional(nn.Module):
    """The transformer that learns; what it is told comes encoded."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer


def padded(told: list[Tensor], null: Tensor, dropped: list[bool], length: int = 0) -> Tensor:
    """Prompts' rows, each with one pad row behind its text (M_i + 1, D) -> (B, M, D), M the longest text or `length`.

    Dropped ones become `null`'s.
    """
    told = [null if drop else rows for drop, rows in zip(dropped, told)]
    length = length or max(len(rows) for rows in told) - 1
    return torch.stack([torch.cat((rows, rows[-1:].expand(max(0, length - len(rows)), -1)))[:length] for rows in told])


def train_finetuning(config: FineTuning, image_encoder: ImageEncoder | None = None) -> Path:
    """Runs a `kind: finetune` configuration; returns the safetensors file of the transformer, or of the LoRA."""
    loop, folder, processes = config.loop, Path(config.output).expanduser(), find_processes()
    if config.checkpoint:
        check_output_path(config.checkpoint)
    sources = {"model": config.model, "text-encoder": config.text_encoder, "vae": config.autoencoder}
    parts = read_parts({name: place for name, place in sources.items() if place} if config.text_encoder or config.autoencoder
                                  else config.model)
    model = Conditional(load_transformer(parts, attention=get_attention(config.attention), dtype=torch.float32, projector=True))
    architecture = model.transformer.config
    check_projector(model.transformer, image_encoder, config.objective)
    autoencoder = load_autoencoder(parts, dtype=torch.float32).to(processes.device).requires_grad_(False)
    factor = autoencoder.config.factor
    transport = OTFM(P_mean=config.p_mean, P_std=config.p_std)

    labels = architecture.text_dim is None
    text = None if labels else load_text_encoder(parts, dtype=torch.float32).to(processes.device).requires_grad_(False)
    pad = None if labels else text.encode([""]).rows[0, -1:].cpu()

    def tell(told: str | int) -> Tensor:
        if labels:
            if not 0 <= told < architecture.num_classes:
                raise TimError(f"{config.data.path}: found class {told}, expected 0 to {architecture.num_classes - 1}")
            return torch.tensor(told)
        features = text.encode([told])
        return torch.cat((features.rows[0, : features.lengths[0]].cpu(), pad))  # pad rows are all alike

    def look(picture: Tensor) -> dict[str, Tensor]:
        picture = picture.to(processes.device)
        seen = {"latent": autoencoder.encode(picture)}
        if image_encoder is not None:
            seen["features"] = shown(image_encoder, picture, seen["latent"], architecture)
        return seen

    identity = " ".join([VERSION, digest(autoencoder.state_dict().items()), str(autoencoder.config), name_of(image_encoder),
                         "" if labels else text.fingerprint()])
    encode = Encoder(config.data.cache_folder, identity, look, tell)
    items = prepare(config.data, encode, factor * architecture.patch_size, labels, processes)
    null = torch.tensor(architecture.num_classes) if labels else tell("")
    some = [item for item in items if (item.width, item.height) == (items[0].width, items[0].height)][:4]
    conds, nulls = [tell(item.told) for item in some], [null] * len(some)
    conditions = (torch.stack(conds), torch.stack(nulls)) if labels else padded(conds + nulls, null, [False] * 2 * len(some)).chunk(2)
    if text is not None:
        text.cpu()  # all that it had to say is in the cache
    batches = FolderBatches(config.data, items, encode, loop.batch, loop.seed, processes.count * loop.accumulate)
    if processes.is_main:
        tqdm.write(f"{config.data.path}: {batches}", file=sys.stderr)
        if labels and (classes := class_folders(config.data)):
            tqdm.write("classes: " + ", ".join(f"{number} {folder.name}" for number, folder in enumerate(classes)), file=sys.stderr)

    if config.lora:
        torch.manual_seed(loop.seed)
        add_lora(model.transformer, config.lora)

    def loss_of(model: Conditional, average: Conditional, batch: Kept, step: int, shard: Shard) -> dict[str, Tensor]:
        latents, told, features = batch
        total, device = len(latents), next(model.parameters()).device
        height, width = latents.shape[2] * factor, latents.shape[3] * factor
        drawn = draw(latents.shape, config.dropout, transport, config.objective, time_shift(height, width, config.shift_base))
        if labels:
            y = torch.stack([null if drop else number for drop, number in zip(drawn.dropped, told)])
        else:
            y = padded(told, null, drawn.dropped)
        latents, y, own = shard.take(latents).to(device), shard.take(y).to(device), drawn.of(shard, device)
        taught: dict = {}
        if config.objective.enhance_target or config.objective.target == "composed":
            taught["ema_model"] = average.transformer
        if config.objective.enhance_target:
            nothing = null.expand(len(y)) if labels else padded([null] * len(y), null, [False] * len(y), y.shape[1])
            taught["y_null"] = nothing.to(device)
        if features is not None:
            taught["h_target"] = shard.take(features).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=loop.autocast):
            losses = transition_loss(
                model.transformer, latents, own.noise, y, transport=transport, config=config.objective,
                times=(own.t, own.r, own.n_diffusion), transitions=drawn.n_diffusion < total, between=own.between, **taught)
        return {"loss": losses.total * shard.loss_weight(total), **drawn.errors(losses.denoising_loss, shard)}

    def show(average: Conditional, step: int) -> Image.Image:
        """The first four pictures' prompts at their size, in 1, 4 and 16 steps."""
        noise = torch.randn(len(some), architecture.in_channels, some[0].height // factor, some[0].width // factor,
                            generator=torch.Generator().manual_seed(loop.seed))
        there = [value.to(next(average.parameters()).device) for value in (noise, *conditions)]
        return show_steps(average.transformer, autoencoder.decode, *there, transport, loop.autocast)

    plain = load_transformer(parts, dtype=torch.float32, device="meta", projector=True)

    def export(average: dict[str, Tensor], training: dict) -> Path:
        weights = {name.removeprefix("transformer."): value for name, value in average.items()}
        name = "lora.safetensors" if config.lora else "model.safetensors"
        to = target(config, training["step"], name)
        if config.lora:
            return save_lora(weights, config.lora, to, json.dumps(training))
        trained = plain.to_empty(device="cpu")
        trained.load_state_dict(weights)
        record = {**parts[TRANSFORMER].record, "latent_factor": parts.latent_factor, "escape_prompts": parts.escape,
                  "training": training}
        return pack({"transformer": trained}, to, dtype=torch.bfloat16, metadata=record, keep_projector=True)

    return train(loop, model, batches, loss_of, folder, show, export, recorded(config))
