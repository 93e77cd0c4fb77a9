"""Steps on disk: blocks written whole or not at all, checked when read, no pickle.

A step's directory holds one safetensors file for each finished block, one for what lies outside
the blocks when the step changed it, and `DONE`, which names the step's fingerprint and the sha256
of every file. Nothing else tells that a step is finished.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.branch import Branch
from sparsekit.errors import CheckpointError, NumericsError
from sparsekit.files import read_json, read_tensors, write_json, write_tensors
from sparsekit.kept import Known, sealed, sha256_file, unsealed
from sparsekit.quant import QuantizedWeight
from sparsekit.state import LinearState

HOST = torch.device("cpu")
INTEGERS = ("codes", "scale", "zero", "group_of")  # the tensors of a quantized weight
BRANCH = ("up", "down")  # the parts of a low-rank branch


@dataclass(slots=True)
class BlockState:
    """Everything one block holds: its linears, and its other tensors (norms, biases) by full name."""

    linears: dict[str, LinearState]
    params: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stored:
    """A block as files have it, read but not yet made into states.

    Attributes:
        tensors: On the host, in their stored dtype.
        states: Makes the block of them, wherever they are.
    """

    tensors: Mapping[str, Tensor]
    states: Callable[[Mapping[str, Tensor]], BlockState]

    def pinned(self) -> Stored:
        """The same in page-locked memory, from which a device copies without waiting."""
        return replace(self, tensors={name: tensor.pin_memory() for name, tensor in self.tensors.items()})

    def on(self, device: torch.device) -> BlockState:
        """The block on a device; values travel as they are stored and become float32 there."""
        return self.states({name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()})


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool mask into bits, uint8 [ceil(numel / 8)], lowest bit first."""
    flat = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (flat * weights).sum(1, dtype=torch.uint8)


