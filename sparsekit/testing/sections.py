"""What every report section promises, one function for each promise."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from sparsekit.errors import ContractError, PluginError
from sparsekit.files import write_text
from sparsekit.listener import Silent
from sparsekit.recipe import read_recipe
from sparsekit.reporting.sections import Section
from sparsekit.run import run_recipe

SectionCheck = Callable[[Section], None]

MARKUP = re.compile(r"</?[a-zA-Z][^>]*>|&#?\w+;")
BARE = """\
name: bare
model: {path: builtin:tiny, device: cpu}
steps: []
export: {formats: []}
"""
WHOLE = """\
name: whole
model: {path: builtin:tiny, device: cpu}
data:
  evaluation: {heldout: {path: builtin:heldout, seq_len: 32, samples: 2}}
steps:
  - {method: magnitude, pattern: "2:4"}
  - {method: rtn, bits: 4, group_size: 64}
evaluate: {perplexity: [heldout], agreement: [heldout], gates: {max_ppl_increase: 1000%}}
export: {formats: [gptq]}
"""


def rows(section: Section) -> None:
    """The report of a run gives rows with the same columns, of text and finite numbers."""
    section.of(_report(WHOLE))


def bare(section: Section) -> None:
    """The report of a run without steps, texts and exports gives rows too, or none."""
    try:
        section.of(_report(BARE))
    except PluginError as error:
        hint = "look before you read, as in report['final'].get('heldout'), and return [] when there is nothing"
        raise ContractError(f"for a run without steps, texts and exports: {error}; {hint}") from error


def purity(section: Section) -> None:
    """The report is not modified."""
    report = _report(WHOLE)
    section.of(report)
    for key, value in _report(WHOLE).items():
        if report.get(key) != value:
            raise ContractError(f"it changed the report: {key!r} differs after the call; build rows of your own")


def determinism(section: Section) -> None:
    """The same report gives the same rows."""
    first, second = (section.of(_report(WHOLE))["rows"] for _ in range(2))
    if first != second:
        raise ContractError("two calls give different rows; take times and random numbers from the report alone")


def plain(section: Section) -> None:
    """Its text has no markup, which the page would show as it is."""
    for row in section.of(_report(WHOLE))["rows"]:
        for text in (*row, *(cell for cell in row.values() if isinstance(cell, str))):
            if found := MARKUP.search(text):
                raise ContractError(f"its text has {found[0]!r}, which the page shows as these characters; drop it")


def kept(section: Section) -> None:
    """Its rows are the same when report.json is read back."""
    made = section.of(_report(WHOLE))["rows"]
    if json.loads(json.dumps(made)) != made:
        raise ContractError("its rows change when they are written to report.json and read back")


def documented(section: Section) -> None:
    """The first line of its docstring stands under the table."""
    if not (section.doc or "").strip():
        raise ContractError("it has no docstring; its first line stands under the table")


SECTION_CHECKS: tuple[SectionCheck, ...] = (rows, bare, purity, determinism, plain, kept, documented)


def _report(recipe: str) -> dict[str, Any]:
    """The report of a short run on the embedded model, a fresh copy at every call."""
    report: dict[str, Any] = json.loads(_written(recipe))
    return report


@cache
def _written(recipe: str) -> str:
    """report.json of a run, which is done once."""
    with tempfile.TemporaryDirectory(prefix="sparsekit-check-") as directory:
        path = Path(directory) / "recipe.yaml"
        write_text(path, recipe)
        output = path.parent / "run"
        run_recipe(read_recipe(path, [f"output={json.dumps(str(output))}"]), Silent())
        return (output / "report.json").read_text()
