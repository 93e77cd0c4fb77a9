"""From a recipe to its model and its plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from sparsekit.data import entry_digest, load_tokenizer
from sparsekit.models.view import ModelView
from sparsekit.planning.plan import Plan, make_plan, texts_of
from sparsekit.recipe import Recipe, TextEntry

T = TypeVar("T")


def open_view(recipe: Recipe, *, empty: bool = False) -> ModelView:
    """The recipe's model; with `empty` of headers only, as in `ModelView.open`."""
    model = recipe.model
    with recipe.placing("model"):
        return ModelView.open(
            recipe.resolve(model.path),
            dtype=model.dtype,
            compute_dtype=model.compute_dtype,
            device=model.device,
            trust_remote_code=model.trust_remote_code,
            allow_network=recipe.allow_network,
            empty=empty,
        )


def open_tokenizer(recipe: Recipe, view: ModelView) -> Any:
    """The tokenizer of the recipe's model."""
    with recipe.placing("model"):
        return load_tokenizer(view.path, trust_remote_code=recipe.model.trust_remote_code)


def plan_for(recipe: Recipe, view: ModelView, digest: str | None = None) -> Plan:
    """The plan of a recipe; its texts are read for their digests only. `digest` is the model's where it is known."""
    digests = of_texts(recipe, lambda entry: entry_digest(entry, recipe.resolve))
    named = {keys[-1]: found for keys, found in digests.items() if keys[:-1] == ("data",)}  # none that is only scored
    return make_plan(recipe, view, named, digest)


def of_texts(recipe: Recipe, look: Callable[[TextEntry], T]) -> dict[tuple[str, ...], T]:
    """What is to be known of every text that a step or an evaluation may read, by its keys; errors tell their lines."""
    named = {("data", "calibration"): recipe.data.calibration, ("data", "train"): recipe.data.train}
    every = {keys: entry for keys, entry in named.items() if entry} | texts_of(recipe)
    found = {}
    for keys, entry in every.items():
        with recipe.placing(*keys):
            found[keys] = look(entry)
    return found
