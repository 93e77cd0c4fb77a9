"""What the docs take from the code: cog runs these functions inside the Markdown files.

make docs-write     cog writes the generated parts anew
make docs-check     fails when one of them is stale (a test does the same)
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click

from sparsekit.cli import main
from sparsekit.method import Method
from sparsekit.recipe import Recipe
from sparsekit.recipe.entries import Exports, Gates, Measurements, ModelEntry, Numerics, Pages, Redo, Tasks, TextEntry
from sparsekit.registry import BUILT_IN, METHODS
from sparsekit.terminal.console import type_name
from sparsekit.testing import SUITES
from sparsekit.testing.statistics import STATISTIC_CHECKS
from sparsekit.testing.suite import summary

ROOT = Path(__file__).parents[1]
PLUGINS = ROOT / "plugins"
SECTIONS = {
    "": Recipe,
    "model": ModelEntry,
    "data.calibration, data.train, data.evaluation.NAME": TextEntry,
    "numerics": Numerics,
    "evaluate": Measurements,
    "evaluate.gates": Gates,
    "evaluate.gates.redo": Redo,
    "evaluate.lm_eval": Tasks,
    "export": Exports,
    "report": Pages,
}


def cli_help() -> str:
    """Help of every command."""
    parts = [_help(main, "sparsekit")]
    parts += [_help(command, f"sparsekit {name}") for name, command in sorted(main.commands.items())]
    return "\n".join(parts)


def _help(command: click.Command, path: str) -> str:
    context = click.Context(command, info_name=path, max_content_width=84, terminal_width=84)
    return f"## {path}\n\n```text\n{command.get_help(context)}\n```\n"


def methods_table(folder: str = "") -> str:
    """The built-in methods, each with a link to its page in `folder`."""
    rows = ["| method | kind | needs | what it does |", "|---|---|---|---|"]
    for name in BUILT_IN:
        method = METHODS.get(name)
        cells = (f"[`{name}`]({folder}{name}.md)", method.kind, _needs(method), _escaped(method.summary))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def plugins_table() -> str:
    """The methods of the files in plugins/."""
    rows = ["| method | kind | what it does |", "|---|---|---|"]
    for path in sorted(PLUGINS.glob("*.py")):
        for method in plugin_methods(path):
            cells = (f"`{method.name}`<br>{path.name}", f"{method.kind}<br>{_needs(method)}", _escaped(method.summary))
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def plugin_methods(path: Path) -> list[Method]:
    """What a plugin file registers, in the order of the file."""
    METHODS.load_path(path)
    names = re.findall(r"^@sk\.\w+_method\(\"(\w+)\"", path.read_text(), re.M)
    return [METHODS.get(name) for name in names]


def _needs(method: Method) -> str:
    if method.scope == "model":
        return "training text"
    return "calibration text" if method.stats else "no data"


def method(name: str, plugin: str = "") -> str:
    """Parameters, source and deviations of a method."""
    if plugin:
        METHODS.load_path(PLUGINS / plugin)
    found = METHODS.get(name)
    fields = found.parameters.model_fields
    lines = []
    if fields:
        lines += ["| parameter | default | |", "|---|---|---|"]
    for key, info in fields.items():
        default = "required" if info.is_required() else f"`{info.default}`"
        name = f"`{key}`<br>{_escaped(type_name(info.annotation))}"
        cells = (name, default, _escaped(info.description or ""))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"**Source.** {_linked(found.source)}"]
    if deviations := _paragraph(found, "Deviations"):
        lines += ["", f"**Deviations.** {deviations[0].upper()}{deviations[1:]}"]
    return "\n".join(lines).strip() + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _paragraph(method: Method, title: str) -> str:
    """A paragraph of the docstring that begins with a title, on one line."""
    found = re.search(rf"^{title}:\s*(.+?)(?:\n\n|\n\w+:|\Z)", inspect.getdoc(method.function) or "", re.S | re.M)
    return _linked(" ".join(found[1].split())) if found else ""


def _linked(text: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def promises() -> str:
    """The contract suites, a table for each kind of thing."""
    told = {suite.noun: suite.promises for suite in SUITES} | {"statistic": STATISTIC_CHECKS}
    parts = []
    for noun, checks in told.items():
        rows = [f"| `{check.__name__}` | {_escaped(summary(check))} |" for check in checks]
        parts.append("\n".join([f"| {noun} | what it promises |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def recipe_keys() -> str:
    """Every key of a recipe, with its default."""
    parts = []
    for section, model in SECTIONS.items():
        parts += [f"## {section or 'top level'}", "", "| key | default | |", "|---|---|---|"]
        for key, info in model.model_fields.items():
            default = "required" if info.is_required() else ""
            plain = isinstance(info.default, (str, int, float, bool, list)) and not info.is_required()
            parts.append(f"| `{key}` | {f'`{info.default}`' if plain else default} | {info.description or ''} |")
        parts.append("")
    return "\n".join(parts)


def modules() -> str:
    """Every module with the first line of its docstring: those on top, then a table for each package."""
    root = ROOT / "sparsekit"
    top = [path for path in sorted(root.glob("*.py")) if path.stem not in ("__init__", "__main__")]
    tables = [_module_table(top)]
    for package in sorted(path.parent for path in root.glob("*/__init__.py")):
        inside = [path for path in sorted(package.glob("*.py")) if path.stem != "__init__"]
        inside += sorted(package.glob("*/__init__.py"))
        tables.append(f"### {package.name}\n\n{_first(package / '__init__.py')}\n\n" + _module_table(inside))
    return "\n".join(tables)


def _module_table(paths: list[Path]) -> str:
    names = [path.parent.name if path.stem == "__init__" else path.stem for path in paths]
    rows = [f"| `{name}` | {_escaped(_first(path))} |" for name, path in zip(names, paths, strict=True)]
    return "\n".join(["| module | |", "|---|---|", *rows]) + "\n"


def _first(path: Path) -> str:
    """First paragraph of a module's docstring."""
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(doc.partition("\n\n")[0].split())


def pages() -> Iterator[Path]:
    """Every Markdown file with generated parts."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(PLUGINS.glob("*.md"))]:
        if "[[[cog" in path.read_text():
            yield path
