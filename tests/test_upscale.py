"""Upscaling: sizes and steps of the stages, enlarging, the stages in a row, the command line."""

import pytest
import torch

from tim_core import Pipeline
from tim_core.cli import main
from tim_core.errors import TimError
from tim_core.images import to_pil
from tim_core.upscale import (
    RESIZE_METHODS,
    crop_mask,
    enlarge,
    in_tiles,
    paste,
    stage_sizes,
    stage_steps,
    target_size,
    tile_starts,
    upscale,
)


@pytest.fixture(scope="module")
def pipe(tiny):
    return Pipeline.load(tiny, device="cpu")


@pytest.mark.parametrize("asked, size", [
    (dict(), (128, 96)), (dict(factor=1.5), (96, 72)), (dict(new_width=256), (256, 192)), (dict(new_height=96), (128, 96)),
    (dict(new_width=100, new_height=100), (100, 100)),
])
def test_target_size(asked, size):
    assert target_size(64, 48, **asked) == size


def test_stages_enlarge_by_equal_factors():
    assert stage_sizes((1024, 1024), (4096, 4096), 2, 32) == [(2048, 2048), (4096, 4096)]
    assert stage_sizes((64, 32), (512, 256), 3, 8) == [(128, 64), (256, 128), (512, 256)]
    assert stage_sizes((64, 64), (128, 128), 1, 8) == [(128, 128)]
    assert stage_sizes((100, 60), (250, 150), 2, 32)[-1] == (256, 160)


@pytest.mark.parametrize("steps, stages, counts", [
    (4, 1, [4]), (4, 3, [4, 4, 4]), ("8, 4", 2, [8, 4]), ([2, 1], 2, [2, 1]), ("5", 2, [5, 5]), ("8;8", 2, [8, 8]),
    ("4-8 x2", 2, [4, 8]),
])
def test_steps_of_the_stages(steps, stages, counts):
    assert stage_steps(steps, stages) == counts


@pytest.mark.parametrize("call, named", [
    (lambda: stage_steps("4, 4", 3), "steps: '4, 4' .* 3 of them"), (lambda: stage_steps("0", 1), "steps: 0 "),
    (lambda: stage_steps("four", 1), "steps: 'four'"), (lambda: stage_steps("", 1), "steps: ''"),
    (lambda: stage_steps("\u0663", 1), "steps: '\u0663'"), (lambda: stage_steps("5000", 3), "steps: 15000 .* at most 10000"),
    (lambda: stage_steps([2.5], 1), "steps: 2.5 "), (lambda: stage_steps("4, 4", 1), "steps: '4, 4' .* stages"),
    (lambda: stage_sizes((64, 64), (128, 128), 0, 8), "stages: 0 .* 1 to 8"),
    (lambda: stage_sizes((64, 64), (128, 128), 9, 8), "stages: 9"),
    (lambda: stage_sizes((1, 1), (0, 4), 1, 8), "size: 0x4 .* 8x8"), (lambda: target_size(64, 64, factor=float("nan")), "factor: nan"),
    (lambda: target_size(64, 64, factor=0.0), "factor: 0.0"), (lambda: target_size(64, 64, -1), "width: -1"),
    (lambda: target_size(64, 64, factor=0.4), "factor: 0.4 .* 0.5"), (lambda: target_size(65, 48, 32, 48), "size: 32x48 .* 65x48.* 33x24"),
    (lambda: enlarge(torch.rand(1, 4, 4, 3), 8, 8, "box"), "resize_method: 'box' .* lanczos"),
])
def test_unusable_values_are_named(call, named):
    with pytest.raises(TimError, match=named):
        call()


def test_enlarging_keeps_colours_and_cuts_evenly():
    ramp = torch.linspace(0, 1, 64).view(1, 1, 64, 1).expand(1, 32, 64, 3)
    assert torch.allclose(enlarge(ramp, 128, 64)[0, 10, ::2, 0], ramp[0, 0, :, 0], atol=0.02)
    square = enlarge(ramp, 64, 64)  # half of the width is left over: a quarter goes at each end
    assert square.shape == (1, 64, 64, 3)
    assert square[0, 32, 0, 0] == pytest.approx(0.25, abs=0.02) and square[0, 32, -1, 0] == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("method", RESIZE_METHODS)
