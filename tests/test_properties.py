"""Laws that hold for any input: time grids, segments of a run, tiles, sizes of stages, recognition of weights."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tim_core import schedule
from tim_core.errors import TimError
from tim_core.limits import MAX_SHIFT, MAX_STAGES, MIN_SHIFT
from tim_core.models.autoencoder import Autoencoder
from tim_core.models.config import CONDITIONS, POSITIONS, AutoencoderConfig, StageConfig, TransformerConfig
from tim_core.models.transformer import TransitionTransformer
from tim_core.sampler import fresh_noise, sample
from tim_core.upscale import enlarge, stage_sizes
from tim_core.weights.detect import SIGNATURES, TRANSFORMER, find_part

settings.register_profile("suite", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("suite")

STEPS = st.integers(1, 200)
SHIFTS = st.floats(0.02, 50)
# A start and an end at least a hundredth apart.
SPANS = st.tuples(st.integers(0, 99), st.integers(1, 100)).filter(lambda pair: pair[0] < pair[1]).map(lambda p: (p[1] / 100, p[0] / 100))
GRIDS = st.lists(st.integers(0, 1000), min_size=2, max_size=12, unique=True).map(lambda ts: sorted((t / 1000 for t in ts), reverse=True))


# Time grids


@given(STEPS, SPANS)
def test_a_uniform_grid_has_equal_steps_between_its_ends(steps, span):
    times = schedule.uniform(steps, *span)
    assert len(times) == steps + 1 and (times[0], times[-1]) == span
    torch.testing.assert_close(-times.diff(), torch.full((steps,), (span[0] - span[1]) / steps, dtype=torch.float64))


@given(STEPS, SHIFTS, SPANS)
def test_a_shifted_grid_falls_from_start_to_end(steps, shift, span):
    times = schedule.shifted(steps, shift, *span)
    assert len(times) == steps + 1 and (times[0], times[-1]) == span and (times.diff() < 0).all()


@given(STEPS, SHIFTS, SHIFTS, SPANS)
def test_shifts_multiply_and_their_inverse_is_uniform(steps, first, second, span):
    def shift(t, by):
        return by * t / (1 + (by - 1) * t)

    assume(MIN_SHIFT <= first * second <= MAX_SHIFT)
    times = schedule.shifted(steps, first)
    torch.testing.assert_close(shift(times, second), schedule.shifted(steps, first * second))
    torch.testing.assert_close(shift(times, 1 / first), schedule.uniform(steps))


@given(st.integers(2, 100), SHIFTS, SPANS, st.data())
def test_a_part_of_a_shifted_grid_is_the_shifted_grid_of_the_part(steps, shift, span, data):
    whole = schedule.shifted(steps, shift, *span)
    cut = data.draw(st.integers(1, steps - 1))
    torch.testing.assert_close(schedule.shifted(cut, shift, span[0], whole[cut].item()), whole[: cut + 1])
    torch.testing.assert_close(schedule.shifted(steps - cut, shift, whole[cut].item(), span[1]), whole[cut:])


@given(GRIDS, st.sampled_from([", ", ",", " ", ";", "\n", " ,  "]), st.sampled_from(["{}", "[{}]", "({})", " {} ", "{},"]))
def test_a_grid_written_down_is_read_again(grid, separator, frame):
    assert schedule.parse(frame.format(separator.join(map(repr, grid)))).tolist() == grid


@given(st.text(max_size=40))
def test_any_text_is_a_falling_grid_or_one_line(text):
    try:
        times = schedule.parse(text)
    except TimError as error:
        assert str(error).startswith("times: ") and str(error).isprintable()
    else:
        assert len(times) > 1 and (times.diff() < 0).all() and times[0] <= 1 and times[-1] >= 0


# The sampler


def network(x, t, r, y):
    """A smooth function of all that a network is given."""
    t, r, y = (value.to(x.dtype).view(-1, 1, 1, 1) for value in (t, r, y))
    return torch.sin(2 * x + y) * (1 + t) - r * x.mean((1, 2, 3), keepdim=True) + 0.3 * y


def noise(batch=2, seed=0):
    return torch.randn(batch, 2, 3, 4, generator=torch.Generator().manual_seed(seed))


INTERVALS = st.tuples(st.integers(0, 50), st.integers(51, 110)).map(lambda pair: (pair[0] / 100, pair[1] / 100))
OPTIONS = dict(cond=torch.tensor([0.4, -1.0]), null=torch.tensor([0.1, 0.2]))


@given(GRIDS, st.data(), st.floats(1, 8), INTERVALS, st.sampled_from(["transition", "diffusion"]))
def test_a_run_in_two_parts_is_the_run(grid, data, cfg, interval, mode):
    """Up to rounding: the state is float64 within a part, and float32 between parts."""
    assume(len(grid) > 2)
    cut = data.draw(st.integers(1, len(grid) - 2))
    options = dict(OPTIONS, cfg=cfg, guidance_interval=interval, mode=mode)
    whole, evaluations = sample(network, noise(), grid, **options)
    half, first = sample(network, noise(), grid[: cut + 1], **options)
    rest, second = sample(network, half, grid[cut:], **options)
    assert first + second == evaluations
    torch.testing.assert_close(rest, whole, rtol=1e-4, atol=1e-5)


@given(GRIDS, st.floats(1, 8), INTERVALS)
def test_evaluations_are_counted_by_the_open_interval(grid, cfg, interval):
    calls = []

    def counted(x, t, r, y):
        calls.append(len(x) // 2)
        return network(x, t, r, y)

    _, evaluations = sample(counted, noise(), grid, cfg=cfg, guidance_interval=interval, **OPTIONS)
    low, high = (torch.tensor(end, dtype=torch.float32) for end in interval)
    guided = [low < torch.tensor(t, dtype=torch.float32) < high and cfg > 1 for t in grid[:-1]]
    assert calls == [2 if is_guided else 1 for is_guided in guided] and evaluations == sum(calls)


@given(GRIDS, st.floats(1, 8))
def test_a_straight_path_is_followed_exactly_whatever_the_steps(grid, cfg):
    """Where F is the slope from data to noise, every grid ends on the line; guidance by equal conditions changes nothing."""
    data, start = noise(seed=1), noise(seed=2)
    where = [t * start + (1 - t) * data for t in (grid[0], grid[-1])]

    def straight(x, t, r, y):
        return (start - data).repeat(len(x) // len(data), 1, 1, 1)

    result, _ = sample(straight, where[0], grid, cfg=cfg, guidance_interval=(0.0, 1.1), **OPTIONS)
    torch.testing.assert_close(result, where[1], rtol=1e-4, atol=1e-5)


@given(GRIDS, st.floats(0.01, 1), st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=3, unique=True))
def test_with_a_seed_each_an_item_does_not_depend_on_its_batch(grid, stochasticity, seeds):
    batch = noise(len(seeds))
    conds = torch.linspace(-1, 1, len(seeds))
    together, _ = sample(network, batch, grid, conds, stochasticity=stochasticity, noise_sampler=fresh_noise(batch.shape, seeds))
    for i, seed in enumerate(seeds):
        item, cond = batch[i : i + 1], conds[i : i + 1]
        alone, _ = sample(network, item, grid, cond, stochasticity=stochasticity, noise_sampler=fresh_noise(item.shape, seed))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


# Tiles


class Blocks(Autoencoder):
    """Cells are the means of blocks of 8 pixels, and pixels are their cells: neither depends on what is around."""

    def __init__(self):
        stages = (StageConfig(8, 1),) * 4
        super().__init__(AutoencoderConfig(stages, stages, latent_channels=3, head_dim=8), device="meta")
        self.sizes = []

    def encode(self, x):
        self.sizes.append(x.shape[-2:])
        return torch.nn.functional.avg_pool2d(x, 8)

    def decode(self, z):
        self.sizes.append((z.shape[-2] * 8, z.shape[-1] * 8))
        return z.repeat_interleave(8, -1).repeat_interleave(8, -2)


SIDES = st.integers(1, 20)  # cells
TILES = st.tuples(st.integers(1, 8), st.integers(1, 8)).map(lambda pair: (8 * max(pair), 8 * min(pair)))  # tile, stride in pixels


@given(SIDES, SIDES, TILES, TILES)
def test_tiles_leave_a_local_function_as_it_is(height, width, vertical, horizontal):
    blocks = Blocks()
    tile, stride = zip(vertical, horizontal)
    cells = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height * width))
    for tiled, whole, x in ((blocks.tiled_decode, blocks.decode, cells), (blocks.tiled_encode, blocks.encode, blocks.decode(cells))):
        blocks.sizes.clear()
        result = tiled(x, tile, stride)
        assert all(h <= tile[0] and w <= tile[1] for h, w in blocks.sizes)
        torch.testing.assert_close(result, whole(x))


# Sizes of stages


@given(*[st.integers(16, 4096)] * 4, st.integers(1, MAX_STAGES), st.sampled_from([8, 16, 32]))
@example(24, 20, 24, 20, 7, 16)  # between two multiples
def test_stages_go_steadily_from_a_size_to_the_multiple_nearest_to_the_target(w, h, new_w, new_h, stages, multiple):
    assume(1 / 8 < new_w / w * h / new_h < 8)  # beyond, less than a pixel of the image may be left
    sizes = stage_sizes((w, h), (new_w, new_h), stages, multiple)
    assert len(sizes) == stages and all(side % multiple == 0 and side > 0 for size in sizes for side in size)
    for old, new, path in zip((w, h), (new_w, new_h), zip(*sizes)):
        assert abs(path[-1] - new) <= max(multiple / 2, multiple - new)
        steps = [after - before for before, after in zip(path, path[1:])]
        assert all(step >= 0 for step in steps) if new >= old else all(step <= 0 for step in steps)


@given(*[st.integers(1, 40)] * 4, st.floats(0, 1))
def test_a_plain_image_stays_plain_at_any_size(w, h, new_w, new_h, value):
    result = enlarge(torch.full((1, h, w, 3), value), new_w, new_h)
    torch.testing.assert_close(result, torch.full((1, new_h, new_w, 3), value), rtol=0, atol=1e-5)


# Recognition


@st.composite
def configs(draw):
    heads, width = draw(st.integers(1, 3)), 4 * draw(st.integers(1, 3))
    depth = draw(st.integers(1, 3))
    text = draw(st.booleans())
    z_dim = draw(st.none() | st.integers(1, 8))
    return TransformerConfig(
        in_channels=draw(st.integers(1, 8)), hidden_size=heads * width, depth=depth, num_heads=heads, patch_size=draw(st.integers(1, 3)),
        text_dim=draw(st.integers(1, 16)) if text else None, num_classes=None if text else draw(st.integers(1, 9)),
        null_class=draw(st.booleans()) or text, qk_norm=draw(st.booleans()), new_condition=draw(st.sampled_from(CONDITIONS)),
        use_new_embed=draw(st.booleans()), distance_aware=draw(st.booleans()), lora_hidden_size=draw(st.integers(1, 8)),
        encoder_depth=draw(st.integers(1, depth)) if z_dim else min(8, depth), projector_dim=draw(st.integers(1, 8)) if z_dim else 2048,
        z_dim=z_dim, mlp_hidden_size=draw(st.none() | st.integers(1, 40)), positions=draw(st.sampled_from(POSITIONS)),
    )


@given(configs())
def test_a_configuration_is_read_back_from_shapes_and_record(config):
    shapes = TransitionTransformer(config, device="meta").state_dict()
    if config.mlp_hidden_size == 4 * config.hidden_size * 2 // 3:
        config = replace(config, mlp_hidden_size=None)
    assert TransformerConfig.from_state_dict(shapes, config.record()) == config


PREFIXES = st.lists(st.sampled_from(["model", "module", "state_dict", "_orig_mod", "net", "ema", "diffusion_model", "vae"]), max_size=3)


@pytest.mark.parametrize("part, keys", [(part, one.keys) for part, signatures in SIGNATURES.items() for one in signatures])
@given(prefix=PREFIXES.map(lambda words: "".join(f"{word}." for word in words)), random=st.randoms(use_true_random=False), data=st.data())
def test_a_part_is_found_under_any_prefix_in_any_order_and_not_without_a_signature(part, keys, prefix, random, data):
    signature, names = keys, [*keys, *(f"{name.rpartition('.')[0]}.bias" for name in keys)]
    others = ["other.weight", "optimizer.lr"] if prefix or part != TRANSFORMER else []  # a transformer without a prefix owns the file
    keys = [*(prefix + name for name in names), *others]
    random.shuffle(keys)
    assert (found := find_part(dict.fromkeys(keys), part)) is not None
    assert found[0] == prefix and found[1].keys() == set(names)
    missing = prefix + data.draw(st.sampled_from(signature))
    assert find_part(dict.fromkeys(key for key in keys if key != missing), part) is None
