"""The contract suite: what every method promises, for a plugin author's tests.

    from sparsekit.testing import check_method

    def test_contract():
        check_method("mine", plugin=Path("mine.py"))

`sparsekit check NAME` runs the same suite. Each promise is a function of a `Subject` that can be
called alone; it raises a `ContractError` whose message says what was seen and what to change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sparsekit.errors import ContractError, PluginError, SparsekitError, nearest
from sparsekit.formats import FORMATS
from sparsekit.pattern import Pattern
from sparsekit.registry import METHODS, Method
from sparsekit.testing.contract import (
    Subject,
    dead_inputs,
    determinism,
    devices,
    dtype,
    mask_kept,
    one_group,
    one_row,
    pattern,
    purity,
    resume,
    shapes,
    unstructured,
)
from sparsekit.testing.specimens import arguments_of, specimen
from sparsekit.testing.storages import STORAGE_CHECKS
from sparsekit.testing.wholes import allocation, training

Status = Literal["ok", "failed", "does not apply"]

__all__ = [
    "Outcome", "Subject", "check_format", "check_method", "format_outcomes", "outcomes", "specimen",
    "purity", "shapes", "dtype", "pattern", "unstructured", "mask_kept", "dead_inputs", "determinism", "one_row",
    "one_group", "resume", "devices", "training", "allocation",
]  # fmt: skip


Property = Callable[[Subject], None]
PROPERTIES: tuple[Property, ...] = (
    purity, shapes, dtype, pattern, unstructured, mask_kept, dead_inputs, determinism, one_row, one_group, resume,
    devices, training, allocation,
)  # fmt: skip


OF_A_SCOPE: Mapping[Property, str] = {training: "model", allocation: "layers"}


def applies(check: Property, method: Method) -> str:
    """Why a property does not apply to a method; empty when it does."""
    works = {"model": "it works on the whole model", "layers": "it prunes nothing itself"}
    if OF_A_SCOPE.get(check, "linear") != ("linear" if method.scope == "group" else method.scope):
        return works.get(method.scope, "it works on linears")
    if check is devices and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if check is dead_inputs and method.stats is None:
        return "it reads no calibration statistic"
    if check is unstructured and method.accepts(Pattern) is None:
        return "it takes no pattern"
    return ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One property of one method: `ok`, `failed` with the reason, or `does not apply` with the reason."""

    name: str
    status: Status
    message: str


def outcomes(name: str, *, arguments: Mapping[str, Any] | None = None, plugin: Path | None = None) -> list[Outcome]:
    """Try every property of a method.

    Args:
        name: A registered method, or one that `plugin` registers.
        arguments: Parameters as a recipe writes them; defaults for the others.
        plugin: Plugin file to load first.
    Raises:
        PluginError: No such method or plugin, or a parameter that is missing or not understood.
    """
    if plugin is not None:
        METHODS.load_path(plugin)
    method = METHODS.get(name)
    subject = Subject(method, arguments_of(method, arguments or {}))
    found = []
    for check in PROPERTIES:
        title, why = check.__name__, applies(check, method)
        if why:
            found.append(Outcome(title, "does not apply", why))
            continue
        try:
            check(subject)
            found.append(Outcome(title, "ok", (check.__doc__ or "").partition("\n")[0]))
        except SparsekitError as error:
            found.append(Outcome(title, "failed", str(error)))
    return found


def format_outcomes(name: str, *, plugin: Path | None = None) -> list[Outcome]:
    """Try every promise of an export format of integers.

    Args:
        name: Of `export.formats`.
        plugin: Plugin file to load first.
    Raises:
        PluginError: No such format, or one without integers.
    """
    if plugin is not None:
        METHODS.load_path(plugin)
    if name not in FORMATS:
        raise PluginError(f"no export format {name!r}; there are {', '.join(FORMATS)}.{nearest(name, FORMATS)}")
    storage, found = FORMATS[name].storage, []
    if storage is None:
        raise PluginError(f"format {name} stores every value as it is and has nothing to check")
    for check in STORAGE_CHECKS:
        try:
            check(storage)
            found.append(Outcome(check.__name__, "ok", (check.__doc__ or "").partition("\n")[0]))
        except SparsekitError as error:
            found.append(Outcome(check.__name__, "failed", str(error)))
    return found


def check_format(name: str, *, plugin: Path | None = None) -> None:
    """Run the promises of an export format.

    Raises:
        ContractError: One is broken; the message lists every one.
        PluginError: See `format_outcomes`.
    """
    _refuse("format", name, format_outcomes(name, plugin=plugin))


def check_method(name: str, *, arguments: Mapping[str, Any] | None = None, plugin: Path | None = None) -> None:
    """Run the whole suite.

    Raises:
        ContractError: A promise is broken; the message lists every one.
        PluginError: See `outcomes`.
    """
    _refuse("method", name, outcomes(name, arguments=arguments, plugin=plugin))


def _refuse(noun: str, name: str, found: list[Outcome]) -> None:
    failed = [each for each in found if each.status == "failed"]
    if failed:
        lines = "\n".join(f"  {each.name}: {each.message}" for each in failed)
        raise ContractError(f"{noun} {name!r} breaks {len(failed)} promises of the contract:\n{lines}")
