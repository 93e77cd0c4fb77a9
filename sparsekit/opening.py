"""From a recipe to its model and its plan."""

from __future__ import annotations

from sparsekit.data import entry_digest
from sparsekit.models.view import ModelView
from sparsekit.planning.plan import Plan, make_plan
from sparsekit.recipe import Recipe


def open_view(recipe: Recipe, *, empty: bool = False) -> ModelView:
    """The recipe's model; with `empty` of headers only, as in `ModelView.open`."""
    model = recipe.model
    return ModelView.open(
        recipe.resolve(model.path),
        dtype=model.dtype,
        compute_dtype=model.compute_dtype,
        device=model.device,
        trust_remote_code=model.trust_remote_code,
        allow_network=recipe.allow_network,
        empty=empty,
    )


def plan_for(recipe: Recipe, view: ModelView, digest: str | None = None) -> Plan:
    """The plan of a recipe; its texts are read for their digests only. `digest` is the model's where it is known."""
    used = {"calibration": recipe.data.calibration, "train": recipe.data.train}
    texts = {name: entry_digest(entry, recipe.resolve) for name, entry in used.items() if entry}
    return make_plan(recipe, view, texts, digest)
