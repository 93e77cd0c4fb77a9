"""AWQ in models: scales fold into every kind of producer, and through the driver."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, save

from sparsekit.blockwise.walk import Walk
from sparsekit.checkpoint import BlockState, StepStore
from sparsekit.methods.awq import awq
from sparsekit.models.groups import Producer
from sparsekit.models.view import ModelView
from sparsekit.registry import METHODS
from sparsekit.state import Group
from sparsekit.stats import Gram


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_scales_fold_without_changing_any_family(family, tmp_path):
    """The scales found go into whatever feeds each group (norms, Gemma's 1 + w, biases, tied heads, experts)."""
    view = ModelView.open(save(family, tmp_path))
    hidden, calls = view.begin(torch.randint(3, 128, (3, 16), generator=torch.Generator().manual_seed(0)))
    block = view.dense_block(0)
    view.materialise(0, block)
    expected = view.run_block(0, hidden, calls[0])
    groups = view.groups(0, hidden, calls[0])
    producers = view.producers(0, groups, hidden, calls[0])
    scaled, folded = block, 0
    generator = torch.Generator().manual_seed(1)
    for names, producer in reversed(list(zip(groups, producers, strict=True))):
        width = block.linears[names[0]].source.shape[1]
        x = torch.randn(64, width, generator=generator) * torch.randn(width, generator=generator).exp()
        statistic = Gram.empty(width, torch.device("cpu"))
        statistic.update(x)
        states = {name: scaled.linears[name] for name in names}
        if isinstance(producer, str):
            given = Group(states, why=producer)
        else:
            given = Group(states, tie=producer.tie, untie=producer.untie)
        result = awq(given, statistic, bits=4, group_size=-1)
        assert {n: s.quantized is not None for n, s in result.linears.items()} == dict.fromkeys(names, True)
        if result.input_scale is None:
            assert isinstance(producer, Producer) or all(producer in s.notes[0] for s in result.linears.values())
            continue
        folded += 1
        exact = given.rescaled(result.input_scale).linears  # unrounded: only the folding is looked at
        scaled = producer.fold(BlockState({**scaled.linears, **exact}, scaled.params), result.input_scale)
    view.materialise(0, scaled)
    actual = view.run_block(0, hidden, calls[0])
    assert folded >= 1
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.inference_mode()
def test_the_driver_folds_and_quantizes(family, tmp_path):
    tokens = torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(0))
    view = ModelView.open(save(family, tmp_path))
    dense = [view.dense_block(index) for index in range(len(view.blocks))]
    names = frozenset(name for block in dense for name in block.linears)
    store = StepStore(tmp_path / "step", torch.float32)
    arguments = {"bits": 8, "group_size": -1}
    Walk(view, METHODS.get("awq"), arguments, names, {}, dense.__getitem__, store, tokens, "block", print).run()
    after = [store.block(index) for index in range(len(dense))]
    assert all(state.quantized is not None for block in after for state in block.linears.values())
    moved = [name for name, value in dense[0].params.items() if not torch.equal(value, after[0].params[name])]
    assert any("norm" in name or "ln_" in name for name in moved)  # a scale went into a norm
    view.materialise_all(dense)
    expected = view.module(tokens).logits
    view.materialise_all(after)
    assert float((view.module(tokens).logits - expected).norm() / expected.norm()) < 0.02
