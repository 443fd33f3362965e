"""Checks of what a run is given: latents, times, sizes, and where and when its conditionings act."""

import torch
from comfy.utils import common_upscale
from torch import Tensor

from ...tim_core.errors import TimError
from .log import say

EMPTY_START = 0.9  # time below which the demo model gets fewer images right from an empty latent than from time 1
HIGH_CFG = 6  # times the model's own cfg; the demo model gets 6 of 8 images right at cfg 15, 3 at 20
LONG_STEP = 0.75  # longest guided step: it gets 7 of 8 images right with a step from 0.7 to 0, 2 from 0.8


def check_latent(latent: Tensor, channels: int) -> None:
    """TimError unless the latent is (B, channels, H, W)."""
    if latent.ndim != 4 or latent.shape[1] != channels:
        shape = "x".join(map(str, latent.shape))
        raise TimError(f"latent: shape {shape} does not fit this model, which needs (batch, {channels}, height, width); "
                       "use Empty TiM Latent, or VAE Encode with the VAE of the same checkpoint")


def outside_times(sigmas: Tensor) -> float | None:
    """The first sigma outside 0 to 1, None if there is none."""
    return next((sigma for sigma in sigmas.tolist() if not -1e-6 <= sigma <= 1 + 1e-6), None)


def check_size(model_config, latent_image: Tensor, sigmas: Tensor, options: dict) -> None:
    """Logs a line if the image is of a size that the checkpoint is not made for."""
    factor, start = model_config.latent_format.spacial_downscale_ratio, float(sigmas[0]) if bool(latent_image.any()) else 1.0
    if line := model_config.defaults.far_size(latent_image.shape[3] * factor, latent_image.shape[2] * factor, start):
        say(options, line)


def check_cfg(cfg: float, model_cfg: float, interval, times: list[float], exact: bool, options: dict) -> None:
    """Logs a line for guidance that cannot work: none, too much, or in too long a step.

    model_cfg: what the checkpoint is made for. exact: whether each step is a transition to the next time.
    """
    guided = [(start, end) for start, end in zip(times, times[1:]) if interval.holds(start)]
    if cfg < 1:
        say(options, f"cfg: {cfg:g} is below 1 (no guidance) and favours the negative prompt; use 1 or more")
    if cfg <= 1:
        return
    if not guided and any(start < 1 - 1e-6 for start in times[:-1]):
        say(options, f"cfg: {cfg:g} has no effect: no step starts in the guidance interval {interval.low:g} to {interval.high:g}; "
                     "widen the interval, or set cfg to 1")
    if guided and cfg > HIGH_CFG * model_cfg:
        say(options, f"cfg: {cfg:g} is likely to give a broken image; this model is made for {model_cfg:g}, use at most "
                     f"{HIGH_CFG * model_cfg:g}")
    elif exact and (step := next((step for step in guided if step[0] - step[1] > LONG_STEP), None)):
        say(options, f"cfg: the step from time {step[0]:.3g} to {step[1]:.3g} is too long for guidance; use more steps, a smaller shift, "
                     "or cfg 1")


def check_start(noise: Tensor, latent_image: Tensor, sigmas: Tensor, mask: Tensor | None, options: dict) -> None:
    """Logs a line if the run does not begin with what the model expects at its first time: an image with that much noise."""
    start, empty = float(sigmas[0]), not bool(latent_image.any())
    if not bool(noise.any()) and (empty or start >= 1 - 1e-6):
        say(options, f"noise: none is added, but sampling starts at time {start:.3g} from {'an empty latent' if empty else 'noise alone'}; "
                     "turn add_noise on, or give a latent that another sampler left at a time below 1")
    elif empty and mask is not None and bool((mask < 1).any()):
        say(options, "noise mask: it keeps parts of an empty latent; use a latent from VAE Encode with the mask")
    elif empty and start < EMPTY_START - 1e-3:
        say(options, f"latent: empty, but sampling starts at time {start:.3g}; start at 1 (denoise 1, scheduler simple), or give an image")


def check_areas(conds: list[dict], height: int, width: int, factor: int) -> None:
    """TimError if the area of a conditioning, in cells of `factor` pixels, lies outside the latent of height x width cells."""
    for cond in conds:
        area = cond.get("area")
        if area is not None and area[0] != "percentage" and (area[2] >= height or area[3] >= width):
            x, y = area[3] * factor, area[2] * factor
            raise TimError(f"conditioning: its area begins at ({x}, {y}), outside the image of {width * factor}x{height * factor}; "
                           "move it, or make the image larger")


def check_coverage(name: str, conds: list[dict], times: list[float], to_time, size: tuple[int, int], options: dict) -> None:
    """Logs a line if no conditioning of the list `name` acts in a part of the image of `size` cells, or at one of the times.

    to_time: from the part of the run that is over, as conditionings name their ends, to a time. Core takes nothing for what is left out.
    """
    if not any(key in cond for cond in conds for key in ("area", "mask", "strength", "start_percent", "end_percent")):
        return
    ends = [(to_time(cond.get("start_percent", 0.0)), to_time(cond.get("end_percent", 1.0))) for cond in conds]
    ranges = torch.tensor(ends, dtype=torch.float32).tolist()  # the precision of the times
    acting = {time: tuple(low <= time <= high for high, low in ranges) for time in times}
    for active in dict.fromkeys(acting.values()):
        covered = torch.zeros(size)
        for cond in (cond for cond, acts in zip(conds, active) if acts):
            covered += torch.ones(size) if cond.get("default") else _weights(cond, size)
        if not bool((covered > 0).all()):
            time = next(time for time, found in acting.items() if found == active)
            where = "anywhere" if not covered.any() else f"in {float((covered <= 0).float().mean()):.0%} of the image"
            return say(options, f"conditioning: no {name} prompt acts {where} at time {time:.3g}; add one without area, mask or range "
                                "(Conditioning Combine)")


def _weights(cond: dict, size: tuple[int, int]) -> Tensor:
    """How strongly a conditioning acts in every cell, as core weighs it, without softened edges."""
    weights = torch.zeros(size)
    area = cond.get("area", (*size, 0, 0))
    scale = size if area[0] == "percentage" else (1, 1)
    area = area[1:] if area[0] == "percentage" else area
    lengths, starts = area[: len(area) // 2], area[len(area) // 2 :]  # of the first two axes, also where a node for videos names three
    height, width, y, x = (round(part * side) for pair in (lengths, starts) for part, side in zip(pair, scale))
    weights[y : y + max(height, 1), x : x + max(width, 1)] = cond.get("strength", 1.0)
    if (mask := cond.get("mask")) is not None:
        mask = mask.detach().float().cpu().reshape(-1, 1, *mask.shape[-2:])
        resized = common_upscale(mask, size[1], size[0], "bilinear", "none") if tuple(mask.shape[-2:]) != size else mask
        weights *= resized.amax(dim=(0, 1)) * cond.get("mask_strength", 1.0)
    return weights