def test_every_method_keeps_a_plain_colour_and_the_size(method):
    image = torch.tensor([0.2, 0.4, 0.6]).expand(2, 20, 30, 3)
    for size in ((60, 40), (64, 64), (24, 48)):
        large = enlarge(image, *size, method)
        assert large.shape == (2, size[1], size[0], 3) and (large - image[:1, :1, :1]).abs().max() < 1 / 255


def test_a_mask_pastes_what_is_redrawn():
    mask = torch.zeros(1, 4, 4)
    mask[..., 2:] = 1
    images, _ = upscale(
        torch.zeros(1, 8, 8, 3), [(16, 16), (32, 32)], [1, 1], 0.5, encode=lambda x: x, sample=lambda x, *_: x, mask=mask,
        decode=torch.ones_like)
    assert images.shape == (1, 32, 32, 3) and images[:, :, :8].abs().max() == 0 and images[:, :, 24:].min() == 1
    below, above = torch.zeros(1, 8, 8, 3), torch.ones(1, 8, 8, 3)
    assert torch.equal(paste(below, above, torch.full((1, 2, 2), 0.25)), torch.full((1, 8, 8, 3), 0.25))
    assert crop_mask(torch.ones(1, 64, 32), (32, 64), 64, 64).shape == (1, 32, 32)  # as the image is cropped


def test_a_mask_of_another_shape_is_stretched_over_the_image():
    rows = torch.arange(12).view(1, 12, 1).expand(1, 12, 8)
    assert torch.equal(crop_mask(rows, (96, 48), 192, 96), rows)  # the whole image is kept
    assert crop_mask(rows, (96, 48), 192, 48)[0, :, 0].tolist() == list(range(3, 9))  # the middle half of its height
    assert crop_mask(rows, (96, 48), 24, 48).shape == (1, 12, 2)
    assert crop_mask(torch.ones(1, 1, 1), (96, 48), 96, 8).shape == (1, 1, 1)


@pytest.mark.parametrize("images, masks, used", [(1, 2, [0]), (2, 1, [0, 0]), (3, 2, [0, 1, 0]), (2, 3, [0, 1])])
def test_images_take_the_masks_of_a_batch_in_turn(images, masks, used):
    mask = torch.linspace(0.25, 0.75, masks).view(-1, 1, 1).expand(masks, 4, 4)
    made, _ = upscale(torch.zeros(images, 8, 8, 3), [(16, 16)], [1], 0.5, encode=lambda x: x, sample=lambda x, *_: x, mask=mask,
                      decode=torch.ones_like)
    assert torch.equal(made[:, 0, 0, 0], mask[used, 0, 0]) and made.shape == (images, 16, 16, 3)


def test_tiles_cover_the_image_evenly():
    for length, tile, overlap in ((16, 8, 2), (17, 8, 2), (100, 8, 2), (9, 8, 2), (8, 8, 2), (5, 8, 2), (12, 2, 1)):
        starts = tile_starts(length, tile, overlap)
        ends = [start + min(tile, length) for start in starts]
        assert starts[0] == 0 and ends[-1] == length
        assert all(overlap <= end - start < tile for start, end in zip(starts[1:], ends))


def test_tiles_are_blended():
    x = torch.randn(2, 3, 17, 30)
    assert torch.allclose(in_tiles(lambda part: 2 * part, x, 8), 2 * x, atol=1e-6)
    assert in_tiles(lambda part: part.half(), x, 8).dtype == x.dtype
    seen = []
    in_tiles(lambda part: seen.append(part.shape[2:]) or part, x, 8)
    assert set(seen) == {(8, 8)} and len(seen) == 3 * 5
    left, right = torch.zeros(1, 1, 8, 14), torch.zeros(1, 1, 8, 14)
    values = iter((1.0, 0.0))
    ramp = in_tiles(lambda part: torch.full_like(part, next(values)), left + right, 8)[0, 0, 0]
    assert ramp[:6].min() == 1 and ramp[8:].max() == 0 and 1 > ramp[6] > ramp[7] > 0
    assert in_tiles(lambda part: part.sum(dim=(2, 3), keepdim=True).expand_as(part), x, 64).shape == x.shape  # one tile is the whole


