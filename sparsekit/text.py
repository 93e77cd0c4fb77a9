"""Texts: from what a recipe calls a text to its characters, in blocks, and a digest of its content."""

from __future__ import annotations

import codecs
import hashlib
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path

from sparsekit.errors import DataError, nearest
from sparsekit.kept import sha256_file
from sparsekit.models.locate import ASSETS

TEXTS = ASSETS / "text"
BLOCK = 1 << 20  # bytes read at a time
Resolve = Callable[[str], str | Path]

_digests: dict[tuple[str, int, int], str] = {}  # (path, size, mtime_ns) -> sha256; files are large and asked for often


def source_digest(path: str, resolve: Resolve) -> str:
    """What one text is: the sha256 of a file, or the name of a hub dataset (its content is not here).

    Raises:
        DataError: The file is missing.
    """
    if path.startswith("hub:"):
        return hashlib.sha256(path.encode()).hexdigest()
    file = locate_text(path, resolve)
    about = file.stat()
    key = (str(file), about.st_size, about.st_mtime_ns)
    if key not in _digests:
        _digests[key] = sha256_file(file)
    return _digests[key]


def locate_text(path: str, resolve: Resolve) -> Path:
    """The file a text path means.

    Raises:
        DataError: It is missing, with the nearest name that exists, or no file.
    """
    if path.startswith("builtin:"):
        name = path.removeprefix("builtin:")
        names = sorted(entry.name.removesuffix(".txt.xz") for entry in TEXTS.glob("*.txt.xz"))
        if name not in names:
            raise DataError(f"no built-in text {name!r}; there is {', '.join(names)}.{nearest(name, names)}")
        return TEXTS / f"{name}.txt.xz"
    file = Path(resolve(path))
    if file.is_dir():
        raise DataError(f"text {file} is a directory; name its files, as in path: [{file.name}/part-00.txt, ...]")
    if file.exists() and not file.is_file():
        raise DataError(f"text {file} is a pipe or a device; name a file")
    if file.is_symlink() and not file.exists():
        raise DataError(f"text {file} is a link to {file.readlink()}, which is not there")
    if not file.is_file():
        siblings = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        where = "" if file.parent.is_dir() else f" (there is no directory {file.parent})"
        raise DataError(f"text {file} does not exist{where}.{nearest(file.name, siblings)}")
    return file


def read_text(path: str, resolve: Resolve, *, separator: str | None, allow_network: bool) -> Iterator[str]:
    """The characters of a text, in blocks.

    A `.xz` file is unpacked on the way. A byte order mark is dropped, line ends are kept as they are.
    The rows of a hub dataset are joined by lines `separator`, or by blank lines when that is None.

    Raises:
        DataError: The text is missing, damaged, not UTF-8, or on the hub without `allow_network`.
    """
    if not path.startswith("hub:"):
        yield from decode(locate_text(path, resolve))
        return
    if not allow_network:
        raise DataError(f"text {path} is a hub dataset, which needs allow_network: true in the recipe")
    between = "\n\n" if separator is None else f"\n{separator}\n"
    for row in _rows(path):
        yield row + between


def decode(file: Path) -> Iterator[str]:
    """Decode a UTF-8 file block by block.

    Raises:
        DataError: The xz stream is damaged, or a byte is no UTF-8; the message gives its offset.
    """
    decoder, start, fresh = codecs.getincrementaldecoder("utf-8")(), 0, True
    for block in _blocks(file):
        pending = len(decoder.getstate()[0])  # bytes of a character that the last block cut
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            at = start - pending + error.start
            raise DataError(
                f"text {file} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {at:,} ({error.reason})"
            ) from error
        yield text.removeprefix("\ufeff") if fresh else text
        fresh = fresh and not text
        start += len(block)


def _blocks(file: Path) -> Iterator[bytes]:
    """Blocks of a file's bytes; an empty one closes."""
    try:
        with lzma.open(file) if file.suffix == ".xz" else open(file, "rb") as stream:
            while block := stream.read(BLOCK):
                yield block
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(f"text {file} is a damaged xz file: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read text {file}: {error.strerror or error}") from error
    yield b""


def _rows(path: str) -> Iterator[str]:
    """Rows of the hub dataset `hub:NAME[/CONFIG]:SPLIT[:COLUMN]`, streamed; NAME is OWNER/NAME."""
    parts = path.removeprefix("hub:").split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise DataError(f"text {path} is not hub:NAME[/CONFIG]:SPLIT[:COLUMN], as in hub:Salesforce/wikitext:test")
    owner_name, split, column = parts[0].split("/"), parts[1], "".join(parts[2:]) or "text"
    name, config = "/".join(owner_name[:2]), "/".join(owner_name[2:]) or None
    try:
        import datasets  # noqa: PLC0415  # slow to import, and not installed on machines that only train
    except ImportError as error:
        raise DataError(f"text {path} is a hub dataset, which needs the datasets library: {error}") from error
    try:
        for row in datasets.load_dataset(name, config, split=split, streaming=True):
            if column not in row:
                raise DataError(f"text {path}: no column {column!r}; there is {', '.join(row)}.{nearest(column, row)}")
            yield row[column]
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"cannot fetch {path} from the hub: {error}") from error
