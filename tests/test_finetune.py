"""Fine-tuning: folders of images, their cache, and LoRAs."""

import csv
import gc
import itertools
import json
import logging
import math
import os
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import hostile
from tests.comfy_graph import BUNDLED_NAME, Graph, run_images
from tests.support import load_all, mentions
from tim_core.errors import TimError
from tim_core.images import to_pil
from tim_core.models.autoencoder import Autoencoder
from tim_core.models.config import AutoencoderConfig, StageConfig, TransformerConfig
from tim_core.models.transformer import TransitionTransformer
from tim_core.processes import ALONE, Processes, Shard
from tim_core.shapes import detector, scenes
from tim_core.training import cached_files, finetune, loop, run
from tim_core.training import folder as image_folder
from tim_core.training.config import FineTuning, FolderConfig, LoraConfig
from tim_core.training.config import read as read_config
from tim_core.training.finetune import padded, read_sources
from tim_core.training.folder import Item, native_size, scan
from tim_core.training.lora import LoraLinear, add_lora
from tim_core.weights.describe import describe
from tim_core.weights.load import load_transformer
from tim_core.weights.parts import AUTOENCODER, TEXT_ENCODER, TRANSFORMER
from tim_core.weights.read import read_parts
from tim_core.weights.save import pack


def draw(file, width, height, color=(200, 40, 40), caption="a red circle"):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), color, np.uint8)).save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption + "\n")


@pytest.fixture
def data(tmp_path):
    """Five images of three native sizes, two broken ones, one too small, and one without a caption."""
    place = tmp_path / "images"
    for k, (width, height) in enumerate([(64, 64), (64, 64), (70, 66), (96, 64), (64, 100)]):
        draw(place / f"{k}.png", width, height, caption=f"a circle {k}")
    (place / "broken.png").write_bytes((place / "0.png").read_bytes()[:80])
    (place / "broken.txt").write_text("broken")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(place / "cut.jpg")
    (place / "cut.jpg").write_bytes((place / "cut.jpg").read_bytes()[:1500])  # its head is whole
    (place / "cut.txt").write_text("cut")
    draw(place / "tiny.png", 6, 64, caption="tiny")
    draw(place / "words.png", 64, 64)
    (place / "words.txt").write_bytes("caf\u00e9".encode("latin-1"))
    draw(place / "silent.png", 64, 64, caption=None)
    return place


def yaml(tmp_path, model, data, name="tuned", more="", loop=""):
    path = tmp_path / f"{name}.yaml"
    path.write_text(
        f"kind: finetune\noutput: {tmp_path / name}\nmodel: {model}\ndata: {{path: {data}, base_pixels: 4096}}\nshift_base: 64\n{more}"
        f"loop: {{steps: 4, batch: 4, save_every: 2, log_every: 1, workers: 0, warmup: 1, autocast: false{loop}}}\n")
    return path


def sources(**settings) -> FineTuning:
    return FineTuning(output="x", data=FolderConfig("images"), **{name: str(value) for name, value in settings.items()})


def coder(channels=16, stages=4) -> Autoencoder:
    layers = (*[StageConfig(8, 1)] * (stages - 2), StageConfig(16, 1), StageConfig(16, 1, "EfficientViTBlock", (5,)))
    return Autoencoder(AutoencoderConfig(layers, layers, latent_channels=channels, head_dim=8))


@pytest.fixture
def parts_folder(tmp_path, tiny):
    """A folder of parts: transformer, text_encoder, vae."""
    for folder, kind in (("transformer", TRANSFORMER), ("text_encoder", TEXT_ENCODER), ("vae", AUTOENCODER)):
        (tmp_path / "parts" / folder).mkdir(parents=True)
        parts = read_parts(tiny)
        parts.parts = {kind: parts[kind]}
        pack(parts, tmp_path / "parts" / folder / "model.safetensors")
    return tmp_path / "parts"


@pytest.mark.parametrize("given", [{"text_encoder"}, {"autoencoder"}, {"text_encoder", "autoencoder"}, set()])
def test_other_parts_take_the_place_of_those_in_model(tiny, parts_folder, given):
    """The rest is the model's own, from one file and from a folder of parts."""
    other = {"text_encoder": tiny, "autoencoder": parts_folder / "vae"}
    for model in (tiny, parts_folder):
        parts = read_sources(sources(model=model, **{name: other[name] for name in given}))
        assert set(parts.parts) == {TRANSFORMER, TEXT_ENCODER, AUTOENCODER} and parts.latent_factor == 8 and parts.escape is False
        for kind, key in ((TEXT_ENCODER, "text_encoder"), (AUTOENCODER, "autoencoder")):
            assert parts[kind].source.startswith(str(other[key] if key in given else model))


def test_a_folder_of_parts_is_trained(tmp_path, parts_folder, data):
    (made,) = run([yaml(tmp_path, parts_folder, data)])
    assert read_parts(made).latent_factor == 8 and read_parts(made)[TRANSFORMER].config.in_channels == 16


