"""Digests: what a step's result depends on, and what a model's files hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sparsekit import __version__
from sparsekit.errors import ModelError, RecipeError
from sparsekit.kept import sha256_file
from sparsekit.method import Method
from sparsekit.models.locate import locate
from sparsekit.pluginfile import foreign_sources
from sparsekit.recipe import Recipe, Step

NOT_READ = "not read"  # in place of the digest of a model whose files are not read
FULL_DIGEST_BYTES = 8 * 2**30  # weight files beyond this are told apart by header, size and date


def step_fingerprint(upstream: str, step: Step, selected: Sequence[str], seed: int) -> str:
    """Digest of everything a step's result depends on."""
    return digest_of(
        [
            upstream,
            step.method.name,
            code_digest(step.method),
            step.params.model_dump(mode="json"),
            step.allocate and [step.allocate.as_dict(), code_digest(step.allocate.method)],
            sorted(selected),
            step.schedule,
            seed,
            __version__,
            package_digest(),
            torch.__version__,
        ]
    )


def code_digest(method: Method) -> list[str]:
    """Of the file of a method, and of whatever else of a plugin its result depends on: its statistic, its package."""
    return [method.digest, *map(sha256_file, foreign_sources(method.function, method.stats))]


def digest_of(value: Any) -> str:
    """Of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=1)
def package_digest() -> str:
    """Digest of sparsekit's own source: another version of the code is another result."""
    root = Path(__file__).parents[1]
    sources = sorted([*root.rglob("*.py"), *root.rglob("*.cu")])
    return digest_of([(str(path.relative_to(root)), sha256_file(path)) for path in sources])


def model_digest(directory: Path) -> str:
    """Digest of a model directory's configuration and weights."""
    entries: list[Any] = []
    for path in sorted(directory.glob("*")):
        if path.suffix not in {".json", ".safetensors"}:
            continue
        stat = path.stat()
        if stat.st_size <= FULL_DIGEST_BYTES:
            entries.append([path.name, _file_digest(path, stat.st_size, stat.st_mtime_ns)])
        else:
            with open(path, "rb") as file:
                header = hashlib.sha256(file.read(2**20)).hexdigest()
            entries.append([path.name, header, stat.st_size, stat.st_mtime_ns])
    return digest_of(entries)


@lru_cache(maxsize=1024)
def _file_digest(path: Path, size: int, modified: int) -> str:
    """Digest of a file that is asked for often: the arms of a comparison share their model."""
    return sha256_file(path)


def teacher_digests(recipe: Recipe, index: int, step: Step, known: str | None) -> list[str]:
    """Digest of the model a step learns from, when it is not the dense original; where nothing is read, its place."""
    if step.teacher is None:
        return []
    try:
        place = locate(recipe.resolve(step.teacher), allow_network=recipe.allow_network)
    except ModelError as error:
        raise RecipeError(f"teacher: {error}", where=recipe.where("steps", index, "teacher")) from error
    return [str(place) if known == NOT_READ else model_digest(place)]
