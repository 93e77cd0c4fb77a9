"""Part `awq` of oneshot.py: the scale search of every group of a block, beside that of llm-awq, restated.

The restatement tries each ratio on the calibration tokens themselves: it scales and rounds the weights, runs
the linears of the group, reads the mean squared change of their outputs on the host, and takes the weights
back from a copy there, as llm-awq's `auto_scale.py` does with the module around the linears. It runs the
linears only, which is less work. Both sides choose among the same scales, so that their choice can be compared.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsekit.methods.awq import Form, input_scales, losses
from sparsekit.registry import METHODS
from sparsekit.state import Group, LinearState
from sparsekit.stats import Gram

RATIOS = 20  # llm-awq's n_grid
FORM = Form(4, 128, symmetric=True)
GROUPS = {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}
SMALL = {"qkv": (768, 256), "down": (256, 768)}
TOKENS = 65536  # 128 windows of 512, llm-awq's default
BATCH = 16384  # tokens of a product of the restatement


def restated(weight: Tensor, x: Tensor, scales: Tensor) -> int:
    """The search of llm-awq over some scales; the index of the best.

    Args:
        weight: [out, in], in the dtype of the inputs.
        x: [tokens, in].
        scales: [ratios, in].
    """
    kept = weight.cpu()
    weight = weight.clone()
    before = [part @ weight.t() for part in x.split(BATCH)]
    best, chosen = float("inf"), -1
    for index, scale in enumerate(scales):
        scaled = weight.float() * scale
        grouped = FORM.grouped(scaled)
        step = (grouped.abs().amax(-1, keepdim=True) * 2 / 15).clamp(min=1e-5).half().float()
        codes = (torch.round(grouped / step) + 8).clamp(0, 15)
        weight.copy_(((codes - 8) * step).reshape(weight.shape) / scale)
        pairs = zip(before, x.split(BATCH), strict=True)
        lost = sum((old - part @ weight.t()).float().square().mean() for old, part in pairs)
        if (found := float(lost)) < best:
            best, chosen = found, index
        weight.copy_(kept)
    return chosen


def ours(group: Group, gram: Gram) -> int:
    """Our search over the same scales and the identity."""
    scales = input_scales(group, gram, FORM, grid=RATIOS - 1, duo=True)
    return int(losses(group, gram.matrix, scales, FORM)[1:].argmin())


def median(call: Callable[[], object], device: torch.device, repeats: int, warm: int) -> dict[str, float]:
    """Seconds of a call."""
    times = []
    for index in range(repeats + warm):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index >= warm:
            times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "least": min(times), "most": max(times), "runs": repeats}


def awq(tokens: Callable[[int, int], Tensor], small: bool) -> dict[str, Any]:
    """Every group: our search, our whole method, and the restated search.

    Args:
        tokens: Makes inputs [count, columns] on the device.
        small: Small groups, for a CPU.
    """
    found: dict[str, Any] = {}
    totals = {"search": 0.0, "restated": 0.0}
    for name, (rows, columns) in (SMALL if small else GROUPS).items():
        x = tokens(TOKENS // 64 if small else TOKENS, columns)
        gram = Gram.empty(columns, x.device)
        for part in x.split(BATCH):
            gram.update(part)
        generator = torch.Generator(x.device).manual_seed(1)
        weight = torch.randn(rows, columns, generator=generator, device=x.device).to(x.dtype) / columns**0.5
        group = Group({"w": LinearState("w", weight.float())}, tie=lambda free: free, untie=lambda values: values)
        scales = input_scales(group, gram, FORM, grid=RATIOS - 1, duo=True)[1:]
        row: dict[str, Any] = {
            "search": median(partial(ours, group, gram), x.device, 3, 1),
            "method": median(partial(METHODS.get("awq").function, group, gram), x.device, 1, 1),
            "restated": median(partial(restated, weight, x, scales), x.device, 1, 0),
            "chosen": [ours(group, gram), restated(weight, x, scales)],
        }
        row["ratio"] = row["restated"]["seconds"] / row["search"]["seconds"]
        for side in totals:
            totals[side] += row[side]["seconds"]
        found[name] = row
        print(name, json.dumps(row), flush=True)
    found["ratio"] = totals["restated"] / totals["search"]
    print(f"search of all groups: {totals['restated']:.3f} s restated, {totals['search']:.3f} s ours")
    return found
