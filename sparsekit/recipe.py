"""The recipe: one YAML file that names a model, texts, steps, measurements and exports.

Every mistake is told with its file and line, all of a file's mistakes at once where that is possible.
The parameters of a step are those of its method, so a plugin's are checked like a built-in's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, Field, PrivateAttr, ValidationError

from sparsekit.complaints import complain
from sparsekit.entries import (
    STRICT,
    Exports,
    FileName,
    Measurements,
    ModelEntry,
    Numerics,
    Seed,
    Text,
    TextEntry,
    Texts,
)
from sparsekit.errors import PluginError, RecipeError, nearest
from sparsekit.formats import FORMATS
from sparsekit.registry import METHODS
from sparsekit.step import Step, known_keys, plain_json, steps_schema
from sparsekit.units import Fraction
from sparsekit.yamllines import Document, Keys, read_document

MAX_BYTES = 2**18  # recipes are a few hundred bytes; the pure Python parser needs seconds for a megabyte

__all__ = ["Recipe", "Step", "TextEntry", "read_recipe", "recipe_schema"]


class Recipe(BaseModel):
    """A whole job. `output` and `export.directory` are relative to the current directory, all else to the file."""

    model_config = STRICT

    name: FileName
    seed: Seed = 0
    output: Text | None = Field(None, description="Directory of the run; default runs/NAME.")
    plugins: list[Text] = Field(default_factory=list, description="Python files with methods.")
    allow_network: bool = Field(False, description="Let models and texts be downloaded.")
    coverage: Annotated[Fraction, Field(le=1)] = Field(
        0.95, description="Share of the parameters inside the blocks that must be within reach."
    )
    model: ModelEntry
    data: Texts = Field(default_factory=Texts)
    numerics: Numerics = Field(default_factory=Numerics)
    steps: list[Step] = Field(description="In order; an empty list measures and exports the model as it is.")
    evaluate: Measurements = Field(default_factory=Measurements)
    export: Exports = Field(default_factory=Exports)

    _document: Document = PrivateAttr(default_factory=Document)

    def where(self, *keys: str | int) -> str:
        """`recipe.yaml:12`, the line of a value or of its nearest ancestor, with the `--set` that changed it."""
        return self._document.where(keys)

    def resolve(self, path: str) -> str:
        """What a path of the recipe means.

        Relative paths start at the recipe's directory. `builtin:` and `hub:` names pass through, and
        so does what is no file when the network is allowed, since it may be a hub id.
        """
        if path.startswith(("builtin:", "hub:")):
            return path
        written = Path(os.path.expanduser(path))  # Path.expanduser raises on an unknown ~user
        found = Path(self._document.file).parent / written
        if self.allow_network and not written.is_absolute() and path[0] != "." and not found.exists():
            return path
        return str(found.resolve())

    def output_directory(self) -> Path:
        """Where the run is kept."""
        return Path(os.path.expanduser(self.output)) if self.output else Path("runs") / self.name

    def export_directory(self) -> Path:
        """Where the exports go, one directory a format."""
        written = self.export.directory
        return Path(os.path.expanduser(written)) if written else self.output_directory() / "export"

    def resolved_yaml(self) -> str:
        """The recipe with every default filled in and every path absolute; it reads back as the same recipe."""
        values = self.model_dump(mode="json", exclude={"steps"})
        values["output"] = str(self.output_directory().absolute())
        values["plugins"] = [self.resolve(path) for path in self.plugins]
        values["model"]["path"] = self.resolve(self.model.path)
        texts = [values["data"]["calibration"], values["data"]["train"], *values["data"]["evaluation"].values()]
        for text in filter(None, texts):
            path = text["path"]
            text["path"] = self.resolve(path) if isinstance(path, str) else [self.resolve(part) for part in path]
        if self.evaluate.lm_eval.tasks_dir:
            values["evaluate"]["lm_eval"]["tasks_dir"] = self.resolve(self.evaluate.lm_eval.tasks_dir)
        values["export"]["directory"] = str(self.export_directory().absolute())
        values["steps"] = [step.as_dict() for step in self.steps]
        ordered = {name: values[name] for name in type(self).model_fields}
        text = yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=110)
        return str(text)


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
    for keys, message in _contradictions(recipe):
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
    added = [str(path.resolve()) for path in extra]
    if added:
        here = {str((base / os.path.expanduser(item)).resolve()) for item in written}
        document.values["plugins"] = [*written, *(item for item in added if item not in here)]


def _allowed(keys: Keys, values: Any) -> list[str]:
    """Keys that the mapping at `keys` may have."""
    if keys[:1] == ("steps",):
        return known_keys(values["steps"][keys[1]], keys[2:])
    model: type[BaseModel] = Recipe
    for key in keys:
        if isinstance(key, str) and key in model.model_fields:
            annotation = model.model_fields[key].annotation
            candidates = [annotation, *get_args(annotation)]
            model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


def _contradictions(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    """What is wrong between parts that are right by themselves: (keys, message)."""
    yield from _wrong_order(recipe)
    yield from _missing_texts(recipe)
    yield from _wrong_measurements(recipe)
    yield from _wrong_paths(recipe)
    # without steps the model may be a quantized checkpoint
    integers = not recipe.steps or any(step.method.kind == "quantize" for step in recipe.steps)
    for index, name in enumerate(recipe.export.formats):
        if FORMATS[name].storage is not None and not integers:
            message = f"a {name} export holds integers, and no step quantizes; add one such as method: gptq"
            yield ("export", "formats", index), message
        if name in recipe.export.formats[:index]:
            yield ("export", "formats", index), f"format {name!r} is listed twice"


def _wrong_order(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    """After a quantizer nothing may write weights: integers have no room for it."""
    quantizer: int | None = None
    for index, step in enumerate(recipe.steps):
        if quantizer is None:
            quantizer = index if step.method.kind == "quantize" else None
            continue
        first = f"step {quantizer + 1} ({recipe.steps[quantizer].method.name}, {recipe.where('steps', quantizer)})"
        this = f"step {index + 1} ({step.method.name})"
        if step.method.kind == "quantize":
            yield ("steps", index), f"{this} quantizes what {first} has quantized already; keep one quantizer"
        else:
            verb = {"prune": "prunes", "train": "trains"}[step.method.kind]
            message = f"{this} {verb} weights that {first} has quantized; put it before step {quantizer + 1}"
            yield ("steps", index), message


def _missing_texts(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    for index, step in enumerate(recipe.steps):
        name = f"step {index + 1} ({step.method.name})"
        if step.calibrated and recipe.data.calibration is None:
            example = "calibration: {path: builtin:calibration, samples: 128}"
            yield ("steps", index), f"{name} reads a calibration text and there is no data.calibration; add {example}"
        if (step.method.scope == "model" or step.method.kind == "train") and recipe.data.train is None:
            example = "train: {path: builtin:train}"
            yield ("steps", index), f"{name} reads a training text and there is no data.train; add {example}"


def _wrong_measurements(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    names, wanted = list(recipe.data.evaluation), recipe.evaluate
    for index, name in enumerate(wanted.perplexity):
        keys = ("evaluate", "perplexity", index)
        if name not in names:
            there = f"there is {', '.join(names)}" if names else "data.evaluation is empty"
            yield keys, f"no text {name!r} in data.evaluation; {there}.{nearest(name, names)}"
        elif name in wanted.perplexity[:index]:
            yield keys, f"text {name!r} is listed twice"
    for index, name in enumerate(wanted.agreement if isinstance(wanted.agreement, list) else []):
        if name not in wanted.perplexity:
            hint = nearest(name, wanted.perplexity)
            yield ("evaluate", "agreement", index), f"text {name!r} is not among those of evaluate.perplexity.{hint}"
    if wanted.agreement is True and not wanted.perplexity:
        yield ("evaluate", "agreement"), "agreement is measured on the texts of evaluate.perplexity, and it names none"
    yield from _wrong_redo(recipe)
    if wanted.gates.max_ppl_increase is not None and not wanted.perplexity:
        yield ("evaluate", "gates"), "max_ppl_increase needs a text to measure; name one in evaluate.perplexity"
    if not wanted.lm_eval.tasks and (wanted.lm_eval.tasks_dir or wanted.lm_eval.limit):
        yield ("evaluate", "lm_eval"), "lm_eval names no tasks, so nothing would be measured; add tasks: [...]"


def _wrong_redo(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    """Layers can be redone by the last step, if it works layer by layer."""
    gates, keys = recipe.evaluate.gates, ("evaluate", "gates", "redo")
    if gates.redo is None:
        return
    if not recipe.steps:
        yield keys, "redo repeats layers of the last step, and steps is empty"
        return
    last = recipe.steps[-1]
    name = f"step {len(recipe.steps)} ({last.method.name})"
    if gates.max_ppl_increase is None:
        yield keys, "redo needs the limit that makes it happen; add max_ppl_increase"
    if last.method.scope == "model":
        yield keys, f"{name} trains the whole model, so single layers cannot be redone; put a pruner or quantizer last"
    if gates.redo.bits is None:
        return
    if "bits" not in last.method.parameters.model_fields:
        yield (*keys, "bits"), f"{name} has no bits; leave them out, and the worst layers stay as they were before it"
    elif gates.redo.bits <= getattr(last.params, "bits"):  # noqa: B009  # the method's own parameter
        yield (*keys, "bits"), f"bits {gates.redo.bits} is no higher precision than that of {name}"
    integers = [name for name in recipe.export.formats if FORMATS[name].storage is not None]
    if integers:
        told = f"a {integers[0]} export has one number of bits"
        yield (*keys, "bits"), f"{told}; leave bits out, and the worst layers stay unquantized"


def _wrong_paths(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    """Hub texts need the network, which a recipe has to allow."""
    data = recipe.data
    entries: list[tuple[Keys, TextEntry | None]] = [
        (("data", "calibration"), data.calibration),
        (("data", "train"), data.train),
        *((("data", "evaluation", name), entry) for name, entry in data.evaluation.items()),
    ]
    for keys, entry in entries:
        hub = [path for path in entry.paths if path.startswith("hub:")] if entry else []
        if hub and not recipe.allow_network:
            yield (*keys, "path"), f"{hub[0]} is on the hub, and the recipe lacks allow_network: true"
