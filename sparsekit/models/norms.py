"""Root-mean-square norms as one kernel: launches cost more than a token's arithmetic, and passes over many tokens too.

Transformers writes such a norm as seven operations or more; torch has it as one. Only norms that torch's computes
within rounding are taken: each is tried on random values, so no architecture is named. The results may differ in the
last bit, because torch's rounds once where transformers' rounds twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ULPS = 2  # units in the last place by which the two may differ
Norm = tuple[nn.Module, Callable[[Tensor], Tensor]]


def single_kernel_norms(model: nn.Module) -> list[Norm]:
    """The norms of a model that torch computes as one operation, each with that operation."""
    return [(module, found) for module in model.modules() if (found := _single(module)) is not None]


def _single(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """torch's operation for a module, or None where it is no such norm."""  # noqa: D403
    parameters = dict(module.named_parameters(recurse=False))
    if (
        set(parameters) != {"weight"}
        or parameters["weight"].dim() != 1
        or not type(module).__name__.endswith("RMSNorm")
    ):
        return None
    weight = parameters["weight"].detach()
    x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    expected = module.forward(x)  # past hooks: somebody may record what reaches the norm
    epsilons = [vars(module)[name] for name in ("variance_epsilon", "eps") if name in vars(module)]
    for eps in epsilons:
        for scale in (weight, 1 + weight):  # as in Llama, as in Gemma
            if _close(F.rms_norm(x, scale.shape, scale, eps), expected):
                return lambda x, scale=scale, eps=eps: F.rms_norm(x, scale.shape, scale, eps)  # type: ignore[misc]
    return None


def _close(one: Tensor, two: Tensor) -> bool:
    allowed = ULPS * torch.finfo(two.dtype).eps
    return one.dtype == two.dtype and torch.allclose(one.float(), two.float(), rtol=allowed, atol=allowed)


@contextmanager
def replaced(norms: Sequence[Norm]) -> Iterator[None]:
    """Let these norms be computed by their operations."""
    for module, operation in norms:
        module.forward = operation
    try:
        yield
    finally:
        for module, _ in norms:
            del module.forward
