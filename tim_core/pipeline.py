"""A prompt becomes a picture, without ComfyUI: text encoder, noise, sampler, autoencoder in a row."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import schedule
from .errors import TimError
from .files import digest
from .models.attention import get_attention
from .sampler import check_seed, fresh_noise, sample
from .upscale import stage_sizes, stage_steps, target_size, upscale
from .weights.load import load_autoencoder, load_text_encoder, load_transformer
from .weights.parts import AUTOENCODER, TEXT_ENCODER, TRANSFORMER, read_parts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Pipeline:
    """Text to image. `nfe` is the number of network evaluations of the last call, a guided step counting two."""

    def __init__(self, transformer, text_encoder, autoencoder, factor: int | None = None):
        """From loaded modules, all on one device; `factor` is the number of pixels per latent cell, the autoencoder's by default."""
        if transformer.config.text_dim is None:
            raise TimError("model: found a class-conditional model, expected a text-to-image model")
        self.transformer, self.text_encoder, self.autoencoder = transformer, text_encoder, autoencoder
        self.factor = factor or autoencoder.config.factor
        self.nfe = 0

    @classmethod
    def load(
        cls,
        source: str | Path | Mapping[str, Any] = "tim-shapes",
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        attention: str = "auto",
    ) -> Pipeline:
        """From a bundled name, a one-file checkpoint, or a dict of parts {"model": ..., "text-encoder": ..., "vae": ...}.

        device "auto" is the GPU if there is one. dtype "auto" is float32 on a CPU and bfloat16 on a GPU that computes in it.
        attention: "auto", "sdpa" or "flash". TimError if the source is no text-to-image model, or lacks a part.
        """
        device = pick_device(device)
        dtype = pick_dtype(dtype, device)
        kernel = get_attention(attention)
        parts = read_parts(source)
        if parts[TRANSFORMER].config.text_dim is None:
            raise TimError(f"{parts.source}: found a class-conditional model, expected a text-to-image model")
        parts.require(TEXT_ENCODER, AUTOENCODER)
        parts.check_fit()
        exact = dtype == torch.float16 or parts[AUTOENCODER].config.force_upcast
        return cls(
            load_transformer(parts, attention=kernel, dtype=dtype, device=device),
            load_text_encoder(parts, dtype=torch.float32 if dtype == torch.float16 else dtype, device=device),
            load_autoencoder(parts, dtype=torch.float32 if exact else dtype, device=device),
            parts.latent_factor,
        )

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.transformer.parameters()).dtype

    def fingerprint(self) -> str:
        """sha256 of what pictures depend on, whatever the files are called: all weights as they are here, in their dtypes, and settings."""
        networks = ((network.config, digest(network.state_dict().items())) for network in (self.transformer, self.autoencoder))
        return hashlib.sha256(repr((*networks, self.text_encoder.fingerprint(), self.factor)).encode()).hexdigest()

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        negative: str | Sequence[str] = "",
        steps: int = 4,
        cfg: float = 2.5,
        width: int = 64,
        height: int = 64,
        seed: int = 0,
        *,
        shift: float = 1.0,
        times: Tensor | Sequence[float] | str | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        stochasticity: float = 0.0,
        mode: str = "transition",
        noise: Tensor | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> Tensor:
        """One picture a prompt -> (B, H, W, 3) float32 in [0, 1], on the CPU. A picture does not depend on the other prompts.

        negative: one for all, or one a prompt. cfg 1 is no guidance; guidance acts while low < t < high of `guidance_interval`.
        shift: more than 1 brings the times nearer to noise, see `schedule.shifted`; 1 is `steps` equal steps.
        times: a falling grid from 1 to 0, or its text ("1, 0.7, 0.3, 0"), in place of `steps` and `shift`.
        stochasticity: share of fresh noise a step, 0 is deterministic. mode: "transition", or "diffusion" (r = t, ordinary flow matching).
        noise: (B, C, H / factor, W / factor) standard normal in place of what `seed` draws.
        callback: gets the sampler's dict before each step. TimError for anything that cannot be used.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        grid = self._grid(steps, shift, times)
        noise = self.noise(len(prompts), width, height, seed) if noise is None else self._check_noise(noise, len(prompts), width, height)
        options = dict(mode=mode, cfg=cfg, guidance_interval=guidance_interval, stochasticity=stochasticity, callback=callback)
        text = self._conditioning(prompts, [negative] if isinstance(negative, str) else list(negative))
        latent, self.nfe = self._sample(noise, grid, text, seed, **options)
        return self.decode(latent)

    @torch.no_grad()
    def upscale(
        self,
        images: Tensor,
        prompts: str | Sequence[str],
        negative: str | Sequence[str] = "",
        cfg: float = 2.5,
        width: int = 0,
        height: int = 0,
        steps: int | str | Sequence[int] = 4,
        strength: float = 0.5,
        seed: int = 0,
        *,
        factor: float = 2.0,
        stages: int = 1,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        stochasticity: float = 0.0,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> Tensor:
        """Pictures (B, h, w, 3) in [0, 1] at another size -> (B, height, width, 3) float32 in [0, 1], on the CPU.

        width, height: in pixels, rounded to the model's unit; 0 is by the proportions, both 0 by `factor`. strength: the time that
        the enlarged picture is noised to; all steps run from there. stages: enlargements on the way, by equal factors, `steps` each or
        a number of steps for each. One prompt a picture, or one for all. The rest is as in a call; TimError for what cannot be used.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
            raise TimError(f"images: found shape {list(images.shape)}, expected pictures (B, H, W, 3)")
        prompts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        if len(prompts) != len(images):
            raise TimError(f"prompts: found {len(prompts)} for {len(images)} pictures, expected one for each, or one")
        size = images.shape[2], images.shape[1]
        sizes = stage_sizes(size, target_size(*size, width, height, factor), stages, self.unit)
        options = dict(cfg=cfg, guidance_interval=guidance_interval, stochasticity=stochasticity, callback=callback)
        text = self._conditioning(prompts, [negative] if isinstance(negative, str) else list(negative))
        counts = stage_steps(steps, stages)
        self.nfe = 0

        def resample(latents: Tensor, times: Tensor, stage: int) -> Tensor:
            noise = self.noise(len(latents), *sizes[stage], seed).to(latents)
            start = float(times[0])
            latents, evaluations = self._sample(start * noise + (1 - start) * latents, times, text, seed, **options)
            self.nfe += evaluations
            return latents

        return upscale(images, sizes, counts, strength, encode=self.encode, sample=resample, decode=self.decode)[0]

    def _sample(self, latent: Tensor, grid: Tensor, text: list[Tensor], seed: int, **options) -> tuple[Tensor, int]:
        """Latents at grid[0] to latents at grid[-1], and the evaluations it took; `text` as _conditioning gives it."""
        low, high = options["guidance_interval"]
        for name, value in (("cfg", options["cfg"]), ("guidance interval", low), ("guidance interval", high),
                            ("stochasticity", options["stochasticity"])):
            if not math.isfinite(value) or value < 0:
                raise TimError(f"{name}: found {value}, expected a number of at least 0")
        if options["stochasticity"] > 1:
            raise TimError(f"stochasticity: found {options['stochasticity']}, expected 0 to 1")
        if low >= high:
            raise TimError(f"guidance interval: found {low:g} to {high:g}, expected the first to be smaller (cfg 1 is no guidance)")
        rows = torch.arange(len(text))  # the sampler carries row numbers; the model looks the features up
        fresh = fresh_noise(latent.shape, seed)
        return sample(self._model(text), latent.to(self.device), grid, *rows.chunk(2), noise_sampler=fresh, **options)

    def noise(self, batch: int, width: int, height: int, seed: int) -> Tensor:
        """What ComfyUI draws: (B, C, H / factor, W / factor) float32 on the CPU, the whole batch at once."""
        return torch.randn(self._shape(batch, width, height), generator=torch.Generator().manual_seed(check_seed(seed)))

    def encode(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> latents (B, C, H / factor, W / factor) float32, on the CPU; in blended tiles where memory is short."""
        pixels = images.movedim(-1, 1) * 2 - 1
        return self._in_parts(pixels, images.shape[1] * images.shape[2], self.autoencoder.encode, self.autoencoder.tiled_encode)

    def decode(self, latent: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, H, W, 3) float32 in [0, 1], on the CPU; in blended tiles where memory is short."""
        area = latent.shape[-1] * latent.shape[-2] * self.factor**2
        pixels = self._in_parts(latent, area, self.autoencoder.decode, self.autoencoder.tiled_decode)
        return pixels.add(1).div(2).clamp(0, 1).movedim(1, -1).contiguous()

    @torch.no_grad()
    def _in_parts(self, batch: Tensor, area: int, whole: Callable[[Tensor], Tensor], tiled: Callable[..., Tensor]) -> Tensor:
        """The autoencoder over a batch, a megapixel at a time, `area` pixels an item."""
        batch = batch.to(self.device, next(self.autoencoder.parameters()).dtype)
        parts = []
        for some in batch.split(max(1, 2**20 // area)):
            short = False
            try:
                done = whole(some)
            except torch.cuda.OutOfMemoryError:
                short = True  # inside this block the exception keeps the failed attempt's tensors alive
            if short:
                torch.cuda.empty_cache()
                done = torch.cat([tiled(one, *self._tiles()) for one in some.split(1)])
            parts.append(done.float().cpu())
        return torch.cat(parts)

    def _tiles(self) -> tuple[int, int]:
        """Tile and stride in pixels for a picture that does not fit: 512 and 448, in whole latent cells."""
        return 512 // self.factor * self.factor, 448 // self.factor * self.factor

    @property
    def unit(self) -> int:
        """Pixels that sides are multiples of: the latent factor times the patch size."""
        return self.factor * self.transformer.config.patch_size

    def _shape(self, batch: int, width: int, height: int) -> tuple[int, int, int, int]:
        """The latent's; TimError for a size that the model cannot make."""
        unit = self.unit
        for name, value in (("width", width), ("height", height)):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < unit or value % unit:
                nearest = max(1, round(value / unit)) * unit if isinstance(value, (int, float)) and math.isfinite(value) else unit
                raise TimError(f"{name}: found {value} pixels, expected a multiple of {unit}, such as {nearest}")
        return batch, self.transformer.config.in_channels, height // self.factor, width // self.factor

    def _check_noise(self, noise: Tensor, batch: int, width: int, height: int) -> Tensor:
        shape = self._shape(batch, width, height)
        if tuple(noise.shape) != shape:
            raise TimError(f"noise: found shape {list(noise.shape)}, expected {list(shape)}")
        return noise.float()

    @staticmethod
    def _grid(steps: int, shift: float, times: Tensor | Sequence[float] | str | None) -> Tensor:
        if times is None:
            return schedule.uniform(steps) if shift == 1 else schedule.shifted(steps, shift)
        if shift != 1:
            raise TimError(f"shift: found {shift} beside times, expected one of the two")
        grid = schedule.parse(times) if isinstance(times, str) else torch.as_tensor(times, dtype=torch.float64)
        if grid.ndim != 1 or len(grid) < 2 or grid[0] != 1 or grid[-1] != 0:
            raise TimError(f"times: found {grid.tolist()}, expected a list that begins at 1 and ends at 0")
        return grid

    def _conditioning(self, prompts: list[str], negatives: list[str]) -> list[Tensor]:
        """The features of every prompt, then of every negative, each pair cut to the longer text of the two: [(L_i, D)] * 2B."""
        if not prompts:
            raise TimError("prompts: found none, expected at least one")
        for text in (*prompts, *negatives):
            if not isinstance(text, str):
                raise TimError(f"prompt: found {type(text).__name__}, expected text")
        negatives = negatives * len(prompts) if len(negatives) == 1 else negatives
        if len(negatives) != len(prompts):
            raise TimError(f"negative prompts: found {len(negatives)} for {len(prompts)} prompts, expected one, or one for each prompt")
        features = self.text_encoder.encode(prompts + negatives)
        lengths = [max(pair) for pair in zip(features.lengths[: len(prompts)], features.lengths[len(prompts) :])]
        return [rows[:length] for rows, length in zip(features.rows, lengths * 2)]

    def _model(self, text: list[Tensor]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The network over row numbers of `text`: rows of equal length go together, so that none is padded for another's sake."""

        def model(x: Tensor, t: Tensor, r: Tensor, rows: Tensor) -> Tensor:
            groups: dict[int, list[int]] = {}
            for place, row in enumerate(rows.tolist()):
                groups.setdefault(len(text[row]), []).append(place)
            out = torch.empty_like(x)
            for places in groups.values():
                y = torch.stack([text[rows[place]] for place in places])
                some = torch.tensor(places, device=x.device)
                out[some] = self.transformer(x[some].to(self.dtype), t[some], r[some], y).to(out.dtype)
            return out

        return model


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" is the GPU if there is one. TimError for a device that this computer, or this torch, does not have."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:80]
        raise TimError(f"device: found '{device}', expected auto, cpu or a GPU of this computer ({reason})") from None
    return device


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" is float32 on a CPU, bfloat16 on a GPU that computes in it, else float32. TimError for another name."""
    if dtype == "auto":
        return torch.bfloat16 if device.type != "cpu" and _has_bfloat16(device) else torch.float32
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in DTYPES.values():
        raise TimError(f"dtype: found '{dtype}', expected auto, float32, bfloat16 or float16")
    return dtype


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        torch.ones(1, 1, device=device, dtype=torch.bfloat16).mm(torch.ones(1, 1, device=device, dtype=torch.bfloat16))
    except (RuntimeError, TypeError):
        return False
    return True
