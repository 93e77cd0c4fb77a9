"""Launches the fused optimizer step; its kernel is in `adamw_device.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from sparsekit.kernels.adamw_device import advance_chunks
from sparsekit.kernels.steps import learn_
from sparsekit.kernels.table import CHUNK, Table
from sparsekit.pattern import Pattern
from sparsekit.quant import code_range, is_odd
from sparsekit.training.lowbits import Memory, step_key
from sparsekit.training.update import Rule, Step

GROUPS = (4, 8)  # lengths of a group whose mask the kernel chooses
WARPS = 8  # 4 elements a thread: 58 registers and no barrier (bfloat16 parameters, compiled for sm_90)
FLOAT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class FusedAdamW:
    """The fused step of a `SparseAdamW`: one launch for each dtype among its parameters, which is one as a rule.

    Args:
        names: Parameters by name, in the optimizer's order; contiguous, on one device.
        state: State of each, shared with the optimizer.
        pattern: Of the masks.
        rule: The update.
        memory: Precision of the state.
    """

    def __init__(
        self,
        names: Mapping[str, Tensor],
        state: Mapping[Tensor, Mapping[str, Tensor]],
        pattern: Pattern,
        rule: Rule,
        memory: Memory,
    ) -> None:
        self.refreshes = pattern.structured and pattern.m in GROUPS
        self.pattern, self.rule, self.memory = pattern, rule, memory
        by_dtype: dict[torch.dtype, list[tuple[int, Tensor]]] = {}
        for index, (name, parameter) in enumerate(names.items()):
            if "mask" in state[parameter] and not pattern.fits(parameter.shape[-1]):
                raise ValueError(f"{parameter.shape[-1]} inputs of {name} do not divide into groups of {pattern.m}")
            by_dtype.setdefault(parameter.dtype, []).append((index, parameter))
        self.tables = {dtype: Table(members, state) for dtype, members in by_dtype.items()}
        device = next(iter(names.values())).device
        self._one = torch.ones((), device=device)

    def advance(
        self, step: Step, clip: Tensor | None, *, masked: bool, rounded: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """One step of every parameter that has a gradient; new masks if the step says so and M is 4 or 8.

        Args:
            step: The numbers of this step.
            clip: float32 scalar on the device.
            masked: Whether the parameters get W ⊙ M.
            rounded: Whether they get that on its grids, of now.
        Returns:
            Changed and moved entries as `SparseAdamW.refresh` counts them; None if no mask was chosen.
        """
        refresh = step.refresh and self.refreshes
        counters = self._launch(step, clip, masked, rounded, update=True, refresh=refresh)
        return (counters[0], counters[1]) if refresh else None

    def learn(self, step: Step, clip: Tensor | None) -> None:
        """Update the steps of grids by the gradients that `advance` is to use, before it."""
        assert self.rule.rounding is not None  # or nothing is on a grid
        factor = self._one if clip is None else clip
        for table in self.tables.values():
            for _, parameter in table.parameters:
                state, grad = table.state[parameter], parameter.grad
                if "step_dense" in state and grad is not None:
                    learn_(state, grad.contiguous(), factor, self.rule.rounding, self.rule, step)

    def write(self, *, masked: bool) -> None:
        """Put weights on their grids into the parameters, and update nothing."""
        self._launch(Step(1, lr=0.0), None, masked, rounded=True, update=False, refresh=False)

    def _launch(
        self, step: Step, clip: Tensor | None, masked: bool, rounded: bool, *, update: bool, refresh: bool
    ) -> Tensor:
        """The launches; returns the two counters."""
        rounding = self.rule.rounding if rounded else None
        lowest, highest = (0, 0) if rounding is None else code_range(rounding.bits, rounding.levels)
        counters = torch.zeros(2, dtype=torch.int64, device=self._one.device)
        for dtype, table in self.tables.items():
            rows = table.rows()
            constants: dict[str, Any] = {
                "PARAMETER": FLOAT[dtype],
                "MASTER": FLOAT[self.memory.master_dtype],
                "FLOAT8": self.memory.states == "float8",
                "MOMENTUM": self.rule.second_moment == "momentum",
                "L1": self.rule.decay_rule == "l1",
                "UPDATE": update,
                "MASKED": masked,
                "REFRESH": refresh,
                "BITS": 0 if rounding is None else rounding.bits,
                "ODD": rounding is not None and is_odd(rounding.levels),
                "LOWEST": float(lowest),
                "HIGHEST": float(highest),
                "N": self.pattern.n,
                "M": self.pattern.m if self.refreshes else GROUPS[0],
                "CHUNK": CHUNK,
                "ALIGNED": table.aligned,
            }
            with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
                advance_chunks[(len(table.chunks),)](
                    rows,
                    table.chunks,
                    self._one if clip is None else clip,
                    counters,
                    *self._numbers(step),
                    **constants,
                    num_warps=WARPS,
                )
        return counters

    def _numbers(self, step: Step) -> tuple[float | int, ...]:
        """The scalars of a step as the kernel takes them."""
        beta1, beta2 = self.rule.betas
        key = step_key(self.memory.seed, step.number)
        numbers = (
            1 - beta1,
            beta2,
            1 - beta2,
            self.rule.eps,
            -step.lr / (1 - beta1**step.number),
            1 - beta2**step.number,
            1 - step.lr * step.weight_decay,
            step.decay,
            step.mix,
            1 + step.hysteresis,
        )
        signed = key - 2**32 if key >= 2**31 else key  # always an int32, so that nothing compiles anew
        return (*(float(number) for number in numbers), signed)
