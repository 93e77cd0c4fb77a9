"""A step of a recipe: a method with its parameters and the layers it is meant for.

In YAML a step is flat, `{method: gptq, bits: 4, ignore: ["*.mlp.*"]}`: the method's own parameters
stand beside what every step has.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import or_
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError, create_model
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from sparsekit.allocate import Allocate
from sparsekit.errors import PluginError, nearest
from sparsekit.method import Method
from sparsekit.pattern import Pattern
from sparsekit.recipe.yamllines import Keys, shown
from sparsekit.registry import METHODS
from sparsekit.training.schedule import Budget, Length
from sparsekit.units import Fraction

Schedule = Literal["block", "group"]


@dataclass(frozen=True, slots=True)
class Step:
    """One step.

    Attributes:
        method: What is applied.
        params: The method's parameters, an instance of `method.parameters`.
        given: Names of the parameters the user wrote.
        targets: Layers it is meant for: "Linear" for all, exact names, globs, or `re:` patterns.
        ignore: Layers it leaves alone, in the same forms.
        schedule: "block": all statistics come from the block as it was. "group": each group of
            linears sees what the groups before it have become. Of no meaning for scope model,
            whose methods may have a parameter of that name.
        allocate: What decides how the sparsity is spread over the layers; None for the same in each.
        gpus: Processes that a step of scope model is done by, each on a device of its own. The result
            does not depend on it beyond rounding, so a step can go on with another number.
        teacher: Directory of the model that a step of scope model learns from; None for the dense original.
    """

    method: Method
    params: BaseModel
    given: frozenset[str]
    targets: list[str]
    ignore: list[str]
    schedule: Schedule
    allocate: Allocate | None = None
    gpus: int = 1
    teacher: str | None = None

    @property
    def calibrated(self) -> bool:
        """Whether it reads a calibration text."""
        return self.method.stats is not None or (self.allocate is not None and self.allocate.method.stats is not None)

    @property
    def quantizes(self) -> bool:
        """Whether it leaves integers; nothing may write weights after it."""
        return self.method.quantizes(self.values)

    @property
    def code_bits(self) -> int | None:
        """Bits of the codes it leaves; None without integers."""
        return self.method.code_bits(self.values)

    @property
    def values(self) -> dict[str, Any]:
        """The method's keyword arguments."""
        return {name: getattr(self.params, name) for name in type(self.params).model_fields}

    @property
    def taught(self) -> dict[str, str]:
        """`teacher` as a recipe writes it; nothing where it is the dense original."""
        return {} if self.teacher is None else {"teacher": self.teacher}

    @property
    def plugins(self) -> list[dict[str, str]]:
        """The code it runs that did not come with sparsekit: method, file and sha256 of the file."""
        used = [self.method] if self.allocate is None else [self.method, self.allocate.method]
        return [
            {"method": each.name, "origin": each.origin, "sha256": each.digest} for each in used if not each.built_in
        ]

    def as_dict(self) -> dict[str, Any]:
        """The step as a recipe writes it, every default filled in."""
        params = self.params.model_dump(mode="json")
        pattern = params_pattern(self.method, self.params)
        if pattern is not None and not pattern.structured and pattern.sparsity < 1:
            del params["pattern"]
            params["sparsity"] = pattern.sparsity  # the text form of a pattern is rounded
        schedule = {"schedule": self.schedule} if has_schedule(self.method) else {}
        allocate = {} if self.allocate is None else {"allocate": self.allocate.as_dict()}
        gpus = {"gpus": self.gpus} if self.method.scope == "model" else {}
        common = {"targets": self.targets, "ignore": self.ignore, **schedule, **allocate, **gpus, **self.taught}
        return {"method": self.method.name, **params, **common}

    @classmethod
    def parse(cls, raw: Any) -> Step:
        """Read a step.

        Raises:
            ValidationError: With locations relative to the step.
        """
        method = _method(raw)
        given = dict(raw)
        by_sparsity = takes_sparsity(method) and given.get("sparsity") is not None
        if by_sparsity and "pattern" not in given and method.parameters.model_fields["pattern"].is_required():
            given["pattern"] = str(Pattern.unstructured(0.5))  # replaced below
        read: Any = step_model(method).model_validate_json(plain_json(given))
        values = {name: getattr(read, name) for name in method.parameters.model_fields}
        if by_sparsity:
            values["pattern"] = _agreed(values["pattern"] if "pattern" in raw else None, read.sparsity)
        if takes_tokens_as_budget(method) and read.budget is not None:
            if read.budget.minutes is None:
                return cls.parse(_with_tokens(raw, read.budget.tokens))
            values["budget"] = Budget(minutes=read.budget.minutes)
        wrong = method.check(values) if method.check is not None else None
        if wrong is not None:
            raise _error((wrong[0],) if wrong[0] in raw else (), wrong[1], raw.get(wrong[0]))
        given |= {"pattern": values["pattern"]} if by_sparsity else {}
        written = frozenset(name for name in method.parameters.model_fields if name in given)
        params = method.parameters.model_construct(set(written), **values)
        schedule: Schedule = read.schedule if has_schedule(method) else "block"
        allocate: Allocate | None = read.allocate if takes_allocation(method) else None
        if allocate is not None and values["pattern"].structured:
            message = f'pattern "{values["pattern"]}" is the same in every layer; allocate needs sparsity: 0.5 instead'
            raise _error(("allocate",), message, raw["allocate"])
        gpus: int = read.gpus if method.scope == "model" else 1
        teacher: str | None = read.teacher if method.scope == "model" else None
        return cls(method, params, written, read.targets, read.ignore, schedule, allocate, gpus, teacher)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        """A step is read by `parse`; its errors keep their places."""
        return core_schema.no_info_plain_validator_function(cls.parse)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        """Replaced by `steps_schema`, which knows the methods."""
        return {"type": "object", "required": ["method"]}


