"""The marks of a drawing: SVG elements, lines, text and colours.

Colours are CSS variables with a fallback, so a page can give them a light and a dark value and a
drawing cut out of its page still shows. Every label is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from markupsafe import Markup, escape

COLOURS = ("#1f5fa6", "#bf4c0b", "#1b7a58", "#84489e", "#8a6500", "#5c5f66")
DASHES = ("", "6 3", "2 2.5", "9 3 2 3", "4 2")  # told apart without colour, as on paper
INK, QUIET, RULE = "var(--ink, #1c1e21)", "var(--quiet, #5d636b)", "var(--rule, #d9dce0)"
HEAT = "var(--heat, #a8330f)"
FONT = 11  # pixels
WIDE = 6.7  # pixels a character takes, on the generous side; SVG cannot measure text


def tag(name: str, attributes: Mapping[str, Any], *children: str) -> Markup:
    """One element; attributes and children that are no Markup are escaped."""
    given = Markup(" ").join(Markup('{}="{}"').format(key, number(value)) for key, value in attributes.items())
    return Markup("<{0} {1}>{2}</{0}>").format(Markup(name), given, Markup("").join(map(escape, children)))


def text(x: float, y: float, content: str, anchor: str = "start", fill: str = QUIET) -> Markup:
    """A line of text."""
    return tag("text", {"x": x, "y": y, "text-anchor": anchor, "style": f"fill:{fill}"}, content)


def drawing(parts: Iterable[Markup], title: str, width: float, height: float) -> Markup:
    """A whole drawing, which says its title to those who cannot see it."""
    attributes = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": f"0 0 {number(width)} {number(height)}",
        "width": width,
        "height": height,
        "role": "img",
        "aria-label": title,
        "font-size": FONT,
        "font-family": "system-ui, sans-serif",
    }
    return tag("svg", attributes, *parts)


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    """A straight line."""
    return tag("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "style": style})


def colour(index: int) -> str:
    """Of a series; a page may set `--series-1` and so on."""
    place = index % len(COLOURS)
    return f"var(--series-{place + 1}, {COLOURS[place]})"


def stroke(index: int) -> str:
    """Style of the line of a series."""
    dashes = DASHES[index % len(DASHES)]
    pattern = f";stroke-dasharray:{dashes}" if dashes else ""
    return f"stroke:{colour(index)};stroke-width:1.6;stroke-linejoin:round{pattern}"


def number(value: Any) -> Any:
    """Pixels with one decimal; text as it is."""
    return f"{round(value, 1):g}" if isinstance(value, (int, float)) else value
