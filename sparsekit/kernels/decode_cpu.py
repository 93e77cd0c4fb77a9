"""Packed weights on a CPU in bfloat16: torch's own int4 product, behind the interface of the decode kernel.

It knows no positions: a 2:4 weight takes 4 bits a weight here and not 3. Scales are rounded to bfloat16, as the
dequantized weights of a bfloat16 model are. In float32 torch's product is slower than dequantizing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.inference.packed import PackedWeight, codes_of

MAX_TOKENS = 1 << 30  # it is as fast as a dense product for many tokens too
GROUPS = (32, 64, 128, 256)  # sizes it has been written for
UNIT = 16  # rows it works on together
FAST = ("AVX2", "AVX512")


@dataclass(frozen=True, slots=True, eq=False)
class DecodeWeight:
    """A weight in torch's order.

    Attributes:
        codes: uint8 [out, in/2], interleaved as this CPU's instructions want it.
        grid: bfloat16 [groups, out, 2], scale and zero-point offset.
        group_size: Inputs that share a scale.
    """

    codes: Tensor
    grid: Tensor
    group_size: int


def why_not(packed: PackedWeight, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why torch's product does not run, or None."""
    out, _ = packed.shape
    if dtype != torch.bfloat16:
        return "torch's int4 product for CPUs is fast in bfloat16 only"
    if torch.backends.cpu.get_cpu_capability() not in FAST:
        return "this CPU has no fast int4 product"
    if out % UNIT or packed.group_size not in GROUPS:
        return f"torch's int4 product has no shape {list(packed.shape)} with groups of {packed.group_size}"
    return None


def arrange(packed: PackedWeight) -> DecodeWeight:
    """Put a weight that `why_not` has nothing against into torch's order."""
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_of(packed).int(), 1)
    scales = packed.scales.t().bfloat16()
    return DecodeWeight(codes, torch.stack((scales, torch.zeros_like(scales)), 2).contiguous(), packed.group_size)


def multiply(x: Tensor, weight: DecodeWeight) -> Tensor:
    """x W^T, [tokens, in] to [tokens, out]."""  # noqa: D403
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight.codes, weight.group_size, weight.grid)
    return product


def expand(weight: DecodeWeight, dtype: torch.dtype) -> Tensor:
    """The weight [out, in]: its product with one."""
    size = len(weight.grid) * weight.group_size
    return multiply(torch.eye(size, dtype=torch.bfloat16), weight).t().to(dtype)
