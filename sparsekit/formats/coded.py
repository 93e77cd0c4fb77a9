"""sparsekit-coded: integers of any bits in what their entropy says they take, for the disk alone.

Where the compact formats give every code the same bits, this one gives frequent codes fewer. Of each linear
it stores up to five tensors, each a row of bytes, which are streams as streams.py writes them:

- values: a byte, 4, and the codes [out, in]; or a byte, 2, and those of the two kept inputs of every group of
  four, [out, in / 2]: then there are patterns;
- patterns: where no group of four holds more than two weights: which two are kept, 0..5 for places 01, 02, 03, 12, 13,
  23, [out, in / 4]. A group with fewer is filled up as in sparsekit-24;
- scales: the high bytes of the float16 scales [out, groups], and behind them their low bytes;
- zeros: the zero-points [out, groups], of asymmetric grids only;
- group_of: as in sparsekit-24, no stream.

A stream counts what occurs, so levels have no names here: odd, ternary or any other ones take what they are worth.
Whether a linear has patterns is told by itself, and a model may hold both kinds.

The files are called sparsekit-coded*.safetensors, and the digests of sparsekit.json must match, for the
reasons given in sparsekit24.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.formats import streams
from sparsekit.formats.base import Format, Setting, grid_header, inexact_scale, permuted
from sparsekit.formats.fours import PLACES, crowded, mask_of, pattern_of, places_of, places_with, quads, spread
from sparsekit.formats.reading import assembled, check_shape, groups_of, versioned
from sparsekit.interchange.engines import EngineNote
from sparsekit.quant import QuantizedWeight
from sparsekit.shelf import Origin
from sparsekit.state import LinearState

VERSION = 1
BITS = tuple(range(2, 9))
ALL, TWO = 4, 2  # inputs of every four whose codes are stored


class Coded:
    """See the module."""

    title = "sparsekit-coded"
    method = "sparsekit-coded"
    stem = "sparsekit-coded"
    parts: Mapping[str, str] = {
        "values": "codes",
        "patterns": "positions",
        "scales": "scales",
        "zeros": "zeros",
        "group_of": "groups",
    }
    bits: tuple[int, ...] = BITS
    checksums = True

    def layouts(self, symmetric: bool) -> tuple[str, ...]:
        """The version."""
        return (f"v{VERSION}",)

    def obstacle(self, state: LinearState, layout: str) -> str | None:
        """Scales that float16 cannot hold."""
        assert state.quantized is not None  # only asked about quantized linears
        return inexact_scale(state.quantized)

    def pack(self, weight: QuantizedWeight, layout: str, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Two to five tensors; a mask decides which zeros of a group are stored as its weights."""
        tensors, device = {}, weight.codes.device
        if weight.codes.shape[1] % 4 or crowded(weight):
            tensors["values"] = _stored(device, weight.codes, begin=(ALL,))
        else:
            places, codes = places_of(weight, mask), quads(weight.codes)  # [out, in/4] both
            pairs = torch.stack((codes >> ((places & 3) << 3) & 255, codes >> (places >> 2 << 3) & 255), 2)
            tensors["values"] = _stored(device, pairs.flatten(1), begin=(TWO,))
            tensors["patterns"] = _stored(device, pattern_of(places))
        low, high = weight.scale.half().contiguous().view(torch.uint8).reshape(*weight.scale.shape, 2).unbind(2)
        tensors["scales"] = _stored(device, high, low)
        if not weight.symmetric:
            tensors["zeros"] = _stored(device, weight.zero)
        if permuted(weight):
            tensors["group_of"] = weight.group_of.to(torch.int32)
        return tensors

    def unpack(self, found: Mapping[str, Tensor], setting: Setting) -> QuantizedWeight:
        """Inverse of `pack`."""
        places, (values,) = _places(found), _read(found, "values", begin=1)
        out, columns = values.shape
        if places is not None:
            columns = 4 * places.shape[1]
            check_shape("values", values, (len(places), columns // 2), setting)
        high, low = _read(found, "scales", 2)
        group_of, groups = groups_of(columns, setting, found.get("group_of"), values)
        for part in (high, low):
            check_shape("scales", part, (out, groups), setting)
        scale = torch.stack((low, high), 2).view(torch.float16).squeeze(2)
        zero = torch.full((out, groups), 2 ** (setting.bits - 1), dtype=torch.uint8, device=values.device)
        if not setting.symmetric:
            (zero,) = _read(found, "zeros")
            check_shape("zeros", zero, (out, groups), setting)
        if (largest := max(int(values.max()), int(zero.max()))) >= 2**setting.bits:
            raise CheckpointError(f"{largest} is no code of {setting.bits} bits")
        if places is not None:
            pairs = values.int()
            values = spread(places, pairs[:, 0::2], pairs[:, 1::2], zero, group_of)
        return assembled(values, scale, zero, group_of, setting)

    def mask(self, found: Mapping[str, Tensor]) -> Tensor | None:
        """The stored patterns, where there are some."""
        places = _places(found)
        return None if places is None else mask_of(places)

    def config(self, setting: Setting, left_dense: Sequence[str]) -> dict[str, Any]:
        """The header: what this is, its version, and the grid."""
        return {"quant_method": self.method, "version": VERSION, "bits": setting.bits, **grid_header(setting)}

    def companions(self, setting: Setting) -> dict[str, dict[str, Any]]:
        """None."""
        return {}

    def setting(self, config: Mapping[str, Any]) -> Setting:
        """Of this version of sparsekit."""
        return versioned(config, VERSION, BITS)

    def notes(self, setting: Setting, sparse: bool) -> Iterator[str]:
        """That it is ours alone, and for what."""
        yield "only sparsekit reads this format; `sparsekit run` with steps: [] turns it into any other, losslessly"
        yield "every linear is decoded when it is read; no kernel computes with coded integers"


def _stored(device: torch.device, *matrices: Tensor, begin: tuple[int, ...] = ()) -> Tensor:
    """Some bytes and matrices of small integers as streams: uint8 [bytes]; the coder runs on the CPU."""
    parts = [streams.written(matrix.to(torch.uint8).cpu().contiguous().numpy()) for matrix in matrices]
    return torch.from_numpy(np.concatenate((np.array(begin, np.uint8), *parts))).to(device)


def _bytes(found: Mapping[str, Tensor], suffix: str) -> Tensor:
    """A tensor of a linear, uint8 [bytes].

    Raises:
        CheckpointError: It is missing or of another kind.
    """
    if suffix not in found:
        raise CheckpointError(f"lacks the tensor {suffix}; there is {', '.join(found)}")
    value = found[suffix]
    if value.dtype != torch.uint8 or value.dim() != 1:
        raise CheckpointError(f"{suffix} is {value.dtype} {list(value.shape)}, expected a row of bytes")
    return value


def _read(found: Mapping[str, Tensor], suffix: str, count: int = 1, begin: int = 0) -> list[Tensor]:
    """Inverse of `_stored`: so many matrices, behind so many bytes.

    Raises:
        CheckpointError: The tensor is missing, or is not what was ever written.
    """
    value, matrices = _bytes(found, suffix), []
    rest = value.cpu().numpy()[begin:]
    try:
        for _ in range(count):
            matrix, rest = streams.read(rest)
            matrices.append(torch.from_numpy(matrix).to(value.device))
    except CheckpointError as error:
        raise CheckpointError(f"{suffix}: {error}") from error
    if len(rest):
        raise CheckpointError(f"{suffix}: {len(rest):,} bytes behind the end of its last stream")
    return matrices


def _places(found: Mapping[str, Tensor]) -> Tensor | None:
    """The two places of every group, int32 [out, in/4], or None without patterns.

    Raises:
        CheckpointError: No such bytes were ever written.
    """
    kept = _bytes(found, "values")[:1].tolist()
    if kept == [ALL] and "patterns" not in found:
        return None
    if kept != [TWO]:
        raise CheckpointError(f"values of {kept} inputs of every four: {ALL}, or with patterns {TWO} are stored")
    (patterns,) = _read(found, "patterns")
    if (largest := int(patterns.max())) >= len(PLACES):
        raise CheckpointError(f"patterns holds {largest}; two of four lie in {len(PLACES)} ways, 0..5")
    return places_with(patterns)


def _engines(setting: Setting | None) -> list[EngineNote]:
    return [
        EngineNote("sparsekit", "loads", "The run read every integer back and compared it."),
        EngineNote("Transformers 5", "refuses", "It finds no weight file under a name it knows."),
        EngineNote("vLLM, auto-gptq", "not checked", "They refuse sparsekit-24, whose files are as foreign to them."),
    ]


FORMAT = Format("sparsekit-coded", Coded(), _engines, Origin.of(Coded), __doc__)
