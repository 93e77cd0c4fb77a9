"""Integer grids: the one definition of rounding, scales and zero-points.

A grid belongs to a group of consecutive inputs of one row. A code q in 0..2^bits-1 stands for
`(q - zero) * scale`; zero-points are integers and every range includes 0, so that a pruned
weight is stored exactly.

A kept weight of an N:M pattern is told from a pruned one by its place and needs no level at 0. An `odd`
grid of b bits has the levels ±1, ±3, ..., ±(2^(b-1) - 1) for kept weights and 0 for pruned ones: it is
an ordinary symmetric grid whose kept codes are all odd, so that b - 1 bits tell a kept one. A `six` grid
is the odd one of 4 bits without the outermost levels, ±1, ±3 and ±5: two of them and the 6 ways in which they
lie in a group of 2:4 have 6 · 6 · 6 = 216 states, so that a group fits a byte.

A `ternary` grid has the levels -1, 0 and 1: a symmetric grid of 2 bits that never takes its lowest code, so
that five weights fit a byte.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sparsekit.errors import MethodError

MSE_NORM = 2.4  # exponent of the clip search, IST-DASLab/gptq quant.py and AutoGPTQ
MSE_STEPS = 80  # shrink factors 1 - i/100 for i < 80, same source

Levels = Literal["integer", "odd", "six", "ternary"]


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Scale and zero-point of some groups.

    Attributes:
        scale: Positive step, already rounded to the stored precision (float16), kept as float32.
        zero: Integer zero-point in 0..2^bits-1, float32 for arithmetic. Same shape as `scale`.
        bits: 2 to 8.
        levels: Those that kept weights take; see the module.
    """

    scale: Tensor
    zero: Tensor
    bits: int
    levels: Levels = "integer"

    @classmethod
    def fit(
        cls, weight: Tensor, bits: int, *, symmetric: bool = True, mse: bool = False, levels: Levels = "integer"
    ) -> Grid:
        """Choose the grid of each group.

        Symmetric: scale = 2 max|w| / (2^bits - 1), zero = 2^(bits-1), that is levels -8..7 at
        4 bits (AutoGPTQ's grid). The maximum is taken over |w| always; the reference mirrors only
        rows that have a negative value, which clips one-sided groups to 7/15 of their range.
        Asymmetric: the range is widened to hold 0, and the zero-point is an integer.
        Others: scale = max|w| / the highest level, zero = 2^(bits-1). To odd and six levels exact zeros
        count as pruned: they have no part in the search.

        Args:
            weight: [..., group], float32; one grid for each leading index.
            symmetric: Must be so for levels that are not `integer`.
            mse: Search 80 shrunken ranges for the least sum of |error|^2.4 (GPTQ reference).
        Returns:
            Grid with `scale` and `zero` of shape [...].
        """
        if weight.is_cuda:
            from sparsekit.kernels.oneshot import fit_kernel  # noqa: PLC0415 - the kernels know grids

            if kernel := fit_kernel("auto", weight):
                return cls(*kernel(weight, bits, symmetric, mse, levels), bits, levels)
        return cls.fit_reference(weight, bits, symmetric=symmetric, mse=mse, levels=levels)

    @classmethod
    def fit_reference(
        cls, weight: Tensor, bits: int, *, symmetric: bool, mse: bool, levels: Levels = "integer"
    ) -> Grid:
        """`fit` in plain torch: what runs on a CPU, and what the kernel is tested against."""
        low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        best = cls._of_range(low, high, bits, symmetric, levels)
        if not mse:
            return best
        loss = best._loss(weight)
        for i in range(1, MSE_STEPS):
            shrink = 1 - i / 100
            trial = cls._of_range(low * shrink, high * shrink, bits, symmetric, levels)
            trial_loss = trial._loss(weight)
            better = trial_loss < loss
            loss = torch.where(better, trial_loss, loss)
            best = replace(
                best,
                scale=torch.where(better, trial.scale, best.scale),
                zero=torch.where(better, trial.zero, best.zero),
            )
        return best

    @classmethod
    def of_scale(cls, scale: Tensor, bits: int, *, levels: Levels = "integer") -> Grid:
        """The symmetric grid of a step that is stored already."""
        return cls(scale, torch.full_like(scale, float(2 ** (bits - 1))), bits, levels)

    @classmethod
    def _of_range(cls, low: Tensor, high: Tensor, bits: int, symmetric: bool, levels: Levels) -> Grid:
        """The grid that spans [low, high]; an empty range gets the step 1."""
        lowest, highest = code_range(bits, levels)
        step = (high - low) / (highest - lowest)
        step = torch.where(step > 0, step, torch.ones_like(step))
        scale = store_scale(step)
        if symmetric:
            return cls.of_scale(scale, bits, levels=levels)
        return cls(scale, torch.round(-low / scale).clamp(0, highest), bits)

    def _loss(self, weight: Tensor) -> Tensor:
        return (self.round(weight, weight != 0 if is_odd(self.levels) else None) - weight).abs().pow(MSE_NORM).sum(-1)

    def encode(self, weight: Tensor, kept: Tensor | None = None) -> Tensor:
        """Nearest codes, float32 integers in 0..2^bits-1.

        Args:
            weight: [..., group].
            kept: bool [..., group]; the others get the code of 0. None where all are kept, or where 0
                is rounded to 0 anyway, as it is on a grid that has a level there.
        """
        scale, zero = self.scale.unsqueeze(-1), self.zero.unsqueeze(-1)
        if is_odd(self.levels):
            code = 2 * torch.round((weight / scale - 1) / 2) + 1 + zero
        else:
            code = torch.round(weight / scale + zero)
        code = code.clamp(*code_range(self.bits, self.levels))
        return code if kept is None else torch.where(kept, code, zero)

    def round(self, weight: Tensor, kept: Tensor | None = None) -> Tensor:
        """The nearest values the grid can hold; 0 for those that are not `kept`."""
        return (self.encode(weight, kept) - self.zero.unsqueeze(-1)) * self.scale.unsqueeze(-1)


