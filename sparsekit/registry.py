"""The registry: one door for built-in methods, plugin files and entry points.

A method is a plain function. Its positional-only arguments are what the driver hands it; its
keyword-only parameters, with their annotations and defaults, are its recipe schema.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import os
import typing
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sparsekit.errors import PluginError, nearest
from sparsekit.method import Branches, Check, Integers, Kind, Method, Rowwise, Scope
from sparsekit.pluginfile import run_file
from sparsekit.signature import lower_case, parameters, positional
from sparsekit.stats import Statistic

F = TypeVar("F", bound=Callable[..., Any])

ENTRY_POINT_GROUP = "sparsekit.plugins"
NO_PLUGINS = "SPARSEKIT_NO_PLUGINS"  # set to 1 to start without entry points
HANDED = {"linear": ("layer",), "group": ("group",), "model": ("job",), "layers": ("layers", "sparsity")}  # by scope
BUILT_IN = ("magnitude", "wanda", "sparsegpt", "rtn", "gptq", "awq", "lowrank", "ast")


class Registry:
    """Methods by name; loads what a name needs when it is first asked for.

    Attributes:
        arrivals: Things registered so far, those on a `sparsekit.shelf` too.
    """

    def __init__(self) -> None:
        self.arrivals = 0
        self._methods: dict[str, Method] = {}
        self._loaded: set[str] = set()

    def register(self, method: Method) -> None:
        """Add a method.

        Raises:
            PluginError: Another file has registered the name.
        """
        known = self._methods.get(method.name)
        if known and known.origin != method.origin:
            raise PluginError(f"method {method.name!r} of {method.origin} is already registered by {known.origin}")
        if not known and method.name in BUILT_IN and not method.origin.startswith("sparsekit.methods."):
            raise PluginError(f"method {method.name!r} of {method.origin} has the name of a built-in method")
        self._methods[method.name] = method
        self.arrivals += 1

    def get(self, name: str) -> Method:
        """Look a method up.

        Raises:
            PluginError: No such method; the message lists what exists and the nearest name.
        """
        if name in BUILT_IN:
            self._load_module(f"sparsekit.methods.{name}")
        else:
            self.load_entry_points()
        if name not in self._methods:
            names = sorted({*BUILT_IN, *self._methods})
            off = f" {NO_PLUGINS}=1 keeps installed plugins away." if os.environ.get(NO_PLUGINS) == "1" else ""
            raise PluginError(f"no method {name!r}; there are {', '.join(names)}.{off}{nearest(name, names)}")
        return self._methods[name]

    def names(self) -> list[str]:
        """Every method that can be had now, built-ins first."""
        self.load_entry_points()
        return [*BUILT_IN, *sorted(set(self._methods) - set(BUILT_IN))]

    def __iter__(self) -> Iterator[Method]:
        return (self.get(name) for name in self.names())

    def load_path(self, path: Path) -> None:
        """Run a plugin file; its decorators register themselves.

        Raises:
            PluginError: The file is missing, fails, or registers nothing.
        """
        path = Path(os.path.realpath(path))
        if str(path) in self._loaded:
            return
        before = self.arrivals
        run_file(path)
        if self.arrivals == before:
            raise PluginError(f"plugin {path} registers nothing; decorate a function with @sparsekit.linear_method")
        self._loaded.add(str(path))

    def load_entry_points(self) -> None:
        """Import what installed distributions offer in the group `sparsekit.plugins`."""
        if os.environ.get(NO_PLUGINS) == "1":
            return
        for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
            if point.value not in self._loaded:
                self._loaded.add(point.value)
                try:
                    point.load()
                except PluginError:
                    raise
                except (Exception, SystemExit) as error:
                    hint = f"{NO_PLUGINS}=1 starts without plugins"
                    raise PluginError(f"plugin {point.name!r} ({point.value}) failed: {error}; {hint}") from error

    def _load_module(self, module: str) -> None:
        if module not in self._loaded:
            importlib.import_module(module)
            self._loaded.add(module)


METHODS = Registry()


def linear_method(
    name: str,
    *,
    kind: Kind,
    stats: type[Statistic] | None = None,
    dense: bool = False,
    check: Check | None = None,
    integers: Integers | None = None,
    rowwise: Rowwise | None = None,
    branches: Branches | None = None,
) -> Callable[[F], F]:
    """Register `f(layer: LinearState, [stats], /, *, params) -> LinearState`, called for every linear.

    Args:
        name: What a recipe writes after `method:`.
        kind: See `Method`.
        stats: The statistic of the layer's inputs to collect, None for no calibration.
        dense: Hand the values before any pruning over in `layer.dense`.
        check: See `Method`.
        integers: See `Method`; of a pruner that rounds as well.
        rowwise: See `Method`.
        branches: See `Method`.
    """
    return _decorator(name, kind, "linear", stats, dense, check, integers, rowwise, branches)


def group_method(name: str, *, kind: Kind, stats: type[Statistic] | None = None) -> Callable[[F], F]:
    """Register `f(group: Group, [stats], /, *, params) -> Group`, called for every group, last group first."""
    return _decorator(name, kind, "group", stats)


def model_method(
    name: str,
    *,
    kind: Kind,
    check: Check | None = None,
    integers: Integers | None = None,
    branches: Branches | None = None,
) -> Callable[[F], F]:
    """Register `f(job: TrainJob, /, *, params) -> Trained`, called once with the whole model.

    Args:
        name: What a recipe writes after `method:`.
        kind: See `Method`.
        check: Given all parameters, what is wrong between them: (parameter, message), or None.
        integers: Given all parameters, the bits of the codes of the result, or None for floats; with bits the
            step counts as the recipe's quantizer.
        branches: See `Method`.
    """
    return _decorator(name, kind, "model", None, check=check, integers=integers, branches=branches)


def allocation_method(name: str, *, stats: type[Statistic] | None = None) -> Callable[[F], F]:
    """Register `f(layers: Iterable[Measured], sparsity: float, /, *, params) -> {layer: sparsity}`.

    It is called once for a step that writes `allocate: NAME`. The layers come in model order, one
    block in memory at a time, so the function keeps numbers and not tensors.
    """
    return _decorator(name, "allocate", "layers", stats)


def _decorator(
    name: str,
    kind: Kind,
    scope: Scope,
    stats: type[Statistic] | None,
    dense: bool = False,
    check: Check | None = None,
    integers: Integers | None = None,
    rowwise: Rowwise | None = None,
    branches: Branches | None = None,
) -> Callable[[F], F]:
    def register(function: F) -> F:
        made = _method(name, kind, scope, stats, function)
        given = replace(made, dense=dense, check=check, integers=integers, rowwise=rowwise, branches=branches)
        METHODS.register(given)
        return function

    return register


def _method(name: str, kind: Kind, scope: Scope, stats: type[Statistic] | None, function: Callable[..., Any]) -> Method:
    lower_case("method", name)
    if kind not in (kinds := typing.get_args(Kind)):
        raise PluginError(
            f"method {name!r} is of kind {kind!r}; there are {', '.join(kinds)}.{nearest(str(kind), kinds)}"
        )
    if stats is not None and (lacking := [need for need in ("empty", "update", "merge") if not hasattr(stats, need)]):
        raise PluginError(f"method {name!r}: its statistic has no {', '.join(lacking)}; see docs/write-a-plugin.md")
    file = Path(inspect.getfile(inspect.unwrap(function)))  # not that of a decorator around it
    signature, given = inspect.signature(function), HANDED[scope]
    positional("method", name, signature, (*given, "statistic") if stats is not None and len(given) == 1 else given)
    return Method(
        name=name,
        kind=kind,
        scope=scope,
        stats=stats,
        function=function,
        parameters=parameters("method", name, function, signature),
        origin=function.__module__ if function.__module__.startswith("sparsekit.") else str(file),
        digest=hashlib.sha256(file.read_bytes()).hexdigest(),
    )
