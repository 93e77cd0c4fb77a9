"""The tables of a comparison; the dense model is the first row of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsekit.reporting.numerals import JOINED, MANIFOLD, change, duration, percent
from sparsekit.reporting.tables import NONE, Cell, Column, Table, Tone, agreement, measured_cell, numbers, score, size

Record = Mapping[str, Any]


def quality_table(comparison: Record, text: str) -> Table:
    """Perplexity on one text with paired intervals, and agreement with the dense model."""
    best = comparison["best"][text]
    columns = [Column("arm"), *numbers("perplexity", "against dense [95 %]", f"against {best} [95 %]")]
    columns += numbers("KL to dense", "top-1 as dense")
    rows = [[Cell("dense", tone="strong"), score(comparison["dense"]["perplexity"][text]), *_dense_cells()]]
    for arm in comparison["arms"]:
        found = arm["perplexity"][text]
        rows.append(
            [
                Cell(arm["name"], tone="strong" if arm["name"] == best else ""),
                score(found),
                interval(arm["against_dense"][text]),
                Cell("best", tone="good") if arm["name"] == best else interval(arm["against_best"][text]),
                *agreement(found.get("agreement")),
            ]
        )
    return Table(f"Quality on {text}", columns, rows)


def _dense_cells() -> list[Cell]:
    return [Cell("–", tone="quiet"), Cell("–", tone="quiet"), Cell("0", tone="quiet"), Cell(percent(1.0), tone="quiet")]


def interval(found: Record | None) -> Cell:
    """`+5.2 % [+4.8, +5.6]`; quiet when the interval holds 0."""
    if found is None:
        return NONE
    if found["low"] is None:
        return Cell(change(found["value"]), "the windows cannot be paired")
    low, high = (_bare(found[key], found["value"]) for key in ("low", "high"))
    sure = "" if found["certain"] else ", which holds 0"
    title = f"{found['value']:+.6f} from {found['low']:+.6f} to {found['high']:+.6f}{sure}; {found['windows']} windows"
    return Cell(f"{change(found['value'])} [{low}, {high}]", title, "" if found["certain"] else "quiet")


def _bare(value: float, middle: float) -> str:
    """An end of an interval, without the unit where that is its middle's."""
    text = change(value)
    if (value >= MANIFOLD) != (middle >= MANIFOLD):
        return text
    return text.removeprefix(f"×{JOINED}") if value >= MANIFOLD else text.removesuffix(f"{JOINED}%")


def cost_table(comparison: Record) -> Table:
    """Bytes, pattern, time and memory."""
    columns = [Column("arm"), Column("smallest export")]
    columns += numbers("bytes", "× smaller", "bits per weight", "zeros", "broken groups", "time", "peak memory")
    dense = comparison["dense"]["bytes"]
    about = comparison["environment"]["dtype"]
    none = Cell("–", tone="quiet")
    head = [Cell("dense", tone="strong"), Cell(f"as stored, {about}"), size(dense), Cell("1.00"), none, Cell("0 %")]
    rows = [[*head, none, none, none], *(_cost_row(arm, dense) for arm in comparison["arms"])]
    return Table("Size and cost", columns, rows)


def _cost_row(arm: Record, dense: float) -> list[Cell]:
    held, bits = arm["bytes"], arm["bits_per_weight"]
    tone: Tone = "bad" if arm["violations"] else "good"
    counted = Cell(f"{arm['violations']:,} of {arm['groups']:,}", tone=tone)
    return [
        Cell(arm["name"]),
        Cell(arm["format"] or "none"),
        NONE if held is None else size(held, "of weight files"),
        NONE if held is None else Cell(f"{dense / held:.2f}", str(dense / held)),
        Cell("–", tone="quiet") if bits is None else Cell(f"{bits:.2f}", "scales and zero-points counted"),
        Cell(percent(arm["sparsity"]), f"pattern {arm['pattern']}"),
        counted if arm["groups"] else Cell("–", tone="quiet"),
        Cell(duration(arm["seconds"]), f"{arm['seconds']:.3f} s for all its steps"),
        NONE if arm["peak_memory"] is None else size(arm["peak_memory"], arm["peak_memory_of"]),
    ]


def measures_table(comparison: Record) -> Table | None:
    """Every number of plugins' evaluators; None without any."""
    models = [comparison["dense"], *comparison["arms"]]
    named = [(title, key) for title, found in comparison["dense"]["measures"].items() for key in found]
    if not named:
        return None
    rows = [
        [Cell(model["name"]), *(measured_cell(model["measures"].get(title, {}).get(key)) for title, key in named)]
        for model in models
    ]
    return Table("Measures", [Column("arm"), *numbers(*(f"{title}: {key}" for title, key in named))], rows)
