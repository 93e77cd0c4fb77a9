"""Which linears share an input, and which operation can absorb a scale of that input.

Both are found by running a block, not by architecture names: linears are grouped by the identity of
the tensor they are called with, and a candidate that could absorb a scale is accepted only after the
block has been run with a scale and its inverse in place and has given the same output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsekit.checkpoint import BlockState
from sparsekit.errors import MethodError

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # relative; other dtypes 3e-2
NEAREST = 4  # linears before a group that are tried as its producer; a block has no longer detours
Run = Callable[[], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Producer:
    """An operation whose output channels feed a group's input.

    Attributes:
        module: Its full path.
        form: `norm` (weight w), `unit norm` (weight 1 + w, as in Gemma) or `linear` (rows).
        rows: The output rows of a linear that feed the group, in the order of `expand`.
        expand: int64 [in], the free entry each input channel is tied to: 0, 1, 2, ... or, under
            grouped-query attention, each key-value head repeated for its query heads.
    """

    module: str
    form: Literal["norm", "unit norm", "linear"]
    rows: slice
    expand: Tensor

    def tie(self, free: Tensor) -> Tensor:
        """Spread a free vector [free] over the input channels [in]."""
        return free[self.expand.to(free.device)]

    def untie(self, statistic: Tensor) -> Tensor:
        """Average a statistic [in] over tied channels, [free]."""
        where = self.expand.to(statistic.device)
        count = torch.bincount(where).to(statistic.dtype)
        return torch.zeros_like(count).index_add_(0, where, statistic) / count

    def free(self, scale: Tensor) -> Tensor:
        """The free vector [free] of a tied scale [in], without rounding."""
        where = self.expand.to(scale.device)
        free = torch.empty(int(where.max()) + 1, dtype=scale.dtype, device=scale.device)
        free[where] = scale
        return free

    def divided(self, weight: Tensor, free: Tensor) -> Tensor:
        """The producer's weight with its outputs divided by `free`."""
        if self.form == "linear":
            weight = weight.clone()
            weight[self.rows] /= free.to(weight.dtype).unsqueeze(1)
            return weight
        return (1 + weight) / free - 1 if self.form == "unit norm" else weight / free

    def divided_bias(self, bias: Tensor, free: Tensor) -> Tensor:
        """The producer's bias with its outputs divided by `free`."""
        bias = bias.clone()
        bias[self.rows] /= free.to(bias.dtype)
        return bias

    def fold(self, block: BlockState, scale: Tensor) -> BlockState:
        """Divide the producer's outputs by a tied scale [in]; a new block state.

        Raises:
            MethodError: The producer is quantized already, so it cannot change.
        """
        free = self.free(scale)
        linears, params = dict(block.linears), dict(block.params)
        if self.form == "linear":
            state = linears[self.module]
            if state.quantized is not None:
                raise MethodError("is quantized already and cannot absorb a scale", layer=self.module)
            branch = state.branch
            if branch is not None:
                branch = replace(branch.of_floats(), up=self.divided(branch.up, free))
            linears[self.module] = replace(state, source=self.divided(state.source, free), branch=branch)
        else:
            name = f"{self.module}.weight"
            params[name] = self.divided(params[name].float(), free).to(params[name].dtype)
        bias = f"{self.module}.bias"
        if bias in params:
            params[bias] = self.divided_bias(params[bias].float(), free).to(params[bias].dtype)
        return BlockState(linears, params)


def shared_inputs(linears: Mapping[str, nn.Linear], run: Run) -> list[list[str]]:
    """Group linears by the tensor they are called with, in call order.

    Linears that were not called (experts no token was routed to) follow, each in a group of its own.
    """
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            (x,) = arguments
            for tensor, names in seen:
                if tensor is x:
                    names.append(name)
                    return
            seen.append((x, [name]))

        return hook

    with hooked((module.register_forward_pre_hook(note(name)) for name, module in linears.items())):
        run()
    groups = [list(dict.fromkeys(names)) for _, names in seen]
    called = {name for names in groups for name in names}
    return groups + [[name] for name in linears if name not in called]


