"""The drawings of a run's report: training curves and the error of every layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from sparsekit.reporting.numerals import significant
from sparsekit.reporting.svg import Axes, HeatCell, Point, Series, heat_map, line_chart

Record = Mapping[str, Any]

CURVES: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    ("Training loss", "mean per token", {"loss": "loss", "kl": "KL to the dense model", "ce": "cross-entropy"}),
    ("Held-out perplexity", "perplexity", {"valid_perplexity": "held-out perplexity"}),
    (
        "Mask entries that flip",
        "share of all entries",
        {"flip_rate": "since the last update", "initial_flip_rate": "since the first mask"},
    ),
    ("Gradient norm", "before clipping", {"grad_norm": "gradient norm"}),
    ("Learning rate", "", {"lr": "learning rate"}),
    ("Decay of pruned weights", "λ", {"decay": "λ"}),
)
MOST_POINTS = 600  # of a drawn line: more than a report has pixels
LOG_FROM = 50.0  # a curve that spans a larger ratio is drawn logarithmically


def curve_charts(curve: Sequence[Record]) -> Iterator[tuple[str, Markup]]:
    """Title and drawing of everything a training step logged."""
    for title, unit, keys in CURVES:
        series = [Series(label, curve_points(curve, key)) for key, label in keys.items()]
        series = [one for one in series if one.points]
        if series:
            ratio = _ratio([point.y for one in series for point in one.points])
            axes = Axes(title=f"{title} against tokens", x="tokens", y=unit, log_y=ratio > LOG_FROM)
            yield title, line_chart(series, axes)


def curve_points(curve: Sequence[Record], key: str) -> list[Point]:
    """A logged value against tokens, thinned evenly, the last one kept."""
    points = [
        Point(float(record.get("tokens", record.get("step", index))), float(record[key]))
        for index, record in enumerate(curve)
        if isinstance(record.get(key), (int, float))
    ]
    every = -(-len(points) // MOST_POINTS) or 1
    return points[::-1][::every][::-1]


def _ratio(values: Sequence[float]) -> float:
    """Largest over smallest; 1 when one of them is not positive."""
    return max(values) / min(values) if min(values) > 0 else 1.0


def error_map(step: Record, span: tuple[float, float] | None = None) -> Markup | None:
    """Error of each layer, rows by kind of layer and columns by block; None without layers in blocks.

    Args:
        step: Summary of a step.
        span: Errors of the palest and the darkest shade; by default the step's own.
    """
    places = [(place(layer["name"]), layer) for layer in step["layers"]]
    held: dict[tuple[str, int], list[Record]] = {}
    for at, layer in places:
        if at is not None:
            held.setdefault(at, []).append(layer)
    if not held:
        return None
    kinds = list(dict.fromkeys(kind for kind, _ in held))
    blocks = sorted({block for _, block in held})
    cells = {(kinds.index(kind), blocks.index(block)): _cell(layers) for (kind, block), layers in held.items()}
    of = step.get("error_of", "weights")
    return heat_map(
        short_names(kinds),
        [str(block) for block in blocks],
        cells,
        title=f"Relative squared error of the {of} of each layer, step {step['index'] + 1} {step['method']}",
        column_label="block",
        span=span,
    )


def _cell(layers: Sequence[Record]) -> HeatCell:
    """One layer, or the mean of the experts that share a place."""
    errors = [layer["error"] for layer in layers if layer["error"] is not None]
    mean = sum(errors) / len(errors) if errors else float("nan")
    if len(layers) == 1:
        return HeatCell(mean, f"{layers[0]['name']}: {significant(mean)}")
    worst = max(errors, default=mean)
    return HeatCell(mean, f"{layers[0]['name']} and {len(layers) - 1} more: {significant(mean)}, at worst {worst:.3g}")


def place(name: str) -> tuple[str, int] | None:
    """Kind of layer and block of a full name; experts of one block share a kind.

    `model.layers.3.mlp.experts.7.up_proj` is (`mlp.experts.*.up_proj`, 3).
    """
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    if match is None:
        return None
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", match[2]), int(match[1])


def short_names(kinds: Sequence[str]) -> list[str]:
    """Last component of each kind where that tells them apart, else the whole."""
    tails = [kind.rpartition(".")[2] for kind in kinds]
    return tails if len(set(tails)) == len(tails) else list(kinds)
