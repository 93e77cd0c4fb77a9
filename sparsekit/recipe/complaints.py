"""From what pydantic says about a recipe to what its writer has to change."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from sparsekit.errors import nearest
from sparsekit.recipe.yamllines import Document, Keys, Mark, shown

_NOUNS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least {}"),
    "greater_than": ("gt", "more than {}"),
    "less_than_equal": ("le", "at most {}"),
    "less_than": ("lt", "less than {}"),
    "multiple_of": ("multiple_of", "a multiple of {}"),
}
_EXPONENT = re.compile(r"\s*([-+]?)(\d+\.?\d*|\.\d+)[eE]([-+]?\d{1,3})\s*")


def complain(error: ValidationError, document: Document, allowed: Callable[[Keys], list[str]]) -> None:
    """Add every error of a validation to a document's problems.

    Args:
        error: What pydantic raised for `document.values`.
        document: Receives the problems.
        allowed: The keys a mapping may have, by the mapping's own keys.
    """
    merged: dict[Keys, list[str]] = {}
    for entry in error.errors():
        keys = _keys(entry["loc"], document.values)
        if entry["type"] == "missing":
            keys = (*keys, entry["loc"][-1])
        message = _message(entry, keys, document.mark(keys), allowed)
        merged.setdefault(keys, []).append(message)
    for keys, messages in merged.items():  # a value may fail each branch of a union
        document.report(keys, ", or ".join(dict.fromkeys(messages)))


def name_of(keys: Keys) -> str:
    """`bits`, `ignore[0]`, `steps[1]`."""
    text = ""
    for key in reversed(keys):
        if isinstance(key, str):
            return key + text
        text = f"[{key}]{text}"
    return f"the recipe{text}"


def place_of(keys: Keys) -> str:
    """`the recipe`, `model`, `step 2`, `data.calibration`."""
    if len(keys) >= 2 and keys[0] == "steps":
        step = f"step {int(keys[1]) + 1}"
        return step if len(keys) == 2 else f"{step}, {'.'.join(map(str, keys[2:]))}"
    return ".".join(map(str, keys)) or "the recipe"


def number_fix(text: str, *, whole: bool = False) -> str:
    """What to write for an exponent that YAML 1.1 reads as text; empty if it is none.

    YAML 1.1 wants a point in the mantissa and a sign in the exponent: `1.0e-4`, `2.5e+5`.
    """
    match = _EXPONENT.fullmatch(text)
    if not match:
        return ""
    sign, mantissa, exponent = match[1], match[2], int(match[3])
    if whole and float(text).is_integer():
        return str(int(float(text)))
    digits = mantissa if "." in mantissa.rstrip(".") else f"{mantissa.rstrip('.')}.0"
    return f"{sign}{digits}e{exponent:+d}"


def _keys(loc: tuple[int | str, ...], values: Any) -> Keys:
    """The part of a pydantic location that is in the recipe; names of union branches are not."""
    keys: list[int | str] = []
    for part in loc:
        if isinstance(values, dict) and part in values:
            values = values[str(part)]
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            continue
        keys.append(part)
    return tuple(keys)


def _message(entry: Mapping[str, Any], keys: Keys, mark: Mark, allowed: Callable[[Keys], list[str]]) -> str:
    """One error in one line: what was read, what is allowed."""
    kind, value, context = entry["type"], entry["input"], entry.get("ctx", {})
    name, place = name_of(keys), place_of(keys[:-1])
    if kind == "extra_forbidden":
        names = allowed(keys[:-1])
        return f"unknown key {name!r} in {place}; it takes {', '.join(names)}.{nearest(name, names)}"
    if kind == "missing":
        return f"{place} lacks the required key {name!r}"
    if kind in _NOUNS:
        return f"{name} is {shown(value)}, expected {_NOUNS[kind]}{_hint(kind, value, name, mark)}"
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"{name} is {value}, expected {words.format(context[key])}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'|(\d+)", context["expected"])
        hint = nearest(value, [text for text, _ in choices]) if isinstance(value, str) else ""
        return f"{name} is {shown(value)}, expected {context['expected']}.{hint}"
    if kind in {"too_short", "string_too_short"}:
        return f"{name} is empty"
    if kind == "recipe":
        return str(entry["msg"])
    message = str(context["error"]) if kind == "value_error" else f"{shown(value)}: {entry['msg']}"
    fix = number_fix(value) if isinstance(value, str) else ""
    remark = f"; YAML reads {value} as text, write {fix}" if fix else ""
    return f"{message}{remark}" if message.startswith(name) else f"{name}: {message}{remark}"


def _hint(kind: str, value: Any, name: str, mark: Mark) -> str:
    """How to write it instead, when that can be told."""
    noun = _NOUNS[kind]
    if noun in {"a number", "a whole number"} and isinstance(value, str):
        if fix := number_fix(value, whole=noun == "a whole number"):
            return f"; YAML reads {value} as text, write {fix}"
        if re.fullmatch(r"\s*[-+]?\d+(\.\d+)?\s*", value):
            return f"; write {name}: {value.strip()} without quotes"
    if noun == "text" and isinstance(value, bool | int | float):
        written = mark.text or str(value)
        read = f"YAML reads an unquoted {written} as {shown(value)}, " if isinstance(value, bool) else ""
        return f'; {read}write "{written}" in quotes'
    if noun == "a list" and isinstance(value, str | int | float):
        return f"; write {name}: [{mark.text or value}]"
    if noun == "true or false" and isinstance(value, str) and value.lower() in {"true", "false"}:
        return f"; write {value.lower()} without quotes"
    if noun == "a mapping" and isinstance(value, str) and name in {"model", "calibration", "train"}:
        return f"; write {name}: {{path: {value}}}"
    return ""
