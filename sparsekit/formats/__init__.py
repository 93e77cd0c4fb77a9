"""The formats an export writes and an import reads, one file each.

A new format is a new file here with a `FORMAT`, and its line in the table; or a plugin with an
`export_format`. Nothing outside of its file knows its name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping

from sparsekit.errors import CheckpointError, PluginError, nearest
from sparsekit.formats import awq, coded, compact, compact24, compressed_tensors, dense, gptq, own, sparsekit24
from sparsekit.formats.base import Format, Storage
from sparsekit.shelf import Origin, Shelf

PLUGINS = " A plugin's format is read where the plugin is named."
FORMATS: Shelf[Format] = Shelf("export format")
for _module in (dense, gptq, awq, compressed_tensors, sparsekit24, compact24, compact, coded):
    FORMATS.register(_module.FORMAT)


def export_format(
    name: str, *, unpack: own.Unpack, parts: Mapping[str, str], refuses: own.Refuses | None = None
) -> Callable[[own.Pack], own.Pack]:
    """Register `f(weight: QuantizedWeight, mask: Tensor | None) -> {suffix: Tensor}` as a format of `export.formats`.

    It is called for every quantized linear; the tensors are stored as `LINEAR.suffix`. What it makes is
    unpacked and compared before an export takes its place.

    Args:
        name: What a recipe writes, also the directory's name.
        unpack: Inverse, `f(tensors, setting: Setting) -> QuantizedWeight`; a tensor that is not there may
            raise KeyError.
        parts: What each suffix is counted as: codes, positions, scales, zeros or groups. The first one
            is always there.
        refuses: Why a weight cannot be stored, in words, or None; asked before anything is written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise PluginError(f"format name {name!r} must be lower case letters, digits, - and _")

    def register(pack: own.Pack) -> own.Pack:
        storage = own.Own(name, name, name, parts, pack, unpack, refuses)
        FORMATS.register(Format(name, storage, own.engines, Origin.of(pack), inspect.getdoc(pack)))
        return pack

    return register


def storage_of(method: object) -> Storage:
    """How a checkpoint with this `quant_method` stores its integers.

    Raises:
        CheckpointError: No format here is called that.
    """
    known = {known.storage.method: known.storage for known in FORMATS.values() if known.storage is not None}
    if not isinstance(method, str) or method not in known:
        hint = nearest(method, known) if isinstance(method, str) else ""
        raise CheckpointError(
            f"quantized with quant_method {method!r}; sparsekit reads {', '.join(known)}.{hint or PLUGINS}"
        )
    return known[method]
