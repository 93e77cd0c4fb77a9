"""What every statistic promises, one function for each promise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparsekit.errors import ContractError
from sparsekit.pluginfile import described
from sparsekit.stats import Statistic
from sparsekit.testing.specimens import CPU, readable

TOKENS, INPUTS = 96, 64
ROUNDING = 1e-3  # of the largest number, for sums in another order

StatisticCheck = Callable[[type[Statistic]], None]


def counts(kind: type[Statistic]) -> None:
    """It begins at 0 tokens and counts those that it is given."""
    for statistic, count in ((_filled(kind), 0), (_filled(kind, *_tokens().view(2, -1, INPUTS)), TOKENS)):
        if statistic.tokens != count:
            raise ContractError(
                f"its tokens are {statistic.tokens!r} after {count} tokens; "
                "begin with self.tokens = 0, and self.tokens += x.shape[0] in update"
            )


def adds_up(kind: type[Statistic]) -> None:
    """Tokens in several parts give what they give at once, up to rounding."""
    _compare(_filled(kind, _tokens()), _filled(kind, *_tokens().view(3, -1, INPUTS)), "tokens given in three parts")


def merges(kind: type[Statistic]) -> None:
    """Two accumulators merged give what one gives that saw all tokens, and the merged one stays as it was."""
    one, other = _tokens().view(2, -1, INPUTS)
    whole, first, second = _filled(kind, one, other), _filled(kind, one), _filled(kind, other)
    before = {name: tensor.clone() for name, tensor in readable(second).items()}
    with _told("merge", kind):
        first.merge(second)
    if first.tokens != TOKENS:
        raise ContractError(
            f"merged from {len(one)} and {len(other)} tokens it counts {first.tokens}; add other.tokens"
        )
    _compare(whole, first, "two halves merged")
    for name, tensor in readable(second).items():
        if not torch.equal(tensor, before[name]):
            raise ContractError(f"merge changes the {name} of the accumulator that it adds; change self alone")


def narrow(kind: type[Statistic]) -> None:
    """Tokens of 16 bits are taken, and summed up in more bits."""
    narrow = _tokens().bfloat16()
    _compare(_filled(kind, narrow.float()), _filled(kind, narrow), "the same numbers in bfloat16")


def keeps_tokens(kind: type[Statistic]) -> None:
    """The tokens it is given are not modified; the model goes on with them."""
    x = _tokens()
    _filled(kind, x)
    if not torch.equal(x, _tokens()):
        raise ContractError("update changes the tokens it is given, with which the model goes on; work on a copy")


STATISTIC_CHECKS: tuple[StatisticCheck, ...] = (counts, keeps_tokens, adds_up, merges, narrow)


def check_statistic(kind: type[Statistic]) -> None:
    """Try every promise of a statistic; a method that reads it has them in its own suite.

    Raises:
        ContractError: The first promise that is broken.
    """
    for check in STATISTIC_CHECKS:
        try:
            check(kind)
        except ContractError as error:
            raise ContractError(f"statistic {kind.__name__} ({check.__name__}): {error}") from error


def _tokens() -> Tensor:
    """Made-up inputs, float32 [tokens, in], the same at every call."""
    return torch.randn(TOKENS, INPUTS, generator=torch.Generator().manual_seed(0))


def _filled(kind: type[Statistic], *parts: Tensor) -> Statistic:
    """A statistic that has seen some parts."""
    with _told("empty", kind):
        statistic = kind.empty(INPUTS, CPU)
    for x in parts:
        with _told("update", kind):
            statistic.update(x)
    return statistic


@contextmanager
def _told(what: str, kind: type[Statistic]) -> Iterator[None]:
    """Whatever a method of the statistic fails with becomes a broken promise."""
    try:
        with torch.inference_mode():
            yield
    except Exception as error:  # it may fail in any way; the promise is that it does not
        raise ContractError(f"{what} failed: {described(error, inspect.getfile(kind))}") from error


def _compare(one: Statistic, other: Statistic, what: str) -> None:
    """Two accumulators hold the same numbers."""
    found, others = readable(one), readable(other)
    if found.keys() != others.keys():
        raise ContractError(f"{what} give {', '.join(others) or 'no tensor'}, at once {', '.join(found) or 'none'}")
    for name, tensor in found.items():
        if tensor.shape != others[name].shape:
            raise ContractError(f"{what} give a {name} of {list(others[name].shape)}, at once {list(tensor.shape)}")
        far = (tensor.double() - others[name].double()).abs()
        if not bool((far <= ROUNDING * tensor.double().abs().max().clamp(min=1e-30)).all()):
            raise ContractError(
                f"{what} give another {name}; sum in float32 (x.float()) over tokens, "
                "and divide by self.tokens only where it is read"
            )
