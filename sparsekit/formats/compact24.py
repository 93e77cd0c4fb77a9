"""sparsekit-24-compact: 2:4 sparse weights of 1 to 4 bits, as small on disk as the pattern allows.

Every four inputs of a row hold two weights, and 6 pairs of places are possible: three groups fit a byte
(6^3 = 216), where sparsekit-24, whose positions a kernel takes as they are, has two. Codes have the
bits they need. Of each linear, all row-major, every row by itself:

- values uint8 [out, in * bits / 16]: the codes of a row, two for each group, as one little-endian bit
  stream;
- patterns uint8 [out, ceil(in / 12)]: p0 + 6 p1 + 36 p2 of three groups, where 0..5 are the places
  01, 02, 03, 12, 13, 23; absent groups at the end of a row count as 0;
- with six levels, in place of these two, values uint8 [out, in / 4]: p + 6 a + 36 b of a group, where p is
  its places and 0..5 are the levels of its two weights, from below;
- scales, zeros and group_of as in sparsekit-24.

What a code q stands for depends on the levels, in units of the scale:

- "integer": q - zero, for grids of 2, 3 and 4 bits. A group with fewer than two weights is filled up
  with codes equal to the zero-point.
- "odd": 2 q + 1 - 2^bits, that is ±1, ±3, ... with no level for 0. This is what a symmetric grid of one
  bit more becomes when every kept code is an odd number of steps from its zero-point; 1 to 4 bits are
  stored of 2 to 5.
- "six": -5, -3, -1, 1, 3, 5, a symmetric grid of 4 bits. A group is 216 states, and so a byte.

Odd and six levels have nothing to fill a group up with, so each must hold exactly two weights. All quantized
linears of a model have the same levels, the smallest that all allow.

The files are called sparsekit-24-compact*.safetensors, and the digests of sparsekit.json must match,
for the reasons given in sparsekit24.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.formats.base import Format, Setting, inexact_scale
from sparsekit.formats.fours import (
    PLACES,
    counts,
    crowded,
    grid_tensors,
    mask_of,
    pattern_of,
    places_of,
    places_with,
    quads,
    read_grid,
    spread,
    used,
)
from sparsekit.formats.levels import INTEGER, ODD, SIX, beyond_six, levels_header, levels_setting
from sparsekit.formats.reading import assembled, check_shape, one_of, tensor
from sparsekit.interchange.engines import EngineNote
from sparsekit.quant import QuantizedWeight, is_odd
from sparsekit.shelf import Origin
from sparsekit.state import LinearState

VERSION = 1
STORED = {ODD: (1, 2, 3, 4), SIX: (3,), INTEGER: (2, 3, 4)}  # bits of a kept code
UNIT = 16  # inputs whose 8 codes fill whole bytes at any number of bits


class Compact24:
    """See the module."""

    title = "sparsekit-24-compact"
    method = "sparsekit-24-compact"
    stem = "sparsekit-24-compact"
    parts: Mapping[str, str] = {
        "values": "codes",
        "patterns": "positions",
        "scales": "scales",
        "zeros": "zeros",
        "group_of": "groups",
    }
    bits: tuple[int, ...] = tuple(sorted({*STORED[INTEGER], *(bits + 1 for bits in STORED[ODD])}))
    checksums = True

    def layouts(self, symmetric: bool) -> tuple[str, ...]:
        """The levels; odd ones need one bit less, six ones of 4 bits less than odd ones."""
        return (SIX, ODD, INTEGER) if symmetric else (INTEGER,)

    def obstacle(self, state: LinearState, layout: str) -> str | None:
        """Bits without a layout, rows that do not fill bytes, groups that the levels cannot hold."""
        weight = state.quantized
        assert weight is not None  # only asked about quantized linears
        if weight.codes.shape[1] % UNIT:
            told = "add it to the quantizer's ignore, or export sparsekit-coded"
            return f"its {weight.codes.shape[1]} inputs are not a multiple of {UNIT}; {told}"
        if is_odd(layout):
            return _not_odd(weight, layout) or inexact_scale(weight)
        if weight.bits not in STORED[INTEGER]:
            allowed = "2, 3 and 4 bits have, 5 where every group of 4 holds two odd codes, and all in sparsekit-coded"
            return f"{weight.bits} bits have no sparsekit-24-compact layout; {allowed} (here {_not_odd(weight, ODD)})"
        return crowded(weight) or inexact_scale(weight)

    def pack(self, weight: QuantizedWeight, layout: str, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Two to five tensors; a mask decides which zeros of a group are stored as its weights."""
        halved = int(is_odd(layout))
        places, codes = places_of(weight, mask), quads(weight.codes) >> halved  # [out, in/4] both
        bits = weight.bits - halved
        low = 2**bits - 1
        first, second = codes >> ((places & 3) << 3) & low, codes >> (places >> 2 << 3) & low
        if layout == SIX:
            values = pattern_of(places) + (6 * (first - 1) + 36 * (second - 1)).to(torch.uint8)
            return {"values": values, **grid_tensors(weight)}
        pairs = (first | second << bits).to(torch.uint8)
        return {"values": _squeezed(pairs, bits), "patterns": _threes(places), **grid_tensors(weight)}

    def unpack(self, found: Mapping[str, Tensor], setting: Setting) -> QuantizedWeight:
        """Inverse of `pack`."""
        bits = setting.bits - is_odd(setting.layout)
        if setting.layout == SIX:
            places, first, second = _sixes(found)
        else:
            values, places = tensor(found, "values", (torch.uint8,)), _places(found)
            check_shape("values", values, (len(places), 4 * places.shape[1] * bits // UNIT), setting)
            pairs = _widened(values, bits).int()
            first, second = pairs & 2**bits - 1, pairs >> bits
        scale, zero, group_of = read_grid(found, setting, places.shape[0], 4 * places.shape[1])
        if is_odd(setting.layout):
            first, second = first << 1 | 1, second << 1 | 1
        return assembled(spread(places, first, second, zero, group_of), scale, zero, group_of, setting)

    def mask(self, found: Mapping[str, Tensor]) -> Tensor | None:
        """The stored patterns, which bytes of six levels tell with them."""
        return mask_of(_places(found) if "patterns" in found else _sixes(found)[0])

    def config(self, setting: Setting, left_dense: Sequence[str]) -> dict[str, Any]:
        """The header: what this is, its version, the bits that are stored, and the grid."""
        return {
            "quant_method": self.method,
            "version": VERSION,
            "pattern": "2:4",
            **levels_header(setting),
        }

    def companions(self, setting: Setting) -> dict[str, dict[str, Any]]:
        """None."""
        return {}

    def setting(self, config: Mapping[str, Any]) -> Setting:
        """Of this version of sparsekit."""
        one_of(config, "version", (VERSION,))
        one_of(config, "pattern", ("2:4",))
        return levels_setting(config, STORED)

    def notes(self, setting: Setting, sparse: bool) -> Iterator[str]:
        """That it is ours alone, and what the levels cost."""
        yield "only sparsekit reads this format; `sparsekit run` with steps: [] turns it into any other, losslessly"
        if setting.layout == ODD:
            yield f"levels odd: every kept weight is an odd number of steps, {setting.bits - 1} bits of {setting.bits}"
        elif setting.layout == SIX:
            yield "levels six: every kept weight is 1, 3 or 5 steps, two of them and their places in a byte"
        else:
            yield f"levels integer: {setting.bits} bits a kept weight; models trained to odd levels take one bit less"


def _not_odd(weight: QuantizedWeight, layout: str) -> str | None:
    """Why a weight cannot be stored as odd or six levels, in words, or None."""
    if not weight.symmetric:
        return "the grid is not symmetric"
    if weight.bits - 1 not in STORED[layout]:
        return f"{weight.bits} bits are stored as {weight.bits - 1}, of which there is no layout"
    if layout == SIX and (why := beyond_six(weight.codes)):
        return why
    holds = used(weight)
    if bool((counts(holds) != 2).any()):
        return "groups of 4 do not hold exactly two weights"
    if bool(counts(holds & ~quads(weight.codes)).any()):
        return "kept codes are an even number of steps from zero"
    return None


def _squeezed(pairs: Tensor, bits: int) -> Tensor:
    """The low 2 `bits` bits of every byte, one after another: uint8 [out, in/4] to [out, in * bits / 16]."""
    if bits == 4:
        return pairs
    words, width = quads(pairs), 2 * bits  # 4 pairs in each word, [out, in/16]
    low, wide = (2**width - 1) * 0x00010001, 4**width - 1
    words = words & low | words >> 8 - width & low << width
    words = words & wide | words >> 16 - 2 * width & wide << 2 * width
    filled: Tensor = words.view(torch.uint8).reshape(*words.shape, 4)[..., :bits].flatten(1)
    return filled.contiguous()


def _widened(values: Tensor, bits: int) -> Tensor:
    """Inverse of `_squeezed`."""
    if bits == 4:
        return values
    held, width = values.reshape(len(values), -1, bits), 2 * bits
    words: Tensor = torch.nn.functional.pad(held, (0, 4 - bits)).view(torch.int32).squeeze(2)  # [out, in/16]
    low, wide = (2**width - 1) * 0x00010001, 4**width - 1
    words = words & wide | (words & wide << 2 * width) << 16 - 2 * width
    words = words & low | (words & low << width) << 8 - width
    return words.view(torch.uint8)


def _threes(places: Tensor) -> Tensor:
    """Three groups in a byte: places int32 [out, in/4] to uint8 [out, ceil(in / 12)]."""
    pattern = pattern_of(places)
    whole = torch.nn.functional.pad(pattern, (0, -pattern.shape[1] % 3))
    return whole[:, 0::3] + 6 * whole[:, 1::3] + 36 * whole[:, 2::3]


@lru_cache(maxsize=1)
def _table() -> Tensor:
    """The places of the three groups of a byte, int32 [216, 3]."""
    rows = [[PLACES[byte // 6**group % 6] for group in range(3)] for byte in range(216)]
    return torch.tensor(rows, dtype=torch.int32)


def _places(found: Mapping[str, Tensor]) -> Tensor:
    """The two places of every group, int32 [out, in/4]. Four groups are a unit, so that the bytes tell how many.

    Raises:
        CheckpointError: No such bytes were ever written.
    """
    packed = tensor(found, "patterns", (torch.uint8,))
    out, held = packed.shape
    groups = 3 * held // 4 * 4
    if -(-groups // 3) != held:
        raise CheckpointError(
            f"patterns has shape {[out, held]}: no multiple of {UNIT} inputs takes {held} bytes a row"
        )
    if bool((packed >= 216).any()):
        raise CheckpointError(f"patterns holds {int(packed.max())}; three groups of 4 have 216 patterns, 0..215")
    if bool((packed[:, -1:] >= 6 ** (groups - 3 * (held - 1))).any()):
        raise CheckpointError("patterns holds more groups at the end of a row than the row has")
    places = _table().to(packed.device).index_select(0, packed.flatten().int())  # [out * held, 3]
    return places.reshape(out, -1)[:, :groups].contiguous()


def _sixes(found: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The two places of every group and the halves of its odd codes, int32 [out, in/4] each.

    Raises:
        CheckpointError: No such bytes were ever written.
    """
    values = tensor(found, "values", (torch.uint8,))
    if "patterns" in found:
        raise CheckpointError("has patterns, which the values of six levels tell already")
    out, held = values.shape
    if held % 4:
        raise CheckpointError(f"values has shape {[out, held]}: no multiple of {UNIT} inputs takes {held} bytes a row")
    if bool((values >= 216).any()):
        raise CheckpointError(f"values holds {int(values.max())}; a group of 4 with six levels has 216 states, 0..215")
    return places_with(values % 6), (values // 6 % 6 + 1).int(), (values // 36 + 1).int()


def _engines(setting: Setting | None) -> list[EngineNote]:
    return [
        EngineNote("sparsekit", "loads", "The run read every integer back and compared it."),
        EngineNote("Transformers 5", "refuses", "It finds no weight file under a name it knows."),
        EngineNote("vLLM, auto-gptq", "not checked", "They refuse sparsekit-24, whose files are as foreign to them."),
    ]


FORMAT = Format("sparsekit-24-compact", Compact24(), _engines, Origin.of(Compact24), __doc__)
