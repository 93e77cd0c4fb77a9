"""Every mistake sparsekit can name.

SparsekitError            exit code 2, shown without a traceback
├── RecipeError           what the user wrote in a recipe or on the command line
├── PluginError           a plugin that cannot be found, loaded or registered
│   └── ContractError     a method that breaks a promise every method makes
├── ModelError            a model directory or architecture that cannot be used
│   └── CoverageError     too many parameters no step can reach
├── DataError             a text that cannot be read, tokenised or is too short
├── MethodError           a method cannot do what was asked, on a named layer
│   ├── NumericsError     a Gram matrix or activation that defeats the whole ladder
│   └── PatternError      a compressed layer does not hold the pattern it promised
├── CheckpointError       a file of a run or an export is damaged, foreign or in use
├── ShortageError         the device has too little memory, also for the work in smaller parts
└── GateError             a quality gate was missed (exit code 3)
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable


class SparsekitError(Exception):
    """A problem the user can act on; the message says what, where and what is allowed."""

    exit_code = 2


class RecipeError(SparsekitError):
    """Something in a recipe or a command-line override is wrong."""

    def __init__(self, message: str, *, where: str | None = None) -> None:
        self.where = where
        super().__init__(f"{where}: {message}" if where else message)


class PluginError(SparsekitError):
    """A plugin cannot be found, loaded or registered."""


class ContractError(PluginError):
    """A method breaks a promise every method makes; the message says how and what to do."""


class ModelError(SparsekitError):
    """A model directory or architecture cannot be used."""


class CoverageError(ModelError):
    """More parameters are out of every step's reach than the recipe accepts."""


class DataError(SparsekitError):
    """A text cannot be read or is too short for what was asked."""


class MethodError(SparsekitError):
    """A method cannot do what was asked on the named layer."""

    def __init__(self, message: str, *, layer: str | None = None) -> None:
        self.layer = layer
        super().__init__(f"{layer}: {message}" if layer else message)


class NumericsError(MethodError):
    """No rung of the numerics ladder gives a finite result."""


class PatternError(MethodError):
    """A compressed layer breaks the sparsity pattern it promised."""


class CheckpointError(SparsekitError):
    """A file of a run or an export is damaged, foreign or in use."""


class ShortageError(SparsekitError):
    """The device has too little memory, also for the work in smaller parts."""


class GateError(SparsekitError):
    """A quality gate of the recipe was missed."""

    exit_code = 3


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest allowed name, or an empty string."""
    matches = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def in_one_line(error: BaseException, most: int = 200) -> str:
    """What an error of another library says, its first lines joined, in at most so many characters."""
    return textwrap.shorten(str(error), most, placeholder=" ...")
