"""Linears with one input handed over as one: what each of them becomes, and when they are not."""

from __future__ import annotations

import pytest
import torch
from layers import gram_of, inputs

from sparsekit.blockwise import stacking
from sparsekit.blockwise.stacking import at_once, stackable
from sparsekit.errors import NumericsError
from sparsekit.ladder import dead_note
from sparsekit.pattern import Pattern
from sparsekit.registry import METHODS
from sparsekit.state import LinearState

ROWS = (24, 8, 40)
JOBS = {
    "sparsegpt": {"pattern": Pattern(2, 4)},
    "gptq": {"bits": 4, "group_size": 32, "act_order": "static"},
    "gptq dynamic": {"bits": 3, "group_size": 32, "act_order": "dynamic", "symmetric": False, "mse": True},
}


@pytest.fixture(autouse=True)
def stacks(monkeypatch):
    monkeypatch.setattr(stacking, "STACKING", ("cpu",))


def siblings(masked: bool = False) -> list[LinearState]:
    states = []
    for index, rows in enumerate(ROWS):
        weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(index))
        state = LinearState(f"block.{index}", weight).noted(f"note {index}")
        states.append(state.masked(Pattern(2, 4).keep(weight.abs())) if masked else state)
    return states


def complete(job: str) -> tuple:
    method = METHODS.get(job.partition(" ")[0])
    return method, {**method.parameters().__dict__, **JOBS[job]}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_stack_gives_what_each_linear_gives_alone(job, masked):
    method, arguments = complete(job)
    x = inputs()
    x[:, 5] = 0
    states = siblings(masked and method.kind == "quantize")
    found = at_once(method, states, [arguments] * 3, gram_of(x))
    assert found is not None
    for given, (state, _) in zip(states, found, strict=True):
        expected = method.function(given, gram_of(x), **arguments)
        assert (state.name, state.notes) == (expected.name, expected.notes)
        assert dead_note(1, 64) in state.notes
        torch.testing.assert_close(state.source, expected.source, rtol=1e-5, atol=1e-6)
        assert (state.mask is None) == (expected.mask is None)
        assert state.mask is None or torch.equal(state.mask, expected.mask)
        if expected.quantized is not None:
            assert state.quantized.equal(expected.quantized)
        assert state.source.untyped_storage().nbytes() == state.source.nbytes  # the stack does not live on in its parts


def test_rows_that_mind_go_one_by_one():
    half = {**complete("sparsegpt")[1], "pattern": Pattern.unstructured(0.5)}
    assert at_once(METHODS.get("sparsegpt"), siblings(), [half] * 3, gram_of(inputs())) is None
    assert at_once(METHODS.get("wanda"), siblings(), [{}] * 3, gram_of(inputs())) is None


def test_layers_of_different_kinds_go_one_by_one():
    method, arguments = complete("gptq")
    different = [arguments, arguments, {**arguments, "bits": 8}]
    assert at_once(method, siblings(), different, gram_of(inputs())) is None
    assert at_once(method, [*siblings()[:2], siblings(True)[2]], [arguments] * 3, gram_of(inputs())) is None
    assert at_once(method, siblings()[:1], [arguments], gram_of(inputs())) is None
    weights = sum(ROWS) * 64
    assert stackable(siblings(), 8 * 46 * weights)
    assert not stackable(siblings(), 8 * 46 * weights - 8)


def test_what_fails_as_a_stack_is_named_alone():
    method, arguments = complete("gptq")
    states = siblings()
    states[1].source[3, 3] = torch.nan
    assert at_once(method, states, [arguments] * 3, gram_of(inputs())) is None
    with pytest.raises(NumericsError, match=r"block\.1"):
        method.function(states[1], gram_of(inputs()), **arguments)
