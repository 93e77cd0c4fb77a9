"""The linears of a block at one batch size: bf16, packed, tinygemm, and the time their bytes take to stream."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from device_time import graphed
from torch import Tensor

from sparsekit.inference.linear import Product
from sparsekit.inference.packed import PackedWeight, dequantize

if torch.cuda.is_available():
    import triton
    import triton.language as tl

    @triton.jit
    def read(source, target, BLOCK: tl.constexpr):
        """Read everything and write next to nothing."""
        place = tl.program_id(0)
        values = tl.load(source + place * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
        tl.store(target + place, tl.sum(values, 0))


GROUP = 128
ROTATE = 150e6  # bytes read before any is read again: three times the L2 of an H100
PLACES = torch.tensor([first | second << 2 for first in range(4) for second in range(first + 1, 4)], dtype=torch.uint8)
Call = Callable[[Tensor], Tensor]


@dataclass
class Contender:
    """One way to multiply, with as many copies of its weights as keep the cache from helping.

    Attributes:
        calls: One for each copy.
        nbytes: Of one copy.
        error: Relative error of its output against float32 arithmetic on its own weights, None for bf16.
    """

    calls: list[Call]
    nbytes: int
    error: float | None = None


def random_packed(out: int, columns: int, *, sparse: bool, device: str, group: int = GROUP) -> PackedWeight:
    """A made-up weight, directly packed; values of about 0.02."""
    size = min(group, columns)
    scales = (torch.rand(out, columns // size, device=device) * 0.004 + 0.002).half()
    if not sparse:
        values = torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8, device=device)
        return PackedWeight(values, None, scales, size, (out, columns))
    values = torch.randint(0, 256, (out, columns // 4), dtype=torch.uint8, device=device)
    places = PLACES.to(device)[torch.randint(0, 6, (2, out, columns // 8), dtype=torch.int32, device=device)]
    return PackedWeight(values, places[0] | places[1] << 4, scales, size, (out, columns))


def tinygemm(weight: PackedWeight) -> tuple[Call, int] | None:
    """The int4 product of torch itself for a dense packed weight, or None where it has none for this shape."""
    out, columns = weight.shape
    low, high = weight.values & 15, weight.values >> 4
    scales = weight.scales.t().bfloat16()
    grid = torch.stack((scales, torch.zeros_like(scales)), 2).contiguous()  # [groups, out, 2]: scale, zero
    try:
        if weight.values.is_cuda:
            held = torch.ops.aten._convert_weight_to_int4pack(low << 4 | high, 8)
            multiply = torch.ops.aten._weight_int4pack_mm
        else:
            codes = torch.stack((low, high), 2).view(out, columns).int()
            held = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        multiply(torch.zeros(1, columns, dtype=torch.bfloat16, device=held.device), held, weight.group_size, grid)
    except RuntimeError:
        return None
    return lambda x: multiply(x, held, weight.group_size, grid), held.nbytes + grid.nbytes


def contenders(out: int, columns: int, batches: list[int], device: str) -> dict[str, Contender]:
    """All ways to multiply with one shape; which paths ran is in the products themselves."""
    found: dict[str, Contender] = {}
    copies = max(2, int(-(-ROTATE // (2 * out * columns)))) if device == "cuda" else 1
    weights = [0.02 * torch.randn(out, columns, device=device, dtype=torch.bfloat16) for _ in range(copies)]
    found["bf16"] = Contender([lambda x, w=w: x @ w.t() for w in weights], weights[0].nbytes)
    for name, sparse in (("2:4 + int4", True), ("int4", False)):
        size = random_packed(out, columns, sparse=sparse, device=device).nbytes
        copies = max(2, int(-(-ROTATE // size))) if device == "cuda" else 1
        products, libraries, error, rival = [], [], 0.0, 0.0
        for copy in range(copies):
            weight = random_packed(out, columns, sparse=sparse, device=device)
            library = None if sparse else tinygemm(weight)
            products.append(Product(weight, None, torch.bfloat16))
            if library is not None:
                libraries.append(library)
            if copy == 0:
                dense = dequantize(weight, torch.float32)
                error = max(_error(products[0], dense, batch) for batch in batches)
                rival = max(_error(library[0], dense, batch) for batch in batches) if library else 0.0
        found[name] = Contender(list(products), products[0].nbytes, error)
        if libraries:
            found["tinygemm"] = Contender([call for call, _ in libraries], libraries[0][1], rival)
    return found


def _error(call: Call, dense: Tensor, batch: int) -> float:
    torch.manual_seed(batch)
    x = torch.randn(batch, dense.shape[1], device=dense.device, dtype=torch.bfloat16)
    exact = x.float() @ dense.t()
    return float((call(x).float() - exact).norm() / exact.norm())


def measure(work: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Microseconds of some calls, interleaved: median, least and most. On CUDA each call is one graph."""
    replays = {name: graphed(call) if device == "cuda" else call for name, call in work.items()}
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, replay in replays.items():
            times[name].append(_elapsed(replay, device))
    return {
        name: {"us": statistics.median(taken), "least": min(taken), "most": max(taken)} for name, taken in times.items()
    }


def _elapsed(replay: Callable[[], Any], device: str) -> float:
    if device != "cuda":
        begun = time.perf_counter()
        replay()
        return 1e6 * (time.perf_counter() - begun)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    replay()
    end.record()
    torch.cuda.synchronize()
    return 1000 * start.elapsed_time(end)


def stream(nbytes: int, copies: int, device: str) -> list[Callable[[], Any]]:
    """Reading as many bytes as a weight has, once for each copy, by whichever plain kernel is fastest here."""
    count = -(-nbytes // 16384) * 4096
    buffers = [torch.ones(count, dtype=torch.int32, device=device) for _ in range(copies)]
    if device != "cuda":
        return [buffer.sum for buffer in buffers]
    target = torch.empty(count // 4096, dtype=torch.int32, device=device)
    return [lambda b=buffer: read[(count // 4096,)](b, target, BLOCK=4096, num_warps=8) for buffer in buffers]
