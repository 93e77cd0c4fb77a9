"""Paired comparisons of two models on the same windows and documents."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

LEVEL = 0.95  # of the confidence intervals

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """Relative change of a perplexity from one model to another on the same windows.

    Attributes:
        value: The change; 0.05 is 5 % more.
        low: Lower end of its confidence interval, None when windows cannot be paired.
        high: Upper end.
        windows: Pairs it rests on.
    """

    value: float
    low: float | None
    high: float | None
    windows: int

    @property
    def certain(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "level": LEVEL, "certain": self.certain}


def perplexity_change(base: Record, other: Record, level: float = LEVEL) -> Change:
    """Change of the perplexity from `base` to `other`, scores as `evaluate.Score.as_dict` writes them.

    The interval is that of the mean difference of the losses window by window, by Student's t, put
    through the exponential. Most of the spread of a perplexity is between easy and hard windows,
    which both models share.
    """
    value = other["perplexity"] / base["perplexity"] - 1
    before, after = base.get("window_losses") or (), other.get("window_losses") or ()
    if len(before) != len(after) or len(before) < 2 or not math.isfinite(value):
        return Change(value, None, None, 0)
    differences = [end - start for start, end in zip(before, after, strict=True)]
    if not all(map(math.isfinite, differences)):
        return Change(value, None, None, 0)
    count = len(differences)
    reach = student_t(level, count - 1) * statistics.stdev(differences) / math.sqrt(count)
    mean = math.log1p(value)
    return Change(value, math.expm1(mean - reach), math.expm1(mean + reach), count)


def student_t(level: float, freedom: int) -> float:
    """Two-sided quantile of Student's t, 12.71 for 0.95 and one degree of freedom.

    Found by bisection on the distribution function, a finite sum for whole degrees of freedom.

    Source: Abramowitz & Stegun, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        if _t_within(middle, freedom) < level:
            low = middle
        else:
            high = middle
    return high


def _t_within(t: float, freedom: int) -> float:
    """P(|T| <= t)."""
    angle = math.atan2(t, math.sqrt(freedom))
    cosine = math.cos(angle) ** 2
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(1 + odd, freedom, 2):  # k = 2, 4, ... for odd freedom, 1, 3, ... for even
        total += term
        term *= cosine * k / (k + 1)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


@dataclass(frozen=True, slots=True)
class SignTest:
    """Documents that only one of two models got right, and the exact two-sided p of McNemar's test.

    Attributes:
        lost: Right before and wrong after.
        won: Wrong before and right after.
        p: Probability of a split at least as uneven if both models were equally good.
    """

    lost: int
    won: int
    p: float


def sign_test(before: Sequence[int], after: Sequence[int]) -> SignTest:
    """McNemar's exact test on 0/1 outcomes of the same documents."""
    lost = sum(b > a for b, a in zip(before, after, strict=True))
    won = sum(a > b for b, a in zip(before, after, strict=True))
    return SignTest(lost, won, sign_p(lost, won))


def sign_p(lost: int, won: int) -> float:
    """Two-sided probability under a fair coin; 1 when nothing differs."""
    count, least = lost + won, min(lost, won)
    tail, term = 0, 1  # of binomial coefficients, exact integers
    for k in range(least + 1):
        tail += term
        term = term * (count - k) // (k + 1)
    return min(1.0, 2 * tail / (1 << count))


def task_tests(dense: Record, other: Record) -> dict[str, dict[str, dict[str, Any]]]:
    """The test for each task and metric that is right or wrong document by document; groups pool their tasks."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for task in dense:
        if task not in other:
            continue
        metrics = dict(_outcomes(dense, task))
        others = dict(_outcomes(other, task))
        found[task] = {
            metric: asdict(sign_test(outcomes, others[metric]))
            for metric, outcomes in metrics.items()
            if metric in others and len(others[metric]) == len(outcomes)
        }
    return found


def _outcomes(scores: Record, task: str) -> Iterator[tuple[str, list[int]]]:
    """The outcome of every document by metric."""
    documents = scores[task].get("documents") if isinstance(scores[task], Mapping) else None
    if not isinstance(documents, Mapping):
        return
    if "correct" in documents:
        yield from documents["correct"].items()
        return
    parts = [dict(_outcomes(scores, name)) for name in documents.get("tasks", ()) if name in scores]
    for metric in parts[0] if parts else ():
        if all(metric in part for part in parts):
            yield metric, [one for part in parts for one in part[metric]]
