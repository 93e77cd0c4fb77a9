"""A second device without a GPU: tensors said to be on `meta` that hold values and refuse to meet the CPU's.

Under `elsewhere()` whatever is created on or sent to the device `meta` keeps its values on the CPU inside
a wrapper. An operation on tensors of both devices fails as it does between CUDA and the CPU; so does a
random number drawn there from a generator of here. So it is in threads that start meanwhile. `torch.inference_mode`
is `torch.no_grad` then: wrappers cannot make views of what was made in it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

THERE = torch.device("meta")
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)  # the ways from one device to the other
INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_)  # take indices of here


class Wrapped(Tensor):
    """Values that are somewhere else."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Wrapped:
        wrapped = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=THERE,
        )
        wrapped.values = values
        return wrapped

    def tolist(self) -> Any:
        """Numbers of here, as from any device; torch refuses it to wrappers."""
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    packet, flat = function.overloadpacket, tree_flatten((args, kwargs))[0]
    tensors = [value for value in flat if isinstance(value, Tensor)]
    there = any(isinstance(value, Wrapped) for value in tensors)
    wide = [value for value in tensors if value.dim() > 0 and not isinstance(value, Wrapped)]
    if there and wide and packet not in COPIES + INDEXING:
        raise RuntimeError(f"{function}: expected all tensors to be on the same device, found {THERE} and cpu")
    asked = kwargs.get("device")
    goes = there if asked is None else torch.device(asked) == THERE
    generator = kwargs.get("generator")
    if goes and generator is not None:
        raise RuntimeError(f"{function}: expected a generator of {THERE}, found one of {generator.device}")
    if goes and asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    found = function(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if function._schema.is_mutable:
        outs = [kwargs[argument.name] for argument in function._schema.arguments if argument.is_out]
        return args[0] if not outs else outs[0] if len(outs) == 1 else tuple(outs)
    return tree_map(lambda value: Wrapped(value) if isinstance(value, Tensor) else value, found) if goes else found


def _inner(value: Any) -> Any:
    return value.values if isinstance(value, Wrapped) else value


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """The second device."""

    def made(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:  # which no mode sees
        found = true_tensor(data, **kwargs)
        return found if device is None else found.to(device)

    def recording_nothing(mode: bool = True) -> Any:
        return torch.no_grad() if mode else nullcontext()

    def run(thread: threading.Thread) -> None:  # a mode is a setting of a thread
        with _Mode():
            true_run(thread)

    true_tensor, true_run = torch.tensor, threading.Thread.run
    with (
        _Mode(),
        patch.object(torch, "inference_mode", recording_nothing),
        patch.object(torch, "tensor", made),
        patch.object(threading.Thread, "run", run),
    ):
        yield THERE
