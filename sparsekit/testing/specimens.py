"""Small made-up layers, groups and training jobs that the contract suite hands to methods."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from sparsekit.errors import ContractError, PluginError, nearest
from sparsekit.method import Method
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.recipe.yamllines import Document
from sparsekit.state import Group, LinearState
from sparsekit.stats import Statistic, added, begun
from sparsekit.training.loop import Trained, TrainJob
from sparsekit.verify import told_type

CPU = torch.device("cpu")
ROWS, COLUMNS = 16, 256  # two quantization groups of the usual 128
TRAIN_WINDOWS, TRAIN_LENGTH = 32, 32


@dataclass(frozen=True, slots=True)
class Given:
    """What a method is called with.

    Attributes:
        state: A linear, or a group of two linears whose input scale can be absorbed.
        statistic: Of 512 correlated tokens with a few large channels; None if the method reads none.
        dead: Inputs that were 0 on every token, bool [in].
    """

    state: LinearState | Group
    statistic: Statistic | None
    dead: Tensor

    @property
    def layers(self) -> Mapping[str, LinearState]:
        """The linears by name."""
        return linears_of(self.state)


def linears_of(state: LinearState | Group) -> Mapping[str, LinearState]:
    """The linears of a group, or a linear alone, by name."""
    return state.linears if isinstance(state, Group) else {state.name: state}


def assigned(settings: Iterable[str]) -> dict[str, Any]:
    """Arguments written as `KEY=VALUE`, read like the `--set` of a run.

    Raises:
        RecipeError: No `=`, or a value that is not understood.
    """
    document = Document("command line")
    for setting in settings:
        document.override(setting)
    document.raise_problems()
    return dict(document.values)


def arguments_of(method: Method, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """A method's keyword arguments, as a recipe would give them.

    Raises:
        PluginError: A value is not understood or a required parameter is missing.
    """
    read = parameters_of("method", method.name, method.parameters, chosen)
    return {name: getattr(read, name) for name in method.parameters.model_fields}


def parameters_of(noun: str, name: str, schema: type[BaseModel], chosen: Mapping[str, Any]) -> BaseModel:
    """Parameters as a recipe would give them, defaults for the others.

    Raises:
        PluginError: A value is not understood or a required parameter is missing.
    """
    try:
        return schema.model_validate_json(json.dumps(dict(chosen)))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        hint = f"; give it a value: --set {key}=VALUE" if first["type"] == "missing" else ""
        hint = nearest(key, schema.model_fields) if first["type"] == "extra_forbidden" else hint
        raise PluginError(f"{noun} {name!r}, parameter {key!r}: {first['msg']}{hint}") from error


def refines(method: Method) -> bool:
    """Whether a method chooses no mask of its own and works on a pruned layer: a pruner without pattern, a branch."""
    return method.kind == "branch" or (method.kind == "prune" and method.accepts(Pattern) is None)


def specimen(
    method: Method,
    *,
    rows: int = ROWS,
    columns: int = COLUMNS,
    masked: bool | None = None,
    dead: int = 0,
    device: torch.device = CPU,
) -> Given:
    """Made-up input of a method, the same at every call.

    Args:
        method: Decides between a linear and a group, the statistic, and whether there are dense values.
        rows: Outputs of a linear.
        columns: Inputs.
        masked: Whether the layer is pruned to 2:4 already; by default only for what refines masks.
        dead: How many inputs are 0 on every token.
        device: Where the tensors are.
    """
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(512, columns, generator=generator) @ mixing
    x *= 1 + 4 * torch.rand(columns, generator=generator) ** 4
    silent = torch.zeros(columns, dtype=torch.bool)
    silent[torch.randperm(columns, generator=generator)[:dead]] = True
    x[:, silent] = 0
    names = ("block.first", "block.second") if method.scope == "group" else ("block.linear",)
    pruned = refines(method) if masked is None else masked
    layers = {}
    for name in names:
        weight = torch.randn(rows, columns, generator=generator) / columns**0.5
        keep = _half(torch.rand(weight.shape, generator=generator)).to(device) if pruned else None
        dense = weight.to(device) if method.dense else None
        layers[name] = LinearState(name, weight.to(device), mask=keep, dense=dense)
    statistic = None
    if method.stats is not None:
        statistic = begun(method.stats, columns, device)
        added(statistic, x.to(device))
    state: LinearState | Group = next(iter(layers.values()))
    if method.scope == "group":
        state = Group(layers, tie=lambda free: free, untie=lambda sums: sums)
    return Given(state, statistic, silent)


def _half(score: Tensor) -> Tensor:
    """A 2:4 mask, or one that drops the lower half of each row where the row has no groups of 4."""
    pattern = Pattern(2, 4) if score.shape[1] % 4 == 0 else Pattern.unstructured(0.5)
    return pattern.keep(score)


def tensors_of(state: LinearState | Group) -> dict[str, Tensor]:
    """The tensors directly inside a state, or inside the states of a group, by attribute."""
    if isinstance(state, Group):
        return {f"{n} {k}": t for n, one in state.linears.items() for k, t in tensors_of(one).items()}
    items = {each.name: getattr(state, each.name) for each in fields(state)}
    return {name: item for name, item in items.items() if isinstance(item, Tensor)}


def readable(statistic: Statistic) -> dict[str, Tensor]:
    """The tensors that a method may read of a statistic: attributes and properties without a leading underscore."""
    properties = [name for name, member in inspect.getmembers(type(statistic)) if isinstance(member, property)]
    names = [name for name in (*vars(statistic), *properties) if not name.startswith("_")]
    with torch.inference_mode():  # as where it was filled
        found = {name: getattr(statistic, name) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


@contextmanager
def training_job(device: torch.device = CPU) -> Iterator[TrainJob]:
    """A job on the embedded model with random tokens, in a directory that goes away."""
    views = [ModelView.open("builtin:tiny", dtype="float32", device=device) for _ in range(2)]
    for view in views:
        view.materialise_all(view.dense_block(index) for index in range(len(view.blocks)))
    linears = {n: s for i in range(len(views[0].blocks)) for n, s in views[0].dense_block(i).linears.items()}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 1000, (TRAIN_WINDOWS, TRAIN_LENGTH), generator=generator, dtype=torch.int32)
    with tempfile.TemporaryDirectory(prefix="sparsekit-check-") as directory:
        yield TrainJob(
            student=views[0].module,
            teacher=views[1].module,
            linears=linears,
            tokens=tokens,
            valid=None,
            seed=0,
            directory=Path(directory) / "checkpoint",
            log=lambda record: None,
            progress=lambda done, total: None,
        )


def trained(method: Method, arguments: Mapping[str, Any], job: TrainJob) -> Trained:
    """Run a method of scope model on a job."""
    torch.manual_seed(0)
    result = method.guarded(job, **arguments)
    if not isinstance(result, Trained):
        raise ContractError(f"it returned {told_type(result)}, not Trained")
    return result
