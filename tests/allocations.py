"""The most bytes torch held on the CPU at once while something ran, told by its profiler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


class Peak:
    """Filled when the block ends: bytes above what was held when it began."""

    bytes = 0


@contextmanager
def peak_of_torch() -> Iterator[Peak]:
    found = Peak()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        yield found
    with tempfile.TemporaryDirectory() as place:
        trace = Path(place) / "trace.json"
        watched.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = [(e["ts"], e["args"]["Total Allocated"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held.sort()
    before = held[0][1] - held[0][2]
    found.bytes = max(total for _, total, _ in held) - before
