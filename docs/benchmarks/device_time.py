"""Times of work on a CUDA device, and a listener for runs that are timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def timed(call: Callable[[], object], repeats: int = 5, warm: int = 2) -> dict[str, float]:
    """Milliseconds of a call on the device: median, least and most."""
    times = []
    for index in range(repeats + warm):
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if index >= warm:
            times.append(start.elapsed_time(end))
    return {"ms": round(statistics.median(times), 4), "least": round(min(times), 4), "most": round(max(times), 4)}


def graphed(call: Callable[[], object]) -> Callable[[], None]:
    """The work of a call as one graph: what replaying it takes is the device's time, without launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    return graph.replay


def profiled(call: Callable[[], object], rows: int = 8) -> list[str]:
    """The kernels that take the most time in a call, and how often they are launched."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)[:rows]
    return [f"{event.device_time_total / 1000:9.3f} ms {event.count:5} x {event.key[:80]}" for event in events]
