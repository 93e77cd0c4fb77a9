"""What reaches modules of a whole model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.checkpoint import BlockState
from sparsekit.models.groups import hooked
from sparsekit.models.view import ModelView


def inputs_of(
    view: ModelView, blocks: Iterable[BlockState], tokens: Tensor, modules: Mapping[Any, nn.Module]
) -> dict[Any, Tensor]:
    """The first argument of each module by its key, [tokens, ...], in one forward with the states of these blocks."""
    found: dict[Any, Tensor] = {}
    view.materialise_all(blocks)
    handles = [
        module.register_forward_pre_hook(lambda _, arguments, key=key: found.update({key: arguments[0].flatten(0, 1)}))
        for key, module in modules.items()
    ]
    with hooked(handles), torch.inference_mode():
        view.module(input_ids=tokens, use_cache=False)
    for index in range(len(view.blocks)):
        view.release(index)
    return found
