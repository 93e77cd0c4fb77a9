"""The deploy card: measured here, and plain about what was not gained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import sparsekit.evaluation.deploy
from sparsekit.cli import main
from sparsekit.evaluation import deploy
from sparsekit.evaluation.deploy import verdicts

RECIPE = """\
name: {name}
output: {output}
model: {{path: {model}}}
data:
  evaluation:
    heldout: {{path: builtin:heldout, seq_len: 32, samples: 4}}
steps: [{{method: {method}, pattern: "2:4"}}]
evaluate: {{perplexity: [heldout]}}
"""


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(sparsekit.evaluation.deploy, "SECONDS", {"cpu": 0.02, "cuda": 0.02})


def write(tmp_path: Path, model: Path) -> Path:
    path = tmp_path / "deploy.yaml"
    path.write_text(RECIPE.format(name="deploy", output=tmp_path / "run", model=model, method="magnitude"))
    return path


def call(*arguments: object) -> str:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


def test_report_adds_the_card(tmp_path, random_model):
    call("run", write(tmp_path, random_model))
    directory = tmp_path / "run"
    assert "Serving speed was not measured" in (directory / "report.html").read_text()
    assert "not measured" in call("report", directory) + (directory / "report.html").read_text()
    output = call("report", directory, "--deploy")
    card = json.loads((directory / "report.json").read_text())["deploy"]
    assert [(row["form"], row["batch"]) for row in card["speed"]] == [("zeros in place", 1), ("zeros in place", 16)]
    for row in card["speed"]:
        assert row["ratio"] == pytest.approx(row["tokens_per_second"] / row["dense"])
    assert card["memory"]["dense"] == card["memory"]["zeros in place"] > 0
    assert card["bytes"]["dense"] == (directory / "export" / "dense" / "model.safetensors").stat().st_size
    page = (directory / "report.html").read_text()
    assert "no less memory than the dense model" in page
    assert "semi-structured tensors need CUDA" in page
    assert "kernel for packed integers needs CUDA" in page
    assert "Serving speed was not measured" not in page
    assert "zeros in place" in output


def test_compare_measures_every_arm(tmp_path, random_model):
    text = RECIPE.format(name="both", output=tmp_path / "out", model=random_model, method="magnitude")
    (tmp_path / "both.yaml").write_text(
        text.replace('steps: [{method: magnitude, pattern: "2:4"}]', "variants: {prune: {a: {method: magnitude}, "
                     'b: {method: magnitude, pattern: "1:4"}}}')
    )  # fmt: skip
    call("compare", tmp_path / "both.yaml", "--deploy")
    data = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert all(len(arm["deploy"]["speed"]) == 2 for arm in data["arms"])
    one, other = ([row["dense"] for row in arm["deploy"]["speed"]] for arm in data["arms"])
    assert one != other  # the dense model is measured beside every arm
    assert len({arm["deploy"]["memory"]["dense"] for arm in data["arms"]}) == 1
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "dense, tokens/s" in page
    assert "Speed was not measured" not in page


def test_no_speed_up_is_said_plainly():
    def rows(*ratios: float) -> list[dict]:
        return [{"form": "f", "batch": batch, "ratio": ratio} for batch, ratio in zip((1, 16), ratios, strict=True)]

    memory = {"dense": 100, "f": 100}
    said = list(verdicts(rows(1.0, 0.7), memory, []))
    assert said[0] == "f: no speed-up here, 1.00 times the dense model's at best."
    assert "no less memory" in said[1]
    said = list(verdicts(rows(0.6, 1.5), {"dense": 100, "f": 60}, [{"format": "gptq", "bits_per_weight": 4.2}]))
    assert said[0] == "f: 1.50 times at batch 16; no speed-up here at batch 1."
    assert "gptq export were not run" in said[1]


def test_what_lies_within_the_noise_is_no_speed_up():
    figures = deploy._Figures(1, lambda done, total: None)
    for form, speed in ((deploy.DENSE, 100.0), ("f", 110.0), (deploy.DENSE, 120.0)):
        figures._add(form, deploy.PROMPTS, 1, speed)
    (row,) = figures.rows()
    assert (row["dense"], row["ratio"]) == (120.0, pytest.approx(110 / 120))
    assert figures.noise() == pytest.approx(0.2)
    fast = [{"form": "f", "batch": 1, "ratio": 1.15}]
    assert "no speed-up here" in next(verdicts(fast, {"dense": 100, "f": 60}, [], 0.2))
    assert "1.15 times" in next(verdicts(fast, {"dense": 100, "f": 60}, [], 0.1))


def test_a_run_without_its_steps_is_named(tmp_path, random_model):
    call("run", write(tmp_path, random_model))
    next((tmp_path / "run" / "steps").glob("*/DONE")).unlink()
    result = CliRunner().invoke(main, ["report", str(tmp_path / "run"), "--deploy"])
    assert result.exit_code == 2
    assert "missing or damaged; run the recipe again" in result.output


def test_decoding_is_a_verdict_of_its_own():
    form = "2:4 + int4, sparsekit kernel"
    rows = [
        {"form": form, "work": work, "batch": 1, "ratio": ratio}
        for work, ratio in (("prompts", 0.9), ("decoding", 2.5))
    ]
    said = list(verdicts(rows, {"dense": 100, form: 30}, [{"format": "gptq", "bits_per_weight": 4.2}]))
    assert said == [
        f"{form}: no speed-up here, 0.90 times the dense model's at best.",
        f"{form}, decoding: 2.50 times at batch 1.",
    ]
