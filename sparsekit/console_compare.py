"""What the terminal shows of a comparison: one plan, an arm a line with its steps, a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsekit.comparison_page import lead
from sparsekit.comparison_tables import cost_table, quality_table
from sparsekit.console import Terminal
from sparsekit.model import ModelView
from sparsekit.plan import Plan
from sparsekit.recipe import Recipe
from sparsekit.tables import Table as Figures


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
            self._out.print(shown(quality_table(comparison, text)))
        self._out.print(shown(cost_table(comparison)))
        for note in comparison["notes"]:
            self._out.print(f"  note      {note}", highlight=False)
        for name, path in files.items():
            self._out.print(f"  {name:<8} {path}", highlight=False, soft_wrap=True)


def shown(figures: Figures) -> Table:
    """A table of the reports, for the terminal."""
    table = Table(title=figures.caption, box=None, padding=(0, 2), title_justify="left")
    for column in figures.columns:
        table.add_column(column.title, justify="right" if column.number else "left")
    for row in figures.rows:
        table.add_row(*(cell.text for cell in row))
    return table
