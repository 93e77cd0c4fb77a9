"""What the terminal shows of a comparison: one plan, an arm a line with its steps, a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsekit.models.view import ModelView
from sparsekit.planning.plan import Plan
from sparsekit.recipe import Recipe
from sparsekit.reporting.comparison import missed
from sparsekit.reporting.comparison_page import lead
from sparsekit.reporting.comparison_tables import cost_table, measures_table, quality_table
from sparsekit.reporting.tasks import tasks_table
from sparsekit.terminal.console import Terminal, cells_table


class ComparisonTerminal(Terminal):
    """A `sparsekit.compare.ArmListener` that writes to a terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._out = console

    def planned(self, recipe: Recipe, plan: Plan, view: ModelView) -> None:
        """Print what all arms have in common; the steps come with each arm."""
        computed = str(view.compute_dtype).removeprefix("torch.")
        size = f"{plan.coverage.total:,} parameters, {len(view.blocks)} blocks"
        self._out.print(f"model  {recipe.model.path}: {size}, computed {computed} on {view.device}", highlight=False)
        for note in plan.notes:
            self._out.print(f"note   {note}", highlight=False)

    def arm(self, name: str, index: int, count: int) -> None:
        """Print the arm's name."""
        self._stop()
        self._out.print(f"[bold]{name}[/bold]  arm {index + 1} of {count}", highlight=False)

    def closed(self, report: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        """One arm is done; its numbers come with the others'."""
        self._stop()

    def compared(self, comparison: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        """Print the tables and the paths."""
        self._stop()
        self._out.print()
        self._out.print(lead(comparison), highlight=False)
        for text in comparison["dense"]["perplexity"]:
            self._out.print(quality(comparison, text))
        for found in (tasks_table(comparison), measures_table(comparison)):
            if found is not None:
                self._out.print(cells_table(found))
        self._out.print(cost(comparison))
        for gate in missed(comparison["arms"]):
            self._out.print(f"  [red]missed[/red]    {gate}", highlight=False)
        for note in comparison["notes"]:
            self._out.print(f"  note      {note}", highlight=False)
        for name, path in files.items():
            self._out.print(f"  {name:<8} {path}", highlight=False, soft_wrap=True)


def quality(comparison: Mapping[str, Any], text: str) -> Table:
    """Perplexity on one text, its change and agreement; the page has the other intervals."""
    table = _table(text, "arm", "perplexity", "against dense [95 %]", "KL", "top-1")
    for row in quality_table(comparison, text).rows:
        name, level, change, _, kl, top1 = (cell.text for cell in row)
        table.add_row(name, level.partition(" ±")[0], change, kl, top1)
    return table


def cost(comparison: Mapping[str, Any]) -> Table:
    """Bytes, time and memory."""
    table = _table("Size and cost", "arm", "bytes", "smaller", "broken groups", "time", "peak")
    for row in cost_table(comparison).rows:
        name, _, held, ratio, _, _, broken, seconds, peak = (cell.text for cell in row)
        table.add_row(name, held, ratio, broken, seconds, peak)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=None, padding=(0, 1), title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=index > 0, overflow="fold")
    return table
