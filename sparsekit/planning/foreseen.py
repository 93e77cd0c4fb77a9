"""The model as a recipe will leave it, as far as that is known before the first step: hollow, or with made-up integers.

A step's files are foreseen from hollow tensors. A format is asked about made-up linears of the shapes, bits, groups,
patterns and low-rank branches that will be: what it refuses, the export would refuse after all the work, and what it
packs them into tells the bytes. What only values can tell stays for the export itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
from sparsekit.quant import Grid, Levels, QuantizedWeight, code_range, is_odd
from sparsekit.state import LinearState

if TYPE_CHECKING:
    from sparsekit.planning.plan import PlannedStep

LEVELS: dict[str, Levels] = {"integer": "integer", "odd": "odd", "six": "six", "ternary": "ternary"}
TILE = 64  # rows: what so many more take tells what all of them take
ROWS = 1024  # of a made-up linear, and the rest of the real one's: what divides them divides the real ones

Shape = tuple[int, int]
Kept = Callable[[Shape], Tensor]


@dataclass(slots=True)
class Foreseen:
    """What is known of every linear after some steps.

    Attributes:
        view: The model.
        steps: Of the plan, in order.
    """

    view: ModelView
    steps: Sequence[PlannedStep]
    _made: dict[tuple[Setting, Pattern | Kept, Shape, bool], LinearState] = field(default_factory=dict)
    _own: Kept | None = None

    @property
    def guessed(self) -> bool:
        """Whether integers or branches come from where a plan does not know all about them: files, or a plugin."""
        adding = (p.step for p in self.steps if p.step.quantizes or p.step.method.kind == "branch")
        return self.view.quantized or not all(step.method.built_in for step in adding)

    def check(self, form: Format, where: str) -> None:
        """Refuse a format that will have no place for what the steps leave.

        Args:
            form: The format.
            where: Its place in the recipe.
        Raises:
            RecipeError: In the words of the format, or of the step that adds branches.
        """
        try:
            self.branches(form)
            if form.storage is not None:
                self.laid_out(form.storage)
        except (CheckpointError, MethodError) as error:
            raise RecipeError(str(error), where=where) from error

    def branches(self, form: Format) -> dict[str, Branch]:
        """The low-rank branches of an export by linear, on meta.

        Raises:
            CheckpointError: A linear with a branch has no place for it.
            MethodError: There is no such branch.
        """
        return branches_of(self.hollow, self.view.form, len(self.view.blocks), opened=form.storage is None)

    def hollow(self, index: int) -> BlockState:
        """A block on the meta device, with all that the steps leave in it."""
        shapes = dict(self._shapes(index))
        weights = {f"{name}.weight" for name in shapes}
        others = [name for name in self.view.parameters(index) if name not in weights]
        params = {name: self.view.module.get_parameter(name).to("meta") for name in others}
        return BlockState({name: self._hollow(name, shape) for name, shape in shapes.items()}, params)

    def _hollow(self, name: str, shape: Shape) -> LinearState:
        source, setting, integers = torch.empty(shape, device="meta"), self._setting(name), None
        if setting is not None:
            size, symmetric = _size(setting, shape), setting.symmetric
            grid = Grid.of_scale(source[:, ::size], setting.bits)
            integers = QuantizedWeight.of(source, grid, group_size=size, symmetric=symmetric, group_of=source[0])
        mask = source.bool() if self._masked(name) else None
        return LinearState(name, source, mask, integers, branch=branch_of(self.steps, name, shape))

    def _shapes(self, index: int) -> Iterator[tuple[str, Shape]]:
        return ((name, (linear.out_features, linear.in_features)) for name, linear in self.view.linears(index).items())

    def _pattern(self, name: str) -> Pattern | None:
        return self.steps[-1].patterns.get(name) if self.steps else None

    def _masked(self, name: str) -> bool:
        """Whether a linear will have a mask, which pruners leave that have no parameter for a pattern, too."""
        pruned = any(p.step.method.kind == "prune" and name in p.selected for p in self.steps)
        return pruned or self._pattern(name) is not None

    def laid_out(self, storage: Storage, *, spread: bool = False) -> tuple[str, list[LinearState]]:
        """The layout a storage takes for made-up linears, and these; they keep every weight unless a step prunes them.

        What a format then refuses it may take all the same where the model's files hold zeros, or integers
        that nothing is known of but their grid.

        Args:
            storage: Of the format.
            spread: Their integers are of all kinds there may be, which takes most; else they are as one, which
                no format refuses for its values if it can be helped.
        Returns:
            The layout; every linear with the first rows of its mask and integers, `source` whole and on meta.
        Raises:
            CheckpointError: There is no layout.
        """
        try:
            return self._laid_out(storage, _all, spread=spread)
        except CheckpointError:
            return self._laid_out(storage, _half if self.view.quantized else self._nonzero(), spread=spread)

    def _laid_out(self, storage: Storage, kept: Kept, *, spread: bool) -> tuple[str, list[LinearState]]:
        blocks = [self._block(index, storage, kept, spread=spread) for index in range(len(self.view.blocks))]
        layout = find_setting(_Once(storage, storage.title), blocks).layout
        return layout, [state for block, _ in blocks for state in block.linears.values()]

    def _nonzero(self) -> Kept:
        """What the first block's own weights keep, the only weights that are read for a plan."""
        if self._own is None:
            sources = [state.source for state in self.view.dense_block(0).linears.values()]
            found = {tuple(source.shape): source[: _rows(source.shape)] != 0 for source in sources}
            self._own = lambda shape: found.get(shape, _all(shape))
        return self._own

    def _block(self, index: int, storage: Storage, kept: Kept, *, spread: bool) -> tuple[BlockState, set[str]]:
        """A block with made-up integers, and the names its weights get."""
        linears: dict[str, LinearState] = {}
        for name, shape in self._shapes(index):
            setting = self._setting(name, storage.bits[0])
            made = LinearState(name, torch.empty(shape, device="meta"))
            if setting is not None:
                key = (setting, self._pattern(name) or kept, shape, spread)
                made = self._made.get(key) or self._made.setdefault(key, _made_up(*key))
            mask = made.mask if self._masked(name) else None
            linears[name] = replace(made, name=name, mask=mask)
        return BlockState(linears), {f"{name}.weight" for name in linears if self.view.form(name) != "expert"}

    def _setting(self, name: str, bits: int = 8) -> Setting | None:
        """The grid of a linear; the layout says which levels its codes take, "" where that is not known.

        Args:
            name: Of the linear.
            bits: Of a plugin that does not say.
        """
        if self.view.quantized:
            return self.view.setting(name)
        step = next((p.step for p in self.steps if p.step.quantizes and name in p.selected), None)
        if step is None:
            return None
        values = step.values
        return Setting(
            bits=step.code_bits or bits,
            group_size=values.get("group_size", -1),
            symmetric=values.get("symmetric", True),
            act_order=values.get("act_order") == "dynamic",
            layout=values.get("levels", "integer") if step.method.built_in else "",
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


def _size(setting: Setting, shape: Shape) -> int:
    """Inputs of a group."""
    return shape[1] if setting.group_size == -1 else setting.group_size


def _made_up(setting: Setting, kept: Pattern | Kept, shape: Shape, spread: bool) -> LinearState:
    """The first rows of a linear's mask and of made-up integers.

    Where levels are not known, the one code is next to zero, which all levels have, and spread ones are of the whole
    grid. Spread scales and zero-points are any that there are.
    """
    rows, inputs, bits = _rows(shape), shape[1], setting.bits
    rows = min(rows, 2 * TILE) if spread else rows
    size, middle = _size(setting, shape), 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(rows, inputs, generator=generator)
    mask = kept.keep(scores) if isinstance(kept, Pattern) else kept(shape)[:rows]
    groups = torch.arange(inputs) // size
    group_of = groups.flip(0) if setting.act_order else groups
    if spread:
        lowest, highest = code_range(bits, LEVELS.get(setting.layout, "integer"))
        apart = 1 + is_odd(setting.layout)
        codes = lowest + apart * torch.randint((highest - lowest) // apart + 1, mask.shape, generator=generator)
        scale = torch.randint(0x0400, 0x7C00, (rows, inputs // size), generator=generator).short()  # no subnormals
        grid = Grid.of_scale(scale.view(torch.float16).float(), bits)
        if not setting.symmetric:
            grid = replace(grid, zero=torch.randint(2**bits, scale.shape, generator=generator).float())
    else:
        codes = torch.tensor(0 if setting.layout == "integer" else middle + 1)
        grid = Grid.of_scale(torch.ones(rows, inputs // size), bits)
    codes = torch.where(mask, codes, grid.zero[:, group_of].long())
    integers = QuantizedWeight.of(codes, grid, group_size=size, symmetric=setting.symmetric, group_of=group_of)
    return LinearState("", torch.empty(shape, device="meta"), mask, integers)
