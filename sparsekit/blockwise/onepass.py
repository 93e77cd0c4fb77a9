"""One forward over all calibration windows in which every group of linears waits until it is compressed.

Each micro-batch runs in a thread of its own, one thread at a time. At the input of a group it adds its
tokens to the statistic and waits; when every micro-batch has come as far, the group is compressed in
place, and they go on with the new weights. So each group sees its predecessors compressed, as with one
forward for each group, but the block is computed once and its outputs are what enters the next block.

What is waiting are the tensors a block holds at that moment, for all windows; `Activations` decides
whether they fit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""What a forward here may use. Not cuDNN's: it plans its kernel anew in every thread, 60 ms each on an H100."""


class CalledAgain(BaseException):
    """A linear was called a second time after its group was compressed. No failure, so nobody else may catch it."""


class _Stopped(BaseException):
    """Unwinds a micro-batch that is not going on."""


class _Forward:
    """One micro-batch on its way through the block.

    Attributes:
        waits_at: Index of the group it waits for, None before the first and after the last.
        output: What it has come to.
    """

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self.waits_at: int | None = None
        self.output: Tensor | None = None
        self._run = run
        self._error: BaseException | None = None
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._stopped = False
        self._inference, self._gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self._thread = threading.Thread(target=self._body, daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Let it run until it waits or is done; its error is raised here."""
        self.waits_at = None
        self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def wait(self, group: int) -> None:
        """Called by the micro-batch itself."""
        self.waits_at = group
        self._paused.release()
        self._go.acquire()
        if self._stopped:
            raise _Stopped

    def stop(self) -> None:
        """End it wherever it is."""
        self._stopped = True
        self._go.release()
        self._thread.join()

    def _body(self) -> None:
        self._go.acquire()
        if self._stopped:
            return
        try:
            # both are settings of a thread
            with torch.inference_mode(self._inference), torch.set_grad_enabled(self._gradients):
                self.output = self._run()
        except _Stopped:
            return
        except BaseException as error:
            self._error = error
        self._paused.release()


class _Relay:
    """Which micro-batch runs, and which groups are settled."""

    def __init__(self, forwards: Sequence[_Forward], feed: Callable[[int, Tensor], None]) -> None:
        self._forwards, self._feed = forwards, feed
        self._settled: set[int] = set()
        self._running = forwards[0]

    def door(self, group: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """The hook at the input of a group."""

        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if group in self._settled:
                raise CalledAgain
            self._feed(group, arguments[0])
            self._running.wait(group)

        return hook

    def run(self, settle: Callable[[int], None], groups: int) -> None:
        """Take all micro-batches through."""
        self._resume(self._forwards)
        while waiting := [forward for forward in self._forwards if forward.waits_at is not None]:
            group = min(forward.waits_at for forward in waiting if forward.waits_at is not None)
            self._settle(group, settle)
            self._resume([forward for forward in waiting if forward.waits_at == group])
        for group in sorted(set(range(groups)) - self._settled):
            self._settle(group, settle)

    def _settle(self, group: int, settle: Callable[[int], None]) -> None:
        settle(group)
        self._settled.add(group)

    def _resume(self, forwards: Sequence[_Forward]) -> None:
        for forward in forwards:
            self._running = forward
            forward.resume()


def one_pass(
    runs: Sequence[Callable[[], Tensor]],
    doors: Sequence[nn.Module],
    feed: Callable[[int, Tensor], None],
    settle: Callable[[int], None],
) -> list[Tensor]:
    """Run all micro-batches through a block and compress its groups on the way.

    Args:
        runs: The forward of each micro-batch.
        doors: The first linear of each group, in call order.
        feed: Takes a group's index and what a micro-batch brought to its door, [..., in].
        settle: Compresses a group in place. Called once for each, in order as far as the forward
            decides it; a group that no micro-batch reached comes last.
    Returns:
        The outputs, in the order of `runs`.
    Raises:
        CalledAgain: A door was reached after its group was settled; weights have been changed.
    """
    forwards = [_Forward(run) for run in runs]
    relay = _Relay(forwards, feed)
    handles = [module.register_forward_pre_hook(relay.door(group)) for group, module in enumerate(doors)]
    try:
        with sdpa_kernel(ATTENTION):
            relay.run(settle, len(doors))
    finally:
        for handle in handles:
            handle.remove()
        for forward in forwards:
            forward.stop()
    return [forward.output for forward in forwards if forward.output is not None]
