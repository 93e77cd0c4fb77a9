"""Given name: say here what it shows."""

from collections.abc import Mapping
from typing import Any

import sparsekit as sk


@sk.report_section("given_name")
def given_name(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Steps by the time they took, the longest first; replace it by rows of your own."""
    steps = sorted(report["steps"], key=lambda step: -step["seconds"])
    return [{"step": step["method"], "seconds": step["seconds"], "layers": len(step["layers"])} for step in steps]
