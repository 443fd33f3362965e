"""The autoencoder's loss near edges, and the benchmark of what a trained autoencoder loses."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import autoencoder as benchmark
from benchmarks.sharpness import circle_overlaps
from tim_core.errors import TimError
from tim_core.shapes import scenes
from tim_core.training import run
from tim_core.training.autoencoder import crop_error, edge_map, losses, unexplained_colors
from tim_core.training.config import read
from tim_core.training.shapes_config import AutoencoderTraining

SIZE = (96, 64)


class Blur(nn.Module):
    """An autoencoder whose latent is the image, or a box blur of it; a latent far from zero is decoded to black."""

    def __init__(self, side=1):
        super().__init__()
        self.side = side

    def encode(self, images):
        return images

    def decode(self, latent):
        return nn.functional.avg_pool2d(latent, self.side, 1, self.side // 2, count_include_pad=False) if self.side > 1 else latent


def step_image():
    """(1, 3, 16, 16), -1 left of column 8, in the red channel 0.5 from there on."""
    image = torch.full((1, 3, 16, 16), -1.0)
    image[:, 0, :, 8:] = 0.5
    return image


def test_edge_map_is_the_contrast_within_two_pixels():
    found = edge_map(step_image())
    assert found.shape == (1, 1, 16, 16)
    near = torch.zeros(16)
    near[6:10] = 1.5
    torch.testing.assert_close(found[0, 0], near.expand(16, 16))


def test_edge_map_holds_in_both_directions_and_at_borders():
    images = torch.randn(2, 3, 9, 14)
    highest, lowest = (nn.functional.max_pool2d(signed, 5, 1, 2) for signed in (images, -images))
    assert torch.equal(edge_map(images), (highest + lowest).amax(1, keepdim=True))


@pytest.mark.parametrize("column, weight", [(8, 1 + 2 * 1.5), (0, 1)])
def test_edge_weight_counts_errors_near_edges_more(column, weight):
    image = step_image()

    class Wrong(Blur):
        def decode(self, latent):
            error = torch.zeros_like(latent)
            error[..., column] = 0.1
            return latent + error

    config = AutoencoderTraining(output="x", edge_weight=2.0, latent_weight=0.0)
    plain = losses(Wrong(), image, torch.zeros_like(image), AutoencoderTraining(output="x", latent_weight=0.0))
    weighted = losses(Wrong(), image, torch.zeros_like(image), config)
    assert "edge" not in plain
    torch.testing.assert_close(weighted["loss"], plain["loss"] * weight)
    torch.testing.assert_close(weighted["l1"], plain["l1"])


def latents_of_colors(images, channels):
    """(B, channels, H/8, W/8), a random linear map of the mean colours of 2 x 2 pixels."""
    colors = nn.functional.pixel_unshuffle(nn.functional.avg_pool2d(images, 2), 4)
    return nn.functional.conv2d(colors, torch.randn(channels, colors.shape[1], 1, 1) / 7)


def test_colors_are_explained_by_latents_linear_in_them():
    torch.manual_seed(0)
    images = torch.randn(16, 3, 64, 48)
    assert unexplained_colors(latents_of_colors(images, 64), images) < 0.02
    half = unexplained_colors(latents_of_colors(images, 24), images)
    assert 0.4 < half < 0.6
    assert unexplained_colors(torch.randn(16, 24, 8, 6), images) > 0.95
    assert unexplained_colors(torch.randn(2, 8, 8, 6), torch.ones(2, 3, 64, 48)) == 0


def test_unexplained_colors_ignore_offsets_and_the_scale_of_images():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    latents = latents_of_colors(images, 24) + 0.1 * torch.randn(4, 24, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(unexplained_colors(latents, images), unexplained_colors(latents + 3, 0.1 * images + 0.5))


class Fixed(Blur):
    """An autoencoder with given latents, which decodes without error."""

    def __init__(self, images, latents):
        super().__init__()
        self.images, self.latents = images, latents

    def encode(self, images):
        return self.latents

    def decode(self, latent):
        return self.images


def test_color_weight_moves_latents_to_explain_colors():
    torch.manual_seed(0)
    images, config = torch.rand(4, 3, 64, 64) * 2 - 1, AutoencoderTraining(output="x", color_weight=1.0, latent_weight=0.0)
    latents = nn.Parameter(torch.randn(4, 24, 8, 8))
    optimizer = torch.optim.Adam([latents], 0.05)
    found = []
    for _ in range(20):
        found.append(losses(Fixed(images, latents), images, torch.zeros(4, 24, 8, 8), config))
        optimizer.zero_grad()
        found[-1]["loss"].backward()
        optimizer.step()
    assert found[0]["loss"] == found[0]["color"] > 0.8 and found[-1]["color"] < 0.6
    assert "color" not in losses(Fixed(images, latents), images, torch.zeros(4, 24, 8, 8), AutoencoderTraining(output="x"))


def test_colors_that_noise_hides_are_unexplained():
    torch.manual_seed(0)
    images, config = torch.randn(16, 3, 64, 64), AutoencoderTraining(output="x", color_weight=1.0)
    latents = latents_of_colors(images, 64)
    noises = torch.zeros_like(latents), 0.5 * torch.randn_like(latents)
    clear, noised = (float(losses(Fixed(images, latents), images, noise, config)["color"]) for noise in noises)
    assert clear < 0.02 and noised > clear + 0.1


class Averaging(nn.Module):
    """An autoencoder of factor 8 with latents of mean colours, plus `spread` times the mean colour of the whole image."""

    def __init__(self, spread):
        super().__init__()
        self.spread = nn.Parameter(torch.tensor(float(spread)))

    def encode(self, images):
        return nn.functional.avg_pool2d(images, 8) + self.spread * images.mean((2, 3), keepdim=True)

    def decode(self, latent):
        return nn.functional.interpolate(latent, scale_factor=8)


@pytest.mark.parametrize("size", [(8, 8), (40, 24), (64, 64)])
@pytest.mark.parametrize("corner", [(0.0, 0.0), (1.0, 0.0), (0.3, 0.8)])
def test_local_latents_have_no_crop_error(size, corner):
    images = torch.randn(2, 3, *size)
    model = Averaging(0)
    assert crop_error(model, images, model.encode(images), corner) < 1e-12


def test_crop_error_is_what_the_rest_of_the_image_changes():
    images = torch.zeros(1, 3, 32, 32)
    images[..., 16:, 16:] = 1.0  # a quarter of the image, and all of the crop in the corner (1, 1)
    model = Averaging(2)
    found = [crop_error(model, images, model.encode(images), corner) for corner in ((0.0, 0.0), (1.0, 1.0))]
    torch.testing.assert_close(torch.stack(found), torch.tensor([(2 * 0.25) ** 2, (2 * 0.75) ** 2]))


def test_crop_weight_makes_latents_local():
    torch.manual_seed(0)
    images, model = torch.rand(4, 3, 64, 64) * 2 - 1, Averaging(1)
    images[..., :32, 32:] += 1
    config = AutoencoderTraining(output="x", crop_weight=2.0, latent_weight=0.0)
    plain = losses(model, images, torch.zeros(1), AutoencoderTraining(output="x", latent_weight=0.0))
    found = losses(model, images, torch.zeros(1), config, corner=(0.0, 1.0))
    assert "crop" not in plain and found["crop"] == crop_error(model, images, model.encode(images), (0.0, 1.0))
    assert found["crop"] > 2 * crop_error(model, images, model.encode(images), (1.0, 0.0))
    torch.testing.assert_close(found["loss"], plain["loss"] + 2 * found["crop"])
    found["crop"].backward()
    assert model.spread.grad > 0


def test_each_step_draws_its_crop(tmp_path, monkeypatch):
    corners = []

    def spy(model, images, latent, corner):
        corners.append(corner)
        return latent.square().mean()

    monkeypatch.setattr("tim_core.training.autoencoder.crop_error", spy)
    path = tmp_path / "config.yaml"
    path.write_text(f"kind: autoencoder\noutput: {tmp_path}/out\ncrop_weight: 1.0\nlatent_channels: 8\n"
                    "encoder_widths: [8, 8]\nencoder_layers: [0, 1]\ndecoder_widths: [8, 8]\ndecoder_layers: [0, 1]\n"
                    "head_dim: 8\ndata: {sizes: {64x64: 1}}\n"
                    "loop: {steps: 3, batch: 2, workers: 0, warmup: 1}\n")
    run([path])
    assert len(set(corners)) == 3 and all(0 <= place <= 1 for corner in corners for place in corner)


@pytest.mark.parametrize("variances, expected", [((2, 0), 0), ((1, 1), 0), ((2, 2), 1), ((0.5, 0.5), 0.25)])
def test_the_prior_is_variance_1_on_average(variances, expected):
    values = torch.tensor([-1.0, 1.0]).repeat(500).view(1, 1, 50, 20)
    latents = torch.cat([values * variance**0.5 for variance in variances], 1)
    images, config = torch.zeros(1, 3, 8, 8), AutoencoderTraining(output="x")
    assert float(losses(Fixed(images, latents), images, torch.zeros(1), config)["prior"]) == pytest.approx(expected, abs=0.01)
    shifted = losses(Fixed(images, latents + 1), images, torch.zeros(1), config)["prior"]
    assert float(shifted) == pytest.approx(expected + 1, abs=0.01)


def test_negative_edge_weight_names_the_key(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("kind: autoencoder\noutput: x\nedge_weight: -1\n")
    with pytest.raises(TimError, match="edge_weight.*-1"):
        read(path)


def test_lossless_autoencoder_passes_the_bar():
    found, rows = benchmark.measure(Blur(), SIZE, n=4, noise=0.0, seed=1)
    assert found["clean"] == found["noised"] == {"mean": 1.0, "stderr": 0.0, "tasks": dict.fromkeys(scenes.TASKS, 1.0)}
    assert found["edge_width"]["ratio"] == pytest.approx(1, abs=1e-3)
    circle = found["circle_overlap"]
    assert circle["n_truth"] == circle["n_reconstructed"] > 4
    assert circle["reconstructed"] == pytest.approx(circle["truth"], abs=1e-4) and circle["truth"] > 0.96
    assert found["colors_explained"] == pytest.approx(1, abs=0.01) and found["background_variance_ratio"] == pytest.approx(0, abs=1e-4)
    assert found["crop_error"] == 0
    assert benchmark.failures({"96x64": found}) == []
    assert [row.shape for row in rows] == [(12, 64, 96, 3)] * 3


def test_latents_that_vary_over_plain_background_are_seen():
    images = torch.from_numpy(np.stack([image for _, image in benchmark.truth("two", 4, 1, SIZE)])).permute(0, 3, 1, 2) * 2 - 1
    colors, plain = nn.functional.avg_pool2d(images, 2), benchmark.background(images, (8, 12))
    latents = nn.functional.avg_pool2d(colors, 4)
    position = torch.linspace(-5, 5, 12).expand_as(latents[:, :1])
    local, varying = (benchmark.locality(found, colors, plain) for found in (latents, torch.cat((latents, position), 1)))
    assert local["background_variance_ratio"] == pytest.approx(0, abs=1e-4) and varying["background_variance_ratio"] > 0.5
    assert varying["colors_explained"] == pytest.approx(local["colors_explained"], abs=0.05)


def test_blurred_edges_and_noise_fail_the_bar():
    blurred, _ = benchmark.measure(Blur(5), SIZE, n=2, noise=0.0, seed=1)
    assert blurred["edge_width"]["ratio"] > 2
    assert any("edges" in line for line in benchmark.failures({"96x64": blurred}))
    noised, _ = benchmark.measure(Blur(), SIZE, n=2, noise=1.0, seed=1)
    assert noised["clean"]["mean"] == 1 and noised["noised"]["mean"] < 0.5
    assert [line for line in benchmark.failures({"96x64": noised}) if "noised" in line]


def test_latents_that_depend_on_the_whole_image_have_a_crop_error():
    class Spread(Blur):
        def encode(self, images):
            return images - images.mean((2, 3), keepdim=True)

        def decode(self, latent):
            return latent

    class Scaled(Spread):
        def encode(self, images):
            return 10 * super().encode(images)

    found, scaled = (benchmark.measure(model, SIZE, n=1, noise=0.0, seed=1)[0]["crop_error"] for model in (Spread(), Scaled()))
    assert 0.01 < found < 1 and scaled == pytest.approx(found, rel=1e-4)


def test_overlap_of_a_lumpy_circle_is_smaller():
    circle = scenes.Placed("circle", "blue", 32.3, 31.6, 15.2)
    image = scenes.render([circle], 64, 64)
    lumpy = image.copy()
    angle = np.arctan2(np.arange(64)[:, None] + 0.5 - circle.y, np.arange(64) + 0.5 - circle.x)
    distance = np.hypot(np.arange(64) + 0.5 - circle.x, np.arange(64)[:, None] + 0.5 - circle.y)
    lumpy[(np.cos(8 * angle) < 0) & (distance > 13.5)] = np.array(scenes.BACKGROUND) / 255
    (perfect,), (worse,) = circle_overlaps(image), circle_overlaps(lumpy)
    assert perfect > 0.97 and worse < perfect - 0.04
    assert circle_overlaps(scenes.render([scenes.Placed("square", "blue", 32, 32, 15)], 64, 64)) == []


def test_standard_error_is_that_of_the_mean_over_tasks():
    correct = {"a": [True] * 8, "b": [True, False] * 4}
    assert benchmark.accuracy(correct) == {"mean": 0.75, "stderr": pytest.approx((0.25 / 8) ** 0.5 / 2), "tasks": {"a": 1.0, "b": 0.5}}


def test_benchmark_runs_on_the_bundled_model(tmp_path, monkeypatch, capsys):
    report, sheet = tmp_path / "report.json", tmp_path / "sheet.png"
    monkeypatch.setattr(sys, "argv", ["autoencoder.py", "--sizes", "128x128", "--n", "2", "--json", str(report), "--sheet", str(sheet)])
    benchmark.main()
    found = json.loads(report.read_text())
    assert found["sizes"]["128x128"]["clean"]["mean"] > 0.9 and "128x128" in capsys.readouterr().out
    assert found["seed"] == 123 and found["noise"] == 0.2 and sheet.stat().st_size > 1000