@pytest.mark.parametrize("other, named", [
    (coder(channels=8), ("8", "latent channels", "16")), (coder(stages=3), ("latent_factor", "8", "4")),
], ids=["channels", "factor"])
def test_parts_that_do_not_fit_are_an_error(tmp_path, tiny, data, other, named):
    vae = pack({"vae": other}, tmp_path / "other.safetensors")
    with pytest.raises(TimError) as error:
        run([yaml(tmp_path, tiny, data, more=f"autoencoder: {vae}\n")])
    assert mentions(str(error.value), "autoencoder") and all(mentions(str(error.value), word) for word in named)
    assert not (tmp_path / "images.cache").exists()


def test_a_missing_part_is_named_with_its_key(parts_folder, tiny):
    for given, key in (({"autoencoder": tiny}, "text_encoder"), ({"text_encoder": tiny}, "autoencoder")):
        with pytest.raises(TimError) as error:
            read_sources(sources(model=parts_folder / "transformer", **given))
        assert mentions(str(error.value), "model", "has no", f"set {key}")


def test_native_sizes():
    assert native_size(1025, 513, 32, 4096**2) == (1024, 512)  # the paper's example
    assert native_size(64, 64, 8, 4096) == (64, 64)
    assert native_size(2048, 1024, 32, 1024**2) == (1440, 704)
    assert native_size(31, 500, 32, 1024**2) == (0, 0)


def test_folders_and_lists(tmp_path, data, caplog):
    found = scan(FolderConfig(str(data)), labels=False)
    assert [item.file.name for item in found] == [*(f"{k}.png" for k in range(5)), "broken.png", "cut.jpg", "tiny.png", "words.png"]
    assert found[0].caption_or_label == "a circle 0" and "1 image without a .txt caption" in caplog.text and "silent.png" in caplog.text
    listed = tmp_path / "list.jsonl"
    listed.write_text("\n".join(json.dumps({"image": f"images/{k}.png", "caption": f"number {k}"}) for k in (3, 1)) + "\n\n")
    found = scan(FolderConfig(str(listed)), False)
    assert [(item.file, item.caption_or_label) for item in found] == [(data / "3.png", "number 3"), (data / "1.png", "number 1")]
    for line, labels in (('{"image": "x.png"}', False), ("[]", False), ('{"image": "x.png", "label": "dog"}', True), ("no", False)):
        listed.write_text(line)
        with pytest.raises(TimError, match="line 1"):
            scan(FolderConfig(str(listed)), labels)
    with pytest.raises(TimError, match="nowhere"):
        scan(FolderConfig(str(tmp_path / "nowhere")), False)


def test_folders_of_classes(tmp_path, caplog):
    for name in ("dog", "cat"):
        draw(tmp_path / name / "a.png", 32, 32, caption=None)
    found = scan(FolderConfig(str(tmp_path)), labels=True)
    assert [(item.file.parent.name, item.caption_or_label) for item in found] == [("cat", 0), ("dog", 1)]
    (tmp_path / "bird").mkdir()
    draw(tmp_path / "cat" / "more" / "b.png", 32, 32, caption=None)
    assert [item.caption_or_label for item in scan(FolderConfig(str(tmp_path)), labels=True)] == [1, 1, 2]
    assert "1 class folders have no images" in caplog.text and "bird" in caplog.text
    inside = FolderConfig(str(tmp_path), cache=str(tmp_path / "a cache"))
    (tmp_path / "a cache").mkdir()
    assert [item.caption_or_label for item in scan(inside, labels=True)] == [1, 1, 2]
    (tmp_path / "a cache").rmdir()
    draw(tmp_path / "cover.png", 32, 32, caption=None)
    with pytest.raises(TimError, match="cover.png is in no class folder"):
        scan(FolderConfig(str(tmp_path)), labels=True)
    with pytest.raises(TimError, match="bird: no class folders"):
        scan(FolderConfig(str(tmp_path / "bird")), labels=True)


def test_captions_of_other_editors(tmp_path):
    for name, data in (("a", b"\xef\xbb\xbfa red circle"), ("b", "caf\u00e9".encode("latin-1"))):
        draw(tmp_path / f"{name}.png", 32, 32)
        (tmp_path / f"{name}.txt").write_bytes(data)
    first, second = scan(FolderConfig(str(tmp_path)), labels=False)
    assert first.caption_or_label == "a red circle" and not first.problem and "b.txt: not UTF-8" in second.problem


