"""A comparison as one page, one file of data, one of rows, and one page of Markdown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sparsekit.files import write_json, write_text
from sparsekit.reporting.charts import curve_points, error_map
from sparsekit.reporting.comparison import missed
from sparsekit.reporting.comparison_tables import cost_table, measures_table, quality_table
from sparsekit.reporting.findings import protocols
from sparsekit.reporting.numerals import change, megabytes, numbered, perplexity
from sparsekit.reporting.report import environment, finite, markdown_list, markdown_table, plain
from sparsekit.reporting.speed import sentences, speed_table
from sparsekit.reporting.svg import Axes, Point, Series, line_chart, scatter_chart
from sparsekit.reporting.tables import pair_table
from sparsekit.reporting.tasks import TESTS, metrics, tasks_table

Record = Mapping[str, Any]

PLAIN = (
    "Intervals are of 95 % and paired: by Student's t over the differences of two models' losses, window by window.",
    "A change whose interval holds 0 is grey on the page: these windows do not tell the two models apart.",
    "KL is that of the dense model's predictions to the arm's, mean nats per token; top-1 the share of tokens where "
    "both put the same token first.",
)
SPREAD = 3.0  # perplexities whose largest is so many times the smallest are drawn logarithmically


def write_comparison(comparison: Record, directory: Path) -> dict[str, Path]:
    """Write comparison.json, .html, .csv and .md; returns what was written, by kind."""
    paths = {
        kind: directory / f"comparison.{ending}"
        for kind, ending in (("page", "html"), ("json", "json"), ("rows", "csv"), ("markdown", "md"))
    }
    data = finite(comparison)
    write_json(paths["json"], data)
    write_text(paths["rows"], rows(data))
    write_text(paths["markdown"], markdown(data))
    write_text(paths["page"], html(data))
    return paths


def html(comparison: Record) -> str:
    """The page."""
    return environment().get_template("comparison.html.j2").render(view(comparison))


def view(comparison: Record) -> dict[str, Any]:
    """Everything the page shows, worked out."""
    dense, arms = comparison["dense"], comparison["arms"]
    deployed = {arm["name"]: arm["deploy"] for arm in arms if arm.get("deploy")}
    about = {**comparison["environment"], "model": comparison["model"]["path"], "digest": comparison["model"]["digest"]}
    return {
        "name": comparison["name"],
        "lead": lead(comparison),
        "arms": arms,
        "quality": [quality_table(comparison, text) for text in dense["perplexity"]],
        "protocols": protocols({"dense": dense["perplexity"]}),
        "remarks": PLAIN,
        "pareto": [pareto_chart(comparison, text) for text in dense["perplexity"]],
        "cost": cost_table(comparison),
        "tasks": tasks_table(comparison),
        "measures": measures_table(comparison),
        "tests": TESTS,
        "deploy": speed_table(deployed),
        "deploy_notes": list(sentences(deployed)),
        "maps": list(error_maps(arms)),
        "curves": list(training_charts(arms)),
        "missed": missed(arms),
        "notes": [*comparison["notes"], *(f"{arm['name']}: {note}" for arm in arms for note in arm["notes"])],
        "environment": pair_table("Environment", about),
        "basis": pair_table("What all arms have in common", dict(common(comparison["basis"]))),
    }


def common(basis: Record) -> Iterator[tuple[str, Any]]:
    """What all arms have in common, line by line: `perplexity heldout`, its digest; nothing that is not set."""
    for key, value in basis.items():
        if isinstance(value, Mapping):
            yield from common({f"{key} {name}": part for name, part in value.items()})
        elif value not in (None, []):
            yield key, ", ".join(map(str, value)) if isinstance(value, list) else value


def lead(comparison: Record) -> str:
    """What the comparison found, in two or three sentences."""
    arms, parts = comparison["arms"], []
    for text, name in comparison["best"].items():
        level = next(arm for arm in arms if arm["name"] == name)["perplexity"][text]["perplexity"]
        base = comparison["dense"]["perplexity"][text]["perplexity"]
        if level is not None and base is not None:
            rise = change(level / base - 1)
            parts.append(f"Lowest perplexity on {text}: {name} with {perplexity(level)} ({rise} against dense).")
    sized = [arm for arm in arms if arm["bytes"]]
    if sized:
        small = min(sized, key=lambda arm: (arm["bytes"], *_levels(arm)))  # of equal ones the best
        ratio = comparison["dense"]["bytes"] / small["bytes"]
        alike = sum(arm["bytes"] == small["bytes"] for arm in sized)
        rank = f", the best of {alike} of this size" if alike > 1 else ""
        gain = f"{ratio:.2f} times smaller than dense" if ratio > 1 else "no smaller than dense"
        parts.append(f"Smallest: {small['name']} with {megabytes(small['bytes'])}, {gain}{rank}.")
    broken = sum(arm["violations"] for arm in arms)
    parts.append(f"{broken:,} broken N:M groups in {numbered(arms, 'arm')}.")
    return " ".join(parts)


def _levels(arm: Record) -> list[float]:
    """Perplexities of an arm, text by text; what is not a number is worst."""
    found = [score["perplexity"] for score in arm["perplexity"].values()]
    return [float("inf") if level is None else level for level in found]


def pareto_chart(comparison: Record, text: str) -> tuple[str, Markup]:
    """Perplexity against bytes; the line joins what nothing beats in both."""
    dense = comparison["dense"]
    series = [Series("dense", [_point(dense, text)])]
    by_form: dict[str, list[Point]] = {}
    for arm in comparison["arms"]:
        if arm["bytes"] is not None and arm["perplexity"][text]["perplexity"] is not None:
            kind = f"int{'/'.join(map(str, arm['bits']))}" if arm["bits"] else "not quantized"
            by_form.setdefault(kind, []).append(_point(arm, text))
    series += [Series(kind, points) for kind, points in by_form.items()]
    levels = [point.y for one in series for point in one.points]
    title = f"Perplexity on {text} against bytes on disk"
    log = max(levels) > SPREAD * min(levels)
    axes = Axes(title, x="MB on disk", y=f"perplexity {text}", log_y=log, log_x=True, width=480, height=350)
    return title, scatter_chart(series, axes, frontier=True)


def _point(arm: Record, text: str) -> Point:
    found = arm["perplexity"][text]
    spread = found.get("stderr")
    error = None if spread is None else spread * found["perplexity"]
    return Point(arm["bytes"] / 1e6, found["perplexity"], error, arm["name"])


def error_maps(arms: Sequence[Record]) -> Iterator[tuple[str, Markup]]:
    """Each different step's map once, named by the arm that ends with it; one scale for each kind of error."""
    seen: dict[str, tuple[str, Record]] = {}
    for arm in arms:
        for index, step in enumerate(arm["steps"]):
            name = arm["name"] if index == len(arm["steps"]) - 1 else f"{arm['name']}, step {index + 1}"
            known = seen.get(step["fingerprint"])
            if known is None or len(name) < len(known[0]):
                seen[step["fingerprint"]] = (name, step)
    spans: dict[str, tuple[float, float]] = {}
    for _, step in seen.values():
        errors = [layer["error"] for layer in step["layers"] if layer["error"] and layer["error"] > 0]
        if errors:
            low, high = spans.get(step["error_of"], (math.inf, 0.0))
            spans[step["error_of"]] = (min(low, *errors), max(high, *errors))
    order = [layer["name"] for _, step in seen.values() for layer in step["layers"]]
    place = {name: index for index, name in reversed(list(enumerate(order)))}  # as the first step has them
    for name, step in seen.values():
        layers = sorted(step["layers"], key=lambda layer: place[layer["name"]])
        drawing = error_map({**step, "layers": layers}, spans.get(step["error_of"]))
        if drawing is not None:
            yield f"{name}: {step['method']}, error of the {step['error_of']}", drawing


