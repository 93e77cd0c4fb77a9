"""Given name: say here what it is and who reads it."""

from collections.abc import Mapping

from torch import Tensor

import sparsekit as sk

PARTS = {"codes": "codes", "scale": "scales", "zero": "zeros", "group_of": "groups"}  # what each tensor counts as


def unpack(found: Mapping[str, Tensor], setting: sk.Setting) -> sk.QuantizedWeight:
    """The integers of the tensors; a weight is (code - zero) * scale."""
    size = found["codes"].shape[1] if setting.group_size == -1 else setting.group_size
    return sk.QuantizedWeight(
        **{part: found[part] for part in PARTS}, bits=setting.bits, group_size=size, symmetric=setting.symmetric
    )


@sk.export_format("given_name", unpack=unpack, parts=PARTS)
def pack(weight: sk.QuantizedWeight, mask: Tensor | None) -> dict[str, Tensor]:
    """A byte a code; replace it by your own layout, and `unpack` by its inverse."""
    return {"codes": weight.codes, "scale": weight.scale, "zero": weight.zero, "group_of": weight.group_of}
