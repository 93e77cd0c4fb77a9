"""What a recipe will do to a model, worked out before any weight is touched.

Selections, shapes, patterns and group sizes are checked against the model here, so that a run
fails in its first second and not in its second hour.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from sparsekit.errors import CoverageError, MethodError, RecipeError, nearest
from sparsekit.evaluation.measures import code_of
from sparsekit.formats import FORMATS
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.planning.fingerprint import digest_of, model_digest, step_fingerprint, teacher_digests
from sparsekit.planning.foreseen import Foreseen, branch_of
from sparsekit.quant import NO_GROUP_SIZE
from sparsekit.recipe import Recipe, Step, TextEntry
from sparsekit.reporting.sections import SECTIONS
from sparsekit.shelf import Named, foreign_code


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step with everything resolved.

    Attributes:
        index: Position in the recipe, from 0.
        step: As the recipe has it.
        selected: Full names of the linears it is meant for.
        patterns: The pattern each linear must hold once the step is done.
        fingerprint: Digest of all that decides the result, including every step before.
        overrides: Arguments of single layers in place of the step's, when the worst are redone.
        redone: For a step repeated for the gate's sake: `bits` or None, `layers` and `why`, a sentence.
    """

    index: int
    step: Step
    selected: frozenset[str]
    patterns: Mapping[str, Pattern]
    fingerprint: str
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    redone: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """The method's keyword arguments."""
        return self.step.values

    @property
    def title(self) -> str:
        """`1 gptq`."""
        return f"{self.index + 1} {self.step.method.name}"

    @property
    def directory(self) -> str:
        """Name of the step's directory; other parameters give another name."""
        return f"{self.index + 1}-{self.step.method.name}-{self.fingerprint[:10]}"


@dataclass(frozen=True, slots=True)
class Coverage:
    """Every parameter of the model, by what the recipe does with it.

    Attributes:
        compressed: Parameters in linears that at least one step selects.
        ignored: Parameters in linears that the recipe's targets and ignore lists leave out.
        by_rule: Embeddings, head, norms and biases, which stay dense by rule.
        unreachable: Names and sizes of matrices inside blocks that sparsekit cannot reach.
    """

    compressed: int
    ignored: int
    by_rule: int
    unreachable: Mapping[str, int]

    @property
    def total(self) -> int:
        """All parameters, tied ones once."""
        return self.compressed + self.ignored + self.by_rule + sum(self.unreachable.values())

    @property
    def share(self) -> float:
        """Reached share of the matrices inside blocks; what the user ignores counts as reached."""
        reached = self.compressed + self.ignored
        matrices = reached + sum(self.unreachable.values())
        return reached / matrices if matrices else 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps in order, and the coverage they reach together."""

    steps: Sequence[PlannedStep]
    coverage: Coverage
    model_digest: str
    notes: Sequence[str] = field(default_factory=list)


def make_plan(recipe: Recipe, view: ModelView, texts: Mapping[str, str], digest: str | None = None) -> Plan:
    """Resolve a recipe against a model.

    Args:
        recipe: Validated recipe.
        view: The model, weights not read.
        texts: Digests of `calibration` and `train`; a step depends on the one it reads.
        digest: Of the model, when its files shall not be read.
    Raises:
        RecipeError: A target or ignore entry matches nothing, or a pattern or group size divides
            no layer.
        CoverageError: The recipe's `coverage` is not reached.
    """
    if view.quantized and recipe.steps:
        raise RecipeError(
            f"{view.path} is quantized, and nothing may write weights after a quantizer; "
            "write steps: [] to evaluate it or to export it in another format",
            where=recipe.where("steps"),
        )
    linears = {name: module for index in range(len(view.blocks)) for name, module in view.linears(index).items()}
    shapes = {name: (module.out_features, module.in_features) for name, module in linears.items()}
    digest = model_digest(view.path) if digest is None else digest
    upstream = digest_of([digest, str(view.dtype), str(view.compute_dtype), view.device.type, recipe.numerics.max_rung])
    steps: list[PlannedStep] = []
    patterns: dict[str, Pattern] = {}
    for index, step in enumerate(recipe.steps):
        selected = _select(recipe, index, step, shapes)
        _check_pattern(recipe, index, step, selected, shapes)
        _check_groups(recipe, index, step, selected, shapes)
        _check_branches(recipe, index, step, {name: shapes[name] for name in selected}, steps)
        pattern_key = step.method.accepts(Pattern)
        pattern: Pattern | None = getattr(step.params, pattern_key) if pattern_key else None
        if pattern is not None and pattern.sparsity:  # else what a step before has pruned stays so
            patterns = {**patterns, **dict.fromkeys(selected, pattern)}
        read = [upstream, texts.get(reads(step)), *teacher_digests(recipe, index, step, digest)]
        upstream = step_fingerprint(digest_of(read), step, selected, recipe.seed)
        steps.append(PlannedStep(index, step, frozenset(selected), patterns, upstream))
    coverage = _coverage(view, steps)
    if coverage.share < recipe.coverage:
        raise CoverageError(_uncovered(coverage, recipe.coverage))
    formats: dict[str, Named] = {f"export {name}": FORMATS[name] for name in recipe.export.formats}
    sections: dict[str, Named] = {f"report section {name}": SECTIONS[name] for name in recipe.report.sections}
    used = {**formats, **code_of(recipe.evaluate.measures), **sections}
    foreseen = Foreseen(view, steps)
    for index, name in enumerate(recipe.export.formats):
        foreseen.check(FORMATS[name], recipe.where("export", "formats", index))
    return Plan(steps, coverage, digest, [*view.notes, *_foreign_code(steps), *foreign_code(used)])


def _foreign_code(steps: Sequence[PlannedStep]) -> list[str]:
    """A note for each method that is a plugin's: its file and the digest of it."""
    return [
        f"step {planned.index + 1} runs plugin {plugin['method']}: {plugin['origin']}, sha256 {plugin['sha256']}"
        for planned in steps
        for plugin in planned.step.plugins
    ]


