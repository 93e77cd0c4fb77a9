"""Which linears of a block add their output to its stream, and where the stream is seen before they do.

Found by running a block, not by architecture names: the stream enters the block and every norm on its
way, and what a linear has put out must be the difference of the stream before and the stream after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.models.groups import Run, hooked, is_norm

AGREE = 0.1  # of the linear's output, that the difference may be off by; another linear's is off by all of it


def stream_doors(block: nn.Module, linears: Mapping[str, nn.Linear], run: Run) -> dict[str, nn.Module]:
    """For each linear that adds to the stream the module whose input is the stream without it.

    A linear whose output is scaled, normed or gated before it is added is not among them, nor one that
    is added together with another's.

    Args:
        block: Its weights in place.
        linears: Those of the block by full path.
        run: Runs the block on a micro-batch and returns its output.
    """
    entered: list[tuple[nn.Module, Tensor]] = []
    outputs: dict[str, Tensor] = {}

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor):
            entered.append((module, arguments[0]))

    def leave(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, arguments, output: outputs.__setitem__(name, output)

    doors = [block, *(module for module in block.modules() if module is not block and is_norm(module))]
    handles = [door.register_forward_pre_hook(enter) for door in doors]
    handles += [linear.register_forward_hook(leave(name)) for name, linear in linears.items()]
    with hooked(handles):
        final = run()
    streams = [(door, x) for door, x in entered if x.shape == final.shape]
    later = [x for _, x in streams] + [final]
    found: dict[str, nn.Module] = {}
    for name, output in outputs.items():
        if output.shape != final.shape:
            continue
        for place, (door, before) in enumerate(streams):
            if any(_adds(before, output, after) for after in later[place + 1 :]):
                found[name] = door
    return found


def _adds(before: Tensor, output: Tensor, after: Tensor) -> bool:
    """Whether what came between is the output."""
    wanted = output.float()
    off = (after.float() - before.float() - wanted).norm()
    return bool(off < AGREE * wanted.norm()) and bool(torch.isfinite(off))
