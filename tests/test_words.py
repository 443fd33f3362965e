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
LANGUAGES = ("en", *TRANSLATIONS)


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


def definitions() -> dict[str, tuple[ast.FunctionDef, dict[str, ast.expr]]]:
    """Node id -> its define_schema, and the keywords of the call in it."""
    found = {}
    for part in (part for tree in TREES for part in ast.walk(tree) if isinstance(part, ast.FunctionDef) and part.name == "define_schema"):
        schema = next(call for call in calls(part) if isinstance(call.func, ast.Name) and call.func.id == "Schema")
        words = {word.arg: word.value for word in schema.keywords}
        found[words["node_id"].value] = (part, words)
    return found


DEFINITIONS = definitions()
SCHEMAS = {node: input_names(part) for node, (part, _) in DEFINITIONS.items()}
NAMES = {node: words["display_name"].value for node, (_, words) in DEFINITIONS.items()}
CORE = {  # nodes of core as the editor calls them in ja, ko and zh
    "KSampler (Advanced)": ("Kサンプラー（高度）", "고급 KSampler", "K采样器（高级）"),
    "KSampler": ("Kサンプラー", "KSampler", "K采样器"),
    "SamplerCustomAdvanced": ("カスタムサンプラー（高度）", "고급 사용자 정의 샘플러", "自定义采样器（高级）"),
    "SamplerCustom": ("カスタムサンプラー", "사용자 정의 샘플러", "自定义采样器"),
    "CLIP Text Encode": ("CLIPテキストエンコード", "CLIP 텍스트 인코딩", "CLIP文本编码"),
    "VAE Decode": ("VAEデコード", "VAE 디코드", "VAE解码"),
    "VAE Encode": ("VAEエンコード", "VAE 인코드", "VAE编码"),
    "Load Upscale Model": ("拡大モデルを読み込む", "업스케일 모델 로드", "加载放大模型"),
    "ModelSamplingSD3": ("モデルサンプリングSD3", "모델 샘플링 (SD3)", "采样算法（SD3）"),
    "Load VAE": ("VAEを読み込む", "VAE 로드", "加载VAE"),
}


def page(node: str, language: str) -> str:
    return (DOCS / node / f"{language}.md").read_text(encoding="utf-8")


def sections(text: str) -> list[tuple[str, str]]:
    """A page's sections as (heading, text); the first is its title and opening."""
    return [(head, body.strip()) for head, _, body in (part.partition("\n") for part in re.split(r"^#+ ", text, flags=re.M)[1:])]


