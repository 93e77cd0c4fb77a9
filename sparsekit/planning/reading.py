"""How long a recipe's texts are, and what it takes to cut them into tokens: the beginning of each is timed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from sparsekit.data import POOL, encoder
from sparsekit.errors import DataError
from sparsekit.recipe import TextEntry
from sparsekit.text import Resolve, locate_text, read_text

BYTES_A_TOKEN = 4  # of English text, roughly; only where a recipe does not say how many windows
UNPACKED = 3.5  # times an .xz text is larger unpacked
SAMPLE = 2**18  # characters that are encoded to time it
PIECES = 16  # they are handed over in, for as many cores


def tokens_of(entry: TextEntry, resolve: Resolve) -> int | None:
    """Tokens of a text's files, guessed from their size; None for texts on the hub."""
    if any(path.startswith("hub:") for path in entry.paths):
        return None
    files = [locate_text(path, resolve) for path in entry.paths]
    size = sum(file.stat().st_size * (UNPACKED if file.suffix == ".xz" else 1) for file in files)
    return int(size / BYTES_A_TOKEN)


def check_length(entry: TextEntry, resolve: Resolve) -> None:
    """Find a text's files, but for those on the hub.

    Raises:
        DataError: A file is missing, or they have fewer bytes than tokens are asked for.
    """
    files = [locate_text(path, resolve) for path in entry.paths if not path.startswith("hub:")]
    if len(files) < len(entry.paths) or any(file.suffix == ".xz" for file in files):
        return  # only reading would tell
    size, windows = sum(file.stat().st_size for file in files), entry.samples or 1
    if windows * entry.seq_len > size:
        raise DataError(
            f"text {', '.join(entry.paths)} has {size:,} bytes, too few for {windows} windows of {entry.seq_len} "
            "tokens; give a longer text, or a smaller seq_len or samples"
        )


def tokens_bytes(entries: Iterable[TextEntry], resolve: Resolve, vocabulary: int) -> int:
    """Files of tokens that a run keeps, as far as `tokens_of` can guess: one for each text and limit of its tokens."""
    kept: dict[tuple[tuple[str, ...], str | None, int | None], int] = {}
    for entry in entries:
        tokens = tokens_of(entry, resolve) or 0
        limit = None if entry.samples is None else POOL * entry.samples * entry.seq_len
        kept[tuple(entry.paths), entry.separator, limit] = tokens if limit is None else min(tokens, limit)
    return sum(kept.values()) * (2 if vocabulary <= 2**16 else 4)


def reading_seconds(entries: Iterable[TextEntry], tokenizer: Any, resolve: Resolve) -> float:
    """Seconds to read and encode texts whose tokens no run has kept; those on the hub count as nothing.

    Raises:
        DataError: The beginning of a text cannot be read.
    """
    encode, _ = encoder(tokenizer)
    encode(["first calls take longer"])
    longest: dict[tuple[tuple[str, ...], str | None], tuple[int, TextEntry]] = {}
    for entry in entries:
        wanted = tokens_of(entry, resolve) or 0
        if entry.samples is not None:
            wanted = min(wanted, POOL * entry.samples * entry.seq_len)
        key = (tuple(entry.paths), entry.separator)
        longest[key] = max(longest.get(key, (0, entry)), (wanted, entry), key=lambda pair: pair[0])
    seconds = 0.0
    for wanted, entry in longest.values():
        if wanted:
            began = time.perf_counter()
            text = next(read_text(entry.paths[0], resolve, separator=entry.separator, allow_network=False), "")
            read, head = time.perf_counter(), text[:SAMPLE]
            encode([head[at : at + SAMPLE // PIECES] for at in range(0, len(head), SAMPLE // PIECES)])
            encoded = (time.perf_counter() - read) / max(1, len(head))
            seconds += wanted * BYTES_A_TOKEN * max(encoded, (read - began) / max(1, len(text)))  # both go at once
    return seconds
