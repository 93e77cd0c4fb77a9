"""Reading a recipe: every mistake is told with its file and line, all of a file's at once where that is possible.

The parameters of a step are those of its method, so a plugin's are checked like a built-in's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from sparsekit.errors import PluginError, RecipeError, nearest
from sparsekit.evaluation.measures import known_measure_keys
from sparsekit.recipe.complaints import complain
from sparsekit.recipe.contradictions import contradictions
from sparsekit.recipe.schema import Recipe
from sparsekit.recipe.step import known_keys, plain_json, steps_schema
from sparsekit.recipe.yamllines import Document, Keys, read_document
from sparsekit.registry import METHODS

MAX_BYTES = 2**18  # recipes are a few hundred bytes; the pure Python parser needs seconds for a megabyte


def read_recipe(path: Path, overrides: Sequence[str] = (), *, plugins: Sequence[Path] = ()) -> Recipe:
    """Read and check a recipe; the model and the texts are not looked at.

    Args:
        path: YAML file.
        overrides: `KEY=VALUE` as in `steps.1.bits=3`, applied in order; the values are YAML.
        plugins: Plugin files to load besides the recipe's own, relative to the current directory.
    Raises:
        RecipeError: Anything wrong with the file, by file and line.
        PluginError: One of `plugins` cannot be loaded.
    """
    document = read_overridden(path, overrides)
    if "variants" in document.values:
        message = "a file with variants is a comparison of several recipes; give it to sparsekit compare"
        raise RecipeError(message, where=document.where(("variants",)))
    load_plugins(document, plugins)
    return checked(document)


def refuse_code(recipe: Recipe, allowed: bool) -> None:
    """A checkpoint's own Python code runs only when the recipe and whoever starts it both say so.

    Raises:
        RecipeError: Only the recipe does.
    """
    if recipe.model.trust_remote_code and not allowed:
        message = (
            "trust_remote_code lets the checkpoint's own Python code run; whoever starts the recipe has to agree, "
            "with --trust-remote-code on the command line of sparsekit run or plan"
        )
        raise RecipeError(message, where=recipe.where("model", "trust_remote_code"))


def read_overridden(path: Path, overrides: Sequence[str]) -> Document:
    """A file's values with those of the command line in place.

    Raises:
        RecipeError: The file cannot be read, or an override fits nowhere.
    """
    document = read_document(_content(path), str(path))
    for argument in overrides:
        document.override(argument)
    return document


def checked(document: Document) -> Recipe:
    """The recipe of a document whose plugins are loaded.

    Raises:
        RecipeError: Anything wrong with it, by file and line.
    """
    try:
        recipe = Recipe.model_validate_json(plain_json(document.values))
    except ValidationError as error:
        complain(error, document, lambda keys: _allowed(keys, document.values))
        document.raise_problems()
        raise  # pydantic found something and `complain` nothing: a fault of ours
    recipe._document = document
    for keys, message in contradictions(recipe):
        document.report(keys, message)
    document.raise_problems()
    return recipe


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of recipes, with one branch for each method that is registered now."""
    schema = Recipe.model_json_schema()
    steps = steps_schema(method for method in METHODS if method.kind != "allocate")
    schema["$defs"] |= steps.pop("$defs")
    schema["properties"]["steps"]["items"] = steps
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _content(path: Path) -> str:
    """Content of a recipe file."""
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix in {".yaml", ".yml"})
        listed = f"the recipes in it: {', '.join(inside)}" if inside else "it holds no .yaml file"
        raise RecipeError(f"this is a directory, not a recipe file; {listed}", where=str(path))
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        missing = "" if path.parent.is_dir() else f"; there is no directory {path.parent}"
        raise RecipeError(f"no such recipe file{missing}.{nearest(path.name, siblings)}", where=str(path))
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if len(data) > MAX_BYTES:
        raise RecipeError(f"the file is larger than {MAX_BYTES // 1024} KiB, this is no recipe", where=str(path))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        message = f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        raise RecipeError(message, where=f"{path}:{line}") from error


def load_plugins(document: Document, extra: Sequence[Path]) -> None:
    """Load the recipe's plugins and those of the command line, which become part of the recipe."""
    for path in extra:
        METHODS.load_path(path)
    written = document.values.get("plugins") or []
    if not isinstance(written, list) or not all(isinstance(item, str) and item for item in written):
        return  # the schema names what is wrong
    base = Path(document.file).parent
    for index, item in enumerate(written):
        file = base / os.path.expanduser(item)
        try:
            METHODS.load_path(file)
        except PluginError as error:
            siblings = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
            hint = "" if file.exists() else f".{nearest(file.name, siblings)}"
            raise RecipeError(f"{error}{hint}", where=document.where(("plugins", index))) from error
    added = [os.path.realpath(path) for path in extra]
    if added:
        here = {os.path.realpath(base / os.path.expanduser(item)) for item in written}
        document.values["plugins"] = [*written, *(item for item in added if item not in here)]


def _allowed(keys: Keys, values: Any) -> list[str]:
    """Keys that the mapping at `keys` may have."""
    if keys[:1] == ("steps",):
        return known_keys(values["steps"][keys[1]], keys[2:])
    if keys[:2] == ("evaluate", "measures"):
        return known_measure_keys(values["evaluate"]["measures"][keys[2]])
    model: type[BaseModel] = Recipe
    for key in keys:
        if isinstance(key, str) and key in model.model_fields:
            annotation = model.model_fields[key].annotation
            candidates = [annotation, *get_args(annotation)]
            model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
