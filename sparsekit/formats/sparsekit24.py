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
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.formats.base import Format, Setting, inexact_scale, permuted
from sparsekit.formats.reading import assembled, check_shape, groups_of, one_of, tensor, whole
from sparsekit.interchange.engines import EngineNote
from sparsekit.quant import QuantizedWeight
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
    checksums = True

    def layout(self, symmetric: bool) -> str:
        """The version."""
        return f"v{VERSION}"

    def obstacle(self, state: LinearState, layout: str) -> str | None:
        """Other bits than 4, rows of a length that leaves a byte half full, more than two weights in a group."""
        weight = state.quantized
        assert weight is not None  # only asked about quantized linears
        if weight.bits != 4:
            return f"{weight.bits} bits have no sparsekit-24 layout, only 4 bits have"
        if weight.codes.shape[1] % 8:
            return f"its {weight.codes.shape[1]} inputs are not a multiple of 8; add it to the quantizer's ignore"
        used = _used(weight)
        crowded = int(((used + (used >> 8) + (used >> 16) + (used >> 24) & 7) > 2).sum())
        if crowded:
            return f"{crowded} groups of 4 hold more than two weights; prune it to 2:4, or let the quantizer ignore it"
        return inexact_scale(weight)

    def pack(self, weight: QuantizedWeight, layout: str, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Two to five tensors; a mask decides which zeros of a group are stored as its weights."""
        rank = _used(weight) << 1
        if mask is not None:
            rank |= _quads(mask.to(torch.uint8))
        places, quads = _two_best(rank), _quads(weight.codes)  # [out, in/4] both
        first, second = (places & 3) << 3, places >> 2 << 3  # in bits
        tensors = {
            "values": (quads >> first & 15 | (quads >> second & 15) << 4).to(torch.uint8),
            "positions": (places[:, 0::2] | places[:, 1::2] << 4).to(torch.uint8),
            "scales": weight.scale.half(),
        }
        if not weight.symmetric:
            even = torch.nn.functional.pad(weight.zero, (0, weight.zero.shape[1] % 2))
            tensors["zeros"] = even[:, 0::2] | even[:, 1::2] << 4
        if permuted(weight):
            tensors["group_of"] = weight.group_of.to(torch.int32)
        return tensors

    def unpack(self, found: Mapping[str, Tensor], setting: Setting) -> QuantizedWeight:
        """Inverse of `pack`."""
        values, scale = tensor(found, "values", (torch.uint8,)), tensor(found, "scales", (torch.float16,))
        out, columns = values.shape[0], 4 * values.shape[1]
        first, second = _places(found, setting)
        group_of, groups = groups_of(columns, setting, found.get("group_of"), values)
        check_shape("scales", scale, (out, groups), setting)
        if setting.symmetric:
            zero = torch.full((out, groups), 8, dtype=torch.uint8, device=values.device)
        else:
            packed = tensor(found, "zeros", (torch.uint8,))
            check_shape("zeros", packed, (out, (groups + 1) // 2), setting)
            zero = torch.stack((packed & 15, packed >> 4), 2).flatten(1)[:, :groups]
        low, high = first << 3, second << 3  # in bits
        quads = _quads(zero[:, group_of.long()]) & ~(15 << low) & ~(15 << high)
        quads |= (values & 15).int() << low | (values >> 4).int() << high
        return assembled(quads.view(torch.uint8), scale, zero, group_of, setting)

    def mask(self, found: Mapping[str, Tensor]) -> Tensor | None:
        """The stored positions."""
        first, second = _places(found, None)
        return (1 << (first << 3) | 1 << (second << 3)).view(torch.bool)

    def config(self, setting: Setting, left_dense: Sequence[str]) -> dict[str, Any]:
        """The header: what this is, its version, and the grid."""
        return {
            "quant_method": "sparsekit-24",
            "version": VERSION,
            "pattern": "2:4",
            "bits": 4,
            "group_size": setting.group_size,
            "symmetric": setting.symmetric,
            "act_order": setting.act_order,
        }

    def companions(self, setting: Setting) -> dict[str, dict[str, Any]]:
        """None."""
        return {}

    def setting(self, config: Mapping[str, Any]) -> Setting:
        """Of this version of sparsekit."""
        version = one_of(config, "version", (VERSION,))
        one_of(config, "pattern", ("2:4",))
        symmetric, act_order = (one_of(config, key, (True, False)) for key in ("symmetric", "act_order"))
        size = whole(config, "group_size")
        return Setting(one_of(config, "bits", (4,)), size, symmetric, act_order, f"v{version}")

    def notes(self, setting: Setting, sparse: bool) -> Iterator[str]:
        """That it is ours alone."""
        yield "only sparsekit reads this format; `sparsekit run` with steps: [] turns it into any other, losslessly"


def _quads(values: Tensor) -> Tensor:
    """Four neighbouring bytes as one int32, low byte first: uint8 [out, in] to [out, in/4].

    Everything about a group of 4 is then arithmetic on one number, with no strides.
    """
    return values.contiguous().view(torch.int32)


def _used(weight: QuantizedWeight) -> Tensor:
    """Where a code stands for something else than 0: int32 [out, in/4], one byte of 0 or 1 for each input."""
    zero: int | Tensor = 0x08080808 if weight.symmetric else _quads(weight.zero[:, weight.group_of.long()])
    differs = _quads(weight.codes) ^ zero  # 4 bits in each byte
    return (differs | differs >> 1 | differs >> 2 | differs >> 3) & 0x01010101


@lru_cache(maxsize=1)
def _table() -> Tensor:
    """For the ranks of 4 inputs, 2 bits each: first position | second << 2 of the two highest, left before right."""
    table = []
    for ranks in range(256):
        order = sorted(range(4), key=lambda lane: (-(ranks >> 2 * lane & 3), lane))
        first, second = sorted(order[:2])
        table.append(first | second << 2)
    return torch.tensor(table, dtype=torch.int32)


def _two_best(rank: Tensor) -> Tensor:
    """The two inputs of every four to be stored, first position | second << 2, int32 [out, in/4].

    Args:
        rank: int32 [out, in/4], one byte of 0..3 for each input.
    """
    ranks = (rank | rank >> 6 | rank >> 12 | rank >> 18) & 255
    return _table().to(rank.device).index_select(0, ranks.flatten()).reshape(rank.shape)


def _places(found: Mapping[str, Tensor], setting: Setting | None) -> tuple[Tensor, Tensor]:
    """The two positions of every group, int32 [out, in/4] each.

    Raises:
        CheckpointError: They do not rise, or do not fit the values.
    """
    values, packed = (tensor(found, name, (torch.uint8,)) for name in ("values", "positions"))
    known = setting or Setting(4, -1, True, False, "")
    check_shape("positions", packed, (values.shape[0], values.shape[1] // 2), known)
    places = torch.stack((packed & 15, packed >> 4), 2).flatten(1)  # [out, in/4]
    first, second = places & 3, places >> 2
    if bool((first >= second).any()):
        raise CheckpointError("the two positions of a group must rise, and here they do not")
    return first.int(), second.int()


def _engines(setting: Setting | None) -> list[EngineNote]:
    nothing = "It finds no weight file under a name it knows."
    return [
        EngineNote("sparsekit", "loads", "The run read every integer back and compared it."),
        EngineNote("Transformers 5", "refuses", nothing),
        EngineNote("auto-gptq 0.7.1 with Transformers 4.57", "refuses", nothing),
        EngineNote("vLLM 0.32 (CPU build)", "refuses", "Unknown quantization method: sparsekit-24."),
    ]


FORMAT = Format("sparsekit-24", Sparse24(), _engines)
