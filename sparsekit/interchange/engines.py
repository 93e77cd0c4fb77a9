"""Which engines read an export, as tried on the date below and not as promised by anybody.

Each sentence is about one setting of one export; `formats` holds them beside the layouts they speak
of. What was not tried is called "not checked".
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

CHECKED = "2026-11-24"
Verdict = Literal["loads", "refuses", "misreads", "not checked"]


@dataclass(frozen=True, slots=True)
class EngineNote:
    """One engine and one sentence about it."""

    engine: str
    verdict: Verdict
    sentence: str
    checked: str = CHECKED

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)
