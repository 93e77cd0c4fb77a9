"""sparsekit-24: 2:4 sparse 4 bit weights at 3 bits a weight, and their scales.

Every four inputs of a row hold at most two weights. Stored are their two positions, 2 bits each in
rising order, and their two codes, 4 bits each. A group with fewer weights is filled up with codes
equal to the zero-point, which stand for exactly 0. Of each linear, all row-major:

- values uint8 [out, in / 4]: the two codes of a group in one byte, first code in the low nibble;
- positions uint8 [out, in / 8]: the positions of two groups in one byte, low bits first. Four bytes
  are, in this order, the 32 metadata bits of 32 inputs that `mma.sp.m16n8k32` takes;
- scales float16 [out, groups];
- zeros uint8 [out, ceil(groups / 2)], two zero-points in one byte, for asymmetric grids only;
- group_of int32 [in], for permuted groups only.

The configuration names the version. The files are called sparsekit-24*.safetensors: Transformers
only warns about a quant_method it does not know, and would fill the model with random weights if it
found files under the usual names. They are read only when they match the digests of sparsekit.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.formats.base import Format, Setting, grid_header, inexact_scale
from sparsekit.formats.fours import crowded, grid_tensors, mask_of, places_of, quads, read_grid, spread
from sparsekit.formats.reading import assembled, check_shape, one_of, tensor, versioned
from sparsekit.interchange.engines import EngineNote
from sparsekit.quant import QuantizedWeight
from sparsekit.shelf import Origin
from sparsekit.state import LinearState

VERSION = 1


class Sparse24:
    """See the module."""

    title = "sparsekit-24"
    method = "sparsekit-24"
    stem = "sparsekit-24"
    parts: Mapping[str, str] = {
        "values": "codes",
        "positions": "positions",
        "scales": "scales",
        "zeros": "zeros",
        "group_of": "groups",
    }
    bits: tuple[int, ...] = (4,)
    checksums = True

    def layouts(self, symmetric: bool) -> tuple[str, ...]:
        """The version."""
        return (f"v{VERSION}",)

    def obstacle(self, state: LinearState, layout: str) -> str | None:
        """Other bits than 4, rows of a length that leaves a byte half full, more than two weights in a group."""
        weight = state.quantized
        assert weight is not None  # only asked about quantized linears
        if weight.bits not in self.bits:
            others = "sparsekit-24-compact and sparsekit-coded have others"
            return f"{weight.bits} bits have no sparsekit-24 layout, only 4 bits have; {others}"
        if weight.codes.shape[1] % 8:
            return f"its {weight.codes.shape[1]} inputs are not a multiple of 8; add it to the quantizer's ignore"
        return crowded(weight) or inexact_scale(weight)

    def pack(self, weight: QuantizedWeight, layout: str, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Two to five tensors; a mask decides which zeros of a group are stored as its weights."""
        places, codes = places_of(weight, mask), quads(weight.codes)  # [out, in/4] both
        first, second = (places & 3) << 3, places >> 2 << 3  # in bits
        return {
            "values": (codes >> first & 15 | (codes >> second & 15) << 4).to(torch.uint8),
            "positions": (places[:, 0::2] | places[:, 1::2] << 4).to(torch.uint8),
            **grid_tensors(weight),
        }

    def unpack(self, found: Mapping[str, Tensor], setting: Setting) -> QuantizedWeight:
        """Inverse of `pack`."""
        values, places = tensor(found, "values", (torch.uint8,)), _places(found, setting)
        scale, zero, group_of = read_grid(found, setting, values.shape[0], 4 * values.shape[1])
        codes = spread(places, (values & 15).int(), (values >> 4).int(), zero, group_of)
        return assembled(codes, scale, zero, group_of, setting)

    def mask(self, found: Mapping[str, Tensor]) -> Tensor | None:
        """The stored positions."""
        return mask_of(_places(found, None))

    def config(self, setting: Setting, left_dense: Sequence[str]) -> dict[str, Any]:
        """The header: what this is, its version, and the grid."""
        return {
            "quant_method": "sparsekit-24",
            "version": VERSION,
            "pattern": "2:4",
            "bits": 4,
            **grid_header(setting),
        }

    def companions(self, setting: Setting) -> dict[str, dict[str, Any]]:
        """None."""
        return {}

    def setting(self, config: Mapping[str, Any]) -> Setting:
        """Of this version of sparsekit."""
        setting = versioned(config, VERSION, self.bits)
        one_of(config, "pattern", ("2:4",))
        return setting

    def notes(self, setting: Setting, sparse: bool) -> Iterator[str]:
        """That it is ours alone."""
        yield "only sparsekit reads this format; `sparsekit run` with steps: [] turns it into any other, losslessly"


def _places(found: Mapping[str, Tensor], setting: Setting | None) -> Tensor:
    """The two places of every group, int32 [out, in/4].

    Raises:
        CheckpointError: They do not rise, or do not fit the values.
    """
    values, packed = (tensor(found, name, (torch.uint8,)) for name in ("values", "positions"))
    known = setting or Setting(4, -1, True, False, "")
    check_shape("positions", packed, (values.shape[0], values.shape[1] // 2), known)
    places = torch.stack((packed & 15, packed >> 4), 2).flatten(1)  # [out, in/4]
    if bool((places & 3 >= places >> 2).any()):
        raise CheckpointError("the two positions of a group must rise, and here they do not")
    return places.int()


def _engines(setting: Setting | None) -> list[EngineNote]:
    nothing = "It finds no weight file under a name it knows."
    return [
        EngineNote("sparsekit", "loads", "The run read every integer back and compared it."),
        EngineNote("Transformers 5", "refuses", nothing),
        EngineNote("auto-gptq 0.7.1 with Transformers 4.57", "refuses", nothing),
        EngineNote("vLLM 0.32 (CPU build)", "refuses", "Unknown quantization method: sparsekit-24."),
    ]


FORMAT = Format("sparsekit-24", Sparse24(), _engines, Origin.of(Sparse24), __doc__)
