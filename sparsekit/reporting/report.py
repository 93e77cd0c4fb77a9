"""The report of a run: one page to read, one file of data, one page of Markdown.

The page needs nothing beside itself: no network, no script, no font. It says first what was
achieved and on which basis, and says plainly what was not gained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError
from markupsafe import Markup, escape

from sparsekit.errors import CheckpointError, in_one_line
from sparsekit.files import read_json, write_json, write_text
from sparsekit.reporting.charts import curve_charts, error_map
from sparsekit.reporting.findings import headline, memory_notes, named, no_gains, numerics_notes, protocols
from sparsekit.reporting.numerals import JOINED
from sparsekit.reporting.speed import sentences, speed_table
from sparsekit.reporting.tables import (
    Cell,
    Table,
    bytes_table,
    coverage_table,
    engine_table,
    gate_table,
    layer_table,
    measures_table,
    pair_table,
    perplexity_table,
    section_table,
    step_table,
)
from sparsekit.reporting.tasks import TESTS, task_table

Record = Mapping[str, Any]


def write_report(report: Record, directory: Path) -> dict[str, Path]:
    """Write report.json, report.html and report.md.

    Args:
        report: As `sparsekit.run` builds it. A training step may lack its `curve`.
        directory: Of the run.
    Returns:
        What was written, by kind. In the JSON, numbers that are not finite are null: JSON has none.
    """
    files = {"report": "report.html", "json": "report.json", "markdown": "report.md"}
    paths = {kind: directory / name for kind, name in files.items()}
    pages = {"markdown": markdown(report), "report": html(report)}  # before anything is written
    write_json(paths["json"], finite(report))
    for kind, page in pages.items():
        write_text(paths[kind], page)
    return paths


def kept_report(directory: Path) -> dict[str, Any]:
    """The data of a finished run's report.

    Raises:
        CheckpointError: There is none, or pages cannot be made of it: somebody changed it, or another version wrote it.
    """
    path = directory / "report.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no report.json: no finished run")
    report = read_json(path)
    try:
        markdown(report)
    except (LookupError, TypeError, AttributeError, ValueError, TemplateError) as error:
        told = f"{type(error).__name__}: {in_one_line(error)}"
        raise CheckpointError(f"{path} is no report of this version ({told}); run the recipe again") from error
    found: dict[str, Any] = report
    return found


def finite(value: Any) -> Any:
    """The same data with null for infinities and NaN."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@cache
