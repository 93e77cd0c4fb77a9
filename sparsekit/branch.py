"""The low-rank branch of a sparse linear: y = (M ⊙ W) x + S (X x).

In SLoRB X [in/k, in] sums blocks of k inputs, S [out, in/k] starts with the mean of what pruning took from each
block, so that every block's sum of weights is what it was. Both are dense, so the branch is no part of
the N:M weight: it stays beside it as tensors of its own and is counted and reported as "2:4+LR". Other
methods choose X and S freely, of any rank, and may hold them as integers.

Source: Huang et al. 2024, arXiv:2407.20584, Eq. 5-6.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.errors import MethodError
from sparsekit.quant import Grid, QuantizedWeight

ATTRIBUTE = "slorb"  # of a linear that computes a branch
LENGTHS = (16, 32, 64)


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """A low-rank branch.

    Attributes:
        up: S, [out, in/k], or [out, rank].
        down: X, [in/k, in]; None where it sums blocks of consecutive inputs and has no parameters.
        length: k, inputs of a block; inputs over rank, rounded down, where X has no blocks.
        integers: Sᵀ [rank, out] and X as integers, where that is what they are: `up` and `down` are then
            what these stand for, and nothing may change them.
    """

    up: Tensor
    down: Tensor | None
    length: int
    integers: tuple[QuantizedWeight, QuantizedWeight] | None = None

    @classmethod
    def of_integers(cls, up: QuantizedWeight, down: QuantizedWeight) -> Branch:
        """A branch out of integers.

        Args:
            up: Sᵀ, [rank, out]: a group of outputs of one direction shares a step.
            down: X, [rank, in].
        """
        rank, inputs = down.codes.shape
        return cls(up.dequantize().t().contiguous(), down.dequantize(), inputs // rank, (up, down))

    @property
    def parameters(self) -> int:
        """How many it has."""
        return self.up.numel() + (0 if self.down is None else self.down.numel())

    @property
    def inputs(self) -> int:
        """Of its linear."""
        return self.up.shape[1] * self.length if self.down is None else self.down.shape[1]

    @property
    def projection(self) -> Tensor:
        """X written out, [in/k, in]."""
        return block_sums(self.up.shape[1], self.length).to(self.up) if self.down is None else self.down

    @property
    def matrix(self) -> Tensor:
        """S X, dense [out, in]: what the branch computes, to measure errors with. It is never part of the weight."""
        if self.down is None:
            return self.up.repeat_interleave(self.length, 1)
        return self.up @ self.down

    def rescaled(self, scale: Tensor) -> Branch:
        """The branch for inputs that will be divided by `scale` [in]; X gets parameters by it.

        Raises:
            MethodError: It holds integers.
        """
        return replace(self.of_floats(), down=self.projection * scale)

    def of_floats(self) -> Branch:
        """The same branch, to be changed.

        Raises:
            MethodError: It holds integers.
        """
        if self.integers is not None:
            raise MethodError("its low-rank branch holds integers and cannot be rescaled; add it after this step")
        return self

    def stored(self, dtype: torch.dtype) -> Branch:
        """The branch with floats as a model of this dtype stores them, in float32."""
        down = None if self.down is None else self.down.to(dtype).float()
        return replace(self, up=self.up.to(dtype).float(), down=down)

    def to(self, device: torch.device) -> Branch:
        """On a device."""
        down = None if self.down is None else self.down.to(device)
        pair = None if self.integers is None else (self.integers[0].to(device), self.integers[1].to(device))
        return Branch(self.up.to(device), down, self.length, pair)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Its parameters by name."""
        yield "up", self.up
        if self.down is not None:
            yield "down", self.down


def block_sums(rank: int, length: int) -> Tensor:
    """X of the paper: row i is 1 on the inputs of block i; float32 [rank, rank * length]."""
    return torch.eye(rank).repeat_interleave(length, 1)


