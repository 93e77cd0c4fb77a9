"""The deploy card: what a compressed model takes and how fast it runs here, beside the dense one.

Bytes are those of the files, memory and speed are measured on this device with the model's own forward,
no serving engine: prompts of some tokens at batch 1, 16 and 256, and nothing else. On CUDA the 2:4 linears
are tried as torch's semi-structured tensors too, and integers from their packed form, where one token after
another is measured as well. Where nothing got faster, the card says so.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from sparsekit.evaluation.decoding import STEPS, figure, packed_in_place, tokens_per_second
from sparsekit.inference.load import bytes_of
from sparsekit.models.chain import Chain
from sparsekit.pattern import Pattern
from sparsekit.reporting.numerals import megabytes

BATCHES = {"cuda": (1, 16, 256), "cpu": (1, 16)}  # 256 prompts take a CPU minutes and tell nothing new
LENGTH = {"cuda": 128, "cpu": 32}  # tokens of a prompt
SECONDS = {"cuda": 0.3, "cpu": 1.0}  # for one figure
RUNS = 20  # at most, for one figure
DENSE, PROMPTS, DECODING = "dense", "prompts", "decoding"
NOTHING = {
    "torch semi-structured": "No linear could be a semi-structured tensor: none holds 2:4 in a fitting shape or type.",
    "packed": "No linear holds integers that sparsekit's kernel takes, so it was not tried.",
}
FASTER = 1.03  # a ratio below this is no speed-up worth the word

Record = Mapping[str, Any]
_Held = Callable[[Chain], AbstractContextManager[str | None]]  # yields another name for the form, or "" or None


@dataclass(slots=True)
class DenseFigures:
    """What the dense model takes and how fast it is here: measured once for all that is held against it.

    Attributes:
        memory: Bytes of its weights; 0 before it was measured.
        speeds: Tokens a second by work and batch.
        notes: What went out of the ordinary.
    """

    memory: int = 0
    speeds: dict[tuple[str, int], float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def deploy_card(
    dense: Chain,
    final: Chain,
    exports: Sequence[Record],
    progress: Callable[[int, int], None],
    known: DenseFigures | None = None,
) -> dict[str, Any]:
    """Measure the dense and the compressed model, one after the other on the same prompts.

    Args:
        dense: The original.
        final: The model as the run leaves it.
        exports: As the report has them, for the bytes.
        progress: Called with (figures done, figures in all).
        known: Figures of the dense model on this device, used if they are there and filled in if not.
    Returns:
        `bytes`, `memory`, `speed` (one row for each form and batch) and `notes`, plain sentences.
    """
    view, kind = final.view, final.view.device.type
    notes = [f"Speed: whole forwards of {LENGTH[kind]} tokens a prompt on {_device(view.device)}, no serving engine."]
    forms: list[tuple[str, _Held]] = [("zeros in place", _as_it_is)]
    if kind == "cuda":
        notes.append(f"Decoding: {STEPS} tokens behind such a prompt, one after another.")
        forms += [("torch semi-structured", _semi_structured), ("packed", packed_in_place)]  # the last unloads weights
    else:
        notes.append("torch's semi-structured tensors need CUDA, so they were not tried.")
        notes.append("sparsekit's kernel for packed integers needs CUDA, so it was not tried.")
    own = known or DenseFigures()
    if own.memory:
        notes.append("The dense model was measured once for all arms.")
    found = _Figures(own, (len(forms) + (not own.memory)) * len(BATCHES[kind]), progress)
    original: list[tuple[str, _Held]] = [] if own.memory else [(DENSE, _as_it_is)]
    for chain, tried in ((dense, original), (final, forms)):
        if not tried:
            continue
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
    notes += [*own.notes, *found.notes]
    files = {export["format"]: export["bytes"]["files"] for export in exports}
    told_notes = [*notes, *verdicts(found.rows, found.memory, exports)]
    return {"bytes": files, "memory": found.memory, "speed": found.rows, "notes": told_notes}


class _Figures:
    """What is measured, form by form; the dense one comes first and is what the others are held against."""

    def __init__(self, dense: DenseFigures, total: int, progress: Callable[[int, int], None]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.memory: dict[str, int] = {DENSE: dense.memory} if dense.memory else {}
        self._dense = dense
        self._done, self._total, self._progress = 0, total, progress

    def measure(self, form: str, chain: Chain, forward: Callable[[Tensor], Tensor], name: str) -> None:
        """Measure one form at every batch; `name` is what it is a form of."""
        view = chain.view
        kind = view.device.type
        size = bytes_of(view.module) if name == "packed" else _resident(view.module)
        self.memory[form] = size
        for batch in BATCHES[kind]:
            self._add(form, PROMPTS, batch, _tokens_per_second(forward, batch, view))
            if kind == "cuda" and name in (DENSE, "packed"):
                speed, eager = tokens_per_second(chain, batch, LENGTH[kind])
                self._add(form, DECODING, batch, speed)
                if eager and batch == 1:
                    said = self._dense.notes if form == DENSE else self.notes
                    said.append(f"{form}: decoded operation by operation, {eager}.")
            self._done += 1
            self._progress(self._done, self._total)
        if form == DENSE:
            self._dense.memory = size  # the last thing: figures with a memory are whole

    def _add(self, form: str, work: str, batch: int, speed: float) -> None:
        if form == DENSE:
            self._dense.speeds[work, batch] = speed
        else:
            self.rows.append(figure(form, batch, self._dense.speeds[work, batch], speed, work))


def verdicts(rows: Sequence[Record], memory: Mapping[str, int], exports: Sequence[Record]) -> Iterator[str]:
    """What was gained and what was not, in plain sentences."""
    for name, work in dict.fromkeys((row["form"], row.get("work", PROMPTS)) for row in rows):
        own = [row for row in rows if (row["form"], row.get("work", PROMPTS)) == (name, work)]
        label = name if work == PROMPTS else f"{name}, {work}"
        faster = [row for row in own if row["ratio"] >= FASTER]
        if not faster:
            best = max(row["ratio"] for row in own)
            yield f"{label}: no speed-up here, {best:.2f} times the dense model's at best."
        else:
            told = ", ".join(f"{row['ratio']:.2f} times at batch {row['batch']}" for row in faster)
            slow = [str(row["batch"]) for row in own if row not in faster]
            rest = f"; no speed-up here at batch {', '.join(slow)}" if slow else ""
            yield f"{label}: {told}{rest}."
        if work == PROMPTS and name in memory and memory[name] >= memory["dense"]:
            yield f"{name}: no less memory than the dense model, {megabytes(memory[name])} of weights."
    packed = [export["format"] for export in exports if export["bits_per_weight"] is not None]
    if packed and not any("sparsekit" in name for name in memory):
        listed = ", ".join(packed)
        yield f"The integers of the {listed} export were not run; that takes an engine with kernels for them."


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
