"""How much memory a step needs, part by part, worked out from sizes alone.

A step goes through moments: statistics are collected, a Gram matrix is factored, a layer is swept, a
gradient is taken. Each moment is a list of parts that are held at the same time, with the formula beside
the number; the peak of a step is its largest moment. Letters: P parameters, B parameters of the largest
block, N weights of the largest linear of a moment, n its inputs, d width of the hidden states, T tokens
of a forward, V vocabulary, c bytes of a computed value.

The numbers are bytes that the tensors of this code hold, counted in its source, plus the workspace cuBLAS
takes from the same allocator. On a CPU the process itself comes on top (`peak.resident_now`). Training is
in `training_memory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsekit.blockwise.holding import HOLDINGS, Holding
from sparsekit.crossgram import CrossGram, Owed, Paired, StreamGram
from sparsekit.evaluation.evaluate import CHUNK
from sparsekit.evaluation.scoring import EVALUATION_TOKENS
from sparsekit.kernels.oneshot import WIDE
from sparsekit.models.shapes import BlockSizes, ModelSizes
from sparsekit.quadratic import PANEL
from sparsekit.stats import CORE_TOKENS, PRODUCT_BYTES, Gram, InputNorm
from sparsekit.sweep.obs import BLOCK
from sparsekit.sweep.panels import WIDTH

WORKSPACE = 32 * 2**20  # cuBLAS's on Hopper, taken from torch's allocator at a thread's first product
# Bytes an entry of a Gram matrix while its root is computed: the matrix in sweep order, in float64 the root over it.
FACTOR = 12
INVERSES = 28  # bytes an entry of the squares on a root's diagonal while they are inverted, in float64
FACTOR_KEPT = 4  # the root in float32, kept for the other linears of the group
PACKED = (4, 2)  # both, of a root in panels; besides them some panels: as gathered, in float64, divided
PANELS = 20  # bytes an entry of a panel
ROUNDED = 46  # bytes a weight of a sweep that rounds: codes and grids besides
SWEEP = {"gptq": ROUNDED, "sparsegpt": 38, "awq": 36}  # bytes a weight: values, error, codes, grids, mask, turned back
SCORE = 18  # bytes a weight of a method that scores and ranks: source, score, product, rank, mask
SENT = 4  # bytes a weight of a block's linears on CUDA, where they are from the start
RESULT = 5  # bytes a weight of what a block has become: values, and a mask or codes
VERIFY = 20  # bytes a weight: before, after, change, change times Gram, their product


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


def forward_temporaries(model: ModelSizes, block: BlockSizes, tokens: int, *, buffered: bool = False) -> Part:
    """What running one block holds at once: its input, the residual, and the widest group's in- and outputs.

    Args:
        model: Sizes.
        block: Of them.
        tokens: T.
        buffered: The block's input is a part of the buffer of all windows, which is counted already.
    """
    c = model.computed
    norm = 3 * 4 * model.width if c < 4 else 0  # a norm in float32: its input, its square, its result
    held = (1 if buffered else 2) * model.width * c + max(widest_of(block)[1] * c, norm)
    return Part("forward of a block", "T · (2d + in, outs and result of the widest group) · c", tokens * held)


def widest_of(block: BlockSizes) -> tuple[int, int]:
    """Which group of a block, in call order, holds most at once, and how many values for a token that is."""
    widths = []
    for group in block.groups:
        into, outs = block.linears[group[0]][1], [block.linears[name][0] for name in group]
        widths.append(into + sum(outs) + max(outs))
    index = max(range(len(widths)), key=widths.__getitem__)
    return index, widths[index]


def statistic_bytes(kind: type[Any] | None, inputs: int) -> int:
    """One group's statistic."""
    if kind is Gram:
        return 4 * inputs * inputs + 4 * inputs
    if kind in (CrossGram, StreamGram):  # what is owed has as many columns, and rarely more rows
        return (8 if kind is CrossGram else 12) * inputs * inputs + 4 * inputs
    return 4 * inputs if kind is InputNorm else 0


def paired_bytes(model: ModelSizes, kind: type[Any] | None, samples: int, seq_len: int) -> int:
    """What a statistic of two models has beside the hidden states: the other's, and what reaches its linears."""
    if kind is None or not issubclass(kind, Paired):
        return 0
    streams = 2 * model.width if issubclass(kind, Owed) else 0  # before attention and before the MLP
    return samples * seq_len * (model.width + sum(model.largest.inputs()) + streams) * model.computed


