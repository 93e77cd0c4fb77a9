import os

import pytest
import torch

from sparsekit.checkpoint import BlockState, StepStore, pack_mask, unpack_mask
from sparsekit.errors import CheckpointError
from sparsekit.files import RunLock, read_json, read_tensors, remove_temporaries, write_bytes, write_json, write_tensors
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid, QuantizedWeight
from sparsekit.state import LinearState


def block() -> BlockState:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    pruned = LinearState("a.q", weight).masked(Pattern(2, 4).keep(weight.abs())).noted("a note")
    grid = Grid.fit(weight.reshape(6, 2, 8), 4)
    codes = grid.encode(weight.reshape(6, 2, 8)).reshape(6, 16)
    quantized = LinearState("a.o", weight).with_quantized(QuantizedWeight.of(codes, grid, group_size=8, symmetric=True))
    return BlockState({"a.q": pruned, "a.o": quantized}, {"a.norm.weight": torch.ones(4)})


def test_mask_bits_round_trip():
    for shape in [(1, 1), (3, 5), (4, 16), (7, 9)]:
        mask = torch.rand(shape) > 0.5
        bits = pack_mask(mask)
        assert bits.dtype == torch.uint8
        assert bits.numel() == -(-mask.numel() // 8)
        assert torch.equal(unpack_mask(bits, shape), mask)


def test_block_round_trip_is_exact(tmp_path):
    store = StepStore(tmp_path, torch.float32)
    written = store.commit_block(0, block(), [{"name": "a.q"}])
    read = store.block(0)
    assert read is not None
    assert store.layers(0) == [{"name": "a.q"}]
    for state in (written, read):
        for name, original in block().linears.items():
            assert torch.equal(state.linears[name].weight, original.weight)
            assert state.linears[name].notes == original.notes
        assert torch.equal(state.linears["a.q"].mask, block().linears["a.q"].mask)
        assert torch.equal(state.linears["a.q"].source, block().linears["a.q"].source)  # dense values survive
        assert torch.equal(state.params["a.norm.weight"], torch.ones(4))


def test_values_are_stored_in_the_model_dtype(tmp_path):
    store = StepStore(tmp_path, torch.bfloat16)
    written = store.commit_block(0, block(), [])
    expected = block().linears["a.q"].source.bfloat16().float()
    assert torch.equal(written.linears["a.q"].source, expected)
    read = store.block(0)
    assert read is not None and torch.equal(read.linears["a.q"].source, expected)


def test_damaged_block_counts_as_absent(tmp_path):
    store = StepStore(tmp_path, torch.float32)
    store.commit_block(0, block(), [])
    path = store.block_path(0)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert store.block(0) is None
    assert not path.exists()


def test_finished_checks_fingerprint_and_files(tmp_path):
    store = StepStore(tmp_path, torch.float32)
    store.commit_block(0, block(), [])
    store.commit_block(1, block(), [])
    store.finish("abc", {"seconds": 1.0})
    record = store.finished("abc")
    assert record is not None and record["result"] == {"seconds": 1.0}
    assert store.finished("abd") is None
    with open(store.block_path(1), "r+b") as file:
        file.truncate(100)
    assert store.finished("abc") is None
    assert store.block(0) is not None  # the intact block is kept, the step redone from the broken one
    assert store.block(1) is None
    assert not (tmp_path / "DONE").exists()


def test_write_leaves_nothing_behind_on_failure(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_bytes(tmp_path / "x.bin", b"data")
    assert list(tmp_path.iterdir()) == []


def test_write_to_a_file_as_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        write_bytes(tmp_path / "file" / "x.bin", b"data")


def test_truncated_tensor_file_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"cannot read .*x\.safetensors"):
        read_tensors(path)


def test_damaged_json_is_named(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_second_process_is_refused(tmp_path):
    with RunLock(tmp_path), pytest.raises(CheckpointError, match="in use"), RunLock(tmp_path):
        pass
    with RunLock(tmp_path):
        pass


def test_temporaries_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / ".x.safetensors.123.tmp").write_text("half")
    (tmp_path / "sub" / "x.safetensors").write_text("whole")
    remove_temporaries(tmp_path)
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["x.safetensors"]