def is_odd(levels: str) -> bool:
    """Whether kept codes are an odd number of steps from zero, so that 0 is left to pruned ones."""
    return levels in ("odd", "six")


def code_range(bits: int, levels: Levels) -> tuple[int, int]:
    """The lowest and the highest code that levels take: all but integer ones reach as far down as up."""
    lowest = {"integer": 0, "odd": 1, "ternary": 1, "six": 3}[levels]
    return lowest, 2**bits - max(lowest, 1)


def store_scale(step: Tensor) -> Tensor:
    """Round a step to float16, the stored precision, without letting it vanish or overflow."""
    half = torch.finfo(torch.float16)
    return step.clamp(half.smallest_normal, half.max).half().float()


@dataclass(frozen=True, slots=True)
class Rounding:
    """How kept weights are put on integer grids.

    Attributes:
        bits: Bits of a code.
        group_size: Columns that share a grid; must divide the row.
        symmetric: See `Grid.fit`.
        mse: See `Grid.fit`.
        static: Fit every grid before the sweep, on the given weights and groups in natural order.
            Otherwise a grid is fitted when the sweep reaches its group, on the weights as they are
            then, and groups are runs of columns in sweep order.
        levels: See the module.
    """

    bits: int
    group_size: int
    symmetric: bool = True
    mse: bool = False
    static: bool = False
    levels: Levels = "integer"

    def fit(self, weight: Tensor) -> Grid:
        """One grid for each leading index of a weight [..., group]."""
        return Grid.fit(weight, self.bits, symmetric=self.symmetric, mse=self.mse, levels=self.levels)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight as integers.

    Attributes:
        codes: uint8 [out, in], values 0..2^bits-1.
        scale: float16 [out, groups]; a checkpoint of others may bring bfloat16 or float32.
        zero: uint8 [out, groups].
        group_of: int32 [in], the group each input belongs to.
        bits: 2 to 8.
        group_size: Inputs of a group; the row length when there is one group a row.
        symmetric: All zero-points are 2^(bits-1).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_of: Tensor
    bits: int
    group_size: int
    symmetric: bool

    @classmethod
    def of(
        cls,
        codes: Tensor,
        grids: Grid,
        *,
        group_size: int,
        symmetric: bool,
        group_of: Tensor | None = None,
    ) -> QuantizedWeight:
        """Assemble from float codes [out, in] and grids of shape [out, groups]."""
        if group_of is None:
            group_of = torch.arange(codes.shape[1], device=codes.device) // group_size
        return cls(
            codes=codes.to(torch.uint8),
            scale=grids.scale.half(),
            zero=grids.zero.to(torch.uint8),
            group_of=group_of.to(torch.int32),
            bits=grids.bits,
            group_size=group_size,
            symmetric=symmetric,
        )

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same integers on a device."""
        return replace(
            self,
            codes=self.codes.to(device),
            scale=self.scale.to(device),
            zero=self.zero.to(device),
            group_of=self.group_of.to(device),
        )

    def equal(self, other: QuantizedWeight) -> bool:
        """Whether every integer, scale and setting is the same; scales may differ in dtype, not in value."""
        about = (self.bits, self.group_size, self.symmetric) == (other.bits, other.group_size, other.symmetric)
        pairs = ((self.codes, other.codes), (self.zero, other.zero), (self.group_of, other.group_of))
        same = about and all(torch.equal(one, two) for one, two in pairs)
        return same and torch.equal(self.scale.float(), other.scale.float())

    def dequantize(self) -> Tensor:
        """The float32 weight [out, in] the integers stand for; zeros are exactly +0.0."""
        columns = self.group_of.long()
        scale = self.scale.float()[:, columns]  # [out, in]
        zero = self.zero.float()[:, columns]
        return (self.codes.float() - zero) * scale


NO_GROUP_SIZE = "group_size {} is no number of inputs; write 1 or more, or -1 for one group a row"


def resolve_group_size(group_size: int, columns: int) -> int:
    """Translate -1 (one group a row) and check that groups are whole.

    Raises:
        MethodError: `group_size` is no size, or does not divide the row; then the message lists sizes that do.
    """
    if group_size == -1:
        return columns
    if group_size < 1:
        raise MethodError(NO_GROUP_SIZE.format(group_size))
    if columns % group_size:
        fitting = [size for size in (256, 128, 64, 32, 16, 8) if columns % size == 0]
        raise MethodError(
            f"group_size {group_size} does not divide the {columns} inputs of this layer; "
            f"sizes that do: {', '.join(map(str, fitting)) or 'none of 8..256'}, or -1 for one group a row"
        )
    return group_size
