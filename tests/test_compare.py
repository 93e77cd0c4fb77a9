"""Comparisons: arms of a file, recipes, finished runs; what is shared, what is refused, what is written."""

from __future__ import annotations

import csv
import json
import math
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from sparsekit.cli import main
from sparsekit.errors import RecipeError
from sparsekit.recipe.variants import read_arms
from sparsekit.reporting.comparison import comparison_of
from sparsekit.reporting.comparison_page import html, lead, markdown, rows
from sparsekit.reporting.comparison_tables import interval, quality_table
from sparsekit.terminal.compare import ComparisonTerminal, cost, quality

BASE = """\
name: {name}
seed: {seed}
output: {output}
model: {{path: {model}}}
data:
  calibration: {{path: builtin:calibration, samples: {samples}, seq_len: 32}}
  train: {{path: builtin:train, seq_len: 32, samples: 64}}
  evaluation:
    heldout: {{path: builtin:heldout, seq_len: 32, samples: {windows}}}
{steps}
evaluate: {{perplexity: [heldout]}}
export: {{formats: [{formats}]}}
"""
VARIANTS = """\
variants:
  prune:
    wanda: {method: wanda, pattern: "2:4"}
    ast: {method: ast, pattern: "2:4", tokens: 1024, batch: 4, micro_batch: 4, mask_every: 2}
  quantize:
    none:
    gptq: {method: gptq, bits: 4, group_size: 16}
"""
BOOM = """\
import sparsekit as sk

@sk.linear_method("boom", kind="prune")
def boom(layer: sk.LinearState, /, *, pattern: sk.Pattern = sk.Pattern(2, 4)) -> sk.LinearState:
    \"\"\"Fails.\"\"\"
    raise ValueError("boom")
"""
WANDA = 'steps: [{method: wanda, pattern: "2:4"}]'
MAGNITUDE = 'steps: [{method: magnitude, pattern: "2:4"}]'


def write(path: Path, model: Path, steps: str, **changes: object) -> Path:
    values = {"name": path.stem, "seed": 0, "samples": 4, "windows": 8, "formats": "dense", **changes}
    text = BASE.format(model=model, steps=steps, output=path.with_suffix(""), **values)
    path.write_text(text)
    return path


def compare(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["compare", *map(str, arguments)])
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


@pytest.fixture(scope="module")
def compared(tmp_path_factory, random_model) -> Path:
    """A comparison of four arms of one file."""
    directory = tmp_path_factory.mktemp("compare")
    compare(write(directory / "pruners.yaml", random_model, VARIANTS, formats="dense, gptq"))
    return directory / "pruners"


def test_every_combination_is_an_arm_and_shared_steps_are_done_once(compared):
    data = json.loads((compared / "comparison.json").read_text())
    assert [arm["name"] for arm in data["arms"]] == ["wanda", "wanda-gptq", "ast", "ast-gptq"]
    steps = sorted(path.name[:7] for path in (compared / "steps").iterdir())
    assert steps == ["1-ast-" + steps[0][6], "1-wanda", "2-gptq-", "2-gptq-"]
    assert len(list((compared / "tokens").iterdir())) == 3
    assert (compared / "dense" / "perplexity.json").exists()
    by_name = {arm["name"]: arm for arm in data["arms"]}
    assert by_name["wanda"]["steps"][0] == by_name["wanda-gptq"]["steps"][0]


def test_arms_hold_every_number(compared):
    data = json.loads((compared / "comparison.json").read_text())
    for arm in data["arms"]:
        found, change = arm["perplexity"]["heldout"], arm["against_dense"]["heldout"]
        assert found["agreement"]["kl"] > 0
        assert 0 <= found["agreement"]["top1"] <= 1
        assert change["low"] < change["value"] < change["high"]
        assert change["windows"] == 8
        assert arm["violations"] == 0
        assert arm["groups"] > 0
        assert arm["bytes"] == sum(path.stat().st_size for path in smallest(compared, arm).glob("*.safetensors"))
        assert arm["seconds"] > 0
        assert arm["peak_memory"] > 0
    best = data["best"]["heldout"]
    lowest = min(data["arms"], key=lambda arm: arm["perplexity"]["heldout"]["perplexity"])
    assert best == lowest["name"]
    assert lowest["against_best"]["heldout"]["value"] == 0
    assert "wanda: no gptq export, since no step quantizes" in data["notes"]
    trained = json.loads((compared / "arms" / "ast" / "report.json").read_text())["basis"]
    assert data["basis"]["calibration"]  # of the arms that read it
    assert data["basis"]["train"] == trained["train"] is not None
    assert "null" not in (compared / "comparison.html").read_text().partition("have in common</h2>")[2][:2000]


