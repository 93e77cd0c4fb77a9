"""A Hugging Face model directory on its way to disk: staged, sharded, readable by old and new readers."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.files import check_writable, read_json, write_json, write_tensors
from sparsekit.kept import sha256_file

MAX_SHARD = 5 * 10**9  # bytes, the customary size of Hugging Face shards
MARKER = "sparsekit.json"  # a directory that holds it was written by an export and may be replaced
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def check_place(directory: Path, source: Path) -> None:
    """Refuse to write an export over the model itself, over something that is no export, or where nothing can be.

    Raises:
        CheckpointError: With the directory.
    """
    check_writable(directory)
    if directory.resolve() == source.resolve():
        raise CheckpointError(f"{directory} is the model itself; export to another directory")
    empty = not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))
    if not empty and not (directory / MARKER).is_file():
        raise CheckpointError(f"{directory} exists and holds no sparsekit export; export to another directory")


@contextmanager
def staged(directory: Path, source: Path) -> Iterator[Path]:
    """A temporary sibling that takes the place of `directory` once the block ends well.

    Args:
        directory: Where the export goes; an earlier export there is replaced in one step.
        source: The model's own directory, which is never replaced.
    Raises:
        CheckpointError: The place cannot be written, or holds something that is not an export. Nothing
            is left behind, and what was there stays.
    """
    directory = directory.absolute()
    check_place(directory, source)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.export")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        for left_by_a_killed_process in directory.parent.glob(f".{directory.name}.*.export"):
            shutil.rmtree(left_by_a_killed_process)
        temporary.mkdir()
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        _put_in_place(temporary, directory)
        _sync(directory.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {directory}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, directory: Path) -> None:
    """Swap two directories in one step where the system can, else rename twice."""
    if not directory.exists():
        os.rename(temporary, directory)
    elif not _exchange(temporary, directory):
        old = temporary.with_name(temporary.name.replace(".export", ".old.export"))
        os.rename(directory, old)
        os.rename(temporary, directory)
        shutil.rmtree(old)


def _exchange(one: Path, two: Path) -> bool:
    """Linux's renameat2 with RENAME_EXCHANGE; False where there is no such call."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of <linux/fs.h>
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return bool(call(here, os.fsencode(one), here, os.fsencode(two), exchange) == 0)


class ShardWriter:
    """Writes tensors in the order they come, a new file when the limit is reached."""

    def __init__(self, directory: Path, limit: int = MAX_SHARD, stem: str = "model") -> None:
        self._directory = directory
        self._stem = stem
        self._limit = limit
        self._open: dict[str, Tensor] = {}
        self._open_bytes = 0
        self._shards: list[tuple[list[str], str]] = []  # names of tensors, and the sha256 of their file
        self._names: set[str] = set()
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; it is copied when it is a view of a larger one."""
        if name in self._names:
            raise CheckpointError(f"tensor {name} would be written twice")
        self._names.add(name)
        if self._open and self._open_bytes + tensor.nbytes > self._limit:
            self._flush()
        tensor = tensor.detach().cpu().contiguous()
        self._open[name] = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        self._open_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def _flush(self) -> None:
        digest = write_tensors(self._part(len(self._shards) + 1), self._open)
        self._shards.append((list(self._open), digest))
        self._open, self._open_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._directory / f"part-{number:05d}.safetensors"

    def close(self) -> dict[str, dict[str, Any]]:
        """Write what is left, name the files and write their index; returns size and sha256 of each file by name."""
        if self._open or not self._shards:
            self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        files: dict[str, dict[str, Any]] = {}
        for number, (names, digest) in enumerate(self._shards, 1):
            part = "" if count == 1 else f"-{number:05d}-of-{count:05d}"
            name = f"{self._stem}{part}.safetensors"
            path = self._directory / name
            os.rename(self._part(number), path)
            files[name] = {"bytes": path.stat().st_size, "sha256": digest}
            weight_map |= dict.fromkeys(names, name)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self._directory / f"{self._stem}.safetensors.index.json", index)
        return files


def header_bytes(path: Path) -> int:
    """Size of a safetensors file's header, the eight bytes of its length included."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def reader_config(raw: Mapping[str, Any], dtype: torch.dtype) -> tuple[dict[str, Any], list[str]]:
    """A `config.json` that Transformers 4 and 5 read alike.

    Transformers 5 writes the rotary base only inside `rope_parameters`, where 4.x does not look: it
    would silently compute with 10000. The old keys are written beside the new ones.

    Args:
        raw: The model's own config.json.
        dtype: What the tensors are stored in.
    Returns:
        The configuration, and remarks about what could not be said in the old form.
    """
    config = {key: value for key, value in raw.items() if key not in ("quantization_config", "sparsity_config")}
    notes: list[str] = []
    name = str(dtype).removeprefix("torch.")
    config |= {"dtype": name, "torch_dtype": name}
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            notes += _old_rope(part)
    return config, notes


def _old_rope(config: dict[str, Any]) -> list[str]:
    """Write the rotary settings where Transformers 4 looks for them, into `config` itself."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return []
    if "rope_theta" not in rope:
        return ["rope_parameters differ by layer type; Transformers 4 readers need the model's original config.json"]
    config.setdefault("rope_theta", rope["rope_theta"])
    if "partial_rotary_factor" in rope:
        config.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    kind = rope.get("rope_type", "default")
    if kind != "default" and not config.get("rope_scaling"):
        rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        config["rope_scaling"] = {**rest, "rope_type": kind, "type": kind}
    return []


def companions(source: Path, tokenizer: Path, *, code: bool) -> list[Path]:
    """The files of the tokenizer, the generation settings, and the model's own code where it brings some.

    Args:
        source: The model's directory.
        tokenizer: The tokenizer's directory.
        code: The model brings its own code.
    """
    named = [*(tokenizer / name for name in TOKENIZER_FILES), source / "generation_config.json"]
    return [path for path in [*named, *(source.glob("*.py") if code else ())] if path.is_file()]


def copy_companions(source: Path, tokenizer: Path, target: Path, *, code: bool) -> list[str]:
    """Copy what `companions` finds into `target`; returns remarks."""
    found = companions(source, tokenizer, code=code)
    for path in found:
        shutil.copyfile(path, target / path.name)
    about = target / "tokenizer_config.json"
    if about.is_file():
        settings = read_json(about)
        if settings.get("tokenizer_class") == "TokenizersBackend":  # Transformers 5's name; 4.x: "does not exist"
            write_json(about, {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
    copied = any(path.name in TOKENIZER_FILES for path in found)
    return [] if copied else [f"{tokenizer} holds no tokenizer files; none were copied"]


def file_digests(directory: Path, files: list[Path]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of each file, by its path inside the directory."""
    return {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in files
    }


def read_config(directory: Path) -> dict[str, Any]:
    """The model's own config.json as it is written.

    Raises:
        CheckpointError: It is missing or no JSON object.
    """
    config = read_json(directory / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{directory / 'config.json'} is no JSON object: {json.dumps(config)[:60]}")
    return config
