"""The numerics ladder: each rung by itself, as far as the recipe allows, noted and counted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from sparsekit.checkpoint import BlockState, StepStore
from sparsekit.cli import main
from sparsekit.errors import NumericsError
from sparsekit.ladder import RUNGS, Ladder, counted, finite, rungs_of
from sparsekit.methods.awq import awq
from sparsekit.methods.gptq import gptq
from sparsekit.methods.rtn import rtn
from sparsekit.methods.sparsegpt import sparsegpt
from sparsekit.methods.wanda import wanda
from sparsekit.pattern import Pattern
from sparsekit.state import Group, LinearState
from sparsekit.stats import Gram, InputNorm

CPU = torch.device("cpu")
IN = 16


def activations(count: int = 64) -> torch.Tensor:
    return torch.randn(count, IN, generator=torch.Generator().manual_seed(1))


def layer() -> LinearState:
    return LinearState("block.linear", torch.randn(8, IN, generator=torch.Generator().manual_seed(2)))


def collected(kind: type, x: torch.Tensor):
    statistic = kind.empty(x.shape[1], CPU)
    statistic.update(x)
    return statistic


def mended(highest: str, x: torch.Tensor, kind: type = Gram):
    again = lambda: collected(kind, x[torch.isfinite(x).all(-1)])  # noqa: E731
    return Ladder(highest).mend(collected(kind, x), again)


def test_finite_statistics_are_left_alone():
    for rung in RUNGS:
        statistic, notes = mended(rung, activations())
        assert notes == ()
        assert torch.equal(statistic.sum, collected(Gram, activations()).sum)


def test_rung_none_allows_no_more_damping():
    few = activations(4)  # 4 tokens cannot make a 16 x 16 matrix regular
    statistic, _ = mended("none", few)
    with pytest.raises(NumericsError, match="not positive definite even with damping 0"):
        gptq(layer(), statistic, group_size=16, damp=0.0)
    statistic, _ = mended("damping", few)
    (note,) = gptq(layer(), statistic, group_size=16, damp=0.0).notes
    assert rungs_of([note]) == ("damping",)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("kind", [Gram, InputNorm])
def test_inf_and_nan_are_errors_that_name_the_next_rung(value, kind):
    x = activations()
    x[3, 5] = value
    for rung in ("none", "damping"):
        with pytest.raises(NumericsError, match=r"not finite.*max_rung: tokens"):
            mended(rung, x, kind)


@pytest.mark.parametrize("kind", [Gram, InputNorm])
def test_rung_tokens_leaves_them_out(kind):
    x = activations()
    x[3, 5], x[9, 0] = float("nan"), float("inf")
    statistic, notes = mended("tokens", x, kind)
    assert notes == ("2 of 64 tokens were not finite and were left out",)
    assert rungs_of(notes) == ("tokens",)
    assert torch.allclose(statistic.norm, x[torch.isfinite(x).all(-1)].square().mean(0).sqrt())


def test_rung_columns_takes_inputs_out_of_the_repair_and_keeps_their_weights():
    x = activations()
    x[:, 5] = float("inf")  # in every token: leaving tokens out leaves none
    with pytest.raises(NumericsError, match="max_rung: columns"):
        mended("tokens", x)
    statistic, notes = mended("columns", x)
    (note,) = notes
    assert note == "1 of 16 inputs were not finite; they were taken as uncorrelated and as large as the largest other"
    assert rungs_of(notes) == ("columns",)
    assert finite(statistic)
    assert float(statistic.norm[5]) == pytest.approx(float(statistic.norm.max()))
    quantized = gptq(layer(), statistic, group_size=16, bits=8)
    assert torch.allclose(quantized.weight[:, 5], rtn(layer(), group_size=16, bits=8).weight[:, 5])
    norm, _ = mended("columns", x, InputNorm)
    pruned = wanda(layer(), norm)
    assert Pattern(2, 4).violations(pruned.weight) == 0


def test_sums_that_overflow_are_columns_too():
    x = activations()
    x[:, 2] = 1e20  # finite, and its square is not in float32
    statistic, notes = mended("columns", x)
    assert rungs_of(notes) == ("columns",)
    assert torch.isfinite(sparsegpt(layer(), statistic).weight).all()


def test_rung_diagonal_when_nothing_is_finite():
    x = torch.full((8, IN), float("nan"))
    with pytest.raises(NumericsError, match="max_rung: diagonal"):
        mended("columns", x)
    statistic, notes = mended("diagonal", x)
    assert rungs_of(notes) == ("diagonal",)
    plain = rtn(layer(), group_size=16)
    assert torch.equal(gptq(layer(), statistic, group_size=16).weight, plain.weight)
    norm, _ = mended("diagonal", x, InputNorm)
    assert torch.equal(wanda(layer(), norm).mask, Pattern(2, 4).keep(layer().source.abs()))
    group = awq(Group({"block.linear": layer()}, why="nothing before it"), statistic, group_size=16)
    assert torch.isfinite(group.linears["block.linear"].weight).all()


def test_rung_diagonal_when_no_damping_helps():
    gram = collected(Gram, activations())
    gram.sum.diagonal().mul_(-1)  # no Gram matrix of anything
    given = layer()
    call = lambda state, known: gptq(state, known, group_size=16)  # noqa: E731
    with pytest.raises(NumericsError, match="even with damping"):
        Ladder("columns").apply(call, given, given.noted, gram)
    found = Ladder("diagonal").apply(call, given, given.noted, gram)
    assert "diagonal" in rungs_of(found.notes)
    assert torch.isfinite(found.weight).all()


def test_weights_that_are_not_finite_stop_every_ladder():
    given = LinearState("block.linear", layer().source.index_fill(1, torch.tensor([3]), float("nan")))
    gram = collected(Gram, activations())
    with pytest.raises(NumericsError, match=r"block\.linear: weights are not finite"):
        Ladder("diagonal").apply(lambda state, known: gptq(state, known, group_size=16), given, given.noted, gram)


def test_a_statistic_of_a_plugin_gets_no_further_than_tokens():
    class Own:
        def __init__(self) -> None:
            self.tokens, self.most = 0, torch.full((IN,), float("nan"))

    with pytest.raises(NumericsError, match="no rung of the ladder helps"):
        Ladder("diagonal").mend(Own(), Own)


@pytest.mark.parametrize("method", [gptq, sparsegpt])
def test_dead_columns_are_noted_and_counted(method):
    x = activations()
    x[:, 4:7] = 0
    options = {"group_size": 16} if method is gptq else {}
    found = method(layer(), collected(Gram, x), **options)
    assert rungs_of(found.notes) == ("dead inputs",)
    assert not found.weight[:, 4:7].any()


def test_rows_of_zeros_stay_rows_of_zeros():
    given = LinearState("block.linear", layer().source.index_fill(0, torch.tensor([2, 3]), 0.0))
    gram = collected(Gram, activations())
    for found in (gptq(given, gram, group_size=16), rtn(given, group_size=16), sparsegpt(given, gram)):
        assert torch.isfinite(found.weight).all()
        assert not found.weight[2:4].any()


def test_values_that_float16_cannot_hold_are_an_error_by_name(tmp_path):
    state = LinearState("block.linear", torch.full((4, 4), 7e4))
    with pytest.raises(NumericsError, match=r"block\.linear: values up to 70000 do not fit float16"):
        StepStore(tmp_path, torch.float16).commit_block(0, BlockState({"block.linear": state}), [])
    assert list(tmp_path.iterdir()) == []
    StepStore(tmp_path, torch.bfloat16).commit_block(0, BlockState({"block.linear": state}), [])


def test_counts_are_by_layer():
    layers = [{"rungs": ["tokens", "damping"]}, {"rungs": ["tokens", "tokens"]}, {"rungs": []}, {}]
    assert counted(layers) == {"damping": 1, "tokens": 2}


RECIPE = """\
name: ladder
output: {output}
model: {{path: {model}, dtype: {dtype}, compute_dtype: {dtype}, device: cpu}}
data: {{calibration: {{path: builtin:calibration, samples: 4, seq_len: 16}}}}
numerics: {{max_rung: {rung}}}
steps: [{{method: {method}}}]
export: {{formats: [gptq]}}
"""


def run(tmp_path: Path, model: Path, rung: str, method: str, dtype: str = "float32") -> tuple[int, str]:
    recipe = tmp_path / "ladder.yaml"
    recipe.write_text(
        RECIPE.format(output=tmp_path / f"out-{rung}", model=model, rung=rung, method=method, dtype=dtype)
    )
    result = CliRunner().invoke(main, ["run", str(recipe)])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def overflowing(random_model, tmp_path_factory) -> Path:
    """A model whose first MLP overflows float16 on some tokens: its products pass 65504, its weights do not."""
    directory = tmp_path_factory.mktemp("overflowing")
    for path in random_model.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    for part in ("gate", "up"):
        tensors[f"model.layers.0.mlp.{part}_proj.weight"] *= 640
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("schedule", ["block", "group"])
def test_a_run_fails_by_layer_name_or_climbs_and_tells(tmp_path, overflowing, schedule):
    method = f"gptq, group_size: 16, schedule: {schedule}"
    code, output = run(tmp_path, overflowing, "damping", method, "float16")
    assert code == 2
    assert re.search(r"model\.layers\.\d\.\w+\.\w+: calibration activations are not finite", output), output
    code, output = run(tmp_path, overflowing, "diagonal", method, "float16")
    assert code == 0, output
    report = json.loads((tmp_path / "out-diagonal" / "report.json").read_text())
    (step,) = report["steps"]
    used = step["numerics"]
    assert set(used) & {"tokens", "columns", "diagonal"}
    assert step["violations"] == 0
    for kind, count in used.items():
        assert sum(kind in layer["rungs"] for layer in step["layers"]) == count
        assert f"{kind} on {count}" in (tmp_path / "out-diagonal" / "report.html").read_text()
    assert "numerics: " in output
