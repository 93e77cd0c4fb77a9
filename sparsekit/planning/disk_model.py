"""How many bytes a run writes, told by what writes them.

A step's files are the tensors its checkpoint makes of hollow blocks. An export's are those that the format's own
packer makes of made-up integers: no formula here has to follow a layout, and a plugin's format needs none. Only what
surrounds the tensors is a measured mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from sparsekit.checkpoint import block_tensors, pack_mask
from sparsekit.errors import CheckpointError
from sparsekit.formats import FORMATS
from sparsekit.formats.base import Format, Storage, untold
from sparsekit.interchange.adapter import adapter_bytes
from sparsekit.interchange.hfdir import companions, read_config
from sparsekit.models.shapes import ModelSizes
from sparsekit.planning.foreseen import TILE, Foreseen
from sparsekit.planning.plan import PlannedStep
from sparsekit.state import LinearState
from sparsekit.training.loop import CHECKPOINT_SECONDS

WHY = {
    "at most": "the format makes fewer bytes of some integers than of others",
    "about": "files or a plugin bring its integers, and a plan knows no more of them than their grid",
}
HEADER = 110  # bytes of a tensor's name, shape and place in the header of its file
RECORD = 260  # of a linear in sparsekit.json
REPORT = 630  # of a linear in the files of a step: what is reported of it and what it is


def step_bytes(left: Foreseen, sizes: ModelSizes) -> int:
    """Files of the last of some steps: every block, and what lies outside when it was trained."""
    blocks = (block_tensors(left.hollow(index), left.view.dtype)[0] for index in range(len(left.view.blocks)))
    trained = left.steps[-1].step.method.scope == "model"
    inside = sum(tensor.nbytes + HEADER for block in blocks for tensor in block.values())
    inside += REPORT * sum(len(block.linears) for block in sizes.blocks)
    return inside + (sizes.outside * sizes.stored if trained else 0)


def checkpoint_bytes(sizes: ModelSizes, planned: PlannedStep, seconds: float) -> int:
    """The last checkpoint of a training run, and the one being written; a run that is over before has none."""
    if planned.arguments.get("checkpoint_every") is None and seconds < CHECKPOINT_SECONDS / 2:
        return 0
    return 2 * sizes.numel * (14 if planned.arguments.get("states") == "float32" else 8)


def exports_bytes(left: Foreseen, sizes: ModelSizes, names: Sequence[str]) -> tuple[dict[str, int], dict[str, str]]:
    """Bytes of every export by format, and what `export_bytes` puts before them where that is something."""
    told = {name: export_bytes(left, sizes, FORMATS[name]) for name in names}
    return {name: size for name, (size, _) in told.items()}, {name: word for name, (_, word) in told.items() if word}


def bound_notes(bounds: Mapping[str, str]) -> Iterator[str]:
    """Why bytes are not known for certain."""
    return (f"export {name} takes {word} so many bytes: {WHY[word]}" for name, word in bounds.items())


def export_bytes(left: Foreseen, sizes: ModelSizes, form: Format) -> tuple[int, str]:
    """The directory of an export.

    Args:
        left: What the steps leave.
        sizes: Of the model.
        form: The format.
    Returns:
        Bytes, and what stands before them: "", or a key of `WHY`.
    """
    view, storage = left.view, form.storage
    copied = companions(view.path, view.path, code="auto_map" in read_config(view.path))
    ours = storage is not None and storage.checksums
    branches = [*left.branches(form).values()]
    beside = sum(path.stat().st_size for path in copied) + 4 * HEADER * len(branches)
    beside += adapter_bytes(branches, sizes.stored, integers=ours)
    known = "about" if left.guessed else ""
    if storage is None:
        hollow = (state for index in range(len(view.blocks)) for state in left.hollow(index).linears.values())
        return beside + _weights(sizes, hollow), known
    layout, alike = left.laid_out(storage)
    try:
        layout, spread = left.laid_out(storage, spread=True)
    except CheckpointError:  # these it does not hold, and those that will be it does
        return beside + _weights(sizes, alike, storage, layout), "about"
    least, most = (_weights(sizes, states, storage, layout) for states in (alike, spread))
    return beside + most, known or ("at most" if most > least else "")


def _weights(sizes: ModelSizes, states: Iterable[LinearState], storage: Storage | None = None, layout: str = "") -> int:
    """Tensors of all weight files, and masks."""
    total = sizes.numel * sizes.stored
    packed: dict[tuple[int, bool], int] = {}  # by integers, which many linears share
    for state in states:
        count, masked = state.source.numel(), state.mask is not None
        total += RECORD + HEADER
        if storage is None or state.quantized is None:
            total += HEADER - (-count // 8) if masked else 0
            continue
        key = id(state.quantized), masked
        if key not in packed:
            packed[key] = _packed(state, storage, layout)
        total += packed[key] - count * sizes.stored - HEADER
    return total


def _packed(state: LinearState, storage: Storage, layout: str) -> int:
    """A linear's tensors and its mask, of which a few rows are packed: rows alike take alike."""
    rows = len(state.source)
    if rows <= 2 * TILE:
        return _rows_packed(rows, state, storage, layout)
    half, whole = (_rows_packed(count, state, storage, layout) for count in (TILE, 2 * TILE))
    return whole + (whole - half) * (rows - 2 * TILE) // TILE


def _rows_packed(rows: int, state: LinearState, storage: Storage, layout: str) -> int:
    """The same of the first rows."""
    weight, mask = state.quantized, None if state.mask is None else state.mask[:rows]
    assert weight is not None  # the caller has looked
    few = replace(weight, codes=weight.codes[:rows], scale=weight.scale[:rows], zero=weight.zero[:rows])
    tensors = storage.pack(few, layout, mask)
    beside = untold(storage, tensors, mask)
    stored = [*tensors.values(), *([] if beside is None else [pack_mask(beside)])]
    return sum(tensor.nbytes + HEADER for tensor in stored)
