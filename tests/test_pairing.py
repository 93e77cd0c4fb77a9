"""Statistics of two models: what the walk pairs is what the two whole models compute."""

from __future__ import annotations

import entering
import families
import pytest
import torch

from sparsekit.blockwise.walk import Walk
from sparsekit.checkpoint import StepStore
from sparsekit.crossgram import CrossGram
from sparsekit.errors import MethodError, NumericsError
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.registry import METHODS, linear_method

TOKENS = torch.randint(0, 128, (7, 16), generator=torch.Generator().manual_seed(1))
SEEN, BREAKS_AT = {}, []


@linear_method("noting_pairs", kind="prune", stats=CrossGram)
def noting_pairs(layer, gram, /):
    """Keep the largest of every four, and write down the statistic."""
    if any(layer.name.startswith(name) for name in BREAKS_AT):
        raise MethodError("stopped")
    SEEN[layer.name] = gram
    return layer.masked(Pattern(2, 4).keep(layer.source.abs()))


def walk(view, directory, schedule):
    store = StepStore(directory, view.dtype)
    names = [name for index in range(len(view.blocks)) for name in view.linears(index)]
    with torch.inference_mode():
        Walk(
            view=view,
            method=METHODS.get("noting_pairs"),
            arguments={},
            selected=frozenset(names),
            patterns={},
            before=view.dense_block,
            store=store,
            tokens=TOKENS,
            schedule=schedule,
            progress=lambda done, total: None,
        ).run()
    return [store.block(index) for index in range(len(view.blocks))]


def inputs_of(view, blocks):
    """What reaches every linear of a whole model, [tokens, in]."""
    linears = {name: linear for index in range(len(view.blocks)) for name, linear in view.linears(index).items()}
    return entering.inputs_of(view, blocks, TOKENS, linears)


@pytest.fixture
def view(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsekit.blockwise.activations.MICRO_BATCH_TOKENS", {"cpu": 32})
    SEEN.clear(), BREAKS_AT.clear()
    return ModelView.open(families.save("llama", tmp_path / "model"), device="cpu")


@pytest.mark.parametrize("stopped", [False, True], ids=["whole", "stopped in block 1"])
def test_the_walk_pairs_what_the_two_models_compute(view, stopped, tmp_path):
    if stopped:
        BREAKS_AT.append(view.blocks[1])
        with pytest.raises(MethodError, match="stopped"):
            walk(view, tmp_path / "step", "group")
        BREAKS_AT.clear()
    blocks = walk(view, tmp_path / "step", "group")
    dense = inputs_of(view, [view.dense_block(index) for index in range(len(view.blocks))])
    now = inputs_of(view, blocks)
    assert set(SEEN) == set(now)
    for name, gram in SEEN.items():
        torch.testing.assert_close(gram.sum, now[name].t() @ now[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gram.drift, (dense[name] - now[name]).t() @ now[name], rtol=1e-3, atol=1e-4)
        assert gram.tokens == TOKENS.numel()
    assert sum(bool(gram.drift.any()) for gram in SEEN.values()) == len(SEEN) - 3  # not the first q, k and v


def test_with_the_block_schedule_the_first_block_has_not_drifted(view, tmp_path):
    walk(view, tmp_path / "step", "block")
    for name, gram in SEEN.items():
        assert bool(gram.drift.any()) == (not name.startswith(f"{view.blocks[0]}."))


def test_experts_are_refused_by_name(tmp_path):
    routed = ModelView.open(families.save("mixtral", tmp_path / "model"), device="cpu")
    with pytest.raises(MethodError, match="not every token reaches it") as error:
        walk(routed, tmp_path / "step", "group")
    assert "experts" in str(error.value)


def pairs(columns=16, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(tokens, columns, generator=generator) * (1 + torch.rand(columns, generator=generator))
    mixed = dense @ (torch.eye(columns) + 0.1 * torch.randn(columns, columns, generator=generator))
    return dense, mixed + 0.3 * torch.randn(tokens, columns, generator=generator)


def crossed(dense, now):
    gram = CrossGram.empty(dense.shape[1], torch.device("cpu"))
    for part in (slice(0, 70), slice(70, None)):
        other = CrossGram.empty(dense.shape[1], torch.device("cpu"))
        other.pair(dense[part], now[part])
        gram.merge(other)
    return gram


def test_the_aim_is_the_ridge_regression():
    dense, now = pairs()
    weight, gram = torch.randn(5, 16, generator=torch.Generator().manual_seed(3)), crossed(dense, now)
    ridge = (0.1 * len(now) * gram.matrix.diagonal().mean()).sqrt().double()
    rows = torch.cat([now.double(), ridge * torch.eye(16)])
    goal = torch.cat([dense.double() @ weight.double().t(), ridge * weight.double().t()])
    best = torch.linalg.lstsq(rows, goal).solution.t()
    torch.testing.assert_close(gram.aimed(weight, 0.1).double(), best, rtol=1e-4, atol=1e-4)
    half = (weight.double() + best) / 2
    torch.testing.assert_close(gram.aimed(weight, 0.1, share=0.5).double(), half, rtol=1e-4, atol=1e-4)


def test_an_aim_without_drift_or_correlations_is_the_weight():
    dense, now = pairs()
    weight = torch.randn(5, 16)
    same = CrossGram.empty(16, torch.device("cpu"))
    same.update(now)
    for gram in (same, crossed(dense, now).diagonal()):
        torch.testing.assert_close(gram.aimed(weight, 0.01), weight)
    dense[3, 2] = torch.inf
    mended = crossed(dense, now)
    assert mended.broken.tolist() == [column == 2 for column in range(16)]
    assert torch.isfinite(mended.without(mended.broken).aimed(weight, 0.01)).all()


def test_an_aim_that_cannot_be_solved_for_is_an_error():
    gram = CrossGram.empty(4, torch.device("cpu"))
    gram.update(torch.full((3, 4), torch.nan))
    with pytest.raises(NumericsError, match="not positive definite"):
        gram.aimed(torch.ones(2, 4), 0.01)
