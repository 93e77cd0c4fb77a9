"""Part `7b` of oneshot.py: a whole model of random weights from disk to packed integers on disk, phase by phase.

Read, SparseGPT 2:4, GPTQ int4, GPTQ's layout written and read back. Writing the random model is not part of the
time. What a phase waited for the threads that read and write is told beside it: the rest is the device's and
Python's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from load import OWN, watch, write_model
from torch import Tensor

from sparsekit.blockwise import streaming
from sparsekit.blockwise.holding import HOLDINGS, Memory
from sparsekit.blockwise.streaming import Ahead, Behind
from sparsekit.blockwise.walk import Walk
from sparsekit.checkpoint import HOST, StepStore
from sparsekit.formats import FORMATS
from sparsekit.interchange.export import export_as
from sparsekit.models.chain import Chain
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.planning.peak import peak_since, start_peak
from sparsekit.registry import METHODS

STEPS: dict[str, dict[str, Any]] = {"sparsegpt": {"pattern": Pattern(2, 4)}, "gptq": {"bits": 4, "group_size": 128}}


@dataclass(slots=True)
class Phases:
    """Seconds, peaks and waits of each phase.

    Attributes:
        device: Where the work is.
        found: By name.
    """

    device: torch.device
    found: dict[str, dict[str, float]] = field(default_factory=dict)
    _waits: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time some work, the device's included."""
        self._waits = {"waited_for_reading": 0.0, "waited_for_writing": 0.0}
        fresh, start = start_peak(self.device), time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        peak = peak_since(self.device, fresh)[0] / 1e9
        row = {"seconds": seconds, "peak_gb": peak, **self._waits}
        self.found[name] = {key: round(value, 3) for key, value in row.items()}
        print(f"{name:12}", json.dumps(self.found[name]), flush=True)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note how long the threads of `streaming` are waited for."""
        read, settle = Ahead._taken, Behind._settle

        def noted(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any) -> Any:
                start = time.perf_counter()
                try:
                    return call(*arguments)
                finally:
                    self._waits[what] += time.perf_counter() - start

            return wrapped

        streaming.Ahead._taken = noted("waited_for_reading", read)  # type: ignore[method-assign]
        streaming.Behind._settle = noted("waited_for_writing", settle)  # type: ignore[method-assign]
        try:
            yield
        finally:
            streaming.Ahead._taken, streaming.Behind._settle = read, settle  # type: ignore[method-assign]


def step(
    view: ModelView, chain: Chain, method: str, store: StepStore, tokens: Tensor, schedule: str, memory: Memory
) -> Chain:
    """One step as `run` does it."""
    holding = HOLDINGS[memory]
    where = view.device if holding.blocks else HOST
    names = [name for index in range(len(view.blocks)) for name in view.linears(index)]
    with torch.inference_mode(), Ahead(chain.stored, where, len(view.blocks)) as blocks:
        Walk(
            view=view,
            method=METHODS.get(method),
            arguments=STEPS[method],
            selected=frozenset(names),
            patterns={name: Pattern(2, 4) for name in names},
            before=blocks,
            store=store,
            tokens=tokens,
            schedule=schedule,
            progress=lambda done, total: None,
            holding=holding,
        ).run()
        store.finish(method, {})
    return chain.then(store)


@contextlib.contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Gigabytes of the host that are this process's own, at most; filled in at the end."""
    found: dict[str, float] = {}
    peaks, over, most = dict.fromkeys(("VmHWM", *OWN), 0), threading.Event(), 0

    def look() -> None:
        nonlocal most
        while not over.wait(0.02):
            most = max(most, watch(os.getpid(), peaks))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        found |= {name: round(value / 1e9, 2) for name, value in (*peaks.items(), ("own", most))}


def model(
    work: Path, shape: str, blocks: int | None, samples: int, length: int, schedule: str, memory: Memory
) -> dict[str, Any]:
    """Write a random model of a shape of load.py into `work`, and take it through."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    written = write_model(shape, blocks, work / "model", where)
    print("written", json.dumps(written), flush=True)
    shutil.rmtree(work / "steps", ignore_errors=True)
    shutil.rmtree(work / "export", ignore_errors=True)
    phases = Phases(torch.device(where))
    tokens = torch.randint(0, 8192, (samples, length), generator=torch.Generator().manual_seed(0))
    with phases.watching(), watched() as host:
        with phases.phase("open"):
            view = ModelView.open(work / "model", device=where)
            chain = Chain(view)
        for name in STEPS:
            store = StepStore(work / "steps" / name, view.dtype)
            with phases.phase(name):
                chain = step(view, chain, name, store, tokens, schedule, memory)
        with phases.phase("export"), Ahead(chain.stored, view.device, len(view.blocks)) as stored:
            names = [name for index in range(len(view.blocks)) for name in view.linears(index)]
            export_as(FORMATS["gptq"], view, stored, work / "export", patterns=dict.fromkeys(names, Pattern(2, 4)))
    total = round(sum(row["seconds"] for row in phases.found.values()), 2)
    size = sum(path.stat().st_size for path in (work / "export").glob("*.safetensors"))
    print(f"all phases {total} s, packed {size / 1e9:.2f} GB, host {host}", flush=True)
    about = {"shape": shape, "blocks": written["blocks"], "samples": samples, "length": length}
    return {
        **about,
        "schedule": schedule,
        "memory": memory,
        "phases": phases.found,
        "seconds": total,
        "packed_bytes": size,
        "host_peaks_gb": host,
    }
