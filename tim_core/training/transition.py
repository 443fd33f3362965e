"""Trains a TiM transformer together with its text model (arXiv 2509.04394, Algorithm 1)."""

import copy
import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import TimError
from ..models.attention import get_attention
from ..models.autoencoder import Autoencoder
from ..models.config import TransformerConfig
from ..models.text_encoder import TextEncoder, Tokenizer
from ..models.transformer import TransitionTransformer
from ..processes import Shard, find_processes
from ..shapes import scenes
from ..shapes.batches import ShapesBatches, render_samples
from ..shapes.tokenizer import VOCABULARY_SIZE, WORD_START, small_world_tokenizer, vocabulary
from ..transport import OTFM
from ..weights import previews
from ..weights.load import load_autoencoder, load_text_encoder, load_transformer
from ..weights.save import check_output_path, pack
from .config import export_path, recorded, time_shift
from .loop import compile_blocks, make_ema, train
from .noise import draw_noise
from .objectives.distillation import DistillationNoise, distillation_loss, draw_distillation_noise
from .objectives.matching import MatchingNoise, draw_matching_noise, matching_losses
from .objectives.transition import transition_loss
from .repa import ImageEncoder, check_projector, image_features
from .resume import init_from
from .samples import sample_grid
from .shapes_config import TextShape, TransitionTraining


class TextToImage(nn.Module):
    """The networks that are trained: `text`, captions -> features; `transformer`, F(x_t, t, r, features); `critic` or None."""

    def __init__(self, config: TransitionTraining, latent_channels: int):
        super().__init__()
        tokenizer = Tokenizer.from_json(small_world_tokenizer())
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
        raise TimError(f"training config: {key} is {fraction}, {count} of {total} items, for {shard.count} processes or accumulated parts; "
                       "use at least one each")
    return count


def gemma_config(shape: TextShape) -> dict:
    """A Gemma-3 config for the small world's vocabulary, with alternating local and global layers; the last one is global."""
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


