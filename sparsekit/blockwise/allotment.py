"""The driver of allocation methods: shows them every layer of a step, and keeps what they decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.allocate import Allocate, Measured, checked
from sparsekit.blockwise.activations import Activations
from sparsekit.blockwise.holding import HOLDINGS, Holding
from sparsekit.blockwise.stacking import sent
from sparsekit.blockwise.walk import resident
from sparsekit.checkpoint import BlockState, StepStore
from sparsekit.errors import MethodError
from sparsekit.files import read_json, write_json
from sparsekit.ladder import check_finite
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.stats import Statistic


@dataclass(frozen=True, slots=True)
class Allotment:
    """Works the sparsities of one step out.

    Attributes:
        view: The model.
        allocate: What decides.
        selected: Layers of the step.
        before: State of a block before the step.
        tokens: Calibration windows [samples, seq_len], None for a method without statistics.
        target: Mean sparsity over all weights of the step.
        holding: What is held on the device.
    """

    view: ModelView
    allocate: Allocate
    selected: frozenset[str]
    before: Callable[[int], BlockState]
    tokens: Tensor | None
    target: float
    holding: Holding = HOLDINGS["auto"]

    def kept(self, store: StepStore) -> dict[str, Pattern]:
        """The pattern of every layer; written to the step's directory, and read from there on resume.

        Raises:
            MethodError: The method left a layer out, gave no fraction, or missed the mean.
        """
        path = store.directory / "allocation.json"
        if path.exists():
            shares: dict[str, float] = read_json(path)
        else:
            shares = self.work()
            write_json(path, shares)
        return {name: Pattern.unstructured(share) for name, share in shares.items()}

    def work(self) -> dict[str, float]:
        """The sparsity of every layer."""
        sizes: dict[str, int] = {}

        def noting() -> Iterator[Measured]:
            for layer in self._layers():
                sizes[layer.state.name] = layer.state.source.numel()
                yield layer

        method = self.allocate.method
        with torch.inference_mode():
            found = method.guarded(noting(), self.target, **self.allocate.arguments)
        return checked(method.name, found, sizes, self.target)

    def _layers(self) -> Iterator[Measured]:
        """Every layer of the step in model order, its block resident, its state where the statistic is."""
        kind = self.allocate.method.stats
        stream = None
        if kind is not None:
            if self.tokens is None:
                raise MethodError(f"{self.allocate.method.name} needs calibration data")
            stream = Activations.begin(self.view, self.tokens, self.holding)
        for index in range(len(self.view.blocks)):
            block = self.before(index)
            with resident(self.view, index, block):
                groups: Sequence[Sequence[str]] = [[name] for name in block.linears]
                statistics: Sequence[Statistic | None] = [None] * len(groups)
                if stream is not None and kind is not None:
                    groups = self.view.groups(index, *stream.sample(index))
                    statistics = stream.collect(index, groups, kind)
                    check_finite(groups, statistics)
                for number, (group, statistic) in enumerate(zip(groups, statistics, strict=True)):
                    for name in group:
                        if name in self.selected:
                            yield Measured(sent(block.linears[name], self.view.device), statistic, index, number)
                if stream is not None:
                    stream.advance(index)
