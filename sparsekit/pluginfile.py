"""Running plugins' files and functions: whatever goes wrong in them, their name is told."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sparsekit.errors import PluginError, SparsekitError, in_one_line


def run_file(path: Path) -> None:
    """Run a Python file as a module of its own; its decorators register what it brings.

    Args:
        path: Absolute; two files of one name do not get in each other's way.
    Raises:
        PluginError: The file is missing, is no Python file, or fails.
    """
    if not path.is_file():
        told = "is a directory, and none is ever scanned: name a file of it" if path.is_dir() else "is not there"
        raise PluginError(f"plugin {path} {told}")
    module_name = f"sparsekit_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"plugin {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except PluginError:
        raise
    except (Exception, SystemExit) as error:  # a plugin may fail in any way; its file is what to name
        raise PluginError(f"plugin {path} failed to load: {described(error, str(path))}") from error


@contextmanager
def named_failures(what: str, defined: Callable[..., Any]) -> Iterator[None]:
    """Turn whatever a plugin's code raises into an error that names it and the line that failed.

    Errors of sparsekit pass, and so does a device without memory, for which there is a second try elsewhere.
    What sparsekit's own code raises passes as well: that is a bug, and a traceback says most about it.

    Args:
        what: What failed, for people, as in "pack of bytewise".
        defined: The function or class that runs; whoever defined it is to be named.
    Raises:
        PluginError: It raised something, or wanted to end the process.
    """
    try:
        yield
    except (SparsekitError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:  # a plugin may fail in any way; its function is what to name
        if defined.__module__.startswith("sparsekit."):
            raise
        told = described(error, inspect.getfile(inspect.unwrap(defined)))
        raise PluginError(f"{what} failed: {told}; sparsekit -v shows the traceback") from error


def described(error: BaseException, file: str) -> str:
    """An error in a line: its type, what it says, and where in a plugin's file it happened."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"{type(error).__name__}: {error.msg} ({file}:{error.lineno})"
    told = in_one_line(error)
    told = f"{type(error).__name__}: {told}" if told else type(error).__name__
    return f"{told} ({_place(error, file)})"


def _place(error: BaseException, file: str) -> str:
    """Where in a file something went wrong, and where else if that line called into another one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == file]
    if not own:
        return file  # it was not even entered: its arguments are not those it is called with
    place, last = f"{own[-1].filename}:{own[-1].lineno}", frames[-1]
    return place if last is own[-1] else f"{place}, in {last.filename}:{last.lineno}"


def foreign_sources(*defined: Callable[..., Any] | None) -> list[Path]:
    """The files of functions and classes that are not sparsekit's; of those in a package, all files of that package.

    What decides a result has to be told apart when it is edited, also where a plugin is more than one file.
    """
    found: set[Path] = set()
    for each in defined:
        if each is None or each.__module__.startswith("sparsekit."):
            continue
        found.add(Path(inspect.getfile(inspect.unwrap(each))))
        package, _, inside = each.__module__.partition(".")
        place = sys.modules[package].__file__ if package in sys.modules else None
        if place is not None and (inside or Path(place).name == "__init__.py"):
            found.update(Path(place).parent.rglob("*.py"))
    return sorted(found)
