"""Settings checked by pydantic: what their classes share, and its errors as one line.

Only training and the settings of coloured shapes import this, since inference runs without pydantic.
"""

import difflib
import json
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from .errors import TimError

CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

MOST = 2**40
Count = Annotated[int, Field(ge=1, lt=MOST)]
WholeNumber = Annotated[int, Field(ge=0, lt=MOST)]
Size = Annotated[int, Field(ge=1, le=16384)]      # of a layer
Depth = Annotated[int, Field(ge=1, le=256)]       # number of layers, heads, ...
Positive = Annotated[float, Field(gt=0, le=1e6)]
NotNegative = Annotated[float, Field(ge=0, le=1e6)]
Rate = Annotated[float, Field(ge=1e-12, le=10)]   # a learning rate; float32 rounds much smaller ones to 0
Fraction = Annotated[float, Field(ge=0, le=1)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]

RULE = "rule"
ADVICE = {
    "greater_than": "more than {gt}", "greater_than_equal": "{ge} or more", "less_than": "less than {lt}",
    "less_than_equal": "at most {le}", "multiple_of": "a multiple of {multiple_of}",
    "literal_error": "{expected}", "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "finite_number": "a finite number", "bool_type": "true or false", "string_type": "text", "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "text without null characters",
    "tuple_type": "a list", "dict_type": "keys and values", "dataclass_type": "keys and values",
    "too_short": "{min_length} or more values", "too_long": "at most {max_length} values",
}


def shown(value: Any) -> str:
    """A value as it is written in YAML."""
    return json.dumps(value, ensure_ascii=False, default=str)


def require(ok: Any, key: str, value: Any, use: str) -> None:
    """The error of a rule that a type cannot state, for validators. key: below the settings that are checked, dotted."""
    if not ok:
        raise PydanticCustomError(RULE, "{key} is {value}; use {use}", {"key": key, "value": value, "use": use})


def validate(cls: type, values: dict, source: Callable[[tuple[str, ...]], object]) -> Any:
    """An instance of a dataclass from plain values. TimError of one line: the file, which source(key) names, the key, its value, advice."""
    try:
        return TypeAdapter(cls).validate_json(json.dumps(values))  # as JSON, whose lists and mappings pydantic takes in strict mode
    except ValidationError as error:
        found = error.errors(include_url=False)
    first = next((one for one in found if one["type"] == "unexpected_keyword_argument"), found[0])  # may explain a missing key
    location = tuple(str(part) for part in first["loc"] if part != "[key]")
    context = {key: int(value) if isinstance(value, float) and value.is_integer() else value for key, value in first.get("ctx", {}).items()}
    if first["type"] == RULE:
        location += tuple(part for part in context["key"].split(".") if part)
    where = f"{source(location)}: {'.'.join(location)}"
    if first["type"] == "unexpected_keyword_argument":
        raise TimError(f"{where} is an unknown key; use {_nearest(location, cls)}")
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        raise TimError(f"{where} is missing; set it")
    if isinstance(context.get("error"), TimError):  # of an objective's own check, whose first word names the objective
        raise TimError(f"{where}.{str(context['error']).partition('.')[2]}")
    if first["type"] == RULE:
        raise TimError(f"{where} is {shown(context['value'])}; use {context['use']}")
    use = ADVICE[first["type"]].format_map(context) if first["type"] in ADVICE else f"another value ({first['msg']})"
    raise TimError(f"{where} is {shown(first['input'])}; use {use}")


def _nearest(location: tuple[str, ...], cls: type) -> str:
    """The known keys that a user may have meant."""
    *above, key = location
    siblings = _keys(cls)
    for part in above:
        siblings = _keys(siblings[part]) if part in siblings else siblings  # the keys of a plain mapping are no fields
    inner = [f"{name}.{key}" for name, hint in siblings.items() if key in _keys(hint)]
    near = inner or difflib.get_close_matches(key, siblings, 1)
    return " or ".join(".".join([*above, name]) for name in near) if near else f"one of {', '.join(siblings)}"


def _keys(hint: Any) -> dict[str, Any]:
    """The fields of a dataclass, which may be optional or the values of a mapping, and their types. Empty for other types."""
    for one in (hint, *typing.get_args(hint)):
        if is_dataclass(one):
            hints = typing.get_type_hints(one)
            return {field.name: hints[field.name] for field in fields(one)}
    return {}
