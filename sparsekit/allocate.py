"""Non-uniform sparsity: how many zeros each layer gets, decided before a pruning step touches any.

A step writes `{method: wanda, sparsity: 0.5, allocate: owl}`. The allocation method sees every layer
the step is meant for, in model order and one block at a time, and returns a sparsity for each; their
mean over weights must be the step's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from sparsekit.errors import MethodError, PluginError, in_one_line
from sparsekit.method import Method
from sparsekit.registry import METHODS
from sparsekit.state import LinearState
from sparsekit.stats import Statistic

TOLERANCE = 0.002  # of the mean sparsity


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A layer as an allocation method sees it, before the step.

    Attributes:
        state: Its weight.
        statistic: Of its inputs, when the method reads one.
        block: Index of its block.
        inputs: A number shared by the layers of the block that read the same input.
    """

    state: LinearState
    statistic: Statistic | None
    block: int
    inputs: int


@dataclass(frozen=True, slots=True)
class Allocate:
    """The `allocate` entry of a step: a method of kind `allocate` and its parameters."""

    method: Method
    params: BaseModel

    @property
    def arguments(self) -> dict[str, Any]:
        """The method's keyword arguments."""
        return {name: getattr(self.params, name) for name in type(self.params).model_fields}

    def as_dict(self) -> dict[str, Any]:
        """As a recipe writes it, every default filled in."""
        return {"method": self.method.name, **self.params.model_dump(mode="json")}

    @classmethod
    def parse(cls, raw: Any) -> Allocate:
        """Read `owl` or `{method: owl, spread: 0.1}`.

        Raises:
            ValidationError: With locations relative to the entry.
        """
        given = {"method": raw} if isinstance(raw, str) else dict(raw) if isinstance(raw, dict) else {}
        name = given.pop("method", None)
        if not isinstance(name, str):
            raise _error("an allocation is a name or a mapping, as in allocate: {method: owl}", raw)
        try:
            method = METHODS.get(name)
        except PluginError as error:
            raise _error(str(error), raw) from error
        if method.kind != "allocate":
            raise _error(f"{name} is a method of kind {method.kind}, it does not allot sparsity", raw)
        return cls(method, method.parameters.model_validate(given))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        """An entry is read by `parse`; its errors keep their places."""
        return core_schema.no_info_plain_validator_function(cls.parse)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        """For editors."""
        return {"anyOf": [{"type": "string"}, {"type": "object", "required": ["method"]}]}


def _error(message: str, value: Any) -> ValidationError:
    problem = PydanticCustomError("recipe", "{message}", {"message": message})
    return ValidationError.from_exception_data("allocate", [InitErrorDetails(type=problem, loc=(), input=value)])


def checked(method: str, found: object, sizes: Mapping[str, int], target: float) -> dict[str, float]:
    """What a method returned as shares by layer, if each is a fraction and their mean over weights is the target."""
    try:
        shares = {str(name): float(share) for name, share in dict(found).items()}  # type: ignore[call-overload]
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor of several values is a RuntimeError
        raise MethodError(f"{method} returned no numbers by layer: {in_one_line(error)}") from error
    if set(shares) != set(sizes):
        raise MethodError(f"{method} gave a sparsity to {len(shares)} layers, the step has {len(sizes)}")
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise MethodError(f"{method} gave the sparsity {share:g}, which is no fraction of zeros", layer=name)
    mean = sum(share * sizes[name] for name, share in shares.items()) / sum(sizes.values())
    if abs(mean - target) > TOLERANCE:
        raise MethodError(f"{method} gave a mean sparsity of {mean:.4f}, the step asks for {target:g}")
    return dict(shares)
