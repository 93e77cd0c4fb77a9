"""What the terminal shows of a generation: the text as it comes, and how fast it came."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from transformers import TextStreamer

from sparsekit.inference.generate import Stats
from sparsekit.reporting.numerals import duration, megabytes

Write = Callable[[str], None]


class Words(TextStreamer):  # type: ignore[misc]  # transformers is not checked
    """Tokens as text, handed on once they are whole characters and words."""

    def __init__(self, tokenizer: Any, write: Write) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on what will not change any more."""
        self._write(text + "\n" if stream_end else text)


def write_text(tokens: Iterable[int], tokenizer: Any, write: Write) -> None:
    """Write tokens as they come; what has come is written whole when somebody interrupts."""
    words = Words(tokenizer, write)
    try:
        for token in tokens:
            words.put(torch.tensor([token]))
    finally:
        words.end()


def stats_lines(stats: Stats, forms: dict[str, int]) -> Iterator[str]:
    """What `--stats` prints.

    Args:
        stats: Of the generation.
        forms: How many packed weights there are of each form.
    """
    speed = "" if stats.per_second is None else f", then {stats.per_second:,.1f} tokens/s"
    yield f"{stats.prompt} tokens of prompt, {stats.tokens} generated, ended by {stats.ended or 'an interruption'}"
    yield f"first token after {1000 * stats.first:,.1f} ms{speed}"
    if stats.tokens > 1:
        how = f"no CUDA graph: {stats.eager}" if stats.eager else f"CUDA graph, recorded in {duration(stats.recording)}"
        yield f"decoding: {how}" + (f"; not compiled: {stats.unfused}" if stats.unfused else "")
    held = ", ".join(f"{count} packed weights of {form}" for form, count in forms.items()) or "no packed weights"
    peak = "" if stats.peak is None else f"; at most {megabytes(stats.peak)} allocated on the device"
    yield f"memory: {megabytes(stats.model_bytes)} for the model ({held}){peak}"