def smallest(compared: Path, arm: dict) -> Path:
    return compared / "arms" / arm["name"] / "export" / arm["format"]


def test_page_stands_alone_and_shows_the_dense_row(compared):
    page = (compared / "comparison.html").read_text()
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    assert page.count("<svg") == 1 + 3 + 4  # the Pareto plot, training curves, a map for each different step
    assert page.index(">dense<") < page.index(">wanda<")
    assert "Speed was not measured" in page


def test_what_arms_have_in_common_is_told_line_by_line(compared):
    told = (compared / "comparison.md").read_text().partition("## What all arms have in common")[2]
    common = told.partition("## Environment")[0]
    assert "| perplexity heldout |" in common
    assert "{" not in common


def test_the_terminal_shows_zero_shot_tasks_too(compared):
    data = json.loads((compared / "comparison.json").read_text())
    found = {"acc": 0.5, "acc_stderr": 0.1, "documents": {"n": 20, "truncated": 0, "correct": {}}}
    for model in (data["dense"], *data["arms"]):
        model["tasks"] = {"piqa": found}
    with (console := Console(width=100)).capture() as capture:
        ComparisonTerminal(console).compared(data, {})
    assert "Zero-shot tasks" in capture.get()
    assert "0.500 ± 0.100" in capture.get()


def test_terminal_and_page_name_the_gates_that_arms_missed(compared):
    data = json.loads((compared / "comparison.json").read_text())
    data["arms"][1]["gates"] = [{"text": "heldout +9.0 %, at most +5.0 %", "passed": False}]
    told = f"{data['arms'][1]['name']}: heldout +9.0 %, at most +5.0 %"
    with (console := Console(width=100)).capture() as capture:
        ComparisonTerminal(console).compared(data, {})
    assert f"missed    {told}" in capture.get()
    assert told in html(data)


def test_csv_has_a_row_for_each_arm_and_markdown_the_tables(compared):
    table = list(csv.DictReader((compared / "comparison.csv").read_text().splitlines()))
    assert [row["arm"] for row in table] == ["dense", "wanda", "wanda-gptq", "ast", "ast-gptq"]
    assert float(table[2]["heldout.against_dense.low"]) < float(table[2]["heldout.against_dense.high"])
    assert int(table[1]["bytes"]) > 0
    text = (compared / "comparison.md").read_text()
    assert "## Quality on heldout" in text
    assert "## Size and cost" in text


def test_repeating_a_comparison_computes_nothing(compared, random_model):
    stamps = {path: path.stat().st_mtime_ns for path in (compared / "steps").rglob("*")}
    output = compare(compared.with_suffix(".yaml"))
    assert output.count("done before") == 6
    assert stamps == {path: path.stat().st_mtime_ns for path in (compared / "steps").rglob("*")}


def test_finished_runs_are_compared_by_their_reports(compared, tmp_path, monkeypatch):
    arms = compared / "arms"
    compare(arms / "wanda", arms / "ast-gptq", "--out", tmp_path)
    data = json.loads((tmp_path / "comparison.json").read_text())
    assert [arm["name"] for arm in data["arms"]] == ["wanda", "ast-gptq"]
    monkeypatch.chdir(arms / "wanda")
    compare(".", "../ast")
    assert Path("runs/compare-wanda-ast/comparison.html").is_file()
    other = json.loads((arms / "wanda" / "report.json").read_text())
    other["basis"]["seed"] = 7
    other["basis"]["perplexity"]["heldout"] = "another"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.json").write_text(json.dumps(other))
    output = compare(arms / "ast", tmp_path / "other", "--out", tmp_path, code=2)
    assert "cannot be compared: the seed of wanda" in output
    assert "the evaluation texts of wanda" in output
    output = compare(arms / "ast", arms / "wanda", arms / "ast", "--out", tmp_path, code=2)
    assert f"{arms / 'ast'}: the run is given twice" in output


