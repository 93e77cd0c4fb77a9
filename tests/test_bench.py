"""`sparsekit bench`: both sides do the same work."""

from __future__ import annotations

import io
import json

from click.testing import CliRunner
from rich.console import Console

from sparsekit import bench
from sparsekit.cli import main
from sparsekit.madeup import Shape
from sparsekit.terminal.bench import bench_table

TINY = Shape(128, 256, 2, 3, 64)


def test_both_sides_agree():
    found = bench.run_bench(TINY, "cpu", repeats=1)
    assert list(found) == list(bench.JOBS)
    for rows in found.values():
        parity, group, theirs = rows
        assert [row["side"] for row in rows] == ["sparsekit block", "sparsekit group", "the recursion"]
        assert theirs["equal"] > 0.999
        assert abs(parity["error"] / theirs["error"] - 1) < 0.01
        assert 0.5 < group["equal"] < theirs["equal"]  # its later groups see compressed inputs
        assert abs(group["error"] / theirs["error"] - 1) < 0.2
        assert parity["least"] <= parity["seconds"] <= parity["most"]
        assert theirs["ratios"]["sparsekit block"] == theirs["seconds"] / parity["seconds"]


def test_a_side_stops_at_its_limit_and_says_how_far_it_came():
    seen: list[int] = []
    found = bench.run_bench(
        TINY,
        "cpu",
        jobs=["sparsegpt 2:4"],
        repeats=1,
        limit=0.0,
        so_far=lambda each: seen.append(len(each["sparsegpt 2:4"])),
    )
    assert seen == [1, 2, 3]  # told after each row
    row = found["sparsegpt 2:4"][-1]
    assert row["stopped"] == "1 of 3 windows"
    table = Console(width=120, file=io.StringIO())
    table.print(bench_table("sparsegpt 2:4", found["sparsegpt 2:4"]))
    assert "1 of 3 windows" in table.file.getvalue()


def test_command(monkeypatch):
    monkeypatch.setattr(bench, "SMALL", TINY)
    result = CliRunner().invoke(main, ["bench", "--small", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "sparsegpt 2:4" in result.output
    assert "sparsekit group" in result.output
    result = CliRunner().invoke(main, ["bench", "--small", "--device", "cpu", "--json"])
    assert list(json.loads(result.output)["jobs"]) == list(bench.JOBS)
