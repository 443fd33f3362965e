"""Transports: the path from data to noise, what the network predicts on it, and the jump from one time to another.

Notation of the paper (section 3.1, tables 7 and 8): x_t = alpha x + sigma noise; the diffusion target is alpha_hat x + sigma_hat noise;
x_r = A x_t + B F(x_t, t, r), with C = sigma_hat alpha_t - alpha_hat sigma_t, A = (alpha_r sigma_hat - sigma_r alpha_hat) / C and
B = (sigma_r alpha_t - alpha_r sigma_t) / C. Time grows towards noise. Times broadcast against x: (B, 1, 1, 1) or a scalar.

Only OTFM is trained and sampled here: the released models use it, the time grids, guidance intervals, upscaling and ComfyUI's flow sampling
assume its times in [0, 1], and a checkpoint's record names no other. The rest is the paper's reference (tables 7 and 8), for the objective
and the sampler as library functions; tests compare it with the official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Transport:
    """One path from data to noise. sigma_d: standard deviation of the data; T_max, T_min: the largest and the smallest time."""

    sigma_d: float
    T_max: float
    T_min: float

    time_distribution: ClassVar[str] = "normal"  # of the raw draws that `times` maps to times: "normal" or "uniform"
    stochastic: ClassVar[bool] = False  # whether `step` can add noise
    positive_times: ClassVar[bool] = False  # whether the formulas are undefined at t <= 0

    def times(self, draw: Tensor) -> Tensor:
        """Training times from raw draws (paper Tab. 8)."""
        raise NotImplementedError

    def c_noise(self, t: Tensor) -> Tensor:
        """The time as the network receives it."""
        return t

    def alpha(self, t: Tensor) -> Tensor:
        """The factor of the data in x_t."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """The factor of the noise in x_t."""
        raise NotImplementedError

    def d_alpha(self, t: Tensor) -> Tensor:
        """The derivative of alpha with respect to t."""
        raise NotImplementedError

    def d_sigma(self, t: Tensor) -> Tensor:
        """The derivative of sigma with respect to t."""
        raise NotImplementedError

    def diffusion_target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """alpha_hat x + sigma_hat noise: the target where r = t."""
        raise NotImplementedError

    def d_target_dt(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor | float:
        """The time derivative of the diffusion target, x and noise fixed."""
        return 0.0

    def tangent_scale(self, t: Tensor, r: Tensor) -> Tensor:
        """B / (dB/dt) at (t, r): the factor on dF/dt in the target (paper Eq. 9)."""
        raise NotImplementedError

    def step(self, x_t: Tensor, F: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """x_r = A x_t + B F."""
        raise NotImplementedError

    def solve_F(self, x_t: Tensor, x_r: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The F for which `step` maps x_t to x_r, r < t."""
        zero = torch.zeros_like(x_t)
        return (x_r - self.step(x_t, zero, t, r)) / self.step(zero, torch.ones_like(x_t), t, r)

    def denoise(self, x_t: Tensor, F: Tensor, t: Tensor) -> Tensor:
        """The clean x that F predicts: the step to t = 0, divided by alpha."""
        zero = torch.zeros_like(t)
        return self.step(x_t, F, t, zero) / self.alpha(zero)

    def interpolate(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t."""
        return self.alpha(t) * x + self.sigma(t) * noise

    def renoise(self, x_r: Tensor, noise: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """x_t from x_r, r < t: adds the noise that makes x_t distributed as `interpolate` does."""
        kept = self.alpha(t) / self.alpha(r)
        return kept * x_r + (self.sigma(t) ** 2 - (kept * self.sigma(r)) ** 2).clamp(min=0).sqrt() * noise

    def posterior_mean(self, x_t: Tensor, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """E[x_r | x_t, x], r < t, where `renoise` made x_t from x_r (DDPM's posterior, arXiv 2006.11239 Eq. 7)."""
        kept = self.alpha(t) / self.alpha(r)
        return self.alpha(r) * x + kept * self.sigma(r) ** 2 / self.sigma(t) ** 2 * (x_t - self.alpha(t) * x)

    def velocity(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt along the path."""
        return self.d_alpha(t) * x + self.d_sigma(t) * noise

    def target(self, x: Tensor, noise: Tensor, t: Tensor, r: Tensor, dF_dt: Tensor, diffusion: Tensor | None = None) -> Tensor:
        """The regression target (paper Eq. 9); `diffusion` replaces the diffusion target in it (model guidance, Eq. 51)."""
        if diffusion is None:
            diffusion = self.diffusion_target(x, noise, t)
        return diffusion + self.tangent_scale(t, r) * (self.d_target_dt(x, noise, t) - dF_dt)


def guide(both: Tensor, cfg: float) -> Tensor:
    """Guided F (B, ...), F_null + cfg (F_cond - F_null), from a doubled batch (2 B, ...): first F_cond, then F_null."""
    F_cond, F_null = both.chunk(2)
    return F_null + cfg * (F_cond - F_null)


@dataclass(frozen=True)
class OTFM(Transport):
    """Straight lines, t in [0, 1]: the transport of every released model."""

    P_mean: float = 0.0
    P_std: float = 1.0
    sigma_d: float = 1.0
    T_max: float = 1.0
    T_min: float = 0.0

    stochastic: ClassVar[bool] = True

    def times(self, draw: Tensor) -> Tensor:
        sigma = (draw * self.P_std + self.P_mean).exp()
        return sigma / (1 + sigma)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def diffusion_target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - x

    def tangent_scale(self, t: Tensor, r: Tensor) -> Tensor:
        return t - r

    def step(self, x_t: Tensor, F: Tensor, t: Tensor, r: Tensor, stochasticity: float = 0.0, fresh: Tensor | None = None) -> Tensor:
        """x_r; with stochasticity > 0 also the scaled reverse-SDE increment driven by the standard normal `fresh` (paper App. A.3)."""
        x_r = x_t - (t - r) * F
        if stochasticity > 0.0:
            noise = x_t + (1 - t) * F
            x_r = x_r - stochasticity * noise * (t - r) + (2 * stochasticity * t * (t - r)) ** 0.5 * fresh
        return x_r


@dataclass(frozen=True)
class TrigFlow(Transport):
    """Circular arcs, t in [0, pi/2]."""

    P_mean: float = -1.0
    P_std: float = 1.6
    sigma_d: float = 0.5
    T_max: float = 1.57
    T_min: float = 0.0

    def times(self, draw: Tensor) -> Tensor:
        return (draw * self.P_std + self.P_mean).exp().atan()

    def alpha(self, t: Tensor) -> Tensor:
        return t.cos()

    def sigma(self, t: Tensor) -> Tensor:
        return t.sin()

    def d_alpha(self, t: Tensor) -> Tensor:
        return -t.sin()

    def d_sigma(self, t: Tensor) -> Tensor:
        return t.cos()

    def diffusion_target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return t.cos() * noise - t.sin() * x

    def d_target_dt(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return -self.interpolate(x, noise, t)

    def tangent_scale(self, t: Tensor, r: Tensor) -> Tensor:
        return (t - r).tan()

    def step(self, x_t: Tensor, F: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return (t - r).cos() * x_t - (t - r).sin() * F


@dataclass(frozen=True)
class EDM(Transport):
    """Variance exploding, scaled to unit variance; t is the noise level.

    `step` and `tangent_scale` follow from the paper's A and B. The official code has sigma_d cubed where they have its square, so that for
    sigma_d other than 1 its jump leaves the path; here it does not.
    """

    P_mean: float = -1.2
    P_std: float = 1.2
    sigma_d: float = 0.5
    T_max: float = 80.0
    T_min: float = 0.01

    positive_times: ClassVar[bool] = True

    def _norm(self, t: Tensor) -> Tensor:
        return (t**2 + self.sigma_d**2) ** 0.5

    def times(self, draw: Tensor) -> Tensor:
        return (draw * self.P_std + self.P_mean).exp()

    def c_noise(self, t: Tensor) -> Tensor:
        return t.log() / 4

    def alpha(self, t: Tensor) -> Tensor:
        return 1 / self._norm(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t / self._norm(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -t / self._norm(t) ** 3

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.sigma_d**2 / self._norm(t) ** 3

    def diffusion_target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return (t / self.sigma_d * x - self.sigma_d * noise) / self._norm(t)

    def d_target_dt(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.sigma_d * (x + t * noise) / self._norm(t) ** 3

    def tangent_scale(self, t: Tensor, r: Tensor) -> Tensor:
        return (t - r) * (t**2 + self.sigma_d**2) / (t * r + self.sigma_d**2)

    def step(self, x_t: Tensor, F: Tensor, t: Tensor, r: Tensor) -> Tensor:
        norms = self._norm(t) * self._norm(r)
        return (t * r + self.sigma_d**2) / norms * x_t + self.sigma_d * (t - r) / norms * F


@dataclass(frozen=True)
class VP(Transport):
    """Variance preserving, t in [1e-5, 1]; the network predicts the noise."""

    beta_min: float = 0.1
    beta_d: float = 19.9
    T: int = 1000
    sigma_d: float = 1.0
    T_max: float = 1.0
    T_min: float = 1e-5

    time_distribution: ClassVar[str] = "uniform"
    positive_times: ClassVar[bool] = True

    def beta(self, t: Tensor) -> Tensor:
        """The noise level sigma / alpha."""
        return ((0.5 * self.beta_d * t**2 + self.beta_min * t).exp() - 1) ** 0.5

    def _norm(self, t: Tensor) -> Tensor:
        return (self.beta(t) ** 2 + 1) ** 0.5

    def times(self, draw: Tensor) -> Tensor:
        return 1 + draw * (self.T_min - 1)

    def c_noise(self, t: Tensor) -> Tensor:
        return (self.T - 1) * t

    def alpha(self, t: Tensor) -> Tensor:
        return 1 / self._norm(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.beta(t) / self._norm(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * (self.beta_d * t + self.beta_min) / self._norm(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return 0.5 * (self.beta_d * t + self.beta_min) / (self.beta(t) * self._norm(t))

    def diffusion_target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def tangent_scale(self, t: Tensor, r: Tensor) -> Tensor:
        beta = self.beta(t)
        d_beta = (self.beta_d * t + self.beta_min) * (beta**2 + 1) / (2 * beta)
        return (beta - self.beta(r)) / d_beta

    def step(self, x_t: Tensor, F: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return self._norm(t) / self._norm(r) * x_t + (self.beta(r) - self.beta(t)) / self._norm(r) * F


@dataclass(frozen=True)
class VE(Transport):
    """Variance exploding, t is the noise level from 0.02 to 100; the network predicts minus the noise."""

    sigma_d: float = 1.0
    T_max: float = 100.0
    T_min: float = 0.02

    time_distribution: ClassVar[str] = "uniform"
    positive_times: ClassVar[bool] = True

    def times(self, draw: Tensor) -> Tensor:
        return self.T_min * (self.T_max / self.T_min) ** draw

    def c_noise(self, t: Tensor) -> Tensor:
        return (0.5 * t).log()

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def diffusion_target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return -noise

    def tangent_scale(self, t: Tensor, r: Tensor) -> Tensor:
        return t - r

    def step(self, x_t: Tensor, F: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return x_t + (t - r) * F


TRANSPORTS: dict[str, type[Transport]] = {"ot_fm": OTFM, "trigflow": TrigFlow, "edm": EDM, "vp": VP, "ve": VE}
