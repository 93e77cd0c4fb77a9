"""Who is told what a run is doing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from sparsekit.models.view import ModelView
from sparsekit.planning.plan import Plan
from sparsekit.recipe import Recipe


class Listener(Protocol):
    """Told what a run is doing; the terminal is one."""

    def planned(self, recipe: Recipe, plan: Plan, view: ModelView) -> None:
        """The recipe was resolved against the model."""

    def started(self, title: str) -> None:
        """A step or an evaluation begins."""

    def progress(self, done: int, total: int) -> None:
        """It has come this far, in blocks, tokens or windows."""

    def noted(self, text: str) -> None:
        """A remark about what is being done, such as the perplexity on the way; the last one stands."""

    def finished(self, summary: Mapping[str, Any], *, cached: bool) -> None:
        """A step is done; `cached` if an earlier run had done it."""

    def closed(self, report: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        """The run is complete."""


class Silent:
    """A `Listener` that is told everything and says nothing: for benchmarks, tests, and runs from Python."""

    def planned(self, recipe: Recipe, plan: Plan, view: ModelView) -> None:
        """Nothing."""

    def started(self, title: str) -> None:
        """Nothing."""

    def progress(self, done: int, total: int) -> None:
        """Nothing."""

    def noted(self, text: str) -> None:
        """Nothing."""

    def finished(self, summary: Mapping[str, Any], *, cached: bool) -> None:
        """Nothing."""

    def closed(self, report: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        """Nothing."""
