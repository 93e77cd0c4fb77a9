"""AWQ (Lin et al. 2023, arXiv:2306.00978)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from sparsekit.errors import NumericsError
from sparsekit.methods.rtn import Bits
from sparsekit.quadratic import Quadratic
from sparsekit.quant import Grid, QuantizedWeight, resolve_group_size
from sparsekit.registry import group_method
from sparsekit.state import Group, LinearState
from sparsekit.stats import Gram

CLIP_STEPS = 10  # ranges shrunk by 1 - i/20 for i < 10, llm-awq auto_clip.py
CLIP_GRID = 20
FLOOR = 1e-4  # least share of the largest statistic; bounds a scale to 1e-2..1e2 (llm-awq clamps at 1e-4 too)
ROOM = 2**24  # weights rounded at a time; keeps the temporaries of an 11008-wide layer under 0.5 GB


@group_method("awq", kind="quantize", stats=Gram)
def awq(
    group: Group,
    x: Gram,
    /,
    *,
    bits: Bits = 4,
    group_size: int = 128,
    symmetric: bool = True,
    grid: Annotated[int, Field(ge=1)] = 20,
    duo: bool = True,
    clip: bool = True,
) -> Group:
    """Scale input channels so that those with large activations round finely, then round to nearest.

    One scale [in] serves all linears of the group; its inverse goes into the operation that feeds
    them. Candidates are s_j = x_j^r / w_j^(1-r) for r from 0 to 1, with x_j the mean |input| and w_j
    the mean |weight| relative to its quantization group; the identity is always among them, so the
    loss is never above that of round-to-nearest. The loss is the exact error of the linears'
    outputs, tr(D H Dᵀ) with D = W - Q(W·s)/s and H the Gram matrix. Where nothing can absorb a
    scale, only ranges are searched, and the layers are noted.

    Args:
        bits: Bits of a code, 2 to 8.
        group_size: Inputs that share a scale; -1 for one group a row.
        symmetric: Levels -2^(b-1)..2^(b-1)-1 around 0, as in the other quantizers, so that a
            comparison is one of methods and every GPTQ reader takes the export. The paper's grid
            is the other one, with an integer zero-point per group.
        grid: Number of steps of the ratio r between 0 and 1.
        duo: Divide by the weights' w_j^(1-r); otherwise s_j = x_j^r.
        clip: Search each group's range down to half of its largest |weight|.

    Source: Lin et al. 2023, arXiv:2306.00978, eq. 4-5; clipping as in mit-han-lab/llm-awq
    auto_clip.py, `duo` as in AutoAWQ quantizer.py.

    Deviations: the loss is that of the linears' outputs, where the references run the parent module
    (attention, MLP); for the output and down projections it is the same. Clipping is scored with
    the group's block of H instead of a sample of tokens, is kept only in rows where it lowers the
    whole row's loss, and covers query and key projections too, which the references leave out ("due
    to qk bmm, it is hard to clip precisely"). Ratios include 1. Channels without inputs or
    without kept weights get the scale 1 and do not shift the others; w_j is taken over kept weights;
    tied channels (grouped-query attention) are searched as tied. Ranges always include 0, so pruned
    weights stay exactly zero.
    """
    matrix = x.matrix
    if not torch.isfinite(matrix).all():
        raise NumericsError("calibration activations are not finite (inf or NaN in the Gram matrix)")
    form = Form(bits, resolve_group_size(group_size, len(matrix)), symmetric)
    scale = torch.ones_like(matrix[0])
    if group.tie is None:
        group = group.with_linears({n: s.noted(f"no scale search: {group.why}") for n, s in group.linears.items()})
    else:
        candidates = input_scales(group, x, form, grid=grid, duo=duo)
        best = int(losses(group, matrix, candidates, form).argmin())
        if best > 0:  # candidate 0 is the identity, which needs no folding
            scale = candidates[best]
            group = group.rescaled(scale)
    return group.with_linears({n: rounded(s, matrix, scale, form, clip=clip) for n, s in group.linears.items()})


@dataclass(frozen=True, slots=True)
class Form:
    """How weights are stored: bits, inputs of a quantization group, kind of grid."""

    bits: int
    size: int
    symmetric: bool

    def grouped(self, weight: Tensor) -> Tensor:
        """[out, in] as [out, groups, size]."""
        return weight.reshape(len(weight), -1, self.size)

    def span(self, grouped: Tensor) -> Grid:
        """The grid that spans each group."""
        return Grid.fit(grouped, self.bits, symmetric=self.symmetric)


def input_scales(group: Group, x: Gram, form: Form, *, grid: int, duo: bool) -> Tensor:
    """Candidate scales of a group's inputs, [2 + grid, in], the identity first.

    Computed in logarithms, so that no power overflows. Each is divided by sqrt(largest · smallest)
    over the channels that have inputs and kept weights; the other channels get 1.
    """
    assert group.tie is not None and group.untie is not None  # they come together
    total, count = (group.untie(sums) for sums in relative_weights(group, form))
    weight = total / count.clamp(min=FLOOR)  # mean over kept weights, [free]
    level = group.untie(x.abs_mean)
    alive = (level > 0) & (count > 0)
    ratio = torch.linspace(0, 1, grid + 1, device=level.device).unsqueeze(1)
    logs = ratio * torch.maximum(level, FLOOR * level.max()).log()  # [ratios, free]
    if duo:
        logs = logs - (1 - ratio) * weight.clamp(min=FLOOR).log()
    high = logs.masked_fill(~alive, -torch.inf).amax(1, keepdim=True)
    low = logs.masked_fill(~alive, torch.inf).amin(1, keepdim=True)
    free = torch.where(alive, logs - (high + low) / 2, 0.0).exp()
    return torch.stack([torch.ones_like(x.abs_mean), *(group.tie(row) for row in free)])


def relative_weights(group: Group, form: Form) -> tuple[Tensor, Tensor]:
    """Sum over rows of |w| / largest |w| of its quantization group, and number of kept weights, [in] each."""
    totals, counts = [], []
    for state in group.linears.values():
        weight = state.weight.abs()
        grouped = form.grouped(weight)
        largest = grouped.amax(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        totals.append((grouped / largest).reshape(weight.shape).sum(0))
        counts.append((torch.ones_like(weight) if state.mask is None else state.mask.float()).sum(0))
    return torch.stack(totals).sum(0), torch.stack(counts).sum(0)


def losses(group: Group, matrix: Tensor, candidates: Tensor, form: Form) -> Tensor:
    """Loss of each candidate scale summed over the group's linears, float64 [candidates]; nothing is synchronised."""
    total = torch.zeros(len(candidates), dtype=torch.float64, device=matrix.device)
    energy = Quadratic(matrix)
    for state in group.linears.values():
        for rows in parts(state.weight):
            for index, scale in enumerate(candidates):
                grouped = form.grouped(rows * scale)
                total[index] += row_losses(grouped, form.span(grouped), energy, scale).sum(dtype=torch.float64)
    return total