def plain_json(values: Any) -> str:
    """JSON of plain data: pydantic reads a list as a tuple where one is asked for, and nothing else loosely."""
    return json.dumps(values, allow_nan=False)


def has_schedule(method: Method) -> bool:
    """Whether the walk over blocks applies it, and so has statistics to gather in one order or another."""
    return method.scope in ("linear", "group")


def takes_sparsity(method: Method) -> bool:
    """Whether a step may write `sparsity: 0.5` for its `pattern`."""
    return method.accepts(Pattern) == "pattern" and "sparsity" not in method.parameters.model_fields


def takes_allocation(method: Method) -> bool:
    """Whether a step may write `allocate: owl`: the sparsity of each layer is then its own."""
    return takes_sparsity(method) and method.scope == "linear" and method.kind == "prune"


def takes_tokens_as_budget(method: Method) -> bool:
    """Whether a step may write `budget: {tokens: 26.2M}` for its `tokens: 26.2M`."""
    return method.accepts(Budget) == "budget" and "tokens" in method.parameters.model_fields


def params_pattern(method: Method, params: BaseModel) -> Pattern | None:
    """The pattern among a method's parameters, when `sparsity` can stand for it."""
    pattern: Pattern | None = getattr(params, "pattern") if takes_sparsity(method) else None  # noqa: B009
    return pattern


@lru_cache(maxsize=256)
def step_model(method: Method) -> type[BaseModel]:
    """Everything a step with this method may hold.

    Raises:
        PluginError: A parameter of the method has the name of something every step has.
    """
    fields: dict[str, Any] = {
        "method": (Literal[method.name], Field(description=method.summary)),
        "targets": (
            Annotated[list[str], Field(min_length=1)],
            Field(["Linear"], description="Layers it is meant for: Linear for all, names, globs, re:PATTERN."),
        ),
        "ignore": (list[str], Field([], description="Layers it leaves alone, in the same forms.")),
    }
    if has_schedule(method):
        description = "Gather statistics once a block, or anew for each group of linears."
        fields["schedule"] = (Schedule, Field("block", description=description))
    if method.scope == "model":
        description = "Processes that train, each on a GPU of its own; processes on a CPU."
        fields["gpus"] = (Annotated[int, Field(ge=1)], Field(1, description=description))
        description = "Directory of the model to learn from, with the same tokenizer; by default the dense original."
        fields["teacher"] = (Annotated[str, Field(min_length=1)] | None, Field(None, description=description))
    if takes_allocation(method):
        fields["allocate"] = (Allocate | None, Field(None, description="A method that spreads the sparsity unevenly."))
    if taken := set(fields) & set(method.parameters.model_fields):
        message = f"parameter {sorted(taken)[0]!r} has the name of a key that every step has"
        raise PluginError(f"method {method.name!r} of {method.origin}: {message}")
    if takes_sparsity(method):
        fraction = Annotated[Fraction, AfterValidator(_sparsity)] | None
        fields["sparsity"] = (fraction, Field(None, description="Fraction of zeros, in place of pattern."))
    if takes_tokens_as_budget(method):
        told = method.parameters.model_fields["budget"].description
        fields["budget"] = (Length | None, Field(None, description=told))
    model: type[BaseModel] = create_model(method.name, __base__=method.parameters, **fields)
    return model


