"""REPA with an image encoder that the caller passes in, in both trainers."""

import csv

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.test_finetune import draw, yaml
from tests.test_training import autoencoder_yaml, tim_yaml
from tim_core.errors import TimError
from tim_core.training import run


def colors(images):
    """(B, 3, H, W) -> the mean colour of every 8 x 8 cell and its square, (B, N, 6)."""
    cells = F.avg_pool2d(images, 8).flatten(2).transpose(1, 2)
    return torch.cat((cells, cells.square()), -1)


colors.name = "colours"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model with a projector, trained for six steps."""
    folder = tmp_path_factory.mktemp("repa")
    config = tim_yaml(folder, "adamw", "repa")
    config.write_text(config.read_text().replace("depth: 2,", "depth: 2, z_dim: 6, encoder_depth: 1, projector_dim: 16,"))
    _, made = run([autoencoder_yaml(folder), config], image_encoder=colors)
    return folder, config, made


def test_the_projector_learns_from_the_encoder(trained):
    folder, config, made = trained
    plain = config.with_name("plain.yaml")
    plain.write_text(config.read_text().replace(f"{folder}/repa", f"{folder}/plain"))
    (without,) = run([plain])  # the projector is there and has nothing to learn from
    name = "model.diffusion_model.projector.4.weight"
    assert not torch.equal(load_file(made)[name], load_file(without)[name])
    losses = [[float(row["loss"]) for row in csv.DictReader((folder / place / "metrics.csv").open())] for place in ("repa", "plain")]
    assert all(0.3 < more - less < 2 for more, less in zip(*losses))  # 1 - cosine, added


def test_fine_tuning_keeps_the_features_in_the_cache(trained, tmp_path):
    for k in range(3):
        draw(tmp_path / "images" / f"{k}.png", 32, 32, (60 * k, 200, 40))
    seen = []

    def encoder(images):
        seen.append(images.shape)
        return colors(images)

    with pytest.raises(TimError, match="name"):
        run([yaml(tmp_path, trained[2], tmp_path / "images")], image_encoder=encoder)
    encoder.name = "colours"
    run([yaml(tmp_path, trained[2], tmp_path / "images")], image_encoder=encoder)
    assert seen == [(3, 3, 32, 32)]
    kept = [load_file(file) for file in (tmp_path / "images.cache").iterdir()]
    assert [tensors["features"].shape for tensors in kept] == [(16, 6)] * 3
    run([yaml(tmp_path, trained[2], tmp_path / "images", "again")], image_encoder=encoder)
    assert len(seen) == 1
    encoder.name = "another"
    run([yaml(tmp_path, trained[2], tmp_path / "images", "other")], image_encoder=encoder)
    assert len(seen) == 2


def test_an_encoder_that_does_not_fit_is_an_error(trained, tiny, tmp_path):
    folder, config, made = trained
    draw(tmp_path / "images" / "0.png", 32, 32)
    with pytest.raises(TimError, match="the transformer has no projector"):
        run([yaml(tmp_path, tiny, tmp_path / "images")], image_encoder=colors)
    for wrong, found in ((lambda images: colors(images)[:, :4], "1, 4, 6"), (lambda images: colors(images)[..., :1], "1, 16, 1")):
        wrong.name = found
        with pytest.raises(TimError, match=rf"features \[{found}\].*of shape \[1, 16, 6\]"):
            run([yaml(tmp_path, made, tmp_path / "images")], image_encoder=wrong)
    with pytest.raises(TimError, match="proj_coeff"):
        run([yaml(tmp_path, made, tmp_path / "images", more="objective: {proj_coeff: 0.5}\n")])
