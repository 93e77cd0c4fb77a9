from __future__ import annotations

import math
from itertools import combinations
from xml.etree import ElementTree

import pytest

from sparsekit.reporting.marks import WIDE
from sparsekit.reporting.scales import Scale, linear_ticks, log_ticks, tick_labels
from sparsekit.reporting.svg import Axes, HeatCell, Point, Series, heat_map, line_chart, pareto, scatter_chart

HOSTILE = "<script>alert(\"1\")</script> & 'x'"
SVG = "{http://www.w3.org/2000/svg}"


def parse(drawing: str) -> ElementTree.Element:
    """Well-formed, and every number in it is one."""
    root = ElementTree.fromstring(drawing)
    for element in root.iter():
        assert element.tag != f"{SVG}script"
        for key, value in element.attrib.items():
            if key in {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "points", "viewBox"}:
                assert all(math.isfinite(float(part)) for part in value.replace(",", " ").split()), (key, value)
    return root


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def points(*pairs: tuple[float, float]) -> list[Point]:
    return [Point(*pair) for pair in pairs]


@pytest.mark.parametrize("draw", [line_chart, scatter_chart])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "held",
    [
        [],
        points((3, 4)),
        points((0, 0), (0, 0)),
        points((1, math.nan), (2, math.inf), (3, -math.inf)),
        points((1, 2), (2, math.nan), (3, 1), (4, 5)),
        points((-1, 2), (0, 0), (1e9, 1e-9)),
        points((1, 1e300), (2, 1e-300)),
        [Point(1, 2, error=5), Point(2, 3, error=math.nan), Point(3, 3, error=0.0)],
    ],
)
def test_any_points_make_a_drawing(draw, log, held):
    axes = Axes("title", "x", "y", log_x=log, log_y=log)
    parse(draw([Series("one", held), Series("none", [])], axes))
    parse(draw([], axes))


def test_labels_are_escaped_and_shown():
    axes = Axes(HOSTILE, HOSTILE, HOSTILE)
    series = [Series(HOSTILE, [Point(1, 2, label=HOSTILE), Point(2, 3)]), Series("b", points((1, 1)))]
    for draw, times in ((scatter_chart, 4), (line_chart, 3)):  # both axes, the legend, the point
        root = parse(draw(series, axes))
        assert root.attrib["aria-label"] == HOSTILE
        assert texts(root).count(HOSTILE) == times
    root = parse(heat_map([HOSTILE], [HOSTILE], {(0, 0): HeatCell(1.0, HOSTILE)}, title=HOSTILE))
    assert HOSTILE in [element.text for element in root.iter(f"{SVG}title")]


def test_a_gap_breaks_the_line_and_a_lone_point_is_a_dot():
    root = parse(line_chart([Series("a", points((1, 1), (2, 2), (3, math.nan), (4, 4)))], Axes("t", "x", "y")))
    assert len(list(root.iter(f"{SVG}polyline"))) == 1
    assert len(list(root.iter(f"{SVG}circle"))) == 1


def test_lines_run_where_the_data_are():
    root = parse(line_chart([Series("a", points((0, 0), (10, 100)))], Axes("t", "x", "y", width=400, height=200)))
    ((x1, y1), (x2, y2)) = [
        tuple(map(float, pair.split(","))) for pair in next(root.iter(f"{SVG}polyline")).attrib["points"].split()
    ]
    assert x1 < x2
    assert y1 > y2  # up is more
    assert 0 <= x1 <= x2 <= 400
    assert 0 <= y2 <= y1 <= 200


def test_error_bars_are_inside_the_axis():
    root = parse(scatter_chart([Series("a", [Point(1, 10, error=4, label="p")])], Axes("t", "x", "y", height=200)))
    bars = [element for element in root.iter(f"{SVG}line") if "stroke-width:1.2" in element.attrib["style"]]
    assert len(bars) == 3
    assert all(0 <= float(bar.attrib[key]) <= 200 for bar in bars for key in ("y1", "y2"))


def test_pareto_keeps_what_nothing_beats():
    held = points((1, 5), (2, 3), (2, 4), (3, 3), (4, 1), (5, 2))
    assert [(point.x, point.y) for point in pareto(held)] == [(1, 5), (2, 3), (4, 1)]
    root = parse(scatter_chart([Series("a", held)], Axes("t", "x", "y"), frontier=True))
    assert len(next(root.iter(f"{SVG}polyline")).attrib["points"].split()) == 3


def test_labels_of_near_points_stand_apart():
    near = [Point(10, 28.4, label="gptq"), Point(9.9, 29.2, label="ast + gptq"), Point(40, 60, label="far")]
    root = parse(scatter_chart([Series("a", near)], Axes("t", "x", "y")))
    placed = {element.text: element.attrib for element in root.iter(f"{SVG}text")}
    first, second = placed["gptq"], placed["ast + gptq"]
    assert float(first["y"]) - float(second["y"]) >= 11  # the lower point has the lower label


