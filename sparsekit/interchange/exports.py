"""All exports of a recipe, each read back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsekit.blockwise.streaming import Ahead
from sparsekit.formats import FORMATS
from sparsekit.interchange.export import export_as
from sparsekit.interchange.proof import verify_dense
from sparsekit.models.chain import Chain
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.recipe import Recipe


def export_all(
    recipe: Recipe, view: ModelView, chain: Chain, patterns: Mapping[str, Pattern]
) -> tuple[list[dict[str, Any]], dict[str, Path]]:
    """Write the model in every format of the recipe; a dense one must compute what the run computes.

    Args:
        recipe: Says which formats, and where to.
        view: The model; its blocks are empty.
        chain: The model as the run leaves it.
        patterns: The pattern each linear must hold.
    Returns:
        What the report says of each, and the directory of each by format.
    """
    view.load_rest(chain.rest())
    target = recipe.export_directory()
    reports, files = [], {}
    for name in recipe.export.formats:
        with Ahead(chain.stored, view.device, len(view.blocks)) as blocks:
            result = export_as(
                FORMATS[name],
                view,
                blocks,
                target / name,
                name=recipe.name,
                patterns=patterns,
            )
        reports.append(result.as_dict())
        files[name] = target / name
    plain = [directory for name, directory in files.items() if FORMATS[name].storage is None]
    if plain:
        tokens = torch.arange(64).remainder(view.config.get_text_config().vocab_size).unsqueeze(0)
        with chain.forward() as forward:
            logits = forward(tokens)
            for directory in plain:
                verify_dense(directory, tokens, logits, view)
    return reports, files
