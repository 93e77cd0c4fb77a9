"""What AST starts from and what it leaves: masks, input norms, low-rank branches, the states of the linears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.blockwise.stacking import sent
from sparsekit.branch import attach, collected, mean_branch
from sparsekit.checkpoint import HOST
from sparsekit.errors import MethodError
from sparsekit.pattern import Pattern
from sparsekit.state import LinearState
from sparsekit.stats import InputNorm
from sparsekit.training.grids import bits_per_weight, group_of, integers
from sparsekit.training.loop import Trained, TrainJob
from sparsekit.training.optim import SparseAdamW

SCORE_WINDOWS = 64  # windows that measure the input norms of activation-aware scores


def first_masks(
    job: TrainJob, pattern: Pattern, norms: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The mask each sparse parameter starts with, and its dense values.

    An earlier step's mask is taken when it holds the pattern; otherwise the largest scores are kept.

    Returns:
        bool [out, in] and float32 [out, in] by parameter name.
    """
    masks, weights = {}, {}
    for linear, state in job.linears.items():
        name = f"{linear}.weight"
        weights[name] = state.source
        if state.mask is not None and pattern.violations(state.mask.to(job.device)) == 0:
            masks[name] = state.mask
        elif not pattern.sparsity:
            masks[name] = torch.ones_like(state.source, dtype=torch.bool)
        else:  # on the device, which takes a thousandth of the time; they wait on the host
            masks[name] = pattern.keep_weights(state.source.to(job.device), norms.get(name)).to(state.source.device)
    return masks, weights


def add_branches(job: TrainJob, masks: Mapping[str, Tensor], length: int, *, trained: bool) -> None:
    """Give every sparse linear of the student a low-rank branch; one from an earlier step stays as it is.

    Raises:
        MethodError: The blocks do not divide a layer, or an earlier branch has blocks of another length.
    """
    modules = dict(job.student.named_modules())
    for linear, state in job.linears.items():
        if state.branch is None:
            branch = mean_branch(state.source, masks[f"{linear}.weight"], length, trained=trained, name=linear)
            module = modules[linear]
            assert isinstance(module, nn.Linear)  # so are all of job.linears
            attach(module, branch)
        elif state.branch.length != length:
            message = f"slorb {length}, and an earlier step left a branch with blocks of {state.branch.length}"
            raise MethodError(message, layer=linear)


def input_norms(job: TrainJob) -> dict[str, Tensor]:
    """Root mean square of every sparse linear's inputs, float32 [in] by parameter name.

    In the dense model; under another teacher, which has other layers, in the student as it starts.
    """
    found = {name: InputNorm.empty(job.linears[name].source.shape[1], job.device) for name in job.linears}
    model = job.student if job.another_teacher else job.teacher
    modules = dict(model.named_modules())

    def feeder(statistic: InputNorm) -> Any:
        return lambda module, arguments: statistic.update(arguments[0].reshape(-1, arguments[0].shape[-1]))

    handles = [modules[name].register_forward_pre_hook(feeder(statistic)) for name, statistic in found.items()]
    try:
        with torch.no_grad():
            for window in job.tokens[:SCORE_WINDOWS]:
                model(input_ids=window.long().unsqueeze(0).to(job.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {f"{name}.weight": statistic.norm for name, statistic in found.items()}


def result(job: TrainJob, optimizer: SparseAdamW, metrics: Mapping[str, Any]) -> Trained:
    """Linears with pruned entries at exact zero, and every other parameter; of the first rank only.

    With grids a linear holds the integers that the model has computed with.
    """
    rounding = optimizer.rule.rounding
    linears: dict[str, LinearState] = {}
    params: dict[str, Tensor] = {}
    sparse = {f"{name}.weight": name for name in job.linears}
    for name in optimizer.names:
        weight = optimizer.weight(name)  # all ranks take part
        mask = optimizer.mask(name) if name in sparse else None
        step = optimizer.step(name) if name in sparse and rounding is not None else None
        if not job.world.first:
            continue
        if mask is not None:
            before = job.linears[sparse[name]]
            chosen = mask if optimizer.pattern.sparsity or before.mask is not None else None
            state = before.updated(weight, chosen)
            if rounding is not None and step is not None:
                state = state.with_quantized(integers(weight, mask, step, rounding))
            linears[sparse[name]] = sent(state, HOST)
        else:
            params[name] = weight.cpu()
    branched = dict(collected(job.student, params))
    linears = {name: replace(state, branch=branched.get(name)) for name, state in linears.items()}
    counted = sum(branch.parameters for branch in branched.values())
    of_linears = sum(state.source.numel() for state in job.linears.values())
    about = {"branch_parameters": counted, "branch_share": counted / of_linears} if counted else {}
    return Trained(linears, params, {**metrics, **about, **_stored(optimizer)})


def _stored(optimizer: SparseAdamW) -> dict[str, float]:
    """Bits that a weight on grids takes, the mean over all; nothing without grids."""
    rounding = optimizer.rule.rounding
    if rounding is None:
        return {}
    total = 0.0
    for name in optimizer.sparse:
        shape = optimizer.parameters[name].shape
        size = group_of(rounding, name, shape[1])
        total += shape.numel() * bits_per_weight(rounding, optimizer.pattern, size)
    return {"bits_per_weight": total / optimizer.sparse_numel}
