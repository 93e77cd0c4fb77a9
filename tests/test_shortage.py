"""Out of memory on the device: a smaller micro-batch once, said in the report; then an error by name.

The device is faked: more windows than it takes raise torch's own error.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import families
import pytest
import torch
from click.testing import CliRunner

from sparsekit.blockwise import activations
from sparsekit.blockwise.activations import Activations
from sparsekit.blockwise.walk import resident
from sparsekit.cli import main
from sparsekit.errors import ShortageError
from sparsekit.evaluation.evaluate import perplexity
from sparsekit.models.view import ModelView
from sparsekit.stats import Gram
from sparsekit.training.loop import Fit

SEQ = 16


def limited(true, most: int):
    """A method of a view or a fit that has no memory for more than some windows; the last tensor tells how many."""

    def method(self, *arguments):
        windows = next(value for value in reversed(arguments) if isinstance(value, torch.Tensor))
        if len(windows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")
        return true(self, *arguments)

    return method


@pytest.fixture
def stream(random_model):
    view = ModelView.open(random_model, device="cpu")
    tokens = torch.randint(0, 100, (10, SEQ), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        stream = Activations.begin(view, tokens)
        assert stream.micro_batch == 10
        with resident(view, 0, view.dense_block(0)):
            yield stream


def test_statistics_and_the_advance_are_those_of_larger_batches(stream, monkeypatch):
    groups = stream.view.groups(0, *stream.sample(0))
    expected = stream.collect(0, groups, Gram)
    entered = stream.hidden.clone()
    stream.advance(0)
    left = stream.hidden.clone()
    stream.hidden.copy_(entered)
    stream.block = 0
    monkeypatch.setattr(ModelView, "run_block", limited(ModelView.run_block, 5))
    found = stream.collect(0, groups, Gram)
    (told,) = stream.remarks
    assert told == "the device ran out of memory with 10 windows in a forward; 5 from there on"
    for own, other in zip(found, expected, strict=True):
        assert own.tokens == other.tokens
        assert torch.allclose(own.matrix, other.matrix, rtol=1e-4, atol=1e-6)
    stream.advance(0)
    assert torch.allclose(stream.hidden, left, rtol=1e-4, atol=1e-6)


def test_forwards_end_where_nothing_more_is_collected(stream):
    groups = stream.view.groups(0, *stream.sample(0))
    expected = stream.collect(0, groups, Gram)
    called = Counter()
    for name, linear in stream.view.linears(0).items():
        linear.register_forward_hook(lambda module, x, y, name=name: called.update([name.rpartition(".")[2]]))
    stream.micro_batch = 2
    found = stream.collect(0, groups, Gram)
    assert called == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 5),
        "down_proj": 1,
    }
    for own, other in zip(found, expected, strict=True):
        assert own.tokens == other.tokens
        assert torch.allclose(own.matrix, other.matrix, rtol=1e-4, atol=1e-6)
    called.clear()
    stream.collect(0, groups[:1], Gram)
    assert called["q_proj"] == called["o_proj"] == 1


def test_norms_are_one_operation_where_that_is_quicker(stream, monkeypatch):
    groups = stream.view.groups(0, *stream.sample(0))
    block = stream.view.module.get_submodule(stream.view.blocks[0])
    true, calls = type(block.input_layernorm).forward, []
    monkeypatch.setattr(
        type(block.input_layernorm), "forward", lambda self, x: (calls.append(len(x)), true(self, x))[1]
    )
    expected, plain = stream.collect(0, groups, Gram), len(calls)
    monkeypatch.setattr(activations, "QUICK", ("cpu",))
    found = stream.collect(0, groups, Gram)
    assert plain == 2 and calls[plain:] == [3, 3]  # each was tried on three tokens, and then replaced
    for own, other in zip(found, expected, strict=True):
        assert torch.allclose(own.matrix, other.matrix, rtol=1e-4, atol=1e-6)
    stream.advance(0)
    assert calls[plain:] == [3, 3] * 2
    block.input_layernorm(stream.hidden)
    assert calls[-1] == len(stream.hidden)  # it is itself again


@pytest.mark.parametrize("family", families.MIXTURES)
def test_experts_get_all_their_tokens(family, tmp_path):
    view = ModelView.open(families.save(family, tmp_path), device="cpu")
    tokens = torch.randint(0, 128, (12, 5), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        stream = Activations.begin(view, tokens)
        with resident(view, 0, view.dense_block(0)):
            groups = view.groups(0, *stream.sample(0))
            expected = stream.collect(0, groups, Gram)
            for stream.micro_batch in (1, 3):
                for own, other in zip(stream.collect(0, groups, Gram), expected, strict=True):
                    assert own.tokens == other.tokens
                    assert torch.allclose(own.matrix, other.matrix, rtol=1e-3, atol=1e-5)


def test_an_advance_that_fails_halfway_does_not_begin_again(stream, monkeypatch):
    entered = stream.hidden.clone()
    stream.advance(0)
    left = stream.hidden.clone()
    stream.hidden.copy_(entered)
    stream.block, stream.micro_batch = 0, 4
    calls, true = [], ModelView.run_block

    def run_block(self, index, hidden, call):
        calls.append(len(hidden))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true(self, index, hidden, call)

    monkeypatch.setattr(ModelView, "run_block", run_block)
    stream.advance(0)
    assert calls == [4, 4, 2, 2, 2]
    assert torch.allclose(stream.hidden, left, rtol=1e-4, atol=1e-6)


def test_a_second_shortage_is_an_error_by_name(stream, monkeypatch):
    groups = stream.view.groups(0, *stream.sample(0))
    monkeypatch.setattr(ModelView, "run_block", limited(ModelView.run_block, 1))
    with pytest.raises(ShortageError, match=r"too little memory: CUDA out of memory\. Tried to allocate 2\.00 GiB"):
        stream.collect(0, groups, Gram)
    stream.micro_batch = 1
    monkeypatch.setattr(ModelView, "run_block", limited(ModelView.run_block, 0))
    with pytest.raises(ShortageError, match="of one window"):
        stream.collect(0, groups, Gram)


def test_perplexity_goes_on_from_the_window_where_it_failed():
    windows = torch.randint(0, 50, (7, SEQ), generator=torch.Generator().manual_seed(0))
    table = torch.randn(50, 50, generator=torch.Generator().manual_seed(1))

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        return table[tokens]

    def short(tokens: torch.Tensor) -> torch.Tensor:
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(tokens)

    seen: list[tuple[int, int]] = []
    expected = perplexity(forward, windows, batch=4, progress=lambda *_: None)
    found = perplexity(short, windows, batch=4, progress=lambda *at: seen.append(at))
    assert torch.equal(found.losses, expected.losses)
    assert seen[-1] == (7, 7)
    assert found.as_dict()["note"].endswith("with 4 windows in a forward; 2 from window 0 on")
    assert "note" not in expected.as_dict()


RECIPE = """\
name: short
output: {output}
model: {{path: {model}, device: cpu}}
data:
  calibration: {{path: builtin:calibration, samples: 8, seq_len: 32}}
  train: {{path: builtin:train, seq_len: 32, samples: 64}}
  evaluation: {{heldout: {{path: builtin:heldout, seq_len: 32, samples: 4}}}}