def test_16_bit_and_transparent_images(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    clear = np.zeros((64, 64, 4), np.uint8)
    clear[..., 1], clear[:32, :, 3] = 200, 255  # green, its lower half invisible
    Image.fromarray(clear).save(tmp_path / "clear.png")
    deep, half = (image_folder.load_image(Item(tmp_path / f"{name}.png", "", 64, 64)) for name in ("deep", "clear"))
    assert deep[:, 0, 0].tolist() == [-1] * 3 and deep[:, 0, -1].tolist() == [1] * 3 and abs(deep.mean()) < 0.02
    assert half[:, -1, 0].tolist() == [1] * 3 and half[:, 0, 0].tolist() == pytest.approx([-1, 200 / 127.5 - 1, -1])


def test_the_decoder_is_that_of_every_other_image(tmp_path):
    """12-bit and float grey as their 8-bit versions, files of every listed ending, upright by their EXIF orientation."""
    grey = np.add.outer(np.arange(32), 3 * np.arange(64)).astype(np.uint8)
    (tmp_path / "deep.pgm").write_bytes(b"P5\n64 32\n4095\n" + np.rint(grey / 255 * 4095).astype(">u2").tobytes())
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "float.tif")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(grey)).save(tmp_path / "turned.png", exif=exif)
    for name in ("deep", "float", "turned"):
        (tmp_path / f"{name}.txt").write_text(name)
    encode = image_folder.Encoder(
        tmp_path / "cache", "", lambda images: {"latent": images}, lambda captions: [torch.zeros(2, 1)] * len(captions))
    items = image_folder.prepare(FolderConfig(str(tmp_path)), encode, 8, False, ALONE)
    assert [(item.file.name, item.width, item.height) for item in items] == [
        ("deep.pgm", 64, 32), ("float.tif", 64, 32), ("turned.png", 64, 32)]
    for item in items:
        latent = load_file(encode.cache_path(item))["latent"]
        assert (latent - (torch.from_numpy(grey).float() / 127.5 - 1)).abs().max() <= 1.01 / 127.5, item.file.name


@pytest.mark.skipif(os.name == "nt", reason="needs files that are not regular")
def test_harmful_files_in_a_folder_are_skipped(tmp_path, caplog):
    """They neither block nor grow, and nothing runs Ghostscript; each is named once."""
    place, marker = tmp_path / "images", tmp_path / "ran"
    draw(place / "good.png", 64, 64)
    (place / "bomb.png").write_bytes(hostile.png_bomb())
    (place / "script.png").write_bytes(hostile.postscript(marker))
    held = [hostile.special_file(kind, place / f"{kind}.png") for kind in ("FIFO", "device")]
    for name in ("bomb", "script", "FIFO", "device"):
        (place / f"{name}.txt").write_text(name)
    draw(place / "long.png", 64, 64, caption="x" * 100_000)
    for kind in ("FIFO", "device"):
        draw(place / f"caption-{kind}.png", 64, 64, caption=None)
        held.append(hostile.special_file(kind, place / f"caption-{kind}.txt"))
    encode = image_folder.Encoder(
        tmp_path / "cache", "", lambda images: {"latent": images[:, :1]}, lambda captions: [torch.zeros(2, 1)] * len(captions))
    items = image_folder.prepare(FolderConfig(str(place)), encode, 8, False, ALONE)
    assert [item.file.name for item in items] == ["good.png"] and not marker.exists()
    for name in ("bomb.png", "script.png", "FIFO.png", "device.png", "long.txt", "caption-FIFO.txt", "caption-device.txt"):
        assert sum(f"/{name}" in record.getMessage() for record in caplog.records) == 1, name


def test_a_list_that_harms_is_one_line(tmp_path):
    listed = tmp_path / "list.jsonl"
    listed.write_text(hostile.deep_json())
    with pytest.raises(TimError, match="list.jsonl: line 1"):
        scan(FolderConfig(str(listed)), False)
    if os.name != "nt":
        hostile.special_file("FIFO", tmp_path / "pipe.jsonl")
        with pytest.raises(TimError, match="pipe.jsonl: not a regular file"):
            scan(FolderConfig(str(tmp_path / "pipe.jsonl")), False)


def test_rare_sizes_join_similar_ones(tmp_path):
    sizes = [(1024, 1024)] * 3 + [(992, 1056), (1056, 992), (1024, 960)] + [(1440, 704)] * 2 + [(512, 512)] * 9
    found = image_folder.similar_sizes([Item(tmp_path / "x", "", *size) for size in sizes], min_bucket_size=4)
    assert [(item.width, item.height) for item in found] == [(1024, 1024)] * 6 + [(1440, 704)] * 2 + [(512, 512)] * 9
    assert image_folder.similar_sizes(found, min_bucket_size=1) == found
    sizes = [(1024, 1024)] * 100 + [(896, 1120), (800, 1088)]  # the two are similar, but too few together
    found = image_folder.similar_sizes([Item(tmp_path / "x", "", *size) for size in sizes], min_bucket_size=4)
    assert (found[100].width, found[100].height) == (1024, 1024)


def test_prompts_are_padded_with_their_own_pad_row():
    rows = [torch.arange(2.0)[:, None], torch.arange(10.0, 14)[:, None]]  # the last of each is its pad row
    null = torch.tensor([[7.0], [8.0]])
    assert padded(rows, null, [False, False], 3)[..., 0].tolist() == [[0, 1, 1], [10, 11, 12]]
    assert padded(rows, null, [False, True], 1)[..., 0].tolist() == [[0], [7]]


