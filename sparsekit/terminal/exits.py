"""How a command ends: named errors as one message, signals as an exit code."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import click

from sparsekit.errors import SparsekitError


class _Terminated(BaseException):
    """SIGTERM, as a batch system sends it before the end of a job."""


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that locks are given back and half-written files removed."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what signals do
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def named_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Show a named error as one message and its exit code; a traceback only with -v."""
    return _ending(command, "\nstopped; what was finished is kept, run the same command to continue")


def named_errors_nothing_kept(command: Callable[..., Any]) -> Callable[..., Any]:
    """`named_errors` for a command that leaves nothing behind which could be continued."""
    return _ending(command, "stopped")


def _verbose() -> bool:
    return bool(click.get_current_context().find_root().params.get("verbose"))


def _tell(message: str) -> None:
    click.secho("error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(message, err=True)


def _ending(command: Callable[..., Any], stopped: str) -> Callable[..., Any]:
    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            with _terminable():
                return command(*args, **kwargs)
        except SparsekitError as error:
            if _verbose():
                raise
            _tell(str(error))
            sys.exit(error.exit_code)
        except (
            OSError
        ) as error:  # a file that may not be read, a name that is too long: nothing to look up in a traceback
            if error.filename is None or _verbose():
                raise
            _tell(f"cannot use {error.filename!s:.200}: {error.strerror}; sparsekit -v shows where")
            sys.exit(SparsekitError.exit_code)
        except (KeyboardInterrupt, _Terminated) as error:
            click.echo(stopped, err=True)
            sys.exit(130 if isinstance(error, KeyboardInterrupt) else 143)

    return wrapped
