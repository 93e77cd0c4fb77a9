"""What a plain function says of itself: parameters from its signature, descriptions and source from its docstring."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.fields import FieldInfo

from sparsekit.errors import PluginError

_ARGS = re.compile(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", re.M)  # the section of a Google-style docstring


def lower_case(noun: str, name: str) -> None:
    """Refuse what a recipe could not write, and who forgot to give a name at all.

    Raises:
        PluginError: The name is none.
    """
    if not isinstance(name, str):
        raise PluginError(
            f"a decorator of {noun}s takes a name, as in @sk....({'my_name'!r}, ...), it was given {name!r}"
        )
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise PluginError(f"{noun} name {name!r} must be lower case letters, digits and _")


def positional(noun: str, name: str, signature: inspect.Signature, expected: tuple[str, ...]) -> None:
    """Hold the arguments before the `/` against those that the function will be called with.

    Raises:
        PluginError: They are not as many.
    """
    given = sum(parameter.kind is parameter.POSITIONAL_ONLY for parameter in signature.parameters.values())
    if given != len(expected):
        shown = f"({', '.join(expected)}, /, *, parameters)"
        raise PluginError(
            f"{noun} {name!r} must take {shown}, {len(expected)} positional-only; it has {given} before a /"
        )


def parameters(noun: str, name: str, function: Callable[..., Any], signature: inspect.Signature) -> type[BaseModel]:
    """The recipe schema of a function: its keyword-only parameters.

    Args:
        noun: What the function is, for messages.
        name: What a recipe writes.
        function: With type annotations, and descriptions in its docstring.
        signature: Its signature.
    Raises:
        PluginError: A parameter is not keyword-only, has no type, or a default that is not of it.
    """
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise PluginError(f"{noun} {name!r}: {error}, and an annotation uses it") from error
    described = _described(docstring(function))
    fields: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            continue
        if parameter.kind is not parameter.KEYWORD_ONLY:
            raise PluginError(f"{noun} {name!r}: parameter {parameter.name!r} must be keyword-only (put it after *)")
        if parameter.name not in hints:
            raise PluginError(
                f"{noun} {name!r}: parameter {parameter.name!r} has no type annotation, as in bits: int = 4"
            )
        default = ... if parameter.default is parameter.empty else parameter.default
        info: FieldInfo = Field(default=default, description=described.get(parameter.name))
        fields[parameter.name] = (hints[parameter.name], info)
    optional = {key: field for key, field in fields.items() if not field[1].is_required()}
    config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)
    try:
        read = create_model(name, __config__=config | ConfigDict(validate_default=True), **optional)()
    except ValidationError as error:
        first = error.errors()[0]
        told = f"parameter {first['loc'][0]!r} has the default {first['input']!r}: {first['msg']}"
        raise PluginError(f"{noun} {name!r}: {told}") from error
    for key, value in dict(read).items():
        if value != fields[key][1].default:
            told = f"parameter {key!r} has the default {fields[key][1].default!r}; write {value!r}, as it is read"
            raise PluginError(f"{noun} {name!r}: {told}")
    model: type[BaseModel] = create_model(name, __config__=config, __doc__=function.__doc__, **fields)
    return model


def docstring(function: Callable[..., Any]) -> str:
    """Its docstring without the indentation; empty if there is none."""
    return inspect.getdoc(function) or ""


def without_args(doc: str) -> str:
    """A docstring without its `Args:` section."""
    return _ARGS.sub("", doc).strip()


def source_of(doc: str) -> str:
    """The `Source:` paragraph of a docstring on one line; empty if there is none."""
    found = re.search(r"^Source:\s*(.+?)(?:\n\n|\n\w+:|\Z)", doc, re.S | re.M)
    return " ".join(found[1].split()) if found else ""


def _described(doc: str) -> dict[str, str]:
    """Parameter descriptions of a docstring."""
    section = _ARGS.search(doc)
    found: dict[str, str] = {}
    if section:
        for match in re.finditer(r"^ {4}(\w+): (.*(?:\n {6,}.*)*)", section[1], re.M):
            found[match[1]] = " ".join(match[2].split())
    return found
