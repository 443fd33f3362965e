"""Prompts or classes to images without ComfyUI: text encoder, noise, sampler, autoencoder."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor

from . import schedule
from .errors import TimError
from .files import digest
from .finite import StepRecorder, check_finite
from .imagenet import NULL_CLASS, class_number
from .limits import MAX_BATCH, MAX_SIDE, MAX_STEPS
from .memory import available_bytes
from .models.attention import get_attention
from .models.tiles import TILE
from .models.transformer import PEAK_TENSORS
from .sampler import Model, check_guidance, check_seed, fresh_noise, sample
from .upscale import stage_sizes, stage_steps, target_size, upscale
from .weights.defaults import Defaults, find_defaults, read_defaults
from .weights.detect import TITLES
from .weights.load import load_autoencoder, load_text_encoder, load_transformer, main_dtype
from .weights.lora import Lora, merge_lora, read_lora
from .weights.parts import AUTOENCODER, TEXT_ENCODER, TRANSFORMER, Parts, read_parts

MIN_TILE = 256  # pixels
SHARE_OF_MEMORY = 0.8  # of what is available that a run of a network may take
OFFLOAD_DEVICE = torch.device("cpu")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGE = 2**30  # bytes of weights in float32; below, bfloat16 gains a CPU little, and float32 is what ComfyUI computes in there
CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # names of torch.cpu.get_capabilities


Prompt = Union[str, int]


@dataclass(frozen=True)
class Condition:
    """What the sampler passes to the network: model(x, t, r, y) -> F, and the y of prompts and of negatives; null None for no guidance."""

    model: Model
    prompts: Tensor
    null: Tensor | None


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
        loras = [(read_lora(file), strength) for file, strength in _strengths(lora)]
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
        return hashlib.sha256(repr((*networks, text, self.factor)).encode()).hexdigest()

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
        prompts = _as_list(prompts)
        if prompts:
            check_batch(len(prompts))
        width, height = self.defaults.width if width is None else width, self.defaults.height if height is None else height
        grid = time_grid(self.defaults.steps if steps is None else steps, shift, times)
        noise = self.noise(len(prompts), width, height, seed) if noise is None else self._check_noise(noise, len(prompts), width, height)
        options = self._options(cfg, guidance_interval, stochasticity, mode=mode, callback=callback)
        self._mention(self.defaults.far_size(width, height))
        condition = self._condition(prompts, _as_list(negative))
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
        if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
            raise TimError(f"images: shape {list(images.shape)} is not (B, H, W, 3)")
        low, high = (value.item() for value in images.aminmax())
        if not images.is_floating_point() or not (low >= -0.01 and high <= 1.01):
            raise TimError(f"images: {images.dtype} values from {low:g} to {high:g}; give floats from 0 to 1")
        prompts = [prompts] * len(images) if isinstance(prompts, (str, int)) else list(prompts)
        if len(prompts) != len(images):
            raise TimError(f"prompts: {len(prompts)} for {len(images)} images; give one, or one per image")
        size = images.shape[2], images.shape[1]
        sizes = stage_sizes(size, target_size(*size, width, height, factor), stages, self.size_multiple)
        options = self._options(cfg, guidance_interval, stochasticity, callback=callback)
        condition = self._condition(prompts, _as_list(negative))
        counts = stage_steps(steps, stages)
        self._mention(self.defaults.far_size(*sizes[-1]))
        strength = self.defaults.strength if strength is None else strength
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
        if isinstance(seed, (list, tuple)):
            check_seed_count(seed, len(latent))
        fresh = fresh_noise(latent.shape, seed)
        config, cells = self.transformer.config, latent[:, 0].numel() * (2 if options["cfg"] > 1 else 1)
        self._make_room(self.transformer, PEAK_TENSORS * cells // config.patch_size**2 * config.hidden_size * self.dtype.itemsize)
        network = StepRecorder(condition.model)
        latent, evaluations = sample(
            network, latent.to(self.device), grid, condition.prompts, condition.null, noise_sampler=fresh, **options)
        advice = [f"a cfg below {options['cfg']:g}"] if options["cfg"] > 1 else []
        check_finite(latent, network.first_bad, self.transformer, advice)
        return latent, evaluations

    def noise(self, batch: int, width: int, height: int, seed: int | Sequence[int]) -> Tensor:
        """The noise that ComfyUI draws: (B, C, H / factor, W / factor) float32 on the CPU, the whole batch at once, or one seed each."""
        shape = self._shape(batch, width, height)
        if isinstance(seed, (list, tuple)):
            check_seed_count(seed, batch)
            return torch.cat([self.noise(1, width, height, one) for one in seed])
        return torch.randn(shape, generator=torch.Generator().manual_seed(check_seed(seed)))

    def encode(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> latents (B, C, H / factor, W / factor) float32, on the CPU; whole or in blended tiles, see `tile`."""
        pixels = images.movedim(-1, 1) * 2 - 1
        size = images.shape[1], images.shape[2]
        return self._batched("VAE encoder", pixels, size, self.autoencoder.encode, self.autoencoder.tiled_encode)

    def decode(self, latent: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, H, W, 3) float32 in [0, 1], on the CPU; whole or in blended tiles, see `tile`."""
        size = latent.shape[-2] * self.factor, latent.shape[-1] * self.factor
        pixels = self._batched("VAE decoder", latent, size, self.autoencoder.decode, self.autoencoder.tiled_decode)
        return pixels.add_(1).div_(2).clamp_(0, 1).movedim(1, -1).contiguous()

    @torch.no_grad()
    def _batched(
        self, stage: str, batch: Tensor, size: tuple[int, int], whole: Callable[[Tensor], Tensor], tiled: Callable[..., Tensor]
    ) -> Tensor:
        """Run the autoencoder over a batch, about a megapixel at a time -> float32 on the CPU. size: height and width in pixels."""
        dtype = next(self.autoencoder.parameters()).dtype
        count = max(1, min(len(batch), 2**20 // (size[0] * size[1])))
        self._make_room(self.autoencoder, count * self.autoencoder.peak_bytes(*size, dtype, self.device))
        tile = self._tile(size, dtype)
        parts = []
        for some in batch.split(count):
            some = some.to(self.device, dtype)
            done = whole(some) if tile is None else tiled(some, tile, (tile - tile // 8) // self.factor * self.factor)
            check_finite(done, stage, self.autoencoder)
            parts.append(done.float().cpu())
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _make_room(self, network: torch.nn.Module, needed: int) -> None:
        """Bring a network to the device. Where its run needs more bytes than the device has left, the other networks leave for the CPU."""
        away = [parameter for parameter in network.parameters() if parameter.device != self.device]
        needed += sum(parameter.nbytes for parameter in away)
        if self.device != OFFLOAD_DEVICE and needed > SHARE_OF_MEMORY * available_bytes(self.device):
            for other in (self.text_encoder, self.transformer, self.autoencoder):
                if other is not None and other is not network:
                    other.to(OFFLOAD_DEVICE)
        if away:
            network.to(self.device)

    def _tile(self, size: tuple[int, int], dtype: torch.dtype) -> int | None:
        """The side of tiles in pixels; None for whole images."""
        if self.tile == "off":
            return None
        if self.tile != "auto":
            return int(self.tile)
        needed = self.autoencoder.peak_bytes(*size, dtype, self.device)
        return None if max(size) <= TILE or needed < SHARE_OF_MEMORY * available_bytes(self.device) else TILE

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
        if not prompts:
            raise TimError("prompts: none given; give at least one")
        negatives = negatives * len(prompts) if len(negatives) == 1 else negatives
        if len(negatives) != len(prompts):
            raise TimError(f"negative prompts: {len(negatives)} for {len(prompts)} prompts; give one, or one per prompt")
        return self._classes(prompts, negatives) if self.class_conditional else self._text(prompts, negatives)

    def _classes(self, prompts: list[Prompt], negatives: list[Prompt]) -> Condition:
        config = self.transformer.config
        labels = [class_number(prompt) if isinstance(prompt, str) else prompt for prompt in (*prompts, *negatives)]
        for label in labels:
            if isinstance(label, bool) or not isinstance(label, Integral) or not NULL_CLASS <= label < config.num_classes:
                raise TimError(f"class: {label!r} is not a class of this model; use 0 to {config.num_classes - 1}")
        has_null = config.null_class or NULL_CLASS not in labels[len(prompts) :]
        if not config.null_class and NULL_CLASS in labels[: len(prompts)]:
            raise TimError("class: empty, but this model has no null class; give a class")
        numbers = torch.tensor(labels, device=self.device)
        numbers = torch.where(numbers == NULL_CLASS, config.num_classes, numbers)

        def model(x: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
            return self.transformer(x.to(self.dtype), t, r, y)

        return Condition(model, numbers[: len(prompts)], numbers[len(prompts) :] if has_null else None)

    def _text(self, prompts: list[Prompt], negatives: list[Prompt]) -> Condition:
        """Conditions are row numbers of the features: each prompt and its negative have the length of the longer of the two."""
        texts = []
        for text in (*prompts, *negatives):
            if not isinstance(text, str):
                raise TimError(f"prompt: {text!r} is not text")
            texts.append(text)
        unknown, line = self.text_encoder.unknown_words(texts, self._mentioned)
        if unknown:
            self._mentioned.update(unknown)
            self._mention(line)
        self._make_room(self.text_encoder, 0)
        features = self.text_encoder.encode(texts)
        check_finite(features.rows, "text encoder", self.text_encoder)
        lengths = [max(pair) for pair in zip(features.lengths[: len(prompts)], features.lengths[len(prompts) :])]
        rows_of = [rows[:length] for rows, length in zip(features.rows, lengths * 2)]

        batches: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}  # places and features of each group, made at a batch's first step

        def grouped(rows: list[int]) -> list[tuple[Tensor, Tensor]]:
            """Rows of equal length share a call, so that none is padded."""
            groups: dict[int, list[int]] = {}
            for place, row in enumerate(rows):
                groups.setdefault(len(rows_of[row]), []).append(place)
            return [(torch.tensor(places, device=self.device), torch.stack([rows_of[rows[place]] for place in places]))
                    for places in groups.values()]

        def model(x: Tensor, t: Tensor, r: Tensor, rows: Tensor) -> Tensor:
            key = tuple(rows.tolist())  # on the CPU
            groups = batches[key] = batches.get(key) or grouped(list(key))
            if len(groups) == 1:
                return self.transformer(x.to(self.dtype), t, r, groups[0][1]).to(x.dtype)
            out = torch.empty_like(x)
            for places, y in groups:
                out[places] = self.transformer(x[places].to(self.dtype), t[places], r[places], y).to(out.dtype)
            return out

        return Condition(model, *torch.arange(len(rows_of)).chunk(2))


def time_grid(steps: int, shift: float = 1.0, times: Tensor | Sequence[float] | str | None = None) -> Tensor:
    """Times from 1 to 0: `times`, or else of `steps` and `shift`. TimError for unusable values."""
    if times is None:
        return schedule.uniform(steps) if shift == 1 else schedule.shifted(steps, shift)
    if shift != 1:
        raise TimError(f"shift: {shift} cannot be used with times; give one of the two")
    grid = schedule.parse(times) if isinstance(times, str) else torch.as_tensor(times, dtype=torch.float64)
    if grid.ndim != 1 or len(grid) < 2 or grid[0] != 1 or grid[-1] != 0:
        raise TimError(f"times: {grid.tolist()} does not start at 1 and end at 0")
    if len(grid) > MAX_STEPS + 1:
        raise TimError(f"times: {len(grid)} are too many; use at most {MAX_STEPS + 1}")
    return grid


def check_batch(batch: int, name: str = "batch") -> None:
    """TimError unless `batch` is a number of images from 1 to MAX_BATCH."""
    if isinstance(batch, bool) or not isinstance(batch, Integral) or not 1 <= batch <= MAX_BATCH:
        raise TimError(f"{name}: {batch} is not a whole number from 1 to {MAX_BATCH}")


def _strengths(lora: Any) -> list[tuple[str | Path, float]]:
    """LoRA files and their strengths, from what `Pipeline.load` takes."""
    if isinstance(lora, (str, Path)):
        return [(lora, 1.0)]
    return list(lora.items() if isinstance(lora, Mapping) else lora or ())


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if not isinstance(prompts, (str, int)) and not isinstance(prompts, Iterable):
        raise TimError(f"prompt: {prompts!r} is not text; use an empty text for none")
    return [prompts] if isinstance(prompts, (str, int)) else list(prompts)


def size_multiple(parts: Parts) -> int:
    """`Pipeline.size_multiple` of a checkpoint whose weights are not loaded."""
    return parts.latent_factor * parts[TRANSFORMER].config.patch_size


def check_seed_count(seeds: Sequence[int], batch: int) -> None:
    """TimError unless there are as many seeds as images."""
    if len(seeds) != batch:
        raise TimError(f"seed: {len(seeds)} seeds for {batch} images; give one, or one per image")


def check_tile(tile: Any, factor: int) -> None:
    """TimError unless `tile` is "auto", "off", or a multiple of `factor` of at least MIN_TILE pixels."""
    whole = isinstance(tile, Integral) and not isinstance(tile, bool)
    if tile not in ("auto", "off") and not (whole and int(tile) >= MIN_TILE and int(tile) % factor == 0):
        raise TimError(f"tile: {tile!r} is not auto, off, or a multiple of {factor} of at least {MIN_TILE} pixels")


def check_size(width: Any, height: Any, multiple: int) -> None:
    """TimError unless both sides are whole multiples of `multiple` pixels up to MAX_SIDE; it names the nearest size that is."""
    sides, most = (width, height), MAX_SIDE // multiple * multiple
    whole = all(isinstance(side, Integral) and not isinstance(side, bool) and side >= multiple and side % multiple == 0 for side in sides)
    if whole and max(sides) <= most:
        return
    numbers = [min(side, most) if isinstance(side, (int, float)) and side == side else multiple for side in sides]
    nearest = "x".join(str(max(1, round(max(number, 0) / multiple)) * multiple) for number in numbers)
    problem = f"over {MAX_SIDE} pixels a side" if whole else f"not a multiple of {multiple}"
    raise TimError(f"size: {width}x{height} is {problem}; nearest is {nearest}")


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """A torch device; "auto" is the GPU if there is one. TimError for one that this computer, or this torch, does not have."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:80]
        raise TimError(f"device: '{device}' is not available ({reason}); use auto, cpu or a GPU of this computer") from None
    return device


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A torch dtype; "auto" is bfloat16 on a GPU that computes in it, else float32. TimError for an unknown name."""
    if dtype == "auto":
        return torch.bfloat16 if device.type != "cpu" and _has_bfloat16(device) else torch.float32
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in DTYPES.values():
        raise TimError(f"dtype: '{dtype}' is unknown; use auto, float32, bfloat16 or float16")
    return dtype


def pick_dtypes(dtype: str | torch.dtype, device: torch.device, parts: Parts) -> dict[str, torch.dtype]:
    """The dtype that each part of a checkpoint computes in, by kind: float16 is for the transformer alone; see `Pipeline.load`."""
    chosen = dict.fromkeys(TITLES, pick_dtype(dtype, device))
    if dtype == "auto" and device.type == "cpu" and _has_bfloat16(device) and _float32_bytes(parts) >= LARGE:
        half = [kind for kind in TITLES if kind in parts and main_dtype(parts[kind].tensors) == torch.bfloat16]
        chosen |= dict.fromkeys(half, torch.bfloat16)
    for kind in (TEXT_ENCODER, AUTOENCODER):
        if chosen[kind] == torch.float16 or kind == AUTOENCODER and kind in parts and parts[kind].config.force_upcast:
            chosen[kind] = torch.float32
    return chosen


def _float32_bytes(parts: Parts) -> int:
    return sum(4 * tensor.numel() for kind in TITLES if kind in parts for tensor in parts[kind].tensors.values())


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cpu":
        found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # torch 2.10
        return any(found.get(name) for name in CPU_BFLOAT16)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        torch.ones(1, 1, device=device, dtype=torch.bfloat16).mm(torch.ones(1, 1, device=device, dtype=torch.bfloat16))
    except (RuntimeError, TypeError):
        return False
    return True
