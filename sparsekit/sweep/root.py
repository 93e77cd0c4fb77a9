"""The root of a Gram matrix, and the inverses of its blocks that a column sweep needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Root:
    """The upper root G of a damped Gram matrix, H = G Gᵀ.

    Attributes:
        matrix: G, float32 [in, in].
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._inverses: dict[tuple[tuple[int, int], ...], dict[int, Tensor]] = {}

    def to(self, dtype: torch.dtype) -> Root:
        """In another dtype."""
        return self if self.matrix.dtype == dtype else Root(self.matrix.to(dtype))

    def inverses(self, blocks: Sequence[tuple[int, int]]) -> dict[int, Tensor]:
        """Inverses of some diagonal blocks by first column, contiguous by columns; those of one size in one call."""
        key = tuple(blocks)
        if key not in self._inverses:
            found: dict[int, Tensor] = {}
            for size in {stop - start for start, stop in blocks}:
                starts = [start for start, stop in blocks if stop - start == size]
                stack = torch.stack([self.matrix[at : at + size, at : at + size] for at in starts]).double()
                eye = torch.eye(size, dtype=stack.dtype, device=stack.device).expand_as(stack)
                inverse = torch.linalg.solve_triangular(stack, eye, upper=True).to(self.matrix.dtype)
                found |= zip(starts, inverse.mT.contiguous().mT, strict=True)
            self._inverses[key] = found
        return self._inverses[key]