def test_no_label_lies_on_another_where_many_points_have_one_place():
    held = [Point(4.5, 100 + 3 * index, label=f"sparsegpt-gptq{index}") for index in range(12)]
    axes = Axes("t", "x", "y", log_x=True, log_y=True, width=480, height=350)
    root = parse(scatter_chart([Series("a", [*held, Point(8, 50, label="dense")])], axes))
    named = [each for each in root.iter(f"{SVG}text") if (each.text or "").startswith("sparsegpt")]
    places = [(each.attrib["text-anchor"], float(each.attrib["y"])) for each in named]
    apart = [abs(one[1] - two[1]) for one, two in combinations(places, 2) if one[0] == two[0]]
    assert min(apart) >= 11
    assert all(0 < y < 350 for _, y in places)


def test_a_label_too_wide_for_the_drawing_loses_its_middle():
    names = [f"a-name-that-is-longer-than-any-drawing-is-wide-{'and-then-some-' * 5}{kind}" for kind in ("one", "two")]
    held = [Point(8, 28 + index, label=name) for index, name in enumerate(names)]
    axes = Axes("t", "x", "y", width=480, height=350)
    root = parse(scatter_chart([Series("a", [Point(1, 50, label="dense"), *held])], axes))
    named = [each for each in root.iter(f"{SVG}text") if (each.text or "").startswith("a-name")]
    assert sorted((each.text or "")[-3:] for each in named) == ["one", "two"]
    for each in named:
        start, room = float(each.attrib["x"]), WIDE * len(each.text or "")
        assert start - room >= 0 if each.attrib["text-anchor"] == "end" else start + room <= 480


@pytest.mark.parametrize("columns", [1, 12, 28, 48, 126])
def test_heat_map_is_darker_for_more(columns):
    cells = {(0, column): HeatCell(float(column + 1), f"block {column}") for column in range(columns)}
    root = parse(heat_map(["q_proj"], [str(column) for column in range(columns)], cells, title="t"))
    named = [element for element in root.iter(f"{SVG}rect") if element.find(f"{SVG}title") is not None]
    shades = [float(element.attrib["style"].rpartition(":")[2]) for element in named]
    assert len(shades) == columns
    assert shades == sorted(shades)
    assert all(0 < shade <= 1 for shade in shades)


@pytest.mark.parametrize(
    "values", [[], [0.0], [0.0, 0.0], [math.nan], [math.nan, 1.0], [0.0, 1e-30, 1e30], [-1.0, 1.0], [math.inf, 2.0]]
)
def test_heat_map_of_anything(values):
    cells = {(0, column): HeatCell(value, "cell") for column, value in enumerate(values)}
    parse(heat_map(["a", "b"], ["0", "1", "2"], cells, title="t"))
    parse(heat_map([], [], {}, title="t"))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7), (27.5, 29.2), (1e-9, 3e-9), (0, 26_214_400), (1e12, 3e12)])
def test_linear_ticks_are_few_and_enclose(low, high):
    ticks = linear_ticks(low, high)
    assert ticks[0] <= low + 1e-6 * (high - low)
    assert ticks[-1] >= high - 1e-6 * (high - low)
    assert 3 <= len(ticks) <= 8
    assert len(set(tick_labels(ticks))) == len(ticks)


@pytest.mark.parametrize(("low", "high"), [(1, 2), (1, 10), (0.3, 40), (1e-6, 1), (1e-12, 1e12), (5, 5.1)])
def test_log_ticks_are_few_and_enclose(low, high):
    ticks = log_ticks(low, high)
    assert ticks == sorted(ticks)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 12
    assert len(set(tick_labels(ticks))) == len(ticks)


def test_labels_read_well():
    assert tick_labels([0, 10_000_000, 20_000_000]) == ["0", "10 M", "20 M"]
    assert tick_labels([0.0, 2e-4, 1e-3]) == ["0", "2e−4", "1e−3"]
    assert tick_labels([1e-4, 1e-2, 1]) == ["0.0001", "0.01", "1"]
    assert linear_ticks(0.0, 1.0000000475e-3)[-1] == 1e-3  # a float32
    assert tick_labels([-0.5, 0, 0.5]) == ["−0.5", "0", "0.5"]


def test_scales_meet_their_ends():
    scale = Scale.fit([1, 100], 0, 300, log=True, snug=True)
    assert (scale(1), scale(10), scale(100)) == pytest.approx((0, 150, 300))
    assert Scale.fit([0.5, 10], 0, 100, snug=True).low == 0