def test_two_recipes_of_random_models_take_seconds(tmp_path, random_model):
    start = time.monotonic()
    one = write(tmp_path / "one.yaml", random_model, WANDA)
    two = write(tmp_path / "two.yaml", random_model, MAGNITUDE)
    compare(one, two, "--out", tmp_path / "out")
    assert time.monotonic() - start < 20
    data = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [arm["name"] for arm in data["arms"]] == ["one", "two"]


@pytest.mark.parametrize(
    ("changes", "told", "values"),
    [
        ({"seed": 1}, "the seed of two", "differ: 1 and 0"),
        ({"samples": 5}, "the calibration text of two", 'differ: {"samples": 5} and {"samples": 4}'),
        ({"windows": 9}, "the evaluation texts of two", '{"heldout": {"samples": 9}} and {"heldout": {"samples": 8}}'),
    ],
)
def test_recipes_that_differ_are_refused_with_both_places(tmp_path, random_model, changes, told, values):
    one = write(tmp_path / "one.yaml", random_model, WANDA)
    two = write(tmp_path / "two.yaml", random_model, WANDA, **changes)
    output = compare(one, two, "--out", tmp_path / "out", code=2)
    assert f"cannot be compared: {told}" in output
    assert values in output
    assert f"{one}:" in output
    assert f"error: {two}:" in output
    assert not (tmp_path / "out").exists()


def test_another_model_is_refused_and_a_text_nobody_reads_is_not(tmp_path, random_model):
    one = write(tmp_path / "one.yaml", random_model, WANDA)
    two = write(tmp_path / "two.yaml", "builtin:tiny", WANDA)
    assert "cannot be compared: the model of two" in compare(one, two, "--out", tmp_path / "out", code=2)
    three = write(tmp_path / "three.yaml", random_model, MAGNITUDE, samples=6)
    compare(one, three, "--out", tmp_path / "out")  # magnitude reads no calibration text


def test_mistakes_of_a_comparison_file_have_their_lines(tmp_path, random_model):
    path = write(tmp_path / "bad.yaml", random_model, VARIANTS.replace("bits: 4", "bitz: 4"))
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "bitz" in text)
    with pytest.raises(RecipeError, match=f"bad.yaml:{line}: unknown key 'bitz'"):
        read_arms([path])
    path = write(tmp_path / "slash.yaml", random_model, VARIANTS.replace("gptq: {", "int4/g16: {"))
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "int4/g16" in text)
    with pytest.raises(RecipeError, match=f"slash.yaml:{line}: choice 'int4/g16' must be letters"):
        read_arms([path])
    path = write(tmp_path / "none.yaml", random_model, "variants: {prune: {none: }}")
    shown = CliRunner().invoke(main, ["plan", str(path)])
    assert shown.exit_code == 2
    assert "give it to sparsekit compare" in " ".join(shown.output.split())
    with pytest.raises(RecipeError, match="chooses nothing"):
        read_arms([path])
    path = write(tmp_path / "steps.yaml", random_model, "steps: {method: rtn}\n" + VARIANTS)
    with pytest.raises(RecipeError, match=r"steps.yaml:\d+: steps is a mapping, expected a list"):
        read_arms([path])
    with pytest.raises(RecipeError, match="one recipe is nothing to compare"):
        read_arms([write(tmp_path / "plain.yaml", random_model, WANDA)])


def test_unmeasured_and_infinite_numbers_are_shown_as_such(compared):
    reports = {
        name: json.loads((compared / "arms" / name / "report.json").read_text()) for name in ("wanda", "ast-gptq")
    }
    for key in ("perplexity", "loss"):
        reports["wanda"]["final"]["heldout"][key] = None
    del reports["ast-gptq"]["final"]["heldout"]["agreement"]
    reports["wanda"]["exports"] = []
    data = comparison_of("<b>odd & name</b>", reports, ["note <i>"])
    assert data["best"]["heldout"] == "ast-gptq"
    page, table = html(data), list(csv.DictReader(rows(data).splitlines()))
    assert "<b>odd" not in page
    assert "note &lt;i&gt;" in page
    assert table[1]["bytes"] == ""
    assert "not measured" in page
    assert markdown(data)


