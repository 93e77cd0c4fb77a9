"""Compressing a block in one forward, against one forward for each group."""

from __future__ import annotations

import gc
import weakref

import families
import pytest
import torch

from sparsekit.blockwise.activations import Activations
from sparsekit.blockwise.walk import Walk
from sparsekit.checkpoint import StepStore
from sparsekit.errors import NumericsError
from sparsekit.models.view import ModelView
from sparsekit.registry import METHODS
from sparsekit.stats import Gram

ARGUMENTS = {"sparsegpt": {}, "gptq": {"group_size": 8}, "wanda": {}}


@pytest.fixture(params=["llama", "phi", "mixtral"])
def view(request, tmp_path):
    return ModelView.open(families.save(request.param, tmp_path / "model"), device="cpu")


def walked(view, method, directory, selected=None):
    """Every block after a step with the group schedule, and the states that enter the last one."""
    torch.manual_seed(1)
    store = StepStore(directory, view.dtype)
    names = [name for index in range(len(view.blocks)) for name in view.linears(index)]
    Walk(
        view=view,
        method=METHODS.get(method),
        arguments=ARGUMENTS[method],
        selected=frozenset(names if selected is None else filter(selected, names)),
        patterns={},
        before=view.dense_block,
        store=store,
        tokens=torch.randint(0, 128, (7, 16)),
        schedule="group",
        progress=lambda done, total: None,
    ).run()
    return [store.block(index) for index in range(len(view.blocks))]


@pytest.mark.parametrize("method", ARGUMENTS)
def test_one_forward_gives_what_a_forward_for_each_group_gives(view, method, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsekit.blockwise.activations.MICRO_BATCH_TOKENS", {"cpu": 32})
    passes = []
    once = Activations.advance_settling
    monkeypatch.setattr(Activations, "advance_settling", lambda *given: passes.append(once(*given)) or passes[-1])
    with torch.inference_mode():
        found = walked(view, method, tmp_path / "one")
        assert passes == [True, True]
        monkeypatch.setattr("sparsekit.blockwise.activations.WAITING_SHARE", 0.0)
        expected = walked(view, method, tmp_path / "many")
    assert passes[2:] == [False, False]
    for one, other in zip(found, expected, strict=True):
        for name, state in other.linears.items():
            torch.testing.assert_close(one.linears[name].weight, state.weight, rtol=0, atol=0)
            assert one.linears[name].mask is None or torch.equal(one.linears[name].mask, state.mask)
            assert one.linears[name].notes == state.notes


def test_some_layers_only(view, tmp_path, monkeypatch):
    with torch.inference_mode():
        chosen = walked(view, "sparsegpt", tmp_path / "one", lambda name: "k_proj" in name or "down" in name)
        monkeypatch.setattr("sparsekit.blockwise.activations.WAITING_SHARE", 0.0)
        expected = walked(view, "sparsegpt", tmp_path / "many", lambda name: "k_proj" in name or "down" in name)
    for one, other in zip(chosen, expected, strict=True):
        for name, state in other.linears.items():
            torch.testing.assert_close(one.linears[name].weight, state.weight, rtol=0, atol=0)


def test_a_linear_that_is_called_again_takes_the_other_way(tmp_path, monkeypatch):
    view = ModelView.open(families.save("llama", tmp_path / "model"), device="cpu")
    run = ModelView.run_block

    def twice(self, index, hidden, call):
        run(self, index, hidden, call)
        return run(self, index, hidden, call)

    with torch.inference_mode():
        monkeypatch.setattr(ModelView, "run_block", twice)
        found = walked(view, "sparsegpt", tmp_path / "one")
        monkeypatch.setattr("sparsekit.blockwise.activations.WAITING_SHARE", 0.0)
        expected = walked(view, "sparsegpt", tmp_path / "many")
    for one, other in zip(found, expected, strict=True):
        for name, state in other.linears.items():
            torch.testing.assert_close(one.linears[name].weight, state.weight, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["forward", "settle"])
def test_an_error_ends_every_micro_batch(where, tmp_path, monkeypatch):
    view = ModelView.open(families.save("llama", tmp_path / "model"), device="cpu")
    monkeypatch.setattr("sparsekit.blockwise.activations.MICRO_BATCH_TOKENS", {"cpu": 32})
    with torch.inference_mode():
        stream = Activations.begin(view, torch.randint(0, 128, (6, 16)))
        block = view.dense_block(0)
        view.materialise(0, block)
        groups = view.groups(0, *stream.sample(0))

        def settle(group, statistic):
            if where == "settle":
                raise NumericsError("no")

        if where == "forward":
            view.linears(0)[groups[-1][0]].register_forward_hook(lambda *_: 1 / 0)
        before = stream.hidden.clone()
        with pytest.raises(NumericsError if where == "settle" else ZeroDivisionError):
            stream.advance_settling(0, groups, Gram, settle)
        assert torch.equal(stream.hidden, before)
        assert stream.block == 0
        assert not view.linears(0)[groups[0][0]]._forward_pre_hooks


def test_a_forward_that_ends_early_leaves_nothing_behind(tmp_path, monkeypatch):
    view = ModelView.open(families.save("llama", tmp_path / "model"), device="cpu")
    monkeypatch.setattr("sparsekit.blockwise.activations.MICRO_BATCH_TOKENS", {"cpu": 32})
    given, feeder = [], Activations.feeder

    def watched(self, name, statistic, *, finite):
        feed = feeder(self, name, statistic, finite=finite)

        def hook(module, arguments):
            given.append(weakref.ref(arguments[0]))
            feed(module, arguments)

        return hook

    monkeypatch.setattr(Activations, "feeder", watched)
    with torch.inference_mode():
        stream = Activations.begin(view, torch.randint(0, 128, (6, 16)))
        view.materialise(0, view.dense_block(0))
        groups = view.groups(0, *stream.sample(0))
        gc.collect()
        gc.disable()  # cycles of frames and tracebacks would hold tensors, as they do on a device between collections
        try:
            stream.collect(0, groups, Gram)
            alive = [reference() for reference in given if reference() is not None]
        finally:
            gc.enable()
    assert len(given) == 3 * len(groups)
    assert not alive
