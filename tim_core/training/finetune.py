"""Fine-tunes a TiM transformer, text-to-image or class-conditional, on a folder of images: all weights, or a LoRA."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import TimError
from ..files import digest, user_path
from ..models.attention import get_attention
from ..models.text_encoder import TextEncoder
from ..processes import Shard, find_processes
from ..settings import shown
from ..transport import OTFM
from ..weights.defaults import read_defaults
from ..weights.detect import AUTOENCODER, TEXT_ENCODER, TITLES, TRANSFORMER
from ..weights.load import check_undamaged, load_autoencoder, load_text_encoder, load_transformer
from ..weights.parts import Parts
from ..weights.read import read_parts
from ..weights.save import pack
from .config import FineTuning, recorded, time_shift
from .folder import VERSION, Encoder, FolderBatches, FolderPart, class_folders, digest_data, prepare
from .loop import Task
from .lora import add_lora, round_base, save_lora
from .noise import draw_noise
from .objectives.transition import transition_loss
from .repa import ImageEncoder, check_projector, image_features, name_of
from .samples import sample_grid
from .writing import say


class Conditional(nn.Module):
    """The transformer that is trained, on encoded conditions."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer


class ClassLabels:
    """The conditions of a class-conditional model: labels, () int64. null: the label of the null class."""

    fingerprint = ""

    def __init__(self, num_classes: int, source: str):
        """source: where the labels come from, for errors."""
        self.num_classes, self.source, self.null = num_classes, source, torch.tensor(num_classes)

    def encode(self, values: list[int]) -> list[Tensor]:
        """TimError for a class that the model lacks."""
        if missing := [value for value in values if not 0 <= value < self.num_classes]:
            raise TimError(f"{self.source}: class {missing[0]} is not in the model; use 0 to {self.num_classes - 1}")
        return [torch.tensor(value) for value in values]

    def release(self) -> None:
        """Nothing: there is no encoder."""

    def longest(self, lengths: list[int], dropped: list[bool]) -> int:
        """Labels have one row each."""
        return 1

    def batch(self, conditions: list[Tensor], dropped: list[bool], length: int) -> Tensor:
        """Labels (B,); dropped ones are replaced by `null`."""
        return torch.stack([self.null if drop else label for drop, label in zip(dropped, conditions)])

    def null_like(self, y: Tensor) -> Tensor:
        """`null` in the shape of a batch."""
        return self.null.expand(len(y))


class Captions:
    """The conditions of a text-to-image model: text features (M + 1, D), ending in one pad row, since all pad rows are equal."""

    def __init__(self, text_encoder: TextEncoder):
        self.text_encoder: TextEncoder | None = text_encoder
        self.fingerprint = text_encoder.fingerprint()
        self.pad = text_encoder.encode([""]).rows[0, -1:].cpu()
        (self.null,) = self.encode([""])

    def encode(self, values: list[str]) -> list[Tensor]:
        features = self.text_encoder.encode(values)
        return [torch.cat((rows[:length], self.pad)) for rows, length in zip(features.rows.cpu(), features.lengths)]

    def release(self) -> None:
        """Frees the text encoder, after which nothing more is encoded."""
        self.text_encoder = None

    def longest(self, lengths: list[int], dropped: list[bool]) -> int:
        """The rows M of a whole batch, for the rows (M_i + 1) of its conditions."""
        return max(len(self.null) if drop else rows for drop, rows in zip(dropped, lengths)) - 1

    def batch(self, conditions: list[Tensor], dropped: list[bool], length: int) -> Tensor:
        """Features (B, length, D); dropped ones are replaced by `null`."""
        return padded(conditions, self.null, dropped, length)

    def null_like(self, y: Tensor) -> Tensor:
        """`null` in the shape of a batch."""
        return padded([self.null] * len(y), self.null, [True] * len(y), y.shape[1])


def padded(conditions: list[Tensor], null: Tensor, dropped: list[bool], length: int) -> Tensor:
    """Text features (M_i + 1, D), each ending in one pad row -> (B, length, D). Dropped conditions are replaced by `null`."""
    conditions = [null if drop else rows for drop, rows in zip(dropped, conditions)]
    return torch.stack([torch.cat((rows, rows[-1:].expand(max(0, length - len(rows)), -1)))[:length] for rows in conditions])


