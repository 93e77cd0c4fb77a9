"""Packed weights: 4 bit integers as a kernel reads them, and the slow reference of every kernel.

A packed weight is symmetric int4 with a scale for each group of consecutive inputs; 2:4 sparse at 3 bits a
weight and its scales, or dense at 4. What a weight stands for is exact: (code - 8) * scale in float32, rounded
once to the dtype that is computed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.formats.base import Setting, inexact_scale, permuted
from sparsekit.formats.reading import check_shape, tensor
from sparsekit.formats.sparsekit24 import Sparse24
from sparsekit.quant import QuantizedWeight
from sparsekit.state import LinearState

CHUNK = 1 << 20  # weights dequantized at once: 4 MiB of float32, which stays in a cache
BITS = 4
ZERO = 8  # the code that stands for 0


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight as integers of 4 bits.

    Attributes:
        values: Sparse: uint8 [out, in/4], the two codes of every four inputs, the first in the low nibble.
            Dense: uint8 [out, in/2], two neighbouring codes, the first in the low nibble.
        positions: Sparse: uint8 [out, in/8], where the two codes of a group belong, as sparsekit-24 stores
            it. None is dense.
        scales: float16 or bfloat16 [out, in / group_size].
        group_size: Consecutive inputs that share a scale.
        shape: (out, in).
    """

    values: Tensor
    positions: Tensor | None
    scales: Tensor
    group_size: int
    shape: tuple[int, int]

    @property
    def kind(self) -> tuple[bool, int, int, torch.dtype]:
        """What weights must have in common to be one weight: form, inputs, group size, dtype of the scales."""
        return self.positions is None, self.shape[1], self.group_size, self.scales.dtype

    def tensors(self) -> list[Tensor]:
        """What it is made of."""
        return [self.values, *([] if self.positions is None else [self.positions]), self.scales]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for part in self.tensors())

    def mapped(self, change: Callable[[Tensor], Tensor]) -> PackedWeight:
        """The same weight with each tensor changed: another device, some of the rows."""
        positions = None if self.positions is None else change(self.positions)
        values = change(self.values)
        return replace(
            self, values=values, positions=positions, scales=change(self.scales), shape=(len(values), self.shape[1])
        )

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on a device."""
        return self.mapped(lambda part: part.to(device))

    def rows(self, first: int, last: int) -> PackedWeight:
        """Outputs `first` to `last` (excluded), as views."""
        return self.mapped(lambda part: part[first:last])

    def describe(self) -> str:
        """For people."""
        return "int4" if self.positions is None else "2:4 + int4"


def stacked(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Weights of one kind as one, rows below each other.

    Raises:
        ValueError: They are not of one kind.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    if len({weight.kind for weight in weights}) > 1:
        raise ValueError("weights of different kinds cannot be one")
    positions = [weight.positions for weight in weights if weight.positions is not None]
    return replace(
        first,
        values=torch.cat([weight.values for weight in weights]),
        positions=torch.cat(positions) if positions else None,
        scales=torch.cat([weight.scales for weight in weights]),
        shape=(sum(weight.shape[0] for weight in weights), first.shape[1]),
    )


def why_not_packed(weight: QuantizedWeight) -> str | None:
    """Why integers have no packed form here, or None."""
    if weight.bits > BITS:
        return f"{weight.bits} bits, packed are {BITS}"
    if not weight.symmetric:
        return "asymmetric, packed are zero-points of 8"
    if permuted(weight):
        return "act-order: its scale groups are permuted"
    if weight.codes.shape[1] % 8:
        return f"{weight.codes.shape[1]} inputs are not a multiple of 8"
    return inexact_scale(weight)


def pack(weight: QuantizedWeight) -> PackedWeight:
    """Pack integers that `why_not_packed` has nothing against: sparse where they hold 2:4, else dense.

    Fewer bits than 4 take 4 here.
    """
    weight = replace(weight, codes=weight.codes + (ZERO - 2 ** (weight.bits - 1)), bits=BITS)
    scales = weight.scale if weight.scale.dtype in (torch.float16, torch.bfloat16) else weight.scale.half()
    sparse, shape = Sparse24(), (weight.codes.shape[0], weight.codes.shape[1])
    if sparse.obstacle(LinearState("", weight.scale, quantized=weight), "v1") is None:
        held = sparse.pack(weight, "v1")
        return PackedWeight(held["values"], held["positions"], scales, weight.group_size, shape)
    values = weight.codes[:, 0::2] | weight.codes[:, 1::2] << 4
    return PackedWeight(values, None, scales, weight.group_size, shape)


def pack_file(found: Mapping[str, Tensor], setting: Setting) -> PackedWeight | None:
    """The tensors of a sparsekit-24 file as they are, or None where they need unpacking.

    Args:
        found: Tensors of a linear by suffix.
        setting: Of the checkpoint.
    Raises:
        CheckpointError: They do not fit together.
    """
    if "positions" not in found or not setting.symmetric or "group_of" in found:
        return None
    values, positions = (tensor(found, name, (torch.uint8,)) for name in ("values", "positions"))
    scales = tensor(found, "scales", (torch.float16,))
    out, columns = values.shape[0], 4 * values.shape[1]
    size = columns if setting.group_size == -1 else setting.group_size
    if size <= 0 or columns % size or columns % 8:
        raise CheckpointError(f"group size {setting.group_size} does not divide its {columns} inputs")
    check_shape("positions", positions, (out, columns // 8), setting)
    check_shape("scales", scales, (out, columns // size), setting)
    rise = (positions & 3) < (positions >> 2 & 3), (positions >> 4 & 3) < (positions >> 6)
    if not bool((rise[0] & rise[1]).all()):
        raise CheckpointError("the two positions of a group must rise, and here they do not")
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError("its scales are not all finite")
    return PackedWeight(values, positions, scales, size, (out, columns))


def dequantize(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] in a dtype, made a few rows at a time."""
    whole = torch.empty(packed.shape, dtype=dtype, device=packed.values.device)
    for first, last in _chunks(packed):
        whole[first:last] = _rows(packed.rows(first, last))
    return whole


