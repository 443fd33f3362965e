"""comfy-cli, as the registry runs it: the pack is valid, and its archive holds what users need."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.comfy_graph import Template, same_image
from tests.comfy_support import ROOT
from tim_core.images import to_tensor

MISSING = "no comfy-cli found (`pip install comfy-cli` gets it)"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("comfy_cli") is None, reason=MISSING)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")  # comfy-cli keeps settings in it


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The tree as a repository of its own, its files the tracked ones: what a publisher packs."""
    folder = tmp_path_factory.mktemp("tree")
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.run(words, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    for words in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def comfy(*words: str, home: Path, folder: Path) -> str:
    """Runs comfy-cli -> everything it said; fails unless it exits with 0."""
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", *words]
    environment = {**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home), "USERPROFILE": str(home), "COLUMNS": "200"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


@pytest.mark.comfyui
def test_run_a_workflow(comfyui, home, tree):
    workflow = tree / "workflows" / "text-to-image.json"
    before = set((comfyui.base / "output").iterdir())
    # under a name of its own: core saves nothing anew where a test before has run the same
    workflow.with_name("run.json").write_text(workflow.read_text(encoding="utf-8").replace('"TiM"', '"comfy-run"'), encoding="utf-8")
    where = ("--host", "127.0.0.1", "--port", str(comfyui.port))
    comfy("run", "--workflow", "workflows/run.json", *where, "--wait", home=home, folder=tree)
    made = set((comfyui.base / "output").iterdir()) - before
    assert len(made) == 1
    (expected,) = Template(comfyui, "text-to-image").pictures.values()
    with Image.open(made.pop()) as image:
        same_image(expected, to_tensor(image))


def test_node_validate(home, tree):
    said = comfy("node", "validate", home=home, folder=tree)
    assert "All validation checks passed" in said and "warning" not in said.lower()


def test_node_pack(home, tree):
    comfy("node", "pack", home=home, folder=tree)
    names = zipfile.ZipFile(tree / "node.zip").namelist()
    rooms = {name.split("/")[0] for name in names}
    assert not rooms & {"tests", "benchmarks", ".ci", ".github"}
    wanted = [ROOT / name for name in ("__init__.py", "pyproject.toml", "README.md", "LICENSE")]
    for room in ("nodes", "tim_core", "workflows", "locales", "web", "docs", "configs"):
        wanted += [file for file in (ROOT / room).rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    wanted = [file for file in wanted if file.parent != ROOT / "docs" or file.suffix != ".py"]  # makes the images, for developers
    assert {file.relative_to(ROOT).as_posix() for file in wanted} <= set(names)


def test_images_of_the_registry():
    """Icon: square, at most 400 a side. Banner: 21:9. Their addresses end at files of this repository."""
    import tomlkit  # comfy-cli's

    project = tomlkit.parse((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for name, fits in (("Icon", lambda w, h: w == h <= 400), ("Banner", lambda w, h: 9 * w == 21 * h)):
        address = project["tool"]["comfy"][name]
        raw = project["project"]["urls"]["Repository"].replace("https://github.com", "https://raw.githubusercontent.com") + "/main/"
        assert address.startswith(raw)
        with Image.open(ROOT / address.removeprefix(raw)) as image:
            assert fits(*image.size), image.size
