"""Charts for the reports: pure functions that return SVG, with no library and no script behind them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from sparsekit.reporting.labels import labels
from sparsekit.reporting.marks import (
    HEAT,
    INK,
    QUIET,
    RULE,
    WIDE,
    colour,
    drawing,
    line,
    number,
    stroke,
    tag,
    text,
)
from sparsekit.reporting.numerals import significant
from sparsekit.reporting.scales import Scale, shown

EMPTY = "nothing was recorded"


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a chart.

    Attributes:
        x: Where.
        y: Where; a value that is not finite, or not positive on a logarithmic axis, breaks the line.
        error: Half the length of the error bar, None for none.
        label: Text beside the point, in scatter charts.
    """

    x: float
    y: float
    error: float | None = None
    label: str = ""

    @property
    def reach(self) -> float:
        """Half the length of the error bar, 0 for none."""
        return self.error if self.error and math.isfinite(self.error) else 0.0


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one colour."""

    label: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class HeatCell:
    """One cell of a heat map: its value and the text shown when pointed at."""

    value: float
    title: str


@dataclass(frozen=True, slots=True)
class Axes:
    """What a chart says about itself.

    Attributes:
        title: For readers who cannot see it.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
        log_x: Logarithmic.
        log_y: Logarithmic.
        width: Pixels; a page may scale the drawing.
        height: Pixels.
    """

    title: str
    x: str
    y: str
    log_x: bool = False
    log_y: bool = False
    width: int = 440
    height: int = 234


def line_chart(series: Sequence[Series], axes: Axes) -> Markup:
    """Lines over a common axis; a single point is drawn as a dot."""
    return _chart(series, axes, joined=True, frontier=())


def scatter_chart(series: Sequence[Series], axes: Axes, *, frontier: bool = False) -> Markup:
    """Points with labels and error bars; `frontier` joins those that nothing beats in both directions."""
    points = [point for one in series for point in one.points if _drawn(point, axes)]
    return _chart(series, axes, joined=False, frontier=pareto(points) if frontier else ())


def pareto(points: Iterable[Point]) -> list[Point]:
    """Points that no other point beats, where less is better on both axes, from left to right."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda one: (one.x, one.y)):
        if not kept or point.y < kept[-1].y:
            kept.append(point)
    return kept


def _chart(series: Sequence[Series], axes: Axes, *, joined: bool, frontier: Sequence[Point]) -> Markup:
    legend, rows = _legend([one.label for one in series], axes.width, joined=joined)
    points = [point for one in series for point in one.points if _drawn(point, axes)]
    heights = [point.y + side * point.reach for point in points for side in (-1, 0, 1)]
    top, bottom = 26.0 + 16 * rows, axes.height - 38.0
    upright = Scale.fit(heights, bottom, top, log=axes.log_y)
    left = 10 + WIDE * max(map(len, upright.labels()), default=1)
    right = axes.width - (14.0 if joined else 24.0)
    across = Scale.fit((point.x for point in points), left, right, log=axes.log_x, snug=joined)
    parts = [text(0, 11, axes.y), legend, *_grid(across, upright), text(axes.width - 2, axes.height - 4, axes.x, "end")]
    if not points:
        parts.append(text((left + right) / 2, (top + bottom) / 2, EMPTY, "middle"))
    if frontier:
        parts.append(_path(frontier, across, upright, f"stroke:{QUIET};stroke-dasharray:2 3"))
    for index, one in enumerate(series):
        held = _runs(one.points, axes)
        parts.append(_series(held, across, upright, index, joined=joined))
    if not joined:
        named = ((across(point.x), upright(point.y), point.label) for point in points)
        parts += labels(named, across.start + 2, across.end + 24, upright.start + 2)
    return drawing(parts, axes.title, axes.width, axes.height)


def _grid(across: Scale, upright: Scale) -> Iterable[Markup]:
    for tick, label in zip(upright.ticks, upright.labels(), strict=True):
        yield line(across.start, upright(tick), across.end, upright(tick), f"stroke:{RULE}")
        yield text(across.start - 6, upright(tick) + 4, label, "end")
    for tick, label in zip(across.ticks, across.labels(), strict=True):
        yield line(across(tick), upright.start, across(tick), upright.start + 4, f"stroke:{QUIET}")
        yield text(across(tick), upright.start + 16, label, "middle")


def _legend(labels: Sequence[str], width: float, *, joined: bool) -> tuple[Markup, int]:
    """Swatches with labels, and the rows they take; one series needs none."""
    if len(labels) < 2:
        return Markup(""), 0
    parts, x, row = [], 0.0, 1
    for index, label in enumerate(labels):
        room = 30 + WIDE * len(label)
        if x and x + room > width:
            x, row = 0.0, row + 1
        y = 11 + 16 * row
        dot = {"cx": x + 14, "cy": y - 4, "r": 4, "style": f"fill:{colour(index)}"}
        swatch = line(x, y - 4, x + 20, y - 4, stroke(index)) if joined else tag("circle", dot)
        parts += [swatch, text(x + 25, y, label, fill=INK)]
        x += room + 8
    return Markup("").join(parts), row


