"""What a method is: a plain function, its parameters, and what a plan may know of its results beforehand."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from sparsekit.branch import Branch, hollow
from sparsekit.pluginfile import named_failures
from sparsekit.signature import docstring, source_of, without_args
from sparsekit.stats import Statistic

Kind = Literal["prune", "train", "quantize", "branch", "allocate"]
Scope = Literal["linear", "group", "model", "layers"]
Check = Callable[[Mapping[str, Any]], tuple[str, str] | None]
Integers = Callable[[Mapping[str, Any]], int | None]
Rowwise = Callable[[Mapping[str, Any]], bool]
Branches = Callable[[Mapping[str, Any], int, int], Branch | None]


@dataclass(frozen=True, slots=True)
class Method:
    """One pruner, trainer, quantizer or maker of low-rank branches.

    Attributes:
        name: What a recipe writes after `method:`.
        kind: `prune` and `train` write weights and masks; `quantize` writes integers, and nothing
            may write weights after it. `branch` writes a low-rank branch beside weights that stay, integers
            too. `allocate` writes nothing: it says how sparse a pruner shall make each layer.
        scope: What the function is called with: one linear, a group of linears, the model, or all
            layers of a step one after another.
        stats: The statistic it reads, None when it needs no calibration.
        function: The plain function.
        parameters: pydantic model of its keyword-only parameters; unknown keys are errors.
        origin: Where it was loaded from.
        digest: sha256 of the file that defines it, part of every fingerprint.
        check: Says what is wrong between parameters that are right by themselves, as (parameter, message).
        dense: The linears it is given carry their dense values, `LinearState.dense`.
        integers: Of a trainer or a pruner: bits of the codes it leaves, given all parameters, None if it leaves floats.
            No function for one that always does.
        rowwise: Whether, with these arguments, the result of a row depends on that row and the statistic
            alone: linears with one input may then be handed over as one. None is never.
        branches: Given all parameters, outputs and inputs: a branch of the shapes it leaves beside such a
            linear, on the meta device, or None where it leaves none. No function for one that never does,
            and for a plugin of kind `branch` whose sizes no plan will know.
    """

    name: str
    kind: Kind
    scope: Scope
    stats: type[Statistic] | None
    function: Callable[..., Any]
    parameters: type[BaseModel]
    origin: str
    digest: str
    dense: bool = False
    check: Check | None = None
    integers: Integers | None = None
    rowwise: Rowwise | None = None
    branches: Branches | None = None

    def quantizes(self, values: Mapping[str, Any]) -> bool:
        """Whether its result is integers with these parameters; all of them, by name."""
        return self.kind == "quantize" or (self.integers is not None and self.integers(values) is not None)

    def code_bits(self, values: Mapping[str, Any]) -> int | None:
        """Bits of the codes it leaves, as far as parameters tell; None without integers."""
        found: int | None = values.get("bits") if self.integers is None else self.integers(values)
        return found if self.quantizes(values) else None

    @property
    def built_in(self) -> bool:
        """Whether it came with sparsekit."""
        return self.origin.startswith("sparsekit.methods.")

    @property
    def guarded(self) -> Callable[..., Any]:
        """The function as drivers call it: a plugin that fails is named; see `named_failures`."""
        return named_failures(f"method {self.name}", self.function)(self.function)

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return docstring(self.function).partition("\n")[0]

    @property
    def text(self) -> str:
        """The docstring without its `Args:` section, which the parameter table shows."""
        return without_args(docstring(self.function))

    @property
    def source(self) -> str:
        """The `Source:` paragraph of the docstring: paper, equation."""
        return source_of(docstring(self.function))

    def accepts(self, annotation: Any) -> str | None:
        """Name of the first parameter of that type, None if there is none."""
        for name, info in self.parameters.model_fields.items():
            if annotation in (info.annotation, *typing.get_args(info.annotation)):
                return name
        return None

    def by_rows(self, arguments: Mapping[str, Any]) -> bool:
        """`rowwise` of some arguments; those that are absent have their defaults."""
        defaults = {name: info.default for name, info in self.parameters.model_fields.items()}
        return self.rowwise is not None and self.rowwise({**defaults, **arguments})

    def branch_of(self, values: Mapping[str, Any], out: int, into: int) -> Branch | None:
        """A hollow branch, on meta, as its result has it beside a linear [out, into]; of rank 1 where nobody knows.

        Raises:
            MethodError: With these parameters there is none for such a linear.
        """
        if self.branches is not None:
            return self.branches(values, out, into)
        return hollow(1, out, into) if self.kind == "branch" else None
