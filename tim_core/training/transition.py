"""Trains a TiM transformer together with its text model (arXiv 2509.04394, Algorithm 1)."""

import copy
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import TimError
from ..files import digest, user_path
from ..models.attention import get_attention
from ..models.autoencoder import Autoencoder
from ..models.config import TransformerConfig
from ..models.text_encoder import TextEncoder
from ..models.tokenizer import Tokenizer
from ..models.transformer import TransitionTransformer
from ..processes import Shard, find_processes
from ..settings import shown
from ..shapes import scenes
from ..shapes.batches import ShapesBatches, ShapesPart, render_samples
from ..shapes.tokenizer import VOCABULARY_SIZE, WORD_START, shapes_tokenizer, vocabulary
from ..transport import OTFM
from ..weights import previews
from ..weights.load import check_undamaged, load_autoencoder, load_text_encoder, load_transformer
from ..weights.save import pack
from .config import LoopConfig, recorded, time_shift
from .latents import CachedLatents, LatentPart
from .loop import Task, compile_blocks, make_ema
from .noise import draw_noise
from .objectives.distillation import DistillationNoise, distillation_loss, draw_distillation_noise
from .objectives.matching import MatchingNoise, draw_matching_noise, matching_losses
from .objectives.transition import ObjectiveConfig, transition_loss
from .optimizers import ParamGroup
from .repa import ImageEncoder, check_projector, image_features
from .resume import init_from
from .samples import sample_grid
from .shapes_config import TextShape, TransitionTraining


class TextToImage(nn.Module):
    """The networks that are trained: `text`, captions -> features; `transformer`, F(x_t, t, r, features); `critic` or None."""

    def __init__(self, config: TransitionTraining, latent_channels: int):
        super().__init__()
        tokenizer = Tokenizer.from_json(shapes_tokenizer())
        self.text = TextEncoder(gemma_config(config.text), tokenizer, escape=False)
        shape = config.transformer
        self.transformer = TransitionTransformer(TransformerConfig(
            in_channels=latent_channels, text_dim=config.text.hidden_size, **vars(shape)), attention=get_attention(config.attention))
        self.transformer.initialize_weights()
        self.critic = copy.deepcopy(self.transformer) if config.matching else None
        if self.critic is not None:
            self.critic.projector = None

    def max_tokens(self, prompts: list[str]) -> int:
        """The length of the longest prompt in tokens."""
        return int(self.text.tokenize(prompts)[1].sum(1).max())

    def features(self, prompts: list[str], length: int) -> Tensor:
        """Text features (B, length, D). `length`: of the longest prompt in the batch, as officially: pad rows are attended to."""
        ids, mask = self.text.tokenize(prompts)
        device = self.text.device
        return self.text.encode_ids(ids[:, :length].to(device), mask[:, :length].to(device))


def subset_size(key: str, fraction: float, total: int, shard: Shard) -> int:
    """The number of a batch's items that a fraction is. TimError if it is smaller than the number of shards."""
    count = max(1, round(fraction * total))
    if count < shard.count:
        raise TimError(f"training config: {key} is {fraction}: {count} of {total} items cannot be split over {shard.count} parts "
                       "(processes x loop.accumulate); increase it")
    return count


def gemma_config(shape: TextShape) -> dict:
    """A Gemma-3 config for the vocabulary of tim_core.shapes, with alternating local and global layers; the last one is global."""
    kinds = ["full_attention" if (shape.layers - 1 - i) % 2 == 0 else "sliding_attention" for i in range(shape.layers)]
    return {
        "model_type": "gemma3_text", "vocab_size": VOCABULARY_SIZE, "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": 1, "head_dim": shape.head_dim,
        "query_pre_attn_scalar": shape.head_dim, "sliding_window": 512, "max_position_embeddings": 512, "layer_types": kinds,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}},
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    }


