# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,misc"
"""The whole optimizer step in one Triton launch: decay, moments, update, masked copy, new masks, flip counts.

The chip moves bytes here and does little arithmetic: with float32 state and bfloat16 parameters each
element is read in 2 (gradient) + 12 (weight, moments) + 1 (mask) bytes and written in 12 + 2, 29 in all;
float8 states and bfloat16 masters make it 13. A group of N:M lies in one program, so its mask can be
chosen while its weights are in registers, for one byte more. Weights that the model computes with on
integer grids are rounded in the same place, for the bytes of their steps: 4 for each group.

The reference is `SparseAdamW._update`, `update.refreshed` and `grids.on_grid`, line by line.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from sparsekit.kernels.table import COLUMNS
from sparsekit.training.lowbits import BLOCK

WIDTH = tl.constexpr(len(COLUMNS))
SCALED = tl.constexpr(BLOCK)
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds half to even, as torch does


@triton.jit
def mixed32(x):
    """`lowbits.mixed` of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _pointer(row, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer out of the table; the hint is what makes loads 16 bytes wide."""
    pointer = tl.load(row + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _get(pointer, offsets, inside, FULL: tl.constexpr):
    return tl.load(pointer + offsets) if FULL else tl.load(pointer + offsets, mask=inside, other=0)


@triton.jit
def _put(pointer, offsets, value, inside, FULL: tl.constexpr):
    if FULL:
        tl.store(pointer + offsets, value)
    else:
        tl.store(pointer + offsets, value, mask=inside)


@triton.jit
def _wide(row, column: tl.constexpr, offsets, inside, FLOAT8: tl.constexpr, FULL: tl.constexpr, ALIGNED: tl.constexpr):
    """A moment in float32; of the second one its root if it is float8."""
    if FLOAT8:
        codes = _get(_pointer(row, column, tl.uint8, ALIGNED), offsets, inside, FULL)
        scales = _pointer(row, column + 2, tl.float32, ALIGNED)
        value = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * _get(scales, offsets // SCALED, inside, FULL)
    else:
        value = _get(_pointer(row, column, tl.float32, ALIGNED), offsets, inside, FULL)
    return value


@triton.jit
def _keep_float8(
    row, column: tl.constexpr, start, value, bits, inside,
    POSITIVE: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """`lowbits.stochastic_float8` of a chunk."""
    BLOCKS: tl.constexpr = CHUNK // SCALED
    if not FULL:
        value = tl.where(inside, value, 0.0)
    scale = tl.div_rn(tl.max(tl.reshape(tl.abs(value), [BLOCKS, SCALED]), axis=1), 448.0)  # [blocks]
    safe = tl.where(scale > 0, scale, 1.0)
    spread = tl.reshape(tl.broadcast_to(safe[:, None], [BLOCKS, SCALED]), [CHUNK])
    scaled = tl.div_rn(value, spread)
    size = tl.minimum(tl.abs(scaled), 448.0)
    power = tl.maximum((size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True), 0.015625)
    spacing = power * 0.125
    step = tl.floor(tl.div_rn(size, spacing) + (bits & 0xFFFF).to(tl.float32) * 0.0000152587890625)
    size = tl.minimum(step * spacing, 448.0)
    if POSITIVE:
        size = tl.where(scaled > 0, tl.maximum(size, 0.001953125), size)
    codes = tl.where(scaled < 0, -size, size).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    offsets = start + tl.arange(0, CHUNK)
    _put(_pointer(row, column, tl.uint8, ALIGNED), offsets, codes, inside, FULL)
    first = start // SCALED + tl.arange(0, BLOCKS)
    present = first * SCALED < tl.load(row + 10)
    tl.store(tl.load(row + column + 2).to(tl.pointer_type(tl.float32)) + first, scale, mask=present)


@triton.jit
def _rounded(weight, bits, MASTER: tl.constexpr):
    """The weight as its master keeps it: `lowbits.stochastic_bfloat16`, or itself."""
    if tl.bfloat16 == MASTER:
        words = (weight.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000
        weight = tl.where(weight == weight, words.to(tl.float32, bitcast=True), weight)
    return weight


@triton.jit
def _pulled(x, weight, decay, mix, L1: tl.constexpr):
    """`update.pulled`."""
    if L1:
        sign = (weight > 0).to(tl.float32) - (weight < 0).to(tl.float32)
        return tl.where(decay > 0, x + mix * (decay * sign - x), x)
    return x + decay * weight


@triton.jit
def _updated(
    row, start, weight, kept, sparse, inside, clip, numbers, key,
    MASTER: tl.constexpr, PARAMETER: tl.constexpr, FLOAT8: tl.constexpr, MOMENTUM: tl.constexpr, L1: tl.constexpr,
    CHUNK: tl.constexpr, FULL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """`update.adamw_` of a chunk; writes the moments, returns the weight."""
    new_first, beta2, new_second, eps, size, correction, shrink, decay, mix, _ = numbers
    offsets = start + tl.arange(0, CHUNK)
    grad = _get(_pointer(row, 1, PARAMETER, ALIGNED), offsets, inside, FULL).to(tl.float32) * tl.load(clip)
    weight = tl.where(tl.load(row + 12) != 0, weight * shrink, weight)
    first = _wide(row, 3, offsets, inside, FLOAT8, FULL, ALIGNED)
    first = first + new_first * (grad - first)
    second = _wide(row, 4, offsets, inside, FLOAT8, FULL, ALIGNED)
    if FLOAT8:
        second = second * second
    direction = tl.where(kept, first, _pulled(first, weight, decay, mix, L1))
    of = tl.where(kept, grad, _pulled(grad, weight, decay, mix, L1))
    if MOMENTUM:
        of = tl.where(sparse, direction, grad)
    second = second * beta2 + new_second * of * of
    root = tl.sqrt_rn(tl.div_rn(second, correction)) + eps
    weight = weight + tl.div_rn(size * direction, root)
    bits = tl.zeros([CHUNK], dtype=tl.uint32)
    if FLOAT8 or tl.bfloat16 == MASTER:
        own = mixed32(key.to(tl.uint32) + (tl.load(row + 13) + 1).to(tl.uint32) * 0x9E3779B9)
        bits = mixed32(offsets.to(tl.uint32) ^ own)
    if FLOAT8:
        _keep_float8(row, 3, start, first, bits, inside, False, CHUNK, FULL, ALIGNED)
        _keep_float8(row, 4, start, tl.sqrt_rn(second), bits >> 16, inside, True, CHUNK, FULL, ALIGNED)
    else:
        _put(_pointer(row, 3, tl.float32, ALIGNED), offsets, first, inside, FULL)
        _put(_pointer(row, 4, tl.float32, ALIGNED), offsets, second, inside, FULL)
    return _rounded(weight, mixed32(bits + 0x9E3779B9), MASTER)


@triton.jit
def _chosen(
    row, start, weight, kept, inside, hysteresis, counters,
    PACKED: tl.constexpr, N: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """`update.refreshed` of a chunk: the new mask, written and counted."""
    offsets = start + tl.arange(0, CHUNK)
    score = tl.abs(weight)
    importance = tl.load(row + 9)
    if importance != 0:
        score = score * tl.load(importance.to(tl.pointer_type(tl.float32)) + offsets % tl.load(row + 11))
    score = tl.where(kept, score * hysteresis, score)
    groups = tl.reshape(score, [CHUNK // M, M])
    own, rival = groups[:, :, None], groups[:, None, :]
    at, other = tl.arange(0, M)[None, :, None], tl.arange(0, M)[None, None, :]
    beaten = (rival > own) | ((rival == own) & (other < at))  # ties keep the lowest index
    new = tl.reshape(tl.sum(beaten.to(tl.int32), axis=2) < N, [CHUNK])
    _put(tl.load(row + 7).to(tl.pointer_type(tl.int8)), offsets, new.to(tl.int8), inside, FULL)
    place = tl.load(row + 8).to(tl.pointer_type(tl.uint8))
    if PACKED:
        initial = (_get(place, offsets // 8, inside, FULL) >> (offsets % 8).to(tl.uint8)) & 1
    else:
        initial = _get(place, offsets, inside, FULL)
    changed = (new != kept) & inside
    away = (new != (initial != 0)) & inside
    tl.atomic_add(counters, tl.sum(changed.to(tl.int32), axis=0).to(tl.int64))
    tl.atomic_add(counters + 1, tl.sum(away.to(tl.int32), axis=0).to(tl.int64))
    return new


@triton.jit
def _on_grid(
    row, start, weight, inside,
    BITS: tl.constexpr, ODD: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`grids.on_grid` of a chunk, were all kept."""
    size = tl.load(row + 15)
    first = start // size
    within = (start - first * size).to(tl.int32) + tl.arange(0, CHUNK)  # 64 bits are divided once
    step = tl.load(row + 14).to(tl.pointer_type(tl.float32)) + first
    step = tl.load(step + within // size.to(tl.int32), mask=inside, other=1.0)
    level = tl.div_rn(weight, step)
    ZERO: tl.constexpr = 2.0 ** (BITS - 1)
    if ODD:
        level = tl.minimum(tl.maximum(level, LOWEST - ZERO), HIGHEST - ZERO)
        level = 2 * ((level - 1) * 0.5 + ROUNDER - ROUNDER) + 1
    else:
        level = tl.minimum(tl.maximum(level + ZERO, LOWEST), HIGHEST) + ROUNDER - ROUNDER - ZERO
    return tl.where(weight == weight, level * step, weight)  # what is not finite shall be seen


@triton.jit
def _chunk(
    row, start, numel, clip, counters, numbers, key,
    PARAMETER: tl.constexpr, MASTER: tl.constexpr, FLOAT8: tl.constexpr, MOMENTUM: tl.constexpr, L1: tl.constexpr,
    UPDATE: tl.constexpr, MASKED: tl.constexpr, REFRESH: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    BITS: tl.constexpr, ODD: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    CHUNK: tl.constexpr, FULL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Everything of one chunk; FULL leaves out the bounds, which would make every load a narrow one."""
    offsets = start + tl.arange(0, CHUNK)
    inside = offsets < numel
    dense = _pointer(row, 2, MASTER, ALIGNED)
    weight = _get(dense, offsets, inside, FULL).to(tl.float32)
    sparse = tl.load(row + 7) != 0
    kept = tl.full([CHUNK], True, tl.int1)
    if sparse:
        kept = _get(_pointer(row, 7, tl.int8, ALIGNED), offsets, inside, FULL) != 0
    if UPDATE:  # noqa: SIM102 - a constant decides what is compiled
        if tl.load(row + 1) != 0:
            weight = _updated(
                row, start, weight, kept, sparse, inside, clip, numbers, key,
                MASTER, PARAMETER, FLOAT8, MOMENTUM, L1, CHUNK, FULL, ALIGNED,
            )  # fmt: skip
            _put(dense, offsets, weight.to(MASTER), inside, FULL)
    if REFRESH and sparse:
        kept = _chosen(row, start, weight, kept, inside, numbers[9], counters, FLOAT8, N, M, CHUNK, FULL)
    if tl.load(row) != tl.load(row + 2):
        if BITS:  # noqa: SIM102 - as above
            if sparse:
                weight = _on_grid(row, start, weight, inside, BITS, ODD, LOWEST, HIGHEST, CHUNK)
        if MASKED:
            weight = tl.where(kept, weight, 0.0)
        _put(_pointer(row, 0, PARAMETER, ALIGNED), offsets, weight.to(PARAMETER), inside, FULL)


@triton.jit(do_not_specialize=["key"])
def advance_chunks(
    rows, chunks, clip, counters,
    new_first, beta2, new_second, eps, size, correction, shrink, decay, mix, hysteresis, key,
    PARAMETER: tl.constexpr, MASTER: tl.constexpr, FLOAT8: tl.constexpr, MOMENTUM: tl.constexpr, L1: tl.constexpr,
    UPDATE: tl.constexpr, MASKED: tl.constexpr, REFRESH: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    BITS: tl.constexpr, ODD: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    CHUNK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One chunk of one parameter a program."""
    program = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(chunks + 2 * program).to(tl.int64) * WIDTH
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    numel = tl.load(row + 10)
    numbers = (new_first, beta2, new_second, eps, size, correction, shrink, decay, mix, hysteresis)
    if start + CHUNK <= numel:
        _chunk(
            row, start, numel, clip, counters, numbers, key, PARAMETER, MASTER, FLOAT8, MOMENTUM, L1,
            UPDATE, MASKED, REFRESH, N, M, BITS, ODD, LOWEST, HIGHEST, CHUNK, True, ALIGNED,
        )  # fmt: skip
    else:
        _chunk(
            row, start, numel, clip, counters, numbers, key, PARAMETER, MASTER, FLOAT8, MOMENTUM, L1,
            UPDATE, MASKED, REFRESH, N, M, BITS, ODD, LOWEST, HIGHEST, CHUNK, False, ALIGNED,
        )  # fmt: skip