def environment() -> Environment:
    """Jinja with everything escaped; a name that is missing is an error, not an empty string. Read once."""
    made = Environment(
        loader=PackageLoader("sparsekit.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"whole": whole, "code": code}
    return made


def code(text: str) -> Markup:
    """A sentence whose `words in backticks` are code; all of it escaped."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def whole(text: str) -> str:
    """A number with its unit in one piece; a line may end only after an arrow or a semicolon."""
    return text.replace(" ", JOINED).replace(f"→{JOINED}", "→ ").replace(f";{JOINED}", "; ")


def html(report: Record) -> str:
    """The page."""
    return environment().get_template("report.html.j2").render(view(report))


def view(report: Record) -> dict[str, Any]:
    """Everything the page shows, worked out."""
    exports, gates = report["exports"], report["gates"]
    cards = {report["name"]: report["deploy"]} if report.get("deploy") else {}
    return {
        "name": report["name"],
        "model": report["model"],
        "headline": headline(report),
        "gates": gates,
        "failed": [gate for gate in gates if not gate["passed"]],
        "steps_table": step_table(report),
        "memory_notes": [*memory_notes(report["steps"]), *numerics_notes(report["steps"])],
        "perplexity_table": perplexity_table(report) if report["dense"] else None,
        "agreement": any((final or {}).get("agreement") for final in report["final"].values()),
        "protocols": protocols(report),
        "no_gains": [*no_gains(report), *sentences(cards)],
        "bytes_table": bytes_table(exports) if exports else None,
        "speed_table": speed_table(cards),
        "exports": [{"engines": engine_table(export), **_export(export)} for export in exports],
        "coverage_table": coverage_table(report["coverage"]),
        "coverage_share": report["coverage"]["share"],
        "notes": report["notes"],
        "steps": [_step(step) for step in report["steps"]],
        "gate_table": gate_table(gates) if gates else None,
        "tests": TESTS,
        "task_table": task_table(report["tasks"]) if report["tasks"] else None,
        "measures_table": measures_table(report["measures"]) if report.get("measures") else None,
        "sections": [
            {"about": section["about"], "table": section_table(section)} for section in report.get("sections", [])
        ],
        "environment_table": pair_table("Environment", _environment(report)),
        "recipe": report["recipe"],
    }


def _export(export: Record) -> dict[str, Any]:
    return {"format": export["format"], "directory": str(export["directory"]), "notes": export["notes"]}


def _environment(report: Record) -> dict[str, Any]:
    model = report["model"]
    return {**report["environment"], "model": model["path"], "model digest": model["digest"]}


def _step(step: Record) -> dict[str, Any]:
    """The section of one step."""
    taught = {"teacher": step["teacher"]} if "teacher" in step else {}
    return {
        "title": f"Step {step['index'] + 1}: {named(step)}",
        "kind": step["kind"],
        "source": step.get("source"),
        "error_of": step.get("error_of", "weights"),
        "settings": pair_table("Settings", {**step["params"], **taught}),
        "training": pair_table("What training measured", step["training"]) if step.get("training") else None,
        "curves": list(curve_charts(step.get("curve") or ())),
        "map": error_map(step),
        "layers": layer_table(step) if step["layers"] else None,
        "notes": step["notes"],
    }


def markdown(report: Record) -> str:
    """The compact page: headline and tables, no drawings."""
    seen = view(report)
    remarks = [*seen["memory_notes"], *seen["protocols"], *seen["no_gains"]]
    tables: list[Table | None] = [
        seen["gate_table"],
        seen["steps_table"],
        seen["perplexity_table"],
        seen["bytes_table"],
        seen["speed_table"],
        *(export["engines"] for export in seen["exports"]),
        seen["coverage_table"],
        seen["task_table"],
        seen["measures_table"],
        *(section["table"] for section in seen["sections"]),
        seen["environment_table"],
    ]
    notes = [*seen["notes"], *chain.from_iterable(export["notes"] for export in seen["exports"])]
    notes += chain.from_iterable(step["notes"] for step in report["steps"])
    parts = [f"# {plain(report['name'])}", plain(seen["headline"])]
    parts += [markdown_table(table) for table in tables if table is not None]
    parts += [markdown_list("Remarks", remarks), markdown_list("Notes", notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(table: Table) -> str:
    """A table under its caption."""
    heads = [plain(column.title) for column in table.columns]
    rules = ["---:" if column.number else "---" for column in table.columns]
    rows = [_markdown_row(row, len(heads)) for row in table.rows]
    lines = ["| " + " | ".join(row) + " |" for row in [heads, rules, *rows]]
    return "\n".join([f"## {plain(table.caption)}", "", *lines])


def _markdown_row(row: Sequence[Cell], columns: int) -> list[str]:
    """A row, or one cell that heads the rows below it."""
    cells = [plain(cell.text) for cell in row]
    return cells if len(cells) == columns else [f"**{cells[0]}**", *[""] * (columns - 1)]


def markdown_list(title: str, lines: Sequence[str]) -> str:
    """A list under a title; nothing when it is empty."""
    return "\n".join([f"## {title}", "", *(f"- {plain(line)}" for line in lines)]) if lines else ""


def plain(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, one line."""
    escaped = " ".join(text.split()).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for mark in "|*_`[]":
        escaped = escaped.replace(mark, f"\\{mark}")
    return escaped