def rows(section: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def leaves(value, place: str = "") -> dict[str, str]:
    """The texts of nested dicts by their place: inputs.seed.tooltip."""
    if not isinstance(value, dict):
        return {place: value}
    return {key: text for name, inner in value.items() for key, text in leaves(inner, f"{place}.{name}".lstrip(".")).items()}


def test_every_node_has_words_and_a_page():
    assert len(SCHEMAS) >= 12 and {"en", *TRANSLATIONS} <= WORDS.keys()
    for language, words in WORDS.items():
        assert words.keys() == SCHEMAS.keys(), language
    assert {path.name for path in DOCS.iterdir()} == SCHEMAS.keys() | {f"{node}.md" for node in SCHEMAS}


@pytest.mark.parametrize("node", SCHEMAS)
def test_every_input_has_words(node):
    assert SCHEMAS[node] and len(SCHEMAS[node]) == len(set(SCHEMAS[node]))
    for language, words in WORDS.items():
        assert words[node]["inputs"].keys() == set(SCHEMAS[node]), language


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_everything_is_translated(language):
    """The English names of the nodes are the schemas' own, which are longer on versions without search aliases."""
    english, words = leaves(WORDS["en"]), leaves(WORDS[language])
    assert words.keys() == english.keys() | {f"{node}.display_name" for node in SCHEMAS}
    for place, text in words.items():
        assert text.strip(), place
        assert place.endswith(".name") or text != english.get(place, NAMES[place.split(".")[0]]), place
    categories = [json.loads((ROOT / "locales" / name / "main.json").read_text(encoding="utf-8")) for name in ("en", language)]
    assert leaves(categories[0]).keys() == leaves(categories[1]).keys()


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_numbers_files_commands_and_options_stay(language):
    words = leaves(WORDS[language])
    for place, text in leaves(WORDS["en"]).items():
        for word in re.findall(r"\d+(?:[.x]\d+)*|[\w*]+\.(?:bin|safetensors)|\btim [a-z]+|models/\w+|\bcustom\b(?! sampling)", text):
            assert word in words[place], place


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_nodes_have_the_names_that_the_editor_shows(language):
    words, which = WORDS[language], TRANSLATIONS.index(language)
    shown = CORE.items() | {(name, tuple(WORDS[each][node]["display_name"] for each in TRANSLATIONS)) for node, name in NAMES.items()}
    seen = set()
    for place, text in leaves(WORDS["en"]).items():
        for name, translated in shown:
            if re.search(rf"\b{re.escape(name)}(?![\w])", text):
                seen.add(name)
                assert translated[which] in leaves(words)[place], (place, name)
    assert CORE.keys() | {"TiM Sampler"} <= seen


def test_english_words_are_plain():
    """No node ids and no Markdown, which tooltips show as they are; an image is called so."""
    for place, text in leaves(WORDS["en"]).items():
        assert not re.search(r"`|\*\*|\bTiM[A-Z]|picture", text), place


@pytest.mark.parametrize("node", SCHEMAS)
def test_every_output_has_words(node):
    for language, words in WORDS.items():
        assert list(words[node]["outputs"]) == [str(i) for i in range(len(DEFINITIONS[node][1]["outputs"].elts))], language
        assert all(output["name"].strip() and output["tooltip"].strip() for output in words[node]["outputs"].values()), language


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node", SCHEMAS)
def test_every_page_has_the_words_of_the_node(node, language):
    words = WORDS[language][node]
    name = words.get("display_name", NAMES[node])
    (title, opening), (_, inputs), (_, outputs), *_, (_, mistakes) = sections(page(node, language))
    assert title == name and len(opening) > 60 and not opening.startswith(("!", "|"))
    assert re.search(rf"^!\[.*{re.escape(name)}.*\]\({node}/graph\.jpg\)$", opening, re.M) and (DOCS / node / "graph.jpg").is_file()
    labels = [word["name"] if word["name"] == key else f"{word['name']} (`{key}`)" for key, word in words["inputs"].items()]
    assert rows(inputs) == [[label, word["tooltip"]] for label, word in zip(labels, words["inputs"].values())]
    assert rows(outputs) == [[word["name"], word["tooltip"]] for word in words["outputs"].values()]
    assert mistakes.startswith("- ") and len(mistakes) > 60


@pytest.mark.parametrize("language", TRANSLATIONS)
@pytest.mark.parametrize("node", SCHEMAS)
def test_every_page_is_translated_whole(node, language):
    """As many sections, rows and points as in English, with the same code in each section and the names of the TiM nodes."""
    english, translated = sections(page(node, "en")), sections(page(node, language))
    assert len(english) == len(translated)
    names = {name: WORDS[language][other]["display_name"] for other, name in NAMES.items()}
    for (head, text), (other_head, other) in zip(english, translated):
        assert head != other_head and text != other
        assert len(rows(text)) == len(rows(other)) and text.count("\n- ") == other.count("\n- ")
        for name in (name for name in names if f"**{name}**" in text):
            assert names[name] in other, name
        if head != "Inputs":  # whose ids are code in translations alone
            assert sorted(re.findall(r"`[^`]+`", text)) == sorted(re.findall(r"`[^`]+`", other)), other_head


@pytest.mark.parametrize("language", LANGUAGES)
def test_pages_call_our_nodes_by_their_names(language):
    """What is bold and speaks of TiM is the name of a node."""
    names = {WORDS[language][node].get("display_name", name) for node, name in NAMES.items()}
    bold = {" ".join(text.split()) for node in SCHEMAS for text in re.findall(r"\*\*(.+?)\*\*", page(node, language), re.S)}
    found = {text for text in bold if "TiM" in text}
    assert len(found) > 8 and found <= names


def messages() -> list[list[str]]:
    """The constant parts of every text in our code, without digits; those of an f-string that begins with a value begin with ""."""
    found = []
    for file in (*(ROOT / "nodes").rglob("*.py"), *(ROOT / "tim_core").rglob("*.py")):
        for text in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            values = text.values if isinstance(text, ast.JoinedStr) else [text]
            parts = [part.value if isinstance(part, ast.Constant) else "" for part in values]
            if isinstance(text, (ast.JoinedStr, ast.Constant)) and isinstance(parts[0], str):
                found.append([re.sub(r"\d", "", part) for part in parts])
    return found


@pytest.mark.parametrize("language", LANGUAGES)
def test_pages_quote_errors_that_there_are(language):
    """A quote is a message with ... for its values; a name or an ending may be a value in the code."""
    known, quotes = messages(), set()
    for node in SCHEMAS:
        quotes |= set(re.findall(r"(?<!\*)\*([a-z][a-z_, ]*: [^*]+)\*(?!\*)", page(node, language)))

    def says(parts: list[str], quote: str) -> bool:
        name, *rest = (piece.strip() for piece in re.split(r"\.\.\.|\d+(?:\.\d+)?", quote))
        begins = not parts[0] or parts[0].startswith(name) or len(parts) > 1 and len(parts[0]) > 8 and name.startswith(parts[0])
        return begins and all(any(piece in part for part in parts) for piece in rest)

    assert len(quotes) > 10
    assert {quote for quote in quotes if not any(says(parts, quote) for parts in known if parts)} == set()


@pytest.mark.parametrize("node", SCHEMAS)
def test_the_page_for_other_languages_is_the_english_one(node):
    assert (DOCS / f"{node}.md").read_text(encoding="utf-8") == page(node, "en")
