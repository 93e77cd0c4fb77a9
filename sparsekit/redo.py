"""Doing the worst layers of the last step again, more precisely, until the gate holds.

The whole step runs again, because what it leaves of one layer decides the inputs of the next. The
layers with the largest error are quantized with more bits, or left as the step before had them; 1, 2,
4, ... of them until the perplexity is within its limit or no more may be redone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sparsekit.models.chain import Chain
from sparsekit.pattern import Pattern
from sparsekit.planning.plan import PlannedStep
from sparsekit.recipe.entries import Redo
from sparsekit.reporting.numerals import numbered
from sparsekit.verify import verified

Record = Mapping[str, Any]


def worst_layers(layers: Sequence[Record]) -> list[str]:
    """Names of a step's layers, those with the largest relative error first."""
    return [layer["name"] for layer in sorted(layers, key=lambda layer: -layer["error"])]


def rounds(layers: int, most: int) -> Iterator[int]:
    """How many layers each attempt redoes: 1, 2, 4, ... and at last `most`, never all there are.

    >>> list(rounds(100, 6))
    [1, 2, 4, 6]
    """
    most, count = min(most, layers - 1), 1
    while count < most:
        yield count
        count *= 2
    if most > 0:
        yield most


def redone(
    planned: PlannedStep, redo: Redo, names: Sequence[str], before: Mapping[str, Pattern], errors: Mapping[str, float]
) -> PlannedStep:
    """The step with some layers done more precisely.

    Args:
        planned: The step as the recipe has it.
        redo: How.
        names: The layers.
        before: The pattern of each layer before the step.
        errors: Relative error of each layer.
    """
    identity = json.dumps([planned.fingerprint, "redo", redo.bits, sorted(names)])
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    about = {"bits": redo.bits, "layers": list(names), "why": _told(redo, names, errors)}
    again = replace(planned, fingerprint=fingerprint, redone=about)
    if redo.bits is not None:
        return replace(again, overrides={name: {"bits": redo.bits} for name in names})
    kept = {name: pattern for name, pattern in planned.patterns.items() if name not in names}
    patterns = {**kept, **{name: before[name] for name in names if name in before}}
    return replace(again, selected=planned.selected - set(names), patterns=patterns)


def left_out(planned: PlannedStep, start: Chain) -> Iterator[dict[str, Any]]:
    """Records of the layers that a repeated step leaves as they are at its start, with no error of its own."""
    names = set() if planned.redone.get("bits") else set(planned.redone.get("layers", ()))
    for index in range(len(start.view.blocks)):
        if here := names & start.view.linears(index).keys():
            states = start.block(index).linears
            for name in sorted(here):
                state = states[name]
                yield verified(state, state, kind="prune", pattern=planned.patterns.get(name)).as_dict()


def _told(redo: Redo, names: Sequence[str], error: Mapping[str, float]) -> str:
    """What was done again, in one sentence."""
    how = f"quantized with {redo.bits} bits" if redo.bits else "left as they were before this step"
    listed = ", ".join(f"{name} (error {error[name]:.3g})" for name in names)
    return f"the gate was missed, so the step was repeated with its {numbered(names, 'worst layer')} {how}: {listed}"
