"""The promises every report section makes, and rows by hand."""

from pathlib import Path

import sparsekit as sk
from sparsekit.reporting.sections import SECTIONS
from sparsekit.testing import check_section

PLUGIN = Path(__file__).with_name("given_name.py")


def test_contract():
    check_section("given_name", plugin=PLUGIN)


def test_by_hand():
    sk.METHODS.load_path(PLUGIN)
    steps = [{"method": "rtn", "seconds": 1.0, "layers": []}, {"method": "ast", "seconds": 9.0, "layers": []}]
    rows = SECTIONS["given_name"].of({"steps": steps})["rows"]
    assert [row["step"] for row in rows] == ["ast", "rtn"]