def read_sources(config: FineTuning) -> Parts:
    """The parts of `model`, with `text_encoder` and `autoencoder` in place of its own where they are set.

    TimError if a part is missing, or if the parts do not fit together.
    """
    parts = read_parts(config.model)
    parts.require(TRANSFORMER)
    paths = {TEXT_ENCODER: ("text_encoder", config.text_encoder), AUTOENCODER: ("autoencoder", config.autoencoder)}
    given = {kind: path for kind, (_, path) in paths.items() if path}
    others = {kind: read_parts(path)[kind] for kind, path in given.items()}
    parts = replace(parts, source=" + ".join([config.model, *given.values()]), parts={**parts.parts, **others})
    for kind, (key, _) in paths.items():
        if kind not in parts and (kind == AUTOENCODER or parts[TRANSFORMER].config.text_dim is not None):
            raise TimError(f"model: {config.model} has no {TITLES[kind]}; set {key} to a file or folder that has one")
    parts.check_fit()
    return parts


class FineTuningTask(Task[Conditional]):
    """Trains a transformer, or a LoRA on it, on a folder of images, `kind: finetune`."""

    def __init__(self, config: FineTuning, image_encoder: ImageEncoder | None):
        self.processes, parts = find_processes(), read_sources(config)
        self.config = config = config.for_model(read_defaults(parts))
        self.folder, self.settings = user_path(config.output), recorded(config)
        self.metadata = {**parts[TRANSFORMER].record, "latent_factor": parts.latent_factor, "escape_prompts": parts.escape}
        plain = parts[TRANSFORMER].config
        self.has_null = plain.text_dim is not None or plain.null_class
        self.check_null()
        self.model = Conditional(
            load_transformer(parts, attention=get_attention(config.attention), dtype=torch.float32, projector=True))
        check_undamaged(self.model.transformer, parts[TRANSFORMER].source)
        self.architecture = self.model.transformer.config
        check_projector(self.model.transformer, image_encoder, config.objective)
        self.autoencoder = load_autoencoder(parts, dtype=torch.float32).to(self.processes.device).requires_grad_(False)
        check_undamaged(self.autoencoder, parts[AUTOENCODER].source)
        self.factor = self.autoencoder.config.factor
        self.transport = OTFM(P_mean=config.p_mean, P_std=config.p_std)
        if config.lora:
            torch.manual_seed(config.loop.seed)
            add_lora(self.model.transformer, config.lora)
            if config.loop.autocast:
                round_base(self.model.transformer)
        self.encode_folder(parts, image_encoder)
        if not config.lora:
            self.fixed += f" {digest(self.model.state_dict().items())}"  # the first weights, which a LoRA has as frozen weights
            self.plain = load_transformer(parts, dtype=torch.float32, device="meta", projector=True)

    def check_null(self) -> None:
        """TimError for settings that need a null class which the model lacks."""
        config = self.config
        for key, value, use in (("dropout", config.dropout, "0"), ("objective.enhance_target", config.objective.enhance_target, "false")):
            if value and not self.has_null:
                raise TimError(f"training config: {key} is {shown(value)}, but {config.model} has no null class; use {use}")

    def encode_folder(self, parts: Parts, image_encoder: ImageEncoder | None) -> None:
        """Encodes the images and their conditions into the cache; sets up the batches and the conditions of the samples."""
        config, processes, labels = self.config, self.processes, self.architecture.text_dim is None
        if labels:
            self.conditions = ClassLabels(self.architecture.num_classes, config.data.path)
        else:
            text_encoder = load_text_encoder(parts, dtype=torch.float32)
            check_undamaged(text_encoder, parts[TEXT_ENCODER].source)
            self.conditions = Captions(text_encoder.to(processes.device).requires_grad_(False))

        def encode_images(images: Tensor) -> dict[str, Tensor]:
            images = images.to(processes.device)
            tensors = {"latent": self.autoencoder.encode(images)}
            if image_encoder is not None:
                tensors["features"] = image_features(image_encoder, images, tensors["latent"], self.architecture)
            return tensors

        self.fixed = " ".join([digest(self.autoencoder.state_dict().items()), str(self.autoencoder.config), name_of(image_encoder),
                               self.conditions.fingerprint])
        encode = Encoder(config.data.cache_folder, f"{VERSION} {self.fixed}", encode_images, self.conditions.encode)
        items = prepare(config.data, encode, self.factor * self.architecture.patch_size, labels, processes)
        self.sampled = [item for item in items if (item.width, item.height) == (items[0].width, items[0].height)][:4]
        values: list[Any] = [item.caption_or_label for item in self.sampled]
        conds = self.conditions.encode(values)
        both, dropped = conds * 2, [False] * len(conds) + [self.has_null] * len(conds)
        length = self.conditions.longest([rows.shape[0] if rows.ndim else 1 for rows in both], dropped)
        self.sample_conditions = self.conditions.batch(both, dropped, length).chunk(2)
        self.conditions.release()
        self.data = digest_data(items, encode)
        self.batches = FolderBatches(config.data, items, encode, config.loop.batch, config.loop.seed,
                                     processes.shards(config.loop.accumulate))
        if processes.is_main:
            say(f"{config.data.path}: {self.batches}")
            if labels and (classes := class_folders(config.data)):
                names = ", ".join(f"{number} {folder.name}" for number, folder in enumerate(classes))
                say(f"classes: {names}")

    def networks(self, model: Conditional) -> list[nn.Module]:
        return [model.transformer]

    def loss(self, average: Conditional, part: FolderPart, step: int, shard: Shard) -> dict[str, Tensor]:
        config, objective = self.config, self.config.objective
        total, device = part.total, next(self.model.parameters()).device
        _, channels, height, width = part.latents.shape
        shift = time_shift(height * self.factor, width * self.factor, config.shift_base)
        drawn = draw_noise((total, channels, height, width), config.dropout, self.transport, objective, shift)
        own = drawn.take(shard, device)
        latents = part.latents.to(device, non_blocking=True)
        y = self.conditions.batch(part.conditions, own.dropped, self.conditions.longest(part.lengths, drawn.dropped)).to(device)
        more: dict[str, Any] = {}
        if objective.enhance_target or objective.target == "composed":
            more["ema_model"] = average.transformer
        if objective.enhance_target:
            more["y_null"] = self.conditions.null_like(y).to(device)
        if part.features is not None:
            more["h_target"] = part.features.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.loop.autocast):
            losses = transition_loss(
                self.model.transformer, latents, own.noise, y, transport=self.transport, config=objective,
                times=(own.t, own.r, own.n_diffusion), transitions=drawn.n_diffusion < total, between=own.between, **more)
        return {"loss": losses.total * shard.loss_weight(total), **drawn.mean_errors(losses.denoising_loss, shard)}

    def sample(self, average: Conditional, step: int) -> Image.Image:
        """The first four captions or labels at the size of their images."""
        loop, first = self.config.loop, self.sampled[0]
        noise = torch.randn(len(self.sampled), self.architecture.in_channels, first.height // self.factor, first.width // self.factor,
                            generator=torch.Generator().manual_seed(loop.seed))
        inputs = [value.to(next(average.parameters()).device) for value in (noise, *self.sample_conditions)]
        cfg = 2.5 if self.has_null else 1.0
        return sample_grid(average.transformer, self.autoencoder.decode, *inputs, self.transport, loop.autocast, cfg)

    def export(self, average: dict[str, Tensor], record: dict) -> Path:
        """Writes the LoRA, or the transformer in bfloat16."""
        config = self.config
        weights = {name.removeprefix("transformer."): value for name, value in average.items()}
        path = config.export_path(record["step"])
        if config.lora:
            return save_lora(weights, config.lora, path, json.dumps(record))
        made = self.plain.to_empty(device="cpu")
        made.load_state_dict(weights)
        metadata = {**self.metadata, "training": record}
        return pack({"transformer": made}, path, dtype=torch.bfloat16, metadata=metadata, keep_projector=True)
