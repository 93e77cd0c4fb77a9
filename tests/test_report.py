from __future__ import annotations

import json

from reports import make_report

from sparsekit.report import write_report


def test_writes_three_files(tmp_path):
    paths = write_report(make_report(), tmp_path)
    assert {kind: path.name for kind, path in paths.items()} == {
        "report": "report.html",
        "json": "report.json",
        "markdown": "report.md",
    }
    assert len(json.loads(paths["json"].read_text())["dense"]["valid"]["window_losses"]) == 480