def init_model(model: TextToImage, start: Path) -> None:
    """Loads the weights of a checkpoint; the critic becomes a copy of its transformer. TimError if its architecture differs."""
    loaded = load_transformer(start, dtype=torch.float32, projector=True), load_text_encoder(start, dtype=torch.float32)
    for name in ("num_heads", "new_condition", "positions"):  # not always seen from tensors
        found, wanted = (getattr(network.config, name) for network in (loaded[0], model.transformer))
        if found != wanted:
            raise TimError(f"training config: transformer.{name} is {shown(wanted)}; use {shown(found)}, as {start} does")
    for network, own in zip(loaded, (model.transformer, model.text)):
        check_undamaged(network, start)
        init_from(own, network.state_dict(), str(start))
    if model.critic is not None:
        same = model.transformer.state_dict()
        model.critic.load_state_dict({name: same[name] for name in model.critic.state_dict()})


def add_embeddings(text: TextEncoder, words: dict[str, str]) -> None:
    """Adds to the embedding of each word that of another."""
    table, ids = text.transformer.embed_tokens.weight.data, vocabulary()
    before = table.clone()
    for word, other in words.items():
        table[ids[WORD_START + word]] += before[ids[WORD_START + other]]


@dataclass(frozen=True)
class Conditions:
    """Text features of a shard. y: (B, M, D); y_null: of the empty prompt, where a loss needs it.

    teacher: y and y_null of the teacher's text model, None where it is the trained one.
    """

    y: Tensor
    y_null: Tensor | None = None
    teacher: tuple[Tensor, Tensor] | None = None

    def first(self, count: int) -> "Conditions":
        """Those of the first items."""
        teacher = (self.teacher[0][:count], self.teacher[1]) if self.teacher else None
        return Conditions(self.y[:count], self.y_null[:count], teacher)


