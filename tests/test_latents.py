"""Training on cached latents of coloured shapes."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.test_training import autoencoder_yaml, killed, tim_yaml
from tim_core.errors import TimError
from tim_core.processes import Shard
from tim_core.shapes import scenes
from tim_core.shapes.batches import ShapesBatches
from tim_core.shapes.config import SizesConfig
from tim_core.training import run
from tim_core.training.config import read
from tim_core.training.latents import CachedLatents
from tim_core.weights.defaults import read_defaults
from tim_core.weights.load import load_autoencoder
from tim_core.weights.open import open_state_dict
from tim_core.weights.read import read_parts


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return load_autoencoder(run([autoencoder_yaml(tmp_path_factory.mktemp("autoencoder"))])[0], dtype=torch.float32)


def draw(shards=(Shard(),), seed=0):
    return ShapesBatches(SizesConfig({"32x32": 0.5, "32x64": 0.5}), 4, seed, shards)


def test_batches_are_those_of_the_images_and_begin_again(autoencoder, tmp_path):
    drawn = draw()
    cached = CachedLatents(drawn, 3, autoencoder, tmp_path)
    for step in range(6):
        (part,), (images,) = cached[step], drawn[step % 3]
        assert part.captions == images.captions and part.total == images.total
        torch.testing.assert_close(part.latents.float(), autoencoder.encode(images.images).detach(), atol=2e-3, rtol=2e-3)
    assert len(list(tmp_path.iterdir())) == 3


def test_images_are_drawn_and_encoded_once(autoencoder, tmp_path, monkeypatch):
    cached = CachedLatents(draw(), 3, autoencoder, tmp_path)
    first = [cached[step][0].latents for step in range(3)]
    monkeypatch.setattr(ShapesBatches, "__getitem__", lambda *_: pytest.fail("drawn again"))
    monkeypatch.setattr(type(autoencoder), "encode", lambda *_: pytest.fail("encoded again"))
    again = CachedLatents(draw(), 3, autoencoder, tmp_path)
    assert all(torch.equal(again[step][0].latents, one) for step, one in enumerate(first))


def test_shards_are_parts_of_the_whole(autoencoder, tmp_path):
    (whole,) = CachedLatents(draw(), 1, autoencoder, tmp_path)[0]
    for shard in (Shard(0, 2), Shard(1, 2)):
        (part,) = CachedLatents(draw([shard]), 1, autoencoder, tmp_path)[0]
        assert part.captions == whole.captions
        torch.testing.assert_close(part.latents, shard.take(whole.latents), atol=2e-3, rtol=2e-3)
    parts = CachedLatents(draw([Shard(0, 2), Shard(1, 2)]), 1, autoencoder, tmp_path)[0]
    assert [len(part.latents) for part in parts] == [len(whole.captions) // 2] * 2


def test_other_images_or_weights_are_not_taken_from_the_cache(autoencoder, tmp_path):
    first = CachedLatents(draw(), 1, autoencoder, tmp_path)[0][0].latents
    other_images = CachedLatents(draw(seed=1), 1, autoencoder, tmp_path)[0][0].latents
    changed = copy.deepcopy(autoencoder)
    with torch.no_grad():
        next(changed.parameters()).mul_(1.5)
    other_weights = CachedLatents(draw(), 1, changed, tmp_path)[0][0].latents
    assert not torch.equal(first, other_weights) and (first.shape != other_images.shape or not torch.equal(first, other_images))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_changed_renderer_encodes_again(autoencoder, tmp_path, monkeypatch):
    first = CachedLatents(draw(), 1, autoencoder, tmp_path)[0][0].latents
    render = scenes.render
    monkeypatch.setattr(scenes, "render", lambda *arguments: 1 - render(*arguments))
    again = CachedLatents(draw(), 1, autoencoder, tmp_path)[0][0].latents
    assert not torch.equal(first, again) and len(list(tmp_path.iterdir())) == 2


def test_other_captions_encode_again(autoencoder, tmp_path, monkeypatch):
    CachedLatents(draw(), 1, autoencoder, tmp_path)[0]
    captions = ShapesBatches.captions
    monkeypatch.setattr(ShapesBatches, "captions", lambda *arguments: captions(*arguments)[::-1])
    CachedLatents(draw(), 1, autoencoder, tmp_path)[0]
    assert len(list(tmp_path.iterdir())) == 2


def test_whatever_changes_a_batch_changes_its_file(autoencoder, tmp_path):
    def encode(weight=1.0, forms=("single", "two"), relations=("above", "below"), shard=Shard(), batch=4, seed=0, index=0, **more):
        sizes = SizesConfig({"32x32": 1.0, "32x64": weight}, dict.fromkeys(forms, 1.0), relations)
        arguments = {"autoencoder": autoencoder, **more}
        CachedLatents(ShapesBatches(sizes, batch, seed, [shard]), 2, folder=tmp_path, **arguments)[index]

    scaled = copy.deepcopy(autoencoder)
    scaled.config = replace(scaled.config, scaling_factor=0.5)
    changes = [{}, {"weight": 2.0}, {"forms": ("single",)}, {"relations": ("above",)}, {"batch": 8}, {"seed": 1}, {"index": 1}]
    changes += [{"shard": Shard(0, 2)}, {"shard": Shard(1, 2)}, {"autoencoder": scaled}, {"autocast": True}]
    for number, change in enumerate(changes, 1):
        encode(**change)
        assert len(list(tmp_path.iterdir())) == number, change


def test_latents_that_float16_does_not_hold_are_not_cached(autoencoder, tmp_path):
    large = copy.deepcopy(autoencoder)
    with torch.no_grad():
        large.encoder.conv_out.weight.mul_(1e7)
    with pytest.raises(TimError, match="cached_batches.*batch 0.*float16"):
        CachedLatents(draw(), 1, large, tmp_path)[0]
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_encoded_again(autoencoder, tmp_path):
    cached = CachedLatents(draw(), 1, autoencoder, tmp_path)
    whole = cached[0][0].latents
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    assert torch.equal(cached[0][0].latents, whole) and torch.equal(load_file(file)["latents"], whole)


def test_a_run_on_cached_latents_continues_as_if_nothing_happened(tmp_path, monkeypatch):
    run([autoencoder_yaml(tmp_path)])
    whole, resumed = tim_yaml(tmp_path, "adamw"), tim_yaml(tmp_path, "adamw", "killed")
    for path in (whole, resumed):
        path.write_text("cached_batches: 3\n" + path.read_text())
    (made,) = run([whole])
    assert len(list((tmp_path / "tim" / "latents").glob("*.safetensors"))) == 3
    made_for = read_defaults(read_parts(made))
    assert (made_for.width, made_for.height) == (32, 32)
    killed(monkeypatch, resumed, "save", at=4)
    a, b = (open_state_dict(file)[0] for file in (made, run([resumed])[0]))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_an_image_encoder_needs_images(tmp_path):
    path = tim_yaml(tmp_path, "adamw")
    path.write_text("cached_batches: 3\n" + path.read_text().replace("depth: 2,", "depth: 2, z_dim: 6, encoder_depth: 1,"))
    with pytest.raises(TimError, match="cached_batches is 3.*z_dim"):
        read(path)
