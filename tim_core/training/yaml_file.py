"""Reads YAML files of plain values within bounds. The key `base` names another file, whose keys are overridden."""

import math
import os
import re
from pathlib import Path

import yaml

from ..errors import TimError, one_line
from ..files import read_text, user_path
from ..settings import shown

MAX_BYTES, MAX_DEPTH, MAX_VALUES = 65_536, 32, 10_000  # values: aliases count as often as they are used
TOO_LARGE = f"more than {MAX_VALUES} values or {MAX_DEPTH} levels, aliases included; write fewer"
TEXT, INT, FLOAT, BOOL, NULL, SEQUENCE, MAPPING, MERGE = TAGS = tuple(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge"))
CORE = {  # the plain scalars of YAML 1.2's core schema (section 10.3.2), and their first characters
    NULL: (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    BOOL: (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    INT: (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    FLOAT: (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
    MERGE: (r"<<", ["<"]),  # of YAML 1.1
}

Location = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """Plain values as in the core schema of YAML 1.2, and merge keys; everything else, such as dates, is text. Keys are text."""

    yaml_implicit_resolvers = {}
    depth = count = 0

    def compose_node(self, parent, index):
        self.depth += 1
        self.count += 1
        if self.depth > MAX_DEPTH or self.count > MAX_VALUES:
            raise TimError(TOO_LARGE)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float | bool | None:
    """The value of a scalar that is tagged as number, truth value or null. ValueError if its text is none."""
    text = loader.construct_scalar(node)
    if not re.fullmatch(CORE[node.tag][0], text):
        raise ValueError(f"{text!r} is no {node.tag.rpartition(':')[2]}")
    if node.tag == FLOAT:
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if node.tag == INT:
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    return text.lower() == "true" if node.tag == BOOL else None


for tag, (pattern, first) in CORE.items():
    _Loader.add_implicit_resolver(tag, re.compile(f"(?:{pattern})$"), first)
for tag in (INT, FLOAT, BOOL, NULL):
    _Loader.add_constructor(tag, _number)


def read_values(path: str | Path) -> tuple[dict, dict[Location, Path]]:
    """The values of a YAML file over those of its base, and the file that each key is from. TimError naming the file and the key."""
    return _read(Path(path), ())


def _read(path: Path, above: tuple[Path, ...]) -> tuple[dict, dict[Location, Path]]:
    """above: the files that this one is a base of."""
    values = _load(path)
    sources = {location: path for location in _locations(values)}
    if "base" not in values:
        return values, sources
    base = values.pop("base")
    if not isinstance(base, str) or not base:
        raise TimError(f"{path}: base is {shown(base)}; use the name of one YAML file")
    other, chain = path.parent / user_path(base), (*above, path)
    if not os.path.isfile(other):
        raise TimError(f"{path}: base is {shown(base)}, and there is no file {other}; name a YAML file, relative to the folder of this one")
    if any(os.path.realpath(other) == os.path.realpath(file) for file in chain):
        raise TimError(f"{path}: base is {shown(base)}, which leads back to {other}; remove one `base` of {', '.join(map(str, chain))}")
    if len(chain) > MAX_DEPTH:
        raise TimError(f"{path}: base is {shown(base)}, and more than {MAX_DEPTH} files deep; use fewer")
    inherited, inherited_sources = _read(other, chain)
    return _merge(inherited, values), inherited_sources | sources


def _merge(below: dict, over: dict) -> dict:
    """Mappings key by key; any other value replaces the one below."""
    return below | {key: _merge(below[key], value) if isinstance(value, dict) and isinstance(below.get(key), dict) else value
                    for key, value in over.items()}


def _locations(values: dict, above: Location = ()) -> list[Location]:
    found = []
    for key, value in values.items():
        found += [(*above, key), *(_locations(value, (*above, key)) if isinstance(value, dict) else ())]
    return found


def _load(path: Path) -> dict:
    """The mapping in a file."""
    text = read_text(path, MAX_BYTES)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _check(loader, node)
        values = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        advice = "indent with spaces" if "'\\t'" in str(error.problem) else "correct it"
        raise TimError(f"{path}: not YAML at line {error.problem_mark.line + 1} ({error.problem}); {advice}") from error
    except TimError as error:
        raise TimError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError) as error:  # the last three for a tag on a value of another type
        raise TimError(f"{path}: not YAML ({one_line(error)}); correct it") from error
    if not isinstance(values, dict):
        raise TimError(f"{path}: holds {'nothing' if values is None else shown(values)[:160]}; write keys and values")
    return values


def _check(loader: _Loader, root: yaml.Node) -> None:
    """TimError for duplicate keys, of which PyYAML would take the last, for tags of other values, infinities, and too many values."""
    count = 0

    def visit(node: yaml.Node, where: str, depth: int) -> None:
        nonlocal count
        count += 1
        if count > MAX_VALUES or depth > MAX_DEPTH:
            raise TimError(TOO_LARGE)
        if node.tag not in TAGS:
            raise TimError(f"{where or 'the file'} has the tag {node.tag}; use plain values")
        if isinstance(node, yaml.ScalarNode):
            node.value.encode()  # fails for half of a surrogate pair
            if node.tag == FLOAT and not math.isfinite(_number(loader, node)):
                raise TimError(f"{where} is {node.value}; use a finite number")
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                visit(value, f"{where}[{index}]", depth + 1)
        else:
            seen = set()
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise TimError(f"line {key.start_mark.line + 1}: a key is a list or a mapping; use text")
                name = f"{where}.{key.value}" if where else key.value
                if key.tag != MERGE:
                    if key.value in seen:
                        raise TimError(f"{name} is given twice; keep one")
                    seen.add(key.value)
                    key.tag = TEXT
                visit(value, name, depth + 1)

    visit(root, "", 0)
