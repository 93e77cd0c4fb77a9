"""Peak memory of some work: what CUDA allocated, or how large the process became."""

from __future__ import annotations

import contextlib
import gc
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESET = Path("/proc/self/clear_refs")  # writing 5 makes the high-water mark start anew (Linux, proc(5))
STATUS = Path("/proc/self/status")


def start_peak(device: torch.device) -> bool:
    """Begin to watch; returns whether the peak before now is forgotten."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with contextlib.suppress(OSError):
        RESET.write_text("5")
        return True
    return False


def peak_since(device: torch.device, fresh: bool) -> tuple[int, str]:
    """Bytes of the highest peak since `start_peak`, and of what.

    Args:
        device: As given to `start_peak`.
        fresh: What `start_peak` returned.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "device memory allocated"
    if fresh:
        return _status("VmHWM"), "resident memory of the process"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "resident memory of the process since it began"


def measured(device: torch.device, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What some work returns, with its time and peak memory."""
    fresh, start = start_peak(device), time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    peak, of = peak_since(device, fresh)
    # a step of several processes has measured itself
    return {"peak_memory": peak, "peak_memory_of": of, **result, "seconds": seconds}


def resident_now() -> int:
    """Bytes of the process in memory now, or the highest there ever were where the system does not tell."""
    if STATUS.exists():
        return _status("VmRSS")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
