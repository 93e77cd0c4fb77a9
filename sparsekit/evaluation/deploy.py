"""The deploy card: what a compressed model takes and how fast it runs here, beside the dense one.

Bytes are those of the files, memory and speed are measured on this device with the model's own forward,
no serving engine: prompts of some tokens at batch 1, 16 and 256, and nothing else. On CUDA the 2:4 linears
are tried as torch's semi-structured tensors too, and integers from their packed form, where one token after
another is measured as well. The dense model is measured before and after the others and its faster
time counts: how far the two lie apart is what a ratio here can be off by. What of it is a gain, the report says
(reporting/speed.py).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from sparsekit.evaluation.decoding import STEPS, figure, packed_in_place, tokens_per_second
from sparsekit.inference.load import bytes_of
from sparsekit.models.chain import Chain
from sparsekit.pattern import Pattern
from sparsekit.reporting.speed import DENSE, PROMPTS

BATCHES = {"cuda": (1, 16, 256), "cpu": (1, 16)}
LENGTH = {"cuda": 128, "cpu": 32}  # tokens of a prompt
SECONDS = {"cuda": 0.3, "cpu": 1.0}  # for one figure
RUNS = 20  # at most, for one figure
DECODING = "decoding"
NOTHING = {
    "torch semi-structured": "No linear could be a semi-structured tensor: none holds 2:4 in a fitting shape or type.",
    "packed": "No linear holds integers that sparsekit's kernel takes, so it was not tried.",
}

Record = Mapping[str, Any]
_Held = Callable[[Chain], AbstractContextManager[str | None]]  # yields another name for the form, or "" or None


def deploy_card(
    dense: Chain, final: Chain, exports: Sequence[Record], progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Measure the dense model, the compressed one, and the dense one again, on the same prompts.

    Args:
        dense: The original.
        final: The model as the run leaves it.
        exports: As the report has them, for the bytes.
        progress: Called with (figures done, figures in all).
    Returns:
        `bytes`, `memory`, `speed` (one row for each form, work and batch) and `notes`: how it was measured and what was
        not tried, in plain sentences.
    """
    view, kind = final.view, final.view.device.type
    notes = [f"Speed: whole forwards of {LENGTH[kind]} tokens a prompt on {_device(view.device)}, no serving engine."]
    forms: list[tuple[str, _Held]] = [("zeros in place", _as_it_is)]
    if kind == "cuda":
        notes.append(f"Decoding: {STEPS} tokens behind such a prompt, one after another.")
        forms += [("torch semi-structured", _semi_structured), ("packed", packed_in_place)]  # the last unloads weights
    else:
        notes.append("Batch 256 was left out: it takes a CPU minutes and tells nothing new.")
        notes.append("torch's semi-structured tensors need CUDA, so they were not tried.")
        notes.append("sparsekit's kernel for packed integers needs CUDA, so it was not tried.")
    original: list[tuple[str, _Held]] = [(DENSE, _as_it_is)]
    found = _Figures((2 + len(forms)) * len(BATCHES[kind]), progress)
    for chain, tried in ((dense, original), (final, forms), (dense, original)):
        with chain.forward() as forward:
            if any(parameter.is_meta for parameter in view.module.parameters()):
                notes.append("The model does not fit the device, so its blocks were streamed; no speed is given.")
                break
            for name, held in tried:
                with held(chain) as told:
                    if told is None:
                        notes.append(NOTHING[name])
                    else:
                        found.measure(told or name, chain, forward, name)
    files = {export["format"]: export["bytes"]["files"] for export in exports}
    notes += [*found.notes, *_not_run(found.memory, exports)]
    return {"bytes": files, "memory": found.memory, "speed": found.rows(), "notes": notes}


def _not_run(forms: Iterable[str], exports: Sequence[Record]) -> Iterator[str]:
    """That integers were exported and no form runs them."""
    packed = [export["format"] for export in exports if export["bits_per_weight"] is not None]
    if packed and not any("sparsekit" in name for name in forms):
        listed = ", ".join(packed)
        yield f"The integers of the {listed} export were not run; that takes an engine with kernels for them."


