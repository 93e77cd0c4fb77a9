"""The numerics ladder: what may be done about statistics that arithmetic cannot use, and what is said of it.

Rungs are climbed in order, and only as far as the recipe's `numerics: {max_rung: ...}` allows:

- `none`: nothing is repaired; the layer is an error by name.
- `damping` (the default): a Gram matrix that is not positive definite gets up to 100 times the
  damping that was asked for. Factors are computed in float64 always.
- `tokens`: tokens with an inf or NaN among their activations are left out of the statistic.
- `columns`: inputs whose statistic is still not finite drop out of the repair: they are taken as
  uncorrelated with the others and as large as the largest of them. Their weights stay.
- `diagonal`: all inputs are taken as uncorrelated. GPTQ then rounds to nearest, SparseGPT scores
  like Wanda.

Every rung is noted on its layers, and `rungs_of` counts the notes for the report.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypeVar, get_args, runtime_checkable

import torch
from torch import Tensor

from sparsekit.errors import NumericsError
from sparsekit.pluginfile import named_failures
from sparsekit.stats import DAMP_LADDER, Gram, Statistic

Rung = Literal["none", "damping", "tokens", "columns", "diagonal"]
RUNGS: tuple[Rung, ...] = get_args(Rung)
T = TypeVar("T")
PART = 2**26  # entries of a statistic that are looked at at a time: looking takes as much memory again

UNREACHED = "no calibration token reached it; its inputs were taken as uncorrelated"
_KINDS = {
    "damping": re.compile(r"damping raised from "),
    "tokens": re.compile(r"[\d,]+ of [\d,]+ tokens were not finite"),
    "columns": re.compile(r"[\d,]+ of [\d,]+ inputs were not finite"),
    "diagonal": re.compile(r"all inputs were taken as uncorrelated"),
    "dead inputs": re.compile(r"\d+ of \d+ inputs were 0 on every token"),
    "no tokens": re.compile(re.escape(UNREACHED)),
}


@runtime_checkable
class Mendable(Protocol):
    """A statistic that can leave inputs out of what it knows."""

    @property
    def broken(self) -> Tensor:
        """Inputs about which it knows nothing finite, bool [in]."""
        ...

    def without(self, inputs: Tensor) -> Self:
        """The same, with the inputs bool [in] as large as the largest of the others and uncorrelated."""
        ...

    def diagonal(self) -> Self:
        """The same, all inputs uncorrelated; all of size 1 when it knows nothing finite."""
        ...


@dataclass(frozen=True, slots=True)
class Ladder:
    """How far up the recipe lets a step go."""

    highest: Rung = "damping"

    def allows(self, rung: Rung) -> bool:
        """Whether a rung may be used."""
        return RUNGS.index(rung) <= RUNGS.index(self.highest)

    def mend(self, statistic: Statistic, again: Callable[[], Statistic]) -> tuple[Statistic, tuple[str, ...]]:
        """A statistic that is finite, and notes of what was done to it.

        Args:
            statistic: As collected.
            again: Collects it once more from the tokens whose activations are all finite.
        Raises:
            NumericsError: It is not finite and the allowed rungs do not help.
        """
        if isinstance(statistic, Gram) and not self.allows("damping"):
            statistic.ladder = DAMP_LADDER[:1]
        if finite(statistic):
            return statistic, ()
        notes: list[str] = []
        if self.allows("tokens"):
            kept = again()
            if kept.tokens and kept.tokens < statistic.tokens:
                dropped = statistic.tokens - kept.tokens
                notes.append(f"{dropped:,} of {statistic.tokens:,} tokens were not finite and were left out")
                statistic = kept
        if not finite(statistic) and self.allows("columns") and isinstance(statistic, Mendable):
            broken = statistic.broken
            if not bool(broken.all()):
                told = f"{int(broken.sum()):,} of {len(broken):,} inputs were not finite"
                notes.append(f"{told}; they were taken as uncorrelated and as large as the largest other")
                statistic = statistic.without(broken)
            elif self.allows("diagonal"):
                notes.append(f"all inputs were taken as uncorrelated: all {len(broken):,} were inf or NaN")
                statistic = statistic.diagonal()
        if not finite(statistic):
            raise NumericsError(f"calibration activations are not finite (inf or NaN); {self._advice(statistic)}")
        return statistic, tuple(notes)

    def _advice(self, statistic: Statistic) -> str:
        """What the user can do."""
        higher = [rung for rung in RUNGS[RUNGS.index("tokens") :] if not self.allows(rung)]
        wider = "compute in a wider dtype (model: compute_dtype)"
        if not higher or (not isinstance(statistic, Mendable) and higher[0] != "tokens"):
            return f"no rung of the ladder helps; {wider}"
        return f"{wider}, or allow the next rung: numerics: {{max_rung: {higher[0]}}}"

    def apply(self, method: Callable[[Any, Statistic], T], given: Any, noted: Any, statistic: Statistic) -> T:
        """Call a method, once more with uncorrelated inputs when its arithmetic fails and the recipe lets it.

        Args:
            method: Takes a state and a statistic.
            given: The state.
            noted: Takes a note and returns the state with it.
            statistic: Finite.
        Raises:
            NumericsError: It fails, and the last rung is not allowed or does not help.
        """
        try:
            return method(given, statistic)
        except NumericsError as error:
            if not self.allows("diagonal") or not isinstance(statistic, Mendable):
                raise
            with named_failures(f"diagonal of statistic {type(statistic).__name__}", type(statistic)):
                plain = statistic.diagonal()
            return method(noted(f"all inputs were taken as uncorrelated: {error}"), plain)


def finite(statistic: Statistic) -> bool:
    """Whether every number of a statistic is finite."""
    tensors = [value for value in vars(statistic).values() if isinstance(value, Tensor) and value.is_floating_point()]
    return all(bool(torch.isfinite(part).all()) for value in tensors for part in torch.split(value.flatten(), PART))


def check_finite(groups: Sequence[Sequence[str]], statistics: Sequence[Statistic]) -> None:
    """Refuse statistics that are not finite, where nothing may be repaired.

    Raises:
        NumericsError: With the names of the layers.
    """
    for group, statistic in zip(groups, statistics, strict=True):
        if not finite(statistic):
            raise NumericsError("calibration activations are not finite (inf or NaN)", layer=", ".join(group))


def damping_note(asked: float, used: float) -> str:
    """A damping that had to be raised."""
    return f"damping raised from {asked:g} to {used:g}: the Gram matrix was not positive definite"


def dead_note(dead: int, inputs: int) -> str:
    """Inputs that never fired."""
    return f"{dead} of {inputs} inputs were 0 on every token; their weights are set to 0"


def rungs_of(notes: Iterable[str]) -> tuple[str, ...]:
    """The rungs that a layer's notes tell of; `dead inputs` and `no tokens` count as rungs here."""
    return tuple(kind for note in notes for kind, form in _KINDS.items() if form.match(note))


def counted(layers: Iterable[Any]) -> dict[str, int]:
    """On how many layers each rung was used, from layer records as JSON."""
    counts = Counter(rung for layer in layers for rung in set(layer.get("rungs", ())))
    return {kind: counts[kind] for kind in _KINDS if counts[kind]}
