"""The proof of an export: its integers are the run's, its files whole, and its logits those of the run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsekit.errors import CheckpointError
from sparsekit.interchange.adapter import ADAPTER, attach_adapter
from sparsekit.interchange.imports import QuantizedFiles
from sparsekit.interchange.since import check_tensors, marker_of
from sparsekit.state import LinearState

if TYPE_CHECKING:
    from sparsekit.interchange.export import Blocks, ExportedModel

SAME_LOGITS = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}  # of the largest |logit|


def integers_on(device: torch.device, state: LinearState) -> LinearState:
    """The state with its integers and its mask on a device, for packing; float values stay where they are."""
    if state.quantized is None:
        return state
    mask = None if state.mask is None else state.mask.to(device)
    return replace(state, quantized=state.quantized.to(device), mask=mask)


def read_back(target: Path, view: ExportedModel, blocks: Blocks) -> None:
    """Hold every integer and every mask of the files against the run's, and the files against their digests.

    Raises:
        CheckpointError: One differs.
    """
    with ThreadPoolExecutor(1, "sparsekit-digest") as pool:
        intact = pool.submit(check_tensors, target, marker_of(target))
        stored = QuantizedFiles(target, view.device, checked=False)
        for index in range(len(view.blocks)):
            for name, written in blocks(index).linears.items():
                if written.quantized is not None and not _same(stored[name], integers_on(view.device, written)):
                    raise CheckpointError(f"{name} reads back from {target} as other integers than were written")
        intact.result()


def _same(found: LinearState, state: LinearState) -> bool:
    """Whether integers read back are a linear's, with its mask where it has one."""
    assert state.quantized is not None
    assert found.quantized is not None
    masked = state.mask is None or (found.mask is not None and torch.equal(found.mask, state.mask))
    return masked and state.quantized.equal(found.quantized)


def verify_dense(directory: Path, tokens: Tensor, logits: Tensor, view: ExportedModel) -> float:
    """Open a dense export with plain Transformers, add its adapter if it has one, and compare its logits.

    Args:
        directory: Of the export.
        tokens: int [batch, seq_len].
        logits: [batch, seq_len, vocabulary], what the model computed for them.
        view: The model that was exported; its compute dtype and device are used.
    Returns:
        The largest absolute difference. It is 0 where the same kernels see the same values, as in
        float32 on a CPU; the tolerance (`SAME_LOGITS`) is for devices that choose kernels by memory.
    Raises:
        CheckpointError: The directory does not load, or computes something else.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=view.compute_dtype,
            local_files_only=True,
            trust_remote_code=view.trust_remote_code,
            attn_implementation=view.config._attn_implementation,
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(f"Transformers cannot open the export {directory}: {error}") from error
    model = model.to(view.device).eval()
    if (directory / ADAPTER).is_dir():
        attach_adapter(model, directory)
    with torch.inference_mode():
        found = model(input_ids=tokens.to(view.device), use_cache=False).logits
    difference = float((found.float() - logits.to(found.device).float()).abs().max())
    allowed = SAME_LOGITS[view.compute_dtype] * float(logits.abs().max())
    if not difference <= allowed:  # also when it is NaN
        raise CheckpointError(f"{directory} computes other logits than the run: they differ by up to {difference:.3g}")
    return difference
