"""Time one-shot compression of one linear on a CPU against the papers' column recursion.

    python docs/benchmarks/solver_cpu.py --out docs/benchmarks/solver_cpu.json
    python docs/benchmarks/solver_cpu.py --sparsegpt DIR --autogptq DIR --out solver_cpu.json

Cases: SparseGPT 2:4 and GPTQ int4 in groups of 128, from a Gram matrix to compressed weights, factor included; and the
Gram matrix of 2048 tokens. Sides: sparsekit's methods as a run calls them, on natural order; the recursion that we
restate (`sparsekit/sweep/recursion.py`); and the authors' classes, with copies of IST-DASLab/sparsegpt and AutoGPTQ.

All sides run in turn, in one process, until --seconds of a case are used up, three times at least. A figure is the
median; a ratio is the median of the ratios of the rounds, so that what else the machine does falls on both. With one
thread, seconds are those the processor spent on it; with more, those that passed. Every case is printed as it comes,
and at the end those in which we are slower.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from oneshot_block import authors
from torch import Tensor, nn

from sparsekit.pattern import Pattern
from sparsekit.registry import METHODS
from sparsekit.state import LinearState
from sparsekit.stats import Gram
from sparsekit.sweep import solve
from sparsekit.sweep.recursion import Recursion

SHAPES = (
    (16, 64), (64, 64), (16, 128), (128, 128), (64, 512), (256, 256), (512, 256), (256, 1024), (768, 768),
    (2048, 768), (256, 2048), (768, 2048), (2048, 2048),
)  # fmt: skip
TOKENS = 2048
METHOD = {
    "sparsegpt 2:4": ("sparsegpt", {"pattern": Pattern(2, 4), "group_order": "natural"}),
    "gptq int4 g128": ("gptq", {"bits": 4, "act_order": "none"}),
}
LEAST = 3  # rounds of a case


class Case:
    """One weight and its Gram matrix.

    Args:
        rows: Of the weight.
        columns: Of the weight.
    """

    def __init__(self, rows: int, columns: int) -> None:
        torch.manual_seed(0)
        self.gram = Gram.empty(columns, torch.device("cpu"))
        self.gram.update(torch.randn(2 * columns, columns) @ torch.randn(columns, columns))
        self.weight = torch.randn(rows, columns)

    def ours(self, job: str) -> Tensor:
        """The method, with nothing known from a run before."""
        self.gram._roots.clear()
        name, arguments = METHOD[job]
        if name == "gptq":
            arguments = arguments | {"group_size": min(128, self.weight.shape[1])}
        result: Tensor = METHODS.get(name).function(LinearState("a", self.weight), self.gram, **arguments).weight
        return result

    def restated(self, job: str) -> Tensor:
        """The recursion."""
        recursion = Recursion(self.weight.clone())
        recursion.gram = 2 * self.gram.matrix
        return recursion.pruned(2, 4) if job == "sparsegpt 2:4" else recursion.quantized(4)

    def authors(self, side: Callable[[nn.Linear], Any]) -> Tensor:
        """One of their classes."""
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False)
        linear.weight = nn.Parameter(self.weight.clone(), requires_grad=False)
        theirs = side(linear)
        theirs.solver.H, theirs.solver.nsamples = 2 * self.gram.matrix, 1
        theirs.solve()
        return linear.weight.detach()


def rounds(sides: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of every side, in turn, as often as `seconds` allow."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    end = time.perf_counter() + seconds
    for side in sides.values():
        side()
    while len(found[next(iter(sides))]) < LEAST or time.perf_counter() < end:
        for name, side in sides.items():
            start = clock()
            side()
            found[name].append(clock() - start)
    return found


def row_of(case: str, rows: int, columns: int, times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Medians, and how many times as long as ours each other side took."""
    row: dict[str, Any] = {"case": case, "rows": rows, "columns": columns, "rounds": len(times["sparsekit"])}
    row["seconds"] = {name: float(f"{statistics.median(each):.4g}") for name, each in times.items()}
    row["ratios"] = {}
    for name, theirs in times.items():
        if name != "sparsekit":
            ratios = [one / other for one, other in zip(theirs, times["sparsekit"], strict=True)]
            row["ratios"][name] = round(statistics.median(ratios), 2)
    return row


def cases(others: Mapping[str, Mapping[str, Any]], seconds: float) -> Iterator[dict[str, Any]]:
    """Every case of one number of threads."""
    for rows, columns in SHAPES:
        case = Case(rows, columns)
        for job in METHOD:
            sides: dict[str, Callable[[], Tensor]] = {
                "sparsekit": partial(case.ours, job),
                "recursion": partial(case.restated, job),
                **{name: partial(case.authors, side) for name, side in others.get(job, {}).items()},
            }
            row = row_of(job, rows, columns, rounds(sides, seconds))
            ours, theirs = case.ours(job), case.restated(job)
            row["zeros_that_agree"] = round(float(((ours == 0) == (theirs == 0)).float().mean()), 6)
            row["error_ratio"] = float(
                case.gram.energy(case.weight - ours) / case.gram.energy(case.weight - theirs).clamp(min=1e-30)
            )
            yield row
    for columns in sorted({columns for _, columns in SHAPES}):
        x, gram = torch.randn(TOKENS, columns), Gram.empty(columns, torch.device("cpu"))
        recursion = Recursion(torch.empty(1, columns))
        adding = {"sparsekit": partial(gram.update, x), "recursion": partial(recursion.add, x)}
        yield row_of("gram of 2048 tokens", TOKENS, columns, rounds(adding, seconds))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a case; more where three rounds take longer")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sparsegpt", type=Path, help="a copy of IST-DASLab/sparsegpt")
    parser.add_argument("--autogptq", type=Path, help="a copy of AutoGPTQ")
    given = parser.parse_args()
    others, found = authors(given.sparsegpt, given.autogptq), []
    for threads in given.threads:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            for row in cases(others, given.seconds):
                found.append({"threads": threads, **row})
                told = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in row["ratios"].items())
                size = f"{row['rows']:5} x {row['columns']:4}"
                print(
                    f"{threads} threads  {row['case']:20} {size}  {row['seconds']['sparsekit']:.4f} s  {told}",
                    flush=True,
                )
    slower = [row for row in found if min(row["ratios"].values()) < 1]
    print(f"slower in {len(slower)} of {len(found)} cases", *slower, sep="\n")
    if given.out:
        environment = {"torch": torch.__version__, "machine": platform.machine(), "cpu": cpu_name()}
        data = {"environment": environment, "sub_block": solve.SUB_BLOCK, "rows": found}
        given.out.write_text(json.dumps(data, indent=1) + "\n")


def cpu_name() -> str:
    """The processor's name, on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
