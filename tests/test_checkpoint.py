"""Weight files: wrapping, recognition, refusals, the one-file layout, conversion, description."""

import copy
import errno
import json
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import hostile
from tests.hostile import SPECIAL, deep_json, flip_storage, one_tensor, rezip, special_file
from tests.support import load_all, mentions
from tim_core.errors import TimError
from tim_core.evaluation.benchmark_export import read_prompts
from tim_core.evaluation.curve import read_report
from tim_core.files import atomic_write
from tim_core.models.autoencoder import Autoencoder
from tim_core.models.config import AutoencoderConfig, StageConfig, TransformerConfig
from tim_core.models.text_encoder import TextEncoder
from tim_core.models.tokenizer import Tokenizer
from tim_core.models.transformer import TransitionTransformer
from tim_core.pipeline import Pipeline
from tim_core.shapes.tokenizer import VOCABULARY_SIZE, shapes_tokenizer
from tim_core.weights.describe import describe
from tim_core.weights.load import load_autoencoder, load_text_encoder, load_transformer
from tim_core.weights.open import flatten, open_state_dict
from tim_core.weights.parts import BUNDLED, CONFIG_KEYS, Parts
from tim_core.weights.read import read_parts, resolve
from tim_core.weights.save import convert, pack
from tim_core.weights.write import json_tensor

GEMMA = {
    "vocab_size": VOCABULARY_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 512, "sliding_window_pattern": 2,
}
TIM = dict(in_channels=16, hidden_size=32, depth=2, num_heads=2, text_dim=32, lora_hidden_size=8)


@pytest.fixture(scope="module")
def modules():
    torch.manual_seed(0)
    transformer = TransitionTransformer(TransformerConfig(**TIM, encoder_depth=1, projector_dim=8, z_dim=4))
    text_encoder = TextEncoder(GEMMA, Tokenizer.from_json(shapes_tokenizer()), escape=False)
    stages = (StageConfig(8, 1), StageConfig(8, 1), StageConfig(16, 1), StageConfig(16, 1, "EfficientViTBlock", (5,)))
    autoencoder = Autoencoder(AutoencoderConfig(stages, stages, latent_channels=16, head_dim=8, scaling_factor=0.7))
    return {"transformer": transformer, "text_encoder": text_encoder, "autoencoder": autoencoder}


@pytest.fixture(scope="module")
def one_file(modules, tmp_path_factory):
    return pack(modules, tmp_path_factory.mktemp("one") / "model.safetensors", metadata={"training": {"steps": 7}})


@pytest.fixture
def weights(modules):
    return {key: tensor.clone() for key, tensor in modules["transformer"].state_dict().items()}


def refused(function, *arguments, **keywords) -> str:
    with pytest.raises(TimError) as error:
        function(*arguments, **keywords)
    message = str(error.value)
    assert "\n" not in message, message
    return message


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[key], b[key]) for key in a.keys() & b.keys()) and bool(a.keys() & b.keys())


# Opening and wrapping

WRAPPINGS = {
    "plain": lambda w: w,
    "model": lambda w: {"model": w, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "step": 5},
    "state_dict": lambda w: {"state_dict": w},
    "module": lambda w: {"module": w},
    "module.": lambda w: {f"module.{k}": v for k, v in w.items()},
    "_orig_mod.": lambda w: {f"_orig_mod.{k}": v for k, v in w.items()},
    "compiled blocks": lambda w: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in w.items()},
    "comfy": lambda w: {f"model.diffusion_model.{k}": v for k, v in w.items()},
    "diffusion_model.": lambda w: {f"diffusion_model.{k}": v for k, v in w.items()},
    "nested": lambda w: {"model": {"state_dict": {f"module._orig_mod.{k}": v for k, v in w.items()}}},
    "both": lambda w: {"state_dict": {f"module.model.diffusion_model._orig_mod.{k}": v for k, v in w.items()}},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
def test_wrapped_state_dicts(wrap, ending, weights, modules, tmp_path):
    wrapped, path = wrap(weights), tmp_path / f"weights{ending}"
    if ending == ".bin":
        torch.save(wrapped, path)
    else:
        save_file({k: v.clone() for k, v in flatten(wrapped, "").items()}, path)
    model = load_transformer(path)
    assert same(model, modules["transformer"]) and model.projector is None and not model.training
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


@pytest.mark.parametrize("value", [
    lambda one, other: {"net": {**one, "model": other}}, lambda one, other: {"net": one, "net.model": other},
    lambda one, other: {"ema": {"net": one, "net.model": other}, "model": other},
])
def test_a_second_copy_of_a_part_is_named(value, weights, tmp_path, caplog):
    """No rule says which of the two is meant."""
    other = {key: tensor + 1 for key, tensor in weights.items()}
    torch.save(value(weights, other), tmp_path / "two.pt")
    state = load_transformer(tmp_path / "two.pt").state_dict()
    assert torch.equal(state["x_embedder.proj.weight"], weights["x_embedder.proj.weight"])
    (line,) = caplog.messages
    assert mentions(line, "two.pt", "TiM transformer", "2 times", "net.", "net.model.", "net.", "file of its own")


@pytest.mark.parametrize("average", ["ema", "model_ema", "ema_model"])
def test_the_moving_average_is_preferred(average, weights, tmp_path, caplog):
    ema = {key: tensor + 1 for key, tensor in weights.items()}
    torch.save({"model": weights, average: {"module": ema}, "step": 3, "optimizer": {"exp_avg": weights}}, tmp_path / "training.pt")
    state = load_transformer(tmp_path / "training.pt").state_dict()
    assert torch.equal(state["x_embedder.proj.weight"], ema["x_embedder.proj.weight"]) and not caplog.messages


def test_an_unfinished_average_is_not_taken(weights, tmp_path):
    torch.save({"model": weights, "ema": {"x_embedder.proj.weight": torch.zeros(1)}}, tmp_path / "training.pt")
    assert torch.equal(load_transformer(tmp_path / "training.pt").x_embedder.proj.weight, weights["x_embedder.proj.weight"])


def test_old_torch_format_and_false_endings(weights, modules, tmp_path):
    torch.save(weights, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    torch.save(weights, tmp_path / "torch.safetensors")
    save_file(weights, tmp_path / "safetensors.bin")
    for name in ("old.bin", "torch.safetensors", "safetensors.bin"):
        assert same(load_transformer(tmp_path / name), modules["transformer"])


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["TIM_TEST_TRAP"],)


@pytest.mark.parametrize("write", ["zip", "old", "pickle", "module"])
def test_code_is_never_run(write, weights, modules, tmp_path, monkeypatch):
    monkeypatch.setenv("TIM_TEST_TRAP", str(tmp_path / "sprung"))
    path = tmp_path / "evil.bin"
    if write == "pickle":
        path.write_bytes(pickle.dumps({"model": Trap()}))
    elif write == "module":
        torch.save(modules["transformer"], path)
    else:
        torch.save({**weights, "trap": Trap()}, path, _use_new_zipfile_serialization=write == "zip")
    for function in (load_transformer, describe, open_state_dict):
        assert "evil.bin: contains code or objects" in refused(function, path)
    assert not (tmp_path / "sprung").exists()


