"""The repeated blocks of a model while it trains: compiled, computed twice to save memory, or watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsekit.errors import MethodError

SQUARE_HEAD_EPS = torch.finfo(torch.bfloat16).eps  # of the reference's sparse_modeling.py:250


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost module lists that hold linears, in order."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for candidate in model.modules():
        if not isinstance(candidate, nn.ModuleList) or candidate in inside:
            continue
        for member in candidate:
            if any(isinstance(inner, nn.Linear) for inner in member.modules()):
                found.append(member)
                inside.update(member.modules())
    return found


@contextmanager
def compiled(models: Iterable[nn.Module], wanted: bool) -> Iterator[None]:
    """Compile the blocks of some models; one compilation serves all blocks of a kind."""
    blocks = [block for model in models for block in blocks_of(model)] if wanted else []
    for block in blocks:
        block.compile(dynamic=False)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


@contextmanager
def recomputed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Keep only the inputs of the blocks for the backward pass, which computes each block again.

    Both passes read the same parameters, and those, masked copies included, change only in the
    optimizer, after the backward. No random state is kept: a model that trains here has no dropout.
    """
    blocks = blocks_of(model) if wanted else []
    for block in blocks:
        block.forward = _computed_twice(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _computed_twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    # a function, no functools.partial: torch.compile looks into the one and leaves the other uncompiled
    def twice(*arguments: Any, **named: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **named)

    return twice


@contextmanager
def block_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """The hidden states that leave each block in the forward passes inside, in order."""
    outputs: list[Tensor] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks_of(model)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def square_head(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Distance of hidden states, Σ over blocks of mean((h_s - h_t)²) / (mean(h_t²) + eps).

    Args:
        student: Hidden states of each block [batch, seq_len, width].
        teacher: The same of the teacher.
    Returns:
        A scalar.
    Raises:
        MethodError: The models differ in blocks or width.
    Source: Kurtic et al. 2023, arXiv:2310.06927 (SquareHead).
    """
    if [state.shape for state in student] != [state.shape for state in teacher] or not student:
        raise MethodError("hidden: the loss of hidden states needs a teacher with the student's blocks and width")
    total = torch.zeros((), device=student[0].device)
    for own, taught in zip(student, teacher, strict=True):
        wanted = taught.detach().float()
        total = total + F.mse_loss(own.float(), wanted) / (wanted.square().mean() + SQUARE_HEAD_EPS)
    return total