def hollow(rank: int, out: int, into: int, *, length: int | None = None, down: bool = True) -> Branch:
    """A branch of floats that has shapes and no values, on the meta device.

    Args:
        rank: Columns of S.
        out: Outputs of the linear.
        into: Its inputs.
        length: Inputs of a block; inputs over rank where X has none.
        down: X is there.
    """
    projection = torch.empty(rank, into, device="meta") if down else None
    return Branch(torch.empty(out, rank, device="meta"), projection, length or into // rank)


def hollow_integers(rank: int, count: int, bits: int, group_size: int) -> QuantizedWeight:
    """The same for a factor [rank, count] of integers."""
    scale = torch.empty(rank, count // group_size, device="meta")
    codes = torch.empty(rank, count, device="meta")
    return QuantizedWeight.of(codes, Grid.of_scale(scale, bits), group_size=group_size, symmetric=True)


def check_length(length: int, inputs: int, name: str = "") -> None:
    """Refuse blocks that do not divide a row.

    Raises:
        MethodError: With the layer, where it has a name.
    """
    if inputs % length:
        raise MethodError(f"slorb {length} does not divide {inputs} inputs", layer=name or None)


def mean_branch(weight: Tensor, mask: Tensor, length: int, *, trained: bool, name: str = "") -> Branch:
    """S_ij = mean over block j of what the mask takes from row i; X as `block_sums`.

    Args:
        weight: float32 [out, in], dense.
        mask: bool [out, in], True = kept.
        length: k; divides the inputs.
        trained: X is a parameter, and not only a sum.
        name: Of the layer, for the error.
    Raises:
        MethodError: k does not divide the inputs.
    """
    inputs = weight.shape[1]
    check_length(length, inputs, name)
    taken = weight.masked_fill(mask, 0.0)
    up = taken.reshape(len(weight), -1, length).mean(2)  # [out, in/k]
    return Branch(up, block_sums(inputs // length, length).to(up) if trained else None, length)


class LowRank(nn.Module):
    """A branch as a module; it hangs on its linear as `ATTRIBUTE`.

    Args:
        branch: Its first values, which are copied.
        dtype: What it computes in.
        device: Where.
    """

    def __init__(self, branch: Branch, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.length = branch.length
        self.up = nn.Parameter(branch.up.to(device, dtype, copy=True), requires_grad=False)
        self.down: nn.Parameter | None = None
        if branch.down is not None:
            self.down = nn.Parameter(branch.down.to(device, dtype, copy=True), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        summed = x.reshape(*x.shape[:-1], -1, self.length).sum(-1) if self.down is None else F.linear(x, self.down)
        return F.linear(summed, self.up)


class Branched(nn.Linear):
    """A linear that computes W x + S (X x); its weight is the one it had, and it still is an `nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        added: Tensor = self.get_submodule(ATTRIBUTE)(input)
        return super().forward(input) + added


def attach(linear: nn.Linear, branch: Branch) -> None:
    """Let a linear compute W x + S (X x); its weight stays the one it has.

    Its class changes, and not a hook: torch.compile asks for the class of a module before it takes a
    graph it has, and not for its hooks, so a graph without the branch would be taken.

    Raises:
        MethodError: It is of a class of its own, whose forward would be lost.
    """
    if type(linear) not in (nn.Linear, Branched):
        raise MethodError(f"a {type(linear).__name__} is no plain nn.Linear and can carry no low-rank branch")
    detach(linear)
    linear.add_module(ATTRIBUTE, LowRank(branch, linear.weight.dtype, linear.weight.device))
    linear.__class__ = Branched


def detach(linear: nn.Linear) -> None:
    """Take the branch off, if there is one."""
    if attached(linear):
        del linear._modules[ATTRIBUTE]
        linear.__class__ = nn.Linear


def attached(linear: nn.Module) -> bool:
    """Whether a linear computes a branch."""
    return ATTRIBUTE in linear._modules


def collected(model: nn.Module, params: dict[str, Tensor]) -> Iterator[tuple[str, Branch]]:
    """The branches of a model with new values, by linear; their tensors leave `params`.

    Args:
        model: Where branches are attached.
        params: Values by parameter name.
    """
    for name, module in model.named_modules():
        if isinstance(module, LowRank) and f"{name}.up" in params:
            down = params.pop(f"{name}.down", None)
            yield name.removesuffix(f".{ATTRIBUTE}"), Branch(params.pop(f"{name}.up"), down, module.length)
