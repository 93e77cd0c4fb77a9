"""Comparison files: one base recipe and the choices that make its arms.

    steps: [...]            # what every arm begins with; may be left out
    variants:
      prune:                # a stage: one of its choices is taken
        magnitude: {method: magnitude, pattern: "2:4"}
        wanda: {method: wanda, pattern: "2:4"}
      quantize:
        none:               # nothing; the name is left out of the arm's
        gptq: {method: gptq, bits: 4}

Every combination of one choice a stage is an arm, here magnitude, magnitude-gptq, wanda, wanda-gptq.
A choice is one step, a list of steps, or nothing. Each arm is a recipe of its own, whose mistakes
are told with the line of the comparison file.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sparsekit.errors import PluginError, RecipeError
from sparsekit.formats import FORMATS
from sparsekit.recipe import Recipe, checked, load_plugins, read_overridden
from sparsekit.recipe.entries import file_name
from sparsekit.recipe.step import Step
from sparsekit.recipe.yamllines import Document, Keys, Mark, shown

STAGES = ("variants",)
MOST = 1000  # arms


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice of a stage.

    Attributes:
        name: As the file has it.
        steps: Where each of its steps stands in the file, and the step.
    """

    name: str
    steps: Sequence[tuple[Keys, Any]]


@dataclass(slots=True)
class Arms:
    """The recipes of a comparison.

    Attributes:
        name: Of the comparison.
        recipes: By the arm's name, in the order of the file.
        notes: What was left out of an arm.
        output: Directory the comparison file names, None for none.
    """

    name: str
    recipes: dict[str, Recipe] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    output: str | None = None

    @property
    def place(self) -> Path:
        """Where the comparison goes when nobody says."""
        return Path(os.path.expanduser(self.output)) if self.output else Path("runs") / self.name


def read_arms(paths: Sequence[Path], overrides: Sequence[str] = (), *, plugins: Sequence[Path] = ()) -> Arms:
    """Read one comparison file, or several recipes.

    Args:
        paths: A file with `variants`, or recipes without, in the order of the arms.
        overrides: `KEY=VALUE`, applied to every file.
        plugins: Plugin files to load besides the recipes' own.
    Raises:
        RecipeError: Anything wrong with a file, by file and line.
    """
    documents = []
    for path in paths:
        document = read_overridden(path, overrides)
        load_plugins(document, plugins)
        documents.append(document)
    if len(documents) == 1:
        if "variants" not in documents[0].values:
            message = "one recipe is nothing to compare; name a second one, or add variants: to this file"
            raise RecipeError(message, where=documents[0].where(()))
        return arms_of(documents[0])
    recipes: dict[str, Recipe] = {}
    for document in documents:
        if "variants" in document.values:
            message = "a file with variants is a comparison of its own; give it alone"
            raise RecipeError(message, where=document.where(STAGES))
        recipe = checked(document)
        if recipe.name in recipes:
            message = f"name {recipe.name!r} is that of {recipes[recipe.name].where('name')} too; arms need their own"
            raise RecipeError(message, where=document.where(("name",)))
        recipes[recipe.name] = recipe
    return Arms("compare-" + "-".join(recipes), recipes)


def arms_of(document: Document) -> Arms:
    """The arms of a comparison file."""
    stages = [_choices(document, stage, raw) for stage, raw in _stages(document)]
    if (count := prod(map(len, stages))) > MOST:
        message = f"the stages make {count:,} arms, more than the {MOST:,} that one comparison may have"
        raise RecipeError(message, where=document.where(STAGES))
    name = document.values.get("name")
    found = Arms(name if isinstance(name, str) else "comparison")
    for choices in product(*stages):
        parts = [choice.name for choice in choices if choice.steps]
        arm = "-".join(parts)
        if not arm:
            message = "a combination chooses nothing in every stage; the dense model is in the comparison anyway"
            raise RecipeError(message, where=document.where(STAGES))
        if arm in found.recipes:
            raise RecipeError(f"two combinations are called {arm!r}; rename a choice", where=document.where(STAGES))
        found.recipes[arm] = checked(_arm(document, arm, choices, found.notes))
        found.output = found.recipes[arm].output
    return found


