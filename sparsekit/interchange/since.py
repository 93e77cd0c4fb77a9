"""What of an export was changed after it was written, by what its `sparsekit.json` says of its files.

Weights and masks of a quantized export that are other files than were written are not read, and neither
are its integers with another `quantization_config`: they would be other weights. Everything else somebody
may have changed on purpose, and is told of wherever the model is opened: it is no longer the model that
was measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsekit.errors import CheckpointError
from sparsekit.files import read_json
from sparsekit.interchange.hfdir import MARKER, file_digests, read_config
from sparsekit.kept import sha256_file

GRID = "quantization_config"
NOT_MODEL = ("transformers_version", "_name_or_path")  # keys of config.json that say nothing about the model
SHOWN = 3


def recorded(target: Path, weights: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What `sparsekit.json` says of an export's other files: config.json as it is, digests of the rest.

    Args:
        target: The export, complete but for `sparsekit.json`.
        weights: The files of weights, by name; their digests are kept by themselves.
        known: Digests of other files, by name.
    """
    rest = sorted(path for path in target.rglob("*") if path.is_file())
    others = [path for path in rest if str(path.relative_to(target)) not in {*weights, *known, "config.json", MARKER}]
    return {"config": read_config(target), "companions": {**file_digests(target, others), **known}}


def marker_of(directory: Path) -> dict[str, Any]:
    """What `sparsekit.json` says; {} where there is none.

    Raises:
        CheckpointError: It cannot be read, lists no weight files, or names a place outside the directory.
    """
    path = directory / MARKER
    if not path.is_file():
        return {}
    marker = read_json(path)
    files = marker.get("files") if isinstance(marker, dict) else None
    if not isinstance(marker, dict) or not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path} lists no weight files")
    companions = marker.get("companions", {})  # older exports have none
    if not isinstance(companions, dict) or not isinstance(marker.get("config", {}), dict):
        raise CheckpointError(f"{path} does not say what the other files were")
    for name, known in [*files.items(), *companions.items()]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{path} names {name}, which is outside the directory")
        if not isinstance(known, dict) or not (type(known.get("bytes")) is int and type(known.get("sha256")) is str):
            raise CheckpointError(f"{path} has no digest of {name}")
    return marker


def check_tensors(directory: Path, marker: Mapping[str, Any]) -> None:
    """Refuse weights, masks and low-rank branches that are other files than were written.

    Raises:
        CheckpointError: A file is missing, cut short or changed.
    """
    tensors = {name: known for name, known in marker.get("companions", {}).items() if name.endswith(".safetensors")}
    for name, known in [*marker.get("files", {}).items(), *tensors.items()]:
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, {MARKER} lists it")
        size = path.stat().st_size
        if size != known["bytes"]:
            raise CheckpointError(f"{path} has {size:,} bytes, {known['bytes']:,} were written")
        if _changed(path, known, closely=True):
            raise CheckpointError(f"{path} was changed after it was written: its sha256 is not the one in {MARKER}")


def check_grid(directory: Path, marker: Mapping[str, Any]) -> None:
    """Refuse a config.json that says otherwise how integers are stored.

    Raises:
        CheckpointError: With what it says and what it said.
    """
    if "config" in marker:
        before, now = marker["config"].get(GRID), read_config(directory).get(GRID)
        if differs := list(_differences({GRID: before}, {GRID: now})):
            told = f"{directory / 'config.json'} was changed after the export: {_listed(differs)}"
            raise CheckpointError(f"{told}. The integers would be other weights; put it back, or export again")


def changes(directory: Path, *, weights: bool = False) -> list[str]:
    """What was changed in an export, a sentence for each file; nothing for the directories of others.

    Args:
        directory: Of a model.
        weights: Compare the values of plain weights, too, which takes as long as to read them. Those of a
            quantized export are compared whenever it is opened.
    Raises:
        CheckpointError: Its config.json says otherwise how integers are stored.
    """
    marker = marker_of(directory)
    check_grid(directory, marker)
    found = []
    if "config" in marker:
        skipped = dict.fromkeys(NOT_MODEL)
        if differs := list(_differences(marker["config"] | skipped, read_config(directory) | skipped)):
            found.append(f"config.json was changed since the export: {_listed(differs)}")
    plain = {} if GRID in marker.get("config", {GRID: None}) else marker["files"]
    for name, known in [*plain.items(), *marker.get("companions", {}).items()]:
        path = directory / name
        if not path.is_file():
            found.append(f"{name} of the export is missing")
        elif _changed(path, known, closely=weights or name not in plain):
            found.append(f"{name} was changed since the export")
    return [f"{one}; this is not the model that was measured" for one in found]


def _changed(path: Path, known: Mapping[str, Any], *, closely: bool) -> bool:
    return path.stat().st_size != known["bytes"] or (closely and sha256_file(path) != known["sha256"])


def _differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """Where two pieces of JSON differ, as `a.b is 1, was 2`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else str(name))
    elif json.dumps(before, sort_keys=True) != json.dumps(now, sort_keys=True):  # NaN is equal to itself here
        yield f"{key} is {_shown(now)}, was {_shown(before)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def _listed(differences: list[str]) -> str:
    more = len(differences) - SHOWN
    return "; ".join(differences[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
