"""The GPTQ layout: integer weights packed into int32 words, and back.

Thirty-two consecutive codes fill `bits` words as one little-endian bit stream; at 3 bits the 11th
and the 22nd code straddle two words. Version 1 (`checkpoint_format: gptq`) stores zero-points minus
one, version 2 (`gptq_v2`) stores them as they are.

Source: AutoGPTQ 0.7.1 `qlinear_cuda_old.py` (pack, forward) for the layout; GPTQModel for version 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.quant import QuantizedWeight

CheckpointFormat = Literal["gptq", "gptq_v2"]

PACKABLE_BITS = (2, 3, 4, 8)  # 5, 6 and 7 bits have no layout that a GPTQ reader knows
WORD = 32  # bits of a word, and codes of a packing unit


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """What a GPTQ checkpoint stores of one linear.

    Attributes:
        qweight: int32 [in * bits / 32, out], codes packed along the inputs.
        qzeros: int32 [groups, out * bits / 32], zero-points packed along the outputs.
        scales: float16 [groups, out].
        g_idx: int32 [in], the group of each input.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The four tensors under the names a checkpoint gives them."""
        return {
            f"{name}.qweight": self.qweight,
            f"{name}.qzeros": self.qzeros,
            f"{name}.scales": self.scales,
            f"{name}.g_idx": self.g_idx,
        }


def obstacle(weight: QuantizedWeight, checkpoint_format: CheckpointFormat) -> str | None:
    """Why a weight has no GPTQ layout, in words, or None when it has one."""
    out, columns = weight.codes.shape
    if weight.bits not in PACKABLE_BITS:
        return f"{weight.bits} bits have no GPTQ layout; there are layouts for 2, 3, 4 and 8 bits"
    if out % WORD or columns % WORD:
        return f"its shape [{out}, {columns}] is not a multiple of {WORD} both ways; add it to the quantizer's ignore"
    if checkpoint_format == "gptq" and bool((weight.zero == 0).any()):
        return (
            "a zero-point is 0, which version 1 of the layout would store as -1 and readers would misread; "
            "export it as gptq_v2, or quantize symmetrically"
        )
    return None


def pack_linear(
    weight: QuantizedWeight, *, checkpoint_format: CheckpointFormat = "gptq", name: str = "weight"
) -> PackedLinear:
    """Pack the integers of a linear.

    Args:
        weight: codes [out, in], scale and zero [out, groups], on any device.
        checkpoint_format: "gptq" stores zero-points minus one, "gptq_v2" stores them as they are.
        name: For messages.
    Raises:
        CheckpointError: The weight has no such layout; the message says why.
    """
    if reason := obstacle(weight, checkpoint_format):
        raise CheckpointError(f"{name} cannot be stored in the {checkpoint_format} layout: {reason}")
    zero = weight.zero.to(torch.int32) - (1 if checkpoint_format == "gptq" else 0)
    return PackedLinear(
        qweight=pack_rows(weight.codes, weight.bits).t().contiguous(),
        qzeros=pack_rows(zero.t(), weight.bits).contiguous(),
        scales=weight.scale.half().t().contiguous(),
        g_idx=weight.group_of.to(torch.int32),
    )


def unpack_linear(
    packed: PackedLinear,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    checkpoint_format: CheckpointFormat = "gptq",
) -> QuantizedWeight:
    """Inverse of `pack_linear`.

    Args:
        packed: As a checkpoint stores it.
        bits: 2, 3, 4 or 8, from the checkpoint's configuration, as are the next two.
        group_size: Inputs of a group; -1 for one group a row.
        symmetric: Whether all zero-points are 2^(bits-1).
        checkpoint_format: Which of the two versions the zero-points are stored in.
    """
    columns = packed.g_idx.numel()
    zero = unpack_rows(packed.qzeros, bits) + (1 if checkpoint_format == "gptq" else 0)
    return QuantizedWeight(
        codes=unpack_rows(packed.qweight.t(), bits).to(torch.uint8),
        scale=packed.scales.t().contiguous(),
        zero=zero.t().to(torch.uint8).contiguous(),
        group_of=packed.g_idx,
        bits=bits,
        group_size=columns if group_size == -1 else group_size,
        symmetric=symmetric,
    )


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """Pack each row into words, low bits first.

    Args:
        values: Integers in 0..2^bits-1, [rows, n], n a multiple of 32.
    Returns:
        int32 [rows, n * bits / 32].
    """
    units = values.to(torch.int32).reshape(len(values), -1, WORD)  # [rows, n/32, 32]
    words = torch.zeros(*units.shape[:2], bits, dtype=torch.int32, device=values.device)
    for code, word, shift in _places(bits):
        part = units[..., code]
        words[..., word] |= part << shift if shift >= 0 else part >> -shift
    return words.flatten(1)


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_rows`: int32 [rows, n * bits / 32] to int32 [rows, n]."""
    units = words.reshape(len(words), -1, bits)  # [rows, n/32, bits]
    values = torch.zeros(*units.shape[:2], WORD, dtype=torch.int32, device=words.device)
    for code, word, shift in _places(bits):
        part = units[..., word]
        if shift >= 0:
            # A right shift of int32 copies the sign bit downwards; only the bits that came from the word may stay.
            own = 2 ** min(bits, WORD - shift) - 1
            values[..., code] |= (part >> shift) & own
        else:
            values[..., code] |= (part << -shift) & (2**bits - 1)
    return values.flatten(1)


def _places(bits: int) -> list[tuple[int, int, int]]:
    """Where the 32 codes of a unit lie: (code, word, left shift); a code that straddles two words is listed twice.

    A negative shift drops that many low bits, which the word before holds.
    """
    places = []
    for code in range(WORD):
        first, last = code * bits // WORD, (code * bits + bits - 1) // WORD
        places += [(code, word, code * bits - word * WORD) for word in range(first, last + 1)]
    return places
