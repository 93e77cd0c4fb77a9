"""Texts to tokens: pieces equal the whole, digests follow the content, every mistake is named."""

from __future__ import annotations

import lzma
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sparsekit import data, pieces, text
from sparsekit.data import encoder, entry_digest, load_tokenizer, token_windows
from sparsekit.errors import DataError
from sparsekit.recipe import TextEntry

ASSETS = Path(__file__).parents[1] / "sparsekit" / "assets"
END = "<|endoftext|>"


def entry_of(path: str | list[str], *, seq_len: int = 16, **fields: Any) -> TextEntry:
    return TextEntry(path=path, seq_len=seq_len, **fields)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ASSETS / "tiny", trust_remote_code=False)


@pytest.fixture
def windows(tmp_path, tokenizer):
    """`token_windows` of an entry, with defaults for the rest."""

    def made(entry, **changed):
        given = {"resolve": str, "cache": tmp_path / "cache", "allow_network": False, "vocabulary": 8192}
        return token_windows(entry, changed.pop("tokenizer", tokenizer), **{**given, **changed})

    return made


def prose(characters: int, seed: int = 0) -> str:
    """Text with everything that makes seams hard: runs of line ends, indents, digits, CJK, emoji, separators."""
    draw = random.Random(seed)
    words = ["the", "Token", "é", "中文", "🔎", "3.14", "don't", "\t", "--", "...", "naïve", "a\u0301", "123456", END]
    ends = [" ", " ", " ", " ", "  ", "\n", "\n", "\n\n", "\n\n\n", " \n", "\n  ", "\r\n", f"\n{END}\n"]
    parts, size = [], 0
    while size < characters:
        parts += [draw.choice(words), draw.choice(ends)]
        size += len(parts[-2]) + len(parts[-1])
    return "".join(parts)