def training_charts(arms: Sequence[Record]) -> Iterator[tuple[str, Markup]]:
    """Flip rates and held-out perplexity of every different training step."""
    trained: dict[str, tuple[str, Record]] = {}
    for arm in arms:
        for step in arm["steps"]:
            if step.get("curve"):
                trained.setdefault(step["fingerprint"], (arm["name"], step))
    charts = (
        ("Mask entries that flip at an update", "share of all entries", "flip_rate"),
        ("Mask entries that differ from the first mask", "share of all entries", "initial_flip_rate"),
        ("Held-out perplexity while training", "perplexity", "valid_perplexity"),
    )
    for title, unit, key in charts:
        series = [Series(name, curve_points(step["curve"], key)) for name, step in trained.values()]
        series = [one for one in series if one.points]
        if series:
            yield title, line_chart(series, Axes(f"{title} against tokens", x="tokens", y=unit))


def rows(comparison: Record) -> str:
    """One row for each arm, the dense model first, as CSV; every metric of every task."""
    dense = comparison["dense"]
    table = [_row({**dense, "against_dense": {}, "against_best": {}, "task_tests": {}})]
    table += [_row(arm) for arm in comparison["arms"]]
    keys = list(dict.fromkeys(key for row in table for key in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, keys, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return file.getvalue()


def _row(arm: Record) -> dict[str, Any]:
    """One flat row."""
    row: dict[str, Any] = {"arm": arm["name"]}
    for text, found in arm["perplexity"].items():
        row |= {f"{text}.{key}": found[key] for key in ("perplexity", "loss", "stderr", "windows", "seq_len")}
        for against in ("dense", "best"):
            for key, value in (arm[f"against_{against}"].get(text) or {}).items():
                if key in ("value", "low", "high"):
                    row[f"{text}.against_{against}.{key}"] = value
        row |= {f"{text}.{key}": value for key, value in (found.get("agreement") or {}).items() if key != "tokens"}
    for (task, metric), (level, spread) in metrics(arm["tasks"]):
        row |= {f"{task}.{metric}": level, f"{task}.{metric}.stderr": spread}
        if test := arm["task_tests"].get(task, {}).get(metric):
            row[f"{task}.{metric}.p"] = test["p"]
    row |= {f"{title}.{key}": value for title, found in arm["measures"].items() for key, value in found.items()}
    kept = ("bytes", "format", "bits_per_weight", "sparsity", "pattern", "groups", "violations", "seconds")
    return row | {key: arm[key] for key in (*kept, "peak_memory", "peak_memory_of") if key in arm}


def markdown(comparison: Record) -> str:
    """The compact page: tables, no drawings."""
    seen = view(comparison)
    tables = [*seen["quality"], seen["cost"], seen["tasks"], seen["measures"], seen["deploy"]]
    tables += [seen["basis"], seen["environment"]]
    remarks = [*seen["remarks"], *seen["protocols"], *([seen["tests"]] if seen["tasks"] else []), *seen["deploy_notes"]]
    parts = [f"# {plain(seen['name'])}", plain(seen["lead"])]
    parts += [markdown_table(table) for table in tables if table is not None]
    parts += [markdown_list("Remarks", remarks), markdown_list("Notes", seen["notes"])]
    return "\n\n".join(part for part in parts if part) + "\n"


__all__ = ["html", "lead", "markdown", "rows", "view", "write_comparison"]
