"""What two runs must have in common for their numbers to be compared, and the refusal when they have not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsekit.data import entry_digest
from sparsekit.errors import RecipeError
from sparsekit.evaluation.scoring import measures_basis, tasks_basis
from sparsekit.models.view import ModelView
from sparsekit.planning.plan import Plan, reads
from sparsekit.recipe import Recipe

# Where each part of a basis is written in a recipe.
PLACES: Mapping[str, tuple[str, ...]] = {
    "model": ("model", "path"),
    "dtype": ("model", "dtype"),
    "compute_dtype": ("model", "compute_dtype"),
    "device": ("model", "device"),
    "seed": ("seed",),
    "calibration": ("data", "calibration"),
    "train": ("data", "train"),
    "perplexity": ("evaluate", "perplexity"),
    "tasks": ("evaluate", "lm_eval"),
    "measures": ("evaluate", "measures"),
}
WORDS: Mapping[str, str] = {
    "model": "the model's files",
    "dtype": "the dtype weights are stored in",
    "compute_dtype": "the dtype forwards compute in",
    "device": "the kind of device",
    "seed": "the seed",
    "calibration": "the calibration text",
    "train": "the training text",
    "perplexity": "the evaluation texts",
    "tasks": "the zero-shot tasks",
    "measures": "the measures",
}
OPTIONAL = ("calibration", "train")  # of no meaning to an arm that does not read them


def basis(recipe: Recipe, plan: Plan, view: ModelView) -> dict[str, Any]:
    """Digests and settings that must agree; a text is None when no step reads it."""
    read = {reads(planned.step) for planned in plan.steps}
    entries = {"calibration": recipe.data.calibration, "train": recipe.data.train}
    texts = {
        name: entry_digest(entry, recipe.resolve) if entry and name in read else None for name, entry in entries.items()
    }
    scored = {name: recipe.data.evaluation[name] for name in recipe.evaluate.perplexity}
    return {
        "model": plan.model_digest,
        "dtype": str(view.dtype).removeprefix("torch."),
        "compute_dtype": str(view.compute_dtype).removeprefix("torch."),
        "device": view.device.type,
        "seed": recipe.seed,
        **texts,
        "perplexity": {name: entry_digest(entry, recipe.resolve) for name, entry in scored.items()},
        "tasks": tasks_basis(recipe),
        "measures": measures_basis(recipe),
    }


@dataclass(frozen=True, slots=True)
class Based:
    """One arm's basis.

    Attributes:
        name: Of the arm, for messages.
        basis: As `basis` gives it.
        settings: The recipe as plain data, to tell how things differ.
        where: From keys of the recipe to `recipe.yaml:12`.
    """

    name: str
    basis: Mapping[str, Any]
    settings: Mapping[str, Any]
    where: Callable[..., str]


def refuse_different(arms: Sequence[Based]) -> None:
    """Accept arms that were measured alike.

    Raises:
        RecipeError: Some were not; every difference is told with its place and both values.
    """
    first = arms[0]
    found = [
        (key, read, arm)
        for key in PLACES
        for read in [_first_reader(arms, key) or first]
        for arm in arms
        if differs(read.basis, arm.basis, key)
    ]
    if found:
        lines = [_told(key, read, arm) for key, read, arm in found]
        key, _, arm = found[0]
        message = "\n".join([f"cannot be compared: {lines[0]}", *lines[1:]])
        raise RecipeError(message, where=arm.where(*PLACES[key]))


def _first_reader(arms: Sequence[Based], key: str) -> Based | None:
    """The first arm that has something to say about a part."""
    return next((arm for arm in arms if arm.basis[key] is not None), None)


def differs(one: Mapping[str, Any], other: Mapping[str, Any], key: str) -> bool:
    """Whether a part of two bases differs; a text that one of them does not read is no difference."""
    if key in OPTIONAL and None in (one[key], other[key]):
        return False
    return bool(one[key] != other[key])


def _told(key: str, one: Based, other: Based) -> str:
    """A difference in one line, with what the recipes say where they say different things."""
    says, said = _apart(*(_setting(arm.settings, key) for arm in (other, one)))
    values = f": {_shown(says)} and {_shown(said)}" if says != said else "; the recipes agree, the content does not"
    here, there = one.where(*PLACES[key]), other.where(*PLACES[key])
    return f"{WORDS[key]} of {other.name} ({there}) and of {one.name} ({here}) differ{values}"


def _apart(one: Any, other: Any) -> tuple[Any, Any]:
    """Two settings without what they have in common."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return one, other
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    pairs = {key: _apart(one.get(key), other.get(key)) for key in keys}
    return {key: pair[0] for key, pair in pairs.items()}, {key: pair[1] for key, pair in pairs.items()}


def _setting(settings: Mapping[str, Any], key: str) -> Any:
    """What a recipe says about a part; about texts also how they are cut."""
    if key == "perplexity":
        wanted = settings["evaluate"]["perplexity"]
        return {name: settings["data"]["evaluation"][name] for name in wanted}
    value: Any = settings
    for part in PLACES[key]:
        value = value.get(part)  # recipes from before there were measures lack them
    return value


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else f"{text[:157]}..."


def notes(arms: Sequence[Based], environments: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What does not forbid a comparison and still has to be said."""
    for key in ("device", "torch", "transformers", "sparsekit"):
        seen: dict[str, list[str]] = {}
        for arm, about in zip(arms, environments, strict=True):
            seen.setdefault(str(about.get(key)), []).append(arm.name)
        if len(seen) > 1:
            told = "; ".join(f"{value}: {', '.join(names)}" for value, names in seen.items())
            what = "times and peak memory are not of one device" if key == "device" else f"{key} is not the same"
            yield f"{what} ({told})"