class TransitionTask(Task[TextToImage]):
    """Trains a transformer together with its text model on images of coloured shapes, `kind: tim`."""

    not_averaged = ("critic",)

    def __init__(self, config: TransitionTraining, image_encoder: ImageEncoder | None):
        self.config, self.image_encoder = config, image_encoder
        loop = config.loop
        self.autoencoder: Autoencoder = load_autoencoder(user_path(config.autoencoder), dtype=torch.float32)
        check_undamaged(self.autoencoder, config.autoencoder)
        self.factor, self.channels = self.autoencoder.config.factor, self.autoencoder.config.latent_channels
        torch.manual_seed(loop.seed)
        self.model = TextToImage(config, self.channels)
        fixed = {f"autoencoder.{name}": value for name, value in self.autoencoder.state_dict().items()}
        if config.start:
            init_model(self.model, user_path(config.start))
            fixed |= {name: value for name, value in self.model.state_dict().items() if not name.startswith("critic.")}
        self.fixed = f"{digest(fixed.items())} {self.autoencoder.config}"
        # the weights that the export is interpolated with
        self.initial = {name: p.detach().clone() for name, p in self.model.named_parameters()} if config.interpolate_start else {}
        add_embeddings(self.model.text, config.add_embedding)
        self.model.text.requires_grad_(not config.freeze_text)
        self.teacher = None
        if config.needs_start:
            self.teacher = make_ema(self.model, share_fixed=False, without=self.not_averaged).eval()
            if loop.compile:
                compile_blocks(self.teacher)
        check_projector(self.model.transformer, image_encoder, *config.objectives.values())
        self.transport = OTFM(P_mean=config.p_mean, P_std=config.p_std)
        config.data.check_multiples(self.factor * config.transformer.patch_size)
        self.coder = copy.deepcopy(self.autoencoder)  # moved to the device of the run; `autoencoder` stays on the CPU for the export
        self.folder, self.settings = user_path(config.output), recorded(config)
        self.batches: torch.utils.data.Dataset = ShapesBatches(config.data, loop.batch, loop.seed, find_processes().shards(loop.accumulate))
        if config.cached_batches:
            self.batches = CachedLatents(self.batches, config.cached_batches, self.autoencoder, self.folder / "latents", loop.autocast)

    def param_groups(self, config: LoopConfig) -> list[ParamGroup]:
        """The critic has learning rates of its own, and the rest waits until its warm-up is over."""
        groups, matching = super().param_groups(config), self.config.matching
        if matching is None:
            return groups
        (everything,) = groups
        critic = {name: p for name, p in everything.parameters.items() if name.startswith("critic.")}
        rest = {name: p for name, p in everything.parameters.items() if name not in critic}
        return [replace(everything, parameters=rest, start_step=matching.critic_warmup_steps),
                ParamGroup("critic_norm", critic, matching.critic_lr, matching.critic_muon_lr)]

    def networks(self, model: TextToImage) -> list[nn.Module]:
        return [model.transformer, *([model.critic] if model.critic is not None else []), model.text.transformer]

    def loss(self, average: TextToImage, part: ShapesPart | LatentPart, step: int, shard: Shard) -> dict[str, Tensor]:
        config, objective, total = self.config, self.config.objective_at(step), part.total
        device = next(self.model.parameters()).device
        pixels, latents = self.encode_images(part, device)
        shape = (total, *latents.shape[1:])
        height, width = (side * self.factor for side in latents.shape[2:])
        drawn = draw_noise(shape, config.text_dropout, self.transport, objective, time_shift(height, width, config.shift_base))
        jumps = trajectories = None
        if config.matching:
            count = subset_size("matching.batch_fraction", config.matching.batch_fraction, total, shard)
            jumps = draw_matching_noise((count, *shape[1:]), config.matching)
        if config.distillation:
            count = subset_size("distillation.batch_fraction", config.distillation.batch_fraction, total, shard)
            trajectories = draw_distillation_noise((count, *shape[1:]), config.distillation)
        own = drawn.take(shard, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.loop.autocast):
            prompts = ["" if drop else caption for drop, caption in zip(drawn.dropped, part.captions)]
            conditions = self.encode_prompts(
                shard.take(prompts), self.model.max_tokens(prompts), bool(objective.enhance_target or jumps or trajectories))
            losses = transition_loss(
                self.model.transformer, latents, own.noise, conditions.y, transport=self.transport, config=objective,
                times=(own.t, own.r, own.n_diffusion), transitions=drawn.n_diffusion < total, between=own.between,
                **self.target_inputs(objective, average, conditions, pixels, latents))
            found = {"loss": losses.total * shard.loss_weight(total)}
            if jumps:
                found |= self.matching(average, shard, latents, conditions, jumps)
                found["loss"] = found["loss"] + config.matching.weight * found["matching"] + found["critic"]
            if trajectories:
                found |= self.distillation(shard, conditions, trajectories)
                found["loss"] = found["loss"] + config.distillation.weight * found["distillation"]
        return {**found, **drawn.mean_errors(losses.denoising_loss, shard)}

    def encode_prompts(self, prompts: list[str], length: int, needs_null: bool) -> Conditions:
        """Text features of a shard's prompts, `length` rows each."""
        y = self.model.features(prompts, length)
        y_null = teacher = None
        with torch.no_grad():
            if needs_null:
                y_null = self.model.features([""], length).expand_as(y)
            if self.teacher is not None:
                self.teacher.to(y.device)
                if not self.config.freeze_text:  # else the teacher's text model is the model's
                    teacher = self.teacher.features(prompts, length), self.teacher.features([""], length)
        return Conditions(y, y_null, teacher)

    @torch.no_grad()
    def encode_images(self, part: ShapesPart | LatentPart, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """The images (B, 3, H, W) of a shard, None if its latents are cached, and its latents in float32."""
        if isinstance(part, LatentPart):
            return None, part.latents.to(device, torch.float32)
        pixels = part.images.to(device, non_blocking=True).contiguous()
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.loop.autocast):
            return pixels, self.coder.to(device).encode(pixels).float()

    def target_inputs(self, objective: ObjectiveConfig, average: TextToImage, conditions: Conditions, pixels: Tensor | None,
                      latents: Tensor) -> dict[str, Any]:
        """The arguments of `transition_loss` that only some objectives need."""
        found: dict[str, Any] = {}
        if objective.enhance_target or objective.target == "composed":
            found["ema_model"] = average.transformer
        if objective.enhance_target:
            found["y_null"] = conditions.y_null
        if objective.target == "teacher":
            y = conditions.teacher[0] if conditions.teacher else conditions.y
            found["teacher"] = lambda x_t, t, r: self.teacher.transformer(x_t, t, r, y)
        if self.image_encoder is not None and pixels is not None:
            found["h_target"] = image_features(self.image_encoder, pixels, latents, self.model.transformer.config)
        return found

    def matching(self, average: TextToImage, shard: Shard, latents: Tensor, conditions: Conditions,
                 noise: MatchingNoise) -> dict[str, Tensor]:
        """The losses of distribution matching, for the first items of a batch."""
        own, total = noise.map(lambda value: shard.take(value).to(latents.device)), len(noise.path)
        some = conditions.first(len(own.path))
        of_start = self.config.matching.teacher == "start"
        loss, critic = matching_losses(
            self.model.transformer, (self.teacher if of_start else average).transformer, self.model.critic, latents[: len(own.path)],
            some.y.detach(), some.y_null, transport=self.transport, config=self.config.matching, noise=own,
            teacher_conditions=some.teacher if of_start else None)
        return {"matching": loss.sum() * shard.count / total, "critic": critic.sum() * shard.count / total}

    def distillation(self, shard: Shard, conditions: Conditions, noise: DistillationNoise) -> dict[str, Tensor]:
        """The loss of the distillation, for the first items of a batch."""
        own, total = noise.map(lambda value: shard.take(value).to(conditions.y.device)), len(noise.noise)
        some = conditions.first(len(own.noise))
        loss = distillation_loss(
            self.model.transformer, self.teacher.transformer, some.y, some.y_null, transport=self.transport,
            config=self.config.distillation, noise=own, teacher_conditions=some.teacher)
        return {"distillation": loss.sum() * shard.count / total}

    def sample(self, average: TextToImage, step: int) -> Image.Image:
        """A prompt of each form, at the native size."""
        loop = self.config.loop
        rng = np.random.default_rng([loop.seed, 1])
        prompts = [scenes.sample_prompt(rng, form).text for form in scenes.TRAINING_FORMS]
        width, height = self.config.data.native_size
        noise = torch.randn(len(prompts), self.channels, height // self.factor, width // self.factor,
                            generator=torch.Generator().manual_seed(loop.seed))
        device = next(average.parameters()).device
        cond, null = average.text.conditioning(prompts)
        decode = self.coder.to(device).decode
        return sample_grid(average.transformer, decode, noise.to(device), cond, null, self.transport, loop.autocast)

    @functools.cached_property
    def preview(self) -> dict:
        """The live-preview colours of the latents."""
        return previews.fit(self.autoencoder, render_samples(100, 8 * self.factor, self.config.loop.seed))

    def export(self, average: dict[str, Tensor], record: dict) -> Path:
        """Packs the EMA weights and the autoencoder into one file."""
        config, made = self.config, TextToImage(replace(self.config, matching=None), self.channels)
        mixed = {name: value.lerp(self.initial[name], config.interpolate_start) if self.initial else value
                 for name, value in average.items()}
        init_from(made, mixed, "the averaged weights", optional={name for name, _ in made.named_buffers()})
        metadata = {"latent_factor": self.factor, "scaling_factor": self.autoencoder.config.scaling_factor, "escape_prompts": False,
                    "native_size": list(config.data.native_size), "preview": self.preview, "training": record}
        return pack(
            {"transformer": made.transformer, "text_encoder": made.text, "vae": self.autoencoder},
            config.export_path(record["step"]), dtype=torch.bfloat16, metadata=metadata, keep_projector=True, vae_dtype=torch.bfloat16)
