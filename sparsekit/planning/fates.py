"""What becomes of every linear of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparsekit.models.shapes import ModelSizes
from sparsekit.planning.plan import Plan, PlannedStep
from sparsekit.reporting.charts import place


def layers(sizes: ModelSizes, plan: Plan) -> Iterator[dict[str, Any]]:
    """Every linear inside the blocks with the steps that are meant for it."""
    for block in sizes.blocks:
        for name, shape in block.linears.items():
            done = [_deed(planned) for planned in plan.steps if name in planned.selected]
            yield {"name": name, "shape": list(shape), "steps": done}


def _deed(planned: PlannedStep) -> str:
    """`wanda 2:4`, `gptq 4 bits`."""
    method, given = planned.step.method, planned.arguments
    what = [str(given["pattern"])] if "pattern" in given else []
    what += [f"{given['bits']} bits"] if given.get("bits") else []
    return " ".join([method.name, *what])


def kinds_of(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Layers of one kind, shape and fate together, with how many there are."""
    found: dict[tuple[str, tuple[int, ...], tuple[str, ...]], int] = {}
    for layer in layers:
        at = place(layer["name"])
        key = (at[0] if at else layer["name"], tuple(layer["shape"]), tuple(layer["steps"]))
        found[key] = found.get(key, 0) + 1
    return [{"kind": key[0], "shape": key[1], "steps": key[2], "count": count} for key, count in found.items()]
