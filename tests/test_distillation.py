"""Distillation of guided steps: the targets of the jumps, and which network has gradients."""

import pytest
import torch
from torch import nn

from tim_core import TimError
from tim_core.training.objectives.distillation import DistillationConfig, distillation_loss, draw_distillation_noise
from tim_core.transport import OTFM

SHAPE, TIMES = (64, 2, 3, 3), (1.0, 0.75, 0.5, 0.0)


class Bent(nn.Module):
    """F = w (x cos 3t + y): its trajectories are curves. y (B, 1, 1) moves them."""

    def __init__(self, w: float = 1.0):
        super().__init__()
        self.w, self.calls = nn.Parameter(torch.tensor(w)), []

    def forward(self, x, t, r, y):
        self.calls.append((t, r))
        return self.w * (x * (3 * t).cos().view(-1, 1, 1, 1) + y.unsqueeze(-1))


class Arrives(nn.Module):
    """Jumps from t = 1 to `misses` beyond where Euler steps of `flow`, guided by `cfg`, over `TIMES` get."""

    def __init__(self, flow, cfg: float, misses: float = 0.0):
        super().__init__()
        self.flow, self.cfg, self.misses = flow, cfg, nn.Parameter(torch.tensor(misses))

    def forward(self, x, t, r, y):
        assert (t == 1).all()
        state, landed = x, torch.zeros_like(x)
        for before, after in zip(TIMES, TIMES[1:]):
            time, condition = torch.full_like(t, before), torch.cat((y, torch.zeros_like(y)))
            F, F_null = self.flow(torch.cat((state, state)), time.repeat(2), time.repeat(2), condition).chunk(2)
            state = state - (before - after) * (F_null + self.cfg * (F - F_null))
            landed = torch.where((r == after).view(-1, 1, 1, 1), state, landed)
        return (x - landed) / (1 - r).view(-1, 1, 1, 1) + self.misses


def loss(model, teacher, y=None, **settings):
    config = DistillationConfig(times=TIMES, **settings)
    torch.manual_seed(0)
    y = torch.randn(SHAPE[0], 1, 1) if y is None else y
    return distillation_loss(model, teacher, y, torch.zeros(1, 1, 1), transport=OTFM(), config=config,
                             noise=draw_distillation_noise(SHAPE, config))


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_a_network_that_lands_where_the_guided_teacher_does_has_no_loss(cfg):
    assert loss(Arrives(Bent(), cfg), Bent(), cfg=cfg).max() < 1e-6
    assert loss(Arrives(Bent(), cfg + 1), Bent(), cfg=cfg).mean() > 0.1
    assert loss(Arrives(Bent(0.9), cfg), Bent(), cfg=cfg).mean() > 0.01


def test_the_loss_pulls_back_with_gradients_for_the_model_alone():
    for misses in (0.5, -0.5):
        model, teacher, y = Arrives(Bent(), 2.5, misses), Bent(), torch.ones(SHAPE[0], 1, 1, requires_grad=True)
        loss(model, teacher, y).mean().backward()
        assert model.misses.grad * misses > 0 and teacher.w.grad is None and y.grad is None


def test_small_errors_count_as_squares_and_large_ones_as_they_are():
    found = {misses: loss(Arrives(Bent(), 2.5, misses), Bent(), knee=0.1).mean().item() for misses in (0.01, 0.02, 10.0, 20.0)}
    assert found[0.02] / found[0.01] == pytest.approx(4, rel=0.1) and found[20.0] / found[10.0] == pytest.approx(2, rel=0.1)


def test_the_teacher_goes_once_through_its_times_and_reads_its_own_conditions():
    teacher, config = Bent(), DistillationConfig(times=TIMES)
    torch.manual_seed(0)
    noise, y = draw_distillation_noise(SHAPE, config), torch.randn(SHAPE[0], 1, 1)
    given = {"transport": OTFM(), "config": config, "noise": noise}
    distillation_loss(Bent(), teacher, y, y * 0, **given)
    assert [(t[0].item(), r[0].item(), len(t)) for t, r in teacher.calls] == [(t, r, 2 * SHAPE[0]) for t, r in zip(TIMES, TIMES[1:])]
    model = Arrives(Bent(), 2.5)
    assert distillation_loss(model, Bent(), y, y * 0, **given, teacher_conditions=(y, y * 0)).max() < 1e-6
    assert distillation_loss(model, Bent(), y, y * 0, **given, teacher_conditions=(y + 1, y * 0)).mean() > 0.1


def test_every_trajectory_trains_two_jumps():
    ends = draw_distillation_noise((300, 1, 2, 2), DistillationConfig(times=TIMES)).ends
    assert (ends[:, 0] != ends[:, 1]).all() and set(ends.flatten().tolist()) == {1, 2, 3}


@pytest.mark.parametrize("change", [{"batch_fraction": 0.0}, {"batch_fraction": 1.5}, {"weight": 0.0}, {"knee": 0.0}, {"times": (1.0, 0.5)},
                                    {"times": (0.9, 0.5, 0.2)}, {"times": (1.0, 0.5, 0.5)}, {"times": (1.0, 0.5, -0.1)}])
def test_bad_settings_are_named(change):
    with pytest.raises(TimError, match=next(iter(change))):
        DistillationConfig(**change)
