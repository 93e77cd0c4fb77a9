"""Training state in fewer bits: moments in float8 with a scale for each block, weights in bfloat16.

A moment moves by a few percent a step, less than half of float8's spacing, so rounding to the nearest
value would hold it where it is. Both formats are therefore rounded stochastically. The random bits are
a hash of (seed, step, parameter, element) and nothing else: a restart repeats them, and the fused
kernel, which computes the same integers, gives the same bits.

What a 7B Llama needs (6.74e9 parameters, 6.48e9 of them sparse), in bytes a parameter: parameters 2,
gradients 2, masters 2 (none for an ordinary parameter), moments 2.03, mask 1, first mask 0.125, teacher 2.
That is 74 GB when all gradients exist. 16k tokens take 4.3 GB more for the blocks' inputs and 3 to 5 GB
for the block being computed. In the first micro-batch most gradients are still missing while the inputs
are there, so that its peak is its end, about 79 GB; with several micro-batches a step it is about 83 GB.
This is arithmetic; docs/benchmarks/training.py measures it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # elements that share a scale
LARGEST = 448.0  # of float8 e4m3
SMALLEST = 2.0**-9  # the smallest positive float8 e4m3
WORD = 0xFFFFFFFF
GOLDEN = 0x9E3779B9

States = Literal["float32", "float8"]
Masters = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Memory:
    """In what precision the optimizer keeps its state.

    Attributes:
        states: Of both moments. `float8` takes 2.03 bytes for the two where float32 takes 8.
        masters: Of the dense weights.
        stochastic: Round bfloat16 weights stochastically; without it an update below 1/256 of a
            weight is lost, so it cannot be turned off (invariant T15 of the AST reference).
        seed: Of the rounding.
    """

    states: States = "float32"
    masters: Masters = "float32"
    stochastic: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.masters == "bfloat16" and not self.stochastic:
            raise ValueError(
                "bfloat16 masters need stochastic rounding: "
                "a step of lr 2e-5 is below their resolution and would be lost"
            )

    @property
    def plain(self) -> bool:
        """Whether everything is float32."""
        return self.states == "float32" and self.masters == "float32"

    @property
    def master_dtype(self) -> torch.dtype:
        """Of the dense weights."""
        return torch.float32 if self.masters == "float32" else torch.bfloat16


def mixed(word: int) -> int:
    """A 32-bit integer hash (lowbias32, Chris Wellons, public domain); of the host."""
    word &= WORD
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & WORD
    word = ((word ^ (word >> 15)) * 0x846CA68B) & WORD
    return word ^ (word >> 16)


def step_key(seed: int, step: int) -> int:
    """The key of all random bits of a step, 32 bits."""
    return mixed(mixed(seed) + step)


def _mixed(words: Tensor) -> Tensor:
    """`mixed` of int64 words that hold 32 bits; the product wraps, its low 32 bits are right."""
    words = ((words ^ (words >> 16)) * 0x7FEB352D) & WORD
    words = ((words ^ (words >> 15)) * 0x846CA68B) & WORD
    return words ^ (words >> 16)


def random_bits(key: int, parameter: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """32 random bits for the moments and 32 for the weight of each element of a parameter.

    Args:
        key: Of the step, see `step_key`.
        parameter: Index of the parameter.
        count: Its elements.
        device: Where the bits are wanted.
    Returns:
        Two int64 [count], each in [0, 2**32).
    """
    own = mixed(key + GOLDEN * (parameter + 1))
    first = _mixed((torch.arange(count, device=device) & WORD) ^ own)
    return first, _mixed((first + GOLDEN) & WORD)


def stochastic_bfloat16(value: Tensor, bits: Tensor) -> Tensor:
    """Round to one of the two neighbouring bfloat16 values, the nearer one more often.

    Args:
        value: float32 [...].
        bits: int64 [numel], of which the low 16 are used.
    Returns:
        bfloat16 [...].
    """
    words = value.contiguous().view(torch.int32).flatten().long() & WORD
    words = (words + (bits & 0xFFFF)) & 0xFFFF0000
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    rounded = words.view(torch.float32).reshape(value.shape)
    return torch.where(value.isnan(), value, rounded).to(torch.bfloat16)


def blocks_of(count: int) -> int:
    """Scales of so many elements."""
    return -(-count // BLOCK)


def stochastic_float8(value: Tensor, bits: Tensor, keep_positive: bool) -> tuple[Tensor, Tensor]:
    """Scale each block so that its largest entry is the largest float8, and round stochastically.

    Args:
        value: float32 [count].
        bits: int64 [count], of which the low 16 are used.
        keep_positive: Never round a positive entry to zero; for a second moment, which divides.
    Returns:
        float8_e4m3fn [count] and the scales, float32 [ceil(count / 256)].
    """
    count = len(value)
    padded = F.pad(value, (0, blocks_of(count) * BLOCK - count)).reshape(-1, BLOCK)
    scale = padded.abs().amax(1) / LARGEST
    safe = torch.where(scale > 0, scale, 1.0)
    scaled = (padded / safe.unsqueeze(1)).flatten()[:count]
    size = scaled.abs().clamp(max=LARGEST)
    # the spacing at |x|: 2^(exponent - 3), and below 2^-6 that of the subnormal numbers
    power = (size.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=2.0**-6)
    spacing = power * 0.125
    size = ((size / spacing + (bits & 0xFFFF).float() * 2.0**-16).floor() * spacing).clamp(max=LARGEST)
    if keep_positive:
        size = torch.where(scaled > 0, size.clamp(min=SMALLEST), size)
    return torch.where(scaled < 0, -size, size).to(torch.float8_e4m3fn), scale


def widened(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 [count] of `stochastic_float8`'s result."""
    return codes.float() * scale.repeat_interleave(BLOCK)[: len(codes)]


def packed_bits(mask: Tensor) -> Tensor:
    """A bool tensor as bits, element i in bit i % 8 of byte i // 8; uint8 [ceil(numel / 8)]."""
    flat = mask.flatten()
    flat = F.pad(flat, (0, -len(flat) % 8)).reshape(-1, 8)
    packed = torch.zeros(len(flat), dtype=torch.uint8, device=mask.device)
    for bit in range(8):  # one byte an element at a time: a 7B model has no room for int64 ones
        packed |= flat[:, bit].to(torch.uint8) << bit
    return packed


def unpacked_bits(packed: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of `packed_bits`; bool of the shape."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) >> bits & 1).bool().flatten()[: shape.numel()].reshape(shape)
