"""Sparsity patterns: the one definition of N:M, and the one verifier of it.

"N:M" means N kept of every M consecutive inputs of a row. Masks are `torch.bool`, True = kept.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema
from torch import Tensor

from sparsekit.errors import MethodError, NumericsError

Scope = Literal["row", "layer"]
NOT_FINITE = "a pruning score is NaN; the weights or the calibration activations are not finite"


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which entries of a weight may stay.

    `Pattern(2, 4)` keeps 2 of every 4 consecutive inputs of a row. `Pattern.unstructured(0.5)`
    zeroes half of the entries wherever they are.

    Attributes:
        n: Entries kept in each group; 0 when unstructured.
        m: Group length along the input dimension; 0 when unstructured.
        sparsity: Fraction of zeros, in [0, 1].
    """

    n: int
    m: int
    sparsity: float = -1.0

    def __post_init__(self) -> None:
        if self.m == 0 and self.n == 0:
            if not 0.0 <= self.sparsity <= 1.0:
                raise ValueError(f"sparsity {self.sparsity} is not a fraction between 0 and 1")
            return
        if not 1 <= self.n < self.m:
            raise ValueError(f"pattern {self.n}:{self.m} must keep N of M with 1 <= N < M")
        expected = 1.0 - self.n / self.m
        if self.sparsity not in (-1.0, expected):
            raise ValueError(f"pattern {self.n}:{self.m} has sparsity {expected:g}, not {self.sparsity:g}")
        object.__setattr__(self, "sparsity", expected)

    @classmethod
    def unstructured(cls, sparsity: float) -> Pattern:
        """A pattern without positions: a fraction `sparsity` of zeros."""
        return cls(0, 0, float(sparsity))

    @classmethod
    def parse(cls, text: object) -> Pattern:
        """Read "2:4" or "unstructured 0.5".

        Raises:
            ValueError: The text is neither; the message says what YAML did to an unquoted `2:4`.
        """
        if isinstance(text, Pattern):
            return text
        if isinstance(text, int) and not isinstance(text, bool):
            n, m = divmod(text, 60)  # YAML 1.1 reads 2:4 as the base-60 integer 124
            hint = f'; YAML reads an unquoted {n}:{m} as {text}, write pattern: "{n}:{m}"' if n and m else ""
            raise ValueError(f"pattern {text} is a number{hint or ', expected N:M in quotes, as in 2:4'}")
        if not isinstance(text, str):
            raise ValueError(f'pattern {text!r} is not text, expected "N:M" as in "2:4"')
        if match := re.fullmatch(r"\s*([0-9]+)\s*:\s*([0-9]+)\s*", text):
            return cls(int(match[1]), int(match[2]))
        if match := re.fullmatch(r"\s*unstructured\s+([0-9.eE+-]+)\s*", text):
            return cls.unstructured(float(match[1]))
        raise ValueError(
            f'pattern {text!r} is not understood, expected "N:M" (N kept of every M, as in "2:4") '
            f"or, for no positions, sparsity: 0.5 instead"
        )

    @property
    def structured(self) -> bool:
        """True for N:M, False for unstructured."""
        return self.m > 0

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.structured else f"unstructured {self.sparsity!r}"

    def describe(self) -> str:
        """The pattern in words, for plans and reports."""
        if self.structured:
            return f"{self} = keep {self.n} of {self.m}, sparsity {self.sparsity:.2f}"
        return f"unstructured, sparsity {self.sparsity:.2f}"

    def fits(self, columns: int) -> bool:
        """Whether a row of `columns` inputs divides into whole groups."""
        return not self.structured or columns % self.m == 0

    def keep(self, score: Tensor, *, per: Scope = "row") -> Tensor:
        """Keep the highest scores.

        Counts are exact whatever the ties: among equal scores the lowest index is kept.

        Args:
            score: [out, in], any real dtype, higher = more important. NaN is rejected.
            per: For an unstructured pattern, compare inside each row or over the whole matrix.
        Returns:
            Boolean mask [out, in], True = kept.
        Raises:
            MethodError: The row length is no multiple of M.
            NumericsError: A score is NaN.
        """
        self._check(score)
        mask = self._on_device(score, None, absolute=False) if score.is_cuda else None
        return self.keep_reference(score, per=per) if mask is None else mask

    def keep_weights(self, weight: Tensor, norm: Tensor | None = None, *, per: Scope = "row") -> Tensor:
        """Keep the largest |weight|, or |weight| times the norm of its input; `keep` of that, in one pass on CUDA.

        Args:
            weight: [out, in].
            norm: [in].
            per: See `keep`.
        """
        self._check(weight)
        mask = self._on_device(weight, norm, absolute=True) if weight.is_cuda else None
        if mask is not None:
            return mask
        score = weight.abs()
        return self.keep_reference(score if norm is None else score * norm, per=per)

    def _check(self, score: Tensor) -> None:
        if not self.fits(score.shape[-1]):
            raise MethodError(f"{score.shape[-1]} inputs do not divide into groups of {self.m} (pattern {self})")

    def _on_device(self, score: Tensor, norm: Tensor | None, *, absolute: bool) -> Tensor | None:
        """The mask by the Triton kernel; None where it cannot make it."""
        from sparsekit.kernels.oneshot import mask_kernel  # noqa: PLC0415 - the kernels know patterns

        kernel = mask_kernel("auto", score, norm, self)
        if kernel is None:
            return None
        mask, invalid = kernel(score, norm, self, absolute=absolute)
        if int(invalid):
            raise NumericsError(NOT_FINITE)
        return mask

    def keep_reference(self, score: Tensor, *, per: Scope = "row") -> Tensor:
        """`keep` in plain torch: what runs on a CPU, and what the kernel is tested against."""
        if torch.isnan(score).any():
            raise NumericsError(NOT_FINITE)
        if self.structured:
            groups = score.reshape(*score.shape[:-1], -1, self.m)  # [out, in/m, m]
            return _rank(groups).lt(self.n).reshape(score.shape)
        flat = score if per == "row" else score.reshape(1, -1)
        kept = flat.shape[-1] - math.floor(self.sparsity * flat.shape[-1])
        return _top(flat, kept).reshape(score.shape)

    def violations(self, weight: Tensor) -> int:
        """Count the groups of M that hold more than N non-zeros; 0 for an unstructured pattern.

        Args:
            weight: [out, in]; a mask works as well.
        """
        return int(self.count_violations(weight != 0))

    def count_violations(self, nonzero: Tensor) -> Tensor:
        """`violations` of what is not zero, bool [out, in]; 0-dim on its device, which is not waited for."""
        if not self.structured:
            return torch.zeros((), dtype=torch.int64, device=nonzero.device)
        return (nonzero.reshape(*nonzero.shape[:-1], -1, self.m).sum(-1) > self.n).sum()

    def groups(self, weight: Tensor) -> int:
        """Number of groups of M in a weight; 0 for an unstructured pattern."""
        return weight.numel() // self.m if self.structured else 0

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Accept and write the text form, so that a recipe and a signature mean the same thing."""
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str, when_used="always")
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        """The JSON Schema shown by `sparsekit schema`."""
        return {"type": "string", "pattern": r"^(\d+:\d+|unstructured .+)$", "examples": ["2:4", "4:8"]}


def _rank(groups: Tensor) -> Tensor:
    """How many members of its group beat each entry; ties are won by the lower index.

    Args:
        groups: [..., m]. Returns [..., m], a permutation of 0..m-1 in every group.
    """
    m = groups.shape[-1]
    rank = torch.zeros(groups.shape, dtype=torch.int16, device=groups.device)
    for i in range(m):
        for j in range(m):
            if i != j:
                rival, own = groups[..., j], groups[..., i]
                rank[..., i] += (rival >= own) if j < i else (rival > own)
    return rank


def _top(score: Tensor, count: int) -> Tensor:
    """True at the `count` highest entries of the last dimension; ties keep the lowest index."""
    mask = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    if count == 0:
        return mask
    order = torch.argsort(score, dim=-1, descending=True, stable=True)
    return mask.scatter_(-1, order[..., :count], True)