def test_every_stage_sees_its_own_size_and_times():
    seen = []

    def sample(latents, times, stage):
        seen.append((stage, tuple(latents.shape), times.tolist()))
        return latents

    images, latents = upscale(
        torch.rand(2, 8, 8, 3), [(16, 8), (32, 16)], [1, 2], 0.5, encode=lambda x: x.movedim(-1, 1), sample=sample,
        decode=lambda x: x.movedim(1, -1))
    assert seen == [(0, (2, 3, 8, 16), [0.5, 0.0]), (1, (2, 3, 16, 32), [0.5, 0.25, 0.0])]
    assert images.shape == (2, 16, 32, 3) and torch.equal(images, latents.movedim(1, -1))


def test_pipeline_counts_the_evaluations_of_all_stages(pipe):
    images = pipe(["a red circle", "a square"], steps=1)
    large = pipe.upscale(images, ["a red circle", "a square"], width=96, steps="2, 3", stages=2)
    assert large.shape == (2, 96, 96, 3) and large.isfinite().all() and pipe.nfe == 10
    assert pipe.upscale(images[:1], "a red circle", steps=3, strength=1.0, cfg=1.0).shape == (1, 128, 128, 3) and pipe.nfe == 3


def test_all_steps_run_whatever_the_strength(pipe):
    times = []
    pipe.upscale(pipe("a circle", steps=1), "a circle", steps=4, strength=0.2, callback=lambda state: times.append(float(state["sigma"])))
    assert times == pytest.approx([0.2, 0.15, 0.1, 0.05])


def test_a_low_strength_keeps_the_image():
    """On the bundled model, whose autoencoder is a real one."""
    pipe = Pipeline.load("tim-shapes", device="cpu")
    image = pipe("a red circle", steps=8)
    plain = enlarge(image, 128, 128)
    little, much = (pipe.upscale(image, "a red circle", steps=4, strength=s) for s in (0.1, 0.95))
    assert (little - plain).abs().mean() < 0.03 and (little - plain).abs().mean() < (much - plain).abs().mean()


@pytest.mark.parametrize("options, named", [
    (dict(strength=0.0), "strength: 0.0"), (dict(strength=1.5), "strength: 1.5"), (dict(prompts=["a", "b"]), "prompts: 2 for 1 images"),
    (dict(prompts=None), "prompt: None is not text"),
    (dict(steps="2, 2"), "steps: '2, 2'"), (dict(images=torch.zeros(8, 8, 3)), r"images: shape \[8, 8, 3\]"), (dict(cfg=-1.0), "cfg: -1 "),
    (dict(images=torch.full((1, 16, 16, 3), 200.0)), "images: .* 200"),
    (dict(images=torch.full((1, 16, 16, 3), 1, dtype=torch.uint8)), "images: .*uint8"),
    (dict(images=torch.full((1, 16, 16, 3), torch.nan)), "images: .*nan"),
])
def test_pipeline_refuses(pipe, options, named):
    settings = dict(images=torch.rand(1, 64, 64, 3), prompts="a circle") | options
    with pytest.raises(TimError, match=named):
        pipe.upscale(**settings)


def test_command_line(tiny, tmp_path, capsys):
    to_pil(torch.rand(32, 48, 3)).save(tmp_path / "small.png")
    command = ["upscale", str(tmp_path / "small.png"), "a circle", "--model", str(tiny), "--device", "cpu"]
    assert main([*command, "--factor", "2", "--steps", "2,1", "--stages", "2", "-o", str(tmp_path / "large.png")]) == 0
    assert "96x64, 6 NFE" in capsys.readouterr().out
    assert main([*command, "--size", "50x40", "--steps", "1", "-o", str(tmp_path / "odd.png")]) == 0
    assert "48x40 (asked for 50x40; sides are multiples of 8), 2 NFE" in capsys.readouterr().out
    from PIL import Image

    assert Image.open(tmp_path / "large.png").size == (96, 64)
    turned = Image.new("RGB", (40, 16))
    turned.save(tmp_path / "phone.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    assert main(["upscale", str(tmp_path / "phone.jpg"), *command[2:], "--steps", "1", "-o", str(tmp_path / "upright.png")]) == 0
    assert Image.open(tmp_path / "upright.png").size == (32, 80)
    (tmp_path / "text.png").write_text("no picture")
    for bad in ("nothing.png", "text.png"):
        assert main(["upscale", str(tmp_path / bad), "a circle", "-o", str(tmp_path / "out.png")]) == 1
        assert bad in capsys.readouterr().err and not (tmp_path / "out.png").exists()
    assert main([*command, "--stages", "0", "-o", str(tmp_path / "out.png")]) == 1
    assert "stages: 0" in capsys.readouterr().err