def _stages(document: Document) -> Iterator[tuple[str, Any]]:
    raw = document.values["variants"]
    if not isinstance(raw, dict) or not raw:
        example = "variants: {prune: {wanda: {method: wanda}, magnitude: {method: magnitude}}}"
        raise RecipeError(f"variants is {shown(raw)}, expected stages, as in {example}", where=document.where(STAGES))
    yield from raw.items()


def _choices(document: Document, stage: str, raw: Any) -> list[Choice]:
    """The choices of a stage with the places of their steps."""
    keys: Keys = ("variants", stage)
    if not isinstance(raw, dict) or not raw:
        message = f"stage {stage!r} is {shown(raw)}, expected choices by name, as in {{wanda: {{method: wanda}}}}"
        raise RecipeError(message, where=document.where(keys))
    found = []
    for name, value in raw.items():
        at: Keys = (*keys, name)
        try:
            file_name(name)
        except ValueError as error:
            raise RecipeError(f"choice {error}", where=document.where(at)) from error
        if value is None:
            found.append(Choice(name, ()))
        elif isinstance(value, list):
            found.append(Choice(name, [((*at, index), step) for index, step in enumerate(value)]))
        elif isinstance(value, dict):
            found.append(Choice(name, [(at, value)]))
        else:
            message = f"choice {name!r} is {shown(value)}, expected a step, a list of steps, or nothing"
            raise RecipeError(message, where=document.where(at))
    return found


def _arm(base: Document, name: str, choices: Sequence[Choice], notes: list[str]) -> Document:
    """The document of one arm: the base with its steps, every mark where the file has it."""
    values = {key: copy.deepcopy(value) for key, value in base.values.items() if key != "variants"}
    marks = {keys: mark for keys, mark in base.marks.items() if keys[:1] != STAGES}
    first = values.get("steps") or []
    if not isinstance(first, list):
        raise RecipeError(f"steps is {shown(first)}, expected a list", where=base.where(("steps",)))
    values["steps"] = [*first]
    marks.setdefault(("steps",), base.mark(STAGES))
    for choice in choices:
        for keys, step in choice.steps:
            place: Keys = ("steps", len(values["steps"]))
            marks |= _moved(base.marks, keys, place)
            values["steps"].append(copy.deepcopy(step))
    values["name"] = name
    values["plugins"] = values.get("plugins") or []
    _without_integers(values, name, notes)
    return Document(base.file, values, marks, list(base.problems), set(base.reported))


def _moved(marks: Mapping[Keys, Mark], old: Keys, new: Keys) -> dict[Keys, Mark]:
    return {new + keys[len(old) :]: mark for keys, mark in marks.items() if keys[: len(old)] == old}


def _without_integers(values: dict[str, Any], name: str, notes: list[str]) -> None:
    """Leave formats that hold integers out of an arm that quantizes nothing, and say so."""
    export = values.get("export")
    if not isinstance(export, dict) or any(_quantizes(step) for step in values["steps"]):
        return
    formats = export.get("formats")
    if not isinstance(formats, list):
        return
    dropped = [each for each in formats if each in FORMATS and FORMATS[each].storage is not None]
    if dropped and len(dropped) < len(formats):
        values["export"] = {**export, "formats": [each for each in formats if each not in dropped]}
        notes.append(f"{name}: no {', '.join(dropped)} export, since no step quantizes")


def _quantizes(step: Any) -> bool:
    """Whether a step leaves integers, of what a file says; a wrong one is told of when its arm is read."""
    try:
        return Step.parse(step).quantizes
    except (ValidationError, PluginError):
        return False
