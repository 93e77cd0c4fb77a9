"""How many bytes a run writes, worked out from sizes alone."""

from __future__ import annotations

from sparsekit.branch import Branch
from sparsekit.checkpoint import INTEGERS
from sparsekit.formats import FORMATS
from sparsekit.interchange.adapter import adapter_bytes
from sparsekit.models.shapes import ModelSizes
from sparsekit.planning.foreseen import branch_of
from sparsekit.planning.plan import Plan, PlannedStep
from sparsekit.training.loop import CHECKPOINT_SECONDS


def block_bytes(sizes: ModelSizes, plan: Plan, planned: PlannedStep, index: int) -> int:
    """File of one block after a step: codes of a byte, or values as stored, masks of a bit, low-rank branches."""
    total = sizes.blocks[index].other * sizes.stored
    for name, (out, into) in sizes.blocks[index].linears.items():
        upto = [p for p in plan.steps[: planned.index + 1] if name in p.selected]
        quantized = any(p.step.quantizes for p in upto)
        masked = any(p.step.method.kind not in ("quantize", "branch") for p in upto)
        total += out * into * (1 if quantized else sizes.stored) + (out * into // 8 if masked else 0)
        branch = branch_of(plan.steps[: planned.index + 1], name, (out, into))
        total += 0 if branch is None else _branch_bytes(branch, sizes.stored)
    return total


def _branch_bytes(branch: Branch, stored: int) -> int:
    """A low-rank branch in the file of its block."""
    if branch.integers is None:
        return branch.parameters * stored
    return sum(getattr(part, key).nbytes for part in branch.integers for key in INTEGERS)


def checkpoint_bytes(sizes: ModelSizes, planned: PlannedStep, seconds: float) -> int:
    """The last checkpoint of a training run, and the one being written; a run that is over before has none."""
    if planned.arguments.get("checkpoint_every") is None and seconds < CHECKPOINT_SECONDS / 2:
        return 0
    return 2 * sizes.numel * (14 if planned.arguments.get("states") == "float32" else 8)


def export_bytes(sizes: ModelSizes, plan: Plan, name: str) -> int:
    """Weight files of an export, at most, and that of its low-rank branches: some formats of ours take fewer bytes."""
    quantized = {layer for p in plan.steps if p.step.quantizes for layer in p.selected}
    bits = next((p.step.code_bits for p in plan.steps if p.step.code_bits), 16)
    storage = FORMATS[name].storage
    shapes = {layer: shape for block in sizes.blocks for layer, shape in block.linears.items()}
    branches = filter(None, (branch_of(plan.steps, layer, shape) for layer, shape in shapes.items()))
    beside = adapter_bytes([*branches], sizes.stored, integers=storage is not None and storage.checksums)
    if storage is None:
        return sizes.numel * sizes.stored + beside
    packed = sum(out * into for layer, (out, into) in shapes.items() if layer in quantized)
    return (sizes.numel - packed) * sizes.stored + packed * bits // 8 + beside
