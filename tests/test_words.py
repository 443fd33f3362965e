"""The words of the nodes, help pages and translations, against the schemas in nodes/, which are read and not run."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TREES = [ast.parse(file.read_text(encoding="utf-8")) for file in sorted((ROOT / "nodes").glob("*.py"))]
FUNCTIONS = {part.name: part for tree in TREES for part in tree.body if isinstance(part, ast.FunctionDef)}
WORDS = {file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in sorted((ROOT / "locales").glob("*/nodeDefs.json"))}
DOCS = ROOT / "web" / "docs"
TRANSLATIONS = ("ja", "ko", "zh")


def calls(tree: ast.AST) -> list[ast.Call]:
    return [part for part in ast.walk(tree) if isinstance(part, ast.Call)]


def takes_name(function: str) -> bool:
    return function in FUNCTIONS and [argument.arg for argument in FUNCTIONS[function].args.args[:1]] == ["name"]


def input_names(tree: ast.AST) -> list[str]:
    """The inputs of a schema: first arguments of io.X.Input(...) and of our functions of a `name`, and what our other functions make."""
    names = []
    for call in calls(tree):
        is_input = isinstance(call.func, ast.Attribute) and call.func.attr == "Input"
        called = call.func.id if isinstance(call.func, ast.Name) else ""
        if is_input or takes_name(called):
            names += [first.value for first in call.args[:1] if isinstance(first, ast.Constant)]
        elif called in FUNCTIONS:
            names += input_names(FUNCTIONS[called])
    return names


def read_schemas() -> dict[str, list[str]]:
    """Node id -> names of its inputs."""
    found = {}
    for tree in TREES:
        for part in ast.walk(tree):
            if isinstance(part, ast.FunctionDef) and part.name == "define_schema":
                ids = [word.value.value for call in calls(part) for word in call.keywords if word.arg == "node_id"]
                found[ids[0]] = input_names(part)
    return found


SCHEMAS = read_schemas()


def page(node: str) -> str:
    return (DOCS / node / "en.md").read_text(encoding="utf-8")


def leaves(value, place: str = "") -> dict[str, str]:
    """The texts of nested dicts by their place: inputs.seed.tooltip."""
    if not isinstance(value, dict):
        return {place: value}
    return {key: text for name, inner in value.items() for key, text in leaves(inner, f"{place}.{name}".lstrip(".")).items()}


def test_every_node_has_words_and_a_page():
    assert len(SCHEMAS) >= 12 and {"en", *TRANSLATIONS} <= WORDS.keys()
    for language, words in WORDS.items():
        assert words.keys() == SCHEMAS.keys(), language
    assert {folder.name for folder in DOCS.iterdir()} == SCHEMAS.keys()


@pytest.mark.parametrize("node", SCHEMAS)
def test_every_input_has_words(node):
    assert SCHEMAS[node] and len(SCHEMAS[node]) == len(set(SCHEMAS[node]))
    for language, words in WORDS.items():
        assert words[node]["inputs"].keys() == set(SCHEMAS[node]), language
    table = page(node).partition("\n## Inputs\n")[2].partition("\n## ")[0].strip().partition("\n\n")[0]
    rows = [row.split("|")[1].strip() for row in table.splitlines()[2:]]
    assert sorted(name for row in rows for name in row.split(", ")) == sorted(SCHEMAS[node])


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_everything_is_translated(language):
    english, words = leaves(WORDS["en"]), leaves(WORDS[language])
    assert words.keys() == english.keys()
    for place, text in words.items():
        assert text.strip(), place
        assert place.endswith(".name") or text != english[place], place
    categories = [json.loads((ROOT / "locales" / name / "main.json").read_text(encoding="utf-8")) for name in ("en", language)]
    assert leaves(categories[0]).keys() == leaves(categories[1]).keys()


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_numbers_files_and_commands_stay(language):
    words = leaves(WORDS[language])
    for place, text in leaves(WORDS["en"]).items():
        for word in re.findall(r"\d+(?:[.x]\d+)*|[\w*]+\.(?:bin|safetensors)|`tim \w+`|models/\w+|KSampler\w*|SamplerCustom\w*", text):
            assert word in words[place], place


def output_count(node: str) -> int:
    for tree in TREES:
        for part in ast.walk(tree):
            if isinstance(part, ast.FunctionDef) and part.name == "define_schema":
                words = {word.arg: word.value for call in calls(part) for word in call.keywords if word.arg in ("node_id", "outputs")}
                if words["node_id"].value == node:
                    return len(words["outputs"].elts)
    raise LookupError(node)


@pytest.mark.parametrize("node", SCHEMAS)
def test_every_output_has_words(node):
    for language, words in WORDS.items():
        assert list(words[node]["outputs"]) == [str(i) for i in range(output_count(node))], language
        assert all(output["name"].strip() and output["tooltip"].strip() for output in words[node]["outputs"].values()), language


@pytest.mark.parametrize("node", SCHEMAS)
def test_every_page_says_what_the_node_does_and_what_goes_wrong(node):
    opening = page(node).split("\n\n")[1]
    assert len(opening) > 60 and not opening.startswith(("#", "!", "|"))
    mistakes = page(node).partition("\n## Common mistakes\n")[2]
    assert len(mistakes.strip()) > 60 and mistakes.strip().startswith("- ")


@pytest.mark.parametrize("node", SCHEMAS)
def test_every_page_has_its_title_and_a_picture(node):
    name = WORDS["en"][node]["display_name"]
    assert page(node).startswith(f"# {name}\n")
    assert f"\n![{name} in a graph]({node}/graph.jpg)\n" in page(node)
    assert (DOCS / node / "graph.jpg").is_file()
