"""What is particular to an architecture: layers that are linear but no `nn.Linear`, made into one.

Conv1D of GPT-2 becomes a transposed `nn.Linear`; experts that transformers fuses into 3-D
parameters become one `nn.Linear` each. Every other module sees no difference, and `Origin` tells
how to write the tensors back under the names and shapes Hugging Face uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Form = Literal["same", "transposed", "expert"]
FUSED = ("gate_up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a canonical parameter comes from.

    Attributes:
        name: Parameter name in the Hugging Face model.
        form: `same`, `transposed`, or `expert` (one slice of a 3-D parameter).
        expert: Index of the slice.
    """

    name: str
    form: Form = "same"
    expert: int = 0

    def take(self, tensor: Tensor) -> Tensor:
        """The canonical tensor out of the stored one."""
        if self.form == "transposed":
            return tensor.t().contiguous()
        return tensor[self.expert] if self.form == "expert" else tensor

    def shape(self, canonical: torch.Size, experts: int) -> tuple[int, ...]:
        """Shape of the stored tensor, given that of the canonical one."""
        if self.form == "transposed":
            return tuple(reversed(canonical))
        return (experts, *canonical) if self.form == "expert" else tuple(canonical)


class UnfusedExperts(nn.Module):
    """Experts with one linear for each projection, computing what transformers' fused ones compute."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        gate_up, down = fused.gate_up_proj, fused.down_proj
        assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)  # `_is_fused` has looked
        self.act_fn = cast("Callable[[Tensor], Tensor]", fused.act_fn)
        self.gate_up_proj = nn.ModuleList(_linear(gate_up.shape[2], gate_up.shape[1]) for _ in range(len(gate_up)))
        self.down_proj = nn.ModuleList(_linear(down.shape[2], down.shape[1]) for _ in range(len(down)))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Add each expert's weighted output for the tokens routed to it.

        Args:
            hidden_states: [tokens, width].
            top_k_index: int [tokens, k], the experts of each token.
            top_k_weights: [tokens, k].
        """
        total = torch.zeros_like(hidden_states)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            slot, token = torch.where(top_k_index.t() == expert)
            if len(token) == 0:
                continue
            gate, up = gate_up(hidden_states[token]).chunk(2, dim=-1)
            output = down(self.act_fn(gate) * up) * top_k_weights[token, slot, None]
            total.index_add_(0, token, output.to(total.dtype))
        return total


def canonicalise(model: nn.Module) -> dict[str, Origin]:
    """Replace what is linear but no `nn.Linear`, in place; parameters are expected on meta.

    Returns:
        The origin of every canonical parameter that is stored differently.
    """
    origins: dict[str, Origin] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            width, out = module.weight.shape
            _replace(model, path, _linear(width, out, bias=True))
            origins[f"{path}.weight"] = Origin(f"{path}.weight", "transposed")
        elif _is_fused(module):
            experts = UnfusedExperts(module)
            _replace(model, path, experts)
            for part in FUSED:
                for expert in range(len(getattr(experts, part))):
                    origins[f"{path}.{part}.{expert}.weight"] = Origin(f"{path}.{part}", "expert", expert)
    return origins


def _is_fused(module: nn.Module) -> bool:
    """Whether these are 3-D experts in the layout [experts, out, in] without biases."""
    own = dict(module.named_parameters(recurse=False))
    if set(own) != set(FUSED) or not hasattr(module, "act_fn") or hasattr(module, "limit"):
        return False  # gpt-oss clamps its gates and stores [experts, in, out]
    gate_up, down = own["gate_up_proj"], own["down_proj"]
    return gate_up.dim() == 3 and gate_up.shape[1] == 2 * down.shape[2] and gate_up.shape[2] == down.shape[1]


def _linear(width: int, out: int, *, bias: bool = False) -> nn.Linear:
    with init_empty_weights(include_buffers=False):
        return nn.Linear(width, out, bias=bias)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
