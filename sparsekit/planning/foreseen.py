"""What an export will refuse, found before the first step: its format is asked about made-up linears.

They have the shapes, bits, groups, patterns and low-rank branches that the recipe will leave. What only
values can tell stays for the export itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsekit.branch import Branch
from sparsekit.checkpoint import BlockState
from sparsekit.errors import CheckpointError, MethodError, RecipeError
from sparsekit.formats.base import Format, Setting, Storage, find_setting
from sparsekit.interchange.adapter import branches_of
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid, QuantizedWeight
from sparsekit.state import LinearState

if TYPE_CHECKING:
    from sparsekit.planning.plan import PlannedStep

ROWS = 1024  # of a made-up linear, and the rest of the real one's: what divides them divides the real ones

Shape = tuple[int, int]
Kept = Callable[[Shape], Tensor]


@dataclass(slots=True)
class Foreseen:
    """The model as a recipe will leave it, as far as that is known.

    Attributes:
        view: The model.
        steps: Of the plan, in order.
    """

    view: ModelView
    steps: Sequence[PlannedStep]
    _made: dict[tuple[Setting, Pattern | Kept, Shape], QuantizedWeight] = field(default_factory=dict)

    def check(self, form: Format, where: str) -> None:
        """Refuse a format that will have no place for what the steps leave.

        Args:
            form: The format.
            where: Its place in the recipe.
        Raises:
            RecipeError: In the words of the format, or of the step that adds branches.
        """
        try:
            branches_of(self._branched, self.view.form, len(self.view.blocks), opened=form.storage is None)
            if form.storage is not None:
                self._check_integers(form.storage)
        except (CheckpointError, MethodError) as error:
            raise RecipeError(str(error), where=where) from error

    def _branched(self, index: int) -> BlockState:
        """A block with nothing but its branches."""
        hollow = {name: torch.empty(shape, device="meta") for name, shape in self._shapes(index)}
        return BlockState(
            {n: LinearState(n, t, branch=branch_of(self.steps, n, (*t.shape,))) for n, t in hollow.items()}
        )

    def _shapes(self, index: int) -> Iterator[tuple[str, Shape]]:
        return ((name, (linear.out_features, linear.in_features)) for name, linear in self.view.linears(index).items())

    def _check_integers(self, storage: Storage) -> None:
        """Ask about linears that keep every weight unless a step prunes them.

        What a format then refuses it may take all the same where the model's files hold zeros, or integers
        that nothing is known of but their grid.

        Raises:
            CheckpointError: There is no layout.
        """
        once = _Once(storage, storage.title)
        try:
            find_setting(once, self._blocks(storage, _all))
        except CheckpointError:
            find_setting(once, self._blocks(storage, _half if self.view.quantized else self._nonzero()))

    def _nonzero(self) -> Kept:
        """What the first block's own weights keep, the only weights that are read for a plan."""
        found = {
            tuple(s.source.shape): s.source[: _rows(s.source.shape)] != 0
            for s in self.view.dense_block(0).linears.values()
        }
        return lambda shape: found.get(shape, _all(shape))

    def _blocks(self, storage: Storage, kept: Kept) -> Iterator[tuple[BlockState, set[str]]]:
        """Every block with made-up integers, and the names its weights get."""
        for index in range(len(self.view.blocks)):
            linears: dict[str, LinearState] = {}
            for name, shape in self._shapes(index):
                setting, integers = self._setting(name, storage), None
                if setting is not None:
                    pattern = self.steps[-1].patterns.get(name) if self.steps else None
                    key = (setting, pattern or kept, shape)
                    integers = self._made.get(key) or self._made.setdefault(key, _integers(*key))
                linears[name] = LinearState(name, torch.empty(shape, device="meta"), quantized=integers)
            yield BlockState(linears), {f"{name}.weight" for name in linears if self.view.form(name) != "expert"}

    def _setting(self, name: str, storage: Storage) -> Setting | None:
        """The grid of a linear; the layout says which levels its codes take, "" for all of them."""
        if self.view.quantized:
            return self.view.setting(name)
        step = next((p.step for p in self.steps if p.step.quantizes and name in p.selected), None)
        if step is None:
            return None
        values = step.values
        return Setting(
            bits=step.code_bits or storage.bits[0],  # of a plugin that does not say
            group_size=values.get("group_size", -1),
            symmetric=values.get("symmetric", True),
            act_order=values.get("act_order") == "dynamic",
            layout="" if step.method.built_in and values.get("levels", "integer") == "integer" else "odd",
        )


@dataclass(slots=True)
class _Once:
    """A storage that is asked once about integers that many linears share."""

    storage: Storage
    title: str
    _told: dict[tuple[int, str], str | None] = field(default_factory=dict)

    def layouts(self, symmetric: bool) -> tuple[str, ...]:
        return self.storage.layouts(symmetric)

    def obstacle(self, state: LinearState, layout: str) -> str | None:
        key = (id(state.quantized), layout)  # they live as long as this does
        if key not in self._told:
            self._told[key] = self.storage.obstacle(state, layout)
        return self._told[key]


def branch_of(steps: Sequence[PlannedStep], name: str, shape: Shape) -> Branch | None:
    """The low-rank branch a linear will have after some steps, on meta; the first step that adds one decides.

    Raises:
        MethodError: There is none for such a linear.
    """
    meant = (planned.step for planned in steps if name in planned.selected)
    return next(filter(None, (step.method.branch_of(step.values, *shape) for step in meant)), None)


def _rows(shape: Sequence[int]) -> int:
    return min(shape[0], ROWS + shape[0] % ROWS)


def _all(shape: Shape) -> Tensor:
    """Every weight is kept."""
    return torch.ones(_rows(shape), shape[1], dtype=torch.bool)


def _half(shape: Shape) -> Tensor:
    """Two of four are kept where that is possible, as in an export of a 2:4 model."""
    return torch.arange(shape[1]).remainder(4).lt(2).expand(_rows(shape), -1)


def _integers(setting: Setting, kept: Pattern | Kept, shape: Shape) -> QuantizedWeight:
    """Integers that no format refuses for their values if it can be helped: one code for every kept weight."""
    rows, inputs = _rows(shape), shape[1]
    generator = torch.Generator().manual_seed(0)
    mask = kept.keep(torch.rand(rows, inputs, generator=generator)) if isinstance(kept, Pattern) else kept(shape)
    size = inputs if setting.group_size == -1 else setting.group_size
    middle = 2 ** (setting.bits - 1)
    groups = torch.arange(inputs) // size
    codes = torch.where(mask, middle + 1 if setting.layout else 0, middle)
    grid = Grid.of_scale(torch.ones(rows, inputs // size), setting.bits)
    group_of = groups.flip(0) if setting.act_order else groups
    return QuantizedWeight.of(codes, grid, group_size=size, symmetric=setting.symmetric, group_of=group_of)