def test_an_arm_without_steps_is_the_dense_model(tmp_path, random_model):
    plain = write(tmp_path / "plain.yaml", random_model, "steps: []")
    other = write(tmp_path / "other.yaml", random_model, MAGNITUDE)
    output = compare(plain, other, "--out", tmp_path / "out")
    table = list(csv.DictReader((tmp_path / "out" / "comparison.csv").read_text().splitlines()))
    assert [row["peak_memory"] == "" for row in table] == [True, True, False]
    assert "no smaller than dense" in " ".join(output.split())


def test_an_end_of_an_interval_has_its_unit_where_it_is_not_that_of_the_middle():
    found = {"certain": True, "windows": 4}
    assert interval({**found, "value": 4.594, "low": 1.002, "high": 15.0}).text == "+459.4\u00a0% [+100.2, ×\u00a016]"
    assert interval({**found, "value": 12.0, "low": 8.5, "high": 15.0}).text == "×\u00a013 [+850.0\u00a0%, 16]"


def test_an_arm_that_fails_leaves_a_comparison_of_those_before_it(tmp_path, random_model):
    one = write(tmp_path / "one.yaml", random_model, MAGNITUDE)
    plugin = tmp_path / "boom.py"
    plugin.write_text(BOOM)
    two = write(tmp_path / "two.yaml", random_model, 'steps: [{method: boom, pattern: "2:4"}]')
    output = compare(one, two, "--plugin", plugin, "--out", tmp_path / "out", code=2)
    assert "error: model.layers.0.self_attn.q_proj: method boom failed" in output
    data = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [arm["name"] for arm in data["arms"]] == ["one"]
    assert "not in this comparison: two" in data["notes"][0]


def test_long_names_of_arms_leave_the_numbers_on_the_screen(compared):
    data = json.loads((compared / "comparison.json").read_text())
    long = {**data, "arms": [{**arm, "name": arm["name"] * 20} for arm in data["arms"]]}
    console = Console(width=80, record=True)
    for table in (quality(long, "heldout"), cost(long)):
        console.print(table)
    shown, whole = console.export_text(), quality_table(data, "heldout").rows
    assert all(row[2].text in shown for row in whole)
    assert "…" not in shown


def test_the_lead_promises_no_smaller_file_than_there_is(compared):
    data = json.loads((compared / "comparison.json").read_text())
    held = data["dense"]["bytes"]
    arms = [{**arm, "bytes": held + 6_000} for arm in data["arms"] if arm["name"] == data["best"]["heldout"]]
    assert "no smaller than dense. 0 broken N:M groups in 1 arm." in lead({**data, "arms": arms})


def test_agreement_is_that_of_the_exports(compared):
    """KL and top-1 recomputed with plain Transformers from the exported weights."""
    from transformers import AutoModelForCausalLM

    from sparsekit.files import read_tensors

    data = json.loads((compared / "comparison.json").read_text())
    told = next(arm for arm in data["arms"] if arm["name"] == "ast-gptq")["perplexity"]["heldout"]["agreement"]
    dense = AutoModelForCausalLM.from_pretrained(data["model"]["path"], dtype=torch.float32)
    student = AutoModelForCausalLM.from_pretrained(compared / "arms" / "ast-gptq" / "export" / "dense")
    windows = heldout(compared, read_tensors)
    with torch.no_grad():
        theirs, ours = (model(input_ids=windows).logits.log_softmax(-1) for model in (dense, student))
    kl = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert told["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert told["top1"] == pytest.approx(float((theirs.argmax(-1) == ours.argmax(-1)).float().mean()))
    assert math.isfinite(told["kl_stderr"])


def heldout(compared: Path, read) -> torch.Tensor:
    """The windows that were scored, by the recipe's own rules."""
    from sparsekit.data import cut
    from sparsekit.recipe import TextEntry

    for path in (compared / "tokens").iterdir():
        tensors, about = read(path)
        if about["text"] == "builtin:heldout":
            entry = TextEntry(path="builtin:heldout", seq_len=32, samples=8)
            return cut(tensors["tokens"].numpy().astype("int32"), entry, "heldout").long()
    raise AssertionError("no tokens of heldout")