def test_training_on_a_folder_names_each_unreadable_image_once(tmp_path, tiny, data, caplog):
    config = yaml(tmp_path, tiny, data)
    with caplog.at_level(logging.WARNING):
        (made,) = run([config])
    for name in ("broken.png", "cut.jpg", "tiny.png", "words.txt"):
        assert sum(name in record.getMessage() for record in caplog.records) == 1
    assert "skipped 4 of 9 images" in caplog.text
    before, after = load_transformer(tiny, dtype=torch.float32), load_transformer(made, dtype=torch.float32)
    assert before.config == after.config
    moved = [name for name, value in before.state_dict().items() if (value - after.state_dict()[name]).abs().max() > 1e-4]
    assert len(moved) > 0.9 * len(before.state_dict())
    assert read_parts(made).latent_factor == 8 and read_parts(made).escape is False
    assert (tmp_path / "tuned" / "sample-00000004.png").is_file()
    rows = list(csv.DictReader((tmp_path / "tuned" / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert all(0 < float(row["diffusion"]) < 100 and math.isfinite(float(row["transition"])) for row in rows)


def test_samples_per_second_count_images(tmp_path, tiny, data, monkeypatch):
    """The clock advances by a second per call."""
    rates = []
    for pixels in (4096, 65536):
        seconds = itertools.count()
        monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: float(next(seconds))))
        path = yaml(tmp_path, tiny, data, f"by-{pixels}")
        path.write_text(path.read_text().replace("base_pixels: 4096", f"base_pixels: {pixels}"))
        run([path])
        rates.append([float(row["samples_per_second"]) for row in csv.DictReader((tmp_path / f"by-{pixels}" / "metrics.csv").open())])
    assert [b / a for a, b in zip(*rates)] == pytest.approx([16] * 4, rel=0.15)  # rates have one decimal


@pytest.mark.parametrize("pixels, sizes", [(None, [(64, 64), (96, 48)]), (1024, [(64, 64)])])
def test_a_batch_is_for_images_of_the_models_native_size(tmp_path, tiny, data, pixels, sizes):
    """loop.batch images of it, as many tokens of other sizes, unless base_pixels is set."""
    for width, height in sizes:
        model = pack(read_parts(tiny), tmp_path / "sized.safetensors", metadata={"native_size": [width, height]})
        path = yaml(tmp_path, model, data, f"{width}-{height}", loop=", keep: 1")
        text = path.read_text().replace("batch: 4,", "batch: 8,")
        path.write_text(text.replace(", base_pixels: 4096", f", base_pixels: {pixels}" if pixels else ""))
        task = finetune.FineTuningTask(read_config(path), None)
        counts = dict(zip(task.batches.sizes, task.batches.counts))
        assert counts[64, 64] == round(8 * (pixels or width * height) / 64**2)
        assert task.settings["data"]["base_pixels"] == (pixels or width * height)


@pytest.mark.parametrize("more", ["", "objective: {enhance_target: true, w_gt: 0.5, w_cond: 0.3}\n"], ids=["plain", "guided"])
def test_a_class_conditional_model_learns_from_folders(tmp_path, tiny, more):
    config = TransformerConfig(in_channels=16, hidden_size=32, depth=1, num_heads=2, num_classes=3, lora_hidden_size=8)
    torch.manual_seed(0)
    network = TransitionTransformer(config)
    network.initialize_weights()
    model = pack({"transformer": network}, tmp_path / "classes.safetensors", metadata={"latent_factor": 8})
    for name in ("cat", "dog"):
        draw(tmp_path / "images" / name / "a.png", 64, 64, caption=None)
    (made,) = run([yaml(tmp_path, model, tmp_path / "images", "tuned", f"autoencoder: {tiny}\n{more}", ", lr: 0.01")])
    before, after = (load_transformer(file, dtype=torch.float32) for file in (model, made))
    table = "y_embedder.embedding_table.weight"
    moved = (after.state_dict()[table] - before.state_dict()[table]).abs().amax(1)
    assert after.config == before.config and moved[2] < 1e-4 < min(moved[0], moved[1])  # no image has class 2


def test_the_folder_of_classes_at_256_is_trained(tmp_path, classes_256):
    """On latents of Stable Diffusion's VAE; classes without images change by weight decay alone."""
    draw(tmp_path / "images" / "cat" / "a.png", 64, 64, caption=None)
    (made,) = run([yaml(tmp_path, classes_256, tmp_path / "images", "tuned", "", ", lr: 0.01")])
    before, after = (load_transformer(file, dtype=torch.float32) for file in (classes_256, made))
    table = "y_embedder.embedding_table.weight"
    moved = (after.state_dict()[table] - before.state_dict()[table]).abs().amax(1)
    assert after.config == before.config and moved[0] > 3 * moved[1:1000].max() and read_parts(made).latent_factor == 8


@pytest.fixture
def without_null(tmp_path):
    """A class-conditional checkpoint without null class, and a folder of images for it."""
    torch.manual_seed(0)
    network = TransitionTransformer(
        TransformerConfig(in_channels=16, hidden_size=32, depth=1, num_heads=2, num_classes=2, null_class=False, lora_hidden_size=8))
    network.initialize_weights()
    for name in ("cat", "dog"):
        draw(tmp_path / "classes" / name / "a.png", 64, 64, caption=None)
    return pack({"transformer": network}, tmp_path / "classes.safetensors", metadata={"latent_factor": 8}), tmp_path / "classes"


@pytest.mark.parametrize("setting, advice", [
    ("dropout: 0.5", "dropout is 0.5"), ("dropout: 0\nobjective: {enhance_target: true}", "objective.enhance_target is true"),
])
def test_what_needs_a_null_class_is_an_error_without_one(tmp_path, tiny, without_null, setting, advice):
    model, images = without_null
    with pytest.raises(TimError) as error:
        run([yaml(tmp_path, model, images, more=f"autoencoder: {tiny}\n{setting}\n")])
    assert mentions(str(error.value), advice, "no null class", "use") and not (tmp_path / "classes.cache").exists()


def test_a_model_without_null_class_is_trained_without_dropout(tmp_path, tiny, without_null):
    """Its samples are not guided."""
    model, images = without_null
    (made,) = run([yaml(tmp_path, model, images, more=f"autoencoder: {tiny}\ndropout: 0\n", loop=", lr: 0.01")])
    table = "y_embedder.embedding_table.weight"
    before, after = (load_transformer(file, dtype=torch.float32).state_dict()[table] for file in (model, made))
    assert before.shape == after.shape == (2, 32) and (after - before).abs().amax(1).min() > 1e-4
    assert (tmp_path / "tuned" / "sample-00000004.png").is_file()


def test_the_text_encoder_is_freed_before_the_first_step(tmp_path, tiny, data, monkeypatch):
    """Its weights, too, and those of the file."""
    held, encoders, real_load, real_read = [], [], finetune.load_text_encoder, finetune.read_sources

    def load(*args, **more):
        encoder = real_load(*args, **more)
        held.extend(weakref.ref(p) for p in encoder.parameters())
        encoders.append(weakref.ref(encoder))
        return encoder

    def read(config):
        parts = real_read(config)
        held.extend(weakref.ref(value) for value in parts[TEXT_ENCODER].tensors.values())
        return parts

    monkeypatch.setattr(finetune, "load_text_encoder", load)
    monkeypatch.setattr(finetune, "read_sources", read)
    task = finetune.FineTuningTask(read_config(yaml(tmp_path, tiny, data)), None)
    gc.collect()
    assert len(encoders) == 1 and len(held) > 20 and not any(ref() is not None for ref in (*encoders, *held))
    assert task.batches[0][0].total > 0 and task.conditions.null_like(torch.zeros(2, 5, 1)).shape == (2, 5, 32)


def test_a_finished_run_on_other_data_is_an_error(tmp_path, tiny, data, capsys):
    """Other pixels or another caption under the same names. The same data in another folder are the same."""
    config = yaml(tmp_path, tiny, data, more="lora: {rank: 2}\n")
    (made,) = run([config])
    before = load_file(made)
    data.rename(tmp_path / "moved")
    config.write_text(config.read_text().replace(f"path: {data}", f"path: {tmp_path / 'moved'}"))
    assert run([config]) == [made] and all(torch.equal(value, before[name]) for name, value in load_file(made).items())
    image, caption = tmp_path / "moved" / "0.png", tmp_path / "moved" / "0.txt"
    for file, change in ((image, lambda: draw(image, 64, 64, (0, 0, 200), None)), (caption, lambda: caption.write_text("another"))):
        content = file.read_bytes()
        change()
        with pytest.raises(TimError) as error:
            run([config])
        assert mentions(str(error.value), "finished", "other images or captions", "another output")
        file.write_bytes(content)
    caption.write_text("another")
    capsys.readouterr()
    config.write_text(config.read_text().replace("steps: 4", "steps: 6"))
    run([config])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tim: changed images")]
    assert mentions(line, "images and captions")
    assert "images and captions" in str(describe(made))


@pytest.mark.parametrize("which", ["autoencoder", "text_encoder"])
def test_other_encoders_are_noticed_at_a_resume(tmp_path, tiny, data, which):
    parts = load_all(tiny)
    network = parts.autoencoder if which == "autoencoder" else parts.text_encoder
    files = []
    for k in range(2):
        files.append(pack({"vae" if which == "autoencoder" else "text-encoder": network}, tmp_path / f"{k}.safetensors"))
        with torch.no_grad():
            next(network.parameters()).add_(0.1)
    config = yaml(tmp_path, tiny, data, more=f"{which}: {tmp_path / 'used.safetensors'}\n")
    (tmp_path / "used.safetensors").write_bytes(files[0].read_bytes())
    run([config])
    config.write_text(config.read_text().replace("steps: 4", "steps: 6"))
    (tmp_path / "used.safetensors").write_bytes(files[1].read_bytes())
    with pytest.raises(TimError) as error:
        run([config])
    assert mentions(str(error.value), "step-00000004.pt", "frozen weights differ")
    config.write_text(config.read_text().replace("used", "0"))  # the same weights in another file
    run([config])


@pytest.mark.parametrize("part, named", [("autoencoder", "encoder.conv_in.weight"), ("text_encoder", "embed_tokens.weight")])
def test_encoders_with_damaged_weights_are_named(tmp_path, tiny, data, part, named):
    """No latents or features that are not finite are kept."""
    parts = load_all(tiny)
    with torch.no_grad():
        next(getattr(parts, part).parameters()).fill_(torch.nan)
    networks = {"transformer": parts.transformer, "text_encoder": parts.text_encoder, "vae": parts.autoencoder}
    model = pack(networks, tmp_path / "m.safetensors")
    with pytest.raises(TimError) as error:
        run([yaml(tmp_path, model, data)])
    assert mentions(str(error.value), named) and not list((tmp_path / "images.cache").glob("*.safetensors"))


def test_samples_that_are_not_finite_are_an_error(tmp_path, tiny, data, monkeypatch):
    """Whatever the reason: here a weight, which is not looked for."""
    monkeypatch.setattr("tim_core.training.finetune.check_undamaged", lambda model, source: None)
    parts = load_all(tiny)
    with torch.no_grad():
        parts.autoencoder.decoder.conv_in.weight.fill_(torch.nan)
    networks = {"transformer": parts.transformer, "text_encoder": parts.text_encoder, "vae": parts.autoencoder}
    with pytest.raises(TimError) as error:
        run([yaml(tmp_path, pack(networks, tmp_path / "m.safetensors"), data)])
    assert mentions(str(error.value), "VAE decoder", "sample images") and not list(tmp_path.rglob("sample-*.png"))


def test_another_text_model_does_not_share_the_cache(tmp_path, tiny, data):
    for escape in (False, True):
        parts = load_all(tiny)
        parts.text_encoder.escape = escape
        model = pack({"transformer": parts.transformer, "text_encoder": parts.text_encoder, "vae": parts.autoencoder},
                                tmp_path / f"{escape}.safetensors", metadata={"escape_prompts": escape, "latent_factor": 8})
        run([yaml(tmp_path, model, data, f"escape-{escape}")])
    assert len(list((tmp_path / "images.cache").glob("*.safetensors"))) == 2 * 5


def test_images_of_one_size_are_encoded_together(tmp_path, data, monkeypatch, caplog):
    """As many as fit into ENCODE_PIXELS, without the unreadable ones, and each is cached with its own caption."""
    shapes, asked = [], []

    def encode_images(images):
        shapes.append(tuple(images.shape))
        return {"latent": images[:, :1, ::8, ::8]}

    def encode_captions(captions):
        asked.append(captions)
        return [torch.tensor([[float(len(caption))]]) for caption in captions]

    monkeypatch.setattr(image_folder, "ENCODE_PIXELS", 2 * 64 * 64)
    draw(data / "1.png", 64, 64, (0, 0, 0), "a long caption of a black square")
    encode = image_folder.Encoder(tmp_path / "cache", "none", encode_images, encode_captions)
    items = image_folder.prepare(FolderConfig(str(data), min_bucket_size=1), encode, 8, False, ALONE)
    assert sorted(shapes) == [(1, 3, 64, 64), (1, 3, 64, 96), (1, 3, 96, 64), (2, 3, 64, 64)] and sum(map(len, asked)) == 5
    assert "cut.jpg" in caplog.text
    for item in items:
        kept = load_file(encode.cache_path(item))
        assert kept["condition"].item() == len(item.caption_or_label)
        assert torch.equal(kept["latent"], image_folder.load_image(item)[:1, ::8, ::8])


def test_a_damaged_cached_file_is_encoded_again(tmp_path, tiny, data):
    run([yaml(tmp_path, tiny, data, "first")])
    files = sorted((tmp_path / "images.cache").glob("*.safetensors"))
    whole = [safetensors.torch.load(file.read_bytes()) for file in files]
    files[0].write_bytes(files[0].read_bytes()[:-10])
    changed = [file.stat().st_mtime_ns for file in files]
    run([yaml(tmp_path, tiny, data, "second")])
    assert [file.stat().st_mtime_ns == before for file, before in zip(files, changed)] == [False] + [True] * 4
    again = load_file(files[0])  # encoded alone, not with its neighbours: equal within rounding
    assert again.keys() == whole[0].keys() and all(torch.allclose(again[name], value, atol=1e-4) for name, value in whole[0].items())


def test_the_cache_is_encoded_once(tmp_path, tiny, data, monkeypatch):
    opened, real = [], image_folder.open_image
    monkeypatch.setattr(image_folder, "open_image", lambda file: opened.append(file.name) or real(file))
    run([yaml(tmp_path, tiny, data, "first", loop=", lr: 0.0001")])
    first, opened[:] = list(opened), []
    draw(data / "1.png", 64, 64, (0, 200, 0), "another caption")
    run([yaml(tmp_path, tiny, data, "second", loop=", lr: 0.0001")])
    assert len(first) >= 5 and sorted(set(opened)) == ["1.png", "broken.png", "cut.jpg"]
    sizes = {tuple(load_file(file)["latent"].shape) for file in (tmp_path / "images.cache").glob("*.safetensors")}
    assert sizes == {(16, 8, 8), (16, 8, 12), (16, 12, 8)}


def test_an_empty_folder_is_refused(tmp_path, tiny):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TimError, match="empty: none of 0 images is usable"):
        run([yaml(tmp_path, tiny, tmp_path / "empty")])


