"""Zero-shot tasks as tables: those of one run, and one metric of each in a comparison."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sparsekit.evaluation.paired import task_tests
from sparsekit.reporting.numerals import perplexity, significant
from sparsekit.reporting.tables import NONE, Cell, Column, Table, Tone, numbers

Record = Mapping[str, Any]
UNSURE = 0.05  # a p above it is written quietly
TESTS = (
    "± is one standard error. p is that of McNemar's exact two-sided test against the dense model, document by "
    "document; it is not corrected for the number of comparisons made here."
)


def task_table(tasks: Record, only: Collection[tuple[str, str]] | None = None) -> Table:
    """Zero-shot tasks, dense against final, in lm-eval's own metrics, with the p of the paired test.

    Args:
        tasks: Scores of `dense` and, once there is one, of the `final` model.
        only: Tasks and metrics to show; by default all.
    """
    dense, final = (dict(metrics(tasks.get(arm, {}))) for arm in ("dense", "final"))
    tests = task_tests(tasks.get("dense", {}), tasks.get("final", {}))
    shown = [key for key in dict.fromkeys([*dense, *final]) if only is None or key in only]
    rows = [
        [*map(Cell, key), _measured(dense.get(key)), _measured(final.get(key)), _test(tests, *key)] for key in shown
    ]
    return Table("Zero-shot tasks", [Column("task"), Column("metric"), *numbers("dense", "final", "p")], rows)


def _test(tests: Record, task: str, metric: str) -> Cell:
    """The p of a paired test; what is not right or wrong has none."""
    test = tests.get(task, {}).get(metric)
    if test is None:
        return Cell("–", "not right or wrong document by document", "quiet")
    return Cell(significant(test["p"], 2), _told(test), "quiet" if test["p"] > UNSURE else "")


def _told(test: Record) -> str:
    return f"{test['lost']} documents lost, {test['won']} won, exact two-sided p {test['p']}"


def tasks_table(comparison: Record) -> Table | None:
    """One metric of each task: accuracy with its standard error, and the p of the paired test against dense."""
    dense = comparison["dense"]["tasks"]
    chosen = main_metrics(dense)
    if not chosen:
        return None
    names = [task if metric == "acc" else f"{task} ({metric})" for task, metric in chosen]
    rows = [[Cell("dense", tone="strong"), *_task_cells(chosen, dense, {})]]
    rows += [[Cell(arm["name"]), *_task_cells(chosen, arm["tasks"], arm["task_tests"])] for arm in comparison["arms"]]
    return Table("Zero-shot tasks", [Column("arm"), *numbers(*names)], rows)


def main_metrics(scores: Record) -> list[tuple[str, str]]:
    """For each task the metric to show: `acc_norm`, else `acc`, else the first; parts of groups left out."""
    parts = {
        name
        for found in scores.values()
        if isinstance(found, Mapping)
        for name in (found.get("documents") or {}).get("tasks", ())
        if len((found.get("documents") or {}).get("tasks", ())) > 1
    }
    by_task: dict[str, list[str]] = {}
    for (task, metric), _ in metrics(scores):
        if task not in parts:
            by_task.setdefault(task, []).append(metric)
    return [
        (task, next(name for name in ("acc_norm", "acc", *names) if name in names)) for task, names in by_task.items()
    ]


def _task_cells(chosen: Sequence[tuple[str, str]], scores: Record, tests: Record) -> list[Cell]:
    held = dict(metrics(scores))
    cells = []
    for task, metric in chosen:
        value = held.get((task, metric))
        if value is None:
            cells.append(NONE)
            continue
        level, spread = value
        text = _figure(level, spread)
        test = tests.get(task, {}).get(metric)
        title = str(level)
        tone: Tone = ""
        if test is not None:
            text += f"; p {significant(test['p'], 2)}"
            title += f"; {_told(test)}"
            tone = "quiet" if test["p"] > UNSURE else ""
        cells.append(Cell(text, title, tone))
    return cells


def _measured(value: tuple[float, float | None] | None) -> Cell:
    if value is None:
        return NONE
    level, spread = value
    return Cell(_figure(level, spread, 4), str(level))


def _figure(level: float, spread: float | None, decimals: int = 3) -> str:
    """An accuracy or a perplexity with its standard error."""
    written = perplexity if level > 1 else f"{{:.{decimals}f}}".format
    return written(level) if spread is None else f"{written(level)} ± {written(spread)}"


def metrics(scores: Record) -> Iterable[tuple[tuple[str, str], tuple[float, float | None]]]:
    """(task, metric) with its value and standard error, from lm-eval's `acc,none` and `acc_stderr,none`."""
    for task, found in scores.items():
        values = found if isinstance(found, Mapping) else {"score": found}
        for key, value in values.items():
            name, _, kept = key.partition(",")
            if name.endswith("stderr") or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            spread = values.get(f"{name}_stderr,{kept}" if kept else f"{name}_stderr", values.get("stderr"))
            label = name if kept in ("", "none") else f"{name} ({kept})"
            yield (task, label), (float(value), spread if isinstance(spread, (int, float)) else None)
