"""How much memory a step needs, part by part, worked out from sizes alone.

A step goes through moments: statistics are collected, a Gram matrix is factored, a layer is swept, a
gradient is taken. Each moment is a list of parts that are held at the same time, with the formula beside
the number; the peak of a step is its largest moment. Letters: P parameters, B parameters of the largest
block, N weights of the largest linear of a moment, n its inputs, d width of the hidden states, T tokens
of a forward, V vocabulary, c bytes of a computed value.

The numbers are bytes that the tensors of this code hold, counted in its source, plus the workspace cuBLAS
takes from the same allocator. On a CPU the process itself comes on top (`peak.resident_now`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsekit.evaluation.evaluate import CHUNK
from sparsekit.evaluation.scoring import EVALUATION_TOKENS
from sparsekit.models.shapes import BlockSizes, ModelSizes
from sparsekit.stats import Gram, InputNorm
from sparsekit.training.distill import chunk_rows
from sparsekit.training.schedule import MICRO_BATCH_TOKENS

WORKSPACE = 32 * 2**20  # cuBLAS's on Hopper, taken from torch's allocator at the first product
# Bytes an entry of a Gram matrix while it is factored. CPU: factor, identity, inverse and its turned copy in
# float64, the float32 result. CUDA takes the root: the matrix, its rows and its columns in sweep order.
FACTOR = {"cpu": 40, "cuda": 28}
FACTOR_KEPT = 4  # U or its root in float32, kept for the other linears of the group
SWEEP = {"gptq": 46, "sparsegpt": 38, "awq": 36}  # bytes a weight: values, error, codes, grids, mask, turned back
SCORE = 18  # bytes a weight of a method that scores and ranks: source, score, product, rank, mask
VERIFY = 20  # bytes a weight: before, after, change, change times Gram, their product
SAVED_WIDTHS, SAVED_OUTPUTS = 10, 1  # see `saved_for_backward`


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a moment: what it is, its formula, its bytes."""

    name: str
    formula: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Moment:
    """Parts that are held at the same time."""

    name: str
    parts: Sequence[Part]

    @property
    def bytes(self) -> int:
        """All of them."""
        return sum(part.bytes for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        parts = [{"name": part.name, "formula": part.formula, "bytes": part.bytes} for part in self.parts]
        return {"moment": self.name, "bytes": self.bytes, "parts": parts}


def peak(moments: Sequence[Moment]) -> Moment:
    """The largest moment."""
    return max(moments, key=lambda moment: moment.bytes)


def always(model: ModelSizes) -> list[Part]:
    """What lies on the device through the whole run."""
    parts = [Part("embeddings, head, final norm", "P outside the blocks · c", model.outside * model.computed)]
    return [*parts, Part("cuBLAS workspace", "32 MiB", WORKSPACE)] if model.cuda else parts


def forward_temporaries(model: ModelSizes, block: BlockSizes, tokens: int) -> Part:
    """What running one block holds at once: its input, the residual, and the widest group's in- and outputs."""
    c, widest = model.computed, 0
    for group in block.groups:
        into, outs = block.linears[group[0]][1], [block.linears[name][0] for name in group]
        widest = max(widest, into + sum(outs) + max(outs))
    norm = 3 * 4 * model.width if c < 4 else 0  # a norm in float32: its input, its square, its result
    held = 2 * model.width * c + max(widest * c, norm)
    return Part("forward of a block", "T · (2d + in, outs and result of the widest group) · c", tokens * held)


def statistic_bytes(kind: type[Any] | None, inputs: int) -> int:
    """One group's statistic."""
    if kind is Gram:
        return 4 * inputs * inputs + 4 * inputs
    return 4 * inputs if kind is InputNorm else 0


def update_temporaries(model: ModelSizes, kind: type[Any] | None, inputs: int, tokens: int) -> int:
    """What adding tokens to a statistic holds: x and |x| or x² in float32; on CUDA a Gram's product."""
    if kind is Gram and model.cuda:
        return 4 * inputs * inputs if model.computed < 4 else 0
    return (4 if model.computed >= 4 else 8) * tokens * inputs if kind is not None else 0


def walk_moments(
    model: ModelSizes,
    method: str,
    kind: type[Any] | None,
    *,
    samples: int,
    seq_len: int,
    on_device: bool,
    in_order: bool,
    waiting: int = 0,
) -> list[Moment]:
    """Moments of a step over blocks, on the device.

    Args:
        model: Sizes.
        method: Name, for what its solver holds.
        kind: Statistic it collects.
        samples: Calibration windows.
        seq_len: Tokens of a window.
        on_device: Whether the calibration's hidden states stay on the device.
        in_order: Groups are collected and solved one by one.
        waiting: Bytes of what the micro-batches hold meanwhile, when they wait for each group.
    """
    c, held, moments = model.computed, always(model), list[Moment]()
    tokens = model.micro_batch(samples, seq_len)
    if kind is not None and on_device:
        buffer = samples * seq_len * model.width * c
        held.append(Part("hidden states of all windows", "windows · length · d · c", buffer))
    if waiting:
        held.append(Part("micro-batches that wait for a group", "windows · length · (6d + n) · c", waiting))
    for block in _kinds(model.blocks):
        inputs = block.inputs()
        weights = Part("one block", "B · c", block.numel * c)
        counted = [max(inputs)] if in_order else inputs
        statistics = Part("statistics", "Σ 4n² a group (Gram)", sum(statistic_bytes(kind, n) for n in counted))
        if kind is not None:
            forward = forward_temporaries(model, block, tokens)
            moments.append(Moment("running a block", [*held, weights, statistics, forward]))
            widest = max(inputs)
            adding = (3 * model.width + widest) * c * tokens + update_temporaries(model, kind, widest, tokens)
            update = Part("adding to a statistic", "T · (3d + n) · c, and |x| in float32", adding)
            moments.append(Moment("collecting", [*held, weights, statistics, update]))
        resident = [weights] if in_order or method == "awq" else []
        if model.cuda and kind is not None:
            linear = sum(out * columns for out, columns in block.linears.values())
            resident.append(Part("values of its linears before and after, masks", "9B", 9 * linear))
        for name, parts in _solving(model, block, method, kind):
            moments.append(Moment(name, [*held, *resident, statistics, *parts]))
    return moments


def _solving(model: ModelSizes, block: BlockSizes, method: str, kind: type[Any] | None) -> list[tuple[str, list[Part]]]:
    """What a method holds while it works on the linears of a block."""
    found, kept = list[tuple[str, list[Part]]](), 0
    solves = kind is Gram and method in ("gptq", "sparsegpt")
    for group in block.groups:
        n = block.linears[group[0]][1]
        factors = Part("factors of earlier groups", "Σ 4n²", kept)
        if solves:
            each = FACTOR["cuda" if model.cuda else "cpu"]
            found.append(("factoring", [factors, Part("factor in float64", f"{each}n²", each * n * n)]))
            kept += FACTOR_KEPT * n * n
        size = max(block.linears[name][0] for name in group) * n
        own = Part("factors", "Σ 4n²", kept)
        each = SWEEP.get(method, SCORE)
        found.append(("solving a layer", [own, Part("one linear at work", f"{each}N", each * size)]))
        matrix = (8 if model.cuda else 4) * n * n if kind is Gram else 0
        error = Part("error of one linear", f"{VERIFY}N + a Gram matrix", VERIFY * size + matrix)
        found.append(("verifying", [own, error]))
    return found


def scoring_moments(model: ModelSizes, windows: int, seq_len: int, *, agreement: bool) -> list[Moment]:
    """Moments of scoring a text with the whole model on the device."""
    c, models = model.computed, 2 if agreement else 1
    batch = max(1, min(windows, EVALUATION_TOKENS["cuda" if model.cuda else "cpu"] // seq_len))
    tokens = batch * seq_len
    whole = Part("the whole model", "P in the blocks · c", (model.numel - model.outside) * c)
    twin = Part("the dense model beside it", "P · c", model.numel * c if agreement else 0)
    logits = Part("logits", "T · V · c for each model", models * tokens * model.vocabulary * c)
    # Each entry: a float32 copy, its log-softmax; with agreement a second one, the KL, the KL in float64.
    entry = (24 if agreement else 8) - (4 if c == 4 else 0)
    chunk = min(CHUNK, seq_len * model.vocabulary)
    wide = Part("logits of a chunk in float32", "8 bytes, with agreement 24, of 2^24 at most", entry * chunk)
    held = [*always(model), whole, twin]
    running = [*held, forward_temporaries(model, model.largest, tokens)]
    return [Moment("running the model", running), Moment("comparing logits", [*held, logits, wide])]


def saved_for_backward(model: ModelSizes, block: BlockSizes, tokens: int) -> int:
    """What one block keeps for its backward.

    Inputs of every group, outputs of every linear (q, k, v before and after rotation are two), both norms'
    inputs in float32 when computing in less, the activation's result: T · (10d + Σ outs + ...) · c.
    """
    outs = sum(out for out, _ in block.linears.values())
    inner = sum(into for into in block.inputs())
    return tokens * (SAVED_WIDTHS * model.width + SAVED_OUTPUTS * outs + inner) * model.computed


def training_moments(model: ModelSizes, settings: Mapping[str, Any], seq_len: int, micro_batch: int) -> list[Moment]:
    """Moments of AST, on the device.

    Args:
        model: Sizes.
        settings: The method's arguments.
        seq_len: Tokens of a window.
        micro_batch: Windows of a forward.
    """
    c, tokens = model.computed, micro_batch * seq_len
    sparse = sum(out * into for block in model.blocks for out, into in block.linears.values())
    plain = model.numel - sparse
    master = 4 if settings["masters"] == "float32" else 2
    moments = 8.0 if settings["states"] == "float32" else 2 + 2 * 4 / 256
    first = 1.0 if settings["states"] == "float32" else 1 / 8
    held = [
        *always(model),
        Part("student", "P · c", model.numel * c),
        Part("teacher", "P · c", model.numel * c),
        Part("dense weights", "sparse P · 4, others if c differs", master * (sparse + (plain if master != c else 0))),
        Part("moments", "8P in float32, 2.03P in float8", round(model.numel * moments)),
        Part("mask and first mask", "sparse P · 2, or 1.125 in float8", round(sparse * (1 + first))),
    ]
    again, whole = settings["checkpointing"], [saved_for_backward(model, block, tokens) for block in model.blocks]
    kept = [tokens * model.width * c] * len(model.blocks) if again else whole
    activations = Part("kept for the backward", "T · (10d + outs + ins) · c a block", sum(kept))
    block = Part("one block computed again", "as kept for one", max(whole) if again else 0)
    gradients = Part("gradients", "P · c", model.numel * c)
    earlier = [gradients] if settings["batch"] > micro_batch else []  # of the micro-batches before
    rows = chunk_rows(tokens, model.vocabulary, torch.device("cuda" if model.cuda else "cpu"))
    each = 3 * c if model.cuda else 2 * c + 24  # student, teacher, gradient; in float32 without a kernel
    chunk = min(rows, tokens) * model.vocabulary * each
    loss = Part("logits and loss of a chunk", "chunk · V · (3c, or 2c + 24)", chunk)
    head = model.vocabulary * model.width * c
    states = 3 * tokens * model.width * c
    hidden = Part("hidden states, gradients of them and of the head", "3Tdc + Vdc", states + head)
    ends = Part("kept for the first block", "T · (...) · c", max(kept))
    return [
        Moment("loss", [*held, *earlier, activations, hidden, loss]),
        Moment("backward", [*held, *earlier, activations, hidden, block]),
        Moment("end of the backward", [*held, gradients, ends, block]),
    ]


def host_of_walk(model: ModelSizes, process: int, *, hidden: int) -> Moment:
    """Host memory of a step over blocks on CUDA: two blocks read ahead and two on their way to the disk.

    They are page-locked, and torch rounds such memory up to powers of two: twice their bytes at most.
    """
    block = model.largest.numel
    return Moment(
        "writing a block",
        [
            Part("Python and its libraries", "measured now", process),
            Part("hidden states that do not fit the device", "windows · length · d · c", hidden),
            Part("blocks read ahead and written behind", "B · 8 stored", block * 8 * model.stored),
        ],
    )


def host_of_training(model: ModelSizes, process: int) -> Moment:
    """Host memory of a training step on CUDA: the chain's float32 weights, and the result's."""
    inside = model.numel - model.outside
    return Moment(
        "reading and writing the model",
        [
            Part("Python and its libraries", "measured now", process),
            Part("linears before and after in float32", "P inside · 8", 8 * inside),
            Part("one block on its way to disk", "B · (8 + 3 stored)", model.largest.numel * (8 + 3 * model.stored)),
        ],
    )


def train_micro_batch(model: ModelSizes, batch: int, seq_len: int) -> int:
    """Windows of a training forward when the recipe does not say."""
    most = max(1, min(batch, MICRO_BATCH_TOKENS["cuda" if model.cuda else "cpu"] // seq_len))
    return next(size for size in range(most, 0, -1) if batch % size == 0)


def _kinds(blocks: Sequence[BlockSizes]) -> list[BlockSizes]:
    """One block of each kind: those of the same sizes need the same."""
    return list({(*sorted(block.linears.values()), block.other): block for block in blocks}.values())
