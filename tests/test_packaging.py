"""What is installed: tim_core with the bundled model, the command `tim`, and nothing called `nodes`."""

import ast
import asyncio
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tim_core

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
SETTINGS = {"settings.py", "shapes/config.py", "training/config.py", "training/resume.py", "training/shapes_config.py"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as pip builds it, from a copy: the tree stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".git", "build", "dist", "*.egg-info", "__pycache__", ".venv", "reference")
    shutil.copytree(ROOT, folder / "tree", ignore=left_out)
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=folder / "tree", check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        yield archive


def read(archive: zipfile.ZipFile, ending: str) -> str:
    return archive.read(next(name for name in archive.namelist() if name.endswith(ending))).decode()


def test_the_wheel_holds_tim_core_and_the_model_only(wheel):
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names} == {"tim_core", f"transition_models-{tim_core.__version__}.dist-info"}
    for source in (ROOT / "tim_core").rglob("*.py"):
        assert source.relative_to(ROOT).as_posix() in names
    assert {"tim_core/bundled/tim-shapes.safetensors", "tim_core/py.typed"} <= set(names)


def test_its_metadata(wheel):
    metadata = read(wheel, "/METADATA")
    fields = dict(line.split(": ", 1) for line in metadata.split("\n\n")[0].splitlines() if ": " in line)
    assert (fields["Name"], fields["Version"], fields["License-Expression"]) == ("transition-models", tim_core.__version__, "Apache-2.0")
    needed = re.findall(r"Requires-Dist: ([\w.-]+)([^;\n]*)(;.*)?", metadata)
    plain = {name.lower(): version for name, version, extra in needed if not extra}
    assert plain["torch"] == ">=2.7" and set(plain) <= {
        "torch", "numpy", "safetensors", "transformers", "tokenizers", "pillow", "pyyaml", "scipy", "tqdm"}  # what ComfyUI installs too
    assert set(re.findall(r"Provides-Extra: (\w+)", metadata)) == {"train", "flash", "test", "dev"}
    assert "tim = tim_core.cli:main" in read(wheel, "/entry_points.txt")
    assert "Apache License" in read(wheel, "/LICENSE")


def test_run_time_imports_are_declared_or_optional():
    """At module level tim_core imports the standard library, its own modules (relatively) and declared dependencies.

    pydantic, of the extra `train`, is for the files of SETTINGS; test_layers.py holds that inference does not load it.
    """
    declared = {"torch", "numpy", "safetensors", "transformers", "tokenizers", "PIL", "yaml", "scipy", "tqdm"}
    for source in (ROOT / "tim_core").rglob("*.py"):
        extra = {"pydantic", "pydantic_core"} if source.relative_to(ROOT / "tim_core").as_posix() in SETTINGS else set()
        allowed = set(sys.stdlib_module_names) | declared | extra
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert all(name.split(".")[0] in allowed for name in names), f"{source}: {names}"


def test_only_the_adapters_touch_core():
    files = sorted((ROOT / "nodes").rglob("*.py"))
    core = {file: imported(file) & {"comfy", "folder_paths", "latent_preview", "nodes", "torch"} for file in files}
    adapters = {file for file in files if "adapters" in file.relative_to(ROOT).parts}
    assert any(core[file] for file in adapters) and set(files) - adapters
    assert {file.name: core[file] for file in set(files) - adapters if core[file]} == {}


def imported(file: Path) -> set[str]:
    """The top-level names of a file's absolute imports."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names}


def test_nodes_that_cannot_be_loaded_are_one_line(tmp_path, caplog):
    """As in a ComfyUI that is too old for what they import."""
    (tmp_path / "pack_of_tim").mkdir()
    shutil.copyfile(ROOT / "__init__.py", tmp_path / "pack_of_tim" / "__init__.py")
    (tmp_path / "pack_of_tim" / "nodes.py").write_text("raise ImportError('no comfy_api.latest')")
    spec = importlib.util.spec_from_file_location("pack_of_tim", tmp_path / "pack_of_tim" / "__init__.py", submodule_search_locations=[
        str(tmp_path / "pack_of_tim")])
    pack = sys.modules["pack_of_tim"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(pack)
        with pytest.raises(ImportError):
            asyncio.run(pack.comfy_entrypoint())
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "pack_of_tim"]:
            del sys.modules[name]
    (record,) = [record for record in caplog.records if record.levelname != "DEBUG"]
    assert "no comfy_api.latest" in record.getMessage() and "0.3.64" in record.getMessage() and record.exc_info is None


def test_node_ids_can_be_read_without_running_the_nodes():
    """The Manager's scanner looks for Schema(node_id="...")."""
    found = []
    for file in (ROOT / "nodes").glob("*.py"):
        for call in (part for part in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(part, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id == "Schema":
                found += [word.value.value for word in call.keywords if word.arg == "node_id"]
    assert len(found) == len(set(found)) == 12 and all(name.startswith("TiM") for name in found)


def test_ci_runs_the_readmes_commands():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) or os.name == "nt"
    text, readme = script.read_text(encoding="utf-8"), (ROOT / "README.md").read_text(encoding="utf-8")
    assert 'pip install ".[test]" && pytest' in readme
    assert text.index("torch==2.13.0") < text.index('".[test]"') < text.index("\nruff check .") < text.index("\npytest")


def test_one_ruff_version():
    """CI, pre-commit and the extra `dev` pin the same release."""
    pins = {
        name: re.search(pattern, (ROOT / name).read_text(encoding="utf-8")).group(1)
        for name, pattern in {
            ".ci/run": r"ruff==([\d.]+)", "pyproject.toml": r'"ruff==([\d.]+)"', ".pre-commit-config.yaml": r"rev: v([\d.]+)",
            ".github/workflows/tests.yml": r"ruff==([\d.]+)",
        }.items()
    }
    assert len(set(pins.values())) == 1, pins
