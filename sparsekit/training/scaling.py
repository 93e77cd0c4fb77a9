"""Learned scales of a sparse weight (CAST): the model computes with s ⊙ W ⊙ M, one s for each part of a row.

A pruned row has lost length that its kept weights win back only slowly; its scales give it back at
once. They belong to the optimizer like W itself: the gradient that reaches the parameter gives both.
At the end they are multiplied into W, so the result is an ordinary sparse weight.

Source: arXiv:2509.25996 (two scales a row). Deviations: none known; that paper has no released code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekit.pattern import Pattern


def check_parts(name: str, inputs: int, parts: int, pattern: Pattern) -> None:
    """Parts of a row must hold whole groups, so that a scale changes no choice within a group.

    Raises:
        ValueError: They do not.
    """
    if inputs % (parts * pattern.m):
        raise ValueError(f"{name}: {inputs} inputs do not divide into {parts} parts of whole groups of {pattern.m}")


def first_scale(weight: Tensor, parts: int) -> dict[str, Tensor]:
    """State of the scales of a weight [out, in]: ones [out, parts] and their moments, float32 or wider."""
    ones = torch.ones(len(weight), parts, device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
    return {"scale": ones, "scale_avg": torch.zeros_like(ones), "scale_avg_sq": torch.zeros_like(ones)}


def scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """The weight times its scales, [out, in]."""
    parts = weight.reshape(len(weight), scale.shape[1], -1)  # [out, parts, in/parts]
    return (parts * scale.to(weight.dtype).unsqueeze(2)).reshape(weight.shape)


def split_gradient(grad: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """∂L/∂W and ∂L/∂s from ∂L/∂(s ⊙ W ⊙ M).

    Args:
        grad: float32 [out, in].
        weight: W ⊙ M, or W where the model computes with all weights; [out, in].
        scale: [out, parts].
    Returns:
        [out, in], with the straight-through gradient at pruned entries, and [out, parts].
    """
    return scaled(grad, scale), (grad * weight).reshape(len(weight), scale.shape[1], -1).sum(2)
