"""Processes of a test's own, forked from one that has imported everything and computed nothing.

Python, torch and transformers take seconds of a processor to start; a fork of the process that did it once takes
milliseconds. What a test registered or patched is not seen there.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import runpy
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from sparsekit.cli import main

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["sparsekit.cli", "sparsekit.run", "sparsekit.inference.generate"])


def started(work: Callable[..., Any], *arguments: Any, log: Path) -> BaseProcess:
    """A process that does some work, which can be pickled; its exit code is what the work returns or exits with.

    Its standard output goes to `log`, its standard error to `log` with `.err` behind it.
    """
    process = _CONTEXT.Process(target=_done, args=(work, arguments, log), daemon=False)
    process.start()
    return process


def ended(process: BaseProcess, log: Path) -> str:
    """Wait for a process; what it wrote."""
    process.join()
    return said(log)


def said(log: Path) -> str:
    """Standard output and standard error until now."""
    return "".join(path.read_text() for path in (log, errors_of(log)) if path.exists())


def errors_of(log: Path) -> Path:
    """Where the standard error goes."""
    return log.with_name(f"{log.name}.err")


def command(*arguments: str) -> None:
    """The command line."""
    main(list(arguments))


def command_with_small_files(most: int, *arguments: str) -> None:
    """The command line where no file may pass so many bytes: what a full disk does, seen from the process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    main(list(arguments))


def script(path: str, *arguments: str) -> None:
    """A Python file with arguments."""
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def module(name: str, *arguments: str) -> None:
    """What `python -m` does."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _done(work: Callable[..., Any], arguments: tuple[Any, ...], log: Path) -> None:
    for path, number in ((log, 1), (errors_of(log), 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
    torch.set_num_threads(1)
    gc.freeze()
    sys.exit(work(*arguments))
