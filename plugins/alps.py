"""ALPS: pruning by ADMM, and its repair by conjugate gradients (Meng et al. 2024, arXiv:2406.07831)."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

import sparsekit as sk
from sparsekit.errors import MethodError, NumericsError

Steps = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
TINY = 1e-30


@sk.linear_method("pcg", kind="prune", stats=sk.Gram, dense=True)
def pcg(layer: sk.LinearState, gram: sk.Gram, /, *, steps: Steps = 10, damp: NotNegative = 1e-6) -> sk.LinearState:
    """Repair a pruned layer: move the kept weights to where its outputs are nearest to the dense layer's.

    A step after any pruner. The mask stays. Every row is a least-squares problem over its kept
    weights, minimise (w - b) H (w - b)ᵀ with w the dense row, solved by conjugate gradients with the
    diagonal as preconditioner, all rows at a time, from the values the pruner left.

    Args:
        steps: Conjugate gradient steps; 10 in the paper.
        damp: Ridge on the Gram matrix, as a fraction of its mean diagonal.

    Source: Meng et al. 2024, arXiv:2406.07831, Algorithm 2.

    Deviations: the step length is each row's own, where the reference takes one for all rows.
    """
    if layer.mask is None or layer.dense is None:
        raise MethodError("pcg repairs a pruned layer; put a pruner before it", layer=layer.name)
    return layer.updated(refined(layer.dense, layer.weight, layer.mask, damped(gram, damp), steps), layer.mask)


@sk.linear_method("alps", kind="prune", stats=sk.Gram)
def alps(
    layer: sk.LinearState,
    gram: sk.Gram,
    /,
    *,
    pattern: sk.Pattern = sk.Pattern(2, 4),
    damp: Positive = 0.01,
    iterations: Steps = 300,
    rho: Positive = 0.1,
    steps: Steps = 10,
) -> sk.LinearState:
    """Choose the mask by ADMM on the layer's output error, then repair the values by conjugate gradients.

    With inputs scaled to norm 1, B is the least-squares answer pulled towards D, D is B + Y/ρ cut to
    the pattern, Y adds up their difference, and ρ rises while the support of D still changes.

    Args:
        pattern: "N:M", or unstructured through `sparsity`.
        damp: Ridge on the Gram matrix, as a fraction of its mean diagonal.
        iterations: ADMM iterations at most.
        rho: Penalty at the start.
        steps: Conjugate gradient steps afterwards.

    Source: Meng et al. 2024, arXiv:2406.07831, Algorithms 1 and 2, with the schedule of ρ of section 3.2.

    Deviations: as in `pcg`. An unstructured mask is chosen over the whole layer. One eigendecomposition
    for each linear, also of linears that share their input.
    """
    return layer.updated(*solved(layer.source, gram, pattern, damp, iterations, rho, steps))


@sk.linear_method("alps_aimed", kind="prune", stats=sk.StreamGram)
def alps_aimed(
    layer: sk.LinearState,
    gram: sk.StreamGram,
    /,
    *,
    pattern: sk.Pattern = sk.Pattern(2, 4),
    share: Share = 0.5,
    owed: Annotated[float, Field(ge=0, le=1)] = 0.0,
    aim_damp: Positive = 0.01,
    damp: Positive = 0.01,
    iterations: Steps = 300,
    rho: Positive = 0.1,
    steps: Steps = 10,
) -> sk.LinearState:
    """ALPS towards the outputs of the uncompressed model, from the inputs of the compressed one.

    What the layers before have lost is part of the target: W is replaced by the weight that gives
    W x for the inputs x̂ that the layer has now, and ALPS prunes that. Meant for `schedule: group`,
    where the inputs are those after all groups before; without it the target is a worse one.

    Args:
        pattern: "N:M", or unstructured through `sparsity`.
        share: How far to go towards that weight; 1 is all the way, and fits the calibration text too closely.
        owed: How much of what the stream lacks to which the layer adds (attention's and MLP's last linears)
            goes into the target as well: these layers then make up for what earlier blocks have lost.
        aim_damp: Ridge that holds it near W, as a fraction of the mean diagonal.
        damp: As in `alps`.
        iterations: As in `alps`.
        rho: As in `alps`.
        steps: As in `alps`.

    Source: Li et al. 2025, arXiv:2504.02692 (GPTAQ), for the target; Meng et al. 2024,
        arXiv:2406.07831 (ALPS), for the pruning.

    Deviations: GPTAQ quantizes, and corrects column by column on its way; here the target is solved for
    first. GPTAQ aims at the layer's own outputs; `owed` is ours. As in `alps` otherwise.
    """
    target = gram.aimed_at_stream(layer.source, aim_damp, share, owed)
    return layer.updated(*solved(target, gram, pattern, damp, iterations, rho, steps))


def solved(
    target: Tensor, gram: sk.Gram, pattern: sk.Pattern, damp: float, iterations: int, rho: float, steps: int
) -> tuple[Tensor, Tensor]:
    """ALPS towards a target weight [out, in]: the values and the mask. The arguments are those of `alps`."""
    matrix = damped(gram, damp)
    norm = matrix.diagonal().sqrt()
    keep = support(target * norm, matrix / norm / norm.unsqueeze(1), pattern, rho, iterations)
    return refined(target, target.masked_fill(~keep, 0.0), keep, damped(gram, 1e-6), steps), keep


def damped(gram: sk.Gram, damp: float) -> Tensor:
    """H + damp · mean(diag H) · I, float32 [in, in]; dead inputs get a unit diagonal.

    Raises:
        NumericsError: Activations are not finite.
    """
    matrix = gram.matrix.clone()
    if not torch.isfinite(matrix).all():
        raise NumericsError("calibration activations are not finite (inf or NaN in the Gram matrix)")
    diagonal = matrix.diagonal()
    mean = diagonal.mean()
    diagonal += damp * mean
    diagonal[gram.dead] = 1.0
    return matrix


def refined(dense: Tensor, start: Tensor, keep: Tensor, matrix: Tensor, steps: int) -> Tensor:
    """Conjugate gradients on every row's kept weights.

    Args:
        dense: W, [out, in].
        start: First B, [out, in], zero where pruned.
        keep: bool [out, in].
        matrix: H, damped, [in, in].
        steps: Steps of every row.
    Returns:
        B, [out, in]; tr((W - B) H (W - B)ᵀ) never rises.
    """
    values, scale = start.clone(), 1 / matrix.diagonal()
    residual = ((dense - values) @ matrix).masked_fill(~keep, 0.0)
    direction = residual * scale
    power = (residual * direction).sum(1, keepdim=True)  # [out, 1]
    for _ in range(steps):
        image = (direction @ matrix).masked_fill(~keep, 0.0)
        length = power / (direction * image).sum(1, keepdim=True).clamp(min=TINY)
        values += length * direction
        residual -= length * image
        scaled = residual * scale
        following = (residual * scaled).sum(1, keepdim=True)
        direction = scaled + following / power.clamp(min=TINY) * direction
        power = following
    return values


def support(weight: Tensor, matrix: Tensor, pattern: sk.Pattern, rho: float, iterations: int) -> Tensor:
    """The mask ADMM settles on, bool [out, in].

    Args:
        weight: W, its columns scaled by the inputs' norms.
        matrix: H of the scaled inputs, unit diagonal.
        pattern: What D is cut to.
        rho: Penalty at the start.
        iterations: At most so many.
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    values, vectors = values.clamp(min=0).float(), vectors.float()
    target = weight @ matrix
    keep = pattern.keep(weight.abs(), per="layer")
    sparse, dual, known = weight.masked_fill(~keep, 0.0), torch.zeros_like(weight), keep
    moved = False
    for t in range(iterations):
        near = ((target - dual + rho * sparse) @ vectors / (values + rho)) @ vectors.t()
        trial = near + dual / rho
        keep = pattern.keep(trial.abs(), per="layer")
        sparse = trial.masked_fill(~keep, 0.0)
        dual = dual + rho * (near - sparse)
        if t % 3 != 2:
            continue
        change = int((keep != known).sum()) / max(int(keep.sum()), 1)
        known = keep
        if change == 0 and not moved and t < iterations // 2:
            rho /= 5  # too stiff to leave the first support
            sparse, dual = weight.masked_fill(~keep, 0.0), torch.zeros_like(weight)
            continue
        moved = True
        if change == 0 or (t > 30 and change < 3e-4):
            break
        rho *= 1.3 if change >= 0.1 else 1.2 if change >= 0.005 else 1.1
    return keep
