"""Groups of four inputs that hold two weights: what both 2:4 formats compute with.

Four neighbouring bytes are one int32, so that everything about a group is arithmetic on one number,
with no strides. The two places of a group are `first | second << 2`, and rise.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.formats.base import Setting, permuted
from sparsekit.formats.reading import check_shape, groups_of, tensor
from sparsekit.quant import QuantizedWeight

EACH = 0x01010101  # 1 in every byte
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))  # the ways two of four can lie, in the order of patterns
PLACES = tuple(first | second << 2 for first, second in PAIRS)


def quads(values: Tensor) -> Tensor:
    """Four neighbouring bytes as one int32, low byte first: uint8 [out, in] to [out, in/4]."""
    return values.contiguous().view(torch.int32)


def used(weight: QuantizedWeight) -> Tensor:
    """Where a code stands for something else than 0: int32 [out, in/4], one byte of 0 or 1 for each input."""
    middle = 2 ** (weight.bits - 1)
    each = (middle * EACH + 2**31) % 2**32 - 2**31  # as int32 has it
    zero: int | Tensor = each if weight.symmetric else quads(weight.zero[:, weight.group_of.long()])
    differs = quads(weight.codes) ^ zero
    found = differs
    for shift in range(1, weight.bits):
        found = found | differs >> shift
    return found & EACH


def counts(each: Tensor) -> Tensor:
    """The sum of the four bytes of each group, which are 0 or 1: int32 [out, in/4]."""
    return each + (each >> 8) + (each >> 16) + (each >> 24) & 7


def crowded(weight: QuantizedWeight) -> str | None:
    """Why a weight is not 2:4, in words, or None."""
    many = bool((counts(used(weight)) > 2).any())
    return "groups of 4 hold more than two weights; prune it to 2:4, or let the quantizer ignore it" if many else None


def places_of(weight: QuantizedWeight, mask: Tensor | None) -> Tensor:
    """The two inputs of every group to be stored, int32 [out, in/4]; no group holds more than two weights.

    A group with fewer is filled up: with inputs its mask keeps, where one is known, then from the left.

    Args:
        weight: The integers.
        mask: bool [out, in], True = kept.
    """
    rank = used(weight) << 1
    if mask is not None:
        rank |= quads(mask.to(torch.uint8))
    ranks = (rank | rank >> 6 | rank >> 12 | rank >> 18) & 255
    return _table().to(rank.device).index_select(0, ranks.flatten()).reshape(rank.shape)


@lru_cache(maxsize=1)
def _table() -> Tensor:
    """For the ranks of 4 inputs, 2 bits each: the places of the two highest, left before right."""
    table = []
    for ranks in range(256):
        order = sorted(range(4), key=lambda lane: (-(ranks >> 2 * lane & 3), lane))
        first, second = sorted(order[:2])
        table.append(first | second << 2)
    return torch.tensor(table, dtype=torch.int32)


def pattern_of(places: Tensor) -> Tensor:
    """The index in PAIRS of the two places of every group: int32 [out, in/4] to uint8 [out, in/4]."""
    first, second = places & 3, places >> 2
    return (first + second - 1 + (first > 0)).to(torch.uint8)


def places_with(pattern: Tensor) -> Tensor:
    """Inverse of `pattern_of`."""
    return torch.tensor(PLACES, dtype=torch.int32, device=pattern.device)[pattern.int()]


def mask_of(places: Tensor) -> Tensor:
    """The places as a mask: int32 [out, in/4] to bool [out, in]."""
    first, second = (places & 3) << 3, places >> 2 << 3  # in bits
    return (1 << first | 1 << second).view(torch.bool)


def spread(places: Tensor, first: Tensor, second: Tensor, zero: Tensor, group_of: Tensor) -> Tensor:
    """Codes at their places and zero-points everywhere else, uint8 [out, in].

    Args:
        places: int32 [out, in/4].
        first: The code at the first place of each group, int32 [out, in/4].
        second: The code at its second place.
        zero: uint8 [out, groups].
        group_of: int32 [in].
    """
    low, high = (places & 3) << 3, places >> 2 << 3  # in bits
    codes = quads(zero[:, group_of.long()]) & ~(255 << low) & ~(255 << high)
    codes |= first << low | second << high
    return codes.view(torch.uint8)


def grid_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Scales, and what only some grids need: zero-points, two in a byte, and the group of each input."""
    tensors = {"scales": weight.scale.half()}
    if not weight.symmetric:
        even = torch.nn.functional.pad(weight.zero, (0, weight.zero.shape[1] % 2))
        tensors["zeros"] = even[:, 0::2] | even[:, 1::2] << 4
    if permuted(weight):
        tensors["group_of"] = weight.group_of.to(torch.int32)
    return tensors


def read_grid(found: Mapping[str, Tensor], setting: Setting, out: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `grid_tensors`: scales, zero-points and the group of each input.

    Raises:
        CheckpointError: A tensor is missing, does not fit, or holds what the bits cannot say.
    """
    scale = tensor(found, "scales", (torch.float16,))
    group_of, groups = groups_of(columns, setting, found.get("group_of"), scale)
    check_shape("scales", scale, (out, groups), setting)
    if setting.symmetric:
        middle = 2 ** (setting.bits - 1)
        return scale, torch.full((out, groups), middle, dtype=torch.uint8, device=scale.device), group_of
    packed = tensor(found, "zeros", (torch.uint8,))
    check_shape("zeros", packed, (out, (groups + 1) // 2), setting)
    zero = torch.stack((packed & 15, packed >> 4), 2).flatten(1)[:, :groups]
    if bool((zero >= 2**setting.bits).any()):
        raise CheckpointError(f"a zero-point of {int(zero.max())} is no code of {setting.bits} bits")
    return scale, zero, group_of
