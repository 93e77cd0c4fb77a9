"""The safetensors files of a model directory, and which of them holds a tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sparsekit.errors import SparsekitError


def tensor_places(directory: Path, wrong: type[SparsekitError], stem: str = "") -> dict[str, Path]:
    """Tensor names and the files that hold them, from the headers; none if there are no files.

    Args:
        directory: Of the files.
        wrong: The error to raise.
        stem: What their names begin with.
    Raises:
        SparsekitError: A file is damaged, or one is missing that an index lists.
    """
    files = sorted(directory.glob(f"{stem}*.safetensors"))
    _check_listed(directory, sorted(directory.glob(f"{stem}*.safetensors.index.json")), files, wrong)
    places: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(str(path), framework="pt") as file:
                places.update(dict.fromkeys(file.keys(), path))
        except (OSError, SafetensorError) as error:
            raise wrong(f"{path} is no whole safetensors file: {error}") from error
    return places


def _check_listed(directory: Path, indexes: Iterable[Path], files: Iterable[Path], wrong: type[SparsekitError]) -> None:
    """Every file that an index lists must be in the directory."""
    there = {path.name for path in files}
    for index in indexes:
        try:
            content = json.loads(index.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise wrong(f"{index} is no JSON: {error}") from error
        listed = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise wrong(f"{index} has no weight_map from tensors to files")
        for name in sorted(set(listed.values()) - there):
            if Path(name).name != name:
                raise wrong(f"{index} names {name}, which is outside the directory")
            raise wrong(f"{directory / name} is missing, {index.name} lists it")
