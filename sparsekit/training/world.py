"""The processes that train one model together, each with its share of every tensor and of every batch.

torch's `fully_shard` cuts each parameter along its rows (dimension 0). N:M groups lie along the
inputs (dimension 1), so every group is whole on one rank, and masks, decay and moments need nothing
from the others. What crosses ranks: weights before a block computes, gradients after it, the
gradient's norm, and counts of flips.

A job on one device has a world of one and calls nothing of torch.distributed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from sparsekit.errors import MethodError
from sparsekit.training.blocks import blocks_of
from sparsekit.training.lowbits import BLOCK

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass(frozen=True, slots=True)
class World:
    """Who takes part.

    Attributes:
        rank: Of this process.
        size: Processes in all.
        mesh: Their devices; None for one process.
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    @classmethod
    def join(cls, device_type: str) -> World:
        """Meet the processes that `torch.distributed.run` has started with this one."""
        dist.init_process_group(BACKENDS[device_type])
        size = dist.get_world_size()
        return cls(dist.get_rank(), size, init_device_mesh(device_type, (size,)))

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def shard(self, model: nn.Module) -> None:
        """Leave each rank its rows of every parameter, gathered a block at a time when they are needed.

        It comes before an optimizer is made: parameters are other objects afterwards. What lies outside
        the blocks is one unit, so tied embeddings are cut once; it stays whole from the forward to the
        end of the backward, because the loss reads the head's weight.
        """
        if self.mesh is None:
            return
        # half-precision gradients are added in float32
        low = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in model.parameters())
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if low else None)
        for block in blocks_of(model):
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        fully_shard(model, mesh=self.mesh, mp_policy=policy, reshard_after_forward=False)

    def rest(self, model: nn.Module) -> None:
        """Give back what a forward without a backward has left whole, before weights change."""
        if isinstance(model, FSDPModule):
            model.reshard()

    def share(self, rows: Tensor) -> Tensor:
        """This rank's part of a batch [windows, ...]; the parts in order are the batch."""
        if self.size == 1:
            return rows
        if len(rows) % self.size:
            raise MethodError(f"batch {len(rows)} does not divide among {self.size} processes")
        return rows.chunk(self.size)[self.rank]

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor over all ranks, as a new tensor on all of them."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def means(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Means over all ranks."""
        return {name: self.sum(value) / self.size if self.size > 1 else value for name, value in values.items()}

    def told(self, value: float) -> float:
        """What the first rank says; for what is measured with a clock and must be the same everywhere."""
        if self.mesh is None:
            return value
        given = torch.tensor([value], dtype=torch.float64, device=self.mesh.device_type)
        dist.broadcast(given, 0)
        return float(given)

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here, sharing its memory; itself when it is not sharded."""
    plain = tensor.detach()
    return plain.to_local() if isinstance(plain, DTensor) else plain


def rows_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """The rows of a whole tensor that belong to the part of `parameter` that is here."""
    if not isinstance(parameter, DTensor):
        return whole
    start, count = first_row(parameter), len(local(parameter))
    return whole[start : start + count]


def first_row(parameter: Tensor) -> int:
    """Index of the first row that is here; rows are cut as `torch.chunk` cuts them."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh = parameter.device_mesh
    step = -(-len(parameter) // mesh.size())
    return min(len(parameter), step * mesh.get_local_rank())


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together on every rank; itself when it is not sharded."""
    plain = tensor.detach()
    return plain.full_tensor() if isinstance(plain, DTensor) else plain


def as_sharded(part: Tensor, parameter: Tensor) -> Tensor:
    """State of a sharded parameter as one tensor of all ranks, sharing the part's memory.

    Args:
        part: Contiguous, with the parameter's local rows, or flat with a fixed number of entries for each element.
        parameter: The parameter.
    Raises:
        MethodError: It is flat and the ranks' parts do not join into the flat whole.
    """
    if not isinstance(parameter, DTensor):
        return part
    own, mesh = local(parameter), parameter.device_mesh
    if part.dim() == own.dim() and len(part) == len(own):
        shape = torch.Size([len(parameter), *part.shape[1:]])
        stride = part.stride()
    else:
        shape, stride = torch.Size([len(part) * mesh.size()]), (1,)
        if own.numel() * mesh.size() != parameter.numel() or own.numel() % BLOCK:
            raise MethodError(
                f"states: float8 needs whole blocks of {BLOCK} on each rank; a parameter of shape "
                f"{list(parameter.shape)} does not divide so among {mesh.size()} processes"
            )
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
