"""Where the tensors of every parameter are, as the fused optimizer reads it on the device.

One row of int64 for each parameter, and one entry for each chunk of `CHUNK` elements that says whose
chunk it is. Both are made once; the rows are sent again only when a pointer has changed, as those of
the gradients do when they are allocated anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

CHUNK = 1024  # elements of one program; 4 blocks of float8, 4 elements a thread
# columns of a row; the kernel reads them by these positions
COLUMNS = (
    "parameter", "grad", "dense", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale",
    "mask", "initial_mask", "importance", "numel", "columns", "decays", "index", "step", "group",
)  # fmt: skip
ALIGNMENT = 16  # bytes of the widest load


class Table:
    """Pointers and chunks of parameters of one dtype.

    Args:
        parameters: The parameters with their index in the optimizer.
        state: State of each.
    """

    def __init__(self, parameters: Sequence[tuple[int, Tensor]], state: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        self.parameters, self.state = parameters, state
        self.device = parameters[0][1].device
        counts = torch.tensor([-(-parameter.numel() // CHUNK) for _, parameter in parameters])
        owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
        before = (counts.cumsum(0) - counts)[owner]
        place = torch.arange(len(owner)) - before
        self.chunks = torch.stack([owner, place], 1).to(torch.int32).to(self.device)  # [chunks, 2]
        self._rows: list[list[int]] = []
        self._sent: Tensor | None = None
        self.aligned = False

    def rows(self) -> Tensor:
        """The rows of now, int64 [parameters, columns] on the device."""
        rows = [self._row(index, parameter) for index, parameter in self.parameters]
        if self._sent is None or rows != self._rows:
            made = torch.tensor(rows, dtype=torch.int64)
            if self.device.type == "cuda":
                made = made.pin_memory()
            self._rows, self._sent = rows, made.to(self.device, non_blocking=True)
            self.aligned = all(pointer % ALIGNMENT == 0 for row in rows for pointer in row[:10])
        return self._sent

    def _row(self, index: int, parameter: Tensor) -> list[int]:
        state, grad = self.state[parameter], parameter.grad
        step = state.get("step")
        if grad is not None and not grad.is_contiguous():
            grad = parameter.grad = grad.contiguous()
        tensors = [parameter, grad, state.get("dense", parameter), *(state.get(key) for key in COLUMNS[3:10])]
        return [
            *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
            parameter.numel(),
            parameter.shape[-1] if parameter.dim() else 1,
            int(parameter.dim() >= 2),
            index,
            0 if step is None else step.data_ptr(),
            1 if step is None else parameter.shape[-1] // step.shape[-1],
        ]