def codes_of(packed: PackedWeight) -> Tensor:
    """The codes of all inputs, uint8 [out, in]; those that are not stored are 8, which stands for 0."""
    ones = replace(packed, scales=torch.ones_like(packed.scales))
    codes = torch.empty(packed.shape, dtype=torch.uint8, device=packed.values.device)
    for first, last in _chunks(packed):
        codes[first:last] = _rows(ones.rows(first, last)) + ZERO
    return codes


def multiply_reference(x: Tensor, packed: PackedWeight) -> Tensor:
    """Multiply, x W^T: [tokens, in] to [tokens, out] in the dtype of x; only a few rows of W are ever dense."""
    if packed.shape[0] * packed.shape[1] <= CHUNK:
        return x @ _rows(packed).to(x.dtype).t()
    product = torch.empty(len(x), packed.shape[0], dtype=x.dtype, device=x.device)
    for first, last in _chunks(packed):
        product[:, first:last] = x @ _rows(packed.rows(first, last)).to(x.dtype).t()
    return product


def _chunks(packed: PackedWeight) -> Iterator[tuple[int, int]]:
    out, columns = packed.shape
    step = max(1, CHUNK // columns)
    return ((first, min(first + step, out)) for first in range(0, out, step))


def _rows(packed: PackedWeight) -> Tensor:
    """All of a weight at once, float32 [out, in].

    One table look-up for every byte of `values`: all codes a byte can hold, and for sparse weights all
    positions they can have, as a row of 2 or 4 numbers.
    """
    values = packed.values
    if packed.positions is None:
        found = _pairs(values.device).index_select(0, values.flatten().int())
    else:
        places = torch.stack((packed.positions & 15, packed.positions >> 4), 2).view_as(values)
        index = places.to(torch.int32) << 8 | values
        found = _quads(values.device).index_select(0, index.flatten())
    groups = found.view(packed.shape[0], -1, packed.group_size)
    return groups.mul_(packed.scales.float().unsqueeze(-1)).view(packed.shape)


@lru_cache(maxsize=8)
def _pairs(device: torch.device) -> Tensor:
    """The two numbers of every byte, less the zero-point: float32 [256, 2]."""
    byte = torch.arange(256)
    return (torch.stack((byte & 15, byte >> 4), 1) - ZERO).float().to(device)


@lru_cache(maxsize=8)
def _quads(device: torch.device) -> Tensor:
    """The four numbers of every pair of positions and byte of codes: float32 [16 * 256, 4], at places << 8 | codes."""
    index = torch.arange(16 * 256)
    places, codes = index >> 8, index & 255
    table = torch.zeros(len(index), 4)
    for place, code in ((places >> 2, codes >> 4), (places & 3, codes & 15)):
        table.scatter_(1, place.unsqueeze(1), (code - ZERO).float().unsqueeze(1))
    return table.to(device)
