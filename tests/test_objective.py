"""The objective, on networks whose derivatives and optimum are known."""

import pytest
import torch

from tim_core.errors import TimError
from tim_core.training.objectives.transition import ObjectiveConfig, draw_times, guided_target, sample_times, time_weight, transition_loss
from tim_core.transport import EDM, OTFM, TRANSPORTS, VP, TrigFlow

B, SHAPE = 10, (10, 3, 4, 4)
EVERY_TRANSPORT = [pytest.param(cls(), id=name) for name, cls in TRANSPORTS.items()] + [pytest.param(EDM(sigma_d=1.3), id="edm_1.3")]


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def raw_times(transport, seed=5):
    first, second = draw_times(B, transport, torch.Generator().manual_seed(seed))
    return first.double(), second.double()


def loss(model, transport=OTFM(), x=None, **settings):
    given = {name: settings.pop(name) for name in ("y_null", "ema_model", "teacher", "plain_model", "h_target") if name in settings}
    x = gaussian(*SHAPE) if x is None else x
    return transition_loss(
        model, x, gaussian(*SHAPE, seed=1), gaussian(B, 2, 3, seed=2), transport=transport,
        config=ObjectiveConfig(**settings), raw_times=raw_times(transport), **given,
    )  # fmt: skip


class Smooth(torch.nn.Module):
    """F = w (x sin(2 s) + cos(q)) of the network's inputs for t (s) and r (q)."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.batches = []

    def forward(self, x, s, q, y):
        self.batches.append((len(x), torch.is_grad_enabled()))
        return self.w * (x * torch.sin(2 * s).view(-1, 1, 1, 1) + torch.cos(q).view(-1, 1, 1, 1))


@pytest.mark.parametrize("transport", EVERY_TRANSPORT)
@pytest.mark.parametrize("settings", [{"derivative": "dde"}, {"derivative": "jvp"}, {"target": "composed"}], ids=str)
def test_the_true_network_has_no_loss(transport, settings):
    """Where all data is one x the optimal F is known for every interval; it is a fixed point of the objective, for every transport."""
    x = gaussian(1, *SHAPE[1:]).expand(SHAPE)
    inputs = [transport.c_noise(time) for time in sample_times(raw_times(transport), transport, ObjectiveConfig())[:2]]
    times = torch.cat(sample_times(raw_times(transport), transport, ObjectiveConfig())[:2])

    def time_of(s):
        if type(transport).__name__ == "EDM":
            return (4 * s).exp()
        return {"VP": s / 999, "VE": 2 * s.exp()}.get(type(transport).__name__, s)

    def optimum(x_t, s, q, y):
        t = time_of(s).view(-1, 1, 1, 1)
        return transport.diffusion_target(x[:1], (x_t - transport.alpha(t) * x[:1]) / transport.sigma(t), t)

    assert torch.allclose(time_of(torch.cat(inputs)), times)
    out = loss(optimum, transport, x, epsilon=1e-5, **settings)
    scale = out.F_target.abs().max()
    assert (out.F_target - out.F_pred).abs().max() < 1e-5 * scale
    assert out.denoising_loss.max() < 1e-8 * scale**2


def test_the_difference_and_the_forward_mode_derivative_agree():
    for transport in (OTFM(), TrigFlow(), EDM()):
        exact = loss(Smooth(), transport, derivative="jvp").dF_dt
        for epsilon in (1e-2, 1e-3):
            error = (loss(Smooth(), transport, epsilon=epsilon).dF_dt - exact).abs() / exact.abs().max()
            assert error.max() < 2e3 * epsilon**2, (transport, epsilon, error.max())


@pytest.mark.parametrize("name", TRANSPORTS)
def test_noising_further_and_back(name):
    """x_r noised on to t is distributed as x_t; its mean given x_t and x is the regression of one on the other."""
    transport = TRANSPORTS[name]()
    generator = torch.Generator().manual_seed(0)
    x, first, second = (torch.randn(4000, 1, 1, 1, generator=generator, dtype=torch.float64) for _ in range(3))
    times = transport.times(torch.tensor([0.2, 0.7], dtype=torch.float64)).sort().values.view(2, 1, 1, 1, 1)
    r, t = times[0], times[1]
    x_r = transport.interpolate(x, first, r)
    x_t = transport.renoise(x_r, second, r, t)
    clean = transport.alpha(t) * x
    left, known = x_r - transport.posterior_mean(x_t, x, t, r), x_t - clean
    assert known.mean().abs() < 0.05 * transport.sigma(t) and known.std() == pytest.approx(transport.sigma(t).item(), rel=0.05)
    assert (left * known).mean().abs() < 0.05 * left.std() * known.std() and (left * x).mean().abs() < 0.05 * left.std()
    kept = transport.alpha(t) / transport.alpha(r) * transport.sigma(r) / transport.sigma(t)
    assert left.std() == pytest.approx((transport.sigma(r) * (1 - kept**2) ** 0.5).item(), rel=0.05)


def test_composed_targets_by_hand():
    """One jump over t - r lands where two do, over a time between; only the transition items have such a target, without a gradient."""
    teacher, model = Smooth(), Smooth()
    teacher.w.data.fill_(0.4)
    seen = []

    def spy(x, t, r, y):
        seen.append((x, t.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1), teacher(x, t, r, y)))
        return seen[-1][-1]

    out = loss(model, target="composed", ema_model=spy)
    (x, t, s, first), (x_s, s_again, r, second) = seen
    n = out.n_diffusion
    assert torch.equal(x, out.x_t[n:]) and torch.equal(t, out.t[n:]) and torch.equal(r, out.r[n:]) and torch.equal(s, s_again)
    assert ((r < s) & (s < t)).all() and s.std() > 0
    assert torch.allclose(x_s, x - (t - s) * first)
    landed = x_s - (s - r) * second
    assert torch.allclose(out.x_t[n:] - (t - r) * out.F_target[n:], landed)
    assert torch.allclose(out.F_target[:n], out.v_t[:n]) and (out.dF_dt == 0).all()
    out.total.backward()
    assert model.batches == [(B, True)] and teacher.batches == [(B - n, False)] * 2 and teacher.w.grad is None
    model = Smooth()
    loss(model, target="composed")
    assert model.batches == [(B, True)] + [(B - n, False)] * 2


def test_a_teachers_answers_are_the_target_of_every_item():
    teacher, model, calls = Smooth(), Smooth(), []
    teacher.w.data.fill_(0.4)

    def answers(x_t, t, r):
        calls.append((x_t, t, r))
        return teacher(x_t, t, r, None)

    out = loss(model, target="teacher", teacher=answers)
    ((x_t, t, r),) = calls
    assert torch.equal(x_t, out.x_t) and torch.equal(t, out.t.flatten()) and torch.equal(r, out.r.flatten())
    assert torch.equal(out.F_target, teacher(x_t, t, r, None)) and (out.denoising_loss > 0).all()
    out.total.backward()
    assert model.batches == [(B, True)] and teacher.w.grad is None and model.w.grad > 0
    with pytest.raises(TimError, match="teacher is missing"):
        loss(model, target="teacher")
    with pytest.raises(TimError, match="enhance_target"):
        ObjectiveConfig(target="teacher", enhance_target=True)


def test_the_floor_of_the_adaptive_weight():
    for floor in (1e-5, 0.1):
        out = loss(Smooth(), adaptive_floor=floor)
        assert torch.allclose(out.adaptive_weight, 1 / (out.denoising_loss + floor))


def test_the_derivative_by_hand():
    """dF/dt with x_t moving along the path: w (v sin 2t + 2 x_t cos 2t)."""
    out = loss(Smooth(), derivative="jvp")
    by_hand = 0.7 * (out.v_t * (2 * out.t).sin() + 2 * out.x_t * (2 * out.t).cos())
    assert (out.dF_dt[: out.n_diffusion] == 0).all()
    assert torch.allclose(out.dF_dt[out.n_diffusion :], by_hand[out.n_diffusion :])
    assert torch.allclose(out.F_target, out.v_t - (out.t - out.r) * out.dF_dt)


def test_derivative_passes_see_only_the_transition_items_and_no_gradient():
    model, plain = Smooth(), Smooth()
    loss(model, plain_model=plain).total.backward()
    assert model.batches == [(B, True)] and plain.batches == [(B // 2, False)] * 2
    assert plain.w.grad is None
    model = Smooth()
    loss(model, diffusion_ratio=1.0, consistency_ratio=0.0)
    assert model.batches == [(B, True)]


def test_times_and_groups():
    for name, cls in TRANSPORTS.items():
        transport = cls()
        t, r, count = sample_times(raw_times(transport), transport, ObjectiveConfig(diffusion_ratio=0.3, consistency_ratio=0.2))
        assert count == 3 and torch.equal(t[:3], r[:3]), name
        assert (r[-2:] == transport.T_min).all() and (r[3:-2] < t[3:-2]).all(), name
    first = draw_times(4, VP(), torch.Generator().manual_seed(0))
    again = draw_times(4, VP(), torch.Generator().manual_seed(0))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], first[1]) and (first[0] >= 0).all()


def test_near_shortens_transitions_from_near_noise_alone():
    for name, cls in TRANSPORTS.items():
        transport = cls()
        t, r, _ = sample_times(raw_times(transport), transport, ObjectiveConfig())
        near = float(t.median() / transport.T_max)
        t_near, r_near, _ = sample_times(raw_times(transport), transport, ObjectiveConfig(shorten_above=near))
        above = t > near * transport.T_max
        assert torch.equal(t_near, t) and torch.equal(r_near[~above], r[~above]) and (t > r)[above].any() and (t > r)[~above].any(), name
        assert torch.allclose((t - r_near)[above], (1 - near) * (t - r)[above]), name


@pytest.mark.parametrize("name", TRANSPORTS)
def test_near_of_1_shortens_nothing(name):
    """Some transports draw times beyond T_max."""
    raw = torch.full((4,), 9.0), torch.zeros(4)
    if TRANSPORTS[name]().time_distribution != "normal":
        raw = torch.ones(4), torch.zeros(4)
    t, r, _ = sample_times(raw, TRANSPORTS[name](), ObjectiveConfig(diffusion_ratio=0.0, consistency_ratio=0.0))
    assert (r < t).all()


def test_ratios_round_half_to_even():
    def count(size):
        raw = (torch.zeros(size), torch.ones(size))
        return sample_times(raw, OTFM(), ObjectiveConfig(diffusion_ratio=0.5, consistency_ratio=0.0))[2]

    assert [count(size) for size in (3, 5, 7)] == [2, 2, 4]


def test_the_official_weight():
    t, r = torch.tensor([0.5, 1.0, 0.9]), torch.tensor([0.5, 0.0, 0.9])
    weight = time_weight(t, r, 1, 1.0, ObjectiveConfig())
    assert weight.tolist() == pytest.approx([1.0, (1 + torch.tan(torch.tensor(1.0)).item()) ** -0.5, 1.0])


def test_the_weighted_loss_is_the_paper_s():
    out = loss(Smooth(), use_dir_loss=False)
    squares = ((out.F_pred - out.F_target) ** 2).mean((1, 2, 3))
    assert torch.allclose(out.denoising_loss, squares)
    assert torch.allclose(out.total, (out.time_weight * squares / (squares + 1e-5)).mean())
    both = loss(Smooth())
    cosine = (out.F_pred * out.F_target).sum(1) / (out.F_pred.norm(dim=1) * out.F_target.norm(dim=1))
    assert torch.allclose(both.denoising_loss, squares + (1 - cosine).mean((1, 2)))


def test_the_projection_term():
    h = gaussian(B, 5, 8, seed=3)

    def model(x, t, r, y, return_projection=False):
        return (0 * x, 2 * h) if return_projection else 0 * x

    assert loss(model, h_target=h).proj_loss == pytest.approx(0)
    away = loss(model, h_target=-h, proj_coeff=0.5)
    assert away.proj_loss == pytest.approx(2) and torch.allclose(away.total, away.weighted_loss + 1)
    assert loss(Smooth()).proj_loss is None


def test_model_guidance_only_inside_its_window():
    class Constant:
        def __init__(self, value):
            self.value = value

        def __call__(self, x, t, r, y):
            assert torch.equal(t, r)
            return torch.full_like(x, self.value) * y.mean().sign()

    y_null = -torch.ones(B, 2, 3, dtype=torch.float64)
    settings = {"enhance_target": True, "w_cond": 0.75, "w_start": 0.3, "w_end": 0.8}
    out = loss(Smooth(), ema_model=Constant(4.0), y_null=y_null, **settings)
    plain = loss(Smooth())
    inside = (out.t >= 0.3) & (out.t <= 0.8)
    assert 0 < inside.sum() < B
    shift = 0.75 * (out.F_cond - out.F_null)
    assert torch.allclose(out.F_target, plain.F_target + torch.where(inside, shift, 0.0))
    assert (loss(Smooth(), ema_model=Constant(4.0), y_null=y_null, enhance_target=True, w_cond=0.0).F_cond == 0).all()
    config = ObjectiveConfig(w_gt=0.0, w_cond=1.0, w_start=0.0, w_end=1.0)
    assert torch.equal(guided_target(y_null, 2 * y_null, 3 * y_null, torch.tensor(0.5), config), 2 * y_null)
    with pytest.raises(TimError, match="y_null is missing"):
        loss(Smooth(), ema_model=Constant(1.0), enhance_target=True)


def test_an_item_without_a_finite_target_costs_nothing():
    class Broken(Smooth):
        def forward(self, x, s, q, y):
            out = super().forward(x, s, q, y)
            if not torch.is_grad_enabled():
                out[0] = float("nan")
            return out

    model = Broken()
    out = loss(model)
    out.total.backward()
    assert out.F_target.isnan().flatten(1).any(1).sum() == 1
    assert out.denoising_loss[out.n_diffusion].abs() < 1e-12 and model.w.grad.isfinite()


def test_no_step_below_time_zero():
    small = torch.full((B,), -9.0, dtype=torch.float64), torch.full((B,), -12.0, dtype=torch.float64)
    out = transition_loss(
        Smooth(), gaussian(*SHAPE), gaussian(*SHAPE, seed=1), gaussian(B, 2, 3), transport=EDM(), config=ObjectiveConfig(), raw_times=small
    )
    assert (out.t < 0.005).all() and out.dF_dt.isfinite().all() and out.F_target.isfinite().all()


def test_half_precision_answers_are_used_in_float32():
    def model(x, t, r, y):
        assert t.dtype == torch.float32
        return (x * 0.5).bfloat16()

    x, z, y = (gaussian(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate((SHAPE, SHAPE, (B, 2, 3))))
    out = transition_loss(model, x, z, y, transport=OTFM(), config=ObjectiveConfig(), generator=torch.Generator().manual_seed(0))
    assert out.F_pred.dtype == out.dF_dt.dtype == out.total.dtype == torch.float32


@pytest.mark.parametrize("settings", [{"derivative": "fd"}, {"weight_time_type": "cubic"}])
def test_unknown_settings_are_refused(settings):
    (name,) = settings
    with pytest.raises(TimError, match=f"objective.{name} is '{settings[name]}'; use "):
        ObjectiveConfig(**settings)