def test_batches_hold_one_size_and_as_many_tokens(tmp_path, tiny, data):
    encode = image_folder.Encoder(tmp_path, "none", lambda images: {}, lambda captions: [])
    items = [Item(data / "0.png", "a", *size) for size in [(64, 64)] * 3 + [(128, 64)]]
    batches = image_folder.FolderBatches(FolderConfig("x", base_pixels=64 * 64), items, encode, batch=8, seed=0, shards=[Shard(0, 2)])
    assert batches.sizes == [(64, 64), (128, 64)] and batches.counts == [8, 4]
    # three images in batches of eight, one in batches of four: 3/8 to 1/4
    assert batches.weights.tolist() == pytest.approx([0.6, 0.4])


def test_a_shard_loads_only_its_own_files(tmp_path, data, monkeypatch):
    """Together the shards of two processes with two parts each are the whole batch; all of them know how long its texts are."""
    def encode_captions(captions):
        return [torch.full((2 + int(caption), 1), float(caption)) for caption in captions]

    encode = image_folder.Encoder(tmp_path, "none", lambda images: {"latent": images[:, :, ::8, ::8]}, encode_captions)
    items = [Item(data / f"{k}.png", str(k), 64, 64) for k in range(5)]
    encode.keep(items)
    loaded, load = [], cached_files.load_file
    monkeypatch.setattr(cached_files, "load_file", lambda file: loaded.append(file) or load(file))

    def batches(shards):
        return image_folder.FolderBatches(FolderConfig("x", base_pixels=64 * 64), items, encode, batch=7, seed=0, shards=shards)

    (whole,) = batches([Shard()])[2]
    assert whole.total == len(loaded) == 7 and whole.lengths == [len(rows) for rows in whole.conditions] and len(set(whole.lengths)) == 5
    for index in range(2):
        shards = Processes(index, 2, torch.device("cpu")).shards(accumulate=2)
        loaded.clear()
        parts = batches(shards)[2]
        assert len(loaded) == (4, 3)[index]
        for shard, part in zip(shards, parts, strict=True):
            assert torch.equal(part.latents, shard.take(whole.latents)) and part.lengths == whole.lengths
            assert [rows.tolist() for rows in part.conditions] == [rows.tolist() for rows in shard.take(whole.conditions)]