class _Figures:
    """What is measured: tokens a second by form, work and batch; what was measured twice has two."""

    def __init__(self, total: int, progress: Callable[[int, int], None]) -> None:
        self.notes: list[str] = []
        self.memory: dict[str, int] = {}
        self._speeds: dict[tuple[str, str, int], list[float]] = {}
        self._done, self._total, self._progress = 0, total, progress

    def measure(self, form: str, chain: Chain, forward: Callable[[Tensor], Tensor], name: str) -> None:
        """Measure one form at every batch; `name` is what it is a form of."""
        view, again = chain.view, form in self.memory
        kind = view.device.type
        self.memory[form] = bytes_of(view.module) if name == "packed" else _resident(view.module)
        for batch in BATCHES[kind]:
            self._add(form, PROMPTS, batch, _tokens_per_second(forward, batch, view))
            if kind == "cuda" and name in (DENSE, "packed"):
                speed, eager = tokens_per_second(chain, batch, LENGTH[kind])
                self._add(form, DECODING, batch, speed)
                if eager and batch == 1 and not again:
                    self.notes.append(f"{form}: decoded operation by operation, {eager}.")
            self._done += 1
            self._progress(self._done, self._total)

    def _add(self, form: str, work: str, batch: int, speed: float) -> None:
        self._speeds.setdefault((form, work, batch), []).append(speed)

    def rows(self) -> list[dict[str, Any]]:
        """Every form beside the dense model."""
        return [
            figure(form, batch, self._speeds[DENSE, work, batch], max(speeds), work)
            for (form, work, batch), speeds in self._speeds.items()
            if form != DENSE
        ]


@contextmanager
def _as_it_is(chain: Chain) -> Iterator[str]:
    yield ""


@contextmanager
def _semi_structured(chain: Chain) -> Iterator[str | None]:
    """Hold the 2:4 linears as semi-structured tensors; None if there is none."""
    kept: list[tuple[nn.Linear, Tensor]] = []
    for linear in chain.view.module.modules():
        if isinstance(linear, nn.Linear) and _fits(linear.weight):
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor")  # a prototype
                    sparse = to_sparse_semi_structured(linear.weight.detach())
            except (RuntimeError, ValueError):  # a shape or dtype its kernels do not take
                continue
            kept.append((linear, linear.weight))
            linear.weight = nn.Parameter(sparse, requires_grad=False)
    try:
        yield "" if kept else None
    finally:
        for linear, original in kept:
            linear.weight = nn.Parameter(original, requires_grad=False)


def _fits(weight: Tensor) -> bool:
    """Whether a weight holds 2:4 and is of a dtype the kernels know."""
    half = weight.dtype in (torch.float16, torch.bfloat16)
    sparse = half and weight.shape[1] % 4 == 0 and Pattern(2, 4).violations(weight) == 0
    return sparse and bool((weight == 0).any())


def _resident(module: nn.Module) -> int:
    """Bytes of the weights in memory, tied ones once."""
    total = 0
    for parameter in module.parameters():
        data = parameter.data
        parts = [data.packed, data.meta] if isinstance(data, SparseSemiStructuredTensor) else [data]
        total += sum(part.numel() * part.element_size() for part in parts if part is not None)
    return total


def _tokens_per_second(forward: Callable[[Tensor], Tensor], batch: int, view: Any) -> float:
    """Tokens of prompts read in a second, from the fastest of some forwards."""
    kind = view.device.type
    vocabulary = view.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (batch, LENGTH[kind]), generator=generator).to(view.device)
    best, begun = float("inf"), time.perf_counter()
    for run in range(RUNS + 1):  # the first is a warm-up
        start = time.perf_counter()
        forward(tokens)
        if kind == "cuda":
            torch.cuda.synchronize(view.device)
        if run:
            best = min(best, time.perf_counter() - start)
        if run and time.perf_counter() - begun > SECONDS[kind]:
            break
    return tokens.numel() / best


def _device(device: torch.device) -> str:
    return "this CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