def blanked(text: str) -> str:
    return "".join(line.replace(END, "") if line.rstrip("\r\n") == END else line for line in text.splitlines(True))


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """BPE over the whole text with a leading metaspace, as Llama 2: no seam is safe."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False)
    backend.train_from_iterator([prose(3000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def llama3_like() -> PreTrainedTokenizerFast:
    """Byte-level BPE behind the regex of Llama 3, whose punctuation swallows line ends."""
    from tokenizers import Regex

    backend = Tokenizer(models.BPE())
    split = r"\p{L}+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([prose(20000, seed=9)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("make", [None, sentencepiece_like, llama3_like], ids=["tiny", "sentencepiece", "llama3"])
@pytest.mark.parametrize("piece", [64, 500, 1 << 18])
@pytest.mark.parametrize("block", [1, 97, 1 << 20])
def test_pieces_give_the_ids_of_the_whole_text(monkeypatch, tmp_path, windows, tokenizer, make, piece, block):
    monkeypatch.setattr(pieces, "PIECE", piece)
    monkeypatch.setattr(text, "BLOCK", block)
    used = make() if make else tokenizer
    written = prose(3000 if block == 1 else 20_000)
    (tmp_path / "a.txt").write_bytes(written.encode())
    whole = used(blanked(written), add_special_tokens=False, verbose=False)["input_ids"]
    found = windows(entry_of(str(tmp_path / "a.txt"), seq_len=8), tokenizer=used)
    assert found.dtype == torch.int32 and found.shape == (len(whole) // 8, 8)
    assert found.flatten().tolist() == whole[: found.numel()]


def test_long_texts_really_are_cut(tokenizer):
    found = list(pieces.stream([prose(20_000)], encoder(tokenizer)[0], 500))
    assert len(found) > 10
    assert "".join(found) == blanked(prose(20_000))
    assert len(list(pieces.stream([prose(20_000)], encoder(sentencepiece_like())[0], 500))) == 1


@pytest.mark.parametrize("make", [None, sentencepiece_like, llama3_like], ids=["tiny", "sentencepiece", "llama3"])
@pytest.mark.parametrize(("piece", "long"), [(64, 300), (500, 500), (100, 2000)])
def test_lines_without_an_end_are_cut_as_well(monkeypatch, tmp_path, windows, tokenizer, make, piece, long):
    monkeypatch.setattr(pieces, "PIECE", piece)
    monkeypatch.setattr(pieces, "LONG", long)
    monkeypatch.setattr(text, "BLOCK", 970)
    used = make() if make else tokenizer
    written = prose(8000).replace("\n", " ") + "\n" + END + "\n" + prose(8000, seed=1).replace("\n", " ")
    (tmp_path / "a.txt").write_bytes(written.encode())
    whole = used(blanked(written), add_special_tokens=False, verbose=False)["input_ids"]
    found = windows(entry_of(str(tmp_path / "a.txt"), seq_len=8), tokenizer=used)
    assert found.flatten().tolist() == whole[: found.numel()]
    if make is None and long <= piece * 5:
        assert len(list(pieces.stream([written], encoder(used)[0], piece))) > 4
        (tmp_path / "a.txt").write_bytes(written.encode() + b"\xff")  # past the pool: never read
        monkeypatch.setattr(data, "POOL", 3)
        windows(entry_of(str(tmp_path / "a.txt"), seq_len=8, samples=5), tokenizer=used, cache=tmp_path / "other")


@pytest.mark.parametrize("separator", [None, "<|endoftext|>"])
def test_reading_ahead_gives_the_same_ids(monkeypatch, tokenizer, separator):
    monkeypatch.setattr(pieces, "PIECE", 100)
    encode, end = encoder(tokenizer)[0], None if separator is None else 0
    one, two = (
        pieces.tokenise([iter([prose(20_000)])] * 2, encode, separator=separator, end=end, limit=None, ahead=ahead)
        for ahead in (False, True)
    )
    assert len(one) > 1000
    assert np.array_equal(one, two)


@pytest.mark.parametrize("piece", [5, 40, 1 << 18])
def test_every_document_is_followed_by_the_end_token(monkeypatch, tmp_path, windows, tokenizer, piece):
    monkeypatch.setattr(pieces, "PIECE", piece)
    documents = ["One.\n\nTwo lines.", "An inline <|end|> of\n<|end|> text", "third\n  indented", "last"]
    (tmp_path / "a.txt").write_text("\n<|end|>\n".join(documents[:2]) + f"\n<|end|>\n \n<|end|>\n{documents[2]}\r\n")
    with open(tmp_path / "a.txt", "a", newline="") as file:
        file.write(f"<|end|>\r\n{documents[3]}")
    expected = []
    for document in documents:
        expected += [*tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert expected.count(tokenizer.eos_token_id) == 4
    found = windows(entry_of(str(tmp_path / "a.txt"), seq_len=2, separator="<|end|>"))
    assert found.flatten().tolist() == expected[: found.numel()]
    assert len(expected) - found.numel() < 2


def test_no_bos_and_no_truncation_left_by_others(tmp_path, windows):
    used = load_tokenizer(ASSETS / "tiny", trust_remote_code=False)
    (tmp_path / "a.txt").write_text("word " * 100)
    plain = windows(entry_of(str(tmp_path / "a.txt"), seq_len=4), tokenizer=used)
    used("word " * 100, truncation=True, max_length=8)
    again = windows(entry_of(str(tmp_path / "a.txt"), seq_len=4), tokenizer=used, cache=tmp_path / "other")
    assert torch.equal(plain, again)
    assert plain.numel() >= 96 and used.bos_token_id not in plain.flatten().tolist()


def test_files_follow_one_another_and_xz_equals_plain(tmp_path, windows):
    first, second = prose(4000, 1), prose(4000, 2)
    (tmp_path / "a.txt").write_bytes(first.encode())
    (tmp_path / "b.txt").write_bytes(second.encode())
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(second.encode()))
    plain = windows(entry_of([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], seq_len=8))
    packed = windows(entry_of([str(tmp_path / "a.txt"), str(tmp_path / "b.txt.xz")], seq_len=8))
    assert torch.equal(plain, packed)


def test_builtin_calibration_is_there(windows):
    found = windows(entry_of("builtin:calibration", seq_len=64, samples=8, separator=END))
    assert found.shape == (8, 64)


def test_samples_are_a_seeded_draw_in_text_order(tmp_path, windows):
    (tmp_path / "a.txt").write_bytes(prose(20_000).encode())
    path = str(tmp_path / "a.txt")
    every = [tuple(row) for row in windows(entry_of(path)).tolist()]
    drawn = windows(entry_of(path, samples=20))
    places = [every.index(tuple(row)) for row in drawn.tolist()]
    assert places == sorted(set(places)) and len(places) == 20
    assert torch.equal(drawn, windows(entry_of(path, samples=20)))
    assert not torch.equal(drawn, windows(entry_of(path, samples=20, seed=1)))


def test_samples_of_a_long_text_read_only_a_pool(monkeypatch, tmp_path, windows, tokenizer):
    monkeypatch.setattr(pieces, "PIECE", 100)
    monkeypatch.setattr(data, "POOL", 3)
    path = str(tmp_path / "a.txt")
    Path(path).write_bytes(prose(50_000).encode() + b"\xff")  # an error past the pool is never read
    monkeypatch.setattr(text, "BLOCK", 1000)
    drawn = windows(entry_of(path, samples=10))
    head = tokenizer(blanked(prose(50_000)), add_special_tokens=False, verbose=False)["input_ids"][: 3 * 10 * 16]
    pool = {tuple(row) for row in torch.tensor(head).view(-1, 16).tolist()}
    assert all(tuple(row) in pool for row in drawn.tolist())


@pytest.mark.parametrize("separator", [None, "<|endoftext|>"])
def test_a_few_tokens_are_the_first_of_all_and_cost_a_few_characters(tokenizer, separator):
    encode, end, seen = encoder(tokenizer)[0], None if separator is None else 0, []

    def counted(texts: list[str]) -> list[list[int]]:
        seen.append(sum(map(len, texts)))
        return encode(texts)

    whole, few = (
        pieces.tokenise([iter([prose(200_000)])], counted, separator=separator, end=end, limit=limit)
        for limit in (None, 1000)
    )
    assert len(whole) > 30_000
    assert np.array_equal(few, whole[:1000])
    assert 5 * sum(seen[1:]) < seen[0]


def test_tokens_are_kept_and_a_damaged_file_is_made_again(monkeypatch, tmp_path, windows):
    path = tmp_path / "a.txt"
    path.write_bytes(prose(4000).encode())
    first = windows(entry_of(str(path)))
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.stat().st_size < 2 * first.numel() + 400  # two bytes a token
    with monkeypatch.context() as patch:
        patch.setattr(data, "tokenise", None)  # not called again, for other windows neither
        assert torch.equal(windows(entry_of(str(path))), first)
        assert windows(entry_of(str(path), seq_len=32)).shape[1] == 32
    kept.write_bytes(kept.read_bytes()[:-5])
    assert torch.equal(windows(entry_of(str(path))), first)


def test_other_text_or_tokenizer_is_other_tokens(tmp_path, windows):
    path = tmp_path / "a.txt"
    path.write_text("one two three " * 50)
    first = windows(entry_of(str(path)))
    path.write_text("four five six " * 50)
    assert not torch.equal(windows(entry_of(str(path))), first)
    windows(entry_of(str(path)), tokenizer=sentencepiece_like())
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_digest_changes_with_content_and_protocol_and_nothing_else(tmp_path):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("the same")
    b.write_text("the same")

    def digest(path=a, **fields):
        return entry_digest(entry_of(str(path), **fields), str)

    assert digest() == digest(b)
    assert digest() == digest(seed=5)  # nothing is drawn
    different = [
        digest(),
        digest(samples=2),
        digest(samples=2, seed=5),
        digest(samples=3),
        digest(seq_len=8),
        digest(separator=END),
        entry_digest(entry_of([str(a), str(b)]), str),
        entry_digest(entry_of("hub:a/b:test"), str),
        entry_digest(entry_of("hub:a/b:train"), str),
    ]
    assert len(set(different)) == len(different)
    before, stamp = digest(), a.stat()
    os.utime(a, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert digest() == before
    a.write_text("The same")
    assert digest() != before


def test_digest_reads_a_file_once(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(text, "sha256_file", lambda path: calls.append(path) or "0")
    (tmp_path / "a.txt").write_text("x")
    for _ in range(3):
        entry_digest(entry_of(str(tmp_path / "a.txt")), str)
    assert len(calls) == 1


def test_paths_go_through_the_recipe(tmp_path, windows):
    (tmp_path / "a.txt").write_text("word " * 100)
    found = windows(entry_of("a.txt"), resolve=lambda path: tmp_path / path)
    assert torch.equal(found, windows(entry_of(str(tmp_path / "a.txt"))))


def mistake(tmp_path, name: str, content: bytes) -> TextEntry:
    (tmp_path / name).write_bytes(content)
    return entry_of(str(tmp_path / name))


def test_missing_files_are_named_with_the_nearest(tmp_path, windows):
    (tmp_path / "valid.txt").write_text("x")
    with pytest.raises(DataError, match=r"vaild\.txt does not exist\. Did you mean 'valid\.txt'"):
        windows(entry_of(str(tmp_path / "vaild.txt")))
    with pytest.raises(DataError, match="there is no directory"):
        entry_digest(entry_of(str(tmp_path / "no" / "valid.txt")), str)
    with pytest.raises(DataError, match="is a directory"):
        windows(entry_of(str(tmp_path)))
    with pytest.raises(DataError, match=r"no built-in text 'calibratoin'.*Did you mean 'calibration'"):
        text.locate_text("builtin:calibratoin", str)


def test_unreadable_texts_are_named(tmp_path, windows):
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        windows(mistake(tmp_path, "empty.txt", b""))
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8: byte 0xe9 at offset 3 "):
        windows(mistake(tmp_path, "latin.txt", b"caf\xe9 " * 100))
    packed = lzma.compress(prose(5000).encode())
    with pytest.raises(DataError, match=r"cut\.txt\.xz is a damaged xz file"):
        windows(mistake(tmp_path, "cut.txt.xz", packed[:-30]))
    with pytest.raises(DataError, match=r"no\.txt\.xz is a damaged xz file"):
        windows(mistake(tmp_path, "no.txt.xz", b"plain text"))


@pytest.mark.parametrize("block", [1, 2, 3, 1000])
def test_offset_of_a_bad_byte_counts_across_blocks(monkeypatch, tmp_path, block):
    monkeypatch.setattr(text, "BLOCK", block)
    (tmp_path / "a.txt").write_bytes("é中🔎".encode() + b"\xf0\x9f\x94!")
    with pytest.raises(DataError, match="at offset 9 "):
        list(text.decode(tmp_path / "a.txt"))
    (tmp_path / "b.txt").write_bytes("\ufeffé中🔎".encode())
    assert "".join(text.decode(tmp_path / "b.txt")) == "é中🔎"
    (tmp_path / "c.txt").write_bytes("é中".encode()[:-1])
    with pytest.raises(DataError, match=r"at offset 2 .*end of data"):
        list(text.decode(tmp_path / "c.txt"))


def test_short_texts_say_what_there_is(tmp_path, windows):
    entry = mistake(tmp_path, "a.txt", b"word " * 100)
    with pytest.raises(DataError, match=r"holds 0 windows of 1024 tokens \(\d+ tokens\), 1 asked for"):
        windows(entry_of(entry.path, seq_len=1024))
    with pytest.raises(DataError, match=r"holds \d windows of 16 tokens .*, 400 asked for"):
        windows(entry_of(entry.path, samples=400))


def test_foreign_and_endless_tokenizers_are_refused(tmp_path, windows):
    entry = mistake(tmp_path, "a.txt", b"word " * 100)
    for _ in range(2):  # fresh, and from the kept tokens
        with pytest.raises(DataError, match="does not belong to the model"):
            windows(entry, vocabulary=40)
    with pytest.raises(DataError, match="no end-of-text token"):
        windows(entry_of(entry.path, separator=END), tokenizer=llama3_like())


def test_directory_without_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"holds no tokenizer: none of tokenizer\.json"):
        load_tokenizer(tmp_path, trust_remote_code=False)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot load the tokenizer of"):
        load_tokenizer(tmp_path, trust_remote_code=False)


def test_hub_texts_need_the_network_and_a_split(windows):
    with pytest.raises(DataError, match="allow_network: true"):
        windows(entry_of("hub:Salesforce/wikitext:test"))
    with pytest.raises(DataError, match=r"hub:NAME\[/CONFIG\]:SPLIT"):
        windows(entry_of("hub:wikitext"), allow_network=True)


def test_hub_rows_become_documents(monkeypatch, windows, tokenizer):
    import datasets

    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return [{"body": "first row " * 20}, {"body": "second"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    entry = entry_of("hub:owner/name/conf:train:body", separator="<sep>", seq_len=4)
    found = windows(entry, allow_network=True).flatten().tolist()
    assert asked == [("owner/name", "conf", "train", True)]
    expected = [*tokenizer("first row " * 20)["input_ids"], 0, *tokenizer("second")["input_ids"], 0]
    assert found == expected[: len(found)]
    with pytest.raises(DataError, match=r"no column 'boddy'; there is body\. Did you mean 'body'"):
        windows(entry_of("hub:owner/name:train:boddy"), allow_network=True)


def test_slow_tokenizers_work(tmp_path, windows, tokenizer):
    class Slow:
        is_fast = False
        eos_token_id = 0

        def get_vocab(self):
            return tokenizer.get_vocab()

        def encode(self, text, add_special_tokens, verbose):
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)

    entry = mistake(tmp_path, "a.txt", prose(3000).encode())
    assert torch.equal(windows(entry, tokenizer=Slow()), windows(entry))