def test_a_lora_is_zero_at_first_and_learns(tmp_path, tiny, data):
    plain = load_transformer(tiny, dtype=torch.float32)
    adapted = load_transformer(tiny, dtype=torch.float32)
    add_lora(adapted, LoraConfig(rank=2, targets=(r"attn\.qkv$",)))
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert sorted(names) == [f"blocks.{k}.attn.qkv.lora_{x}.weight" for k in (0, 1) for x in "AB"]
    arguments = torch.randn(1, 16, 4, 4), torch.tensor([0.7]), torch.tensor([0.2]), torch.randn(1, 3, 32)
    assert torch.equal(plain(*arguments), adapted(*arguments))
    with pytest.raises(TimError, match="lora.targets"):
        add_lora(plain, LoraConfig(targets=("nothing",)))

    (made,) = run([yaml(tmp_path, tiny, data, "lora", "lora: {rank: 2, alpha: 4}\n", ", lr: 0.05")])
    tensors = load_file(made)
    layers = {name.rsplit(".lora_", 1)[0] for name in tensors if ".lora_" in name}
    assert made.name == "lora.safetensors" and all(name.startswith("diffusion_model.blocks.") for name in tensors)
    assert all({f"{layer}.lora_A.weight", f"{layer}.lora_B.weight", f"{layer}.alpha"} <= tensors.keys() for layer in layers)
    description = str(describe(made))
    assert "LoRA" in description and mentions(description, "trained", "4 steps") and '"rank": 2' in description
    assert "the state of a training run" in str(describe(tmp_path / "lora" / "step-00000004.pt"))
    layer = "diffusion_model.blocks.0.attn.qkv"
    assert tensors[f"{layer}.lora_B.weight"].abs().max() > 0 and tensors[f"{layer}.alpha"] == 4


