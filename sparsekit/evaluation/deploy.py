"""The deploy card: what a compressed model takes and how fast it runs here, beside the dense one.

Bytes are those of the files, memory and speed are measured on this device with the model's own forward,
no serving engine: prompts of some tokens at batch 1, 16 and 256, and nothing else. On CUDA the 2:4 linears
are tried as torch's semi-structured tensors too. Where nothing got faster, the card says so.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from sparsekit.models.chain import Chain
from sparsekit.pattern import Pattern
from sparsekit.reporting.numerals import megabytes

BATCHES = {"cuda": (1, 16, 256), "cpu": (1, 16)}  # 256 prompts take a CPU minutes and tell nothing new
LENGTH = {"cuda": 128, "cpu": 32}  # tokens of a prompt
SECONDS = 1.0  # for one figure
RUNS = 20  # at most, for one figure
FASTER = 1.03  # a ratio below this is no speed-up worth the word

Record = Mapping[str, Any]


def deploy_card(
    dense: Chain, final: Chain, exports: Sequence[Record], progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Measure the dense and the compressed model, one after the other on the same prompts.

    Args:
        dense: The original.
        final: The model as the run leaves it.
        exports: As the report has them, for the bytes.
        progress: Called with (figures done, figures in all).
    Returns:
        `bytes`, `memory`, `speed` (one row for each form and batch) and `notes`, plain sentences.
    """
    view, kind = final.view, final.view.device.type
    forms: list[tuple[str, Chain, bool]] = [("dense", dense, False), ("zeros in place", final, False)]
    notes = [f"Speed: whole forwards of {LENGTH[kind]} tokens a prompt on {_device(view.device)}, no serving engine."]
    if kind == "cuda":
        forms.append(("torch semi-structured", final, True))
    else:
        notes.append("torch's semi-structured tensors need CUDA, so they were not tried.")
    speeds: dict[str, dict[int, float]] = {}
    memory: dict[str, int] = {}
    done, total = 0, len(forms) * len(BATCHES[kind])
    for name, chain, packed in forms:
        with chain.forward() as forward, _packed(view.module, packed) as count:
            if packed and not count:
                notes.append("No linear could be a semi-structured tensor: none holds 2:4 in a fitting shape or type.")
                break
            if any(parameter.is_meta for parameter in view.module.parameters()):
                notes.append("The model does not fit the device, so its blocks were streamed; no speed is given.")
                break
            memory[name] = _resident(view.module)
            if packed:
                notes.append(f"{count} linears were turned into semi-structured tensors.")
            speeds[name] = {}
            for batch in BATCHES[kind]:
                speeds[name][batch] = _tokens_per_second(forward, batch, view)
                done += 1
                progress(done, total)
    rows = [
        {
            "form": name,
            "batch": batch,
            "dense": speeds["dense"][batch],
            "tokens_per_second": speed,
            "ratio": speed / speeds["dense"][batch],
        }
        for name, by_batch in speeds.items()
        if name != "dense"
        for batch, speed in by_batch.items()
    ]
    files = {export["format"]: export["bytes"]["files"] for export in exports}
    return {"bytes": files, "memory": memory, "speed": rows, "notes": [*notes, *verdicts(rows, memory, exports)]}


def verdicts(rows: Sequence[Record], memory: Mapping[str, int], exports: Sequence[Record]) -> Iterator[str]:
    """What was gained and what was not, in plain sentences."""
    for name in dict.fromkeys(row["form"] for row in rows):
        own = [row for row in rows if row["form"] == name]
        faster = [row for row in own if row["ratio"] >= FASTER]
        if not faster:
            best = max(row["ratio"] for row in own)
            yield f"{name}: no speed-up here, {best:.2f} times the dense model's at best."
        else:
            told = ", ".join(f"{row['ratio']:.2f} times at batch {row['batch']}" for row in faster)
            slow = [str(row["batch"]) for row in own if row not in faster]
            rest = f"; no speed-up here at batch {', '.join(slow)}" if slow else ""
            yield f"{name}: {told}{rest}."
        if name in memory and memory[name] >= memory["dense"]:
            yield f"{name}: no less memory than the dense model, {megabytes(memory[name])} of weights."
    packed = [export["format"] for export in exports if export["bits_per_weight"] is not None]
    if packed:
        listed = ", ".join(packed)
        yield f"The integers of the {listed} export were not run; that takes an engine with kernels for them."


@contextmanager
def _packed(module: nn.Module, wanted: bool) -> Iterator[int]:
    """Hold the 2:4 linears as semi-structured tensors; yields how many there are."""
    kept: list[tuple[nn.Linear, Tensor]] = []
    for linear in module.modules() if wanted else ():
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
        yield len(kept)
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
        if run and time.perf_counter() - begun > SECONDS:
            break
    return tokens.numel() / best


def _device(device: torch.device) -> str:
    return "this CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