def _series(runs: Sequence[Sequence[Point]], across: Scale, upright: Scale, index: int, *, joined: bool) -> Markup:
    style, parts = stroke(index), []
    for run in runs:
        parts += [_bar(point, across, upright, index) for point in run if point.reach]
        if joined and len(run) > 1:
            parts.append(_path(run, across, upright, style))
            continue
        for point in run:
            x, y = across(point.x), upright(point.y)
            dot = {"cx": x, "cy": y, "r": 3 if joined else 4, "style": f"fill:{colour(index)}"}
            named = f"{point.label} ({significant(point.x, 4)}, {significant(point.y, 4)})".strip()
            parts.append(tag("circle", dot, tag("title", {}, named)))
    return tag("g", {"class": f"series-{index + 1}"}, *parts)


def _bar(point: Point, across: Scale, upright: Scale, index: int) -> Markup:
    x, style = across(point.x), f"stroke:{colour(index)};stroke-width:1.2"
    bottom, top = upright(max(point.y - point.reach, upright.low)), upright(point.y + point.reach)
    ends = [line(x - 3, y, x + 3, y, style) for y in (bottom, top)]
    return Markup("").join([line(x, bottom, x, top, style), *ends])


def _runs(points: Sequence[Point], axes: Axes) -> list[list[Point]]:
    """Stretches without a point that cannot be drawn."""
    runs: list[list[Point]] = [[]]
    for point in points:
        if _drawn(point, axes):
            runs[-1].append(point)
        else:
            runs.append([])
    return [run for run in runs if run]


def _drawn(point: Point, axes: Axes) -> bool:
    return shown(point.x, log=axes.log_x) and shown(point.y, log=axes.log_y)


def _path(points: Sequence[Point], across: Scale, upright: Scale, style: str) -> Markup:
    where = " ".join(f"{number(across(point.x))},{number(upright(point.y))}" for point in points)
    return tag("polyline", {"points": where, "style": f"fill:none;{style}"})


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[int, int], HeatCell],
    *,
    title: str,
    row_label: str = "",
    column_label: str = "",
    span: tuple[float, float] | None = None,
) -> Markup:
    """Cells shaded by value, darker for more, logarithmically when the values span a factor of 20.

    Args:
        rows: Labels from top to bottom.
        columns: Labels from left to right; not all are written when there are many.
        cells: By (row, column); a cell that is missing or not finite is left open.
        title: For readers who cannot see it.
        row_label: What the rows are.
        column_label: What the columns are.
        span: Values of the palest and the darkest shade, for maps that are to be compared.
    """
    values = list(span) if span else [cell.value for cell in cells.values() if math.isfinite(cell.value)]
    positive = [value for value in values if value > 0]
    log = len(positive) == len(values) > 0 and max(values) > 20 * min(values)
    shade = Scale.fit(values, 0.1, 1.0, log=log, snug=True)
    side = next(size for most, size in ((16, 22), (28, 19), (48, 14), (10**9, 10)) if len(columns) <= most)
    tall = max(side, 15)  # a row holds its label
    left, top = 8 + WIDE * max(map(len, [*rows, row_label]), default=0), 32.0
    parts = [text(left - 6, top - 5, row_label, "end"), text(left, 11, column_label)]
    every = max(1, math.ceil(WIDE * (1 + max(map(len, columns), default=0)) / side))
    for column in range(0, len(columns), every):
        parts.append(text(left + side * (column + 0.5), top - 5, columns[column], "middle"))
    for row, name in enumerate(rows):
        y = top + tall * row
        parts.append(text(left - 6, y + tall / 2 + 4, name, "end", INK))
        for column in range(len(columns)):
            parts.append(_cell(cells.get((row, column)), (left + side * column, y, side, tall), shade))
    below = top + tall * len(rows) + 8
    key, end = _key(values, left, below, log=log)
    return drawing([*parts, key], title, max(left + side * len(columns) + 4, end), below + 18)


def _cell(cell: HeatCell | None, box: tuple[float, float, float, float], shade: Scale) -> Markup:
    x, y, wide, tall = box
    place: dict[str, Any] = {"x": x + 0.5, "y": y + 0.5, "width": wide - 1, "height": tall - 1}
    if cell is None or not math.isfinite(cell.value):
        named = () if cell is None else (tag("title", {}, cell.title),)
        return tag("rect", {**place, "style": f"fill:none;stroke:{RULE}"}, *named)
    opacity = f"{min(1.0, max(0.0, shade(cell.value))):.3f}"
    return tag("rect", {**place, "style": f"fill:{HEAT};fill-opacity:{opacity}"}, tag("title", {}, cell.title))


def _key(values: Sequence[float], x: float, y: float, *, log: bool) -> tuple[Markup, float]:
    """Six shades between the smallest and the largest value, and where they end."""
    if not values:
        return text(x, y + 11, EMPTY), x + WIDE * len(EMPTY)
    low, high = significant(min(values)), significant(max(values)) + (" (log)" if log else "")
    start = x + 6 + WIDE * len(low)
    parts = [text(x, y + 11, low), text(start + 114, y + 11, high)]
    for index in range(6):
        style = f"fill:{HEAT};fill-opacity:{0.1 + 0.9 * index / 5:.2f}"
        parts.append(tag("rect", {"x": start + 18 * index, "y": y + 2, "width": 18, "height": 10, "style": style}))
    return Markup("").join(parts), start + 114 + WIDE * len(high)
