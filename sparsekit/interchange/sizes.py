"""True bytes of an export, counted tensor by tensor and held against the size of the files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsekit.checkpoint import pack_mask
from sparsekit.errors import CheckpointError, PatternError
from sparsekit.interchange.engines import EngineNote
from sparsekit.pattern import Pattern
from sparsekit.shelf import Origin
from sparsekit.state import LinearState
from sparsekit.verify import labelled

BYTES_AGREE = 0.01  # largest relative difference between the counted bytes and the size of the files


@dataclass(slots=True)
class ExportBytes:
    """Where the bytes of an export are.

    Attributes:
        codes: Packed integers.
        positions: Positions of the kept weights; 0 where the zeros themselves are stored.
        scales: Step of each group.
        zeros: Packed zero-points.
        groups: The group of each input, where it is stored.
        dense: Everything that is not quantized.
        headers: Names and shapes, in the headers of the safetensors files and beside the integers.
        files: Real size of the weight files.
        masks: Real size of the mask file, which no engine reads; not part of `files`.
        adapter: Real size of the low-rank branches; not part of `files`, but of the model and of its ratios.
    """

    codes: int = 0
    positions: int = 0
    scales: int = 0
    zeros: int = 0
    groups: int = 0
    dense: int = 0
    headers: int = 0
    files: int = 0
    masks: int = 0
    adapter: int = 0

    @property
    def total(self) -> int:
        """The counted bytes of the weight files."""
        return self.codes + self.positions + self.scales + self.zeros + self.groups + self.dense + self.headers


@dataclass(frozen=True, slots=True)
class LinearBytes:
    """The linears inside the blocks, which is what compression is about: every byte they need on disk.

    Attributes:
        weights: Entries of their matrices, zeros of a pattern included.
        bytes: Integers, positions, scales, zero-points, group indices, linears left dense, the mask file
            where there is one, low-rank branches, and the headers of all weight files.
    """

    weights: int
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON; ratios are how many times smaller than the same matrices in FP32 and FP16."""
        held = max(1, self.bytes)
        return asdict(self) | {"ratio_fp32": 4 * self.weights / held, "ratio_fp16": 2 * self.weights / held}


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written.

    Attributes:
        format: Name of the format, or of its layout where it has several ("gptq", "gptq_v2").
        directory: Where.
        bytes: True sizes.
        parameters: Of the model, tied ones once.
        bits_per_weight: Stored bits of a quantized weight with its scales; None without any.
        linears: The linears inside the blocks alone.
        engines: Who loads it and who does not.
        origin: Where the format was defined.
        notes: What went out of the ordinary.
        files: Size and sha256 of each weight file.
    """

    format: str
    directory: Path
    bytes: ExportBytes
    parameters: int
    bits_per_weight: float | None
    linears: LinearBytes
    engines: tuple[EngineNote, ...]
    origin: Origin
    notes: tuple[str, ...] = ()
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; ratios are how many times smaller than the same parameters in FP32 and FP16."""
        fp32, fp16 = self.parameters * 4, self.parameters * 2
        sizes = asdict(self.bytes) | {"total": self.bytes.total, "fp32": fp32, "fp16": fp16}
        return {
            "format": self.format,
            "directory": str(self.directory),
            "parameters": self.parameters,
            "bytes": sizes,
            "ratio_fp32": fp32 / (self.bytes.files + self.bytes.adapter),
            "ratio_fp16": fp16 / (self.bytes.files + self.bytes.adapter),
            "bits_per_weight": self.bits_per_weight,
            "linears": self.linears.as_dict(),
            "engines": [note.as_dict() for note in self.engines],
            "notes": list(self.notes),
            "files": {name: dict(about) for name, about in self.files.items()},
            **({} if self.origin.built_in else {"plugin": self.origin.as_dict()}),
        }


@dataclass(slots=True)
class Tally:
    """What is counted while the blocks of a model stream by."""

    bytes: ExportBytes = field(default_factory=ExportBytes)
    parameters: int = 0
    quantized: int = 0
    left_dense: int = 0  # weights of linears inside the blocks
    dense_width: int = 0  # bytes of one of them
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)

    def record(self, state: LinearState, pattern: Pattern | None) -> None:
        """Count a linear's pattern once more, on the values that are written."""
        weight = state.weight
        broken = pattern.violations(weight) if pattern else 0
        if broken:
            raise PatternError(f"{broken} groups break the {pattern} pattern", layer=state.name)
        self.layers[state.name] = {
            "shape": list(weight.shape),
            "sparsity": float((weight == 0).float().mean()),
            "pattern": labelled(pattern, state),
            "groups": pattern.groups(weight) if pattern else 0,
            "violations": broken,
            "bits": state.quantized.bits if state.quantized else None,
        }

    def add_mask(self, name: str, mask: Tensor) -> None:
        """Take a mask for the mask file."""
        self.masks[name] = pack_mask(mask).cpu()

    def add_left(self, weights: int, width: int) -> None:
        """Know that so many of the dense values, of `width` bytes each, are a linear's inside a block."""
        self.left_dense += weights
        self.dense_width = width

    def add_dense(self, tensor: Tensor) -> None:
        """Count a tensor that is stored as it is."""
        self.parameters += tensor.numel()
        self.bytes.dense += tensor.nbytes

    def add_packed(self, tensors: Mapping[str, Tensor], parts: Mapping[str, str], weights: int) -> None:
        """Count a packed linear of so many weights; `parts` names the field that counts each tensor."""
        self.parameters += weights
        self.quantized += weights
        for suffix, tensor in tensors.items():
            field_name = parts[suffix]
            setattr(self.bytes, field_name, getattr(self.bytes, field_name) + tensor.nbytes)

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits of a quantized weight, scales and all; None when there is none."""
        return 8 * self._packed / self.quantized if self.quantized else None

    @property
    def linears(self) -> LinearBytes:
        """The linears inside the blocks; to be asked when everything is written."""
        held = self.bytes
        stored = self._packed + self.left_dense * self.dense_width + held.masks + held.adapter + held.headers
        return LinearBytes(self.quantized + self.left_dense, stored)

    @property
    def _packed(self) -> int:
        """Bytes of the integers and of all that belongs to them."""
        held = self.bytes
        return held.codes + held.positions + held.scales + held.zeros + held.groups

    def check(self, headers: int, files: int) -> None:
        """Take the real sizes and hold the count against them.

        Raises:
            CheckpointError: They differ by more than one percent.
        """
        self.bytes.headers += headers
        self.bytes.files = files
        if abs(self.bytes.total - files) > BYTES_AGREE * files:
            raise CheckpointError(f"counted {self.bytes.total:,} bytes, but the weight files hold {files:,}")
