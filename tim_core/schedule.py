"""Time grids: float64 tensors of falling times, from noise (1) to data (0)."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from .errors import TimError


def uniform(steps: int, start: float = 1.0, end: float = 0.0) -> Tensor:
    """The official grid: steps equal steps from start to end -> (steps + 1,)."""
    _check(steps, start, end)
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


def shifted(steps: int, shift: float, start: float = 1.0, end: float = 0.0) -> Tensor:
    """Steps that are equal in u, with t = shift u / (1 + (shift - 1) u) as in training (paper Eq. 50) -> (steps + 1,).

    shift > 1 puts more of the times near noise, as large pictures want; 1 is the uniform grid. The first and last times are start and
    end exactly, whatever the shift.
    """
    _check(steps, start, end)
    if not (shift > 0 and math.isfinite(shift)):
        raise TimError(f"time shift: found {shift}, expected a number greater than 0")
    if start > 1 or end < 0:
        raise TimError(f"shifted times: found {start} to {end}, expected times from 0 to 1")

    def unshift(t: float) -> float:
        return t / (shift - (shift - 1) * t)

    u = torch.linspace(unshift(start), unshift(end), steps + 1, dtype=torch.float64)
    times = shift * u / (1 + (shift - 1) * u)
    times[0], times[-1] = start, end
    return times


def parse(text: str) -> Tensor:
    """A list such as "1, 0.7, 0.3, 0": at least two falling times from 0 to 1, between commas, semicolons or spaces."""
    words = [word for word in re.split(r"[\s,;]+", text.strip().strip("[]()")) if word]
    times = []
    for word in words:
        try:
            times.append(float(word))
        except ValueError:
            raise TimError(f"times: found '{word}', expected numbers such as '1, 0.7, 0.3, 0'") from None
    if len(times) < 2:
        raise TimError(f"times: found {len(times)} in '{text}', expected at least two, such as '1, 0'")
    for before, after in zip([None, *times], times):
        if not 0 <= after <= 1:
            raise TimError(f"times: found {after:g}, expected times from 0 to 1")
        if before is not None and after >= before:
            raise TimError(f"times: found {after:g} after {before:g}, expected each time to be smaller than the one before")
    return torch.tensor(times, dtype=torch.float64)


def _check(steps: int, start: float, end: float) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise TimError(f"steps: found {steps}, expected a whole number of at least 1")
    if not (math.isfinite(start) and math.isfinite(end)) or start <= end:
        raise TimError(f"times: found a start of {start} and an end of {end}, expected the start to be greater")
