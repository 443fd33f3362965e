"""The sampler, driven by networks whose answers are known."""

import pytest
import torch

from tim_core import schedule
from tim_core.errors import TimError
from tim_core.sampler import sample
from tim_core.transport import EDM, OTFM, TRANSPORTS, VE, TrigFlow

COND, NULL = torch.full((2, 1, 3), 1.0), torch.full((2, 1, 3), -1.0)
EVERY_TRANSPORT = [pytest.param(cls(), id=name) for name, cls in TRANSPORTS.items()] + [pytest.param(EDM(sigma_d=1.7), id="edm_1.7")]


class Recorder:
    """A network that answers the condition's value (cond 1, null -1) everywhere, and remembers what it was given."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, r, y):
        self.calls.append((x, t, r, y))
        return y[:, :1, :1, None].expand_as(x)

    @property
    def guided(self):
        return [len(x) == 4 for x, _, _, _ in self.calls]


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("transport", EVERY_TRANSPORT)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_an_oracle_lands_on_the_path(transport, steps):
    """With F the diffusion target of one clean x, every jump of every grid stays on the interpolant, and `denoised` is x."""
    x, z = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    grid = schedule.uniform(steps, transport.T_max, transport.T_min)
    # An uneven grid too: the oracle does not mind.
    grid = torch.cat((grid[:1], grid[1:-1] ** 1.01 * 0.9, grid[-1:]))
    states = []

    def oracle(x_t, t, r, y):
        return transport.diffusion_target(x, z, grid[len(states)])

    start = transport.interpolate(x, z, grid[0])
    end, nfe = sample(oracle, start, grid, COND, transport=transport, callback=states.append)
    scale = start.abs().max().item()
    assert nfe == steps
    for i, state in enumerate(states):
        assert torch.allclose(state["x"].double(), transport.interpolate(x, z, grid[i]), atol=1e-5 * scale)
        assert torch.allclose(state["denoised"].double(), x, atol=1e-4)
    assert torch.allclose(end.double(), transport.interpolate(x, z, grid[-1]), atol=1e-5)


def test_guided_evaluations_are_counted_and_ends_are_open():
    x = noise(2, 3, 4, 4, dtype=torch.float32)
    network = Recorder()
    assert sample(network, x, schedule.uniform(4), COND, NULL, cfg=2.5)[1] == 7
    assert network.guided == [False, True, True, True]
    assert sample(Recorder(), x, schedule.uniform(1), COND, NULL, cfg=2.5)[1] == 1
    assert sample(Recorder(), x, schedule.uniform(4), COND, NULL, cfg=1.0)[1] == 4
    network = Recorder()
    sample(network, x, schedule.uniform(5), COND, NULL, cfg=2.5, guidance_interval=(0.2, 0.6))
    assert network.guided == [False, False, False, True, False]
    network = Recorder()
    sample(network, x, schedule.uniform(4).float(), COND, NULL, cfg=2.5, guidance_interval=(0.0, 1.1))
    assert network.guided == [True] * 4


def test_only_T_max_of_the_call_scales_the_interval():
    x = noise(2, 3, 4, 4, dtype=torch.float32)
    grid = schedule.uniform(4, 0.8, 0.0)  # 0.8, 0.6, 0.4, 0.2
    network = Recorder()
    sample(network, x, grid, COND, NULL, cfg=2.0, guidance_interval=(0.0, 0.7))
    assert network.guided == [False, True, True, True]
    network = Recorder()
    sample(network, x, grid, COND, NULL, cfg=2.0, guidance_interval=(0.0, 0.7), T_max=0.8)
    assert network.guided == [False, False, True, True]


def test_guidance_asks_for_cond_then_null_and_combines_them():
    x = noise(2, 3, 4, 4, dtype=torch.float32)
    network = Recorder()
    end, _ = sample(network, x, [0.5, 0.25], COND, NULL, cfg=3.0)
    x_seen, t, r, y = network.calls[0]
    assert torch.equal(x_seen, torch.cat((x, x))) and torch.equal(y, torch.cat((COND, NULL)))
    assert t.tolist() == [0.5] * 4 and r.tolist() == [0.25] * 4
    assert torch.allclose(end, x - 0.25 * (-1 + 3.0 * 2))


@pytest.mark.parametrize("transport", [OTFM(), TrigFlow(), EDM()], ids=lambda t: type(t).__name__)
def test_the_network_receives_the_target_time_only_in_transition_mode(transport):
    x, grid = noise(2, 3, 4, 4, dtype=torch.float32), torch.tensor([1.5, 0.9, 0.3], dtype=torch.float64)
    for mode in ("transition", "diffusion"):
        network = Recorder()
        sample(network, x, grid, COND, transport=transport, mode=mode)
        received = [(t[0].item(), r[0].item()) for _, t, r, _ in network.calls]
        conditions = transport.c_noise(grid).tolist()
        expected = list(zip(conditions, conditions[1:])) if mode == "transition" else [(t, t) for t in conditions[:-1]]
        assert received == [pytest.approx(pair, abs=1e-6) for pair in expected]


def test_the_state_is_float64_and_the_network_sees_the_latents_dtype():
    class Half(Recorder):
        def __call__(self, x, t, r, y):
            assert x.dtype == torch.bfloat16 and t.dtype == r.dtype == torch.float32
            return (super().__call__(x, t, r, y) / 3).bfloat16()

    x, network = noise(2, 3, 4, 4).bfloat16(), Half()
    end, _ = sample(network, x, schedule.uniform(300), COND)
    assert end.dtype == torch.float32
    assert (end - (x.float() - torch.full((), 1 / 3).bfloat16().float())).abs().max() < 1e-6
    times = torch.stack([t[0] for _, t, _, _ in network.calls])
    assert torch.allclose(times.double(), schedule.uniform(300)[:-1], atol=1e-7)


def test_two_segments_are_one_run():
    def network(x, t, r, y):
        return (t - 0.3 * r).view(-1, 1, 1, 1) * x + y.mean()

    x, grid = noise(2, 3, 4, 4), schedule.uniform(6)
    whole, _ = sample(network, x, grid, COND)
    half, _ = sample(network, x, grid[:4], COND)
    rest, _ = sample(network, half.double(), grid[3:], COND)
    assert torch.allclose(whole, rest, atol=1e-6)


def test_noise_is_drawn_on_neither_the_first_nor_the_last_step():
    x = noise(2, 3, 4, 4)
    drawn = []

    def fresh(t, r):
        drawn.append((round(t.item(), 6), round(r.item(), 6)))
        return noise(2, 3, 4, 4, seed=len(drawn))

    def run(**settings):
        drawn.clear()
        end, _ = sample(Recorder(), x, schedule.uniform(5), COND, stochasticity=0.2, noise_sampler=fresh, **settings)
        return end, list(drawn)

    assert run()[1] == [(0.8, 0.6), (0.6, 0.4), (0.4, 0.2)]
    assert run(mode="diffusion")[1][-1] == (0.2, 0.0)
    assert run(transport=TrigFlow())[1] == []  # of all transports only OT-FM has it
    # A start below T_max is not the first step of the whole.
    drawn.clear()
    sample(Recorder(), x, [0.5, 0.25], COND, stochasticity=0.2, noise_sampler=fresh)
    assert drawn == [(0.5, 0.25)]


def test_one_stochastic_step_by_hand():
    x, z = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=3)
    end, _ = sample(Recorder(), x, [0.6, 0.4], COND, stochasticity=0.5, noise_sampler=lambda t, r: z)
    by_hand = x - 0.2 - 0.5 * (x + 0.4) * 0.2 + (2 * 0.5 * 0.6 * 0.2) ** 0.5 * z
    assert torch.allclose(end.double(), by_hand, atol=1e-6)
    torch.manual_seed(0)
    first, _ = sample(Recorder(), x, [0.6, 0.4], COND, stochasticity=0.5)
    second, _ = sample(Recorder(), x, [0.6, 0.4], COND, stochasticity=0.5)
    assert not torch.equal(first, second)


def test_the_callback_has_k_diffusions_form():
    x, seen = noise(2, 3, 4, 4, dtype=torch.float32), []
    sample(Recorder(), x, schedule.uniform(3), COND, callback=seen.append)
    assert [state["i"] for state in seen] == [0, 1, 2]
    assert {"x", "i", "sigma", "sigma_hat", "denoised"} <= seen[0].keys()
    assert torch.equal(seen[0]["x"], x) and torch.allclose(seen[0]["denoised"], x - 1)
    assert [float(state["sigma"]) for state in seen] == pytest.approx([1, 2 / 3, 1 / 3])


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"times": [0.0, 1.0]}, "'0, 1'"),
        ({"times": [1.0, 0.5, 0.5]}, "'1, 0.5, 0.5'"),
        ({"times": [1.0]}, "'1'"),
        ({"times": [[1.0, 0.0]]}, "[1, 2]"),
        ({"mode": "ddiffusion"}, "'ddiffusion'"),
        ({"cfg": 2.0}, "cfg: 2 "),
        ({"transport": EDM(), "times": [1.0, 0.0]}, "EDM cannot condition the network on 0 "),
        ({"transport": VE(), "times": [1.0, 0.0]}, "VE cannot condition the network on 0 "),
    ],
)
def test_errors_name_the_value_in_one_line(settings, named):
    settings = {"times": [1.0, 0.0], **settings}
    with pytest.raises(TimError) as error:
        sample(Recorder(), noise(2, 3, 4, 4), settings.pop("times"), COND, **settings)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_logarithmic_time_may_end_at_zero_where_the_network_does_not_receive_it():
    end, nfe = sample(Recorder(), noise(2, 3, 4, 4), [1.0, 0.5, 0.0], COND, transport=EDM(), mode="diffusion")
    assert nfe == 2 and end.isfinite().all()
