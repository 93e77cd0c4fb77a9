"""Measurements of one's own: functions of a model's forward and of windows of tokens that return named numbers.

    @sk.evaluator("confidence")
    def confidence(forward: sk.Forward, windows: Tensor, /, *, top: int = 1) -> dict[str, float]: ...

A recipe writes `evaluate.measures: [{evaluator: confidence, text: heldout, top: 5}]`; the dense and the
compressed model are measured, and both numbers stand in the report and in comparisons.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema
from torch import Tensor

from sparsekit.errors import MethodError, PluginError, nearest
from sparsekit.pluginfile import named_failures
from sparsekit.shelf import Origin, Shelf
from sparsekit.signature import lower_case, parameters, positional

Forward = Callable[[Tensor], Tensor]
F = TypeVar("F", bound=Callable[..., Mapping[str, float]])


@dataclass(frozen=True, slots=True)
class Evaluator:
    """One measurement.

    Attributes:
        name: What a recipe writes after `evaluator:`.
        function: Of (forward, windows), with keyword-only parameters.
        parameters: pydantic model of them; unknown keys are errors.
        origin: Where it was defined; part of what its numbers are kept under.
    """

    name: str
    function: Callable[..., Mapping[str, float]]
    parameters: type[BaseModel]
    origin: Origin

    @property
    def doc(self) -> str | None:
        """About it."""
        return inspect.getdoc(self.function)


EVALUATORS: Shelf[Evaluator] = Shelf("evaluator")


def evaluator(name: str) -> Callable[[F], F]:
    """Register `f(forward, windows, /, *, params) -> {number: value}` as a measurement of `evaluate.measures`.

    It is called for the dense and for the compressed model. `forward` takes tokens int [batch, seq_len] and
    gives logits [batch, seq_len, vocabulary]; `windows` are int32 [windows, seq_len]; how many go into a
    forward is the function's to decide.

    Args:
        name: What a recipe writes.
    """
    lower_case("evaluator", name)

    def register(function: F) -> F:
        signature = inspect.signature(function)
        positional("evaluator", name, signature, ("forward", "windows"))
        if taken := {"evaluator", "text"} & signature.parameters.keys():
            raise PluginError(f"evaluator {name!r}: parameter {taken.pop()!r} has the name of a key every measure has")
        schema = parameters("evaluator", name, function, signature)
        EVALUATORS.register(Evaluator(name, function, schema, Origin.of(function)))
        return function

    return register


@dataclass(frozen=True, slots=True)
class Measure:
    """An entry of `evaluate.measures`: an evaluator, a text of data.evaluation, parameters."""

    evaluator: Evaluator
    text: str
    params: BaseModel

    @property
    def title(self) -> str:
        """In tables: `confidence on heldout (top=5)`, with the parameters that are not at their defaults."""
        fields = type(self.params).model_fields
        own = [key for key, info in fields.items() if getattr(self.params, key) != info.default]
        told = ", ".join(f"{key}={self._shown[key]}" for key in own)
        return f"{self.evaluator.name} on {self.text}" + (f" ({told})" if told else "")

    @property
    def _shown(self) -> dict[str, Any]:
        return self.params.model_dump(mode="json")

    def as_dict(self) -> dict[str, Any]:
        """As a recipe writes it, every default filled in."""
        return {"evaluator": self.evaluator.name, "text": self.text, **self._shown}

    def of(self, forward: Forward, windows: Tensor) -> dict[str, float]:
        """The numbers of a model.

        Raises:
            MethodError: What the function returned is no mapping of names to finite numbers.
            PluginError: It failed.
        """
        arguments = {name: getattr(self.params, name) for name in type(self.params).model_fields}
        with named_failures(f"evaluator {self.evaluator.name}", self.evaluator.function):
            found = self.evaluator.function(forward, windows, **arguments)
        if not isinstance(found, Mapping) or not found:
            hint = 'as in return {"probability": 0.5}'
            raise MethodError(f"evaluator {self.evaluator.name} returned {found!r}, expected named numbers, {hint}")
        for key, value in found.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                hint = "; float(...) makes one of a tensor" if isinstance(value, Tensor) else ""
                raise MethodError(
                    f"evaluator {self.evaluator.name}: {key} is {value!r}, expected a finite number{hint}"
                )
        return {str(key): float(value) for key, value in found.items()}

    @classmethod
    def parse(cls, raw: Any) -> Measure:
        """Read `{evaluator: confidence, text: heldout, top: 5}`.

        Raises:
            ValidationError: With locations relative to the entry.
        """
        if not isinstance(raw, dict):
            raise _error("a measure is a mapping, as in {evaluator: NAME, text: heldout}", raw)
        given = dict(raw)
        name, text = given.pop("evaluator", None), given.pop("text", None)
        if not isinstance(name, str) or name not in EVALUATORS:
            there = ", ".join(EVALUATORS) or "none: evaluators come from plugins"
            hint = nearest(name, EVALUATORS) if isinstance(name, str) else ""
            raise _error(f"no evaluator {name!r}; there is {there}.{hint}", raw)
        if not isinstance(text, str):
            raise _error(f"text is {text!r}, expected a name under data.evaluation", raw)
        return cls(EVALUATORS[name], text, EVALUATORS[name].parameters.model_validate(given))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        """An entry is read by `parse`; its errors keep their places."""
        written = core_schema.plain_serializer_function_ser_schema(cls.as_dict)
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=written)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        """For editors."""
        keys = {"evaluator": {"enum": list(EVALUATORS)}, "text": {"type": "string"}}
        return {"type": "object", "properties": keys, "required": ["evaluator", "text"]}


def known_measure_keys(raw: Mapping[str, Any]) -> list[str]:
    """Keys an entry may have."""
    return ["evaluator", "text", *EVALUATORS[raw["evaluator"]].parameters.model_fields]


def code_of(measures: Sequence[Measure]) -> dict[str, Evaluator]:
    """The evaluators of a recipe, by what uses them."""
    return {f"measure {measure.title}": measure.evaluator for measure in measures}


def _error(message: str, value: Any) -> ValidationError:
    problem = PydanticCustomError("recipe", "{message}", {"message": message})
    return ValidationError.from_exception_data("measure", [InitErrorDetails(type=problem, loc=(), input=value)])
