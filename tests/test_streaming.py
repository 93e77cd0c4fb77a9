"""Blocks read ahead and written behind: the same files and states, and no error is lost."""

from __future__ import annotations

import hashlib
import json
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save

from sparsekit import kept
from sparsekit.blockwise.streaming import Ahead, Behind
from sparsekit.checkpoint import HOST, BlockState, StepStore, Stored
from sparsekit.errors import CheckpointError
from sparsekit.files import write_tensors
from sparsekit.state import LinearState

TENSORS = {
    "b": torch.arange(15.0).reshape(3, 5).bfloat16(),
    "é": torch.ones(2, 2, dtype=torch.uint8),
    "none": torch.empty(0, 4),
    "mask": torch.ones(3, dtype=torch.bool),
    "index": torch.arange(5, dtype=torch.int32),
    "turned": torch.arange(6.0).reshape(2, 3).t(),
    "one": torch.tensor(2.5).half(),
}
ABOUT = {"z": "1", "a": '{"ü": 2}'}


def block(value: float) -> BlockState:
    return BlockState({"a.q": LinearState("a.q", torch.full((4, 8), value))}, {"a.norm": torch.ones(4)})


def test_a_streamed_file_has_the_library_s_bytes(tmp_path):
    digest = write_tensors(tmp_path / "own.safetensors", TENSORS, ABOUT)
    whole = (tmp_path / "own.safetensors").read_bytes()
    assert digest == hashlib.sha256(whole).hexdigest()
    theirs = save({name: tensor.contiguous() for name, tensor in TENSORS.items()}, {"format": "pt", **ABOUT})
    sizes = [int.from_bytes(data[:8], "little") for data in (whole, theirs)]
    own, other = (json.loads(data[8 : 8 + size]) for data, size in zip((whole, theirs), sizes, strict=True))
    assert own == other
    assert list(own)[1:] == list(other)[1:]  # the order of the tensors is that of the library
    assert list(own["__metadata__"]) == ["a", "format", "z"]
    assert whole[8 + sizes[0] :] == theirs[8 + sizes[1] :]
    for name, tensor in load_file(tmp_path / "own.safetensors").items():
        assert torch.equal(tensor, TENSORS[name])


def test_blocks_are_read_once_and_ahead():
    read: list[tuple[int, str]] = []

    def reading(index: int) -> Stored:
        read.append((index, threading.current_thread().name))
        return Stored({"x": torch.tensor([float(index)])}, lambda found: BlockState({}, dict(found)))

    with Ahead(reading, HOST, 4) as ahead:
        assert [float(ahead(index).params["x"]) for index in (1, 2, 3)] == [1.0, 2.0, 3.0]
        assert read[0] == (1, threading.current_thread().name)
        assert [index for index, _ in read] == [1, 2, 3]
        assert all(name.startswith("sparsekit-read") for _, name in read[1:])
        assert float(ahead(0).params["x"]) == 0.0  # as an export does, which goes through the blocks several times
        assert float(ahead(2).params["x"]) == 2.0


def test_a_digest_is_taken_again_only_when_a_file_may_have_changed(tmp_path, monkeypatch):
    store, read = StepStore(tmp_path, torch.float32), []
    hashed = kept.sha256_file
    monkeypatch.setattr(kept, "sha256_file", lambda path: read.append(path) or hashed(path))
    store.commit_block(0, block(0.0), [])
    path = store.block_path(0)
    assert store.block(0) is not None
    assert read == []  # this process wrote it
    later = StepStore(tmp_path, torch.float32)
    assert later.block(0) is not None
    assert later.block(0) is not None  # read just after it was written: a change in that tick would not show
    assert read == [path, path]
    monkeypatch.setattr(kept, "TICK", 0)
    assert later.block(0) is not None
    assert read == [path, path]
    time.sleep(0.05)  # a tick of the file system's clock
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert store.block(0) is None
    assert read == [path, path, path]


def test_an_error_of_the_reader_is_raised_where_the_block_is_wanted():
    def reading(index: int) -> Stored:
        if index == 1:
            raise CheckpointError("block 1 is missing")
        return Stored({}, lambda found: BlockState({}))

    with Ahead(reading, HOST, 3) as ahead:
        ahead(0)
        with pytest.raises(CheckpointError, match="block 1 is missing"):
            ahead(1)


def test_blocks_written_behind_are_those_committed_at_once(tmp_path):
    once, later = (StepStore(tmp_path / name, torch.bfloat16) for name in ("once", "later"))
    with Behind(later) as behind:
        for index in range(3):
            expected = once.commit_block(index, block(index / 3), [{"name": "a.q"}])
            found = behind.commit(index, block(index / 3), [{"name": "a.q"}])
            assert torch.equal(found.linears["a.q"].source, expected.linears["a.q"].source)
    for store in (once, later):
        store.finish("f", {})
    names = sorted(path.name for path in once.directory.iterdir())
    assert names == sorted(path.name for path in later.directory.iterdir())
    assert len(names) == 7
    for name in names:
        assert (once.directory / name).read_bytes() == (later.directory / name).read_bytes()
    assert StepStore(later.directory, torch.bfloat16).finished("f") is not None  # digests noted while writing are true


@pytest.mark.parametrize("at", ["next", "end"])
def test_an_error_of_the_writer_is_raised_at_once(tmp_path, at):
    (tmp_path / "file").write_text("")
    store, reached = StepStore(tmp_path / "file" / "step", torch.float32), []

    def work() -> None:
        with Behind(store) as behind:
            behind.commit(0, block(0.0), [])
            if at == "next":
                behind.commit(1, block(1.0), [])
                reached.append(True)

    with pytest.raises(CheckpointError, match=r"cannot write .*block-0000\.safetensors"):
        work()
    assert not reached


def test_what_is_being_written_is_finished_when_the_work_is_stopped(tmp_path, monkeypatch):
    store, go, true = StepStore(tmp_path, torch.float32), threading.Event(), StepStore.write_block

    def slow(self, *arguments):
        go.wait(10)
        true(self, *arguments)

    def work() -> None:
        with Behind(store) as behind:
            behind.commit(0, block(0.0), [])
            threading.Timer(0.05, go.set).start()
            raise KeyboardInterrupt

    monkeypatch.setattr(StepStore, "write_block", slow)
    with pytest.raises(KeyboardInterrupt):
        work()
    assert store.block(0) is not None
    assert not list(tmp_path.rglob(".*"))
