"""Files: written whole or not at all, checked when read, no pickle; one process at a time in a directory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.tensorfile import Digest, Part, parts_of

# a file and the process that writes it; a training checkpoint; the directory in which a plan times the disk
TEMPORARY = re.compile(r"\..+\.\d+\.tmp|\.step-\d+.*\.tmp|\.sparsekit-.+\.tmp")
ROOM = 24  # characters that the name of a temporary file is longer than the file's


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole: temporary file, fsync, rename, fsync of the directory.

    Raises:
        CheckpointError: The disk is full or the directory cannot be written; nothing is left behind.
    """
    write_parts(path, [data])


def write_parts(path: Path, parts: Iterable[Part]) -> None:
    """`write_bytes` of what some parts are together."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:  # after Ctrl-C as well; when all went well it has another name
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        CheckpointError: The file is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file whole and return its sha256."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    parts = parts_of(plain, {"format": "pt", **(metadata or {})})
    digest = Digest(parts)
    write_parts(path, parts)
    return digest.hex()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and its metadata.

    Raises:
        CheckpointError: The file is missing, truncated or no safetensors file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def check_writable(directory: Path) -> None:
    """Refuse a directory that is not there and cannot be made, or that takes no files, before hours are spent on it.

    Raises:
        CheckpointError: With what stands in the way.
    """
    try:
        there = next(place for place in (directory, *directory.parents) if os.path.lexists(place))
        if not there.is_dir():
            raise CheckpointError(f"cannot write {directory}: {there} is no directory")
        if not os.access(there, os.W_OK | os.X_OK):
            raise CheckpointError(f"cannot write {directory}: {there} may not be written")
        long = [part for part in directory.parts if len(os.fsencode(part)) > os.pathconf(there, "PC_NAME_MAX") - ROOM]
    except (OSError, ValueError) as error:  # a ValueError is a zero character
        raise CheckpointError(f"cannot write {str(directory)!r:.200}: {error}") from error
    if long:
        raise CheckpointError(f"cannot write {directory!s:.200}: {len(long[0])} characters are too long a name")


class RunLock:
    """Holds a run directory for one process; the second is refused by name."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / ".lock"
        self._file: Any = None

    def __enter__(self) -> Self:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a+")
        except OSError as error:
            raise CheckpointError(f"cannot write {self._path.parent}: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise CheckpointError(f"{self._path.parent} is in use by another sparsekit process") from error
        return self

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()


def remove_temporaries(directory: Path) -> None:
    """Delete what a killed process left half-written."""
    found = list(directory.rglob(".*.tmp")) if directory.is_dir() else []
    for path in found:
        if not TEMPORARY.fullmatch(path.name):
            continue  # somebody else's
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
