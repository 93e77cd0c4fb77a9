"""The tables of a report, as values: the HTML and the Markdown page write the same ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sparsekit.reporting.findings import named, paired_change
from sparsekit.reporting.numerals import JOINED, MANIFOLD, change, duration, megabytes, percent, perplexity, significant

Tone = Literal["", "good", "bad", "quiet", "strong"]
Record = Mapping[str, Any]

VERDICTS: Mapping[str, Tone] = {"loads": "good", "refuses": "bad", "misreads": "bad", "not checked": "quiet"}
BYTES = (
    ("codes", "packed integers"),
    ("positions", "positions of the kept weights"),
    ("scales", "scales"),
    ("zeros", "zero-points"),
    ("groups", "group index"),
    ("dense", "everything not quantized"),
    ("headers", "headers"),
    ("total", "counted in all"),
    ("files", "weight files on disk"),
    ("adapter", "low-rank branches in adapter/ (part of the model; counted below)"),
    ("masks", "mask file (no engine reads it; not in the files above)"),
    ("fp32", "the same parameters in FP32"),
    ("fp16", "the same parameters in FP16"),
)
COVERED = (
    ("compressed", "compressed"),
    ("ignored", "left dense by the recipe"),
    ("gate", "left dense for a gate"),
    ("by_rule", "dense by rule: embeddings, head, norms, biases"),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One entry; `title` is what it says exactly, shown when pointed at."""

    text: str
    title: str = ""
    tone: Tone = ""