def row_losses(grouped: Tensor, grids: Grid, energy: Quadratic, scale: Tensor) -> Tensor:
    """Mean squared error of each row's output, [out]: d H dᵀ with d = (w·s - Q(w·s)) / s.

    Args:
        grouped: The scaled weights w·s, [out, groups, size].
        grids: What rounds them, [out, groups].
        energy: d H dᵀ with H the Gram matrix of the unscaled inputs.
        scale: s, [in].
    """
    return energy((grouped - grids.round(grouped)).reshape(len(grouped), -1) / scale)


def rounded(state: LinearState, matrix: Tensor, scale: Tensor, form: Form, *, clip: bool) -> LinearState:
    """Quantize a layer whose columns are multiplied by `scale` already; a mask and its zeros stay."""
    weight = state.weight
    part = scale.reshape(-1, form.size)  # [groups, size]
    blocks = matrix.reshape(*part.shape, *part.shape).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, size, size]
    blocks = blocks / (part.unsqueeze(2) * part.unsqueeze(1))  # Gram matrices of each group's scaled inputs
    energy = Quadratic(matrix)
    codes, steps, zeros = [], [], []
    for rows in parts(weight):
        grouped = form.grouped(rows)
        grids = form.span(grouped)
        if clip:
            trial = clipped(grouped, blocks, form)
            better = row_losses(grouped, trial, energy, scale) < row_losses(grouped, grids, energy, scale)
            grids = chosen(better.unsqueeze(1), trial, grids)
        codes.append(grids.encode(grouped).reshape(rows.shape).to(torch.uint8))
        steps.append(grids.scale)
        zeros.append(grids.zero)
    grids = Grid(torch.cat(steps), torch.cat(zeros), form.bits)
    integers = QuantizedWeight.of(torch.cat(codes), grids, group_size=form.size, symmetric=form.symmetric)
    return state.with_quantized(integers)


def clipped(grouped: Tensor, blocks: Tensor, form: Form) -> Grid:
    """For each group [out, groups, size] the shrunken range with the least error of the group's own output."""

    def group_losses(grids: Grid) -> Tensor:
        change = (grouped - grids.round(grouped)).transpose(0, 1)  # [groups, out, size]
        return (torch.bmm(change, blocks) * change).sum(-1).t()

    largest = grouped.abs().amax(-1, keepdim=True)
    best = form.span(grouped)
    loss = group_losses(best)
    for i in range(1, CLIP_STEPS):
        bound = largest * (1 - i / CLIP_GRID)
        trial = form.span(torch.minimum(torch.maximum(grouped, -bound), bound))
        trial_loss = group_losses(trial)
        best = chosen(trial_loss < loss, trial, best)
        loss = torch.minimum(trial_loss, loss)
    return best


def chosen(better: Tensor, one: Grid, other: Grid) -> Grid:
    """`one` where `better` (bool, broadcast over groups), else `other`."""
    scale = torch.where(better, one.scale, other.scale)
    return replace(one, scale=scale, zero=torch.where(better, one.zero, other.zero))


def parts(weight: Tensor) -> tuple[Tensor, ...]:
    """Rows a few at a time, so that temporaries stay small; rows do not depend on one another."""
    return torch.split(weight, max(1, ROOM // weight.shape[1]))
