"""AdamW that trains N:M sparse weights: the dense weight lives in the optimizer, the model holds W ⊙ M.

The loss is computed with the masked weight, so the gradient that reaches a parameter is ∂L/∂(W ⊙ M),
which is what the straight-through estimator hands to every entry of W, pruned ones included. No
module is changed and no autograd function is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparsekit.pattern import Pattern

SecondMoment = Literal["momentum", "gradient"]
DecayRule = Literal["l2", "l1"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What one optimizer step does; fixed for a run.

    Attributes:
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        second_moment: What v averages for sparse weights: the square of the update `momentum` (the
            paper's form) or of the `gradient` (as AdamW). Ordinary parameters always use the gradient.
        decay_rule: `l2` pulls a pruned weight by λ·w, `l1` mixes λ·sign(w) into its momentum.
        masked: Whether the model computes with W ⊙ M; otherwise with W, and the mask only steers the decay.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    second_moment: SecondMoment = "momentum"
    decay_rule: DecayRule = "l2"
    masked: bool = True


@dataclass(frozen=True, slots=True)
class Step:
    """The numbers of one step.

    Attributes:
        number: 1 for the first step, for bias correction.
        lr: Learning rate.
        decay: λ, the pull of pruned weights towards zero.
        mix: Share of the `l1` rule in a pruned weight's direction, 0 to 1; unused by `l2`.
        weight_decay: Ordinary decoupled weight decay of parameters with two or more dimensions.
    """

    number: int
    lr: float
    decay: float = 0.0
    mix: float = 0.0
    weight_decay: float = 0.0


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
        u ← m + λ (¬M ⊙ W)                      l2
        u ← (1 - mix) m + mix λ sign(W) on ¬M    l1 (CAST, arXiv:2509.25996)
        v ← β2 v + (1 - β2) u²                   or g²
        W ← W - lr / (1 - β1^k) · u / (sqrt(v / (1 - β2^k)) + eps)

    The decay never enters m, so it is not remembered.

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
    direction = first
    if mask is not None and step.decay:
        if rule.decay_rule == "l2":
            direction = first + (step.decay * weight).masked_fill_(mask, 0.0)
        else:
            pulled = torch.lerp(first, step.decay * weight.sign(), step.mix)
            direction = torch.where(mask, first, pulled)
    of = direction if mask is not None and rule.second_moment == "momentum" else grad
    second.mul_(beta2).addcmul_(of, of, value=1 - beta2)
    root = (second / (1 - beta2**step.number)).sqrt_().add_(rule.eps)
    weight.addcdiv_(direction, root, value=-step.lr / (1 - beta1**step.number))


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


class SparseAdamW:
    """AdamW over a model in which some weights are sparse.

    `masked` tells whether the model computes with W ⊙ M now; it starts as the rule says, and
    `finalize` sets it.

    State of a sparse parameter: `dense` (float32 W), `mask`, `initial_mask`, `exp_avg`, `exp_avg_sq`
    and, with activation-aware scores, `importance` [in]. An ordinary parameter that is not float32
    has a `dense` float32 master too.

    Args:
        model: Its parameters that require a gradient are trained.
        masks: First mask of each sparse parameter by parameter name.
        pattern: What every refreshed mask keeps.
        rule: The update rule.
        importance: Input norms [in] of sparse parameters by parameter name; None for magnitude scores.
        weights: Dense values of sparse parameters by parameter name; those missing start from the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        pattern: Pattern,
        rule: Rule,
        *,
        importance: Mapping[str, Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        missing = sorted(set(masks) - {name for name, _ in named})
        if missing:
            raise ValueError(f"no trainable parameter {missing[0]!r}")
        self.names = dict(named)
        self.sparse = [name for name, _ in named if name in masks]
        self.pattern = pattern
        self.rule = rule
        self.masked = rule.masked
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        for name, parameter in named:
            state = self.state[parameter] = {}
            weight = parameter.detach()
            given = (weights or {}).get(name, weight)
            if name in masks:
                mask = masks[name].to(weight.device)
                if mask.shape != weight.shape or mask.dtype != torch.bool:
                    raise ValueError(f"the mask of {name} must be bool {list(weight.shape)}")
                state["mask"], state["initial_mask"] = mask.clone(), mask.clone()
                if importance and name in importance:
                    state["importance"] = importance[name].to(weight.device, torch.float32)
            if name in masks or weight.dtype != torch.float32:
                state["dense"] = given.to(weight.device, torch.float32, copy=True)
            state["exp_avg"] = torch.zeros_like(weight, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(weight, dtype=torch.float32)
            self._write(parameter)

    def _write(self, parameter: Tensor) -> None:
        """Put what the model computes with into the parameter."""
        state = self.state[parameter]
        if "dense" not in state:
            return
        weight = state["dense"]
        if "mask" in state and self.masked:
            weight = weight.masked_fill(~state["mask"], 0.0)
        with torch.no_grad():
            parameter.copy_(weight)

    def advance(self, step: Step, clip: Tensor | None = None) -> None:
        """One update of every parameter that has a gradient.

        Args:
            step: The numbers of this step.
            clip: What gradients are multiplied by, a scalar tensor on their device (see `clip_factor`).
        """
        for parameter in self.names.values():
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            grad = parameter.grad.float() if clip is None else parameter.grad.float() * clip
            weight = state["dense"] if "dense" in state else parameter.detach()
            adamw_(weight, grad, state["exp_avg"], state["exp_avg_sq"], state.get("mask"), self.rule, step)
            self._write(parameter)

    def zero_grad(self) -> None:
        """Drop every gradient."""
        for parameter in self.names.values():
            parameter.grad = None

    @torch.no_grad()
    def refresh(self, hysteresis: float = 0.0) -> tuple[Tensor, Tensor]:
        """Choose every mask again from the float32 weights.

        Returns:
            Entries that changed since the last mask, and entries that differ from the first one;
            int64 scalars on the device, over all sparse parameters. A swap counts two.
        """
        changed, away = [], []
        for name in self.sparse:
            parameter = self.names[name]
            state = self.state[parameter]
            mask = refreshed(state["dense"], state["mask"], self.pattern, state.get("importance"), hysteresis)
            changed.append((mask ^ state["mask"]).sum())
            away.append((mask ^ state["initial_mask"]).sum())
            state["mask"].copy_(mask)
            self._write(parameter)
        return torch.stack(changed).sum(), torch.stack(away).sum()

    def finalize(self) -> None:
        """From now on the model computes with W ⊙ M."""
        self.masked = True
        for name in self.sparse:
            self._write(self.names[name])

    def weight(self, name: str) -> Tensor:
        """The float32 weight of a parameter, dense also where it is sparse."""
        parameter = self.names[name]
        dense: Tensor = self.state[parameter].get("dense", parameter.detach())
        return dense

    @property
    def sparse_numel(self) -> int:
        """Entries of all sparse parameters."""
        return sum(self.names[name].numel() for name in self.sparse)

    def tensors(self) -> dict[str, Tensor]:
        """Everything needed to continue, by `STATE/PARAMETER`."""
        kept: dict[str, Tensor] = {}
        for name, parameter in self.names.items():
            state = self.state[parameter]
            for key, value in state.items():
                kept[f"{key}/{name}"] = value
            if "dense" not in state:
                kept[f"parameter/{name}"] = parameter.detach()
        return kept

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`.

        Raises:
            KeyError: A tensor is missing, or one is there that this optimizer does not have.
        """
        own = self.tensors()
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())
            raise KeyError(f"training state differs in {odd[0]} and {len(odd) - 1} more tensors")
        for key, tensor in own.items():
            tensor.copy_(tensors[key])
        for parameter in self.names.values():
            self._write(parameter)


def clip_factor(parameters: Iterable[Tensor], limit: float) -> tuple[Tensor, Tensor]:
    """What gradients must be multiplied by so that their global norm is at most `limit`.

    Returns:
        The factor and the norm, float32 scalars on the device; nothing is read on the host.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch._foreach_norm(grads, 2, torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(list(norms)))
    return (limit / (norm + 1e-6)).clamp(max=1.0), norm
