"""Labels beside the points of a chart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from markupsafe import Markup

from sparsekit.reporting.marks import FONT, INK, QUIET, WIDE, line, text

ROWS = 12  # a label goes so many rows away from its point at most


def labels(points: Iterable[tuple[float, float, str]], left: float, right: float, bottom: float) -> Iterator[Markup]:
    """The label of each point, at the nearest place beside it where no other label or point is.

    From the top down: of two near points the upper one is labelled above, the lower one below. A label that found no
    room beside its point has a line to it; one too wide for either side loses its middle.

    Args:
        points: x and y in pixels, and the label; no label for none.
        left: Where labels may begin.
        right: Where they must end.
        bottom: Lowest baseline.
    """
    points = sorted(points, key=lambda point: point[1])
    taken = [(x - 4, x + 4, y + 4) for x, y, _ in points]  # left, right, baseline
    for x, y, label in points:
        if not label:
            continue
        label = shortened(label, int((max(x - left, right - x) - 8) / WIDE))
        room = WIDE * len(label)
        inside = [
            (start, base)
            for start, base in _places(x, y, room)
            if start >= left and start + room <= right and FONT <= base <= bottom
        ] or [(x + 8, y - 5)]
        free = [
            (start, base)
            for start, base in inside
            if not any(start < end and begin < start + room and abs(base - other) < FONT for begin, end, other in taken)
        ]
        start, base = (free or inside)[0]
        taken.append((start, start + room, base))
        edge, anchor = (start, "start") if start > x else (x - 8, "end")
        if not y - 5 <= base <= y + 13:
            yield line(x, y, edge, base - 4, f"stroke:{QUIET};stroke-width:0.6")
        yield text(edge, base, label, anchor, INK)


def shortened(label: str, most: int) -> str:
    """A label in at most so many characters, four at least; its ends stay, where names of arms differ."""
    if len(label) <= most:
        return label
    kept = max(most, 4) - 1
    return f"{label[: kept - kept // 2]}…{label[-(kept // 2) :]}"


def _places(x: float, y: float, room: float) -> Iterator[tuple[float, float]]:
    """Left end and baseline of every place for a label of that width, the nearest first."""
    away = [base for row in range(1, ROWS) for base in (y + 13 + FONT * row, y - 5 - FONT * row)]
    for bases in ((y - 5, y + 13), (y + 4, *away)):
        for start in (x + 8, x - 8 - room):
            for base in bases:
                yield start, base