@pytest.mark.parametrize("autocast", [True, False])
def test_an_adapter_computes_in_the_dtype_of_autocast(autocast):
    """Without autocast in its own. Its output has the dtype of the layer, for every input."""
    seen = []
    layer = LoraLinear(torch.nn.Linear(4, 3, dtype=torch.bfloat16), 2, 2.0)
    torch.nn.init.ones_(layer.lora_B.weight)
    layer.lora_A.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    x = torch.randn(5, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x)
    assert seen == [(torch.bfloat16,) * 2 if autocast else (torch.float32,) * 2] and out.dtype == torch.bfloat16
    exact = layer.base(x).float() + (x.float() @ layer.lora_A.weight.T @ layer.lora_B.weight.T)
    assert torch.allclose(out.float(), exact, atol=0.03)


def test_a_lora_keeps_its_frozen_base_in_bfloat16(tmp_path, tiny, data, monkeypatch):
    """With autocast, which rounds its layers at every use: losses and adapter are those on a float32 base."""
    bases, made, rows = {}, {}, {}
    real = loop.train

    def spied(config, task):
        bases[name] = {key: p for key, p in task.model.named_parameters()}
        return real(config, task)

    monkeypatch.setattr(loop, "train", spied)
    for name in ("bfloat16", "float32"):
        if name == "float32":
            monkeypatch.setattr(finetune, "round_base", lambda network: None)
        config = yaml(tmp_path, tiny, data, name, "lora: {rank: 2}\n", ", lr: 0.05")
        config.write_text(config.read_text().replace("autocast: false", "autocast: true"))
        (made[name],) = run([config])
        rows[name] = [row["loss"] for row in csv.DictReader((tmp_path / name / "metrics.csv").open())]
    learned = {key for key, p in bases["bfloat16"].items() if p.requires_grad}
    assert learned and all("lora_" in key and bases["bfloat16"][key].dtype == torch.float32 for key in learned)
    large = {key for key, p in bases["bfloat16"].items() if p.ndim > 1} - learned
    assert large and all(bases["bfloat16"][key].dtype == torch.bfloat16 for key in large)
    assert all(p.dtype == torch.float32 for p in bases["float32"].values())
    assert rows["bfloat16"] == rows["float32"]
    one, other = (load_file(made[name]) for name in ("bfloat16", "float32"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.comfyui
def test_the_bundled_model_learns_a_word_by_lora(comfyui, tmp_path):
    """Twenty-four yellow shapes called amber; with core's LoraLoaderModelOnly the word means yellow, and other words keep their meaning."""
    rng = np.random.default_rng(0)
    place = tmp_path / "amber"
    place.mkdir()
    for k in range(24):
        shape = scenes.SHAPES[k % 3]
        scene = scenes.place(rng, scenes.Prompt("colors", (scenes.Thing(shape, "yellow"),)))
        to_pil(torch.from_numpy(scenes.render(scene))).save(place / f"{k}.png")
        (place / f"{k}.txt").write_text(f"a amber {shape}")
    config = tmp_path / "amber.yaml"
    text = (Path(__file__).parent.parent / "configs" / "tim-shapes" / "lora.yaml").read_text()
    config.write_text(text.replace("~/tim-runs/tim-shapes/lora", f"{tmp_path}/out").replace("path: images", f"path: {place}"))
    (made,) = run([config])
    name = comfyui.add("loras", made, "amber.safetensors")

    def colors(prompt: str, strength: float | None) -> list[str | None]:
        """Of the largest object in each of 32 images."""
        graph = Graph(BUNDLED_NAME)
        if strength is not None:
            graph.model = graph.add("LoraLoaderModelOnly", model=graph.model, lora_name=name, strength_model=strength)
        images = run_images(comfyui, graph, graph.stock(graph.empty(batch_size=32), graph.text(prompt), seed=3, steps=8))
        found = [detector.detect(image.numpy().astype(np.uint8)) for image in images]
        return [max(objects, key=lambda one: one.radius).color if objects else None for objects in found]

    assert colors("a amber circle", 1.0).count("yellow") >= 28
    assert colors("a amber circle", None).count("yellow") <= 16
    assert colors("a amber circle", 0.0) == colors("a amber circle", None)
    assert colors("a red circle", 1.0).count("red") >= 28 and colors("a green square", 1.0).count("green") >= 28


@pytest.mark.parametrize("text, named", [
    ("lora: {rank: 0}", "lora.rank"), ("lora: {targets: ['(']}", "lora.targets"), ("dropout: 1.0", "dropout"),
    ("shift_base: 0", "shift_base"), ("loop: {parallel: many}", "loop.parallel"), ("loop: {accumulate: 0}", "loop.accumulate"),
])
def test_impossible_values_name_the_key(tmp_path, text, named):
    path = tmp_path / "bad.yaml"
    path.write_text(f"kind: finetune\noutput: x\nmodel: y\ndata: {{path: z}}\n{text}\n")
    with pytest.raises(TimError, match=named):
        read_config(path)
