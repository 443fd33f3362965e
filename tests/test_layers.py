"""Which room of the tree may import which; read from the imports, those inside functions among them."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# what a room may import of tim_core besides itself; a file at the top of tim_core is a room of its own
FLOOR = {"errors", "files", "finite", "limits", "memory"}
INFERENCE = FLOOR | {
    "models", "weights", "sampler", "schedule", "transport", "upscale", "pipeline", "images", "imagenet", "processes", "ranges",
    "codec", "conditions", "devices", "prompts",
}
MAY_IMPORT = {
    "errors": set(), "files": {"errors"}, "finite": {"errors"}, "memory": set(), "limits": {"errors"}, "imagenet": FLOOR,
    "ranges": FLOOR, "prompts": {"errors"},
    "images": FLOOR, "schedule": FLOOR, "transport": FLOOR, "processes": FLOOR,
    "sampler": FLOOR | {"transport"}, "upscale": FLOOR | {"images", "ranges", "schedule"}, "models": FLOOR,
    "weights": FLOOR | {"images", "models"},
    "codec": FLOOR | {"models"}, "conditions": FLOOR | {"imagenet", "models", "sampler"}, "devices": FLOOR | {"weights"},
    "pipeline": INFERENCE - {"images", "processes"},
    "settings": {"errors"}, "shapes": FLOOR | {"processes", "settings"},
    "evaluation": FLOOR | {"images", "processes", "ranges", "sampler", "shapes"},
    "training": INFERENCE - {"pipeline"} | {"settings", "shapes"},
    "__init__": {"errors", "pipeline"}, "__main__": {"cli"}, "cli": INFERENCE | {"__init__", "training", "evaluation", "shapes"},
}


def imports(file: Path) -> set[str]:
    """The modules, dotted from the root of the repository, that a file imports relatively."""
    package = file.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import) or not getattr(node, "level", 1):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == "tim_core" for name in names), f"{file}: import tim_core relatively"
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            found |= {".".join([*base, name.name]) for name in node.names}
    return found


def room(dotted: str) -> str:
    name = dotted.split(".")[1]
    return name if any((ROOT / "tim_core" / f"{name}{ending}").exists() for ending in ("", ".py")) else "__init__"


@pytest.mark.parametrize("file", sorted((ROOT / "tim_core").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_room_imports_only_what_lies_below(file):
    own = file.relative_to(ROOT / "tim_core").parts[0].removesuffix(".py")
    found = {room(name) for name in imports(file)} - {own}
    assert found <= MAY_IMPORT[own], f"{own} imports {sorted(found - MAY_IMPORT[own])}"
    assert all(name.startswith("tim_core.") for name in imports(file))


def test_nodes_import_the_inference_rooms_alone():
    files = list((ROOT / "nodes").rglob("*.py"))
    found = {room(name) for file in files for name in imports(file) if name.startswith("tim_core.")}
    assert files and found and found <= INFERENCE - {"codec", "conditions", "devices", "pipeline", "processes"}


def test_adapters_import_no_node_file():
    for file in (ROOT / "nodes" / "adapters").glob("*.py"):
        assert all(name.startswith(("tim_core.", "nodes.adapters.")) for name in imports(file)), file


@pytest.fixture
def fresh_modules():
    """tim_core as a new process finds it: not imported."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "tim_core"}
    for name in before:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "tim_core"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.usefixtures("fresh_modules")
def test_inference_and_evaluation_need_no_pydantic():
    for name in ("cli", "evaluation.curve", "pipeline", "shapes.batches", "training"):
        importlib.import_module(f"tim_core.{name}")
    assert "tim_core.settings" not in sys.modules
    importlib.import_module("tim_core.training.config")
    assert "tim_core.settings" in sys.modules  # so the line above can tell


@pytest.mark.usefixtures("fresh_modules")
def test_training_without_pydantic_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(ValueError, match="pip install pydantic$"):
        importlib.import_module("tim_core.training").run(["any.yaml"])


@pytest.mark.usefixtures("fresh_modules")
def test_fine_tuning_loads_no_coloured_shapes(tmp_path):
    config = importlib.import_module("tim_core.training.config")
    importlib.import_module("tim_core.training.finetune")
    path = tmp_path / "lora.yaml"
    path.write_text("kind: finetune\noutput: x\nmodel: y\ndata: {path: z}\nlora: {rank: 4}\n")
    assert config.read(path).lora.rank == 4
    assert not [name for name in sys.modules if name.startswith("tim_core.shapes")]
    path.write_text("kind: tim\noutput: x\nautoencoder: y\n")
    config.read(path)
    assert "tim_core.shapes" in sys.modules  # so the line above can tell