def test_files_that_cannot_be_opened(weights, tmp_path):
    save_file(weights, tmp_path / "cut.safetensors")
    torch.save(weights, tmp_path / "cut.bin")
    torch.save(weights, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("cut.safetensors", "cut.bin", "old.bin"):
        data = (tmp_path / name).read_bytes()
        for share in (0.001, 0.3, 0.99):
            (tmp_path / name).write_bytes(data[: max(9, int(len(data) * share))])
            assert name in refused(load_transformer, tmp_path / name)
    contents = {
        "empty.bin": b"", "short.safetensors": b"\x01", "page.bin": b"<!DOCTYPE html>", "list.json": b"[]", "zip.bin": b"PK\x03\x04",
        "pointer.safetensors": b"version https://git-lfs.github", "noise.bin": bytes(range(100, 200)),
        "header.safetensors": (2**40).to_bytes(8, "little") + b"{}",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        assert name in refused(load_transformer, tmp_path / name)
        refused(describe, tmp_path / name)
    assert "folder" in refused(open_state_dict, tmp_path)
    assert "missing.bin" in refused(open_state_dict, tmp_path / "missing.bin")
    torch.save([torch.zeros(1)], tmp_path / "list.bin")
    assert "list" in refused(open_state_dict, tmp_path / "list.bin")


@pytest.fixture
def text_folder(modules, tmp_path, monkeypatch):
    """A text model in Hugging Face layout, under a short relative path."""
    monkeypatch.chdir(tmp_path)
    folder = Path("it")
    folder.mkdir()
    save_file(modules["text_encoder"].transformer.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(GEMMA | {"model_type": "gemma3_text"}))
    (folder / "tokenizer.json").write_bytes(shapes_tokenizer())
    assert load_text_encoder(folder)
    return folder


@pytest.mark.skipif(os.name != "posix", reason="special files of POSIX")
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_special_files_are_refused_at_once(kind, name, text_folder):
    """Never opened: a FIFO would wait for ever, /dev/zero would fill the memory."""
    (text_folder / name).unlink(missing_ok=True)
    kept = special_file(kind, text_folder / name)
    for function in (load_text_encoder, describe):
        message = refused(function, text_folder / "model.safetensors" if name == "model.safetensors" else text_folder)
        assert name in message and "not a regular file" in message
    if name == "model.safetensors":
        assert "not a regular file" in refused(open_state_dict, text_folder / name)
    del kept


@pytest.mark.skipif(os.name != "posix", reason="special files of POSIX")
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("read", [read_prompts, read_report])
def test_text_files_that_are_special_are_refused_at_once(kind, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = special_file(kind, Path("text"))
    assert "text: not a regular file" in refused(read, "text")
    del kept


@pytest.mark.parametrize("read", [read_prompts, read_report])
def test_text_files_that_are_deep_or_no_text_are_refused(read, tmp_path):
    for content in (deep_json().encode(), b"\xff\xfe\x00", b"x" * (2**24 + 1)):
        (tmp_path / "text").write_bytes(content)
        message = refused(read, tmp_path / "text")
        assert f"{tmp_path / 'text'}: " in message and len(message) < 500


def test_links_to_regular_files_are_followed(text_folder):
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (text_folder / name).rename(text_folder / f"real-{name}")
        (text_folder / name).symlink_to(f"real-{name}")
    assert load_text_encoder(text_folder / "model.safetensors")


@pytest.mark.parametrize("content", [deep_json(), '{"a": "' + "x" * 2**24 + '"}', "[" * 100, '{"a": ' + "9" * 5000 + "}"],
                         ids=["deep", "large", "cut", "digits"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_hostile_json_in_a_folder_is_one_line(name, content, text_folder):
    (text_folder / name).write_text(content)
    for function in (load_text_encoder, describe):
        assert name in refused(function, text_folder)


@pytest.mark.parametrize("text", [deep_json(), "9" * 5000, '{"format": 1, "x": "' + "x" * 2**24 + '"}'], ids=["deep", "digits", "large"])
def test_hostile_metadata_is_one_line(text, weights, tmp_path):
    save_file(weights, tmp_path / "a.safetensors", metadata={"tim": text})
    for function in (load_transformer, describe):
        message = refused(function, tmp_path / "a.safetensors")
        assert len(message) < 500 and ("a.safetensors: metadata" in message or len(text) > 2**24 and "a.safetensors: its header" in message)


@pytest.mark.parametrize("weight_map", [[1], None, 3, "x", {"a": 1}, {"a": None}, {"a": ["b"]}], ids=str)
def test_an_index_that_maps_no_names_to_files_is_refused(weight_map, text_folder):
    (text_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for function in (load_text_encoder, describe):
        message = refused(function, text_folder)
        assert "model.safetensors.index.json: weight_map" in message


def test_a_tensor_in_two_shards_is_refused(text_folder):
    shutil.copy(text_folder / "model.safetensors", text_folder / "other.safetensors")
    index = {"weight_map": {"norm.weight": "model.safetensors", "x": "other.safetensors"}}
    (text_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(load_text_encoder, text_folder)
    assert "other.safetensors" in message and "another shard" in message


CUTS = {"half": lambda data: data[: len(data) // 2], "one byte": lambda data: data[:-1], "nothing": lambda data: b"",
        "longer": lambda data: data + bytes(4)}


@pytest.mark.parametrize("change", CUTS)
@pytest.mark.parametrize("key", ["blocks.1.mlp.fc2.weight", "final_layer.linear.bias"])
def test_a_storage_of_another_length_names_its_tensor(change, key, weights, tmp_path):
    """Memory-mapped reading would take the neighbour's bytes."""
    torch.save({"model": weights}, tmp_path / "whole.bin")
    number = str(list(weights).index(key))
    rezip(tmp_path / "whole.bin", tmp_path / "cut.bin", lambda name, data: CUTS[change](data) if name.endswith(f"/data/{number}") else data)
    for function in (load_transformer, describe, open_state_dict, lambda path: convert(path, tmp_path / "out.safetensors")):
        message = refused(function, tmp_path / "cut.bin")
        assert "cut.bin" in message and key in message
    assert not (tmp_path / "out.safetensors").exists()
    assert load_transformer(rezip(tmp_path / "whole.bin", tmp_path / "same.bin", lambda name, data: data))


@pytest.mark.parametrize("key", ["blocks.1.mlp.fc2.weight", "final_layer.linear.bias"])
@pytest.mark.parametrize("place", [0, 0.5, 0.999])
def test_a_flipped_bit_in_a_storage_names_its_record_and_tensor(key, place, weights, tmp_path):
    """The value stays finite, so nothing else would tell. torch itself compares no checksum."""
    torch.save(weights, tmp_path / "flipped.bin")
    record = flip_storage(tmp_path / "flipped.bin", list(weights).index(key), place)
    assert torch.load(tmp_path / "flipped.bin")[key].isfinite().all()
    for function in (load_transformer, read_parts, lambda path: convert(path, tmp_path / "out.safetensors")):
        assert mentions(refused(function, tmp_path / "flipped.bin"), "flipped.bin", record, key, "checksum")
    assert not (tmp_path / "out.safetensors").exists()
    assert describe(tmp_path / "flipped.bin").parts  # reads no weights


def test_torch_files_without_checksums_load(weights, tmp_path):
    """As torch writes them after set_crc32_options(False): with checksums of 0."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, tmp_path / "unsummed.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    found = open_state_dict(tmp_path / "unsummed.bin")[0]
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


def test_a_missing_storage_names_its_tensor(weights, tmp_path):
    torch.save(weights, tmp_path / "whole.bin")
    rezip(tmp_path / "whole.bin", tmp_path / "gone.bin", lambda name, data: None if name.endswith("/data/3") else data)
    assert list(weights)[3] in refused(load_transformer, tmp_path / "gone.bin")


def test_compressed_records_are_refused(weights, tmp_path):
    torch.save(weights, tmp_path / "whole.bin")
    rezip(tmp_path / "whole.bin", tmp_path / "small.bin", lambda name, data: data, zipfile.ZIP_DEFLATED)
    message = refused(load_transformer, tmp_path / "small.bin")
    assert "small.bin" in message and "compressed" in message
    bomb = hostile.Pickle().add(b"}", "a", "x" * 2**20, b"s").zip(tmp_path / "bomb.bin", {}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 10_000 and "compressed" in refused(load_transformer, bomb)


@pytest.mark.parametrize("more", [1, 4, -4, 16])
def test_a_record_whose_extra_field_lies_is_refused(more, weights, tmp_path):
    """Its bytes would be read from another place: the end of a tensor from the header of the next record."""
    torch.save({"a": torch.zeros(64), "b": torch.ones(64)}, tmp_path / "whole.bin")
    with zipfile.ZipFile(tmp_path / "whole.bin") as archive:
        record = next(record for record in archive.infolist() if record.filename.endswith("data/0"))
    data = bytearray((tmp_path / "whole.bin").read_bytes())
    place = record.header_offset + 28
    length = int.from_bytes(data[place : place + 2], "little")
    data[place : place + 2] = (length + more).to_bytes(2, "little")
    (tmp_path / "lies.bin").write_bytes(data)
    open_state_dict(tmp_path / "whole.bin")
    with pytest.raises(TimError, match="'?a'? .*lies|lies.*a "):
        open_state_dict(tmp_path / "lies.bin")


def test_records_that_share_bytes_are_refused(weights, tmp_path):
    """The directory points two records at one place."""
    torch.save(weights, tmp_path / "whole.bin")
    data = bytearray((tmp_path / "whole.bin").read_bytes())
    with zipfile.ZipFile(tmp_path / "whole.bin") as archive:
        first, second = (next(r for r in archive.infolist() if r.filename.endswith(f"/data/{k}")) for k in (4, 10))
    assert first.file_size != second.file_size
    place = data.rindex(second.filename.encode()) - 4
    assert int.from_bytes(data[place : place + 4], "little") == second.header_offset
    data[place : place + 4] = first.header_offset.to_bytes(4, "little")
    (tmp_path / "shared.bin").write_bytes(data)
    assert "shared.bin" in refused(load_transformer, tmp_path / "shared.bin")


STRIDES = {  # elements in the file, shape, strides, offset
    "expanded": (1, (40_000, 40_000), (0, 0), 0), "one dimension expanded": (8, (10**9, 8), (0, 1), 0),
    "overlapping": (8, (7, 8), (0, 1), 0), "too large": (4, (5,), (1,), 0), "behind the end": (4, (2,), (1,), 3),
    "far away": (4, (2,), (2**61,), 0),
}


@pytest.mark.parametrize("case", STRIDES)
def test_strides_that_leave_or_repeat_the_storage_are_refused(case, tmp_path):
    message = refused(open_state_dict, one_tensor(tmp_path / "a.bin", *STRIDES[case], name="the.weight"))
    assert "a.bin: the.weight: its shape" in message and len(message) < 300


def test_a_state_that_is_set_on_a_tensor_is_refused(tmp_path):
    path = hostile.state_of_a_tensor().zip(tmp_path / "a.bin", {"0": bytes(16)})
    assert "sets the state of a tensor" in refused(open_state_dict, path)


def test_archives_in_which_torch_finds_other_records_are_refused(tmp_path):
    """torch takes the directory that the end points to, and names in either case for the same."""
    small, large = (hostile.Pickle().add(b"}", "w").tensor("0", 1, *shape).add(b"s") for shape in (((1,), (1,)), ((4000, 4000), (0, 0))))
    path = hostile.two_directories(tmp_path / "two.bin", small, large, bytes(4))
    assert torch.load(path, weights_only=True)["w"].shape == (4000, 4000)
    assert "in two places" in refused(open_state_dict, path)
    small.zip(tmp_path / "case.bin", {"0": bytes(4)})
    with zipfile.ZipFile(tmp_path / "case.bin", "a") as archive:
        archive.writestr("archive/DATA.PKL", large.data + b".")
    assert "two records of one name" in refused(open_state_dict, tmp_path / "case.bin")


def test_views_of_a_storage_are_read(tmp_path):
    base = torch.arange(12.0)
    tensors = {"row": base[3:6], "turned": base.view(3, 4).t(), "tied": base, "empty": base[:0], "one": base[5]}
    tensors["wide"] = base[None].expand(1, 12)
    for new in (True, False):
        torch.save(tensors, tmp_path / "a.bin", _use_new_zipfile_serialization=new)
        found = open_state_dict(tmp_path / "a.bin")[0]
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_what_training_checkpoints_hold_beside_tensors_is_read(tmp_path):
    beside = {"list": [1, 2.5, None, True], "bytes": b"\xff\0", "bytearray": bytearray(b"x"), "set": {1, "a"}, "dtype": torch.float16,
              "counter": Counter("aab"), "ordered": OrderedDict(b=torch.ones(2)), "device": torch.device("cpu"), "size": torch.Size([2, 3]),
              "complex": 1 + 2j, 3: {"step": torch.tensor(5.0)}, "large": 2**80, "parameter": torch.nn.Parameter(torch.zeros(2))}
    for new in (True, False):
        torch.save(beside, tmp_path / "a.bin", _use_new_zipfile_serialization=new)
        assert open_state_dict(tmp_path / "a.bin")[0].keys() == {"ordered.b", "3.step", "parameter"}


DTYPES = [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.uint16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read(dtype, tmp_path):
    torch.save({"w": torch.ones(3, 5).to(dtype)}, tmp_path / "a.bin")
    found = open_state_dict(tmp_path / "a.bin")[0]["w"]
    assert found.dtype == dtype and found.float().sum() == 15


BOMBS = ["deep_dicts", "dict_lattice", "dict_of_itself", "tuple_lattice_key", "growing_bytes", "huge_bytearray", "huge_meta_tensor"]


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickles_without_end_are_refused(bomb, tmp_path):
    path = getattr(hostile, bomb)().zip(tmp_path / "bomb.bin", {})
    for function in (open_state_dict, describe):
        message = refused(function, path)
        assert "bomb.bin" in message and len(message) < 400


def test_a_pickle_larger_than_any_state_dicts_is_refused(tmp_path):
    path = hostile.Pickle().add(b"}", "a", b"]" + b"]0" * 2**21, b"s").zip(tmp_path / "large.bin", {})
    assert "large.bin" in refused(open_state_dict, path) and "data.pkl" in refused(open_state_dict, path)


def test_an_archive_of_more_records_than_any_state_dicts_is_refused(tmp_path):
    entry = b"PK\1\2" + bytes(24) + b"\1" + bytes(17) + b"a"
    directory = entry * 200_000
    end = b"PK\5\6" + bytes(4) + b"\xff\xff" * 2 + len(directory).to_bytes(4, "little") + (4).to_bytes(4, "little") + bytes(2)
    (tmp_path / "many.bin").write_bytes(b"PK\3\4" + directory + end)
    assert "its directory has" in refused(open_state_dict, tmp_path / "many.bin")


def test_a_safetensors_header_larger_than_any_models_is_refused(tmp_path):
    names = (f'"{k}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for k in range(350_000))
    header = ("{" + ",".join(names) + "}").encode()
    (tmp_path / "many.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "many.safetensors: its header has" in refused(open_state_dict, tmp_path / "many.safetensors")


def test_a_state_dict_of_many_tensors_is_read(tmp_path):
    many = {f"blocks.{k // 100}.some.module.{k % 100}.weight": torch.zeros(1) for k in range(4_000)}
    torch.save({"model": many, "step": 1}, tmp_path / "many.bin")
    assert len(open_state_dict(tmp_path / "many.bin")[0]) == 4_000


def test_one_storage_under_many_names_is_refused(tmp_path):
    """Written out, it would take a hundred times the file's size."""
    torch.save(dict.fromkeys(map(str, range(100)), torch.zeros(2**19)), tmp_path / "many.bin")
    assert mentions(refused(open_state_dict, tmp_path / "many.bin"), "many.bin", "100 names", "2 MiB", "state dict")


def test_old_files_that_declare_more_than_they_hold(tmp_path):
    torch.save({"the.weight": torch.zeros(64)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    data = (tmp_path / "old.bin").read_bytes()
    huge = data.replace(b"K@", b"\x8a\x06" + (2**40).to_bytes(6, "little"))  # of elements, and of the shape
    for harmed in (data[:-256], data[:-4], huge, data[: data.index(b"storage")]):
        (tmp_path / "harmed.bin").write_bytes(harmed)
        assert "harmed.bin" in refused(open_state_dict, tmp_path / "harmed.bin")


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
def test_a_name_twice_once_wrapped_is_refused(wrapper, ending, weights, tmp_path):
    key, path = "blocks.1.mlp.fc2.bias", tmp_path / f"twice{ending}"
    weights[wrapper + key] = weights[key] + 1
    torch.save(weights, path) if ending == ".bin" else save_file(weights, path)
    for function in (load_transformer, describe):
        message = refused(function, path)
        assert f"twice{ending}" in message and key in message and "twice" in message.removeprefix(str(path))


# Recognising

FOREIGN = {
    "SDXL": ["input_blocks.0.0.weight", "label_emb.0.0.weight", "model.diffusion_model.out.0.weight"],
    "Flux": ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"],
    "DiT": ["blocks.0.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.weight", "x_embedder.proj.weight"],
    "KL autoencoder": ["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight", "encoder.conv_out.weight"],
    "T5": ["encoder.block.0.layer.0.SelfAttention.q.weight"],
    "CLIP": ["text_model.encoder.layers.0.self_attn.q_proj.weight"],
    "other than Gemma 3": ["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"],
    "LoRA": ["diffusion_model.blocks.0.attn.qkv.lora_A.weight"],
    "unknown": ["foo.weight"],
}


@pytest.mark.parametrize("title", FOREIGN)
def test_other_models_are_named(title, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(2, 2) for key in FOREIGN[title]}, path)
    for function in (load_transformer, load_all, load_autoencoder, load_text_encoder):
        message = refused(function, path)
        assert str(path) in message and title in message and next(iter(FOREIGN[title])) in message
    assert title in str(describe(path))


def test_the_wrong_part_is_named(modules, tmp_path):
    save_file(modules["autoencoder"].state_dict(), tmp_path / "vae.safetensors")
    assert mentions(refused(load_transformer, tmp_path / "vae.safetensors"), "vae.safetensors", "no TiM transformer", "DC-AE")


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "block"])
def test_every_key_must_fit(change, weights, tmp_path):
    if change == "missing":
        del weights["blocks.1.mlp.fc2.bias"]
    elif change == "unknown":
        weights["blocks.0.extra"] = torch.zeros(1)
    elif change == "shape":
        weights["blocks.1.mlp.fc2.bias"] = torch.zeros(3)
    else:
        weights["blocks.3.mlp.fc2.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "odd.safetensors")
    assert "odd.safetensors" in refused(load_transformer, tmp_path / "odd.safetensors")


def test_projector_and_metadata(weights, modules, tmp_path):
    save_file(weights, tmp_path / "a.safetensors", metadata={"tim": json.dumps({"format": 1, "new_condition": "t,r"})})
    assert load_transformer(tmp_path / "a.safetensors").config.new_condition == "t,r"
    assert load_transformer(tmp_path / "a.safetensors").config.z_dim is None
    save_file(weights, tmp_path / "b.safetensors", metadata={"tim": json.dumps({"format": 99})})
    assert "format 99" in refused(load_transformer, tmp_path / "b.safetensors")
    save_file(weights, tmp_path / "c.safetensors", metadata={"tim": "{"})
    assert "metadata" in refused(load_transformer, tmp_path / "c.safetensors")


def test_dtypes(weights, one_file, tmp_path):
    assert load_transformer(one_file, dtype=torch.bfloat16).dtype == torch.bfloat16
    half = {key: tensor.bfloat16() for key, tensor in weights.items()}
    half["final_layer.linear.bias"] = weights["final_layer.linear.bias"]  # one tensor in another precision
    save_file(half, tmp_path / "half.safetensors")
    model = load_transformer(tmp_path / "half.safetensors")
    assert model.dtype == torch.bfloat16 and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert next(load_autoencoder(one_file, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16
    assert "float16" in refused(load_autoencoder, one_file, dtype=torch.float16)


def test_nothing_stays_behind_on_the_cpu(one_file):
    """The text encoder's rotary tables and embedding scale, which no file holds, go to the device too."""
    encoder = load_text_encoder(one_file, device="meta")
    assert all(tensor.is_meta for tensor in (*encoder.parameters(), *encoder.buffers()))
    assert {table.dtype for name, table in encoder.named_buffers() if "inv_freq" in name} == {torch.float32}


# The one-file layout


def check_whole(path, modules):
    loaded = load_all(path)
    assert same(loaded.transformer, modules["transformer"]) and same(loaded.autoencoder, modules["autoencoder"])
    assert loaded.latent_factor == 8 and loaded.autoencoder.config == modules["autoencoder"].config
    assert loaded.text_encoder.escape is False
    prompts = ["a red circle", ""]
    assert torch.equal(loaded.text_encoder.encode(prompts).rows, modules["text_encoder"].encode(prompts).rows)
    x, time = torch.randn(1, 16, 4, 4), torch.ones(1)
    y = loaded.text_encoder.encode(prompts[:1]).rows
    with torch.no_grad():
        expected = modules["transformer"](x, time, time, y)
        assert (loaded.transformer(x, time, time, y) - expected).abs().max() < 1e-5
        # a copy: a mapped file's weights lie anywhere in memory, and on some processors rounding depends on where
        assert torch.equal(copy.deepcopy(loaded.transformer)(x, time, time, y), expected)
    return loaded


def test_one_file(one_file, modules):
    assert check_whole(one_file, modules).metadata["training"] == {"steps": 7}
    with safe_open(one_file, "pt") as file:
        keys, record = set(file.keys()), json.loads(file.metadata()["tim"])
    assert {"format": 1, "latent_factor": 8, "scaling_factor": 0.7, "escape_prompts": False, "num_heads": 2}.items() <= record.items()
    assert not any("projector" in key for key in keys)
    assert {"text_encoders.tokenizer_json", "text_encoders.config_json", "vae.decoder.conv_in.weight"} <= keys
    assert {"model.diffusion_model.x_embedder.proj.weight", "text_encoders.transformer.layers.0.mlp.down_proj.weight"} <= keys


def test_everything_survives_the_loss_of_metadata(one_file, modules, tmp_path):
    save_file(load_file(one_file), tmp_path / "saved.safetensors")
    check_whole(tmp_path / "saved.safetensors", modules)


def test_other_names_of_comfyui(one_file, modules, tmp_path):
    """Core's default prefix for an autoencoder, and no records but the text model's."""
    tensors = {k.replace("vae.", "first_stage_model."): v for k, v in load_file(one_file).items()}
    tensors.pop("model.diffusion_model.config_json")
    save_file(tensors, tmp_path / "saved.safetensors")
    check_whole(tmp_path / "saved.safetensors", modules)


def test_what_shapes_cannot_tell_of_an_autoencoder(modules, tmp_path):
    """A diffusers folder, packed, packed without metadata, converted, and from a loaded module: one architecture, one output."""
    folder = tmp_path / "vae"
    folder.mkdir()
    save_file(modules["autoencoder"].state_dict(), folder / "diffusion_pytorch_model.safetensors")
    stages = {"block_out_channels": [8, 8, 16, 16], "block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"],
              "layers_per_block": [1] * 4, "qkv_multiscales": [[], [], [], [5]]}
    config = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in stages.items()}
    config |= {"latent_channels": 16, "attention_head_dim": 8, "downsample_block_type": "conv", "upsample_block_type": "interpolate"}
    config |= {"scaling_factor": 0.3, "encoder_out_shortcut": False, "decoder_in_shortcut": False, "decoder_conv_act_fn": "silu"}
    (folder / "config.json").write_text(json.dumps(config | {"decoder_act_fns": "relu", "force_upcast": True}))

    expected = load_autoencoder(folder)
    assert not expected.config.in_shortcut and not expected.config.out_shortcut and expected.config.out_activation == "silu"
    assert {stage.activation for stage in expected.config.decoder} == {"relu"} and expected.config.force_upcast
    parts = {"model": modules["transformer"], "vae": folder}
    one = pack(parts, tmp_path / "one.safetensors")
    save_file(load_file(one), tmp_path / "lost.safetensors")
    lone = convert(folder, tmp_path / "lone.safetensors")
    again = pack({"model": one, "vae": lone}, tmp_path / "again.safetensors")
    loaded = pack({**parts, "vae": expected}, tmp_path / "loaded.safetensors")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        image = expected.decode(expected.encode(x))
        for source in (one, tmp_path / "lost.safetensors", lone, again, loaded):
            assert read_parts(source)["autoencoder"].record["force_upcast"] is True
            found = load_autoencoder(source)
            assert asdict(found.config) == asdict(expected.config)
            assert torch.equal(found.decode(found.encode(x)), image)


def test_a_record_of_another_autoencoder_is_refused(modules, tmp_path):
    record = {**modules["autoencoder"].config.record(), "decoder_activations": ["silu"]}
    save_file(modules["autoencoder"].state_dict(), tmp_path / "a.safetensors", metadata={"tim": json.dumps(record)})
    assert mentions(refused(load_autoencoder, tmp_path / "a.safetensors"), "decoder_activations", "['silu']", "4")


def test_casting_leaves_bytes_alone(one_file, tmp_path):
    half = load_file(pack(one_file, tmp_path / "half.safetensors", torch.bfloat16, vae_dtype=torch.bfloat16))
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16, torch.uint8}
    assert half["text_encoders.tokenizer_json"].numpy().tobytes() == shapes_tokenizer()
    assert load_all(tmp_path / "half.safetensors").transformer.dtype == torch.bfloat16


def test_pack_from_files_and_folders(modules, tmp_path):
    folder, vae = tmp_path / "gemma", tmp_path / "vae"
    folder.mkdir(), vae.mkdir()
    torch.save({"model": modules["transformer"].state_dict()}, tmp_path / "t2i_model.bin")
    state = {f"model.{k}": v for k, v in modules["text_encoder"].transformer.state_dict().items()}
    state["lm_head.weight"] = torch.zeros(2, 2)
    shards = {"model-1.safetensors": dict(list(state.items())[:9]), "model-2.safetensors": dict(list(state.items())[9:])}
    for name, shard in shards.items():
        save_file(shard, folder / name)
    index = {key: name for name, shard in shards.items() for key in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(GEMMA | {"model_type": "gemma3_text"}))
    (folder / "tokenizer.json").write_bytes(shapes_tokenizer())
    save_file(modules["autoencoder"].state_dict(), vae / "diffusion_pytorch_model.safetensors")

    sources = {"model": tmp_path / "t2i_model.bin", "text-encoder": folder, "vae": vae}
    loaded = load_all(pack(sources, tmp_path / "one.safetensors"))
    assert same(loaded.transformer, modules["transformer"]) and loaded.latent_factor == 8
    assert loaded.text_encoder.escape is True  # nothing says otherwise: as the released weights
    assert same(load_all(sources).text_encoder, modules["text_encoder"])
    assert "'lora'" in refused(read_parts, {"lora": "x"})
    assert f"{folder}: has no DC-AE" in refused(read_parts, {"vae": folder})


def test_folder_errors(modules, tmp_path):
    assert f"{tmp_path}: no weights" in refused(load_text_encoder, tmp_path)
    save_file(modules["text_encoder"].transformer.state_dict(), tmp_path / "model.safetensors")
    assert "tokenizer" in refused(load_text_encoder, tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(shapes_tokenizer())
    assert "config.json" in refused(load_text_encoder, tmp_path)
    assert describe(tmp_path).parts[0].architecture is None
    (tmp_path / "config.json").write_text(json.dumps(GEMMA | {"model_type": "gemma3_text"}))
    for place in (tmp_path, tmp_path / "model.safetensors"):
        assert same(load_text_encoder(place), modules["text_encoder"])
    assert load_text_encoder(tmp_path, escape=False).escape is False
    (tmp_path / "config.json").write_text("[]")
    assert "config.json" in refused(load_text_encoder, tmp_path)


def test_pack_wrapped_modules(modules, tmp_path):
    wrapped = {"transformer": torch.compile(modules["transformer"], backend="eager"), "vae": torch.nn.DataParallel(modules["autoencoder"])}
    loaded = load_all(pack(wrapped, tmp_path / "one.safetensors"))
    assert same(loaded.transformer, modules["transformer"]) and loaded.autoencoder.config.scaling_factor == 0.7
    assert mentions(refused(pack, {"model": torch.nn.Linear(2, 2)}, tmp_path / "x.safetensors"), "Linear", "TiM transformer")


def test_parts_that_do_not_fit(modules, tmp_path):
    narrow = TransitionTransformer(TransformerConfig(**{**TIM, "text_dim": 48}))
    assert "text model has width 32" in refused(pack, {**modules, "transformer": narrow}, tmp_path / "x.safetensors")
    channels = TransitionTransformer(TransformerConfig(**{**TIM, "in_channels": 32}))
    assert "16 latent channels" in refused(load_all, {**modules, "transformer": channels})


def test_a_latent_factor_that_is_not_the_autoencoders_is_refused(modules, one_file, tmp_path):
    """64x64 would be asked for, and 32x32 made."""
    tensors = load_file(one_file)
    key = "model.diffusion_model.config_json"
    tensors[key] = json_tensor({**json.loads(bytes(tensors[key].tolist())), "latent_factor": 16})
    save_file(tensors, tmp_path / "16.safetensors")
    for function in (load_all, lambda path: convert(path, tmp_path / "out.safetensors"), Pipeline.load):
        message = refused(function, tmp_path / "16.safetensors")
        assert "latent_factor is 16" in message and "autoencoder has 8" in message
    assert "latent_factor is 16" in refused(pack, modules, tmp_path / "out.safetensors", metadata={"latent_factor": 16})
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("channels, factor", [(32, 32), (4, 8), (16, 8)])
def test_latent_factor_of_a_lone_transformer(channels, factor, tmp_path):
    model = TransitionTransformer(TransformerConfig(**{**TIM, "in_channels": channels}))
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    assert read_parts(tmp_path / "a.safetensors").latent_factor == factor
    assert read_parts(pack(tmp_path / "a.safetensors", tmp_path / "b.safetensors", metadata={"latent_factor": 16})).latent_factor == 16


def test_class_conditional(tmp_path):
    config = TransformerConfig(
        4, 32, 1, 2, patch_size=2, num_classes=10, qk_norm=False, new_condition="t,r", lora_hidden_size=8, encoder_depth=1,
        positions="grid",
    )
    model = TransitionTransformer(config)
    path = pack({"transformer": model}, tmp_path / "c2i.safetensors")
    save_file(load_file(path), tmp_path / "lost.safetensors")
    for name in ("c2i.safetensors", "lost.safetensors"):
        loaded = load_all(tmp_path / name)
        assert loaded.transformer.config == config and loaded.text_encoder is None and loaded.latent_factor == 8
    assert "class-conditional" in describe(path).kind


# Writing


def test_convert(weights, modules, one_file, tmp_path):
    torch.save({"model": weights}, tmp_path / "t2i_model.bin")
    out = convert(tmp_path / "t2i_model.bin", tmp_path / "t2i.safetensors", torch.bfloat16)
    converted = load_file(out)
    assert converted.keys() == weights.keys() and {tensor.dtype for tensor in converted.values()} == {torch.bfloat16}
    check_whole(convert(one_file, tmp_path / "copy.safetensors"), modules)
    own = tmp_path / "own.safetensors"
    shutil.copy(one_file, own)
    check_whole(convert(own, own), modules)


@pytest.mark.parametrize("value, dtype", [(1e6, torch.float16), (-7e4, torch.float16), (3.4e38, torch.bfloat16)])
@pytest.mark.parametrize("function", [convert, pack])
def test_a_value_that_the_dtype_cannot_hold_names_its_tensor(value, dtype, function, weights, tmp_path):
    weights["blocks.1.mlp.fc2.bias"][3] = value
    save_file(weights, tmp_path / "large.safetensors")
    message = refused(function, tmp_path / "large.safetensors", tmp_path / "out.safetensors", dtype)
    assert "blocks.1.mlp.fc2.bias" in message and f"{value:g}"[:3] in message and "float32" in message
    assert not (tmp_path / "out.safetensors").exists()
    message = refused(load_transformer, tmp_path / "large.safetensors", dtype=dtype)
    assert "large.safetensors" in message and "blocks.1.mlp.fc2.bias" in message


def test_values_that_are_infinite_already_are_kept(weights, tmp_path):
    weights["blocks.1.mlp.fc2.bias"][3] = torch.inf
    save_file(weights, tmp_path / "a.safetensors")
    half = load_file(convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", torch.float16))
    assert half["blocks.1.mlp.fc2.bias"][3] == torch.inf


def test_tensors_that_convert_leaves_out_are_named(one_file, tmp_path, caplog):
    save_file({**load_file(one_file), "extra.adapter.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    assert "extra.adapter.weight" not in load_file(convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors"))
    assert "a.safetensors" in caplog.text and "extra.adapter.weight" in caplog.text
    assert "other tensors: 1 (extra.adapter.weight)" in str(describe(tmp_path / "a.safetensors"))
    caplog.clear()
    convert(one_file, tmp_path / "c.safetensors")
    assert not caplog.text and "other tensors" not in str(describe(one_file))


@pytest.mark.parametrize("command", ["convert", "pack"])
def test_a_replaced_file_is_said(command, one_file, tmp_path, caplog):
    from tim_core.cli import main

    arguments = [str(one_file)] if command == "convert" else ["--model", str(one_file)]
    assert main([command, *arguments, str(tmp_path / "a.safetensors")]) == 0 and not caplog.text
    assert main([command, *arguments, str(tmp_path / "a.safetensors")]) == 0
    assert "a.safetensors" in caplog.text and "replacing" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_failed_write_leaves_nothing(one_file, tmp_path):
    """The system refuses a part of the file, as it does on a full disk."""
    import resource

    good = tmp_path / "good.safetensors"
    good.write_bytes(b"kept")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (one_file.stat().st_size // 2, hard))
    try:
        message = refused(pack, one_file, good)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert mentions(message, "good.safetensors", "cannot be written", os.strerror(errno.EFBIG))
    assert good.read_bytes() == b"kept" and [file.name for file in tmp_path.iterdir()] == ["good.safetensors"]


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "note.txt"
    atomic_write(path, lambda tmp: tmp.write_text("first"))

    def interrupted(tmp):
        tmp.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, interrupted)
    assert path.read_text() == "first" and [file.name for file in tmp_path.iterdir()] == ["note.txt"]
    for place in (tmp_path / "nowhere" / "x", path / "x", tmp_path / ("x" * 256)):
        assert str(place)[:150] in refused(atomic_write, place, lambda tmp: tmp.write_text("x"))
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / ("n" * 250)

    def slow(tmp):
        tmp.write_text("slow")
        atomic_write(path, lambda other: other.write_text("quick"))
        assert path.read_text() == "quick" and tmp.read_text() == "slow"

    atomic_write(path, slow)
    assert path.read_text() == "slow" and list(tmp_path.iterdir()) == [path]


WRITER = """
import os, sys, time
from tim_core.files import atomic_write
path, what = sys.argv[1:]
if what == "die":
    atomic_write(path, lambda tmp: (tmp.write_text("half"), os.kill(os.getpid(), 9)))
for _ in range(200):
    atomic_write(path, lambda tmp: tmp.write_text(what * 1000))
"""


@pytest.mark.skipif(os.name != "posix", reason="kill and locks of POSIX")
def test_writers_in_many_processes(tmp_path):
    """They never fail, nobody reads a mixture, and what a killed one left is removed by a later one."""
    path, environment = tmp_path / "report.json", {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", WRITER, str(path)]
    assert subprocess.run([*command, "die"], env=environment).returncode == -9
    (left,) = tmp_path.iterdir()
    os.utime(left, (0, 0))
    writers = [subprocess.Popen([*command, letter], env=environment) for letter in "abc"]
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            assert path.read_text() in ("a" * 1000, "b" * 1000, "c" * 1000)
    assert [writer.returncode for writer in writers] == [0, 0, 0] and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_new_file_has_the_usual_permissions(one_file, tmp_path):
    (tmp_path / "plain").touch()
    mode = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert stat.S_IMODE(convert(one_file, tmp_path / "copy.safetensors").stat().st_mode) == mode


def test_destinations(one_file, tmp_path):
    assert "folder" in refused(pack, one_file, tmp_path)
    assert ".safetensors" in refused(pack, one_file, tmp_path / "x.bin")
    assert f"{tmp_path / 'nowhere'} does not exist" in refused(pack, one_file, tmp_path / "nowhere" / "x.safetensors")


# Describing


def test_describe(one_file, modules):
    description = describe(one_file)
    assert description.kind == "TiM checkpoint, text-to-image" and description.latent_factor == 8 and description.tokenizer
    transformer = description.parts[0]
    count = sum(p.numel() for name, p in modules["transformer"].named_parameters() if not name.startswith("projector."))
    assert transformer.parameters == count and {name: one.parameters for name, one in transformer.dtypes.items()} == {"float32": count}
    assert transformer.architecture.num_heads == 2
    text = str(description)
    assert f"{count:,} parameters" in text and "factor 8" in text and "not escaped" in text


def test_describe_counts_the_projector_apart(weights, tmp_path):
    save_file(weights, tmp_path / "a.safetensors")
    part = describe(tmp_path / "a.safetensors").parts[0]
    assert part.projector_parameters == sum(v.numel() for k, v in weights.items() if k.startswith("projector."))
    assert part.parameters + part.projector_parameters == sum(v.numel() for v in weights.values())


def test_bundled_names(tmp_path, monkeypatch):
    assert "tim-shapes" in refused(resolve, "tim-shape")
    for call in (resolve, lambda name: convert(name, tmp_path / "a.safetensors")):
        assert "no such file" in refused(call, "a" * 300)
    monkeypatch.setitem(BUNDLED, "tim-shapes", tmp_path / "absent.safetensors")
    assert "bundled" in refused(resolve, "tim-shapes")
    (tmp_path / "absent.safetensors").write_bytes(b"x")
    assert resolve("tim-shapes") == tmp_path / "absent.safetensors"
    assert isinstance(read_parts(Parts("x")), Parts)


def test_a_record_in_the_tensors_goes_before_the_metadata_and_that_before_a_file_beside(modules, tmp_path):
    """The same order for every part."""
    def written(name, embedded=None, metadata=None, beside=None):
        folder = tmp_path / name
        folder.mkdir()
        tensors = dict(modules["autoencoder"].state_dict())
        if embedded:
            tensors["config_json"] = json_tensor(embedded)
        save_file(tensors, folder / "vae.safetensors", metadata={"tim": json.dumps(metadata)} if metadata else None)
        if beside:
            (folder / "config.json").write_text(json.dumps(beside))
        return folder / "vae.safetensors"

    stages = {"block_out_channels": [8, 8, 16, 16], "block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"],
              "layers_per_block": [1] * 4, "qkv_multiscales": [[], [], [], [5]]}
    diffusers = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in stages.items()}
    diffusers |= {"latent_channels": 16, "attention_head_dim": 8, "scaling_factor": 0.1}
    two, three = {"scaling_factor": 0.2}, {"scaling_factor": 0.3}
    assert load_autoencoder(written("a", None, None, diffusers)).config.scaling_factor == 0.1
    assert load_autoencoder(written("b", None, two, diffusers)).config.scaling_factor == 0.2
    assert load_autoencoder(written("c", three, two, diffusers)).config.scaling_factor == 0.3
    gemma, folder = modules["text_encoder"].transformer.state_dict(), tmp_path / "text"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**GEMMA, "model_type": "gemma3_text", "sliding_window": 1}))
    for number, embedded in enumerate([None, {**GEMMA, "escape_prompts": True}]):
        tensors = {**gemma, **({"config_json": json_tensor(embedded)} if embedded else {})}
        save_file(tensors, folder / f"{number}.safetensors", metadata={"tim": '{"escape_prompts": false}'})
        parts = read_parts(folder / f"{number}.safetensors")
        assert parts.escape is bool(embedded) and parts["text_encoder"].config["sliding_window"] == (512 if embedded else 1)
    for number, (embedded, metadata) in enumerate([(None, {"latent_factor": 4}), ({"latent_factor": 2}, {"latent_factor": 4})]):
        tensors = {**modules["transformer"].state_dict(), **({"config_json": json_tensor(embedded)} if embedded else {})}
        save_file(tensors, tmp_path / f"{number}.safetensors", metadata={"tim": json.dumps(metadata)})
        assert read_parts(tmp_path / f"{number}.safetensors").latent_factor == (2 if embedded else 4)


ESCAPE = "\x1b[31m\x07\u202e\n"
HOSTILE = {
    "another model's key": lambda w: {f"{ESCAPE}.weight": torch.zeros(1)},
    "a long key": lambda w: {"k" * 2**20: torch.zeros(1)},
    "the prefix": lambda w: {f"{ESCAPE}.{name}": value for name, value in w.items()},
    "a long prefix": lambda w: {f"{'p' * 2**14}.{name}": value for name, value in w.items()},
    "an unknown name": lambda w: {**w, f"blocks.0.{ESCAPE}": torch.zeros(1)},
    "an unknown long name": lambda w: {**w, f"blocks.0.{'k' * 2**20}": torch.zeros(1)},
}


@pytest.mark.parametrize("key", HOSTILE)
@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
def test_keys_do_not_reach_the_terminal_raw(key, ending, weights, tmp_path, capsys):
    from tim_core.cli import main

    tensors, path = HOSTILE[key](weights), tmp_path / f"hostile{ending}"
    torch.save(tensors, path) if ending == ".bin" else save_file(tensors, path)
    if "prefix" not in key:
        message = refused(load_transformer, path)
        assert message.isprintable() and str(path) in message and len(message) < 3000
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.replace("\n", "").isprintable() and len(shown) < 10000


def test_a_record_does_not_reach_the_terminal_raw(weights, tmp_path):
    record = {"training": {"step": ESCAPE, "configuration": {ESCAPE: ESCAPE, "long": "x" * 2**20}, "changed": {ESCAPE: {ESCAPE: 1}}}}
    save_file(weights, tmp_path / "a.safetensors", metadata={"tim": json.dumps(record)})
    shown = str(describe(tmp_path / "a.safetensors"))
    assert shown.replace("\n", "").isprintable() and len(shown) < 10000


BAD_PREVIEWS = [
    [], "x", {}, {"factors": [[0, 0, 0]] * 3, "bias": [0, 0, 0], "r2": 0.5}, {"factors": [[0, 0]] * 16, "bias": [0, 0], "r2": 0.5},
    {"factors": [["a", 0, 0]] * 16, "bias": [0, 0, 0], "r2": 0.5}, {"factors": [[0, 0, 0]] * 16, "bias": [0, 0, float("nan")], "r2": 0.5},
    {"factors": [[0, 0, 0]] * 16, "bias": [0, 0, 0]}, {"factors": [[0, 0, 0]] * 16, "bias": [0, 0, 0], "r2": "best"},
]


@pytest.mark.parametrize("preview", BAD_PREVIEWS, ids=str)
def test_a_malformed_preview_is_ignored_and_said(preview, one_file, tmp_path, caplog):
    tensors = load_file(one_file)
    key = "model.diffusion_model.config_json"
    tensors[key] = json_tensor({**json.loads(bytes(tensors[key].tolist())), "preview": preview})
    save_file(tensors, tmp_path / "a.safetensors")
    assert "preview" not in read_parts(tmp_path / "a.safetensors")["transformer"].record
    assert "a.safetensors" in caplog.text and "preview" in caplog.text
    assert "live previews" not in str(describe(tmp_path / "a.safetensors"))


def test_errors_of_other_libraries_and_log_lines_do_not_reach_the_terminal_raw(monkeypatch, tmp_path, capsys):
    """A name with escape codes, in an error that is not ours, and in a warning."""
    import logging

    from tim_core.cli import main
    from tim_core.cli.failures import LogLine

    def broken(path):
        raise KeyError(f"{ESCAPE}{'k' * 2**20}\x1b[2J")

    monkeypatch.setattr("tim_core.weights.describe.read_parts", broken)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.strip().isprintable() and len(said) < 3000
    record = logging.makeLogRecord({"msg": "%s: skipped", "args": (ESCAPE + "x" * 2**20,)})
    line = LogLine().format(record)
    assert line.startswith("tim: ") and line.isprintable() and len(line) < 3000


# What a careless hand leaves


@pytest.mark.parametrize("stray", ["{not JSON", "[1, 2]", '{"text_config": 3}', '{"model_type": "llama"}'])
def test_a_stray_config_beside_a_whole_file_is_not_read(stray, one_file, tmp_path):
    path = shutil.copy(one_file, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(stray)
    assert load_all(path).text_encoder is not None


def test_a_broken_config_that_is_needed_is_named(modules, tmp_path):
    save_file(modules["text_encoder"].transformer.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{not JSON")
    assert "config.json" in refused(load_text_encoder, tmp_path / "model.safetensors")


@pytest.mark.parametrize("part", ["transformer", "autoencoder", "text_encoder"])
def test_whole_numbers_are_no_weights(part, one_file, tmp_path):
    load = {"transformer": load_transformer, "autoencoder": load_autoencoder, "text_encoder": load_text_encoder}[part]
    prefix = {"transformer": "model.diffusion_model.", "autoencoder": "vae.", "text_encoder": "text_encoders.transformer."}[part]
    tensors = load_file(one_file)
    key = next(key for key in tensors if key.startswith(prefix) and key.endswith("norm.weight") or key == prefix + "x_embedder.proj.bias")
    with safe_open(one_file, "pt") as file:
        save_file({**tensors, key: tensors[key].to(torch.int8)}, tmp_path / "int8.safetensors", metadata=file.metadata())
    message = refused(load, tmp_path / "int8.safetensors")
    assert "int8.safetensors" in message and "integers instead of floats in " + key.removeprefix(prefix) in message


@pytest.mark.parametrize("form", ['"two"', "[1]", "99"])
def test_an_unknown_format_is_refused(form, weights, tmp_path):
    save_file(weights, tmp_path / "new.safetensors", metadata={"tim": f'{{"format": {form}}}'})
    assert "checkpoint format" in refused(load_transformer, tmp_path / "new.safetensors")


@pytest.mark.parametrize("harm, said", [
    (lambda w: w.pop("blocks.1.mlp.fc1_g.weight"), "missing blocks.1.mlp.fc1_g.weight"),
    (lambda w: w.update({"blocks.1.spare": torch.zeros(2)}), "unknown blocks.1.spare"),
    (lambda w: w.update({"blocks.1.mlp.fc1_g.bias": torch.zeros(3)}), "wrong shape of blocks.1.mlp.fc1_g.bias"),
    (lambda w: w.update({"blocks.1.mlp.fc1_g.bias": torch.zeros(85).int()}), "integers instead of floats in blocks.1.mlp.fc1_g.bias"),
])
def test_inspection_says_what_does_not_load(harm, said, weights, tmp_path):
    save_file(weights, tmp_path / "whole.safetensors")
    assert "does not load" not in str(describe(tmp_path / "whole.safetensors"))
    harm(weights)
    save_file(weights, tmp_path / "harmed.safetensors")
    assert mentions(str(describe(tmp_path / "harmed.safetensors")), "does not load", said)


def test_heads_that_no_shape_tells_are_asked_for(weights, tmp_path):
    bare = {key: tensor for key, tensor in weights.items() if "q_norm" not in key and "k_norm" not in key}
    save_file(bare, tmp_path / "bare.safetensors")
    assert "num_heads" in refused(load_transformer, tmp_path / "bare.safetensors")
    save_file(bare, tmp_path / "said.safetensors", metadata={"tim": '{"num_heads": 2}'})
    assert load_transformer(tmp_path / "said.safetensors").config.num_heads == 2


RECORDS = {
    "transformer": [
        {"latent_factor": "abc"}, {"latent_factor": -8}, {"latent_factor": 3.7}, {"latent_factor": 10**9}, {"escape_prompts": "false"},
        {"null_class": "no"}, {"num_heads": 0}, {"num_heads": 2.0}, {"new_condition": 5}, {"encoder_depth": "x"},
        {"native_size": [10**9, 8]}, {"native_size": 64}, {"steps": 10**9}, {"steps": 0}, {"cfg": 1e20}, {"cfg": -1}, {"cfg": float("nan")},
        {"cfg": 0.5}, {"guidance_interval": [1, 0]}, {"guidance_interval": [1, 2]}, {"strength": 0}, {"strength": 1.5},
        {"strength": "half"},
    ],
    "autoencoder": [
        {"scaling_factor": 0}, {"scaling_factor": "x"}, {"scaling_factor": 1e-300}, {"scaling_factor": 1e300},
        {"scaling_factor": float("nan")},
        {"scaling_factor": True}, {"out_activation": "sing"}, {"head_dim": 0}, {"head_dim": 10**30}, {"encoder_activations": 5},
        {"encoder_activations": ["relu"]}, {"in_shortcut": "no"}, {"force_upcast": "false"},
    ],
    "text_encoder": [
        {"hidden_size": "x"}, {"rope_scaling": "x"}, {"rms_norm_eps": -1}, {"rms_norm_eps": 0}, {"rms_norm_eps": 1e30},
        {"rms_norm_eps": float("nan")}, {"rms_norm_eps": "x"}, {"query_pre_attn_scalar": 0}, {"query_pre_attn_scalar": -1},
        {"num_hidden_layers": 10**9}, {"num_hidden_layers": 500}, {"num_hidden_layers": -1}, {"num_hidden_layers": 1.5},
        {"head_dim": 10**10},
        {"head_dim": 2**28}, {"head_dim": 0}, {"vocab_size": 10**12}, {"vocab_size": 5}, {"hidden_size": 2**30},
        {"intermediate_size": 2**30},
        {"num_attention_heads": 7}, {"num_key_value_heads": 10**6}, {"num_key_value_heads": 0}, {"sliding_window": -1},
        {"layer_types": ["full_attention"]}, {"layer_types": ["x", "y"]}, {"layer_types": 5}, {"use_bidirectional_attention": True},
        {"rope_parameters": {"full_attention": {"rope_theta": 0}}}, {"rope_parameters": {"full_attention": {"rope_theta": float("inf")}}},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 0}}}, {"rope_parameters": [1]},
        {"hidden_activation": "sing"}, {"pad_token_id": 10**6},
    ],
}


@pytest.mark.parametrize("part, record", [(part, record) for part, records in RECORDS.items() for record in records], ids=str)
def test_records_that_make_no_sense_are_refused(part, record, one_file, tmp_path):
    """In one line that names the file, when it is loaded and when it is looked at; the files beside it are still described."""
    tensors, path = load_file(one_file), tmp_path / "odd.safetensors"
    key = CONFIG_KEYS[part]
    tensors[key] = json_tensor({**json.loads(bytes(tensors[key].tolist())), **record})
    save_file(tensors, path)
    message = refused(lambda source: (load_all(source), Pipeline.load(source)), path)
    assert "odd.safetensors" in message or next(iter(record)) in message
    from tim_core.cli import main

    assert main(["inspect", str(path), str(one_file)]) in (0, 1)


COUNTS = [
    ("vae.encoder.down_blocks.1000000000.0.conv1.weight", "stages"), ("vae.decoder.up_blocks.1000000000.0.conv1.weight", "stages"),
    ("vae.encoder.down_blocks.0.1000000000.conv1.weight", "not a complete DC-AE"),
    (f"vae.encoder.down_blocks.{'9' * 5000}.0.conv1.weight", "stage"),
    ("model.diffusion_model.blocks.1000000000.attn.qkv.weight", "blocks"),
    (f"model.diffusion_model.blocks.{'9' * 5000}.x.weight", "blocks"),
    ("text_encoders.transformer.layers.1000000000.mlp.up_proj.weight", "num_hidden_layers"),
    ("vae.encoder.down_blocks.-7.0.x.weight", "stage"),
]


@pytest.mark.parametrize("key, said", COUNTS, ids=[key[:60] for key, _ in COUNTS])
def test_counts_are_bounded_by_the_tensors_that_are_there(key, said, one_file, tmp_path):
    """With the Gemma config, and without it, where the counts are read from the names."""
    with safe_open(one_file, "pt") as file:
        save_file({**load_file(one_file), key: torch.zeros(2, 2)}, tmp_path / "odd.safetensors", metadata=file.metadata())
    message = refused(load_all, tmp_path / "odd.safetensors")
    assert "odd.safetensors" in message and said in message and len(message) < 1000
    from tim_core.cli import main

    assert main(["inspect", str(tmp_path / "odd.safetensors")]) in (0, 1)


def test_layers_of_a_gemma_without_config_are_counted_by_its_tensors(tmp_path):
    wide = {"embed_tokens.weight": (300, 1152), "layers.0.self_attn.q_norm.weight": (256,),
            "layers.0.self_attn.q_proj.weight": (1024, 1152), "layers.0.self_attn.k_proj.weight": (256, 1152),
            "layers.0.mlp.gate_proj.weight": (8, 1152), "norm.weight": (1152,),
            "layers.0.pre_feedforward_layernorm.weight": (1152,), "layers.1000000000.mlp.up_proj.weight": (8, 1152)}
    save_file({name: torch.zeros(shape) for name, shape in wide.items()}, tmp_path / "a.safetensors")
    (tmp_path / "tokenizer.json").write_bytes(shapes_tokenizer())
    assert "num_hidden_layers" in refused(load_text_encoder, tmp_path / "a.safetensors")


@pytest.mark.parametrize("shape", [(10**12, 0), (0, 10**12), (0,), (2**40, 0, 1, 1)], ids=str)
@pytest.mark.parametrize("key", ["vae.encoder.conv_out.weight", "model.diffusion_model.x_embedder.proj.weight",
                                 "model.diffusion_model.final_layer.linear.weight", "text_encoders.transformer.embed_tokens.weight"])
def test_tensors_of_no_bytes_and_any_shape_are_refused(key, shape, one_file, tmp_path):
    save_file({**load_file(one_file), key: torch.zeros(shape)}, tmp_path / "empty.safetensors")
    assert "empty.safetensors" in refused(load_all, tmp_path / "empty.safetensors")


@pytest.mark.parametrize("key", ["encoder.down_blocks.x.0.conv1.weight", "encoder.conv_out.weight"])
def test_broken_autoencoders_are_refused(key, modules, tmp_path):
    tensors = {**modules["autoencoder"].state_dict(), key: torch.zeros(())}
    save_file(tensors, tmp_path / "broken.safetensors")
    assert "broken.safetensors" in refused(load_autoencoder, tmp_path / "broken.safetensors")


def test_another_models_config_beside_an_autoencoder_is_not_read(modules, tmp_path):
    save_file(modules["autoencoder"].state_dict(), tmp_path / "vae.safetensors", metadata=None)
    before = load_autoencoder(tmp_path / "vae.safetensors").config
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "attention_head_dim": 8, "block_out_channels": [320]}')
    assert load_autoencoder(tmp_path / "vae.safetensors").config == before


def test_moments_and_counters_are_not_weights(weights, modules, tmp_path):
    zeros = {key: torch.zeros_like(value) for key, value in weights.items()}
    torch.save({"model_state": {**weights, "step": torch.tensor(3)}, "exp_avg": zeros}, tmp_path / "a.pt")
    torch.save({"ema": {**weights, "decay": torch.tensor(0.9)}}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        assert same(load_transformer(tmp_path / name), modules["transformer"])


def test_half_a_projector_is_dropped(weights, modules, tmp_path):
    del weights["projector.4.weight"]
    save_file(weights, tmp_path / "half.safetensors")
    assert same(load_transformer(tmp_path / "half.safetensors"), modules["transformer"])
    assert "does not load" not in str(describe(tmp_path / "half.safetensors"))


def test_a_released_bin_file_is_found_in_its_folder(weights, modules, tmp_path):
    """`tim download t2i --to FOLDER` saves FOLDER/transformer/t2i_model.bin. A safetensors file beside it is preferred."""
    torch.save(weights, tmp_path / "t2i_model.bin")
    assert same(load_transformer(tmp_path), modules["transformer"])
    save_file({key: torch.zeros_like(value) for key, value in weights.items()}, tmp_path / "t2i_model.safetensors")
    assert not load_transformer(tmp_path).x_embedder.proj.weight.any()


def test_several_files_in_a_folder_are_not_guessed_among(weights, tmp_path):
    for name in ("b", "a"):
        save_file(weights, tmp_path / f"{name}.safetensors")
    assert "2 weight files" in refused(load_transformer, tmp_path)
