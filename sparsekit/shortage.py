"""When the device runs out of memory: the same work in smaller parts, once, and said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from sparsekit.errors import ShortageError

T = TypeVar("T")
ADVICE = "Choose a smaller seq_len or micro_batch, or another device; what was finished is kept"


def twice(work: Callable[[], T], smaller: Callable[[], None]) -> T:
    """Do some work; when the device has no memory for it, make it smaller and do it once more.

    Args:
        work: May be repeated from its start.
        smaller: Makes the next call of `work` take less memory.
    Raises:
        ShortageError: `smaller` cannot, or the second time fails too.
    """
    try:
        return work()
    except torch.OutOfMemoryError:
        pass  # outside of it, so that the traceback does not hold the tensors of the first try
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    smaller()
    with named():
        return work()


def half(size: int, what: str) -> int:
    """Half of a micro-batch.

    Raises:
        ShortageError: It is one window already.
    """
    if size <= 1:
        raise ShortageError(f"the device has too little memory for {what} of one window; choose a smaller seq_len")
    return size // 2


@contextmanager
def named(advice: str = ADVICE) -> Iterator[None]:
    """Turn torch's error into one the user is told without a traceback; `advice` says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).partition("\n")[0]
        raise ShortageError(f"the device has too little memory: {first}. {advice}") from error
