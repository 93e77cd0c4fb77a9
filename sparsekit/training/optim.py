"""AdamW that trains N:M sparse weights: the dense weight lives in the optimizer, the model holds W ⊙ M.

The loss is computed with the masked weight, so the gradient that reaches a parameter is ∂L/∂(W ⊙ M),
which is what the straight-through estimator hands to every entry of W, pruned ones included. No
module is changed and no autograd function is needed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsekit.kernels import Kernels, fused_optimizer
from sparsekit.pattern import Pattern
from sparsekit.training.grids import fitted
from sparsekit.training.lowbits import Memory, unpacked_bits
from sparsekit.training.parameter_state import MOMENTS, State, computed, first_state, update_
from sparsekit.training.scaling import scaled
from sparsekit.training.update import DecayRule, Rule, SecondMoment, Step, adamw_, clip_factor, refreshed, widest
from sparsekit.training.world import ALONE, World, as_sharded, local, rows_of, whole

__all__ = ["DecayRule", "Rule", "SecondMoment", "SparseAdamW", "Step", "adamw_", "clip_factor", "refreshed"]


class SparseAdamW:
    """AdamW over a model in which some weights are sparse.

    `masked` tells whether the model computes with W ⊙ M now; it starts as the rule says, and
    `finalize` sets it. `rounded` tells whether it computes with that put on integer grids; `regrid` sets
    it. `flips` are the counts of the last refresh, over all ranks.

    A model that is sharded over ranks has been so before; `names` are then the rows that are here, and
    everything below works on them as if they were the parameters.

    `state` holds what `parameter_state` says of each.

    Args:
        model: Its parameters that require a gradient are trained.
        masks: First mask of each sparse parameter by parameter name; of the whole parameter, as are `weights`.
        pattern: What every refreshed mask keeps.
        rule: The update rule.
        importance: Input norms [in] of sparse parameters by parameter name; None for magnitude scores.
        weights: Dense values of sparse parameters by parameter name; those missing start from the model's.
        memory: Precision of the state.
        kernels: `auto` runs one fused Triton launch a step where it can, `reference` plain torch.
        world: The ranks that share the model.
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
        memory: Memory = Memory(),
        kernels: Kernels = "auto",
        world: World = ALONE,
    ) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        missing = sorted(set(masks) - {name for name, _ in named})
        if missing:
            raise ValueError(f"no trainable parameter {missing[0]!r}")
        if rule.rounding is not None and (rule.scaling or not rule.masked):
            raise ValueError("weights on integer grids have no scales of rows, and pruned ones have no level")
        self.parameters = dict(named)
        self.names = {name: parameter if world.size == 1 else local(parameter) for name, parameter in named}
        self.sparse = [name for name, _ in named if name in masks]
        self.pattern, self.rule, self.memory, self.world = pattern, rule, memory, world
        self.masked, self.rounded = rule.masked, False
        self.state: dict[Tensor, State] = {}
        known = weights or {}
        for name, parameter in self.names.items():
            given = rows_of(known[name], self.parameters[name]) if name in known else parameter.detach()
            first = self._rows(name, masks[name]) if name in masks else None
            self.state[parameter] = first_state(name, parameter, first, given, pattern, rule, memory)
            if importance and name in importance and name in masks:
                self.state[parameter]["importance"] = importance[name].to(parameter.device, torch.float32)
            self._write(parameter)
        self.flips = _no_flips(named[0][1].device)
        self._fused = fused_optimizer(kernels, self.names, self.state, pattern, rule, memory)

    def _rows(self, name: str, mask: Tensor) -> Tensor:
        """The rows of a mask that are here."""
        if mask.shape != self.parameters[name].shape or mask.dtype != torch.bool:
            raise ValueError(f"the mask of {name} must be bool {list(self.parameters[name].shape)}")
        return rows_of(mask, self.parameters[name])

    def _write(self, parameter: Tensor) -> None:
        """Put what the model computes with into the parameter."""
        state = self.state[parameter]
        if "dense" not in state:
            return
        weight = computed(state, self.rule, masked=self.masked, rounded=self.rounded)
        if "scale" in state:
            weight = scaled(weight, state["scale"])
        with torch.no_grad():
            parameter.copy_(weight)

    def advance(self, step: Step, clip: Tensor | None = None) -> None:
        """One update of every parameter that has a gradient, then new masks if the step says so.

        Args:
            step: The numbers of this step.
            clip: What gradients are multiplied by, a scalar tensor on their device (see `clip_factor`).
        """
        if self._fused is not None:
            if self.rounded and self.rule.learned:
                self._fused.learn(step, clip)
            counts = self._fused.advance(step, clip, masked=self.masked, rounded=self.rounded)
            if counts is not None:
                self._count(*counts)
                if step.refresh and self.fits:
                    self.regrid()
                return
        else:
            for index, parameter in enumerate(self.names.values()):
                if parameter.grad is not None:
                    grad = parameter.grad.to(widest(parameter.dtype))
                    grad = grad if clip is None else grad * clip
                    state, masked, rounded = self.state[parameter], self.masked, self.rounded
                    update_(state, parameter, grad, index, self.rule, self.memory, step, masked=masked, rounded=rounded)
                    self._write(parameter)
        if step.refresh:
            self.refresh(step.hysteresis)

    def zero_grad(self) -> None:
        """Drop every gradient."""
        for parameter in (*self.names.values(), *self.parameters.values()):
            parameter.grad = None

    def forget(self) -> None:
        """Empty both moments, as before the first step."""
        for state in self.state.values():
            for key in MOMENTS & state.keys():
                state[key].zero_()

    @property
    def moved(self) -> bool:
        """Whether any second moment is not 0, as after every step; of the rows that are here."""
        return any(bool(state["exp_avg_sq"].any()) for state in self.state.values())

    def take_gradients(self) -> None:
        """Give the rows that are here the gradients that the backward has left in a sharded model."""
        if self.world.size > 1:
            for name, parameter in self.parameters.items():
                self.names[name].grad = None if parameter.grad is None else local(parameter.grad)

    @torch.no_grad()
    def refresh(self, hysteresis: float = 0.0) -> tuple[Tensor, Tensor]:
        """Choose every mask again from the dense weights.

        Returns:
            Entries that changed since the last mask, and entries that differ from the first one;
            int64 scalars on the device, over all sparse parameters. A swap counts two.
        """
        changed, away = [], []
        for name in self.sparse if self.pattern.sparsity else ():
            parameter = self.names[name]
            state = self.state[parameter]
            dense = state["dense"].to(widest(state["dense"].dtype))
            mask = refreshed(dense, state["mask"], self.pattern, state.get("importance"), hysteresis)
            first = state["initial_mask"]
            changed.append((mask ^ state["mask"]).sum())
            away.append((mask ^ (first if first.dtype == torch.bool else unpacked_bits(first, mask.shape))).sum())
            state["mask"].copy_(mask)
            if not self.fits:
                self._write(parameter)
        if changed:
            self._count(torch.stack(changed).sum(), torch.stack(away).sum())
        if self.fits:
            self.regrid()
        return self.flips

    @property
    def fits(self) -> bool:
        """Whether weights are on grids that are fitted with every mask."""
        return self.rounded and not self.rule.learned

    def _count(self, changed: Tensor, away: Tensor) -> None:
        counts = self.world.sum(torch.stack([changed, away]))
        self.flips = counts[0], counts[1]

    def finalize(self) -> None:
        """From now on the model computes with W ⊙ M."""
        self.compute_with(masked=True, rounded=self.rounded)

    def compute_with(self, *, masked: bool, rounded: bool) -> None:
        """From now on the model computes with W or with W ⊙ M, and with that as it is or on the grids of now."""
        self.masked, self.rounded = masked, rounded
        self._write_sparse()

    @torch.no_grad()
    def regrid(self) -> None:
        """Fit the grids to the weights and masks of now; from now on the model computes with weights on them."""
        rounding = self.rule.rounding
        assert rounding is not None  # or nobody calls
        for name in self.sparse:
            state = self.state[self.names[name]]
            step = state["step"]
            step.copy_(fitted(state["dense"], state["mask"], rounding, state["mask"].shape[1] // step.shape[1]))
            if self.rule.learned:
                state["step_dense"].copy_(step)
        self.compute_with(masked=self.masked, rounded=True)

    def _write_sparse(self) -> None:
        """`_write` of every sparse parameter."""
        if self._fused is not None and self.rounded:
            self._fused.write(masked=self.masked)
            return
        for name in self.sparse:
            self._write(self.names[name])

    def weight(self, name: str) -> Tensor:
        """The whole float32 weight of a parameter with its scales, dense also where it is sparse."""
        parameter = self.names[name]
        state = self.state[parameter]
        dense: Tensor = state.get("dense", parameter.detach())
        if "scale" in state:
            dense = scaled(dense, state["scale"])
        return whole(as_sharded(dense, self.parameters[name])).float()

    def mask(self, name: str) -> Tensor:
        """The whole mask of a sparse parameter."""
        own = self.state[self.names[name]]["mask"]
        if self.world.size == 1:
            return own
        # as bytes: collectives of some backends know no bool
        return whole(as_sharded(own.to(torch.uint8), self.parameters[name])).bool()

    def step(self, name: str) -> Tensor:
        """The whole steps of a sparse parameter's groups, float32 [out, groups]."""
        return whole(as_sharded(self.state[self.names[name]]["step"], self.parameters[name]))

    @property
    def fused(self) -> bool:
        """Whether the Triton kernel runs the step."""
        return self._fused is not None

    @property
    def sparse_numel(self) -> int:
        """Entries of all sparse parameters."""
        return sum(self.parameters[name].numel() for name in self.sparse)

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

    def shared_tensors(self) -> dict[str, Tensor]:
        """The same as tensors of all ranks together; what is written into them is written into the state."""
        own = self.tensors()
        return {
            key: value if key.startswith("importance/") else as_sharded(value, self.parameters[key.partition("/")[2]])
            for key, value in own.items()
        }

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
        self.rewrite()

    def rewrite(self) -> None:
        """Put what the model computes with into every parameter, after its state was changed from outside."""
        for parameter in self.names.values():
            self._write(parameter)


def _no_flips(device: torch.device) -> tuple[Tensor, Tensor]:
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    return counts[0], counts[1]