def unpack_mask(bits: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Inverse of `pack_mask`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = ((bits.unsqueeze(1) >> shifts) & 1).bool().flatten()
    return flat[: torch.Size(shape).numel()].view(shape)


def block_tensors(block: BlockState, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Flatten a block for a safetensors file; values are stored in the model's `dtype`.

    Raises:
        NumericsError: A value is too large for it.
    """
    tensors: dict[str, Tensor] = {f"param/{name}": fitting(name, value, dtype) for name, value in block.params.items()}
    about: dict[str, Any] = {}
    for name, state in block.linears.items():
        about[name] = {"shape": list(state.source.shape), "notes": list(state.notes)}
        if state.mask is not None:
            tensors[f"mask/{name}"] = pack_mask(state.mask)
        if state.branch is not None:
            about[name]["branch"] = _keep_branch(name, state.branch, dtype, tensors)
        if state.quantized is None:
            tensors[f"source/{name}"] = fitting(name, state.source, dtype)
        else:
            about[name]["quantized"] = _keep_integers("", name, state.quantized, tensors)
    return tensors, {"linears": json.dumps(about)}


def _keep_integers(prefix: str, name: str, integers: QuantizedWeight, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Add the tensors of integers; returns what else there is to know of them."""
    tensors |= {f"{prefix}{key}/{name}": getattr(integers, key) for key in INTEGERS}
    return {"bits": integers.bits, "group_size": integers.group_size, "symmetric": integers.symmetric}


def _keep_branch(name: str, branch: Branch, dtype: torch.dtype, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """As `_keep_integers`, of a low-rank branch."""
    if branch.integers is not None:
        parts = zip(BRANCH, branch.integers, strict=True)
        return {part: _keep_integers(f"branch-{part}-", name, integers, tensors) for part, integers in parts}
    tensors |= {f"branch-{part}/{name}": fitting(name, value, dtype) for part, value in branch.tensors()}
    return {"length": branch.length}


def fitting(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype.

    Raises:
        NumericsError: A value is inf or NaN there.
    """
    stored = value.to(dtype)
    narrow = dtype == torch.float16 and not value.is_meta  # bfloat16 reaches as far as float32
    if narrow and not bool(torch.isfinite(stored).all()):
        largest = float(value.abs().max())
        raise NumericsError(f"values up to {largest:g} do not fit float16; store another model: dtype", layer=name)
    return stored


def block_of_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> BlockState:
    """Inverse of `block_tensors`.

    Raises:
        CheckpointError: A tensor is missing.
    """
    linears: dict[str, LinearState] = {}
    try:
        for name, about in json.loads(metadata["linears"]).items():
            mask = tensors.get(f"mask/{name}")
            quantized = _integers_of("", name, tensors, about["quantized"]) if "quantized" in about else None
            source = tensors[f"source/{name}"].float() if quantized is None else quantized.dequantize()
            linears[name] = LinearState(
                name=name,
                source=source,
                mask=None if mask is None else unpack_mask(mask, tuple(about["shape"])),
                quantized=quantized,
                notes=tuple(about["notes"]),
                branch=_branch_of(name, tensors, about["branch"]) if "branch" in about else None,
            )
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"a block file lacks {error}") from error
    params = {key.removeprefix("param/"): value for key, value in tensors.items() if key.startswith("param/")}
    return BlockState(linears, params)


def _integers_of(prefix: str, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> QuantizedWeight:
    codes, scale, zero, group_of = (tensors[f"{prefix}{key}/{name}"] for key in INTEGERS)
    return QuantizedWeight(codes, scale, zero, group_of, **about)


def _branch_of(name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Branch:
    if "length" not in about:
        return Branch.of_integers(*(_integers_of(f"branch-{part}-", name, tensors, about[part]) for part in BRANCH))
    down = tensors.get(f"branch-down/{name}")
    return Branch(tensors[f"branch-up/{name}"].float(), None if down is None else down.float(), about["length"])


class StepStore:
    """The directory of one step."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self.directory = directory
        self.dtype = dtype
        self._known: dict[str, Known] = {}  # files this process has written or checked

    @property
    def done(self) -> dict[str, Any] | None:
        """The step's record when it is finished, else None; a damaged `DONE` is none."""
        return unsealed(self.directory / "DONE")

    def finished(self, fingerprint: str) -> dict[str, Any] | None:
        """The step's record if it is finished under this fingerprint and every file is intact.

        A file that does not match its digest is removed together with `DONE`, so that the step is
        redone from there.
        """
        record = self.done
        if record is None or record.get("fingerprint") != fingerprint:
            return None
        broken = [name for name, digest in record["files"].items() if not self._intact(name, digest)]
        if not broken:
            return record
        (self.directory / "DONE").unlink()
        for name in broken:
            (self.directory / name).unlink(missing_ok=True)
        return None

    def _intact(self, name: str, digest: str) -> bool:
        path = self.directory / name
        return path.is_file() and self._digest(path) == digest

    def _digest(self, path: Path) -> str:
        """Digest of a file, which is read for it unless this process has, and nobody can have written to it since."""
        known = self._known.get(path.name)
        if known is None or not known.still(path):
            known = self._known[path.name] = Known.of(path)
        return known.digest

    def finish(self, fingerprint: str, result: Mapping[str, Any]) -> None:
        """Mark the step finished."""
        paths = sorted([*self.directory.glob("*.safetensors"), *self.directory.glob("block-*.json")])
        known = {name: known.digest for name, known in self._known.items()}
        files = {path.name: known.get(path.name) or sha256_file(path) for path in paths}
        write_json(self.directory / "DONE", sealed({"fingerprint": fingerprint, "result": result, "files": files}))

    def block_path(self, index: int) -> Path:
        """File of one block."""
        return self.directory / f"block-{index:04d}.safetensors"

    def commit_block(self, index: int, block: BlockState, layers: list[dict[str, Any]]) -> BlockState:
        """Write a finished block and what is to be reported of its layers.

        Returns the block as a later step will read it (values in `dtype`).
        """
        tensors, metadata = block_tensors(block, self.dtype)
        self.write_block(index, tensors, metadata, layers)
        return block_of_tensors(tensors, metadata)

    def write_block(
        self, index: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], layers: list[dict[str, Any]]
    ) -> None:
        """Write what `block_tensors` made of a finished block, and then that it is finished."""
        path = self.block_path(index)
        digest = write_tensors(path, tensors, metadata)
        self._known[path.name] = Known.written(path, digest)
        write_json(path.with_suffix(".json"), sealed({"sha256": digest, "layers": layers}))

    def block(self, index: int) -> BlockState | None:
        """A committed block on the host, or None; one that fails its digest counts as absent and is removed."""
        stored = self.stored(index)
        return None if stored is None else stored.on(HOST)

    def stored(self, index: int) -> Stored | None:
        """`block`, not yet made into states."""
        path = self.block_path(index)
        about = unsealed(path.with_suffix(".json"))
        if not path.is_file() or about is None:
            return None
        if self._digest(path) != about["sha256"]:
            path.unlink()
            return None
        tensors, metadata = read_tensors(path)
        return Stored(tensors, partial(block_of_tensors, metadata=metadata))

    def layers(self, index: int) -> list[dict[str, Any]]:
        """What was reported of a committed block's layers."""
        layers: list[dict[str, Any]] = read_json(self.block_path(index).with_suffix(".json"))["layers"]
        return layers

    def commit_rest(self, params: Mapping[str, Tensor]) -> None:
        """Write the tensors outside the blocks (embeddings, final norm) that the step changed."""
        write_tensors(self.directory / "rest.safetensors", {k: v.to(self.dtype) for k, v in params.items()})

    def rest(self) -> dict[str, Tensor]:
        """The tensors outside the blocks that the step changed."""
        path = self.directory / "rest.safetensors"
        return read_tensors(path)[0] if path.exists() else {}