def update_temporaries(model: ModelSizes, kind: type[Any] | None, inputs: int, tokens: int) -> int:
    """What adding tokens to a statistic holds.

    CPU: x and |x| or x² in float32. CUDA: norms read x as it is; a Gram matrix of inputs that a kernel does
    not take is a stack of products of 128 tokens in float32, and their sum (`Gram._add_narrow`). What a
    plugin's statistic does is not known: x and x² in float64.
    """
    if kind is None:
        return 0
    if not model.cuda:
        return (4 if model.computed >= 4 else 8) * tokens * inputs
    if kind is InputNorm:
        return 0
    if kind in (CrossGram, StreamGram):  # both inputs and their difference in float32
        return 16 * tokens * inputs
    if kind is not Gram:
        return 16 * tokens * inputs
    if model.computed >= 4 or (inputs >= WIDE and inputs % 8 == 0):
        return 0
    own = 4 * inputs * inputs
    return own * (min(max(1, PRODUCT_BYTES // own), max(1, tokens // CORE_TOKENS)) + 1)


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
    grouped: bool = False,
    integers: bool = False,
    holding: Holding = HOLDINGS["auto"],
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
        grouped: The method is of scope group: the block stays loaded while it works.
        integers: It leaves some: a pruner that rounds holds what GPTQ holds.
        holding: The recipe's memory mode.
    """
    c, tokens, moments = model.computed, model.micro_batch(samples, seq_len, holding.tokens), list[Moment]()
    held = [*always(model), *_calibration(model, kind, samples, seq_len, tokens, on_device, waiting)]
    for block in _kinds(model.blocks):
        inputs = block.inputs()
        weights = Part("one block", "B · c", block.numel * c)
        counted = [max(inputs)] if in_order else inputs
        statistics = Part("statistics", "Σ 4n² a group (Gram)", sum(statistic_bytes(kind, n) for n in counted))
        linear = sum(out * columns for out, columns in block.linears.values())
        states, became = [], []
        if model.cuda and holding.blocks:  # else they are the host's; on a CPU that has them anyway
            states = [Part("values of its linears", "4B", SENT * linear)]
            became = [Part("what it has become so far", "5B", RESULT * linear)]
        if kind is not None:
            running = [*held, *states, weights]
            forward = forward_temporaries(model, block, tokens, buffered=on_device)
            before = sum(block.linears[group[0]][1] for group in block.groups[: widest_of(block)[0]])
            kept = Part("inputs of the groups before, to tell groups", "T · ins · c", tokens * before * c)
            moments.append(Moment("finding the groups of a block", [*running, forward, kept]))
            streams = (2 if on_device else 3) * model.width
            adding = max((streams + n) * c * tokens + update_temporaries(model, kind, n, tokens) for n in inputs)
            update = Part("adding to a statistic", "T · (2d + n) · c, and the products of a Gram matrix", adding)
            moments.append(Moment("collecting", [*running, statistics, update]))
        loaded = grouped or (in_order and not holding.leaves)
        resident = [*states, *([weights] if loaded else []), *became]
        for name, parts in _solving(model, block, method, kind, integers, holding):
            moments.append(Moment(name, [*held, *resident, statistics, *parts]))
    return moments


def _calibration(
    model: ModelSizes, kind: type[Any] | None, samples: int, seq_len: int, tokens: int, on_device: bool, waiting: int
) -> list[Part]:
    """What the calibration windows hold from block to block."""
    found, c = list[Part](), model.computed
    if kind is not None and on_device:
        buffer = samples * seq_len * model.width * c
        found.append(Part("hidden states of all windows", "windows · length · d · c", buffer))
        if paired := paired_bytes(model, kind, samples, seq_len):
            found.append(Part("the model before the step beside them", "windows · length · (d + Σn) · c", paired))
    if waiting:
        found.append(Part("micro-batches that wait for a group", "windows · length · (6d + n) · c", waiting))
    if waiting and model.cuda:
        threads = -(-samples * seq_len // max(tokens, 1))
        found.append(Part("cuBLAS workspaces of their threads", "32 MiB each", threads * WORKSPACE))
    return found


def _solving(
    model: ModelSizes, block: BlockSizes, method: str, kind: type[Any] | None, integers: bool, holding: Holding
) -> list[tuple[str, list[Part]]]:
    """What a method holds while it works on the linears of a block; what is of a group goes when it is done."""
    found = list[tuple[str, list[Part]]]()
    solves = kind is Gram and method in ("gptq", "sparsegpt")
    for group in block.groups:
        n = block.linears[group[0]][1]
        factor, kept, formula = _factor(n, holding) if solves else (0, 0, "0")
        found.append(("factoring", [Part("factor in float64", formula, factor)]))
        rows = [block.linears[name][0] for name in group]
        size = max(rows) * n
        if solves and holding.weights is not None:
            size = min(size, holding.weights)
        stack = sum(rows) * n if solves and model.cuda and holding.blocks else size  # swept as one, or one by one
        own = Part("its factor", "2n² packed, else 4n²", kept)
        inverses = INVERSES * n * min(n, BLOCK) if solves else 0
        squares = Part("inverses of its squares", f"{INVERSES}n · {BLOCK}", inverses)
        each = max(SWEEP.get(method, SCORE), ROUNDED if solves and integers else 0)
        found.append(("solving a layer", [own, squares, Part("linears at work", f"{each}N", each * stack)]))
        # CUDA: some columns of H, both parts of them and a product
        matrix = (12 * min(n, PANEL) if model.cuda else 4 * n) * n if kind in (Gram, CrossGram, StreamGram) else 0
        error = Part("error of one linear", f"{VERIFY}N + a Gram matrix", VERIFY * size + matrix)
        found.append(("verifying", [own, error]))
    return found


def _factor(n: int, holding: Holding) -> tuple[int, int, str]:
    """Bytes of a factor of n inputs while it is computed and later, and the formula."""
    if holding.packed:
        both = [each * n * (n + min(n, WIDTH)) for each in PACKED]
        return both[0] + PANELS * n * min(n, WIDTH), both[1], f"{PACKED[0]}n² and panels of {WIDTH}"
    return FACTOR * n * n, FACTOR_KEPT * n * n, f"{FACTOR}n²"


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


def host_of_walk(model: ModelSizes, process: int, *, hidden: int, holding: Holding = HOLDINGS["auto"]) -> Moment:
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
            Part(
                "values before, after and as stored",
                "13B in modes balanced and low",
                0 if holding.blocks else 13 * block,
            ),
        ],
    )


def _kinds(blocks: Sequence[BlockSizes]) -> list[BlockSizes]:
    """One block of each kind: those of the same sizes need the same."""
    return list({(*sorted(block.linears.values()), block.other): block for block in blocks}.values())
