"""The deploy card: measured here, and plain about what was not gained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import sparsekit.evaluation.deploy
from sparsekit.cli import main
from sparsekit.evaluation import deploy
from sparsekit.evaluation.decoding import figure
from sparsekit.reporting.report import markdown_table
from sparsekit.reporting.speed import sentences, speed_table

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
    assert "Batch 256 was left out" in page
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
    assert "Tokens a second" in page
    assert page.count('scope="rowgroup"') == 1
    assert "Speed was not measured" not in page


def card(*rows: tuple[str, str, int, float], apart: float = 0.0, **memory: int) -> dict:
    """A card of (form, work, batch, ratio) beside a dense model of 100 tokens a second and 100 bytes."""
    speed = [figure(form, batch, (100.0, 100 / (1 + apart)), 100 * ratio, work) for form, work, batch, ratio in rows]
    held = {"dense": 100, **{row[0]: 60 for row in rows}, **memory}
    return {"memory": held, "speed": speed, "notes": ["measured so"]}


def said(**cards: dict) -> list[str]:
    return list(sentences(cards))[1:]


def test_no_speed_up_is_said_plainly():
    none = said(run=card(("f", "prompts", 1, 1.0), ("f", "prompts", 16, 0.7), f=100))
    assert none[0] == "f: no speed-up here, 1.00 times the dense model's speed at best."
    assert none[1] == "f: no less memory than the dense model, 100\u00a0bytes of weights."
    some = said(run=card(("f", "prompts", 1, 0.6), ("f", "prompts", 16, 1.5)))
    assert some == ["f: 1.50 times the dense model's speed at batch 16; no speed-up here at batch 1."]
    exported = [{"format": "gptq", "bits_per_weight": 4.2}]
    assert "gptq export were not run" in next(deploy._not_run(["dense", "f"], exported))
    assert not list(deploy._not_run(["dense", "2:4 + int4, sparsekit kernel"], exported))


def test_several_arms_are_told_together_and_have_their_spread():
    fast, unsure = (card(("f", "prompts", 1, 1.4), ("f", "prompts", 16, 0.9), apart=apart) for apart in (0.01, 0.5))
    spread, gain = said(sure=fast, unsure=unsure)
    assert "up to 50\u00a0% apart, prompts at batch 1 beside unsure; a gain" in spread
    assert gain == (
        "f: 1.40 times the dense model's speed at batch 1 in 1 of 2 arms; no speed-up here at batch 16; other gains "
        "lie within the spread of the dense model's times."
    )


def test_the_table_has_batches_side_by_side():
    first = card(("f", "prompts", 1, 1.4), ("f", "decoding", 1, 0.5), ("f", "prompts", 16, 0.9))
    other = card(("f", "prompts", 1, 1.2), apart=0.5)
    other["speed"][0]["dense"] = 120.0
    table = speed_table({"a": first, "b": other})
    assert [column.title for column in table.columns] == ["arm", "batch 1", "batch 16", "weights in memory"]
    assert [[cell.text.replace("\u00a0", " ") for cell in row] for row in table.rows] == [
        ["dense", "100–120", "100", "100 bytes"],
        ["dense, decoding", "100", "–", "100 bytes"],
        ["f"],
        ["a", "140 (1.40 ×)", "90 (0.90 ×)", "60 bytes"],
        ["b", "120 (1.20 ×)", "–", "60 bytes"],
        ["f, decoding"],
        ["a", "50 (0.50 ×)", "–", "60 bytes"],
    ]
    assert (table.rows[3][1].tone, table.rows[4][1].tone) == ("good", "")
    assert "| **f** |  |  |  |" in markdown_table(table)
    alone = speed_table({"a": first})
    assert [row[0].text for row in alone.rows] == ["dense", "dense, decoding", "f", "f, decoding"]
    assert speed_table({}) is None


def test_what_lies_within_the_noise_is_no_speed_up():
    figures = deploy._Figures(1, lambda done, total: None)
    for form, speed in ((deploy.DENSE, 100.0), ("f", 110.0), (deploy.DENSE, 120.0)):
        figures._add(form, deploy.PROMPTS, 1, speed)
    (row,) = figures.rows()
    assert (row["dense"], row["ratio"]) == (120.0, pytest.approx(110 / 120))
    assert row["apart"] == pytest.approx(0.2)
    spread, none = said(run=card(("f", "prompts", 1, 1.15), apart=0.2))
    assert "up to 20\u00a0% apart, prompts at batch 1; a gain that is smaller" in spread
    assert none.endswith(
        "no speed-up here, 1.15 times the dense model's speed at best, within the spread of its own times."
    )
    assert "f: 1.15 times the dense model's speed at batch 1." in said(run=card(("f", "prompts", 1, 1.15), apart=0.1))


def test_a_gain_is_held_against_the_spread_of_its_own_work_and_batch():
    both = card(("f", "prompts", 1, 1.15), apart=0.3)
    both["speed"] += card(("f", "decoding", 1, 1.4), apart=0.01)["speed"]
    assert [line.partition(":")[0] for line in said(run=both) if "1.40 times" in line] == ["f, decoding"]
    older = {**both, "noise": 0.5, "speed": [{k: v for k, v in row.items() if k != "apart"} for row in both["speed"]]}
    assert not any("1.40 times the dense model's speed at batch" in line for line in said(run=older))


def test_a_run_without_its_steps_is_named(tmp_path, random_model):
    call("run", write(tmp_path, random_model))
    next((tmp_path / "run" / "steps").glob("*/DONE")).unlink()
    result = CliRunner().invoke(main, ["report", str(tmp_path / "run"), "--deploy"])
    assert result.exit_code == 2
    assert "missing or damaged; run the recipe again" in result.output


def test_decoding_is_a_verdict_of_its_own():
    form = "2:4 + int4, sparsekit kernel"
    assert said(run=card((form, "prompts", 1, 0.9), (form, "decoding", 1, 2.5))) == [
        f"{form}: no speed-up here, 0.90 times the dense model's speed at best.",
        f"{form}, decoding: 2.50 times the dense model's speed at batch 1.",
    ]
