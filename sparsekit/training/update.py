"""One step of one parameter in plain torch: the update and the choice of the mask.

It is what the fused kernel of `kernels/adamw.py` is tested against, and what runs on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsekit.pattern import Pattern
from sparsekit.quant import Rounding
from sparsekit.training.world import ALONE, World

SecondMoment = Literal["momentum", "gradient"]
DecayRule = Literal["l2", "l1"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What one optimizer step does; fixed for a run.

    Attributes:
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        second_moment: What v averages for sparse weights: the square of the update `momentum` (the
            paper's form) or of the `gradient` with the same pull (AdamW where a weight is kept). Ordinary
            parameters always use the gradient.
        decay_rule: `l2` pulls a pruned weight by λ·w, `l1` mixes λ·sign(w) into its momentum.
        scaling: Learned scales of a row of a sparse weight, see `scaling`; 0 for none.
        masked: Whether the model computes with W ⊙ M; otherwise with W, and the mask only steers the decay.
        rounding: Grids that kept weights are put on, see `grids`; None for none.
        learned: Whether their steps are learned, once fitted; otherwise they are fitted with every mask.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    second_moment: SecondMoment = "momentum"
    decay_rule: DecayRule = "l2"
    scaling: int = 0
    masked: bool = True
    rounding: Rounding | None = None
    learned: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """The numbers of one step.

    Attributes:
        number: 1 for the first step, for bias correction.
        lr: Learning rate.
        decay: λ, the pull of pruned weights towards zero.
        mix: Share of the `l1` rule in a pruned weight's direction, 0 to 1; unused by `l2`.
        weight_decay: Ordinary decoupled weight decay of parameters with two or more dimensions.
        refresh: Whether the masks are chosen again after the update.
        hysteresis: For that choice: a pruned weight must be larger than a kept one by this share.
    """

    number: int
    lr: float
    decay: float = 0.0
    mix: float = 0.0
    weight_decay: float = 0.0
    refresh: bool = False
    hysteresis: float = 0.0


def widest(dtype: torch.dtype) -> torch.dtype:
    """What arithmetic on such values is done in: float32, and float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def adamw_(
    weight: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    mask: Tensor | None,
    rule: Rule,
    step: Step,
) -> None:
    """One step of one parameter, in place; the slow reference of the fused kernel.

    With g the gradient, W the dense weight and M its mask (paper §3.2, released adamw.py:113-141 with
    the mask as a bool):

        W ← (1 - lr·wd) W
        m ← β1 m + (1 - β1) g
        u ← pulled(m)
        v ← β2 v + (1 - β2) u²                   or pulled(g)²
        W ← W - lr / (1 - β1^k) · u / (sqrt(v / (1 - β2^k)) + eps)

        pulled(x) = x + λ (¬M ⊙ W)                      l2
        pulled(x) = (1 - mix) x + mix λ sign(W) on ¬M    l1 (CAST, arXiv:2509.25996)

    The decay never enters m, so it is not remembered. It does enter v in both forms: a pruned weight
    with hardly any gradient would otherwise be divided by next to nothing, and overshoot zero until the
    loss is NaN (seen at lr 4e-3 on models/base).

    Args:
        weight: float32 [...], the dense weight; updated.
        grad: float32 [...], clipped already.
        first: float32 [...], m; updated.
        second: float32 [...], v; updated.
        mask: bool [...], True = kept; None for an ordinary parameter.
        rule: What to do.
        step: With which numbers.
    """
    beta1, beta2 = rule.betas
    if step.weight_decay and weight.dim() >= 2:
        weight.mul_(1 - step.lr * step.weight_decay)
    first.lerp_(grad, 1 - beta1)
    direction = pulled(first, weight, mask, rule, step)
    of = direction if mask is not None and rule.second_moment == "momentum" else pulled(grad, weight, mask, rule, step)
    second.mul_(beta2).addcmul_(of, of, value=1 - beta2)
    root = (second / (1 - beta2**step.number)).sqrt_().add_(rule.eps)
    weight.addcdiv_(direction, root, value=-step.lr / (1 - beta1**step.number))


def pulled(x: Tensor, weight: Tensor, mask: Tensor | None, rule: Rule, step: Step) -> Tensor:
    """A moment or a gradient [...] with the decay of pruned weights; see `adamw_`."""
    if mask is None or not step.decay:
        return x
    if rule.decay_rule == "l2":
        return x + (step.decay * weight).masked_fill_(mask, 0.0)
    return torch.where(mask, x, torch.lerp(x, step.decay * weight.sign(), step.mix))


@torch.no_grad()
def refreshed(weight: Tensor, mask: Tensor, pattern: Pattern, importance: Tensor | None, hysteresis: float) -> Tensor:
    """The mask of the largest scores |W|, times the input norms when there are any.

    Args:
        weight: float32 [out, in].
        mask: bool [out, in], the mask until now.
        pattern: What to keep.
        importance: float32 [in] or None.
        hysteresis: A pruned weight replaces a kept one only if its score is larger by this share.
    Returns:
        bool [out, in].
    """
    score = weight.abs()
    if importance is not None:
        score = score * importance
    if hysteresis:
        score = torch.where(mask, score * (1 + hysteresis), score)
    return pattern.keep(score)


def clip_factor(parameters: Iterable[Tensor], limit: float, world: World = ALONE) -> tuple[Tensor, Tensor]:
    """What gradients must be multiplied by so that their global norm is at most `limit`.

    Args:
        parameters: Of this rank.
        limit: Of the norm over all ranks.
        world: The ranks.
    Returns:
        The factor and the norm, float32 scalars on the device; nothing is read on the host.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    dtype = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    norms = torch._foreach_norm(grads, 2, dtype)
    norm = torch.linalg.vector_norm(torch.stack(list(norms)))
    if world.size > 1:
        norm = world.sum(norm.square()).sqrt()
    return (limit / (norm + 1e-6)).clamp(max=1.0), norm
