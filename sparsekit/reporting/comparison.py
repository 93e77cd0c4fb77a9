"""The result of a comparison as data: every arm's numbers beside the dense model's, with paired tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsekit.evaluation.paired import perplexity_change, task_tests
from sparsekit.reporting.findings import SIXTEEN_BIT

Record = Mapping[str, Any]

UNTOUCHED: Record = {"sparsity": 0.0, "pattern": None, "bits": [], "groups": 0, "peak_memory_of": None}  # no steps


def comparison_of(name: str, reports: Mapping[str, Record], notes: Sequence[str]) -> dict[str, Any]:
    """Put the reports of some runs side by side.

    Args:
        name: Of the comparison.
        reports: As `sparsekit.run` builds them, by arm; their bases agree.
        notes: What has to be said about the whole.
    Returns:
        `dense`, `arms`, `best` (the arm with the lowest perplexity by text), `notes` and what is common.
    """
    first = next(iter(reports.values()))
    dense = _dense(first)
    arms = [_arm(arm, report, dense) for arm, report in reports.items()]
    best = {text: min(arms, key=lambda one: _level(one, text))["name"] for text in dense["perplexity"]}
    for arm in arms:
        arm["against_best"] = {
            text: _change(next(one for one in arms if one["name"] == winner), arm, text)
            for text, winner in best.items()
        }
    return {
        "name": name,
        "model": first["model"],
        "environment": first["environment"],
        "basis": _common([report["basis"] for report in reports.values()]),
        "coverage": first["coverage"],
        "notes": [*notes, *first["notes"]],
        "dense": dense,
        "best": best,
        "arms": arms,
    }


def missed(arms: Sequence[Record]) -> list[str]:
    """Quality gates that arms of a comparison missed, with the arm's name."""
    return [f"{arm['name']}: {gate['text']}" for arm in arms for gate in arm["gates"] if not gate["passed"]]


def _common(bases: Sequence[Record]) -> dict[str, Any]:
    """What the arms agree on; a text that some of them do not read is that of the others."""
    return {key: next((one[key] for one in bases if one[key] is not None), None) for key in bases[0]}


def _level(arm: Record, text: str) -> float:
    value = arm["perplexity"][text]["perplexity"]
    return float("inf") if value is None else float(value)


def _change(base: Record, arm: Record, text: str) -> dict[str, Any] | None:
    """The paired change; None when one of the two perplexities is not finite."""
    pair = base["perplexity"][text], arm["perplexity"][text]
    if any(one["perplexity"] is None for one in pair):
        return None
    return perplexity_change(*pair).as_dict()


def _dense(report: Record) -> dict[str, Any]:
    """The dense model's row."""
    width = 2 if report["environment"]["dtype"] in SIXTEEN_BIT else 4
    return {
        "name": "dense",
        "perplexity": dict(report["dense"]),
        "tasks": dict(report["tasks"].get("dense", {})),
        "measures": report.get("measures", {}).get("dense", {}),  # reports from before there were any lack them
        "bytes": report["model"]["parameters"] * width,
    }


def size_of(export: Record) -> int:
    """Bytes of an export's weights: its files, and the low-rank branches beside them."""
    held = export["bytes"]
    return int(held["files"]) + int(held.get("adapter", 0))  # reports from before there were branches lack them


def _arm(name: str, report: Record, dense: Record) -> dict[str, Any]:
    """One arm's row and what its drawings need."""
    steps, exports = report["steps"], report["exports"]
    smallest = min(exports, key=size_of, default=None)
    last, tasks = steps[-1] if steps else UNTOUCHED, dict(report["tasks"].get("final", {}))
    arm: dict[str, Any] = {
        "name": name,
        "recipe": report["recipe"],
        "steps": [_step(step) for step in steps],
        "perplexity": dict(report["final"]),
        "tasks": tasks,
        "measures": report.get("measures", {}).get("final", {}),
        "task_tests": task_tests(dense["tasks"], tasks),
        "exports": exports,
        "format": None if smallest is None else smallest["format"],
        "bytes": None if smallest is None else size_of(smallest),
        "bits_per_weight": None if smallest is None else smallest["bits_per_weight"],
        "sparsity": last["sparsity"],
        "pattern": last["pattern"],
        "bits": last["bits"],
        "groups": last["groups"],
        "violations": sum(step["violations"] for step in steps),
        "seconds": sum(step["seconds"] for step in steps),
        "peak_memory": max((step["peak_memory"] for step in steps), default=None),
        "peak_memory_of": last["peak_memory_of"],
        "gates": report["gates"],
        "deploy": report.get("deploy"),
        "notes": [note for step in steps for note in step["notes"]],
    }
    arm["against_dense"] = {text: _change(dense, arm, text) for text in dense["perplexity"]}
    return arm


def _step(step: Record) -> dict[str, Any]:
    """A step without the scores of the whole model, which stand in the arm."""
    left_out = ("before", "perplexity", "source", "notes")
    return {key: value for key, value in step.items() if key not in left_out}
