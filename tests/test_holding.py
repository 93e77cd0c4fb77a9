"""Memory modes: what is held where, and that it decides nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import families
import pytest
import torch
import yaml
from click.testing import CliRunner
from layers import gram_of, inputs

from sparsekit.blockwise import activations
from sparsekit.blockwise.activations import Activations, on_device
from sparsekit.blockwise.applying import Applying
from sparsekit.blockwise.holding import HOLDINGS
from sparsekit.blockwise.walk import Walk
from sparsekit.checkpoint import StepStore
from sparsekit.cli import main
from sparsekit.errors import PatternError
from sparsekit.ladder import Ladder
from sparsekit.models.shapes import BlockSizes, ModelSizes
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.planning.memory_model import peak, walk_moments
from sparsekit.registry import METHODS
from sparsekit.state import LinearState
from sparsekit.stats import Gram
from sparsekit.verify import concluded

ARGUMENTS = {"sparsegpt": {}, "gptq": {"group_size": 8}, "awq": {"group_size": 8}, "wanda": {}}


@pytest.mark.parametrize("schedule", ["block", "group"])
@pytest.mark.parametrize("method", ARGUMENTS)
def test_a_mode_changes_no_result(method, schedule, tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "MICRO_BATCH_TOKENS", {"cpu": 64})
    view = ModelView.open(families.save("llama", tmp_path / "model"), device="cpu")
    names = [name for index in range(len(view.blocks)) for name in view.linears(index)]
    tokens = torch.randint(0, 128, (7, 16), generator=torch.Generator().manual_seed(0))

    def walked(mode: str) -> StepStore:
        store = StepStore(tmp_path / mode, view.dtype)
        with torch.inference_mode():
            Walk(
                view, METHODS.get(method), ARGUMENTS[method], frozenset(names), {}, view.dense_block, store, tokens,
                schedule, lambda *_: None, holding=HOLDINGS[mode],
            ).run()  # fmt: skip
        return store

    expected = walked("auto")
    for mode in ("fast", "balanced", "low"):
        found = walked(mode)
        for index in range(len(view.blocks)):
            one, other = found.block(index), expected.block(index)
            for name, state in other.linears.items():
                assert one.linears[name].notes == state.notes
                torch.testing.assert_close(one.linears[name].weight, state.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["sparsegpt", "gptq"])
def test_a_linear_in_pieces_is_the_linear(method, monkeypatch):
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    state, gram = LinearState("a", weight).noted("before"), gram_of(inputs())
    chosen, calls = METHODS.get(method), []

    def guarded(self, state, statistic, **arguments):
        calls.append(len(state.source))
        return self.function(state, statistic, **arguments).noted("after")

    monkeypatch.setattr(type(chosen), "guarded", guarded)
    patterns = {"a": Pattern(2, 4)} if method == "sparsegpt" else {}
    applying = Applying(chosen, ARGUMENTS[method], torch.device("cpu"), patterns, {}, {}, Ladder())
    (whole, proof), (found, other) = (next(applying.in_turn([state], gram, size)) for size in (None, 16 * 64))
    assert calls == [40, 16, 16, 8]
    assert found.notes == whole.notes == ("before", "after")
    torch.testing.assert_close(found.source, whole.source, rtol=1e-5, atol=1e-6)
    assert whole.mask is None or torch.equal(found.mask, whole.mask)
    assert whole.quantized is None or found.quantized.equal(whole.quantized)
    (expected,), (record,) = concluded([proof]), concluded([other])
    assert record.error == pytest.approx(expected.error, rel=1e-5)
    assert record.sparsity == pytest.approx(expected.sparsity)
    same = {"error": 0.0, "sparsity": 0.0, "seconds": 0.0}
    assert replace(record, **same) == replace(expected, **same)


def test_pieces_are_proved_one_by_one(monkeypatch):
    state, gram = LinearState("a", torch.randn(8, 64)), gram_of(inputs())
    chosen, calls = METHODS.get("sparsegpt"), []

    def guarded(self, state, statistic, **arguments):
        calls.append(state)
        return state if len(calls) == 2 else self.function(state, statistic, **arguments)  # a piece stays dense

    monkeypatch.setattr(type(chosen), "guarded", guarded)
    applying = Applying(chosen, {}, torch.device("cpu"), {"a": Pattern(2, 4)}, {}, {}, Ladder())
    ((_, proof),) = applying.in_turn([state], gram, 2 * 64)
    with pytest.raises(PatternError, match="32 of 128 groups break the 2:4 pattern"):
        concluded([proof])


def test_what_each_mode_holds(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(activations, "free_memory", lambda device: 1000)
    assert [on_device(size, cuda, HOLDINGS["auto"]) for size in (249, 250)] == [True, False]
    assert on_device(10**12, cuda, HOLDINGS["fast"]) and on_device(10**12, cuda, HOLDINGS["balanced"])
    assert not on_device(1, cuda, HOLDINGS["low"])


def test_smaller_micro_batches(random_model):
    view = ModelView.open(random_model, device="cpu")
    tokens = torch.zeros(9, 16, dtype=torch.int64)
    with torch.inference_mode():
        assert Activations.begin(view, tokens).micro_batch == 9
        small = HOLDINGS["low"].__class__(tokens=40)
        assert Activations.begin(view, tokens, small).micro_batch == 2


SEVEN = (4096, 11008, 4096, 32000)  # width, inner width, width of keys, vocabulary
SEVENTY = (8192, 28672, 1024, 128256)


@pytest.mark.parametrize(
    ("shape", "mode", "most"),
    [(SEVEN, "balanced", 4.4e9), (SEVEN, "low", 2.1e9), (SEVENTY, "balanced", 17.5e9), (SEVENTY, "low", 12.3e9)],
)
@pytest.mark.parametrize("in_order", [False, True])
def test_large_models_are_predicted_to_fit(shape, mode, most, in_order):
    width, inner, narrow, vocabulary = shape
    linears = {**dict.fromkeys("qo", (width, width)), **dict.fromkeys("kv", (narrow, width))}
    linears |= {"g": (inner, width), "u": (inner, width), "d": (width, inner)}
    block = BlockSizes(linears, [["q", "k", "v"], ["o"], ["g", "u"], ["d"]], 2 * width)
    model = ModelSizes([block] * 32, 2 * vocabulary * width, width, vocabulary, 2, 2, cuda=True)
    holding = HOLDINGS[mode]
    for method in ("sparsegpt", "gptq"):
        found = walk_moments(
            model, method, Gram, samples=128, seq_len=2048, on_device=holding.hidden == "device", in_order=in_order,
            holding=holding,
        )  # fmt: skip
        assert peak(found).bytes <= most
        assert peak(found).bytes < 0.7 * peak(
            walk_moments(model, method, Gram, samples=128, seq_len=2048, on_device=True, in_order=in_order)
        ).bytes  # fmt: skip


def test_a_recipe_says_the_mode_and_a_wrong_one_is_named(tmp_path: Path, random_model):
    recipe = {
        "name": "mode", "output": str(tmp_path / "run"), "model": {"path": str(random_model), "memory": "low"},
        "data": {"calibration": {"path": "builtin:calibration", "samples": 4, "seq_len": 32}},
        "steps": [{"method": "sparsegpt", "pattern": str(Pattern(2, 4))}],
    }  # fmt: skip
    path = tmp_path / "mode.yaml"
    path.write_text(yaml.safe_dump(recipe))
    done = CliRunner().invoke(main, ["run", str(path)])
    assert done.exit_code == 0, done.output
    assert ", memory low\n" in done.output  # told in the plan
    assert "memory: low" in (tmp_path / "run" / "recipe.yaml").read_text()
    again = CliRunner().invoke(main, ["run", str(path), "--set", "model.memory=fast"])  # the same step: nothing is done
    assert again.exit_code == 0, again.output
    assert len(list((tmp_path / "run" / "steps").iterdir())) == 1
    wrong = CliRunner().invoke(main, ["run", str(path), "--set", "model.memory=slow"])
    assert wrong.exit_code == 2
    assert "memory" in wrong.output
