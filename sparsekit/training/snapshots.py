"""Training checkpoints: one file from one process, a directory of shards from several; no pickle.

Both hold the same tensors under the same names, so a run goes on with another number of processes.
Shards are written and read by torch's distributed checkpoint in safetensors form. The JSON file beside
them is written last; without it a checkpoint does not exist.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from sparsekit.errors import CheckpointError
from sparsekit.files import read_tensors, write_json
from sparsekit.kept import checksum, sealed, unsealed
from sparsekit.training.optim import SparseAdamW
from sparsekit.training.world import World, first_row, local

SUM = "sum/"  # sums of the log since its last line


@dataclass(frozen=True, slots=True)
class Snapshots:
    """The checkpoints of one run.

    Attributes:
        directory: Theirs alone.
        world: Who writes and reads them together.
    """

    directory: Path
    world: World

    def save(self, done: int, optimizer: SparseAdamW, sums: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Write the state after `done` steps, and drop the older ones.

        Args:
            done: Steps.
            optimizer: Its state is written.
            sums: Scalars, equal on all ranks.
            about: What else a restart needs, as JSON.
        """
        stem = self.directory / f"step-{done:08d}"
        kept = {f"{SUM}{name}": value.reshape(1) for name, value in sums.items()}
        if self.world.size == 1:
            tensors = {key: value.contiguous() for key, value in optimizer.tensors().items()}
            save_atomically(stem.with_suffix(".safetensors"), tensors | kept)
            about = {**about, "checksums": {key: checksum(value) for key, value in (tensors | kept).items()}}
        else:
            self._save_shards(stem.with_suffix(".shards"), optimizer.shared_tensors() | kept)
        if self.world.first:
            write_json(stem.with_suffix(".json"), sealed({"step": done, **about}))
            for old in self.directory.glob("step-*"):
                if old.stem != stem.stem:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
        self.world.wait()

    def _save_shards(self, path: Path, tensors: dict[str, Tensor]) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        if self.world.first:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(path, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.world.wait()
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
        self.world.wait()
        if self.world.first:
            for file in temporary.iterdir():
                _sync(file)
            temporary.rename(path)

    def restore(self, optimizer: SparseAdamW, device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Load the newest whole checkpoint; returns its JSON and its sums, or None when there is none."""
        for about in sorted(self.directory.glob("step-*.json"), reverse=True):
            described = unsealed(about)
            if described is None:
                continue
            try:
                sums = self._load(about, described, optimizer)
            except (CheckpointError, CheckpointException, KeyError, OSError, ValueError, SafetensorError):
                continue  # half of it is missing, or another layout: the one before it, or the start
            optimizer.rewrite()
            return described, {name: value[0].to(device) for name, value in sums.items()}
        return None

    def _load(self, about: Path, described: Mapping[str, Any], optimizer: SparseAdamW) -> dict[str, Tensor]:
        shards = about.with_suffix(".shards")
        if shards.is_dir():
            return self._load_shards(shards, optimizer)
        if self.world.size > 1:
            return _load_rows(about.with_suffix(".safetensors"), optimizer)
        tensors, _ = read_tensors(about.with_suffix(".safetensors"))
        if described.get("checksums") != {key: checksum(value) for key, value in tensors.items()}:
            raise CheckpointError(f"{about} is not of the tensors beside it")
        optimizer.load_tensors({key: value for key, value in tensors.items() if not key.startswith(SUM)})
        return {key.removeprefix(SUM): value for key, value in tensors.items() if key.startswith(SUM)}

    def _load_shards(self, path: Path, optimizer: SparseAdamW) -> dict[str, Tensor]:
        reader = HuggingFaceStorageReader(str(path))
        described = reader.read_metadata().state_dict_metadata
        wanted = optimizer.shared_tensors()
        sums = {
            key: torch.zeros(1, dtype=about.properties.dtype)
            for key, about in described.items()
            if key.startswith(SUM) and isinstance(about, TensorStorageMetadata)
        }
        _same_keys(wanted, described)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process, as intended
            load(wanted | sums, storage_reader=reader, no_dist=self.world.size == 1)
        return {key.removeprefix(SUM): value for key, value in sums.items()}


def _load_rows(path: Path, optimizer: SparseAdamW) -> dict[str, Tensor]:
    """Each rank reads its rows of the tensors of a single file."""
    wanted = optimizer.shared_tensors()
    with safe_open(str(path), framework="pt") as file:
        names = set(file.keys())
        _same_keys(wanted, names)
        for key, tensor in wanted.items():
            own, start = local(tensor), first_row(tensor)
            own.copy_(file.get_slice(key)[start : start + len(own)])
        return {key.removeprefix(SUM): file.get_tensor(key) for key in names if key.startswith(SUM)}


def _same_keys(wanted: Mapping[str, Any], found: Mapping[str, Any] | set[str]) -> None:
    odd = sorted(set(wanted) ^ {key for key in found if not key.startswith(SUM)})
    if odd:
        raise KeyError(f"training state differs in {odd[0]} and {len(odd) - 1} more tensors")


def save_atomically(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a large safetensors file whole, without a second copy in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file({name: tensor.detach().cpu() for name, tensor in tensors.items()}, temporary)
        _sync(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # the library's own error says which of the system's it was
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"cannot write {path}: {why or error}") from error
    finally:  # after Ctrl-C as well; when all went well it has another name
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        file.flush()
        os.fsync(file.fileno())
