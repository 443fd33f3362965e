"""Prompts or classes to images without ComfyUI: text encoder, noise, sampler, autoencoder."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .codec import Codec
from .conditions import Condition, Prompt, as_list, check_texts, class_condition, match_negatives, text_condition
from .devices import pick_device, pick_dtype, pick_dtypes
from .errors import TimError
from .files import digest
from .finite import StepRecorder, check_finite
from .limits import check_batch, check_size, check_tile
from .memory import make_room
from .models.attention import get_attention
from .models.transformer import peak_bytes
from .prompts import has_syntax, take_off_syntax
from .sampler import check_guidance, fresh_noise, initial_noise, sample
from .schedule import time_grid
from .upscale import check_images, stage_sizes, stage_steps, target_size, upscale
from .weights.defaults import Defaults, find_defaults, read_defaults
from .weights.load import load_autoencoder, load_text_encoder, load_transformer
from .weights.lora import Lora, list_loras, merge_lora, read_lora
from .weights.parts import AUTOENCODER, TEXT_ENCODER, TRANSFORMER, Parts
from .weights.read import read_parts


class Pipeline:
    """Text to image, or class to image.

    nfe: network evaluations of the last call, a guided step counting two. defaults: the settings that the checkpoint is made for.
    tile: how images are encoded and decoded: "auto", whole where the memory allows it, else in blended tiles of 1024 pixels; "off", whole;
    or the side of the tiles in pixels. Tiles change an image slightly.
    """

    def __init__(self, transformer, text_encoder, autoencoder, factor: int | None = None, defaults: Defaults | None = None):
        """Build a pipeline from loaded modules on one device.

        text_encoder: None for a class-conditional transformer. factor: pixels per latent cell, by default the autoencoder's.
        defaults: by default those of the transformer's shapes.
        """
        self.transformer, self.text_encoder, self.autoencoder = transformer, text_encoder, autoencoder
        self.factor = factor or autoencoder.config.factor
        config = transformer.config
        if text_encoder is None and not self.class_conditional:
            raise TimError("text encoder: missing; a text-to-image model needs one")
        self.defaults = defaults or find_defaults({}, config.in_channels, self.factor, config.patch_size, self.class_conditional)
        self.nfe = 0
        self.tile = "auto"
        self.device = next(transformer.parameters()).device
        self._mentioned: set[str] = set()  # unknown words, and lines, each of which is logged once

    @classmethod
    def load(
        cls,
        source: str | Path | Mapping[str, Any] | Parts = "tim-shapes",
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        attention: str = "auto",
        lora: str | Path | Mapping[str | Path, float] | Sequence[tuple[str | Path, float]] | None = None,
        compile: bool = False,
    ) -> Pipeline:
        """Load a bundled name, a one-file checkpoint, a folder of parts, a dict {"model": ..., "text-encoder": ..., "vae": ...}, or Parts.

        device: "auto" is the GPU if there is one. dtype: "auto" is bfloat16 on a GPU that computes in it. On a CPU it is float32; but where
        the CPU multiplies bfloat16 and the weights would take a GiB or more in float32, parts stored in it or in 8 bits stay in it.
        attention: "auto", "sdpa" or "flash". lora: a file, {file: strength}, or pairs of these, see `load_lora`.
        compile: compile the network with torch.compile, at the first image of each size and batch; it takes a C++ compiler or a GPU.
        TimError unless the source has all parts; a class-conditional model has no text encoder.
        """
        device = pick_device(device)
        pick_dtype(dtype, device)  # an unknown one is refused before anything is read
        kernel = get_attention(attention)
        parts = read_parts(source)
        reads_text = parts[TRANSFORMER].config.text_dim is not None
        parts.require(*([TEXT_ENCODER] if reads_text else []), AUTOENCODER)
        parts.check_fit()
        defaults = read_defaults(parts)
        loras = [(read_lora(file), strength) for file, strength in list_loras(lora)]
        dtypes = pick_dtypes(dtype, device, parts)
        pipe = cls(
            load_transformer(parts, attention=kernel, dtype=dtypes[TRANSFORMER], device=device),
            load_text_encoder(parts, dtype=dtypes[TEXT_ENCODER], device=device) if reads_text else None,
            load_autoencoder(parts, dtype=dtypes[AUTOENCODER], device=device),
            parts.latent_factor,
            defaults,
        )
        for file, strength in loras:
            pipe.load_lora(file, strength)
        if compile:
            pipe.transformer.compile(fullgraph=True)
        return pipe

    def load_lora(self, lora: str | Path | Lora, strength: float = 1.0) -> None:
        """Add a LoRA to the weights, as ComfyUI's LoRA loaders do; several add up. To remove one, load the pipeline again.

        TimError naming the file if it is not a LoRA, or one of another model; the weights are unchanged then.
        """
        lora = lora if isinstance(lora, Lora) else read_lora(lora)
        text_model = None if self.text_encoder is None else self.text_encoder.transformer
        merge_lora(lora, {TRANSFORMER: self.transformer, TEXT_ENCODER: text_model}, strength)

    @property
    def tile(self) -> str | int:
        return self._tile_setting

    @tile.setter
    def tile(self, value: str | int) -> None:
        check_tile(value, self.factor)
        self._tile_setting = value

    @property
    def class_conditional(self) -> bool:
        """Whether prompts are classes."""
        return self.transformer.config.text_dim is None

    @property
    def dtype(self) -> torch.dtype:
        return next(self.transformer.parameters()).dtype

    def fingerprint(self) -> str:
        """sha256 of all that images depend on: the weights in their present dtypes, and the configurations; not of file names."""
        networks = ((network.config, digest(network.state_dict().items())) for network in (self.transformer, self.autoencoder))
        text = None if self.text_encoder is None else self.text_encoder.fingerprint()
        positions = self.transformer.config.positions
        more = () if positions == "official" else (positions,)
        return hashlib.sha256(repr((*networks, text, self.factor, *more)).encode()).hexdigest()

    @torch.no_grad()
    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt],
        negative: Prompt | Sequence[Prompt] = "",
        steps: int | None = None,
        cfg: float | None = None,
        width: int | None = None,
        height: int | None = None,
        seed: int | Sequence[int] = 0,
        *,
        shift: float = 1.0,
        times: Tensor | Sequence[float] | str | None = None,
        guidance_interval: tuple[float, float] | None = None,
        stochasticity: float = 0.0,
        mode: str = "transition",
        noise: Tensor | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> Tensor:
        """Make one image per prompt -> (B, H, W, 3) float32 in [0, 1], on the CPU. An image does not depend on the other prompts.

        steps, cfg, width, height, guidance_interval: None takes the value of `defaults`; sizes are in pixels.
        prompts: texts; for a class-conditional model, numbers or ImageNet names of classes, "" being the null class.
        negative: negative prompts, one for all or one per prompt. cfg: guidance scale; 1 is no guidance.
        seed: one for the batch, as in ComfyUI, or one per prompt. guidance_interval: guidance acts while low < t < high.
        shift: above 1 for denser steps at high noise, see `schedule.shifted`.
        times: falling times from 1 to 0, or their text ("1, 0.7, 0.3, 0"), instead of `steps` and `shift`.
        stochasticity: share of fresh noise per step, 0 to 1. mode: "transition", or "diffusion" (r = t, ordinary flow matching).
        noise: standard normal (B, C, H / factor, W / factor), instead of the noise of `seed`.
        callback: called with the sampler's state before each step. TimError for unusable values.
        """
        prompts = as_list(prompts)
        if prompts:
            check_batch(len(prompts))
        width, height = self.defaults.size(width, height)
        grid = time_grid(self.defaults.steps if steps is None else steps, shift, times)
        noise = self.noise(len(prompts), width, height, seed) if noise is None else self._check_noise(noise, len(prompts), width, height)
        options = self._options(cfg, guidance_interval, stochasticity, mode=mode, callback=callback)
        self._mention(self.defaults.far_size(width, height))
        condition = self._condition(prompts, as_list(negative))
        latent, self.nfe = self._sample(noise, grid, condition, seed, **options)
        return self.decode(latent)

    @torch.no_grad()
    def upscale(
        self,
        images: Tensor,
        prompts: Prompt | Sequence[Prompt],
        negative: Prompt | Sequence[Prompt] = "",
        cfg: float | None = None,
        width: int = 0,
        height: int = 0,
        steps: int | str | Sequence[int] = 4,
        strength: float | None = None,
        seed: int = 0,
        *,
        factor: float = 2.0,
        stages: int = 1,
        guidance_interval: tuple[float, float] | None = None,
        stochasticity: float = 0.0,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> Tensor:
        """Re-render images (B, h, w, 3) in [0, 1] at another size -> (B, height, width, 3) float32 in [0, 1], on the CPU.

        prompts: one per image, or one for all. width, height: in pixels, rounded to `size_multiple`; a side of 0 keeps the aspect ratio,
        both 0 multiply by `factor`. strength: the time up to which noise is added, None for that of `defaults`; all steps run from there.
        stages: number of enlargements by equal factors, `steps` each or one step count per stage. The rest as in a call. TimError for
        unusable values.
        """
        check_images(images)
        prompts = [prompts] * len(images) if isinstance(prompts, (str, int)) else as_list(prompts)
        if len(prompts) != len(images):
            raise TimError(f"prompts: {len(prompts)} for {len(images)} images; give one, or one per image")
        size = images.shape[2], images.shape[1]
        sizes = stage_sizes(size, target_size(*size, width, height, factor), stages, self.size_multiple)
        options = self._options(cfg, guidance_interval, stochasticity, callback=callback)
        condition = self._condition(prompts, as_list(negative))
        counts = stage_steps(steps, stages)
        strength = self.defaults.strength if strength is None else strength
        self._mention(self.defaults.far_size(*sizes[-1], strength))
        self.nfe = 0

        def resample(latents: Tensor, times: Tensor, stage: int) -> Tensor:
            noise = self.noise(len(latents), *sizes[stage], seed).to(latents)
            start = float(times[0])
            latents, evaluations = self._sample(start * noise + (1 - start) * latents, times, condition, seed, **options)
            self.nfe += evaluations
            return latents

        return upscale(images, sizes, counts, strength, encode=self.encode, sample=resample, decode=self.decode)[0]

    def _mention(self, line: str | None) -> None:
        """Log a line, once."""
        if line is not None and line not in self._mentioned:
            self._mentioned.add(line)
            logging.warning(line)

    def _options(self, cfg: float | None, guidance_interval: tuple[float, float] | None, stochasticity: float, **others) -> dict[str, Any]:
        """The sampler's options, with the checkpoint's values for None. TimError for values that cannot be used."""
        cfg = self.defaults.cfg if cfg is None else cfg
        interval = self.defaults.guidance_interval if guidance_interval is None else guidance_interval
        check_guidance(cfg, interval, stochasticity)
        return {"cfg": cfg, "guidance_interval": interval, "stochasticity": stochasticity, **others}

    def _sample(self, latent: Tensor, grid: Tensor, condition: Condition, seed: int | Sequence[int], **options) -> tuple[Tensor, int]:
        """Sample latents from grid[0] to grid[-1] -> latents, network evaluations."""
        if condition.null is None and options["cfg"] > 1:
            raise TimError(f"cfg: {options['cfg']:g} needs a null class, which this model lacks; use cfg 1, or a class as the negative")
        fresh = fresh_noise(latent.shape, seed)
        cells = latent[:, 0].numel() * (2 if options["cfg"] > 1 else 1)
        self._make_room(self.transformer, int(peak_bytes(self.transformer.config, cells, self.dtype)))
        network = StepRecorder(condition.model)
        latent, evaluations = sample(
            network, latent.to(self.device), grid, condition.prompts, condition.null, noise_sampler=fresh, **options)
        advice = [f"a cfg below {options['cfg']:g}"] if options["cfg"] > 1 else []
        check_finite(latent, network.first_bad, self.transformer, advice)
        return latent, evaluations

    def noise(self, batch: int, width: int, height: int, seed: int | Sequence[int]) -> Tensor:
        """The noise that ComfyUI draws: (B, C, H / factor, W / factor) float32 on the CPU, the whole batch at once, or one seed each."""
        return initial_noise(self._shape(batch, width, height), seed)

    def encode(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> latents (B, C, H / factor, W / factor) float32, on the CPU; whole or in blended tiles, see `tile`."""
        return self._codec().encode(images)

    def decode(self, latent: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, H, W, 3) float32 in [0, 1], on the CPU; whole or in blended tiles, see `tile`."""
        return self._codec().decode(latent)

    def _codec(self) -> Codec:
        return Codec(self.autoencoder, self.factor, self.tile, self.device, self._make_room)

    def _make_room(self, network: torch.nn.Module, needed: int) -> None:
        """Bring a network to the device, where a run of it needs `needed` bytes."""
        networks = (self.text_encoder, self.transformer, self.autoencoder)
        make_room(network, needed, [other for other in networks if other is not None and other is not network], self.device)

    @property
    def size_multiple(self) -> int:
        """Sides of images are multiples of this many pixels: the latent factor times the patch size."""
        return self.factor * self.transformer.config.patch_size

    def _shape(self, batch: int, width: int, height: int) -> tuple[int, int, int, int]:
        """The shape of the latents of a size; TimError if the model cannot make that size."""
        check_size(width, height, self.size_multiple)
        return batch, self.transformer.config.in_channels, height // self.factor, width // self.factor

    def _check_noise(self, noise: Tensor, batch: int, width: int, height: int) -> Tensor:
        shape = self._shape(batch, width, height)
        if tuple(noise.shape) != shape:
            raise TimError(f"noise: shape {list(noise.shape)} is not {list(shape)}")
        return noise.float()

    def _condition(self, prompts: list[Prompt], negatives: list[Prompt]) -> Condition:
        """The network with its conditions for prompts and negatives. TimError for any that cannot be used."""
        negatives = match_negatives(prompts, negatives)
        if self.class_conditional:
            return class_condition(self.transformer, prompts, negatives, self.device)
        return self._text(prompts, negatives)

    def _plain_text(self, text: str) -> str:
        """A prompt without ComfyUI's weights and embeddings; a line shows the rest. Parentheses without a weight are kept."""
        if has_syntax(text):
            text, line = take_off_syntax(text)
            self._mention(line)
        return text

    def _text(self, prompts: list[Prompt], negatives: list[Prompt]) -> Condition:
        texts = [self._plain_text(text) for text in check_texts((*prompts, *negatives))]
        unknown, line = self.text_encoder.unknown_words(texts, self._mentioned)
        self._mentioned.update(unknown)
        self._mention(line)
        self._make_room(self.text_encoder, 0)
        features = self.text_encoder.encode(texts)
        check_finite(features.rows, "text encoder", self.text_encoder)
        return text_condition(self.transformer, features, self.device)
