"""The order in which the decode kernel reads a packed weight.

One unit is 16 rows x 128 inputs: the codes as 32 lanes hold them, the metadata of `mma.sp.m16n8k32`, the scales.
The layouts are those of the PTX ISA, sections "Matrix Fragments for mma.m16n8k16" and "Matrix Fragments for sparse
mma.m16n8k32". Units of the same inputs lie side by side, so that all rows of a block are one piece of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.inference.packed import PackedWeight

ROW_TILE, INPUTS = 16, 128  # of a unit


@dataclass(frozen=True, slots=True, eq=False)
class DecodeWeight:
    """A weight in the kernel's order.

    Attributes:
        units: int32 [units of 128 inputs, row tiles, words].
        shape: (out, in) without padding.
        sparse: 2:4, else dense.
        scales: Scales of a row in 128 inputs: 1, 2 or 4.
    """

    units: Tensor
    shape: tuple[int, int]
    sparse: bool
    scales: int


def arrange(packed: PackedWeight) -> DecodeWeight:
    """A weight in the kernel's order, on the device where it is; nothing of `packed` is kept."""
    out, columns = packed.shape
    rows, inputs = _padded(out, ROW_TILE), _padded(columns, INPUTS)
    scales = max(1, INPUTS // packed.group_size)
    if packed.positions is None:
        parts = [_dense_codes(_pad(_nibbles(packed.values), rows, inputs, 8))]
    else:
        values = _pad(_nibbles(packed.values), rows, inputs // 2, 8)
        positions = _pad(_nibbles(packed.positions), rows, inputs // 4, 0b0100)
        parts = [_sparse_codes(values), _metadata(positions)]
    parts.append(_scale_words(packed, rows, inputs, scales))
    units = torch.cat(parts, 2).transpose(0, 1).contiguous()
    return DecodeWeight(units, (out, columns), packed.positions is not None, scales)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad(tensor: Tensor, rows: int, columns: int, value: int) -> Tensor:
    missing = (0, columns - tensor.shape[1], 0, rows - tensor.shape[0])
    return torch.nn.functional.pad(tensor, missing, value=value) if any(missing) else tensor


def _nibbles(packed: Tensor) -> Tensor:
    """int32 [rows, 2 columns] of bytes [rows, columns], the low nibble first."""
    wide = packed.int()
    return torch.stack((wide & 15, wide >> 4), 2).flatten(1)


def _words(fields: Tensor, bits: int) -> Tensor:
    """int32 words of fields [..., 32 / bits], the first in the lowest bits."""
    shifts = torch.arange(0, 32, bits, device=fields.device, dtype=torch.int64)
    total = (fields.long() << shifts).sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).int()


def _tiles(fields: Tensor, row: int) -> Tensor:
    """[row tiles, units, half, row of the half, ...] of [rows, row fields a unit each]."""
    rows, columns = fields.shape
    return fields.reshape(rows // ROW_TILE, 2, ROW_TILE // 2, columns // row, row).permute(0, 3, 1, 2, 4)


def _sparse_codes(values: Tensor) -> Tensor:
    """Words [row tiles, units, 128] of codes [rows, in / 2]: for a lane the four words of its four times 32 inputs.

    Nibble i and i + 4 of a word are the two codes of a group of four: row g and row g + 8 of group t, then of group
    t + 4.
    """
    tiles = _tiles(values, INPUTS // 2)  # [R, U, half, g, 64]
    grouped = tiles.reshape(*tiles.shape[:4], 4, 2, 4, 2)  # 32 inputs k, pair, t, which of a group's two codes
    ordered = grouped.permute(0, 1, 3, 6, 4, 7, 5, 2)  # [R, U, g, t, k, code, pair, half]
    return _words(ordered.flatten(5), 4).flatten(2)


def _metadata(positions: Tensor) -> Tensor:
    """Words [row tiles, units, 64] of positions [rows, in / 4], 4 bits a group: for a lane one word for 64 inputs.

    Of every four lanes two serve the first 32 inputs and two the second. The first of the two has groups 0 to 3 of them
    and the other 4 to 7, of row g in the low half and of row g + 8 in the high half.
    """
    tiles = _tiles(positions, INPUTS // 4)  # [R, U, half, g, 32]
    grouped = tiles.reshape(*tiles.shape[:4], 2, 2, 2, 4)  # [R, U, half, g, 64 inputs w, 32 inputs f, h, group j]
    ordered = grouped.permute(0, 1, 3, 5, 6, 4, 2, 7)  # [R, U, g, f, h, w, half, j]
    return _words(ordered.flatten(6), 4).flatten(2)


def _dense_codes(codes: Tensor) -> Tensor:
    """Words [row tiles, units, 256] of codes [rows, in]: two planes of four words a lane."""
    tiles = _tiles(codes, INPUTS)  # [R, U, half, g, 128]
    split = tiles.reshape(*tiles.shape[:4], 2, 2, 2, 2, 4, 2)  # plane, k, h, pair of columns, t, column
    ordered = split.permute(0, 1, 4, 3, 8, 5, 6, 9, 7, 2)  # [R, U, plane, g, t, k, h, column, pair, half]
    return _words(ordered.flatten(7), 4).flatten(2)


def _scale_words(packed: PackedWeight, rows: int, inputs: int, scales: int) -> Tensor:
    """Words [row tiles, units, 8 scales]: float16 of row g low, of row g + 8 high."""
    each = packed.scales.half()
    if packed.group_size > INPUTS:
        each = each.repeat_interleave(packed.group_size // INPUTS, 1)
    padded = torch.nn.functional.pad(each, (0, inputs * scales // INPUTS - each.shape[1], 0, rows - each.shape[0]))
    bits = padded.view(torch.int16).int() & 0xFFFF
    ordered = _tiles(bits, scales).permute(0, 1, 4, 3, 2)  # [R, U, scale, g, half]
    return _words(ordered, 16).flatten(2)
