"""Which implementation of an operation runs: plain torch, or a Triton kernel.

The references live beside what they compute (`update.adamw_`, `distill.slice_loss_reference`) and are
the oracle of the kernels' tests. Triton files are imported here, inside a function, once one is chosen:
torch for CPU comes without Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from sparsekit.errors import MethodError
from sparsekit.pattern import Pattern
from sparsekit.training.lowbits import Memory
from sparsekit.training.update import Rule, Step

if TYPE_CHECKING:
    from sparsekit.training.distill import SliceLoss

Kernels = Literal["auto", "reference", "triton"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class FusedOptimizer(Protocol):
    """A whole optimizer step in one launch for each dtype of the parameters."""

    def advance(
        self, step: Step, clip: Tensor | None, *, masked: bool, rounded: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """Update every parameter that has a gradient; returns the flip counts if it chose the masks again."""
        ...

    def learn(self, step: Step, clip: Tensor | None) -> None:
        """Update the steps of grids by the gradients that `advance` is to use, before it."""
        ...

    def write(self, *, masked: bool) -> None:
        """Put weights on their grids into the parameters, and update nothing."""
        ...


def runs_triton(kernels: Kernels, device: torch.device, reason: str | None) -> bool:
    """Whether Triton runs an operation.

    Args:
        kernels: `auto` prefers Triton on CUDA, `reference` is torch, `triton` insists on Triton.
        device: Where the tensors are.
        reason: Why the kernel cannot take them; None if it can.
    Raises:
        MethodError: Triton is insisted on and cannot run.
    """
    if kernels == "reference" or (kernels == "auto" and device.type != "cuda"):
        return False
    if reason is None and find_spec("triton") is None:
        reason = "Triton is not installed; torch for CUDA on Linux brings it"
    if reason is not None and kernels == "triton":
        raise MethodError(f"kernels: triton cannot run here: {reason}")
    return reason is None


def fused_optimizer(
    kernels: Kernels,
    names: Mapping[str, Tensor],
    state: Mapping[Tensor, Mapping[str, Tensor]],
    pattern: Pattern,
    rule: Rule,
    memory: Memory,
) -> FusedOptimizer | None:
    """The fused optimizer of some parameters, or None where the reference runs.

    Args:
        kernels: The setting.
        names: Parameters by name, in the optimizer's order.
        state: State of each.
        pattern: Of the masks.
        rule: The update.
        memory: Precision of the state.
    """
    device = next(iter(names.values())).device
    reason = "learned scales of rows have no kernel" if rule.scaling else _why_not_fused(names, memory)
    if not runs_triton(kernels, device, reason):
        return None
    from sparsekit.kernels.adamw import FusedAdamW  # noqa: PLC0415 - imports Triton

    return FusedAdamW(names, state, pattern, rule, memory)


def _why_not_fused(names: Mapping[str, Tensor], memory: Memory) -> str | None:
    devices = {parameter.device for parameter in names.values()}
    if len(devices) > 1:
        return "parameters are on several devices"
    for name, parameter in names.items():
        if parameter.dtype not in FLOATS:
            return f"{name} is {parameter.dtype}"
        if not parameter.is_contiguous() or type(parameter.data) is not Tensor:
            return f"{name} is no plain contiguous tensor"
    device = devices.pop()
    if memory.states == "float8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "the device has no float8"
    return None


def loss_kernel(kernels: Kernels, logits: Tensor) -> SliceLoss | None:
    """The kernel of the distillation loss of some logits [rows, vocabulary], or None for the reference."""
    reason = None if logits.dtype in FLOATS else f"logits are {logits.dtype}"
    if not runs_triton(kernels, logits.device, reason):
        return None
    from sparsekit.kernels.loss import slice_loss  # noqa: PLC0415 - imports Triton

    return slice_loss
