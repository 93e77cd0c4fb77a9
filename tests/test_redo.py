"""Gates that redo the worst layers, and agreement with the dense model as a recipe's option."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from sparsekit.cli import main
from sparsekit.errors import RecipeError
from sparsekit.recipe import read_recipe
from sparsekit.redo import rounds, worst_layers
from sparsekit.reporting.findings import named
from sparsekit.terminal.console import step_line

RECIPE = """\
name: gate
output: {output}
model: {{path: {model}}}
data:
  calibration: {{path: builtin:calibration, samples: 4, seq_len: 32}}
  train: {{path: builtin:train, seq_len: 32, samples: 64}}
  evaluation:
    heldout: {{path: builtin:heldout, seq_len: 32, samples: 8}}
steps: {steps}
evaluate: {{perplexity: [heldout]{evaluate}}}
export: {{formats: [{formats}]}}
"""
RTN = "[{method: rtn, bits: 2, group_size: 16}]"
CHAIN = '[{method: wanda, pattern: "2:4"}, {method: rtn, bits: 2, group_size: 16}]'


def write(tmp_path: Path, model: Path, steps: str, evaluate: str, formats: str = "dense") -> Path:
    path = tmp_path / "gate.yaml"
    text = RECIPE.format(output=tmp_path / "run", model=model, steps=steps, evaluate=evaluate, formats=formats)
    path.write_text(text)
    return path


def run(recipe: Path) -> tuple[int, dict]:
    result = CliRunner().invoke(main, ["run", str(recipe)])
    return result.exit_code, json.loads((recipe.parent / "run" / "report.json").read_text())


def gates(limit: str, redo: str) -> str:
    return f", gates: {{max_ppl_increase: {limit}, redo: {redo}}}"


@pytest.fixture
def missed(monkeypatch):
    """Gates that are always missed: a random model's perplexity does not care about precision."""
    import sparsekit.run

    true = sparsekit.run.gate_row
    monkeypatch.setattr(sparsekit.run, "gate_row", lambda *given: {**true(*given), "passed": False})


@pytest.mark.usefixtures("missed")
def test_the_worst_layers_get_more_bits_until_the_limit_of_layers(tmp_path, random_model):
    code, report = run(write(tmp_path, random_model, RTN, gates("0.0", "{bits: 8, most: 3}")))
    assert code == 3
    first, *redone = report["steps"]
    worst = worst_layers(first["layers"])
    assert [step["redone"]["layers"] for step in redone] == [worst[:1], worst[:2], worst[:3]]
    bits = {layer["name"]: layer["bits"] for layer in redone[-1]["layers"]}
    assert {name for name, held in bits.items() if held == 8} == set(worst[:3])
    assert set(bits.values()) == {2, 8}
    assert redone[-1]["error"] < first["error"]
    assert "repeated with its 3 worst layers quantized with 8 bits" in redone[-1]["notes"][0]
    assert [named(step) for step in redone] == [f"rtn, {n} in 8 bits" for n in ("1 layer", "2 layers", "3 layers")]
    assert "rtn, 3 layers in 8 bits" in (tmp_path / "run" / "report.md").read_text().replace("\u00a0", " ")
    assert report["final"] == redone[-1]["perplexity"]


def test_it_stops_as_soon_as_the_gate_holds(tmp_path, random_model):
    code, report = run(write(tmp_path, random_model, RTN, gates("1000%", "{bits: 8}")))
    assert (code, len(report["steps"])) == (0, 1)
    assert report["gates"][0]["passed"]


@pytest.mark.usefixtures("missed")
def test_layers_left_out_stay_as_the_step_before_had_them(tmp_path, random_model):
    from safetensors import safe_open

    code, report = run(write(tmp_path, random_model, CHAIN, gates("0.0", "{most: 2}"), "dense, gptq"))
    assert code == 3
    last, worst = report["steps"][-1], worst_layers(report["steps"][1]["layers"])
    assert {layer["name"] for layer in last["layers"] if layer["bits"]} == set(worst[2:])
    assert {layer["name"] for layer in last["layers"] if not layer["bits"]} == set(worst[:2])
    assert last["groups"] == report["steps"][0]["groups"]  # theirs are counted again
    assert last["sparsity"] >= 0.5
    assert "gate" not in report["coverage"]  # Wanda has compressed them
    with safe_open(tmp_path / "run" / "export" / "gptq" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        kept = file.get_tensor(f"{worst[0]}.weight")
    assert f"{worst[2]}.qweight" in names
    assert int((kept != 0).reshape(len(kept), -1, 4).sum(-1).max()) <= 2  # Wanda's pattern is still held


@pytest.mark.usefixtures("missed")
def test_layers_that_stay_dense_count_as_dense(tmp_path, random_model):
    steps = '[{method: magnitude, pattern: "2:4"}]'
    _, report = run(write(tmp_path, random_model, steps, gates("0.0", "{most: 2}")))
    first, last = report["steps"][0], report["steps"][-1]
    sizes = {layer["name"]: layer["shape"][0] * layer["shape"][1] for layer in first["layers"]}
    left = sum(sizes[name] for name in worst_layers(first["layers"])[:2])
    assert last["sparsity"] == pytest.approx(0.5 * (1 - left / sum(sizes.values())))
    assert {layer["name"] for layer in last["layers"] if layer["sparsity"] == 0} == set(last["redone"]["layers"])
    coverage = report["coverage"]
    assert (coverage["compressed"], coverage["gate"]) == (sum(sizes.values()) - left, left)
    assert "| left dense for a gate | " + f"{left:,} |" in (tmp_path / "run" / "report.md").read_text()
    console = Console(width=200)
    with console.capture() as captured:
        console.print(step_line(last, cached=False))
    assert f"magnitude, 2 layers left out sparsity {last['sparsity']:.3f}" in " ".join(captured.get().split())


def test_rounds_double():
    assert list(rounds(100, 6)) == [1, 2, 4, 6]
    assert list(rounds(3, 8)) == [1, 2]
    assert list(rounds(1, 4)) == []


@pytest.mark.parametrize(
    ("steps", "evaluate", "formats", "told"),
    [
        (RTN, ", gates: {redo: {bits: 8}}", "dense", "add max_ppl_increase"),
        (RTN, gates("1%", "{bits: 2}"), "dense", "no higher precision"),
        (RTN, gates("1%", "{bits: 8}"), "gptq", "one number of bits"),
        ('[{method: wanda, pattern: "2:4"}]', gates("1%", "{bits: 8}"), "dense", "wanda. has no bits"),
        ('[{method: ast, pattern: "2:4", tokens: 1K}]', gates("1%", "{most: 1}"), "dense", "trains the whole model"),
        (RTN, ", agreement: [heldoout]", "dense", "'heldoout' is not among those.*Did you mean 'heldout'"),
    ],
)
def test_contradictions_are_named(tmp_path, random_model, steps, evaluate, formats, told):
    with pytest.raises(RecipeError, match=told):
        read_recipe(write(tmp_path, random_model, steps, evaluate, formats))


def test_agreement_is_measured_when_asked_for_and_added_later(tmp_path, random_model):
    _, report = run(write(tmp_path, random_model, CHAIN, ""))
    before = report["final"]["heldout"]
    assert "agreement" not in before
    _, report = run(write(tmp_path, random_model, CHAIN, ", agreement: true"))
    after = dict(report["final"]["heldout"])
    agreement = after.pop("agreement")
    assert after == before  # the second forward changes nothing of the first
    assert agreement["kl"] > 0
    assert agreement["tokens"] == 8 * 32
    assert "agreement" not in report["dense"]["heldout"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "KL to dense" in page
