"""The documentation is true where a machine can tell: links, commands, module names and the README's Python."""

import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tim_core.cli import COMMANDS, build_parser
from tim_core.models.config import TransformerConfig
from tim_core.models.transformer import TransitionTransformer
from tim_core.training import run
from tim_core.weights.download import RELEASES

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))
HELP = sorted((ROOT / "web" / "docs").rglob("*.md"))
NOTEBOOK = ROOT / "docs" / "research"


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def notes() -> dict[str, str]:
    """The notes of the templates, by file name."""
    found = {}
    for file in sorted((ROOT / "workflows").glob("*.json")):
        nodes = json.loads(text_of(file))["nodes"]
        found[file.name] = "\n".join(text for node in nodes if "Note" in node["type"] for text in node["widgets_values"])
    return found


def commands(text: str) -> list[list[str]]:
    """The tim commands of a page's shell blocks and code spans, as arguments; a span that only names a command is none."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))]
    calls = [re.search(r"(?:^|&& )(?:tim|python -m tim_core) (.+)", line.strip()) for line in lines]
    words = [shlex.split(call.group(1), comments=True) for call in calls if call]
    return [arguments for arguments in words if len(arguments) > 1 and arguments[0] != "COMMAND" and "..." not in arguments]


def anchors(file: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text_of(file), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(file)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        place = file.parent / name if name else file
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


@pytest.mark.parametrize("file", [*PAGES, *HELP, *NOTEBOOK.glob("*.md")], ids=lambda file: file.relative_to(ROOT).as_posix())
def test_lines_of_prose_have_at_most_100_columns(file):
    """Outside code and tables; pages in ja, ko and zh have one line per paragraph."""
    prose = re.sub(r"^```.*?^```", "", text_of(file), flags=re.S | re.M)
    lines = [line for line in prose.splitlines() if not line.lstrip().startswith("|")]
    assert file.stem in ("ja", "ko", "zh") or max(map(len, lines)) <= 100


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_commands_are_understood(file):
    for arguments in commands(text_of(file)):
        build_parser().parse_args(arguments)
        for name in arguments:
            assert not name.startswith(("configs/", "docs/")) or list(ROOT.glob(name)), name


def test_the_pages_have_commands():
    assert {arguments[0] for file in PAGES for arguments in commands(text_of(file))} == set(COMMANDS)


def test_every_command_has_its_row():
    rows = re.findall(r"^\| `tim (\w+)` \|", text_of(ROOT / "docs" / "command-line.md"), re.M)
    assert rows == list(COMMANDS)


def test_modules_that_texts_run_can_be_run():
    texts = {file.name: text_of(file) for file in [*PAGES, *HELP, *NOTEBOOK.glob("*.md")]} | notes()
    named = {name for text in texts.values() for name in re.findall(r"python3? -m (tim_core[\w.]*)", text)}
    assert "tim_core" in named
    for name in named:
        module = importlib.import_module(name)
        assert not hasattr(module, "__path__") or importlib.util.find_spec(f"{name}.__main__"), name


def test_commands_of_help_pages_and_notes_are_understood():
    spans = [span for file in HELP for span in re.findall(r"`python -m tim_core ([^`]+)`", text_of(file))]
    for name, note in notes().items():
        found = re.findall(r"\*\*python -m tim_core ([^*]+)\*\*", note)
        assert found and len(found) == note.count("python -m"), name  # bold: inline code is hard to read in Nodes 2.0
        spans += found
    for arguments in map(shlex.split, spans):
        if "--help" not in arguments:
            build_parser().parse_args(arguments)
        assert arguments[0] in COMMANDS


def test_the_readmes_python_saves_a_file(tmp_path, monkeypatch):
    (source,) = blocks(text_of(ROOT / "README.md"), "python")
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "README.md", "exec"), {})  # noqa: S102
    with Image.open(tmp_path / "circle.png") as image:
        assert image.size == (64, 64)


def test_python_of_the_pages_names_what_exists():
    """Every import of a block finds its names."""
    for file in PAGES:
        for source in blocks(text_of(file), "python"):
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names), (file.name, node.module)


def downloaded(release: str, tiny: Path, folder: Path) -> Path:
    """The tiny model's parts under the names that `tim download RELEASE --to` gives; for c2i with a transformer for three classes."""
    found = load_file(tiny)

    def part(prefix: str) -> dict:
        return {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix) and "_json" not in key}

    transformer = part("model.diffusion_model.")
    if release != "t2i":
        transformer = TransitionTransformer(TransformerConfig(
            in_channels=16, hidden_size=32, depth=2, num_heads=2, num_classes=3, lora_hidden_size=8)).state_dict()
    files = {
        "config.json": lambda file: file.write_text(json.dumps({
            **json.loads(found["text_encoders.config_json"].numpy().tobytes()), "model_type": "gemma3_text"})),
        "tokenizer.json": lambda file: file.write_bytes(found["text_encoders.tokenizer_json"].numpy().tobytes()),
        "model.safetensors": lambda file: save_file(part("text_encoders.transformer."), file),
        "diffusion_pytorch_model.safetensors": lambda file: save_file(part("vae."), file),
        "t2i_model.bin": lambda file: torch.save(transformer, file),
        "c2i_model_512.safetensors": lambda file: save_file(transformer, file),
    }
    for asset in RELEASES[release]:
        file = folder / asset.standalone
        file.parent.mkdir(parents=True, exist_ok=True)
        files[asset.name](file)
    return folder


@pytest.mark.parametrize("name", ["t2i-lora", "t2i-finetune", "c2i-finetune"])
def test_a_configuration_trains_what_its_command_downloads(name, tiny, tmp_path, monkeypatch):
    """`model` is the folder that the command in its comment makes, and nothing else is needed."""
    monkeypatch.chdir(tmp_path)
    text = text_of(ROOT / "configs" / f"{name}.yaml")
    folder, release, to = re.search(r"^model: (\S+) +# made by: tim download (\S+) --to (\S+)$", text, re.M).groups()
    assert folder == to
    downloaded(release, tiny, tmp_path / folder)
    for number in range(2):
        place = tmp_path / "images" / ("" if release == "t2i" else f"class {number}")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), "red").save(place / f"{number}.png")
        (place / f"{number}.txt").write_text("a red circle")
    changes = "steps: 1, batch: 2, workers: 0, warmup: 0, save_every: 1, log_every: 1, autocast: false, parallel: ddp"
    (tmp_path / "short.yaml").write_text(
        f"base: {ROOT}/configs/{name}.yaml\noutput: made\ndata: {{base_pixels: 4096}}\nloop: {{{changes}}}\n")
    (made,) = run(["short.yaml"])
    assert made == Path("made") / ("lora.safetensors" if name == "t2i-lora" else "model.safetensors") and load_file(made)


def test_every_promise_of_security_has_its_tests():
    rows = [line for line in text_of(ROOT / "SECURITY.md").splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 10
    for row in rows:
        named = re.findall(r"`(tests/\w+\.py)`: `(test_\w+)`", row)
        assert named and all(f"def {test}(" in text_of(ROOT / file) for file, test in named), row
