"""The formats an export writes and an import reads, one file each.

A new format is a new file here with a `FORMAT`, and its line in the table. Nothing outside of its
file knows its name.
"""

from __future__ import annotations

from sparsekit.errors import CheckpointError, nearest
from sparsekit.formats import awq, compact24, compressed_tensors, dense, gptq, sparsekit24
from sparsekit.formats.base import Format, Storage

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT for module in (dense, gptq, awq, compressed_tensors, sparsekit24, compact24)
}


def storage_of(method: object) -> Storage:
    """How a checkpoint with this `quant_method` stores its integers.

    Raises:
        CheckpointError: No format here is called that.
    """
    known = {known.storage.method: known.storage for known in FORMATS.values() if known.storage is not None}
    if not isinstance(method, str) or method not in known:
        hint = nearest(method, known) if isinstance(method, str) else ""
        raise CheckpointError(f"quantized with quant_method {method!r}; sparsekit reads {', '.join(known)}.{hint}")
    return known[method]
