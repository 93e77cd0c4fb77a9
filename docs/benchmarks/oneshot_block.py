"""Part `block` of oneshot.py: a whole block by sparsekit, by the recursion and by the authors' classes."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from device_time import profiled
from rich.console import Console
from torch import Tensor, nn

from sparsekit import bench
from sparsekit.terminal.bench import bench_table


class SparseGptClass:
    """The authors' SparseGPT class as a `bench.Side`."""

    def __init__(self, linear: nn.Linear, module: ModuleType) -> None:
        self._linear = linear
        self.solver = module.SparseGPT(linear)

    def add(self, x: Tensor) -> None:
        """Take a sample's inputs."""
        self.solver.add_batch(x.unsqueeze(0), x)

    def solve(self) -> None:
        """Prune in place."""
        with contextlib.redirect_stdout(io.StringIO()), on_any_device():  # it prints a line for each layer
            self.solver.fasterprune(0.0, prunen=2, prunem=4, percdamp=0.01, blocksize=128)
        self.solver.free()


class AutoGptqClass:
    """AutoGPTQ's GPTQ class as a `bench.Side`."""

    def __init__(self, linear: nn.Linear, module: ModuleType) -> None:
        self.solver = module.GPTQ(linear)
        self.solver.quantizer.configure(4, perchannel=True, sym=True, mse=False)

    def add(self, x: Tensor) -> None:
        """Take a sample's inputs."""
        self.solver.add_batch(x.unsqueeze(0), x)

    def solve(self) -> None:
        """Quantize in place."""
        with on_any_device():
            self.solver.fasterquant(percdamp=0.01, group_size=128, actorder=False, static_groups=False)
        self.solver.free()


@contextlib.contextmanager
def on_any_device() -> Iterator[None]:
    """Let classes that wait for CUDA, whatever the device, run on a CPU too."""
    if torch.cuda.is_available():
        yield
        return
    with mock.patch.object(torch.cuda, "synchronize", return_value=None):
        yield


def package(name: str, directory: Path) -> None:
    """A package whose modules can be imported without running its __init__."""
    module = ModuleType(name)
    module.__path__ = [str(directory)]  # type: ignore[attr-defined]
    sys.modules[name] = module


def authors(
    sparsegpt: Path | None, autogptq: Path | None
) -> dict[str, dict[str, Callable[[nn.Linear], SparseGptClass | AutoGptqClass]]]:
    """The authors' classes by job and name, as far as their files are there."""
    others: dict[str, dict[str, Callable[[nn.Linear], SparseGptClass | AutoGptqClass]]] = {}
    if sparsegpt is not None:
        package("authors_sparsegpt", sparsegpt)
        sys.path.insert(0, str(sparsegpt))  # its modules import one another by plain names
        module = importlib.import_module("authors_sparsegpt.sparsegpt")
        others["sparsegpt 2:4"] = {"SparseGPT class": partial(SparseGptClass, module=module)}
    if autogptq is not None:
        package("auto_gptq", autogptq / "auto_gptq")
        package("auto_gptq.quantization", autogptq / "auto_gptq" / "quantization")
        module = importlib.import_module("auto_gptq.quantization.gptq")
        others["gptq int4 g128"] = {"AutoGPTQ class": partial(AutoGptqClass, module=module)}
    return others


def block(
    sparsegpt: Path | None,
    autogptq: Path | None,
    small: bool,
    theirs: int,
    recursion: bool,
    limit: float,
    told: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The whole block; the authors' classes after ours if they are there, and the recursion last if asked for."""
    others = authors(sparsegpt, autogptq)
    console = Console(width=120)
    shape = bench.SMALL if small else bench.LLAMA_7B
    result: dict[str, Any] = {"shape": asdict(shape)}

    def so_far(found: dict[str, list[dict[str, Any]]]) -> None:
        job, rows = list(found.items())[-1]
        print(f"{job:15}", json.dumps({key: value for key, value in rows[-1].items() if key != "peak"}), flush=True)
        told(result | {"jobs": found})

    result["jobs"] = bench.run_bench(
        shape,
        others=others,
        theirs=theirs,
        recursion=recursion,
        limit=limit,
        told=lambda name, rows: console.print(bench_table(name, rows)),
        so_far=so_far,
    )
    told(result)
    return result | {"kernels": phases(shape) if torch.cuda.is_available() else {}}


def phases(shape: bench.Shape) -> dict[str, list[str]]:
    """The kernels of our side, both schedules of SparseGPT."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        one = bench.Bench(shape, "cuda", Path(directory))
        for schedule in bench.SCHEDULES:
            call = partial(one.ours, bench.JOBS["sparsegpt 2:4"], schedule)
            call()
            torch.cuda.reset_peak_memory_stats()
            resting = torch.cuda.memory_allocated()
            found[schedule] = profiled(call, 24)
            peak = (torch.cuda.max_memory_allocated() - resting) / 2**30
            print(f"{schedule}: {peak:.2f} GiB above {resting / 2**30:.2f}")
            for line in found[schedule]:
                print("   ", line)
    return found
