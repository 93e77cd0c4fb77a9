"""What every evaluator promises, one function for each promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsekit.errors import ContractError
from sparsekit.evaluation.measures import Forward, Measure
from sparsekit.models.chain import Chain
from sparsekit.models.view import ModelView
from sparsekit.testing.specimens import CPU

EvaluatorCheck = Callable[[Measure], None]


def finite(measure: Measure) -> None:
    """It returns numbers by name, all of them finite."""
    with _model() as (forward, _):
        measure.of(forward, _windows())


def purity(measure: Measure) -> None:
    """Neither the model nor the windows it is given are modified."""
    windows = _windows()
    with _model() as (forward, module):
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        measure.of(forward, windows)
        for name, tensor in module.state_dict().items():
            if not torch.equal(tensor, before[name]):
                raise ContractError(f"it changed the model: {name} differs after the call; only call forward")
    if not torch.equal(windows, _windows()):
        raise ContractError("it changed the windows, which other measurements read; work on windows.clone()")


def determinism(measure: Measure) -> None:
    """The same model and windows give the same numbers."""
    with _model() as (forward, _), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = measure.of(forward, _windows())
        torch.manual_seed(1)
        second = measure.of(forward, _windows())
    if first != second:
        name = next(key for key in {**first, **second} if first.get(key) != second.get(key))
        raise ContractError(
            f"two calls give {name} {first.get(name)} and {second.get(name)}; draw random numbers from "
            "torch.Generator().manual_seed(seed), with seed a parameter, and keep nothing between calls"
        )


def same_names(measure: Measure) -> None:
    """Another model gives numbers of the same names: they are columns of a comparison."""
    with _model() as (forward, module):
        first = measure.of(forward, _windows())
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.5)
        other = measure.of(forward, _windows())
    if first.keys() != other.keys():
        told = f"{', '.join(first)} for one model and {', '.join(other)} for another one"
        raise ContractError(f"it returns {told}; return the same names always")


def one_window(measure: Measure) -> None:
    """A single window works."""
    with _model() as (forward, _):
        measure.of(forward, _windows()[:1])


def devices(measure: Measure) -> None:
    """A model on CUDA works; the windows stay on the CPU, the logits are where the model is."""
    with _model(torch.device("cuda")) as (forward, _):
        measure.of(forward, _windows())


def documented(measure: Measure) -> None:
    """The first line of its docstring says what is measured."""
    if not (measure.evaluator.doc or "").strip():
        raise ContractError("it has no docstring; its first line stands in the list of sparsekit methods")


EVALUATOR_CHECKS: tuple[EvaluatorCheck, ...] = (
    finite, purity, determinism, same_names, one_window, devices, documented,
)  # fmt: skip


def _windows() -> Tensor:
    """Made-up tokens, int32 [3, 16], the same at every call."""
    return torch.randint(0, 1000, (3, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


@contextmanager
def _model(device: torch.device = CPU) -> Iterator[tuple[Forward, nn.Module]]:
    """The embedded model as a run hands it over, and the module behind it."""
    view = ModelView.open("builtin:tiny", dtype="float32", device=device)
    with Chain(view).forward() as forward:
        yield forward, view.module
