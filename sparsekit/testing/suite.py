"""A suite: the promises of one kind of thing, tried one after another, whatever that kind is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch

from sparsekit.errors import ContractError, SparsekitError

Status = Literal["ok", "failed", "does not apply"]
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One promise of one thing: `ok`, `failed` with the reason, or `does not apply` with the reason.

    Attributes:
        name: Of the promise.
        status: What became of it.
        message: What is promised, or the reason.
        error: Of a promise that failed; its causes have the traceback.
    """

    name: str
    status: Status
    message: str
    error: SparsekitError | None = None


def without_cuda() -> str:
    """Why nothing can be tried on CUDA here; empty when it can."""
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def summary(promise: Callable[..., None]) -> str:
    """What is promised: the first line of the docstring."""
    return (promise.__doc__ or "").partition("\n")[0]


@dataclass(frozen=True, slots=True)
class Suite(Generic[S]):
    """The promises of one kind of thing.

    Attributes:
        noun: What such a thing is called.
        names: Those that there are.
        subject: From a name and arguments, as a recipe writes them, to what a promise is given.
        promises: Functions of a subject; each raises a `SparsekitError` when it is broken. Without the
            first one that applies none of the others means anything.
        excuse: Why a promise does not apply to a subject; empty when it does.
        parameters: Whether such a thing may have parameters.
    """

    noun: str
    names: Callable[[], Iterable[str]]
    subject: Callable[[str, Mapping[str, Any]], S]
    promises: tuple[Callable[[S], None], ...]
    excuse: Callable[[Callable[[S], None], S], str]
    parameters: bool = False

    def outcomes(self, name: str, arguments: Mapping[str, Any]) -> list[Outcome]:
        """Try every promise.

        Raises:
            PluginError: Nothing is called that, or a parameter is missing or not understood.
        """
        subject, found, broken = self.subject(name, arguments), list[Outcome](), ""
        for promise in self.promises:
            title = promise.__name__
            if why := self.excuse(promise, subject) or broken:
                found.append(Outcome(title, "does not apply", why))
                continue
            try:
                promise(subject)
                found.append(Outcome(title, "ok", summary(promise)))
            except SparsekitError as error:
                if all(each.status == "does not apply" for each in found):
                    broken = f"it fails at {title!r}"
                found.append(Outcome(title, "failed", str(error), error))
        return found

    def check(self, name: str, arguments: Mapping[str, Any] | None = None) -> None:
        """Try every promise and complain of all that are broken.

        Raises:
            ContractError: One is; the message lists every one.
            PluginError: See `outcomes`.
        """
        failed = [each for each in self.outcomes(name, arguments or {}) if each.status == "failed"]
        if failed:
            lines = "\n".join(f"  {each.name}: {each.message}" for each in failed)
            many = "a promise" if len(failed) == 1 else f"{len(failed)} promises"
            raise ContractError(f"{self.noun} {name!r} breaks {many} of the contract:\n{lines}") from failed[0].error
