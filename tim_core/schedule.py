"""Time grids: falling times from noise (1) to data (0), as float64 tensors."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from .errors import TimError
from .limits import MAX_SHIFT, MAX_STEPS, MIN_SHIFT


def uniform(steps: int, start: float = 1.0, end: float = 0.0) -> Tensor:
    """The official grid: equal steps from start to end -> (steps + 1,)."""
    _check(steps, start, end)
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


def shifted(steps: int, shift: float, start: float = 1.0, end: float = 0.0) -> Tensor:
    """A grid of equal steps in u, where t = shift u / (1 + (shift - 1) u), as in training (paper Eq. 50) -> (steps + 1,).

    shift: above 1 for denser steps at high noise, which suits large images; 1 is the uniform grid. The first and last times are exactly
    start and end.
    """
    _check(steps, start, end)
    if not MIN_SHIFT <= shift <= MAX_SHIFT:
        raise TimError(f"shift: {shift} is outside {MIN_SHIFT:g} to {MAX_SHIFT:g} (1: equal steps)")
    if start > 1 or end < 0:
        raise TimError(f"times: {start} to {end} cannot be shifted; use times from 0 to 1")

    def unshift(t: float) -> float:
        return t / (shift - (shift - 1) * t)

    u = torch.linspace(unshift(start), unshift(end), steps + 1, dtype=torch.float64)
    times = shift * u / (1 + (shift - 1) * u)
    times[0], times[-1] = start, end
    return times


def parse(text: str) -> Tensor:
    """Times from text such as "1, 0.7, 0.3, 0": at least two, falling, from 0 to 1; commas, semicolons or spaces separate them."""
    words = [word for word in re.split(r"[\s,;]+", text.strip().strip("[]()")) if word]
    times = []
    for word in words:
        try:
            times.append(float(word))
        except ValueError:
            raise TimError(f"times: '{word}' is not a number; write a list such as 1, 0.7, 0.3, 0") from None
    if len(times) < 2:
        raise TimError(f"times: '{text}' has fewer than two times; write a list such as 1, 0")
    for before, after in zip([None, *times], times):
        if not 0 <= after <= 1:
            raise TimError(f"times: {after:g} is not between 0 and 1")
        if before is not None and after >= before:
            raise TimError(f"times: {after:g} follows {before:g}; each time must be smaller than the one before")
    return torch.tensor(times, dtype=torch.float64)


def _check(steps: int, start: float, end: float) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise TimError(f"steps: {steps} is not a whole number from 1 to {MAX_STEPS}")
    if not (math.isfinite(start) and math.isfinite(end)) or start <= end:
        raise TimError(f"times: the start {start} must be greater than the end {end}")