def reads(step: Step) -> str:
    """The text a step reads: `calibration`, `train`, or an empty name for none."""
    if step.method.scope == "model":
        return "train"
    return "calibration" if step.calibrated else ""


def texts_of(recipe: Recipe) -> dict[tuple[str, ...], TextEntry]:
    """Every text that a run reads, by its keys in the recipe: those of the steps, then those that are scored."""
    data, wanted = recipe.data, recipe.evaluate
    named = {"calibration": data.calibration, "train": data.train}
    scored = dict.fromkeys([*wanted.perplexity, *(measure.text for measure in wanted.measures)])
    read = {("data", name): named.get(name) for name in map(reads, recipe.steps)}
    return {
        **{keys: entry for keys, entry in read.items() if entry},
        **{("data", "evaluation", name): data.evaluation[name] for name in scored},
    }


def _matches(entry: str, name: str) -> bool:
    if entry == "Linear":
        return True
    if entry.startswith("re:"):
        return re.fullmatch(entry[3:], name) is not None
    return fnmatchcase(name, entry)


def _select(recipe: Recipe, index: int, step: Step, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Names a step is meant for, in model order; every entry must match something."""
    for key in ("targets", "ignore"):
        for position, entry in enumerate(getattr(step, key)):
            where = recipe.where("steps", index, key, position)
            try:
                found = any(_matches(entry, name) for name in shapes)
            except re.error as error:
                raise RecipeError(f"{entry!r} is no regular expression: {error}", where=where) from error
            if not found:
                hint = nearest(entry, _nameable(shapes))
                raise RecipeError(
                    f"{key} entry {entry!r} matches none of the {len(shapes)} linear layers inside the blocks "
                    f"(the head and the embeddings always stay dense).{hint}",
                    where=where,
                )
    selected = [
        name
        for name in shapes
        if any(_matches(entry, name) for entry in step.targets)
        and not any(_matches(entry, name) for entry in step.ignore)
    ]
    if not selected:
        raise RecipeError("targets minus ignore leave no layer", where=recipe.where("steps", index, "ignore"))
    return selected


def _nameable(names: Iterable[str]) -> list[str]:
    """Full names and the globs of their last parts, as candidates for a hint."""
    candidates: dict[str, None] = {}
    for name in names:
        candidates[name] = None
        candidates[f"*.{name.rpartition('.')[2]}"] = None
    return list(candidates)


def _check_pattern(
    recipe: Recipe, index: int, step: Step, selected: Sequence[str], shapes: Mapping[str, tuple[int, int]]
) -> None:
    pattern_key = step.method.accepts(Pattern)
    if pattern_key:
        pattern: Pattern = getattr(step.params, pattern_key)
        bad = [f"{name} ({shapes[name][1]} inputs)" for name in selected if not pattern.fits(shapes[name][1])]
        if bad:
            message = f"pattern {pattern} does not divide {_listed(bad)}; add them to ignore"
            raise RecipeError(message, where=recipe.where("steps", index, pattern_key))


def _check_groups(
    recipe: Recipe, index: int, step: Step, selected: Sequence[str], shapes: Mapping[str, tuple[int, int]]
) -> None:
    grouped = "group_size" in type(step.params).model_fields and (step.quantizes or step.method.kind == "branch")
    size = getattr(step.params, "group_size") if grouped else -1  # noqa: B009  # the method's own parameter
    if size == -1:
        return
    where = recipe.where("steps", index, "group_size")
    if size < 1:
        raise RecipeError(NO_GROUP_SIZE.format(size), where=where)
    if not step.quantizes:  # factors of a branch that it does not divide are rounded all the same
        return
    bad = [f"{name} ({shapes[name][1]} inputs)" for name in selected if shapes[name][1] % size]
    if bad:
        widths = {shapes[name][1] for name in selected}
        fitting = [str(s) for s in (256, 128, 64, 32, 16, 8) if all(width % s == 0 for width in widths)]
        message = (
            f"group_size {size} does not divide {_listed(bad)}; sizes that divide every selected layer: "
            f"{', '.join(fitting) or 'none'}, or -1 for one group a row; or add the layers to ignore"
        )
        raise RecipeError(message, where=where)


def _check_branches(
    recipe: Recipe, index: int, step: Step, shapes: Mapping[str, tuple[int, int]], before: Sequence[PlannedStep]
) -> None:
    """A linear has one low-rank branch, which a later step may train and not replace."""
    try:
        for name, shape in shapes.items():
            added, there = step.method.branch_of(step.values, *shape), branch_of(before, name, shape)
            if added is None or there is None:
                continue
            if step.method.kind == "branch":
                raise MethodError("it has a low-rank branch already; keep one step that adds them", layer=name)
            if added.length != there.length:
                told = f"blocks of {added.length}, and an earlier step left a branch with blocks of {there.length}"
                raise MethodError(told, layer=name)
    except MethodError as error:
        raise RecipeError(str(error), where=recipe.where("steps", index)) from error


def _listed(items: Sequence[str], limit: int = 6) -> str:
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _coverage(view: ModelView, steps: Sequence[PlannedStep]) -> Coverage:
    reached = frozenset().union(*(step.selected for step in steps))
    rows = view.ledger()
    linear = [row for row in rows if row.category == "linear"]
    compressed = sum(row.numel for row in linear if row.name in reached)
    return Coverage(
        compressed=compressed,
        ignored=sum(row.numel for row in linear) - compressed,
        by_rule=sum(row.numel for row in rows if row.category == "kept by rule"),
        unreachable={row.name: row.numel for row in rows if row.category == "not reachable"},
    )


def _uncovered(coverage: Coverage, wanted: float) -> str:
    named = [f"{name} ({numel:,})" for name, numel in coverage.unreachable.items()]
    return (
        f"only {coverage.share:.1%} of the parameters inside the blocks can be reached, the recipe wants {wanted:.0%}; "
        f"out of reach: {_listed(named)}. Write coverage: {coverage.share:.2f} to accept it"
    )
