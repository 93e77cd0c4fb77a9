"""`sparsekit bench`: both sides do the same work."""

from __future__ import annotations

import json

from click.testing import CliRunner

from sparsekit import bench
from sparsekit.cli import main

TINY = bench.Shape(128, 256, 2, 3, 64)


def test_both_sides_agree():
    found = bench.run_bench(TINY, "cpu", repeats=1)
    assert list(found) == list(bench.JOBS)
    for rows in found.values():
        theirs, parity, group = rows
        assert [row["side"] for row in rows] == ["the recursion", "sparsekit block", "sparsekit group"]
        assert parity["equal"] > 0.999
        assert abs(parity["error"] / theirs["error"] - 1) < 0.01
        assert 0.5 < group["equal"] < parity["equal"]  # its later groups see compressed inputs
        assert abs(group["error"] / theirs["error"] - 1) < 0.2
        assert parity["least"] <= parity["seconds"] <= parity["most"]
        assert parity["ratio"] == theirs["seconds"] / parity["seconds"]


def test_command(monkeypatch):
    monkeypatch.setattr(bench, "SMALL", TINY)
    result = CliRunner().invoke(main, ["bench", "--small", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "sparsegpt 2:4" in result.output
    assert "sparsekit group" in result.output
    result = CliRunner().invoke(main, ["bench", "--small", "--device", "cpu", "--json"])
    assert list(json.loads(result.output)["jobs"]) == list(bench.JOBS)
