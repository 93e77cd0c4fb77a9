"""A teacher that is not the dense original: a larger model with the same tokenizer."""

from __future__ import annotations

import json
from typing import Any

from sparsekit.data import load_tokenizer
from sparsekit.errors import DataError, ModelError, RecipeError
from sparsekit.models.view import ModelView
from sparsekit.recipe import Recipe

DECIDES = ("model", "added_tokens", "normalizer", "pre_tokenizer")  # the parts of a fast tokenizer that make the ids


def open_teacher(recipe: Recipe, index: int, view: ModelView, tokenizer: Any, *, empty: bool = False) -> ModelView:
    """The teacher that a step names, in the precision and on the device of the student.

    Args:
        recipe: With a `teacher` in step `index`.
        index: Of the step.
        view: The model that learns.
        tokenizer: Of that model.
        empty: Read headers only.
    Raises:
        RecipeError: There is no such model, or its vocabulary or tokenizer is another one.
    """
    named = recipe.steps[index].teacher
    assert named is not None  # only called for a step that names one
    where = recipe.where("steps", index, "teacher")
    try:
        teacher = ModelView.open(
            recipe.resolve(named),
            compute_dtype=view.compute_dtype,
            device=view.device,
            trust_remote_code=recipe.model.trust_remote_code,
            allow_network=recipe.allow_network,
            empty=empty,
        )
        own = load_tokenizer(teacher.path, trust_remote_code=recipe.model.trust_remote_code)
    except (ModelError, DataError) as error:
        raise RecipeError(f"teacher: {error}", where=where) from error
    wanted, there = (each.config.get_text_config().vocab_size for each in (view, teacher))
    if wanted != there:
        message = f"the teacher {named} has a vocabulary of {there} ids, the model has {wanted}"
        raise RecipeError(f"{message}; it must have the same tokenizer", where=where)
    if differing := tokenizers_differ(tokenizer, own):
        message = f"the teacher {named} has another tokenizer than {view.path}: {differing}"
        raise RecipeError(f"{message}; the same ids must mean the same text", where=where)
    return teacher


def tokenizers_differ(one: Any, other: Any) -> str:
    """In what two tokenizers differ that decides the ids of a text; empty if they agree."""
    words, others = one.get_vocab(), other.get_vocab()
    if words != others:
        odd = sorted(words.keys() ^ others.keys()) or sorted(word for word in words if words[word] != others[word])
        return f"{odd[0]!r} and {len(odd) - 1} more entries of the vocabulary"
    if one.is_fast and other.is_fast:
        parts, their = (json.loads(each.backend_tokenizer.to_str()) for each in (one, other))
        return next((f"its {name.replace('_', ' ')}" for name in DECIDES if parts[name] != their[name]), "")
    return "" if type(one) is type(other) else f"it is a {type(other).__name__}, not a {type(one).__name__}"
