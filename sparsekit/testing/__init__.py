"""The contract suite: what everything a plugin may bring promises, for a plugin author's tests.

    from sparsekit.testing import check_method

    def test_contract():
        check_method("mine", plugin=Path("mine.py"))

`sparsekit check NAME` runs the same suites. Each promise is a function that can be called alone; it
raises a `ContractError` whose message says what was seen and what to change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sparsekit.errors import PluginError, nearest
from sparsekit.evaluation.measures import EVALUATORS, Measure
from sparsekit.formats import FORMATS
from sparsekit.formats.base import Format
from sparsekit.method import Method
from sparsekit.pattern import Pattern
from sparsekit.registry import METHODS
from sparsekit.reporting.sections import SECTIONS, Section
from sparsekit.shelf import Named, Shelf
from sparsekit.testing import evaluators, storages
from sparsekit.testing.contract import (
    Subject,
    dead_inputs,
    determinism,
    devices,
    documented,
    dtype,
    mask_kept,
    one_group,
    one_row,
    pattern,
    purity,
    resume,
    runs,
    shapes,
    statistic,
    unstructured,
)
from sparsekit.testing.sections import SECTION_CHECKS
from sparsekit.testing.specimens import arguments_of, parameters_of, specimen
from sparsekit.testing.statistics import check_statistic
from sparsekit.testing.suite import Outcome, Suite, without_cuda
from sparsekit.testing.wholes import allocation, training

__all__ = [
    "Outcome", "Subject", "SUITES", "check_evaluator", "check_format", "check_method", "check_section",
    "check_statistic", "outcomes", "specimen",
    "runs", "purity", "shapes", "dtype", "pattern", "unstructured", "mask_kept", "dead_inputs", "determinism",
    "one_row", "one_group", "resume", "devices", "statistic", "training", "allocation", "documented",
]  # fmt: skip

Property = Callable[[Subject], None]
T = TypeVar("T", bound=Named)

PROPERTIES: tuple[Property, ...] = (
    runs, purity, shapes, dtype, pattern, unstructured, mask_kept, dead_inputs, determinism, one_row, one_group, resume,
    devices, statistic, training, allocation, documented,
)  # fmt: skip
OF_A_SCOPE: Mapping[Property, str] = {training: "model", allocation: "layers"}
OF_ANY_SCOPE = (statistic, documented)


def applies(check: Property, method: Method) -> str:
    """Why a property does not apply to a method; empty when it does."""
    works = {"model": "it works on the whole model", "layers": "it prunes nothing itself"}
    scope = "linear" if method.scope == "group" else method.scope
    if check not in OF_ANY_SCOPE and OF_A_SCOPE.get(check, "linear") != scope:
        return works.get(method.scope, "it works on linears")
    if check is devices:
        return without_cuda()
    if check in (dead_inputs, statistic) and method.stats is None:
        return "it reads no calibration statistic"
    if check is unstructured and method.accepts(Pattern) is None:
        return "it takes no pattern"
    return ""


def _method(name: str, arguments: Mapping[str, Any]) -> Subject:
    method = METHODS.get(name)
    return Subject(method, arguments_of(method, arguments))


def _format(name: str, arguments: Mapping[str, Any]) -> Format:
    form = _taken(FORMATS, name)
    storages.storage_of(form)
    return form


def _measure(name: str, arguments: Mapping[str, Any]) -> Measure:
    known = _taken(EVALUATORS, name)
    return Measure(known, "specimen", parameters_of(EVALUATORS.noun, name, known.parameters, arguments))


def _section(name: str, arguments: Mapping[str, Any]) -> Section:
    return _taken(SECTIONS, name)


def _taken(shelf: Shelf[T], name: str) -> T:
    """A thing of a shelf, or what else there is."""
    if name not in shelf:
        raise PluginError(f"no {shelf.noun} {name!r}; there are {', '.join(shelf) or 'none'}.{nearest(name, shelf)}")
    return shelf[name]


def _on_cuda(check: Callable[..., None], subject: object) -> str:
    """Why a promise of a format or an evaluator does not apply."""
    return without_cuda() if check in (storages.devices, evaluators.devices) else ""


METHOD_SUITE: Suite[Subject] = Suite(
    "method", METHODS.names, _method, PROPERTIES, lambda check, subject: applies(check, subject.method), parameters=True
)
FORMAT_SUITE: Suite[Format] = Suite(FORMATS.noun, FORMATS.keys, _format, storages.FORMAT_CHECKS, _on_cuda)
EVALUATOR_SUITE: Suite[Measure] = Suite(
    EVALUATORS.noun, EVALUATORS.keys, _measure, evaluators.EVALUATOR_CHECKS, _on_cuda, parameters=True
)
SECTION_SUITE: Suite[Section] = Suite(SECTIONS.noun, SECTIONS.keys, _section, SECTION_CHECKS, _on_cuda)
SUITES: tuple[Suite[Any], ...] = (METHOD_SUITE, FORMAT_SUITE, EVALUATOR_SUITE, SECTION_SUITE)


def outcomes(
    name: str, *, arguments: Mapping[str, Any] | None = None, plugin: Path | None = None
) -> dict[str, list[Outcome]]:
    """Try every promise of everything that has a name.

    Args:
        name: Of a method, an export format, an evaluator or a report section.
        arguments: Parameters as a recipe writes them; defaults for the others.
        plugin: Plugin file to load first.
    Returns:
        What was found, by what it is: "method", "export format", ...
    Raises:
        PluginError: Nothing has the name, or a parameter is missing or not understood.
    """
    _load(plugin)
    known = {suite.noun: list(suite.names()) for suite in SUITES}
    found = [suite for suite in SUITES if name in known[suite.noun]]
    if not found:
        every = list(dict.fromkeys(each for names in known.values() for each in names))
        listed = ", ".join(suite.noun for suite in SUITES)
        raise PluginError(
            f"nothing is called {name!r}, neither {listed}; --plugin FILE loads a plugin.{nearest(name, every)}"
        )
    if arguments and not any(suite.parameters for suite in found):
        raise PluginError(f"{found[0].noun} {name!r} takes no parameters, and {', '.join(arguments)} was given")
    return {suite.noun: suite.outcomes(name, (arguments or {}) if suite.parameters else {}) for suite in found}


def check_method(name: str, *, arguments: Mapping[str, Any] | None = None, plugin: Path | None = None) -> None:
    """Try every promise of a method.

    Args:
        name: A registered method, or one that `plugin` registers.
        arguments: Parameters as a recipe writes them; defaults for the others.
        plugin: Plugin file to load first.
    Raises:
        ContractError: A promise is broken; the message lists every one.
        PluginError: No such method or plugin, or a parameter that is missing or not understood.
    """
    _load(plugin)
    METHOD_SUITE.check(name, arguments)


def check_format(name: str, *, plugin: Path | None = None) -> None:
    """Try every promise of an export format of integers.

    Raises:
        ContractError: A promise is broken; the message lists every one.
        PluginError: No such format or plugin, or a format without integers.
    """
    _load(plugin)
    FORMAT_SUITE.check(name)


def check_evaluator(name: str, *, arguments: Mapping[str, Any] | None = None, plugin: Path | None = None) -> None:
    """Try every promise of an evaluator; arguments and errors as in `check_method`."""
    _load(plugin)
    EVALUATOR_SUITE.check(name, arguments)


def check_section(name: str, *, plugin: Path | None = None) -> None:
    """Try every promise of a report section, on the reports of two short runs; errors as in `check_format`."""
    _load(plugin)
    SECTION_SUITE.check(name)


def _load(plugin: Path | None) -> None:
    if plugin is not None:
        METHODS.load_path(plugin)
