"""Time the column sweep on CPU against the column recursion as the papers' code runs it.

    python docs/benchmarks/solver_cpu.py --out docs/benchmarks/solver_cpu.json

`recursion` restates that loop: blocks of 128 columns, one column at a time, a rank-1 update of the
rest of the block, then one matrix product for the columns after it. Both sides get the same factor
and run in turn, in one process; the figure is the best of the repeats.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.pattern import Pattern
from sparsekit.quant import Rounding
from sparsekit.stats import Gram
from sparsekit.sweep import solve
from sparsekit.sweep.obs import sweep

SHAPES = ((768, 768), (2048, 768), (2048, 2048))
SMALL = ((16, 128), (64, 64), (64, 128), (128, 64), (128, 256), (256, 256), (256, 512), (512, 256))
BLOCK = 128


def pruned(weight: Tensor, diagonal: Tensor, start: int, kept: Tensor) -> None:
    """Mark the two cheapest of the four columns from `start` as pruned."""
    cost = weight[:, start : start + 4].square() / diagonal[start : start + 4].square()
    kept.scatter_(1, start + torch.topk(cost, 2, dim=1, largest=False)[1], False)


def rounded(column: Tensor, step: Tensor) -> Tensor:
    """Nearest of 16 symmetric levels."""
    return (torch.clamp(torch.round(column / step) + 8, 0, 15) - 8) * step


def recursion(weight: Tensor, factor: Tensor, *, four_bits: bool) -> Tensor:
    """2:4 (SparseGPT), or 4 bits in groups of 128 (GPTQ), as the papers' code loops over columns."""
    weight = weight.clone()
    columns = weight.shape[1]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block = weight[:, start:stop].clone()
        result, errors = torch.zeros_like(block), torch.zeros_like(block)
        inner = factor[start:stop, start:stop]
        kept = torch.ones_like(block, dtype=torch.bool)
        step = 2 * block.abs().amax(1) / 15
        for i in range(stop - start):
            column, pivot = block[:, i], inner[i, i]
            if four_bits:
                value = rounded(column, step)
            else:
                if i % 4 == 0:
                    pruned(block, inner.diagonal(), i, kept)
                value = column.clone()
                value[~kept[:, i]] = 0
            result[:, i] = value
            error = (column - value) / pivot
            block[:, i:] -= error.unsqueeze(1).matmul(inner[i, i:].unsqueeze(0))
            errors[:, i] = error
        weight[:, start:stop] = result
        weight[:, stop:] -= errors.matmul(factor[start:stop, stop:])
    return weight


def best_of(repeats: int, *sides: Callable[[], Any]) -> list[float]:
    """Best seconds of each side, the sides taking turns."""
    best = [float("inf")] * len(sides)
    for _ in range(repeats):
        for index, side in enumerate(sides):
            start = time.perf_counter()
            side()
            best[index] = min(best[index], time.perf_counter() - start)
    return best


def measured(rows: int, columns: int, repeats: int) -> list[dict[str, Any]]:
    """Both methods on one shape."""
    torch.manual_seed(0)
    gram = Gram.empty(columns, torch.device("cpu"))
    gram.update(torch.randn(2 * columns, columns) @ torch.randn(columns, columns))
    factor, _ = gram.inverse_factor(0.01)
    weight = torch.randn(rows, columns)
    found = []
    methods: dict[str, dict[str, Any]] = {
        "sparsegpt 2:4": {"pattern": Pattern(2, 4)},
        "gptq int4 g128": {"rounding": Rounding(4, 128)},
    }
    for method, arguments in methods.items():
        four_bits = "rounding" in arguments
        ours, theirs = sweep(weight, factor, **arguments).weight, recursion(weight, factor, four_bits=four_bits)
        seconds = best_of(
            repeats,
            partial(recursion, weight, factor, four_bits=four_bits),
            partial(sweep, weight, factor, **arguments),
        )
        found.append(
            {
                "method": method,
                "rows": rows,
                "columns": columns,
                "recursion_seconds": round(seconds[0], 4),
                "sweep_seconds": round(seconds[1], 4),
                "ratio": round(seconds[0] / seconds[1], 2),
                "zeros_that_agree": round(float(((ours == 0) == (theirs == 0)).float().mean()), 6),
                "relative_difference": float((ours - theirs).norm() / theirs.norm()),
            }
        )
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--small", action="store_true", help="small shapes, where a column costs its calls")
    parser.add_argument("--sub-block", type=int, default=solve.SUB_BLOCK)
    arguments = parser.parse_args()
    solve.SUB_BLOCK = arguments.sub_block
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for shape in SMALL if arguments.small else SHAPES:
            for row in measured(*shape, arguments.repeats):
                rows.append({"threads": threads, **row})
                print(
                    f"{threads} threads  {row['method']:15} {row['rows']:5} x {row['columns']:4}"
                    f"  recursion {row['recursion_seconds']:.3f} s  sweep {row['sweep_seconds']:.3f} s"
                    f"  ratio {row['ratio']:.2f}"
                )
    if arguments.out:
        environment = {"torch": torch.__version__, "machine": platform.machine(), "cpu": cpu_name()}
        data = {"environment": environment, "sub_block": arguments.sub_block, "rows": rows}
        arguments.out.write_text(json.dumps(data, indent=1) + "\n")


def cpu_name() -> str:
    """The processor's name, on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
