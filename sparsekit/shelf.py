"""What else plugins bring: export formats, evaluators and report sections, by name, through the same door as methods.

`METHODS.load_path` and the entry points of `sparsekit.plugins` run a plugin's file; its decorators put
things here. Which file that was, and its sha256, go into the plan and the report.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sparsekit.errors import PluginError
from sparsekit.registry import METHODS


@dataclass(frozen=True, slots=True)
class Origin:
    """Where something was defined.

    Attributes:
        place: A module of sparsekit, or a plugin's file.
        sha256: Of that file.
    """

    place: str
    sha256: str

    @classmethod
    def of(cls, defined: Callable[..., Any]) -> Origin:
        """Where a function or class is written."""
        file, module = Path(inspect.getfile(inspect.unwrap(defined))), defined.__module__
        place = module if module.startswith("sparsekit.") else str(file)
        return cls(place, hashlib.sha256(file.read_bytes()).hexdigest())

    @property
    def built_in(self) -> bool:
        """Whether it came with sparsekit."""
        return self.place.startswith("sparsekit.")

    def as_dict(self) -> dict[str, str]:
        """For plans and reports."""
        return {"origin": self.place, "sha256": self.sha256}


class Named(Protocol):
    """What can lie on a shelf."""

    @property
    def name(self) -> str:
        """What a recipe writes."""

    @property
    def origin(self) -> Origin:
        """Where it was defined."""

    @property
    def doc(self) -> str | None:
        """About it; the first line is its summary."""


T = TypeVar("T", bound=Named)


class Shelf(Mapping[str, T]):
    """Things of one kind by name, those of sparsekit first; what is installed is loaded when somebody looks."""

    def __init__(self, noun: str) -> None:
        """An empty shelf for things that are called `noun`."""
        self.noun = noun
        self._things: dict[str, T] = {}

    def register(self, thing: T) -> None:
        """Add a thing; the same file may bring it again.

        Raises:
            PluginError: Another file has registered the name.
        """
        known = self._things.get(thing.name)
        if known and known.origin.place != thing.origin.place:
            taken = f"is already registered by {known.origin.place}"
            raise PluginError(f"{self.noun} {thing.name!r} of {thing.origin.place} {taken}")
        self._things[thing.name] = thing
        METHODS.arrivals += 1

    def __getitem__(self, name: str) -> T:
        if name not in self._things:
            METHODS.load_entry_points()
        return self._things[name]

    def __iter__(self) -> Iterator[str]:
        METHODS.load_entry_points()
        return iter(list(self._things))

    def __len__(self) -> int:
        METHODS.load_entry_points()
        return len(self._things)


def foreign_code(users: Mapping[str, Named]) -> list[str]:
    """A note for each thing that is a plugin's, by what uses it: its file and the digest of it."""
    return [
        f"{user} runs plugin {thing.name}: {thing.origin.place}, sha256 {thing.origin.sha256}"
        for user, thing in users.items()
        if not thing.origin.built_in
    ]