steps:
  - {{method: ast, pattern: "2:4", tokens: 1024, batch: 4, micro_batch: 4}}
  - {{method: gptq, bits: 4, group_size: 16, schedule: {schedule}}}
evaluate: {{perplexity: [heldout]}}
"""


@pytest.mark.parametrize("schedule", ["block", "group"])
def test_a_run_tells_in_its_report_where_memory_was_short(tmp_path, random_model, monkeypatch, schedule):
    recipe: Path = tmp_path / "short.yaml"
    recipe.write_text(RECIPE.format(output=tmp_path / "run", model=random_model, schedule=schedule))
    short_of_memory(monkeypatch, 4)
    monkeypatch.setattr(Fit, "_loss", limited(Fit._loss, 2))
    result = CliRunner().invoke(main, ["run", str(recipe)])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    trained, quantized = report["steps"]
    assert trained["training"]["out_of_memory"] == "micro_batch 4 did not fit the device at step 0; 2 from there on"
    assert any(note.startswith("training: micro_batch 4") for note in trained["notes"])
    assert sum("with 8 windows in a forward; 4 from there on" in note for note in quantized["notes"]) == 1
    assert "8 windows in a forward" in (tmp_path / "run" / "report.html").read_text()


def short_of_memory(monkeypatch, most: int) -> None:
    """Blocks take no more than some windows, but for the look at their structure, which takes one micro-batch."""
    true, groups, looking = ModelView.run_block, ModelView.groups, []

    def run_block(self, index, hidden, call):
        if len(hidden) > most and not looking:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true(self, index, hidden, call)

    def look(self, *arguments):
        looking.append(True)
        try:
            return groups(self, *arguments)
        finally:
            looking.pop()

    monkeypatch.setattr(ModelView, "run_block", run_block)
    monkeypatch.setattr(ModelView, "groups", look)


def test_a_shortage_nobody_expected_has_no_traceback(tmp_path, random_model, monkeypatch):
    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    recipe: Path = tmp_path / "short.yaml"
    recipe.write_text(RECIPE.format(output=tmp_path / "run", model=random_model, schedule="block"))
    monkeypatch.setattr(ModelView, "materialise_all", short)
    result = CliRunner().invoke(main, ["run", str(recipe)])
    assert result.exit_code == 2
    assert "error: the device has too little memory" in result.output
    assert "Traceback" not in result.output
