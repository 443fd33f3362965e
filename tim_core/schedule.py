"""Time grids: falling times from noise (1) to data (0), as float64 tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

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
            if not re.fullmatch(r"[-+.0-9a-zA-Z]+", word):  # float() takes 1_0 and digits of other scripts too
                raise ValueError
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


def time_grid(steps: int, shift: float = 1.0, times: Tensor | Sequence[float] | str | None = None) -> Tensor:
    """Times from 1 to 0: `times`, or else of `steps` and `shift`. TimError for unusable values."""
    if times is None:
        return uniform(steps) if shift == 1 else shifted(steps, shift)
    if shift != 1:
        raise TimError(f"shift: {shift} cannot be used with times; give one of the two")
    grid = parse(times) if isinstance(times, str) else torch.as_tensor(times, dtype=torch.float64)
    if grid.ndim != 1 or len(grid) < 2 or grid[0] != 1 or grid[-1] != 0:
        raise TimError(f"times: {grid.tolist()} does not start at 1 and end at 0")
    if len(grid) > MAX_STEPS + 1:
        raise TimError(f"times: {len(grid)} are too many; use at most {MAX_STEPS + 1}")
    return grid


def _check(steps: int, start: float, end: float) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise TimError(f"steps: {steps} is not a whole number from 1 to {MAX_STEPS}")
    if not (math.isfinite(start) and math.isfinite(end)) or start <= end:
        raise TimError(f"times: the start {start} must be greater than the end {end}")
