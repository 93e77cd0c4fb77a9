"""What methods promise that see more than a layer: trainers, and allocations of sparsity."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

import torch

from sparsekit.allocate import Measured, checked
from sparsekit.errors import ContractError, MethodError
from sparsekit.pluginfile import described
from sparsekit.registry import METHODS
from sparsekit.state import LinearState
from sparsekit.stats import added, begun
from sparsekit.testing.contract import Subject, as_the_driver
from sparsekit.testing.specimens import CPU, specimen, trained, training_job

TARGETS = (0.3, 0.5, 0.7)
AGREEMENT = 0.01  # how far a layer's sparsity on CUDA may be from that on a CPU: scores near a threshold


def allocation(subject: Subject) -> None:
    """Every layer gets a fraction, their mean is the one asked for, two calls agree, and CPU and CUDA do."""
    for target in TARGETS:
        first, second = _allotted(subject, target, CPU), _allotted(subject, target, CPU)
        if first != second:
            raise ContractError("two calls give different sparsities")
        if torch.cuda.is_available():
            same_elsewhere(subject, target, first, torch.device("cuda"))


def same_elsewhere(subject: Subject, target: float, here: Mapping[str, float], device: torch.device) -> None:
    """The sparsities are those of the CPU when weights and statistics are on another device."""
    for name, share in _allotted(subject, target, device).items():
        if abs(share - here[name]) > AGREEMENT:
            raise ContractError(f"{name} gets the sparsity {here[name]:.3f} on a CPU and {share:.3f} on {device.type}")


def _allotted(subject: Subject, target: float, device: torch.device) -> dict[str, float]:
    """What the method gives made-up layers on a device, checked as the driver checks it."""
    sizes: dict[str, int] = {}
    try:
        found = subject.method.function(_layers(subject, sizes, device), target, **subject.arguments)
    except Exception as error:  # a method may fail in any way; the promise is that it does not
        told = described(error, inspect.getfile(inspect.unwrap(subject.method.function)))
        raise ContractError(f"it failed on {device.type}: {told}") from error
    try:
        return checked(subject.method.name, found, sizes, target)
    except MethodError as error:
        raise ContractError(f"{error}; weight the mean by layer.state.source.numel()") from error


def _layers(subject: Subject, sizes: dict[str, int], device: torch.device) -> Iterator[Measured]:
    """Three blocks of two layers of different sizes; later ones have more outliers."""
    given = specimen(METHODS.get("wanda"))
    (state,) = given.layers.values()
    for block in range(3):
        for number, rows in enumerate((16, 8)):
            weight = state.source[:rows].clone()
            weight[:, : 4 * (block + 1)] *= 10
            statistic = None
            if subject.method.stats is not None:
                statistic = begun(subject.method.stats, weight.shape[1], device)
                generator = torch.Generator().manual_seed(block)
                added(statistic, torch.randn(64, weight.shape[1], generator=generator).to(device))
            name = f"blocks.{block}.linear{number}"
            sizes[name] = weight.numel()
            yield Measured(LinearState(name, weight.to(device)), statistic, block, number)


def training(subject: Subject, device: torch.device = CPU) -> None:
    """A method of scope model returns every linear with its mask, touches nothing else and repeats itself."""
    sparse: list[Mapping[str, LinearState]] = []
    for _ in range(2):
        with training_job(device) as job:
            before = {n: p.clone() for n, p in job.teacher.named_parameters()}
            tokens = job.tokens.clone()
            result = trained(subject.method, subject.arguments, job)
            if any(not torch.equal(p, before[n]) for n, p in job.teacher.named_parameters()):
                raise ContractError("it changed the teacher, which is the dense original")
            if not torch.equal(tokens, job.tokens):
                raise ContractError("it changed the training tokens")
            if set(result.linears) != set(job.linears):
                raise ContractError("it did not return the state of every linear it was given in job.linears")
            for name, after in result.linears.items():
                as_the_driver(subject, job.linears[name], after, subject.pattern)
            sparse.append(result.linears)
    if any(not torch.equal(state.weight, sparse[1][name].weight) for name, state in sparse[0].items()):
        raise ContractError("two runs with the same seed differ; draw from job.seed only")
