# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,misc"
"""N:M masks in one pass over the weight: 4 bytes read and 1 written for each entry.

The reference is `Pattern.keep_reference`, of the scores or of |w| times the norms of the inputs.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from sparsekit.pattern import Pattern

CHUNK = 1024  # entries of a program
WARPS = 1


@triton.jit
def _wins(own, rival):
    return (rival > own).to(tl.int32)


@triton.jit
def _best_of_four(scores, N: tl.constexpr, CHUNK: tl.constexpr):
    """The choice in groups of 4, six comparisons each; all in registers."""
    even, odd = tl.split(tl.reshape(scores, [CHUNK // 4, 2, 2]))  # entries 0 2 and 1 3
    a, c = tl.split(even)
    b, d = tl.split(odd)
    ab, ac, ad, bc, bd, cd = _wins(a, b), _wins(a, c), _wins(a, d), _wins(b, c), _wins(b, d), _wins(c, d)
    first, second = ab + ac + ad < N, (1 - ab) + bc + bd < N  # a tie is won by the lower index
    third, fourth = (1 - ac) + (1 - bc) + cd < N, (1 - ad) + (1 - bd) + (1 - cd) < N
    evens = tl.join(first.to(tl.int8), third.to(tl.int8))
    odds = tl.join(second.to(tl.int8), fourth.to(tl.int8))
    return tl.reshape(tl.join(evens, odds), [CHUNK])


@triton.jit
def _best(scores, N: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr):
    """The choice in groups of any power of two."""
    groups = tl.reshape(scores, [CHUNK // M, M])
    own, rival = groups[:, :, None], groups[:, None, :]
    at, other = tl.arange(0, M)[None, :, None], tl.arange(0, M)[None, None, :]
    beaten = (rival > own) | ((rival == own) & (other < at))
    return tl.reshape((tl.sum(beaten.to(tl.int32), axis=2) < N).to(tl.int8), [CHUNK])


@triton.jit
def _masks(
    weight, norm, keep, invalid, numel, columns,
    ABSOLUTE: tl.constexpr, NORM: tl.constexpr, ALIGNED: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * CHUNK
    at = first + tl.arange(0, CHUNK)
    inside = at < numel
    scores = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if ABSOLUTE:
        scores = tl.abs(scores)
    if NORM:
        column = ((first % columns).to(tl.int32) + tl.arange(0, CHUNK)) % columns
        if ALIGNED:
            column = tl.max_contiguous(tl.multiple_of(column, 16), 16)  # so that loads are 16 bytes wide
        scores = scores * tl.load(norm + column)
    lost = tl.sum((scores != scores).to(tl.int32), axis=0)
    if lost > 0:
        tl.atomic_max(invalid, 1)
    chosen = _best_of_four(scores, N, CHUNK) if M == 4 else _best(scores, N, M, CHUNK)
    tl.store(keep + at, chosen, mask=inside)


def nm_mask(score: Tensor, norm: Tensor | None, pattern: Pattern, *, absolute: bool) -> tuple[Tensor, Tensor]:
    """Keep the highest scores of every group.

    Args:
        score: [..., in], contiguous, float32 or a float of 16 bits.
        norm: float32 [in], contiguous: what to multiply the scores with.
        pattern: N:M with M a power of two up to `LONGEST`; M divides the row.
        absolute: Take |score|, before the product.
    Returns:
        Boolean mask, True = kept, and an int32 that is 1 if a score was NaN.
    """
    keep = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    invalid = torch.zeros((), dtype=torch.int32, device=score.device)
    with torch.cuda.device_of(score):
        _masks[(triton.cdiv(score.numel(), CHUNK),)](
            score,
            score if norm is None else norm,
            keep.view(torch.int8),
            invalid,
            score.numel(),
            score.shape[-1],
            ABSOLUTE=absolute,
            NORM=norm is not None,
            ALIGNED=score.shape[-1] % 16 == 0,
            N=pattern.n,
            M=pattern.m,
            CHUNK=CHUNK,
            num_warps=WARPS,
        )
    return keep, invalid
