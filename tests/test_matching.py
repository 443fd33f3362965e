"""Distribution matching: the direction of its gradient, and which network has it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tim_core import TimError
from tim_core.training.objectives.matching import MatchingConfig, draw_matching_noise, matching_losses
from tim_core.transport import OTFM

SHAPE = (512, 1, 1, 1)


class Gaussian(nn.Module):
    """The exact flow (r = t) of data from N(mean, std^2); as a network that jumps, it lands on `lands`."""

    def __init__(self, mean: float, std: float = 1.0, lands: float = 0.0):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), std
        self.lands = nn.Parameter(torch.tensor(lands))

    def forward(self, x, t, r, y):
        t, r = t.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1)
        clean = self.mean + (1 - t) * self.std**2 / ((1 - t) ** 2 * self.std**2 + t**2) * (x - (1 - t) * self.mean)
        flow = (x - clean) / t
        return torch.where(t == r, flow, (x - self.lands) / (t - r).clamp(min=1e-6))


class Origin(Gaussian):
    """The exact critic of results of jumps to `end` that are distributed as data from N(mean, std^2) noised to that time."""

    def __init__(self, mean: float, std: float, end: float):
        super().__init__(mean, std)
        self.end = end

    def forward(self, x, t, interval, y):
        t = t.view(-1, 1, 1, 1)
        assert torch.allclose(interval.view(-1, 1, 1, 1), t - self.end)
        kept, spread = (1 - t) / (1 - self.end), (1 - self.end) ** 2 * self.std**2 + self.end**2
        centre = (1 - self.end) * self.mean
        origin = centre + kept * spread / ((1 - t) ** 2 * self.std**2 + t**2) * (x - kept * centre)
        return (x - origin) / (t - self.end)


def losses(model, teacher, critic, config=MatchingConfig(cfg=1.0), seed=0):
    torch.manual_seed(seed)
    y = torch.zeros(SHAPE[0], 1, 1)
    return matching_losses(model, teacher, critic, torch.randn(SHAPE), y, y, transport=OTFM(), config=config,
                           noise=draw_matching_noise(SHAPE, config))


@pytest.mark.parametrize("real, fake, way", [(2.0, 0.0, 1), (-2.0, 0.0, -1), (0.0, 1.0, -1)])
def test_results_are_pulled_towards_the_data(real, fake, way):
    model = Gaussian(0.0)
    losses(model, Gaussian(real), Gaussian(fake))[0].mean().backward()
    assert -model.lands.grad * way > 0.1


def test_nothing_pulls_where_the_two_flows_agree():
    model = Gaussian(0.0)
    loss, _ = losses(model, Gaussian(1.5, 0.5), Gaussian(1.5, 0.5))
    loss.mean().backward()
    assert loss.abs().max() < 1e-8 and model.lands.grad.abs() < 1e-4


@pytest.mark.parametrize("end", [0.25, 0.75])
def test_a_jump_to_a_time_between_is_pulled_to_what_that_time_holds(end):
    config = MatchingConfig(cfg=1.0, paths=((1.0, end),))
    loss, _ = losses(Gaussian(0.0), Gaussian(1.5, 0.5), Origin(1.5, 0.5, end), config)
    assert loss.abs().max() < 1e-6
    for real, way in ((2.0, 1), (-2.0, -1)):
        model = Gaussian(0.0)
        losses(model, Gaussian(real), Origin(0.0, 1.0, end), config)[0].mean().backward()
        assert -model.lands.grad * way > 0.1


@pytest.mark.parametrize("end", [0.0, 0.75])
def test_a_pull_is_as_long_whatever_the_length_of_the_jump(end):
    """dloss/dF is (fake - real) / size of each result, times the way a jump goes: no factor of its length."""
    config, answers = MatchingConfig(cfg=1.0, paths=((1.0, end),)), []

    class Answers(nn.Module):
        def forward(self, x, t, r, y):
            answers.append((torch.zeros_like(x) + 0.3).requires_grad_())
            return answers[-1]

    critic = Gaussian(0.5, 0.5) if end == 0 else Origin(0.5, 0.5, end)
    loss, _ = losses(Answers(), Gaussian(2.0, 0.5), critic, config)
    loss.sum().backward()
    # half the square of `made - target`, over the length, through a result that moves by minus the length
    assert torch.allclose(answers[0].grad.flatten().abs(), (2 * loss * (1 - end)).sqrt().detach(), rtol=1e-4)


def test_the_critic_learns_what_results_are_noised_from():
    """Least squares over its mean and its spread: the best critic is the one that knows the results."""
    end, std = 0.5, 0.5
    config = MatchingConfig(cfg=1.0, paths=((1.0, end),))

    class Exact(nn.Module):  # from noise to x_r of data N(1.5, std^2)
        def forward(self, x, t, r, y):
            lands = (1 - end) * 1.5 + ((1 - end) ** 2 * std**2 + end**2) ** 0.5 * x
            return (x - lands) / (1 - end)

    def error(mean, std):
        lessons = torch.cat([losses(Exact(), Gaussian(0.0), Origin(mean, std, end), config, seed)[1] for seed in range(64)]).double()
        return (0.05 * lessons / (1 - lessons)).detach()  # before its weight

    best = error(1.5, std)
    for other in ((1.0, std), (2.0, std), (1.5, 0.0), (1.5, 1.0)):
        more = error(*other) - best
        assert more.mean() > 3 * more.std() / len(more) ** 0.5, other


def test_each_loss_has_gradients_for_one_network():
    model, teacher, critic = Gaussian(0.0), Gaussian(2.0), Gaussian(1.0)
    loss, lesson = losses(model, teacher, critic)
    loss.mean().backward(retain_graph=True)
    assert model.lands.grad is not None and teacher.mean.grad is None and critic.mean.grad is None
    model.lands.grad = None
    lesson.mean().backward()
    assert critic.mean.grad is not None and teacher.mean.grad is None and model.lands.grad is None


def test_the_critic_learns_where_results_are():
    model, critic = Gaussian(0.0, lands=3.0), Gaussian(0.0, 0.3)
    optimizer = torch.optim.Adam([critic.mean], 0.05)
    for step in range(200):
        optimizer.zero_grad()
        losses(model, Gaussian(0.0), critic, seed=step)[1].mean().backward()
        optimizer.step()
    assert critic.mean.item() == pytest.approx(3.0, abs=0.1)


def test_guidance_leads_on():
    """The guided flow goes from the null condition's through the condition's."""
    class Conditional(Gaussian):
        def forward(self, x, t, r, y):
            self.mean.data = (y.mean(1, keepdim=True).unsqueeze(-1) > 0).float()
            return super().forward(x, t, r, y)

    def pull(cfg):
        torch.manual_seed(0)
        config, model = MatchingConfig(cfg=cfg), Gaussian(0.0)
        loss, _ = matching_losses(model, Conditional(0.0), Gaussian(1.0), torch.randn(SHAPE), torch.ones(SHAPE[0], 1, 1),
                                  torch.zeros(SHAPE[0], 1, 1), transport=OTFM(), config=config, noise=draw_matching_noise(SHAPE, config))
        loss.mean().backward()
        return -model.lands.grad.item()

    assert abs(pull(1.0)) < 1e-4 and pull(2.0) > 0.1 and pull(0.0 + 1e-9) < -0.1


def test_paths_take_turns_and_jumps_are_compared_after_their_ends():
    config = MatchingConfig(paths=((1.0, 0.0), (1.0, 0.75, 0.5)))
    noise = draw_matching_noise((300, 1, 2, 2), config)
    kinds, counts = noise.path.unique(dim=0, return_counts=True)
    assert kinds.tolist() == [[1.0, 0.75, 0.5], [1.0, 1.0, 0.0]] and counts.tolist() == [150, 150]
    end = noise.path[:, -1]
    for t in (noise.t, noise.t_critic):
        assert (t > end).all() and (t < 1).all() and t[end == 0].min() < 0.5
    assert noise.noise.shape == (300, 1, 2, 2) and not torch.equal(noise.noise, noise.noise_t)
    assert {draw_matching_noise((1, 1, 2, 2), config).path[0, -1].item() for _ in range(64)} == {0.0, 0.5}  # a first item has each of them


class Conditional(nn.Module):
    """F is the condition; what it is asked is kept, and its answers are leaves that have a gradient."""

    def __init__(self):
        super().__init__()
        self.seen, self.answers = [], []

    def forward(self, x, t, r, y):
        self.seen.append((x.detach().clone(), t, r, y.flatten(), torch.is_grad_enabled()))
        self.answers.append((torch.zeros_like(x) + y.view(-1, 1, 1, 1)).requires_grad_())
        return self.answers[-1]


def answers(count, config, path=None):
    """Conditions 1, 2, ... and -1 for none, from noise; the loss, the network and the noise."""
    torch.manual_seed(0)
    model, noise = Conditional(), draw_matching_noise((count, 1, 1, 1), config)
    if path:
        noise = replace(noise, path=torch.tensor(path))
    loss, _ = matching_losses(model, Gaussian(2.0), lambda x, t, interval, y: x, torch.zeros(count, 1, 1, 1),
                              torch.arange(1.0, count + 1).view(-1, 1, 1), -torch.ones(count, 1, 1), transport=OTFM(), config=config,
                              noise=noise)
    return loss, model, noise


def test_a_jump_starts_where_the_guided_steps_before_it_end():
    """Unguided to 0.75, then guided by 3 to 0.5 and to 0.25; the other half of the batch jumps at once."""
    _, model, noise = answers(8, MatchingConfig(cfg=1.0, paths=((1.0, 0.75, 0.5, 0.25), (1.0, 0.0)), rollout_cfg=3.0))
    long = (noise.path[:, 1] < 1).nonzero().flatten()
    (first, *_, y, _), (second, *_), (last, t, r, _, _) = model.seen
    start, condition = noise.noise[long], (long + 1.0).view(-1, 1, 1, 1)
    assert torch.equal(first, start) and torch.equal(y, condition.flatten())
    assert torch.allclose(second, (start - 0.25 * condition).repeat(2, 1, 1, 1))                # with the condition, and without
    assert torch.allclose(last[long], start - 0.25 * condition - 0.25 * (-1 + 3 * (condition + 1)))
    assert [grad for *_, grad in model.seen] == [False, False, True] and len(last) == 12
    assert torch.equal(t[long], torch.full((4,), 0.5)) and torch.equal(r[long], torch.full((4,), 0.25))


def test_of_a_guided_jump_both_answers_learn():
    """By cfg and cfg - 1 times the pull of its length; a jump from noise, in the same batch, learns unguided."""
    loss, model, noise = answers(7, MatchingConfig(cfg=1.0, paths=((1.0, 0.0), (1.0, 0.75, 0.5)), rollout_cfg=3.0))
    long = noise.path[:, 1] < 1
    loss.sum().backward()
    with_y, without = model.answers[-1].grad.flatten().abs().split((7, int(long.sum())))
    pull = (2 * loss * torch.where(long, 0.25, 1.0)).sqrt().detach()
    assert torch.allclose(with_y, torch.where(long, 3.0, 1.0) * pull, rtol=1e-4) and torch.allclose(without, 2 * pull[long], rtol=1e-4)


def test_a_batch_without_longer_paths_stays_at_its_noise():
    """One of two processes may have such a part of a batch, and makes as many calls as the other."""
    _, model, noise = answers(1, MatchingConfig(cfg=1.0, paths=((1.0, 0.0), (1.0, 0.75, 0.5)), rollout_cfg=3.0), path=[[1.0, 1.0, 0.0]])
    assert len(model.seen) == 2 and all(torch.equal(x, noise.noise) for x, *_ in model.seen)


@pytest.mark.parametrize("change", [{"batch_fraction": 0.0}, {"batch_fraction": 1.5}, {"paths": ()}, {"paths": ((1.0,),)},
                                    {"critic_lr": 0.0}, {"critic_muon_lr": 0.0}, {"critic_warmup_steps": -1}, {"rollout_cfg": 0.5},
                                    {"rollout_cfg": float("nan")}, {"paths": ((1.0, -0.1),)},
                                    {"paths": ((1.0, 0.0), (0.5, 0.75))}, {"paths": ((1.2, 0.0),)}])
def test_bad_settings_are_named(change):
    with pytest.raises(TimError, match=next(iter(change))):
        MatchingConfig(**change)
