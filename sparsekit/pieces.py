"""A text as token ids, cut into pieces on the way.

Large files are tokenised in pieces, and the ids equal those of the whole file in one go: a piece
ends at a document, or at a line end where the tokenizer is asked whether it splits there. One that
does not (SentencePiece without a pre-tokenizer) gets the whole file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

END_OF_TEXT = "<|endoftext|>"
PIECE = 1 << 18  # characters of a piece at least where many tokens are wanted; 16 of them keep 16 cores busy
# One line end between two characters that are no white space: byte-level and word pre-tokenizers split there.
SEAM = re.compile(r"\S\n(?=\S)")
WORD = re.compile(r"\w(?= \w)")  # the same within a line of many pieces, as minified code and some dumps are
LONG = 16 * PIECE  # characters of a line that is not waited for to its end
LEAST = 1 << 14  # characters of a piece at least where few tokens are wanted
CONTEXT = 256  # characters each side of a seam that the tokenizer is asked about

Encode = Callable[[list[str]], list[list[int]]]
Ids = npt.NDArray[np.int32]


def tokenise(
    texts: Iterable[Iterator[str]],
    encode: Encode,
    *,
    separator: str | None,
    end: int | None,
    limit: int | None,
    ahead: bool = False,
) -> Ids:
    """Ids of some texts one after another, int32 [n]; at most `limit` when that is given.

    Args:
        texts: Each a stream of blocks.
        encode: See `encoder`.
        separator: Line that ends a document, or None for one stream (module docstring).
        end: Id that follows every document; None with `separator` None.
        limit: Tokens wanted; reading stops there.
        ahead: Read and unpack in this thread what comes next while another one encodes.
    """
    found: list[Ids] = []
    total = 0
    # Characters encoded at once: enough for every core, little enough for memory; a token has about four.
    most = 16 * PIECE if limit is None else min(16 * PIECE, max(LEAST, 4 * limit))
    for text in texts:
        pieces = documents(text, separator) if separator is not None else stream(text, encode, min(PIECE, most))
        batches = _batches(pieces, most)
        for encoded in _ahead(batches, encode) if ahead else map(encode, batches):
            for ids in encoded:
                found.append(np.array(ids if end is None else [*ids, end], dtype=np.int32))
                total += len(found[-1])
            if limit is not None and total >= limit:
                return np.concatenate(found)[:limit]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int32)


def documents(blocks: Iterable[str], separator: str) -> Iterator[str]:
    """Documents of a text: what lies between lines equal to `separator`, without the line end before it.

    A document of nothing but white space is none.
    """
    line = re.compile(rf"^{re.escape(separator)}\r?$", re.MULTILINE)
    parts: list[str] = []  # of the document that is not closed yet
    for lines in _whole_lines(blocks, PIECE):
        head, *others = line.split(lines)
        parts.append(head)
        for other in others:
            yield from _document(parts)
            parts = [other]
    yield from _document(parts)


def _document(parts: list[str]) -> Iterator[str]:
    text = "".join(parts)
    if text.strip():
        yield text.strip("\r\n")


def stream(blocks: Iterable[str], encode: Encode, least: int) -> Iterator[str]:
    """A text in pieces of so many characters at least whose ids, one after another, are the ids of the whole.

    `<|endoftext|>` lines become blank.
    """
    line = re.compile(rf"^{re.escape(END_OF_TEXT)}(?=\r?$)", re.MULTILINE)
    rest = ""
    for lines in _whole_lines(blocks, least):
        rest += line.sub("", lines)
        if len(rest) >= least:
            at = _seam(rest, encode, SEAM, least) or (len(rest) >= LONG and _seam(rest, encode, WORD, least))
            if at:
                yield rest[:at]
                rest = rest[at:]
    if rest:
        yield rest


def _seam(text: str, encode: Encode, places: re.Pattern[str], least: int) -> int:
    """The last of some places where the tokenizer splits for certain, or 0."""
    last = [found.end() for found in places.finditer(text, max(0, len(text) - least // 4))][-8:]
    for at in reversed(last):
        left, right = text[max(0, at - CONTEXT) : at], text[at : at + CONTEXT]
        whole, first, second = encode([left + right, left, right])
        if whole == first + second:
            return at
    return 0


def _whole_lines(blocks: Iterable[str], size: int) -> Iterator[str]:
    """The same text in blocks of about so many characters.

    They end with a line end, all but the last one and those of a line that is too long.
    What is left of such a line begins with a space, so that no separator is seen where there is none.
    """
    parts: list[str] = []
    held = 0
    for block in blocks:
        for piece in (block[at : at + size] for at in range(0, len(block), size)):
            head, end, tail = piece.rpartition("\n")
            if not end and held >= LONG:
                head, end, tail = piece.rpartition(" ")
                end, tail = "", end + tail
            if end or (held >= LONG and head):
                yield "".join([*parts, head, end])
                parts, held = [], 0
            parts.append(tail)
            held += len(tail)
    if last := "".join(parts):
        yield last


def _batches(pieces: Iterable[str], most: int) -> Iterator[list[str]]:
    """Pieces in batches of about so many characters."""
    batch: list[str] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size >= most:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _ahead(batches: Iterable[list[str]], encode: Encode) -> Iterator[list[list[int]]]:
    """Ids of each batch; while one is encoded, the next is made and the last one used."""
    with ThreadPoolExecutor(1) as thread:
        waiting: Future[list[list[int]]] | None = None
        for batch in batches:
            begun = thread.submit(encode, batch)
            if waiting is not None:
                yield waiting.result()
            waiting = begun
        if waiting is not None:
            yield waiting.result()
