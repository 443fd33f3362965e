"""What a run writes: complete files, or one line that names the file."""

import os
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import mentions
from tests.test_training import autoencoder_yaml
from tim_core.errors import TimError
from tim_core.training import metrics, run, writing

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
TENSORS = {"a": torch.randn(10_000)}
WRITERS = {
    "step-00000002.pt": lambda path: writing.write_state(path, TENSORS),
    "lora.safetensors": lambda path: writing.write_tensors(path, TENSORS),
    "sample-00000002.png": lambda path: writing.write_image(path, IMAGE),
}


@contextmanager
def full_disk(size: int):
    """No file grows beyond `size` bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_that_names_the_file(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"before")
    with full_disk(4096), pytest.raises(TimError) as error:
        WRITERS[name](path)
    assert mentions(str(error.value), path, "cannot be written") and "inline_container" not in str(error.value)
    assert os.listdir(tmp_path) == [name] and path.read_bytes() == b"before"
    WRITERS[name](path)
    assert path.stat().st_size > 4096


def test_a_full_disk_stops_metrics_with_one_line(tmp_path):
    with full_disk(40), pytest.raises(TimError) as error:
        for step in range(20):
            metrics.log(tmp_path, {"step": step, "loss": 0.5})
    assert mentions(str(error.value), tmp_path / "metrics.csv", "cannot be written")


def test_a_full_disk_stops_a_run_with_one_line(tmp_path):
    config, folder = autoencoder_yaml(tmp_path), tmp_path / "autoencoder"
    with full_disk(30_000), pytest.raises(TimError) as error:
        run([config])
    assert mentions(str(error.value), folder / "step-00000002.pt", "cannot be written") and os.listdir(folder) == ["metrics.csv"]


def test_a_sample_image_appears_complete(tmp_path, monkeypatch):
    """Killed while it is written, the file is not there under its name."""
    def dies(self, file, *args, **more):
        with open(file, "wb") as half:
            half.write(b"half of an image")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            run([autoencoder_yaml(tmp_path)])
    assert not list((tmp_path / "autoencoder").glob("sample-*"))


def test_a_foreign_metrics_file_is_named(tmp_path):
    path = tmp_path / "autoencoder" / "metrics.csv"
    path.parent.mkdir()
    for content in (b"name,grade\nx,1\n", b"step,loss,step\n1,2,3\n", b"\xff\xfe\0step", b'step,"' + b"x" * 200_000):
        path.write_bytes(content)
        with pytest.raises(TimError) as error:
            run([autoencoder_yaml(tmp_path)])
        assert mentions(str(error.value), path, "metrics", "another output") and path.read_bytes() == content
