"""Comparing recipes: one calibration set, one dense baseline, one evaluation, and every step done once.

A comparison has one directory. Steps, tokens and scores are kept there for all arms; a step is known by
the fingerprint of all that decides it, so arms that begin alike share what they have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from sparsekit.deployed import add_card
from sparsekit.errors import GateError, RecipeError, SparsekitError
from sparsekit.evaluation.basis import Based, basis, notes, refuse_different
from sparsekit.files import RunLock, read_json, remove_temporaries
from sparsekit.listener import Listener
from sparsekit.models.locate import locate
from sparsekit.planning.fingerprint import model_digest
from sparsekit.recipe import Recipe, refuse_code
from sparsekit.recipe.variants import Arms, read_arms
from sparsekit.reporting.comparison import comparison_of
from sparsekit.reporting.comparison_page import write_comparison
from sparsekit.reporting.report import finite
from sparsekit.run import Run


class ArmListener(Listener, Protocol):
    """Told what a comparison is doing."""

    def arm(self, name: str, index: int, count: int) -> None:
        """An arm begins."""

    def compared(self, comparison: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        """The comparison is written."""


@dataclass(slots=True)
class Comparison:
    """Recipes on their way through one directory."""

    arms: Arms
    directory: Path
    listener: ArmListener
    runs: Mapping[str, Run]
    deploy: bool = False

    @classmethod
    def open(cls, arms: Arms, directory: Path, listener: ArmListener, *, deploy: bool = False) -> Comparison:
        """Check that the arms can be compared and plan all of them; nothing is written.

        Raises:
            RecipeError: They differ in model, data, seed or evaluation; the message names what and where.
        """
        placed = {name: _placed(recipe, directory / "arms" / name) for name, recipe in arms.recipes.items()}
        _same_model(placed)
        first = next(iter(placed.values()))
        refuse_code(first, False)
        opened = Run.open(first, listener)
        opened.shared = directory
        runs = {name: opened if recipe is first else opened.arm(recipe) for name, recipe in placed.items()}
        refuse_different([_based(name, run) for name, run in runs.items()])
        return cls(arms, directory, listener, runs, deploy)

    def execute(self) -> dict[str, Any]:
        """Run every arm and write the comparison.

        Raises:
            GateError: An arm missed its gate; the comparison is written all the same.
            SparsekitError: An arm failed; those before it are compared, and a note names it.
        """
        reports: dict[str, Any] = {}
        missed: list[str] = []
        with RunLock(self.directory):
            remove_temporaries(self.directory)
            for index, (name, run) in enumerate(self.runs.items()):
                self.listener.arm(name, index, len(self.runs))
                try:
                    reports[name] = run.execute()
                except GateError as error:
                    missed.append(f"{name}: {error}")
                    reports[name] = read_json(run.directory / "report.json")
                except SparsekitError as error:
                    if reports:
                        missing = ", ".join([*self.runs][index:])
                        self._written(reports, [f"{name} failed ({error}); not in this comparison: {missing}"])
                    raise
                if self.deploy:
                    reports[name] = add_card(run.directory, self.listener, view=run.view)
            comparison = self._written(reports, [])
        if missed:
            raise GateError("; ".join(missed))
        return comparison

    def _written(self, reports: Mapping[str, Any], notes: Sequence[str]) -> dict[str, Any]:
        """The comparison of these arms, written and told."""
        comparison = comparison_of(self.arms.name, reports, [*notes, *self.arms.notes])
        self.listener.compared(comparison, write_comparison(comparison, self.directory))
        return comparison


def compare_sources(
    sources: Sequence[Path],
    overrides: Sequence[str],
    *,
    plugins: Sequence[Path],
    out: Path | None,
    deploy: bool,
    listener: ArmListener,
) -> dict[str, Any]:
    """What `sparsekit compare` does.

    Args:
        sources: Recipes, one file with variants, or directories of finished runs.
        overrides: `KEY=VALUE` for every recipe.
        plugins: Plugin files.
        out: Directory of the comparison, by default runs/NAME.
        deploy: Measure speed as well.
        listener: Told what happens.
    """
    finished = [path for path in sources if path.is_dir() and (path / "report.json").is_file()]
    if not finished:
        arms = read_arms(sources, overrides, plugins=plugins)
        return Comparison.open(arms, out or arms.place, listener, deploy=deploy).execute()
    if len(finished) < len(sources):
        other = next(path for path in sources if path not in finished)
        raise RecipeError("give recipes or finished runs, not both", where=str(other))
    if len(finished) == 1 or overrides or deploy:
        what = "one run is nothing to compare" if len(finished) == 1 else "--set and --deploy are for recipes"
        raise RecipeError(f"{what}; finished runs are compared as they are", where=str(finished[0]))
    return compare_runs(finished, out or Path("runs") / _name_of(finished), listener)


def _name_of(directories: Sequence[Path]) -> str:
    names = "-".join(path.resolve().name for path in directories)
    return f"compare-{names}" if len(names) < 40 else f"compare-{len(directories)}-runs"


def compare_runs(directories: Sequence[Path], directory: Path, listener: ArmListener) -> dict[str, Any]:
    """Compare runs that are finished, by their report.json.

    Raises:
        RecipeError: They differ in what must be the same, a report does not say, or one run is given twice.
        CheckpointError: A directory holds no report.
    """
    reports: dict[str, Any] = {}
    arms: list[Based] = []
    for index, path in enumerate(directories):
        if any(path.samefile(other) for other in directories[:index]):
            raise RecipeError("the run is given twice", where=str(path))
        report = read_json(path / "report.json")
        if "basis" not in report:
            message = "the report does not say what it was measured on; run the recipe again with this version"
            raise RecipeError(message, where=str(path / "report.json"))
        name = report["name"] if report["name"] not in reports else str(path)
        reports[name] = report
        arms.append(
            Based(
                name,
                {"measures": {}, **report["basis"]},
                yaml.safe_load(report["recipe"]),
                _line_in(path / "recipe.yaml"),
            )
        )
    refuse_different(arms)
    said = list(notes(arms, [report["environment"] for report in reports.values()]))
    comparison = comparison_of(_name_of(directories), reports, said)
    with RunLock(directory):
        files = write_comparison(comparison, directory)
    listener.compared(comparison, files)
    return comparison


def _placed(recipe: Recipe, directory: Path) -> Recipe:
    """The recipe with its place inside the comparison, agreement with the dense model measured."""
    agreement = recipe.evaluate.agreement or list(recipe.evaluate.perplexity)
    changes = {
        "output": str(directory),
        "export": recipe.export.model_copy(update={"directory": None}),
        "evaluate": recipe.evaluate.model_copy(update={"agreement": agreement}),
    }
    return recipe.model_copy(update=changes)


def _same_model(recipes: Mapping[str, Recipe]) -> None:
    """Refuse other models and settings of them before the model is opened: all arms share one."""
    name, first = next(iter(recipes.items()))
    path = _located(first)
    for other_name, other in recipes.items():
        for key in ("dtype", "compute_dtype", "device", "trust_remote_code"):
            one, two = first.model.model_dump()[key], other.model.model_dump()[key]
            if one != two:
                message = f"cannot be compared: model.{key} of {other_name} is {two}, of {name} {one}"
                raise RecipeError(f"{message} ({first.where('model', key)})", where=other.where("model", key))
        found = _located(other)
        if found != path and model_digest(found) != model_digest(path):
            message = f"cannot be compared: the model of {other_name} is {found}, of {name} {path}"
            raise RecipeError(f"{message} ({first.where('model', 'path')})", where=other.where("model", "path"))


def _located(recipe: Recipe) -> Path:
    """Where a recipe's model is."""
    with recipe.placing("model"):
        return locate(recipe.resolve(recipe.model.path), allow_network=recipe.allow_network)


def _based(name: str, run: Run) -> Based:
    settings = yaml.safe_load(run.recipe.resolved_yaml())
    return Based(name, finite(basis(run.recipe, run.plan, run.view)), settings, run.recipe.where)


def _line_in(path: Path) -> Callable[..., str]:
    """Places in the recipe a run keeps, by file only: its lines are not those its writer knows."""
    return lambda *keys: f"{path}, {'.'.join(map(str, keys))}"