def train_transition(config: TransitionTraining, image_encoder: ImageEncoder | None = None) -> Path:
    """Runs a `kind: tim` configuration; returns the one-file checkpoint of the EMA."""
    loop, folder = config.loop, Path(config.output).expanduser()
    if config.checkpoint:
        check_output_path(config.checkpoint)
    autoencoder: Autoencoder = load_autoencoder(
        Path(config.autoencoder).expanduser(), dtype=torch.float32).to(memory_format=torch.channels_last)
    torch.manual_seed(loop.seed)
    model = TextToImage(config, autoencoder.config.latent_channels)
    if config.start:
        start = Path(config.start).expanduser()
        init_from(model.transformer, load_transformer(start, dtype=torch.float32, projector=True).state_dict(), str(start))
        init_from(model.text, load_text_encoder(start, dtype=torch.float32).state_dict(), str(start))
        if model.critic is not None:
            same = model.transformer.state_dict()
            model.critic.load_state_dict({name: same[name] for name in model.critic.state_dict()})
    initial = {name: value.detach().clone() for name, value in model.named_parameters()} if config.interpolate_start else {}
    words, ids = model.text.transformer.embed_tokens.weight.data, vocabulary()
    before = words.clone()
    for word, other in config.add_embedding.items():
        words[ids[WORD_START + word]] += before[ids[WORD_START + other]]
    model.text.requires_grad_(not config.freeze_text)
    teacher = make_ema(model, share_fixed=False).eval() if config.needs_start else None
    if teacher is not None and loop.compile:
        compile_blocks(teacher)
    check_projector(model.transformer, image_encoder, *config.objectives.values())
    transport = OTFM(P_mean=config.p_mean, P_std=config.p_std)
    config.data.check_multiples(autoencoder.config.factor * config.transformer.patch_size)
    coder = copy.deepcopy(autoencoder)  # moved to the device of the run; `autoencoder` stays on the CPU for the export
    factor, channels = autoencoder.config.factor, autoencoder.config.latent_channels

    def loss_of(model: TextToImage, average: TextToImage, batch: tuple[Tensor, list[str]], step: int, shard: Shard) -> dict[str, Tensor]:
        images, captions = batch
        objective, total = config.objective_at(step), len(captions)
        device = next(model.parameters()).device
        coder.to(device)
        shape = (total, channels, images.shape[2] // factor, images.shape[3] // factor)
        drawn = draw_noise(shape, config.text_dropout, transport, objective, time_shift(*images.shape[2:], config.shift_base))
        jumps = trajectories = None
        if config.matching:
            count = subset_size("matching.batch_fraction", config.matching.batch_fraction, total, shard)
            jumps = draw_matching_noise((count, *shape[1:]), config.matching)
        if config.distillation:
            count = subset_size("distillation.batch_fraction", config.distillation.batch_fraction, total, shard)
            trajectories = draw_distillation_noise((count, *shape[1:]), config.distillation)
        own = drawn.take(shard, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=loop.autocast):
            prompts = ["" if drop else caption for drop, caption in zip(drawn.dropped, captions)]
            y = model.features(shard.take(prompts), model.max_tokens(prompts))
            with torch.no_grad():
                pixels = shard.take(images).to(device).contiguous(memory_format=torch.channels_last)
                latents = coder.encode(pixels).float()
                y_null = teacher_y = None
                if objective.enhance_target or jumps or trajectories:
                    y_null = model.features([""], y.shape[1]).expand_as(y)
                if teacher is not None:
                    teacher.to(device)
                    if not config.freeze_text:  # else the teacher's text model is the model's
                        teacher_y = teacher.features(shard.take(prompts), y.shape[1]), teacher.features([""], y.shape[1])
            more: dict = {}
            if objective.enhance_target or objective.target == "composed":
                more["ema_model"] = average.transformer
            if objective.enhance_target:
                more["y_null"] = y_null
            if objective.target == "teacher":
                more["teacher"] = lambda x_t, t, r: teacher.transformer(x_t, t, r, teacher_y[0] if teacher_y else y)
            if image_encoder is not None:
                more["h_target"] = image_features(image_encoder, pixels, latents, model.transformer.config)
            losses = transition_loss(
                model.transformer, latents, own.noise, y, transport=transport, config=objective, times=(own.t, own.r, own.n_diffusion),
                transitions=drawn.n_diffusion < total, between=own.between, **more)
            found = {"loss": losses.total * shard.loss_weight(total)}
            if jumps:
                found |= matched(model, average, shard, latents, y, y_null, teacher_y, jumps)
                found["loss"] = found["loss"] + config.matching.weight * found["matching"] + found["critic"]
            if trajectories:
                found |= distilled(model, shard, y, y_null, teacher_y, trajectories)
                found["loss"] = found["loss"] + config.distillation.weight * found["distillation"]
        return {**found, **drawn.mean_errors(losses.denoising_loss, shard)}

    def matched(model: TextToImage, average: TextToImage, shard: Shard, latents: Tensor, y: Tensor, y_null: Tensor,
                teacher_y: tuple[Tensor, Tensor] | None, noise: MatchingNoise) -> dict[str, Tensor]:
        """The losses of distribution matching, for the first items of a batch."""
        own, total = noise.map(lambda value: shard.take(value).to(latents.device)), len(noise.path)
        some = slice(len(own.path))
        of_start = config.matching.teacher == "start"
        loss, critic = matching_losses(
            model.transformer, (teacher if of_start else average).transformer, model.critic, latents[some], y[some].detach(), y_null[some],
            transport=transport, config=config.matching, noise=own,
            teacher_conditions=(teacher_y[0][some], teacher_y[1]) if of_start and teacher_y else None)
        return {"matching": loss.sum() * shard.count / total, "critic": critic.sum() * shard.count / total}

    def distilled(model: TextToImage, shard: Shard, y: Tensor, y_null: Tensor, teacher_y: tuple[Tensor, Tensor] | None,
                  noise: DistillationNoise) -> dict[str, Tensor]:
        """The loss of the distillation, for the first items of a batch."""
        own, total = noise.map(lambda value: shard.take(value).to(y.device)), len(noise.noise)
        some = slice(len(own.noise))
        loss = distillation_loss(
            model.transformer, teacher.transformer, y[some], y_null[some], transport=transport, config=config.distillation, noise=own,
            teacher_conditions=(teacher_y[0][some], teacher_y[1]) if teacher_y else None)
        return {"distillation": loss.sum() * shard.count / total}

    def sample(average: TextToImage, step: int) -> Image.Image:
        rng = np.random.default_rng([loop.seed, 1])
        prompts = [scenes.sample_prompt(rng, form).text for form in scenes.TRAINING_FORMS]
        width, height = config.data.table()[0][0]
        noise = torch.randn(len(prompts), channels, height // factor, width // factor, generator=torch.Generator().manual_seed(loop.seed))
        device = next(average.parameters()).device
        cond, null = average.text.conditioning(prompts)
        return sample_grid(average.transformer, coder.to(device).decode, noise.to(device), cond, null, transport, loop.autocast)

    preview = functools.cache(lambda: previews.fit(autoencoder, render_samples(100, 8 * factor, loop.seed)))

    def export(average: dict[str, Tensor], training: dict) -> Path:
        """Packs the EMA weights and the autoencoder into one file."""
        trained = TextToImage(replace(config, matching=None), autoencoder.config.latent_channels)
        mixed = {name: value.lerp(initial[name], config.interpolate_start) if initial else value for name, value in average.items()}
        trained.load_state_dict({**trained.state_dict(), **mixed})
        record = {"latent_factor": autoencoder.config.factor, "scaling_factor": autoencoder.config.scaling_factor, "escape_prompts": False,
                  "preview": preview(), "training": training}
        return pack(
            {"transformer": trained.transformer, "text_encoder": trained.text, "vae": autoencoder},
            export_path(config, training["step"]), dtype=torch.bfloat16, metadata=record, keep_projector=True)

    batches = ShapesBatches(config.data, loop.batch, loop.seed, find_processes().count * loop.accumulate)
    return train(loop, model, batches, loss_of, folder, sample, export, recorded(config), config.matching, teacher)
