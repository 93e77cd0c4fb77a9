"""From a recipe to its model and its plan."""

from __future__ import annotations

from typing import Any

from sparsekit.data import entry_digest, load_tokenizer
from sparsekit.models.view import ModelView
from sparsekit.planning.plan import Plan, make_plan, texts_of
from sparsekit.recipe import Recipe, TextEntry


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
    data = recipe.data
    named: dict[str, TextEntry | None] = {"calibration": data.calibration, "train": data.train}
    used = {("data", name): entry for name, entry in named.items() if entry} | texts_of(recipe)
    digests = {}
    for keys, entry in used.items():
        with recipe.placing(*keys):
            digests[keys] = entry_digest(entry, recipe.resolve)
    return make_plan(recipe, view, {name: digests["data", name] for name, entry in named.items() if entry}, digest)
