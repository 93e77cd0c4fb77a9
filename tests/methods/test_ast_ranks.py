"""AST on several processes: the same losses, masks and checkpoints as in one. Needs no GPU: gloo, float64."""

import json
import socket

import children
import pytest
import torch
from rank_jobs import BITS, KEPT, finished, ranked, stopped
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Whole runs on one and on two ranks, one begun on two ranks and ended on one, and the reverse."""
    directory = tmp_path_factory.mktemp("ranks")
    for name in ("one", "two", "two-then-one", "one-then-two", "bits-one", "bits-two-then-one"):
        (directory / name / "checkpoint").mkdir(parents=True)
    finished(directory / "one")
    stopped(directory / "one-then-two")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    logs = [directory / f"rank-{rank}.log" for rank in range(2)]
    ranks = [children.started(ranked, rank, port, directory, log=log) for rank, log in enumerate(logs)]
    for process, log in zip(ranks, logs, strict=True):
        output = children.ended(process, log)
        assert process.exitcode == 0, output[-4000:]
    finished(directory / "two-then-one")
    finished(directory / "bits-one", **BITS)
    finished(directory / "bits-two-then-one", **BITS)
    return directory


def log_of(directory):
    return json.loads((directory / "log.json").read_text())


def result_of(directory):
    return load_file(directory / "result.safetensors")


def assert_equal_runs(found, expected, first_step=0):
    """Losses within 1e-12, equal masks, weights equal up to float32 of what is stored."""
    mine = {line["step"]: line for line in log_of(found)}
    theirs = {line["step"]: line for line in log_of(expected) if line["step"] > first_step}
    assert mine.keys() == theirs.keys()
    for step, line in theirs.items():
        for key in ("loss", "kl", "ce", "grad_norm", "valid_perplexity"):
            if key in line:
                assert mine[step][key] == pytest.approx(line[key], rel=1e-12, abs=1e-12), (step, key)
        for key in ("flip_rate", "initial_flip_rate", "decay", "lr"):
            assert mine[step][key] == line[key], (step, key)
    tensors, wanted = result_of(found), result_of(expected)
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name.startswith(("mask/", "codes/")):
            assert torch.equal(tensors[name], tensor), name
        else:
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-6, atol=1e-9)


def test_two_ranks_compute_what_one_computes(runs):
    assert_equal_runs(runs / "two", runs / "one")
    assert log_of(runs / "one")[-1]["initial_flip_rate"] > 0


def test_all_ranks_compute_with_the_same_masks_at_every_step(runs):
    told = ("one/masks-0.json", "two/masks-0.json", "two/masks-1.json")
    alone, first, second = (json.loads((runs / path).read_text()) for path in told)
    assert first == second == alone
    assert len(alone) > 2  # they were chosen again


def test_a_run_of_two_ranks_goes_on_alone(runs):
    assert_equal_runs(runs / "two-then-one", runs / "one", first_step=KEPT - 1)  # a step is saved once it was told


def test_a_run_of_one_process_goes_on_on_two_ranks(runs):
    assert_equal_runs(runs / "one-then-two", runs / "one", first_step=KEPT - 1)  # a step is saved once it was told


def test_weights_on_grids_go_on_alone(runs):
    assert_equal_runs(runs / "bits-two-then-one", runs / "bits-one", first_step=KEPT - 1)
    assert any(name.startswith("codes/") for name in result_of(runs / "bits-one"))


def test_checkpoints_of_ranks_are_safetensors_and_one_is_kept(runs):
    kept = sorted(path.name for path in (runs / "two" / "checkpoint").iterdir())
    assert kept == ["step-00000023.json", "step-00000023.shards"]
    files = list((runs / "two" / "checkpoint" / "step-00000023.shards").iterdir())
    assert files
    assert all(file.suffix in (".safetensors", ".json") for file in files), files
