"""What the terminal shows of a run: a short plan, one bar for each step, one line of result, a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sparsekit.method import Method
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.planning.plan import Plan
from sparsekit.recipe import Recipe
from sparsekit.reporting.findings import named
from sparsekit.reporting.numerals import duration as duration
from sparsekit.reporting.numerals import in_words, megabytes, numbered
from sparsekit.reporting.speed import sentences
from sparsekit.reporting.tables import Table as Cells
from sparsekit.reporting.tasks import main_metrics, task_table
from sparsekit.shelf import Named, Shelf
from sparsekit.testing import Outcome

TOLD = {"codes": "codes", "positions": "positions", "scales": "scales", "zeros": "zero-points", "dense": "dense"}


class Terminal:
    """A `sparsekit.listener.Listener` that writes to a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def planned(self, recipe: Recipe, plan: Plan, view: ModelView) -> None:
        """Print the plan."""
        say = partial(self._console.print, highlight=False, soft_wrap=True)
        coverage = plan.coverage
        precision = str(view.dtype).removeprefix("torch.")
        computed = str(view.compute_dtype).removeprefix("torch.")
        memory = "" if recipe.model.memory == "auto" else f", memory {recipe.model.memory}"
        say(f"[bold]{recipe.name}[/bold]  seed {recipe.seed}  in {recipe.output_directory()}")
        say(
            f"  model     {recipe.model.path}: {coverage.total:,} parameters, {len(view.blocks)} blocks, "
            f"stored {precision}, computed {computed} on {view.device}{memory}",
        )
        say(
            f"  coverage  {coverage.compressed:,} compressed, {coverage.ignored:,} ignored by you, "
            f"{coverage.by_rule:,} dense by rule (embeddings, head, norms, biases), "
            f"{sum(coverage.unreachable.values()):,} out of reach",
        )
        for planned in plan.steps:
            step = planned.step
            chosen = {k: v for k, v in step.params.model_dump(mode="json").items() if k in step.given} | step.taught
            say(f"  step {planned.index + 1}    {step.method.name}  {in_words(chosen)}")
        for note in plan.notes:
            say(f"  note      {note}")
        formats = ", ".join(recipe.export.formats) or "nothing"
        say(f"  then      perplexity on {', '.join(recipe.evaluate.perplexity) or 'no text'}; export {formats}\n")

    def started(self, title: str) -> None:
        """Show a bar."""
        self._stop()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("  {task.description}"),
                TextColumn("{task.fields[remark]}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(title, total=None, remark="")

    def progress(self, done: int, total: int) -> None:
        """Move the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)

    def noted(self, text: str) -> None:
        """Show it beside the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, remark=text)

    def finished(self, summary: Mapping[str, Any], *, cached: bool) -> None:
        """Print one line of result."""
        self._stop()
        self._console.print(step_line(summary, cached=cached), highlight=False, soft_wrap=True)

    def closed(self, report: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        """Print the closing table and the paths."""
        self._stop()
        self._console.print()
        self._console.print(closing_table(report))
        if report["tasks"]:
            self._console.print(cells_table(task_table(report["tasks"], main_metrics(report["tasks"]["dense"]))))
        for line in sentences({report["name"]: report["deploy"]} if report.get("deploy") else {}):
            self._console.print(f"  {line}", highlight=False)
        for export in report["exports"]:
            for line in export_lines(export):
                self._console.print(f"  {line}", highlight=False, soft_wrap=True)
        width = max(map(len, files), default=0)
        for name, path in files.items():
            self._console.print(f"  {name:<{width}} {path}", highlight=False, soft_wrap=True)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None


def step_line(summary: Mapping[str, Any], *, cached: bool) -> str:
    """`✓ 1 ast  2:4  sparsity 0.500  0 of 589,824 groups broken  heldout 41.2 -> 43.0  38 s`."""
    parts = [f"[green]✓[/green] {summary['index'] + 1} {named(summary):<9}"]
    parts.append(f"sparsity {summary['sparsity']:.3f}")
    if summary["bits"]:
        parts.append(f"int{'/'.join(map(str, summary['bits']))}")
    if summary["groups"]:
        parts.append(f"{summary['pattern']}: {summary['violations']} of {summary['groups']:,} groups broken")
    for name, score in summary["perplexity"].items():
        parts.append(f"{name} {summary['before'][name]['perplexity']:.2f} -> {score['perplexity']:.2f}")
        if agreed := score.get("agreement"):
            parts.append(f"KL {agreed['kl']:.3g}, top-1 {agreed['top1']:.1%} as dense")
    parts.append("done before" if cached else duration(summary["seconds"]))
    if used := summary.get("numerics"):
        parts.append("numerics: " + ", ".join(f"{rung} {count}" for rung, count in used.items()))
    if summary["notes"]:
        parts.append(f"{numbered(summary['notes'], 'note')} in the report")
    return "  ".join(parts)


def export_lines(export: Mapping[str, Any]) -> Iterator[str]:
    """What an export takes, and who reads it and who does not, by name."""
    held = export["bytes"]
    parts = [f"{megabytes(held[key])} {label}" for key, label in TOLD.items() if held.get(key)]
    ratios = f"{export['ratio_fp32']:.2f} × smaller than FP32, {export['ratio_fp16']:.2f} × than FP16"
    yield f"{export['format']}: {megabytes(held['files'])} ({', '.join(parts)}), {ratios}"
    alone = export["linears"]
    told = f"{alone['ratio_fp32']:.2f} × smaller than FP32, {alone['ratio_fp16']:.2f} × than FP16"
    yield f"  linears of the blocks alone, indices, scales, masks and headers counted: {told}"
    for verdict in dict.fromkeys(note["verdict"] for note in export["engines"]):
        engines = [note["engine"] for note in export["engines"] if note["verdict"] == verdict]
        yield f"  {verdict + ':':<12} {'; '.join(engines)}"


def closing_table(report: Mapping[str, Any]) -> Table:
    """Perplexity of the dense and the compressed model, and what was written."""
    table = Table(box=None, padding=(0, 2), title=None)
    table.add_column("")
    for name in report["dense"]:
        table.add_column(f"perplexity {name}", justify="right")
    table.add_column("sparsity", justify="right")
    table.add_column("bits", justify="right")
    table.add_column("broken groups", justify="right")
    dense = [f"{score['perplexity']:.3f}" for score in report["dense"].values()]
    table.add_row("dense", *dense, "0.000", "", "")
    for summary in report["steps"]:
        scores = [f"{score['perplexity']:.3f}" for score in summary["perplexity"].values()]
        bits = "/".join(map(str, summary["bits"]))
        broken = str(summary["violations"]) if summary["groups"] else ""
        table.add_row(named(summary), *scores, f"{summary['sparsity']:.3f}", bits, broken)
    return table


def cells_table(found: Cells) -> Table:
    """A table of the page, as it is."""
    table = Table(title=found.caption, box=None, padding=(0, 1), title_justify="left")
    for column in found.columns:
        side: Literal["left", "right"] = "right" if column.number else "left"
        table.add_column(column.title, justify=side, no_wrap=column.number, overflow="fold")
    for row in found.rows:
        table.add_row(*(cell.text for cell in row))
    return table


def methods_table(methods: Iterable[Method]) -> Table:
    """Every method in a line."""
    table = Table(box=None, padding=(0, 2))
    for title in ("method", "kind", "needs", "what it does"):
        table.add_column(title)
    for method in methods:
        needs = "training text" if method.scope == "model" else ""
        table.add_row(method.name, method.kind, needs or ("calibration text" if method.stats else ""), method.summary)
    return table


def shelves_table(shelves: Iterable[Shelf[Any]]) -> Table:
    """Export formats and whatever else plugins may bring, in a line each."""
    table = Table(box=None, padding=(0, 2))
    for title in ("name", "kind", "what it is"):
        table.add_column(title)
    for shelf in shelves:
        for thing in shelf.values():
            table.add_row(thing.name, shelf.noun, (thing.doc or "").partition("\n")[0])
    return table


def shelf_page(noun: str, thing: Named) -> Group:
    """One of them: what its author says, and where it comes from."""
    head = Text.assemble((thing.name, "bold"), f"  {noun}\n")
    return Group(head, Text(_flowing((thing.doc or "").strip())), Text(f"\nLoaded from {thing.origin.place}"))


def method_page(method: Method) -> Group:
    """One method: what it does, its parameters with types and defaults, where it comes from."""
    table = Table(box=None, padding=(0, 2))
    for title in ("parameter", "type", "default", ""):
        table.add_column(title)
    for name, info in method.parameters.model_fields.items():
        default = "required" if info.is_required() else str(info.default)
        table.add_row(name, type_name(info.annotation), default, info.description or "")
    works = {"linear": "one linear at a time", "group": "one group of linears at a time", "model": "the whole model"}
    scope = works.get(method.scope, "all layers of a step")
    head = Text.assemble((method.name, "bold"), f"  {method.kind}, works on {scope}\n")
    return Group(head, Text(_flowing(method.text) + "\n"), table, Text(f"\nLoaded from {method.origin}"))


def _flowing(doc: str) -> str:
    """A docstring whose paragraphs break where the terminal ends; lists and what is indented stay as they are."""
    paragraphs = re.split(r"\n\n+|\n(?=[A-Z]\w+: )", doc)  # "Source: " may follow a line at once
    return "\n\n".join(text if re.search(r"^[\s\-*]", text, re.M) else " ".join(text.split()) for text in paragraphs)


def outcomes_table(title: str, outcomes: Iterable[Outcome]) -> Table:
    """What a suite found, a promise in a line."""
    marks = {"ok": "[green]ok[/green]", "failed": "[red]failed[/red]"}
    table = Table(box=None, padding=(0, 2), show_header=False, title=title, title_justify="left", title_style="bold")
    apart: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.status == "does not apply":
            apart.setdefault(outcome.message, []).append(outcome.name)
        else:
            table.add_row(outcome.name, marks[outcome.status], Text(outcome.message))
    for reason, names in apart.items():
        table.add_row("", "-", Text(f"not tried, since {reason}: {', '.join(names)}"))
    return table


def type_name(annotation: Any) -> str:
    """`int`, `natural | descending`, `N:M`, `int | None`."""
    origin = get_origin(annotation)
    if origin is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if origin is Annotated:
        return type_name(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return " | ".join(map(type_name, get_args(annotation)))
    if annotation is Pattern:
        return "N:M"
    if annotation is NoneType:
        return "None"
    return str(annotation.__name__) if isinstance(annotation, type) else str(annotation)
