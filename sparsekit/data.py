"""Tokens: a recipe's texts as windows of token ids, cached in the run directory.

A text is read in one of two ways, told apart by `separator`.

- None: the whole file is one stream, as in the reference figures. A line that is exactly
  `<|endoftext|>` becomes blank, so a sampled file does not show the model a token it would take for
  an end. Nothing else is added, no BOS.
- A separator: the text is cut into documents at lines that equal it, and every document is followed
  by the tokenizer's end-of-text id. This is how models are trained.

Windows do not overlap and the last partial one is dropped. `samples` windows are drawn at random
without replacement under the entry's seed and kept in text order. They are drawn from the first
`POOL * samples` windows at most, so a large corpus is not tokenised for a few of them: 128 windows of
1024 come from the first 8.4 M tokens, which is all of a calibration text as they are usually made.

Large files are tokenised in pieces, and the ids equal those of the whole file in one go: a piece
ends at a document, or at a line end where the tokenizer is asked whether it splits there. One that
does not (SentencePiece without a pre-tokenizer) gets the whole file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoTokenizer

from sparsekit.errors import CheckpointError, DataError, in_one_line
from sparsekit.files import read_tensors, write_tensors
from sparsekit.text import Resolve, read_text, source_digest

if TYPE_CHECKING:
    from sparsekit.recipe import TextEntry

PROTOCOL = 1  # of the rules above; a change of them must change the digests
END_OF_TEXT = "<|endoftext|>"
POOL = 64  # windows that may be read for each one drawn
PIECE = 1 << 18  # characters of a piece at least; 16 of them keep 16 cores busy
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
# One line end between two characters that are no white space: byte-level and word pre-tokenizers split there.
SEAM = re.compile(r"\S\n(?=\S)")
WORD = re.compile(r"\w(?= \w)")  # the same within a line of many pieces, as minified code and some dumps are
LONG = 16 * PIECE  # characters of a line that is not waited for to its end
CONTEXT = 256  # characters each side of a seam that the tokenizer is asked about

Encode = Callable[[list[str]], list[list[int]]]
Ids = npt.NDArray[np.int32]


def entry_digest(entry: TextEntry, resolve: Resolve) -> str:
    """What a text entry means: content of its files and how windows are cut from it, not their paths.

    Raises:
        DataError: A file is missing.
    """
    meaning = {
        "protocol": PROTOCOL,
        "sources": [source_digest(path, resolve) for path in entry.paths],
        "seq_len": entry.seq_len,
        "separator": entry.separator,
        "samples": entry.samples,
        "seed": None if entry.samples is None else entry.seed,
    }
    return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()


def load_tokenizer(path: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a model directory.

    Raises:
        DataError: The directory holds none, or one transformers cannot read.
    """
    code = [file.name for file in path.glob("tokenization_*.py")]
    if not code and not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise DataError(f"{path} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
        raise DataError(f"cannot load the tokenizer of {path}: {in_one_line(error)}") from error


def token_windows(
    entry: TextEntry, tokenizer: Any, *, resolve: Resolve, cache: Path, allow_network: bool, vocabulary: int
) -> Tensor:
    """Windows of a text, int32 [windows, seq_len]; see the module for how they are cut.

    Args:
        entry: The text, its window length and how many windows are wanted.
        tokenizer: A transformers tokenizer.
        resolve: Turns a path of the recipe into one of the file system.
        cache: Directory that keeps the tokens.
        allow_network: Whether a hub dataset may be fetched.
        vocabulary: Ids must be below it.
    Raises:
        DataError: The text cannot be read, is too short, or the tokenizer does not belong to the model.
    """
    named = ", ".join(entry.paths)
    limit = None if entry.samples is None else POOL * entry.samples * entry.seq_len
    sources = [source_digest(path, resolve) for path in entry.paths]
    encode, identity = encoder(tokenizer)
    key = json.dumps([PROTOCOL, sources, identity, tokenizer.eos_token_id, entry.separator, limit])
    path = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    tokens = _cached(path)
    if tokens is None:
        end = _end_of_text(tokenizer) if entry.separator is not None else None
        texts = (
            read_text(each, resolve, separator=entry.separator, allow_network=allow_network) for each in entry.paths
        )
        tokens = tokenise(texts, encode, separator=entry.separator, end=end, limit=limit)
        if not len(tokens):
            raise DataError(f"text {named} is empty")
        kept = tokens.astype(np.uint16) if tokens.max() < 1 << 16 else tokens
        own = {"text": named, "sha256": hashlib.sha256(kept.tobytes()).hexdigest()}
        write_tensors(path, {"tokens": torch.from_numpy(kept)}, own)
    if int(tokens.max()) >= vocabulary:
        raise DataError(
            f"the tokenizer does not belong to the model: it gives id {int(tokens.max())} on text {named}, "
            f"the model has {vocabulary} ids"
        )
    return cut(tokens, entry, named)


def cut(tokens: Ids, entry: TextEntry, named: str) -> Tensor:
    """Cut tokens [n] into windows int32 [windows, seq_len] and draw the samples.

    Raises:
        DataError: There are too few tokens.
    """
    count = len(tokens) // entry.seq_len
    wanted = 1 if entry.samples is None else entry.samples
    if count < wanted:
        raise DataError(
            f"text {named} holds {count} windows of {entry.seq_len} tokens ({len(tokens):,} tokens), "
            f"{wanted} asked for; give a longer text, or a smaller seq_len or samples"
        )
    windows = torch.from_numpy(tokens[: count * entry.seq_len]).view(count, entry.seq_len)
    if entry.samples is None:
        return windows
    generator = torch.Generator().manual_seed(entry.seed)
    return windows[torch.randperm(count, generator=generator)[:wanted].sort().values]


def encoder(tokenizer: Any) -> tuple[Encode, str]:
    """A function from texts to ids without special tokens added, and a digest of the tokenizer.

    The fast backend is copied: the tokenizer's own may carry a truncation or padding that an earlier
    caller set, and both would change the ids.
    """
    if not tokenizer.is_fast:
        about = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])

        def slow(texts: list[str]) -> list[list[int]]:
            return [tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in texts]

        return slow, hashlib.sha256(about.encode()).hexdigest()
    serialised = tokenizer.backend_tokenizer.to_str()
    backend = type(tokenizer.backend_tokenizer).from_str(serialised)
    backend.no_truncation()
    backend.no_padding()

    def fast(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    return fast, hashlib.sha256(serialised.encode()).hexdigest()


def tokenise(
    texts: Iterable[Iterator[str]], encode: Encode, *, separator: str | None, end: int | None, limit: int | None
) -> Ids:
    """Ids of some texts one after another, int32 [n]; at most `limit` when that is given.

    Args:
        texts: Each a stream of blocks.
        encode: See `encoder`.
        separator: Line that ends a document, or None for one stream (module docstring).
        end: Id that follows every document; None with `separator` None.
        limit: Tokens wanted; reading stops there.
    """
    found: list[Ids] = []
    total = 0
    for text in texts:
        pieces = documents(text, separator) if separator is not None else stream(text, encode)
        for batch in _batches(pieces):
            for ids in encode(batch):
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
    for lines in _whole_lines(blocks):
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


def stream(blocks: Iterable[str], encode: Encode) -> Iterator[str]:
    """A text in pieces whose ids, one after another, are the ids of the whole.

    `<|endoftext|>` lines become blank.
    """
    line = re.compile(rf"^{re.escape(END_OF_TEXT)}(?=\r?$)", re.MULTILINE)
    rest = ""
    for lines in _whole_lines(blocks):
        rest += line.sub("", lines)
        if len(rest) >= PIECE:
            at = _seam(rest, encode, SEAM) or (len(rest) >= LONG and _seam(rest, encode, WORD))
            if at:
                yield rest[:at]
                rest = rest[at:]
    if rest:
        yield rest


def _seam(text: str, encode: Encode, places: re.Pattern[str]) -> int:
    """The last of some places where the tokenizer splits for certain, or 0."""
    last = [found.end() for found in places.finditer(text, max(0, len(text) - PIECE // 4))][-8:]
    for at in reversed(last):
        left, right = text[max(0, at - CONTEXT) : at], text[at : at + CONTEXT]
        whole, first, second = encode([left + right, left, right])
        if whole == first + second:
            return at
    return 0


def _whole_lines(blocks: Iterable[str]) -> Iterator[str]:
    """The same text in blocks that end with a line end, all but the last, and those of a line that is too long.

    What is left of such a line begins with a space, so that no separator is seen where there is none.
    """
    parts: list[str] = []
    held = 0
    for block in blocks:
        for piece in (block[at : at + PIECE] for at in range(0, len(block), PIECE)):
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


def _batches(pieces: Iterable[str]) -> Iterator[list[str]]:
    """Pieces in batches of about 16 * PIECE characters: enough for every core, little enough for memory."""
    batch: list[str] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size >= 16 * PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _end_of_text(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("separator is set, and the tokenizer has no end-of-text token (eos_token) to put in its place")
    return int(tokenizer.eos_token_id)


def _cached(path: Path) -> Ids | None:
    """Tokens kept earlier, or None; a damaged file counts as absent."""
    if not path.exists():
        return None
    try:
        tensors, about = read_tensors(path)
        kept = tensors["tokens"].numpy()
        whole = about["sha256"] == hashlib.sha256(kept.tobytes()).hexdigest()
    except (CheckpointError, KeyError):
        return None
    return kept.astype(np.int32, copy=False) if whole else None