def find_producers(
    modules: Mapping[str, nn.Module],
    linears: Mapping[str, nn.Linear],
    groups: Sequence[Sequence[str]],
    run: Run,
    heads: tuple[int, int, int],
) -> list[Producer | str]:
    """For each group, the operation proven to absorb an input scale, or the reason there is none.

    Args:
        modules: Every module of the block by full path, weights in place.
        linears: The linears among them.
        groups: As `shared_inputs` gives them.
        run: Runs the block on a micro-batch and returns its output.
        heads: Query heads, key-value heads and head width, for the ties of grouped-query attention.
    """
    inputs, outputs = _observe(modules, linears, groups, run)
    expected = run()
    order = [name for group in groups for name in group]
    found: list[Producer | str] = []
    for group in groups:
        consumers = [linears[name] for name in group]
        earlier = order[: order.index(group[0])]
        candidates = [*_norms(outputs, modules, inputs.get(group[0])), *_rows(consumers[0], earlier, linears, heads)]
        proven = next((c for c in candidates if _absorbs(c, modules[c.module], consumers, run, expected)), None)
        names = dict.fromkeys(candidate.module.rpartition(".")[2] for candidate in candidates)
        tried = ", ".join(names) or "nothing with matching channels"
        found.append(proven or f"no operation before it absorbs a scale of its input (tried {tried})")
    return found


def _observe(
    modules: Mapping[str, nn.Module], linears: Mapping[str, nn.Linear], groups: Sequence[Sequence[str]], run: Run
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Input of each group's first linear, and output of every module that looks like a norm."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(store: dict[str, Tensor], name: str, index: int) -> Callable[..., None]:
        def hook(*arguments: Any) -> None:
            value = arguments[index]
            store[name] = value[0] if isinstance(value, tuple) else value

        return hook

    handles = [linears[group[0]].register_forward_pre_hook(keep(inputs, group[0], 1)) for group in groups]
    handles += [
        module.register_forward_hook(keep(outputs, name, 2)) for name, module in modules.items() if is_norm(module)
    ]
    with hooked(handles):
        run()
    return inputs, outputs


def is_norm(module: nn.Module) -> bool:
    """Whether it has one weight a channel."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.dim() == 1


def _norms(outputs: Mapping[str, Tensor], modules: Mapping[str, nn.Module], x: Tensor | None) -> Iterator[Producer]:
    """Norms whose output is the group's input, in both forms."""
    for name, output in outputs.items():
        if x is not None and output is x:
            channels = torch.arange(x.shape[-1])
            yield Producer(name, "norm", slice(None), channels)
            yield Producer(name, "unit norm", slice(None), channels)


def _rows(
    consumer: nn.Linear, earlier: Sequence[str], linears: Mapping[str, nn.Linear], heads: tuple[int, int, int]
) -> Iterator[Producer]:
    """Linears whose last output rows could feed the input channels, nearest first."""
    queries, keys, width = heads
    plain = torch.arange(consumer.in_features)
    ties = [plain]
    if queries != keys and queries * width == consumer.in_features:
        heads_of = torch.arange(keys * width).view(keys, 1, width)
        ties.append(heads_of.expand(-1, queries // keys, -1).reshape(-1))
    for name in reversed(earlier[-NEAREST:]):
        out = linears[name].out_features
        for expand in ties:
            size = int(expand.max()) + 1
            if out >= size:
                yield Producer(name, "linear", slice(out - size, out), expand)


def _absorbs(producer: Producer, module: nn.Module, consumers: Sequence[nn.Linear], run: Run, expected: Tensor) -> bool:
    """Run the block with a random scale and its inverse in place; True if the output stays."""
    generator = torch.Generator().manual_seed(0)
    choices = torch.tensor([0.5, 1.0, 2.0])  # powers of two: no rounding in any float dtype
    size = int(producer.expand.max()) + 1
    free = choices[torch.randint(0, 3, (size,), generator=generator)].to(expected.device)
    scale = producer.tie(free)
    parameters = dict(module.named_parameters(recurse=False))
    touched = [*parameters.values(), *(consumer.weight for consumer in consumers)]
    saved = [parameter.data for parameter in touched]
    try:
        parameters["weight"].data = producer.divided(parameters["weight"].data, free).to(expected.dtype)
        if "bias" in parameters:
            parameters["bias"].data = producer.divided_bias(parameters["bias"].data, free)
        for consumer in consumers:
            consumer.weight.data = consumer.weight.data * scale.to(consumer.weight.dtype)
        actual = run()
    finally:
        for parameter, data in zip(touched, saved, strict=True):
            parameter.data = data
    difference = (actual - expected).float().norm() / expected.float().norm().clamp(min=1e-30)
    return bool(difference < TOLERANCE.get(expected.dtype, 3e-2))


@contextmanager
def hooked(handles: Any) -> Iterator[None]:
    """Remove hooks afterwards, whatever happens."""
    kept = list(handles)
    try:
        yield
    finally:
        for handle in kept:
            handle.remove()
