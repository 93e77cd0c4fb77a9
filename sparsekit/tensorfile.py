"""Safetensors files written as they are computed: the header first, then one tensor after another.

The library builds a whole file in memory, with two copies of every tensor and Python's lock held; for a
block of a large model that takes longer than compressing it. Here tensors go to the disk from where they
are. What is written are the library's own bytes, metadata in order: it writes them as a hash map has them.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

Part = bytes | memoryview


def parts_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[Part]:
    """What a file of some tensors consists of, in order; the tensors must live until it is written.

    Args:
        tensors: Contiguous, on the host.
        metadata: Text beside them.
    """
    # one element of each tells the library's names of dtypes and its order of tensors
    small = save({name: torch.zeros(1, dtype=tensor.dtype) for name, tensor in tensors.items()}, dict(metadata))
    header: dict[str, Any] = json.loads(small[8 : 8 + int.from_bytes(small[:8], "little")])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    names, at = sorted(tensors, key=lambda name: header[name]["data_offsets"]), 0
    for name in names:
        tensor = tensors[name]
        header[name] |= {"shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return [len(text).to_bytes(8, "little") + text, *(_bytes(tensors[name]) for name in names)]


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's memory; empty ones have none."""
    flat = tensor.detach().reshape(-1)
    return flat.view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


class Digest:
    """The sha256 of some parts, computed in a thread while they are written."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._hash = hashlib.sha256()
        self._thread = threading.Thread(target=self._body, args=(parts,), daemon=True)
        self._thread.start()

    def _body(self, parts: Sequence[Part]) -> None:
        for part in parts:
            self._hash.update(part)

    def hex(self) -> str:
        """Wait for it."""
        self._thread.join()
        return self._hash.hexdigest()
