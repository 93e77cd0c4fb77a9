"""sparsekit-compact: integers of every weight, as small on disk as their levels allow.

What sparsekit-24-compact is to 2:4, for linears without a pattern: no positions, and a code for every
weight, zeros included. Of each linear, all row-major, every row by itself:

- values uint8: the codes of a row as one little-endian bit stream, [out, in * bits / 8]; with ternary
  levels five weights in a byte, [out, ceil(in / 5)]: t0 + 3 t1 + 9 t2 + 27 t3 + 81 t4, where t is the
  level plus 1; with six levels three, [out, ceil(in / 3)]: t0 + 6 t1 + 36 t2, where 0..5 are the levels
  from below; absent weights at the end of a row count as 0;
- scales, zeros and group_of as in sparsekit-24.

What a code q stands for depends on the levels, in units of the scale:

- "odd": 2 q + 1 - 2^bits, that is ±1, ±3, ... with no level for 0. This is what a symmetric grid of one
  bit more becomes when every code is an odd number of steps from its zero-point; 1 to 4 bits are stored
  of 2 to 5.
- "six": -5, -3, -1, 1, 3, 5: a symmetric grid of 4 bits, in 2.67.
- "ternary": -1, 0, 1: a symmetric grid of 2 bits without the lowest code, in 1.6 bits.
- "integer": q - zero, for grids of 2, 3 and 4 bits.

All quantized linears of a model have the same levels, the smallest that all allow. A mask is not told by
the values and lies beside them, as with formats of others.

The files are called sparsekit-compact*.safetensors, and the digests of sparsekit.json must match, for
the reasons given in sparsekit24.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.formats.base import Format, Setting, inexact_scale
from sparsekit.formats.fours import grid_tensors, read_grid
from sparsekit.formats.levels import INTEGER, ODD, SIX, TERNARY, beyond_six, levels_header, levels_setting
from sparsekit.formats.reading import assembled, check_shape, one_of, tensor
from sparsekit.interchange.engines import EngineNote
from sparsekit.quant import QuantizedWeight, is_odd
from sparsekit.shelf import Origin
from sparsekit.state import LinearState

VERSION = 1
STORED = {ODD: (1, 2, 3, 4), SIX: (3,), TERNARY: (2,), INTEGER: (2, 3, 4)}  # bits of a code; as digits they take fewer
DIGITS = {SIX: (6, 3), TERNARY: (3, 5)}  # levels, which are the base, and how many weights fit a byte
UNIT = 16  # inputs: codes of any bits fill whole bytes, and the bytes of a row of digits tell how many there are
FEWER = (
    "quantizers with bits: 2, 3 or 4 leave what has a layout, and so does ast with levels: odd, six or ternary; "
    "sparsekit-coded holds all bits"
)


class Compact:
    """See the module."""

    title = "sparsekit-compact"
    method = "sparsekit-compact"
    stem = "sparsekit-compact"
    parts: Mapping[str, str] = {"values": "codes", "scales": "scales", "zeros": "zeros", "group_of": "groups"}
    bits: tuple[int, ...] = tuple(sorted({*STORED[INTEGER], *(bits + 1 for bits in STORED[ODD])}))
    checksums = True

    def layouts(self, symmetric: bool) -> tuple[str, ...]:
        """The levels; odd ones take one bit less, six ones 1.33, ternary ones 0.4."""
        return (SIX, ODD, TERNARY, INTEGER) if symmetric else (INTEGER,)

    def obstacle(self, state: LinearState, layout: str) -> str | None:
        """Bits without a layout, rows that do not fill bytes, codes that the levels do not have."""
        weight = state.quantized
        assert weight is not None  # only asked about quantized linears
        if weight.codes.shape[1] % UNIT:
            told = "add it to the quantizer's ignore, or export sparsekit-coded"
            return f"its {weight.codes.shape[1]} inputs are not a multiple of {UNIT}; {told}"
        if weight.bits - is_odd(layout) not in STORED[layout]:
            return f"{weight.bits} bits have no sparsekit-compact layout with levels {layout}; {FEWER}"
        if is_odd(layout) and bool((weight.codes & 1 ^ 1).any()):
            return "codes are an even number of steps from zero"
        if layout == TERNARY and bool((weight.codes == 0).any()):
            return "codes stand for -2"
        return (beyond_six(weight.codes) if layout == SIX else None) or inexact_scale(weight)

    def pack(self, weight: QuantizedWeight, layout: str, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Two to four tensors; a mask changes nothing."""
        odd = is_odd(layout)
        codes = weight.codes >> 1 if odd else weight.codes
        values = _together(codes - 1, layout) if layout in DIGITS else _stream(codes, weight.bits - odd)
        return {"values": values, **grid_tensors(weight)}

    def unpack(self, found: Mapping[str, Tensor], setting: Setting) -> QuantizedWeight:
        """Inverse of `pack`."""
        values = tensor(found, "values", (torch.uint8,))
        odd = is_odd(setting.layout)
        bits, (_, count) = setting.bits - odd, DIGITS.get(setting.layout, (0, 0))
        out, held = values.shape
        columns = (count * held if count else 8 * held // bits) // UNIT * UNIT
        check_shape("values", values, (out, -(-columns // count) if count else columns * bits // 8), setting)
        scale, zero, group_of = read_grid(found, setting, out, columns)
        codes = _apart(values, columns, setting.layout) + 1 if count else _codes(values, bits)
        codes = codes << 1 | 1 if odd else codes
        return assembled(codes, scale, zero, group_of, setting)

    def mask(self, found: Mapping[str, Tensor]) -> Tensor | None:
        """None: a pruned weight looks like one that was rounded to zero."""
        return None

    def config(self, setting: Setting, left_dense: Sequence[str]) -> dict[str, Any]:
        """The header: what this is, its version, the bits of a code, the levels, and the grid."""
        return {
            "quant_method": self.method,
            "version": VERSION,
            **levels_header(setting),
        }

    def companions(self, setting: Setting) -> dict[str, dict[str, Any]]:
        """None."""
        return {}

    def setting(self, config: Mapping[str, Any]) -> Setting:
        """Of this version of sparsekit."""
        one_of(config, "version", (VERSION,))
        return levels_setting(config, STORED)

    def notes(self, setting: Setting, sparse: bool) -> Iterator[str]:
        """That it is ours alone, and what the levels cost."""
        yield "only sparsekit reads this format; `sparsekit run` with steps: [] turns it into any other, losslessly"
        taken = {SIX: "2.67", TERNARY: "1.6"}.get(setting.layout, setting.bits - is_odd(setting.layout))
        yield f"levels {setting.layout}: {taken} bits a weight, and a scale for each group of inputs"
        if sparse:
            yield "zeros of a pattern are stored as codes; sparsekit-24-compact leaves them out"


def _stream(codes: Tensor, bits: int) -> Tensor:
    """Each row as a little-endian bit stream: uint8 [out, in] of values below 2^bits to uint8 [out, in * bits / 8]."""
    eights = codes.reshape(len(codes), -1, 8)  # they fill `bits` bytes
    filled = torch.zeros(*eights.shape[:2], bits, dtype=torch.uint8, device=codes.device)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        filled[..., byte] |= eights[..., place] << shift
        if shift + bits > 8:
            filled[..., byte + 1] |= eights[..., place] >> 8 - shift
    return filled.flatten(1)


def _codes(values: Tensor, bits: int) -> Tensor:
    """Inverse of `_stream`."""
    held = values.reshape(len(values), -1, bits)
    codes = torch.empty(*held.shape[:2], 8, dtype=torch.uint8, device=values.device)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        code = held[..., byte] >> shift
        if shift + bits > 8:
            code = code | held[..., byte + 1] << 8 - shift
        codes[..., place] = code & 2**bits - 1
    return codes.flatten(1)


def _together(digits: Tensor, layout: str) -> Tensor:
    """The `count` digits of a byte, the lowest first: uint8 [out, in] to uint8 [out, ceil(in / count)]."""
    base, count = DIGITS[layout]
    whole = torch.nn.functional.pad(digits, (0, -digits.shape[1] % count))
    filled = torch.zeros_like(whole[:, ::count])
    for place in range(count):
        filled += base**place * whole[:, place::count]
    return filled


def _apart(values: Tensor, columns: int, layout: str) -> Tensor:
    """Inverse of `_together`: uint8 [out, columns].

    Raises:
        CheckpointError: No such bytes were ever written.
    """
    base, count = DIGITS[layout]
    codes = base**count
    if bool((values >= codes).any()):
        told = f"{count} weights of {base} levels have {codes} codes, 0..{codes - 1}"
        raise CheckpointError(f"values holds {int(values.max())}; {told}")
    if bool((values[:, -1:] >= base ** (columns - count * (values.shape[1] - 1))).any()):
        raise CheckpointError("values holds more weights at the end of a row than the row has")
    digits = torch.stack([values // base**place % base for place in range(count)], 2)
    return digits.flatten(1)[:, :columns].contiguous()


def _engines(setting: Setting | None) -> list[EngineNote]:
    return [
        EngineNote("sparsekit", "loads", "The run read every integer back and compared it."),
        EngineNote("Transformers 5", "refuses", "It finds no weight file under a name it knows."),
        EngineNote("vLLM, auto-gptq", "not checked", "They refuse sparsekit-24, whose files are as foreign to them."),
    ]


FORMAT = Format("sparsekit-compact", Compact(), _engines, Origin.of(Compact), __doc__)
