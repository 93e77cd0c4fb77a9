"""The safetensors files of a model directory, and which of them holds a tensor."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sparsekit.errors import SparsekitError


def tensor_places(directory: Path, wrong: type[SparsekitError], stem: str = "") -> dict[str, Path]:
    """Tensor names and the files that hold them, from the headers; none if there are no files.

    Where there is an index, the files that it lists are read and no others; else the one file with the name
    of a whole model, or all of them. So do other readers.

    Args:
        directory: Of the files.
        wrong: The error to raise.
        stem: What their names begin with.
    Raises:
        SparsekitError: A file is damaged, one is missing that an index lists, or two hold the same tensor.
    """
    files = {path.name: path for path in sorted(directory.glob(f"{stem}*.safetensors"))}
    listed = _listed(directory, sorted(directory.glob(f"{stem}*.safetensors.index.json")), files, wrong)
    whole = f"{stem or 'model'}.safetensors"  # what others take for the whole model where there is no index
    places: dict[str, Path] = {}
    for name in sorted(listed) or ([whole] if whole in files else files):
        try:
            with safe_open(str(files[name]), framework="pt") as file:
                held = dict.fromkeys(file.keys(), files[name])
        except (OSError, SafetensorError) as error:
            raise wrong(f"{files[name]} is no whole safetensors file: {error}") from error
        if twice := sorted(held.keys() & places.keys()):
            told = f"{twice[0]} is in {name} and in {places[twice[0]].name}; which of them counts nobody can tell"
            raise wrong(f"{directory}: {told}. Take one of the two files away")
        places |= held
    if listed and whole in files and whole not in listed:
        told = f"holds {whole} and an index that lists other files; some readers take one, some the other"
        raise wrong(f"{directory} {told}. Take one of the two away")
    return places


def _listed(directory: Path, indexes: Iterable[Path], there: Container[str], wrong: type[SparsekitError]) -> set[str]:
    """The files that the indexes list, all of which must be in the directory."""
    found: set[str] = set()
    for index in indexes:
        try:
            content = json.loads(index.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise wrong(f"{index} is no JSON: {error}") from error
        listed = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise wrong(f"{index} has no weight_map from tensors to files")
        for name in sorted(name for name in set(listed.values()) if name not in there):
            if Path(name).name != name:
                raise wrong(f"{index} names {name}, which is outside the directory")
            raise wrong(f"{directory / name} is missing, {index.name} lists it")
        found |= set(listed.values())
    return found
