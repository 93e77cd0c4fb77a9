"""Sections a plugin adds to the report: a function of the report's data that returns rows of a table.

A recipe names them: `report: {sections: [slowest_steps]}`. The rows are stored in report.json, so the pages
can be written again without the plugin.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sparsekit.errors import PluginError
from sparsekit.pluginfile import named_failures
from sparsekit.shelf import Origin, Shelf
from sparsekit.signature import lower_case

Rows = Iterable[Mapping[str, str | int | float | None]]
F = TypeVar("F", bound=Callable[[Mapping[str, Any]], Rows])


@dataclass(frozen=True, slots=True)
class Section:
    """A registered section.

    Attributes:
        name: What a recipe writes.
        function: From the data of report.json to rows.
        origin: Where it is defined.
    """

    name: str
    function: Callable[[Mapping[str, Any]], Rows]
    origin: Origin

    @property
    def doc(self) -> str | None:
        """About it; the first line stands under the table."""
        return inspect.getdoc(self.function)

    def of(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """What is stored: `caption`, `about`, and `rows` with the same columns each.

        Raises:
            PluginError: It failed, or what it returned is no table.
        """
        with named_failures(f"report section {self.name}", self.function):
            found: object = self.function(report)
            found = list(found) if isinstance(found, Iterator) else found  # a generator runs here
        try:
            rows = _rows(found)
            rows = [{_column(key): _cell(key, value) for key, value in row.items()} for row in rows]
        except ValueError as error:
            raise PluginError(f"report section {self.name}: {error}") from error
        for row in rows:
            if not row or row.keys() != rows[0].keys():
                raise PluginError(f"report section {self.name}: columns {list(row)} and {list(rows[0])} in one table")
        about = (self.doc or "").partition("\n")[0]
        return {"caption": self.name.replace("_", " ").capitalize(), "about": about, "rows": rows}


def _rows(found: object) -> list[dict[Any, Any]]:
    """What a section returned, as a list of rows."""
    if isinstance(found, (str, Mapping)) or not isinstance(found, Iterable):
        raise ValueError(f"it returned {found!r}, expected a list of rows, as in [{{'step': 'ast', 'seconds': 1.5}}]")
    rows = list(found)
    for row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"it returned the row {row!r}, expected columns by name, as in {{'step': 'ast'}}")
    return [dict(row) for row in rows]


def _column(key: object) -> str:
    if not isinstance(key, str) or not key:
        raise ValueError(f"a column is called {key!r}, expected text")
    return key


def _cell(key: object, value: object) -> str | int | float | None:
    """A value as it is stored; a string that says it is markup is text like any other."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float, type(None))):
        raise ValueError(f"{key} is {value!r}, expected text or a number; str(...), int(...) or float(...) makes one")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} is {value}, expected a finite number; None stands for one that is missing")
    return "".join(value) if isinstance(value, str) else value


SECTIONS: Shelf[Section] = Shelf("report section")


def report_section(name: str) -> Callable[[F], F]:
    """Register `f(report) -> rows` as a section of the report.

    `report` is what report.json holds; a row is a mapping from column to text, number or None, and all rows have
    the same columns. Text is shown as it is, markup in it escaped.

    Args:
        name: What a recipe writes, and, with spaces, the caption.
    """
    lower_case("report section", name)

    def register(function: F) -> F:
        if len(inspect.signature(function).parameters) != 1:
            raise PluginError(f"report section {name!r} must take one argument, the report")
        SECTIONS.register(Section(name, function, Origin.of(function)))
        return function

    return register


def sections(report: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """The sections of a report, in a recipe's order."""
    return [SECTIONS[name].of(report) for name in names]