def steps_schema(methods: Iterable[Method]) -> dict[str, Any]:
    """JSON Schema of a step: `oneOf` with a branch for each method, and its `$defs`."""
    models = [step_model(method) for method in methods]
    union: Any = reduce(or_, models)
    annotated: Any = Annotated[union, Field(discriminator="method")] if len(models) > 1 else union
    schema = TypeAdapter(annotated).json_schema()
    for definition in schema["$defs"].values():
        if "pattern" in definition.get("required", ()) and "sparsity" in definition["properties"]:
            definition["required"].remove("pattern")
            definition["anyOf"] = [{"required": ["pattern"]}, {"required": ["sparsity"]}]
    return schema


def known_keys(raw: Mapping[str, Any], below: Keys) -> list[str]:
    """Keys a step may have, or a mapping among its parameters."""
    model = step_model(METHODS.get(raw["method"]))
    for key in below:
        if key == "allocate" and isinstance(raw.get("allocate"), dict):
            return ["method", *METHODS.get(raw["allocate"]["method"]).parameters.model_fields]
        if isinstance(key, str) and key in model.model_fields:
            annotation = model.model_fields[key].annotation
            candidates = (annotation, *get_args(annotation))
            model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    names = list(model.model_fields)
    return sorted(names, key=lambda name: name != "method")


def _method(raw: Any) -> Method:
    """The method a step names."""
    if not isinstance(raw, dict):
        raise _error((), f"a step is {shown(raw)}, expected a mapping, as in {{method: gptq, bits: 4}}", raw)
    names = METHODS.names()
    if "method" not in raw:
        raise _error((), f"the step lacks the required key 'method'; there are {', '.join(names)}", raw)
    name = raw["method"]
    if not isinstance(name, str):
        raise _error(("method",), f"method is {shown(name)}, expected one of {', '.join(names)}", name)
    if name not in names:
        raise _error(("method",), f"no method {name!r}; there are {', '.join(names)}.{nearest(name, names)}", name)
    method = METHODS.get(name)
    if method.kind == "allocate":
        example = f"{{method: wanda, sparsity: 0.5, allocate: {name}}}"
        raise _error(("method",), f"{name} prunes nothing itself; name it in a pruning step: {example}", name)
    return method


def _sparsity(value: float) -> float:
    """A fraction below 1."""
    if value >= 1:
        percent = f"; write {value / 100:g} for {value:g} %" if 1 < value < 100 else ""
        raise ValueError(f"sparsity {value:g} is no fraction of zeros, 0 <= sparsity < 1{percent}")
    return value


def _agreed(pattern: Pattern | None, sparsity: float) -> Pattern:
    """The pattern of a step that writes `sparsity`, alone or beside a pattern."""
    if pattern is None:
        return Pattern.unstructured(sparsity)
    if abs(pattern.sparsity - sparsity) > 1e-6:
        message = f'pattern "{pattern}" has sparsity {pattern.sparsity:g}, and sparsity says {sparsity:g}; keep one'
        raise _error(("sparsity",), message, sparsity)
    return pattern


def _with_tokens(raw: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """A step that writes `budget: {tokens: ...}` in the other spelling."""
    if raw.get("tokens") is not None:
        message = "tokens and budget: {tokens: ...} are two spellings of one thing; keep one"
        raise _error(("budget",), message, raw["budget"])
    return {**{key: value for key, value in raw.items() if key != "budget"}, "tokens": tokens}


def _error(loc: Keys, message: str, value: Any) -> ValidationError:
    """A validation error with a message of our own and a place."""
    problem = PydanticCustomError("recipe", "{message}", {"message": message})
    return ValidationError.from_exception_data("step", [InitErrorDetails(type=problem, loc=loc, input=value)])