NONE = Cell("–", "not measured", "quiet")


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, and whether numbers stand under it."""

    title: str
    number: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headings, a row of one cell heads those below it; `wraps` lets long sentences break."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    wraps: bool = False


def numbers(*titles: str) -> list[Column]:
    """Columns of numbers."""
    return [Column(title, number=True) for title in titles]


def score(value: Record | None) -> Cell:
    """`41.293 ± 0.412`: one standard error over the windows, that of the mean loss times the perplexity."""
    if value is None:
        return Cell("–", "not measured", "quiet")
    level, spread = value["perplexity"], value.get("stderr")
    if level is None:
        return Cell("not finite", "JSON has no infinity", "bad")
    title = f"perplexity {level}; loss {value['loss']} ± {spread} nats per token"
    if spread is None or not math.isfinite(spread * level):
        return Cell(perplexity(level), title)
    return Cell(f"{perplexity(level)} ± {perplexity(spread * level)}", title)


def step_table(report: Record) -> Table:
    """What each step did."""
    texts = list(report["dense"])
    columns = [Column("step"), Column("pattern"), *numbers("sparsity", "bits", "broken groups")]
    columns += numbers(*(f"perplexity {name}" for name in texts), "time", "peak memory")
    return Table("What each step did", columns, [_step_row(step, texts) for step in report["steps"]])


def _step_row(step: Record, texts: Sequence[str]) -> list[Cell]:
    groups, broken = step["groups"], step["violations"]
    counted = Cell(f"{broken:,} of {groups:,}", tone="bad" if broken else "good") if groups else Cell("–")
    row = [
        Cell(f"{step['index'] + 1}{JOINED}{named(step)}", step.get("source") or "", "strong"),
        Cell(step["pattern"] or "–"),
        Cell(f"{step['sparsity']:.4f}", f"share of exact zeros {step['sparsity']}"),
        Cell("/".join(map(str, step["bits"])) or "–"),
        counted,
    ]
    for name in texts:
        before, after = step["before"].get(name), step["perplexity"].get(name)
        start = "–" if before is None else perplexity(before["perplexity"])
        end = score(after)
        row.append(Cell(f"{start} → {end.text}", end.title))
    seconds, peak = step.get("seconds"), step.get("peak_memory")
    row.append(Cell("–") if seconds is None else Cell(duration(seconds), f"{seconds:.3f} s"))
    row.append(Cell("–") if peak is None else size(peak, step.get("peak_memory_of", "")))
    return row


def size(count: float, of: str = "") -> Cell:
    """Bytes in MB, exactly in the title."""
    return Cell(megabytes(count), f"{count:,.0f} bytes {of}".rstrip())


def perplexity_table(report: Record) -> Table:
    """Dense against final on every text."""
    columns = [Column("text"), *numbers("dense", "final", "change", "windows", "tokens scored")]
    compared = any((final or {}).get("agreement") for final in report["final"].values())
    columns += numbers("KL to dense", "top-1 as dense") if compared else []
    rows = []
    for name, dense in report["dense"].items():
        final = report["final"].get(name)
        rise, spread = (None, None) if final is None else paired_change(dense, final)
        rows.append(
            [
                Cell(name),
                score(dense),
                score(final),
                Cell(_with_error(rise, spread), "" if rise is None else f"{rise:+.6f}", "strong"),
                Cell(f"{dense['windows']:,} × {dense['seq_len']:,}"),
                Cell(f"{dense['tokens']:,}"),
                *(agreement((final or {}).get("agreement")) if compared else []),
            ]
        )
    return Table("Perplexity, dense model and result", columns, rows)


def agreement(found: Record | None) -> list[Cell]:
    """KL to the dense model and the share of tokens both put first."""
    if found is None:
        return [NONE] * 2
    spread, share = found.get("kl_stderr"), found.get("top1_stderr")
    return [
        Cell(significant(found["kl"]), f"{found['kl']} ± {spread} nats per token over {found['tokens']:,} tokens"),
        Cell(percent(found["top1"]), f"{found['top1']} ± {share}"),
    ]


def _with_error(rise: float | None, spread: float | None) -> str:
    """A change and its standard error, in the same unit."""
    if rise is None or spread is None:
        return change(rise)
    return f"{change(rise)} ± {percent(spread) if rise < MANIFOLD else significant(spread)}"


def bytes_table(exports: Sequence[Record]) -> Table:
    """Where the bytes of each export are; one column an export."""
    columns = [Column("bytes"), *numbers(*(export["format"] for export in exports))]
    rows = []
    for key, label in BYTES:
        values = [export["bytes"].get(key, 0) for export in exports]
        if not any(values):
            continue
        tone: Tone = "strong" if key == "files" else ""
        cells = [size(value) if value else Cell("0", tone="quiet") for value in values]
        rows.append([Cell(label, tone=tone), *(Cell(cell.text, cell.title, tone or cell.tone) for cell in cells)])
    for key, label in (("ratio_fp32", "times smaller than FP32"), ("ratio_fp16", "times smaller than FP16")):
        rows.append([Cell(label, tone="strong"), *(_ratio(export[key]) for export in exports)])
        if all("linears" in export for export in exports):  # reports from before 2:4 below 4 bits lack them
            about = "everything they need on disk: indices, scales, masks, branches and file headers"
            counted = [_ratio(export["linears"][key]) for export in exports]
            rows.append([Cell(f"{label}, linears of the blocks alone", about), *counted])
    stored = [export["bits_per_weight"] for export in exports]
    if any(stored):
        rows.append(
            [Cell("bits stored for a quantized weight, scales and all")]
            + [Cell(f"{bits:.2f}", str(bits)) if bits else Cell("–", tone="quiet") for bits in stored]
        )
    return Table("Bytes of the exports", columns, rows)


def _ratio(value: float) -> Cell:
    return Cell(f"{value:.2f} ×", str(value), "strong")


def engine_table(export: Record) -> Table:
    """Who reads one export."""
    rows = [
        [Cell(note["engine"]), Cell(note["verdict"], f"checked {note['checked']}", VERDICTS.get(note["verdict"], "")),
         Cell(note["sentence"])]
        for note in export["engines"]
    ]  # fmt: skip
    return Table(f"Engines and the {export['format']} export", _titles("engine", "verdict", "what happens"), rows, True)


def _titles(*titles: str) -> list[Column]:
    return [Column(title) for title in titles]


def coverage_table(coverage: Record) -> Table:
    """Every parameter of the model, by what became of it."""
    total = coverage["total"]
    counts = [(label, coverage[key]) for key, label in COVERED if key in coverage]
    counts += [(f"out of reach: {name}", count) for name, count in coverage["unreachable"].items()]
    rows = [
        [Cell(label), Cell(f"{count:,}"), Cell(percent(count / total if total else None))] for label, count in counts
    ]
    rows.append([Cell("all parameters", tone="strong"), Cell(f"{total:,}", tone="strong"), Cell(percent(1.0))])
    return Table("Coverage", [Column("parameters"), *numbers("count", "share")], rows)


def gate_table(gates: Sequence[Record]) -> Table:
    """Quality gates."""
    rows = [
        [
            Cell(gate["text"]),
            Cell(perplexity(gate["dense"])),
            Cell(perplexity(gate["final"])),
            Cell(change(gate["increase"]), str(gate["increase"])),
            Cell(change(gate["allowed"]), str(gate["allowed"])),
            Cell("passed" if gate["passed"] else "failed", tone="good" if gate["passed"] else "bad"),
        ]
        for gate in gates
    ]
    return Table("Gates", [Column("text"), *numbers("dense", "final", "increase", "allowed"), Column("gate")], rows)


def layer_table(step: Record) -> Table:
    """Every layer of a step, the same numbers as its heat map."""
    of = step.get("error_of", "weights")
    columns = [
        Column("layer"),
        Column("shape"),
        *numbers("sparsity", "broken groups", "bits", f"error of {of}", "time"),
    ]
    rows = [
        [
            Cell(layer["name"]),
            Cell(" × ".join(map(str, layer["shape"]))),
            Cell(f"{layer['sparsity']:.4f}"),
            Cell(f"{layer['violations']:,} of {layer['groups']:,}" if layer["groups"] else "–"),
            Cell(str(layer["bits"] or "–")),
            Cell(significant(layer["error"]), str(layer["error"])),
            Cell(duration(layer.get("seconds", 0.0))),
        ]
        for layer in step["layers"]
    ]
    return Table(f"Layers of step {step['index'] + 1}, {step['method']}", columns, rows)


def pair_table(caption: str, pairs: Mapping[str, Any]) -> Table:
    """Names and values, nested values as JSON."""
    return Table(caption, _titles("name", "value"), [[Cell(key), _value(value)] for key, value in pairs.items()], True)


def _value(value: Any) -> Cell:
    if isinstance(value, float):
        return Cell(significant(value, 4), str(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return Cell(f"{value:,}")
    return Cell(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def measures_table(measures: Record) -> Table:
    """Numbers of plugins' evaluators, dense against final."""
    dense, final = measures["dense"], measures.get("final", {})
    rows = [
        [Cell(title), Cell(key), *(measured_cell(arm.get(title, {}).get(key)) for arm in (dense, final))]
        for title, found in dense.items()
        for key in found
    ]
    return Table("Measures", [*_titles("measure", "number"), *numbers("dense", "final")], rows)


def section_table(section: Record) -> Table:
    """A section of a plugin; a column of numbers alone stands to the right."""
    rows = section["rows"]
    names = list(rows[0]) if rows else ["nothing to show"]
    columns = [Column(name, number=not any(isinstance(row[name], str) for row in rows)) for name in names if rows]
    cells = [[_plain_cell(row[name]) for name in names] for row in rows]
    return Table(section["caption"], columns or _titles(*names), cells, wraps=True)


def _plain_cell(value: str | float | None) -> Cell:
    if value is None:
        return Cell("–", tone="quiet")
    return Cell(value) if isinstance(value, str) else Cell(significant(value, 4), str(value))


def measured_cell(value: float | None) -> Cell:
    """A number of an evaluator."""
    return NONE if value is None else Cell(significant(value, 4), str(value))
