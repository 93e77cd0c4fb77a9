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
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from sparsekit.errors import CheckpointError, DataError, in_one_line
from sparsekit.files import read_tensors, write_tensors
from sparsekit.pieces import Encode, Ids, tokenise
from sparsekit.text import Resolve, read_text, source_digest

if TYPE_CHECKING:
    from sparsekit.recipe import TextEntry

PROTOCOL = 1  # of the rules above; a change of them must change the digests
POOL = 64  # windows that may be read for each one drawn
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


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
        ahead = tokenizer.is_fast and limit is None  # with a limit nothing is read that might not be needed
        tokens = tokenise(texts, encode, separator=entry.separator, end=end, limit=limit, ahead=ahead)
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
