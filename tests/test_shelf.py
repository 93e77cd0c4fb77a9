"""Export formats and evaluators of plugins: registered, listed, used, in the manifest, refused by name."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_imports import run

import sparsekit
from sparsekit.cli import main
from sparsekit.errors import CheckpointError, ContractError, MethodError, PluginError, RecipeError
from sparsekit.evaluation.measures import EVALUATORS, Measure, evaluator
from sparsekit.formats import FORMATS, export_format
from sparsekit.formats.own import Own
from sparsekit.quant import Grid, QuantizedWeight
from sparsekit.recipe import read_recipe
from sparsekit.registry import METHODS
from sparsekit.reporting.sections import SECTIONS
from sparsekit.shelf import Origin, Shelf
from sparsekit.state import LinearState
from sparsekit.testing import check_format

PAGE = Path(__file__).parents[1] / "docs" / "write-a-plugin.md"
STEPS = '[{method: magnitude, pattern: "2:4"}, {method: rtn, bits: 3, group_size: 32}]'


@pytest.fixture(autouse=True)
def _shelves(monkeypatch):
    """No trace of a test's formats after it."""
    monkeypatch.setattr(FORMATS, "_things", dict(FORMATS.items()))
    monkeypatch.setattr(EVALUATORS, "_things", dict(EVALUATORS.items()))
    monkeypatch.setattr(SECTIONS, "_things", dict(SECTIONS.items()))
    monkeypatch.setattr(METHODS, "_loaded", set(METHODS._loaded))


def example(name: str, place: Path) -> Path:
    """A plugin of the docs."""
    code = re.search(rf"<!-- test: file {name} -->\n```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)[1]
    path = place / name
    path.write_text(code)
    return path


@pytest.fixture
def plugin(tmp_path) -> Path:
    return example("bytewise.py", tmp_path)


def told(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments))
    return f"{result.exit_code} " + " ".join(result.output.split())


def test_a_format_of_a_plugin_is_exported_read_back_and_named(plugin, random_model, tmp_path):
    METHODS.load_path(plugin)
    code, output, report = run(tmp_path, random_model, STEPS, "bytewise, gptq")
    assert code == 0, output
    export = report["exports"][0]
    assert export["format"] == "bytewise"
    assert export["plugin"] == Origin.of(FORMATS["bytewise"].storage.packs).as_dict()
    assert export["plugin"]["origin"] == str(plugin)
    assert "plugin" not in report["exports"][1]
    assert any(f"export bytewise runs plugin bytewise: {plugin}, sha256" in note for note in report["notes"])
    weights = export["linears"]["weights"]
    assert export["bytes"]["codes"] == weights
    directory = tmp_path / "run" / "export"
    ours, gptq = (sparsekit.load_quantized(directory / name) for name in ("bytewise", "gptq"))
    for linear, state in gptq.items():
        assert ours[linear].quantized.equal(state.quantized)
    code, output, again = run(tmp_path, directory / "bytewise", "[]", "gptq", "again")
    assert code == 0, output
    assert again["final"]["heldout"]["perplexity"] == report["final"]["heldout"]["perplexity"]
    asked = ("generate", str(directory / "bytewise"), "--prompt", "a", "--max-tokens", "2", "--plugin", str(plugin))
    assert told(*asked).startswith("0 "), told(*asked)
    path = next((directory / "bytewise").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="were written"):
        sparsekit.load_quantized(directory / "bytewise")


def test_it_is_listed_and_has_a_page(plugin):
    assert "no method 'bytewise'" in told("methods", "bytewise")
    assert "bytewise export format A byte a code, whatever its bits." in told("methods", "--plugin", str(plugin))
    page = told("methods", "bytewise", "--plugin", str(plugin))
    assert page.startswith("0 bytewise export format") and "Loaded from" in page
    both = told("methods", "gptq")
    assert "quantize, works on one linear" in both and "gptq export format" in both
    schema = json.loads(CliRunner().invoke(main, ["schema", "--plugin", str(plugin)]).output)
    assert "bytewise" in json.dumps(schema["$defs"]["Exports"])


def test_without_the_plugin_its_exports_are_refused_by_name(plugin, random_model, tmp_path, monkeypatch):
    METHODS.load_path(plugin)
    assert run(tmp_path, random_model, STEPS, "bytewise")[0] == 0
    del FORMATS._things["bytewise"]
    said = "quant_method 'bytewise'; sparsekit reads gptq, .* A plugin's format is read where the plugin is named"
    with pytest.raises(CheckpointError, match=said):
        sparsekit.load_quantized(tmp_path / "run" / "export" / "bytewise")
    code, output, _ = run(tmp_path, random_model, STEPS, "bytewise", "gone")
    assert code == 2 and "format 'bytewise' is not one of dense, gptq" in " ".join(output.split())


def test_names_are_taken_once(plugin, tmp_path):
    METHODS.load_path(plugin)
    other = tmp_path / "other.py"
    other.write_text(plugin.read_text())
    with pytest.raises(PluginError, match=rf"export format 'bytewise' of {other} is already registered by {plugin}"):
        METHODS.load_path(other)
    other.write_text(plugin.read_text().replace('"bytewise"', '"gptq"'))
    with pytest.raises(PluginError, match=r"'gptq' .* already registered by sparsekit\.formats\.gptq"):
        METHODS.load_path(other)
    with pytest.raises(PluginError, match="must be lower case letters"):
        export_format("../up", unpack=None, parts={"codes": "codes"})


def test_plugins_that_do_not_keep_their_word_are_named():
    def format_of(pack, unpack=None, parts=None) -> Own:
        return Own("mine", "mine", "mine", parts or {"codes": "codes"}, pack, unpack, None)

    with pytest.raises(PluginError, match=r"parts of mine must say which of codes, positions.*codes: integers"):
        format_of(None, parts={"codes": "integers"})
    with pytest.raises(PluginError, match="returned 'other', and parts has codes"):
        format_of(lambda weight, mask: {"other": None}).pack(None, "v1")
    with pytest.raises(PluginError, match="returned no 'codes'"):
        format_of(lambda weight, mask: {}).pack(None, "v1")
    with pytest.raises(CheckpointError, match="lacks the tensor codes"):
        format_of(None, lambda found, setting: found["codes"]).unpack({}, None)
    for unpack, message in (
        (lambda found, setting: found["codes"][7], "failed: IndexError: index 7 is out of bounds"),
        (lambda found, setting: 1 / 0, "failed: ZeroDivisionError"),
        (lambda found, setting: found.codes, "failed: AttributeError"),
        (lambda found, setting: None, "returned None, expected a QuantizedWeight"),
    ):
        with pytest.raises(CheckpointError, match=f"unpack of mine {message}"):
            format_of(None, unpack).unpack({"codes": torch.zeros(2)}, None)
    for pack, message in (
        (lambda weight, mask: 1 / 0, "failed: ZeroDivisionError: division by zero .*test_shelf.py:"),
        (lambda weight, mask: sys.exit(0), "failed: SystemExit: 0"),
        (lambda weight, mask: None, "returned None, expected tensors by suffix"),
        (lambda weight, mask: {"codes": [1]}, "returned a list as 'codes', expected a tensor"),
    ):
        with pytest.raises(PluginError, match=f"pack of mine {message}"):
            format_of(pack).pack(None, "v1")
    refusing = Own("mine", "mine", "mine", {"codes": "codes"}, None, None, lambda weight: 1 / 0)
    grid = Grid.fit(torch.ones(2, 1, 8), 4)
    weight = QuantizedWeight.of(grid.encode(torch.ones(2, 1, 8)).view(2, 8), grid, group_size=8, symmetric=True)
    with pytest.raises(PluginError, match="refuses of mine failed: ZeroDivisionError"):
        refusing.obstacle(LinearState("", torch.ones(2, 8), quantized=weight), "v1")


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.storage is not None])
def test_formats_of_sparsekit_keep_the_promises(name):
    check_format(name)


def test_broken_formats_are_told_what_to_do(plugin, tmp_path):
    assert "breaks" not in told("check", "bytewise", "--plugin", str(plugin))
    code = plugin.read_text()
    for change, told_of in (
        (
            ('"codes": weight.codes,', '"codes": weight.codes // 2,'),
            "comes_back: 2 bits, .*codes differ when read back",
        ),
        (('"codes": weight.codes,', '"codes": weight.codes.add_(1),'), "repeats: pack modifies the integers"),
        (("parts=PARTS)", 'parts=PARTS, refuses=lambda weight: "no")'), "takes_some: it refuses all of 56 made-up"),
    ):
        name = f"broken_{len(list(tmp_path.iterdir()))}"
        path = tmp_path / f"{name}.py"
        path.write_text(code.replace(*change).replace('"bytewise"', f'"{name}"'))
        with pytest.raises(ContractError, match=told_of):
            check_format(name, plugin=path)
    with pytest.raises(PluginError, match=r"no export format 'gptk'; .*Did you mean 'gptq'"):
        check_format("gptk")
    with pytest.raises(PluginError, match="nothing to check"):
        check_format("dense")


def test_entry_points_are_loaded_when_somebody_looks(monkeypatch):
    asked = []
    monkeypatch.setattr(METHODS, "load_entry_points", lambda: asked.append(1))
    shelf: Shelf = Shelf("thing")
    assert (len(shelf), list(shelf), "x" in shelf) == (0, [], False)
    assert len(asked) >= 3


MEASURED = """\
name: {name}
output: {output}
plugins: [{plugin}]
model: {{path: {model}}}
data:
  evaluation: {{heldout: {{path: builtin:heldout, seq_len: 32, samples: 4}}}}
steps: [{{method: {method}, pattern: "2:4"}}]
evaluate:
  measures: [{measures}]
export: {{formats: [dense]}}
"""
MEASURES = "{evaluator: confidence, text: heldout}, {evaluator: confidence, text: heldout, top: 5}"


def measured(tmp_path: Path, plugin: Path, model: Path, name="one", method="magnitude", measures=MEASURES) -> Path:
    path = tmp_path / f"{name}.yaml"
    values = {"name": name, "output": tmp_path / name, "plugin": plugin, "model": model, "method": method}
    path.write_text(MEASURED.format(**values, measures=measures))
    return path


def test_numbers_of_an_evaluator_stand_in_report_and_comparison(random_model, tmp_path):
    plugin = example("confidence.py", tmp_path)
    recipes = [measured(tmp_path, plugin, random_model, name) for name in ("one", "two")]
    assert all(told("run", str(recipe)).startswith("0 ") for recipe in recipes)
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    titles = ["confidence on heldout", "confidence on heldout (top=5)"]
    assert list(report["measures"]["dense"]) == list(report["measures"]["final"]) == titles
    for arm in report["measures"].values():
        first, five = (arm[title]["probability"] for title in titles)
        assert 0 < first < five < 1
    assert report["measures"]["dense"] != report["measures"]["final"]
    assert any(f"measure confidence on heldout runs plugin confidence: {plugin}" in note for note in report["notes"])
    for page in ("report.md", "report.html"):
        assert "confidence on heldout (top=5)" in (tmp_path / "one" / page).read_text()
    both = told("compare", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "both"))
    assert both.startswith("0 "), both
    assert "confidence on heldout: probability" in (tmp_path / "both" / "comparison.md").read_text()


def test_what_has_not_changed_is_not_measured_again(random_model, tmp_path, monkeypatch):
    plugin, asked, of = example("confidence.py", tmp_path), [], Measure.of

    def counted(measure, forward, windows):
        asked.append(measure.title)
        return of(measure, forward, windows)

    monkeypatch.setattr(Measure, "of", counted)

    def run_with(measures: str) -> dict:
        assert told("run", str(measured(tmp_path, plugin, random_model, measures=measures))).startswith("0 ")
        return json.loads((tmp_path / "one" / "report.json").read_text())["measures"]["dense"]

    first = run_with(MEASURES)
    assert asked == ["confidence on heldout", "confidence on heldout (top=5)"] * 2  # dense and compressed
    assert run_with(MEASURES) == first and len(asked) == 4
    resolved = read_recipe(tmp_path / "one" / "recipe.yaml").evaluate.measures
    assert [measure.params.top for measure in resolved] == [1, 5]
    assert [measure.title for measure in resolved] == asked[:2]
    after = run_with(MEASURES.replace("5", "6"))
    assert asked[4:] == ["confidence on heldout (top=6)"] * 2
    assert list(after) == ["confidence on heldout", "confidence on heldout (top=6)"]
    assert after["confidence on heldout"] == first["confidence on heldout"]


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        ("{evaluator: confidense, text: heldout}", r"no evaluator 'confidense'; there is confidence.*Did you mean"),
        ("{evaluator: confidence}", "text is None, expected a name under data.evaluation"),
        ("{evaluator: confidence, text: held}", "no text 'held' in data.evaluation; there is heldout"),
        ("{evaluator: confidence, text: heldout, topp: 3}", "topp"),
        ("{evaluator: confidence, text: heldout, top: x}", "top"),
        ("{evaluator: confidence, text: heldout}, {evaluator: confidence, text: heldout}", "listed twice"),
        ("confidence", "a measure is a mapping"),
    ],
)
def test_wrong_measures_are_told_with_their_line(random_model, tmp_path, measures, message):
    recipe = measured(tmp_path, example("confidence.py", tmp_path), random_model, measures=measures)
    with pytest.raises(RecipeError, match=message) as error:
        read_recipe(recipe)
    assert "one.yaml:9" in str(error.value)


def test_evaluators_that_do_not_keep_their_word_are_named():
    def returning(value) -> Measure:
        @evaluator("wrong")
        def wrong(forward, windows, /):
            return value

        return Measure.parse({"evaluator": "wrong", "text": "heldout"})

    for value, message in (
        ({}, "returned {}, expected named numbers"),
        (3.0, "returned 3.0, expected named numbers"),
        ({"x": float("nan")}, "x is nan, expected a finite number"),
        ({"x": True}, "x is True, expected a finite number"),
        ({"x": "1"}, "x is '1', expected a finite number"),
    ):
        with pytest.raises(MethodError, match=message):
            returning(value).of(None, None)
    evaluator("raising")(lambda forward, windows, /: {"x": forward(windows)})
    with pytest.raises(PluginError, match="evaluator raising failed: TypeError: 'NoneType' object is not callable"):
        Measure.parse({"evaluator": "raising", "text": "heldout"}).of(None, None)
    evaluator("leaving")(lambda forward, windows, /: sys.exit(0))
    with pytest.raises(PluginError, match="evaluator leaving failed: SystemExit: 0"):
        Measure.parse({"evaluator": "leaving", "text": "heldout"}).of(None, None)
    with pytest.raises(
        PluginError, match=r"must take \(forward, windows, /, \*, parameters\), 2 positional-only; it has 1"
    ):
        evaluator("wrong")(lambda forward, /: {})
    with pytest.raises(PluginError, match="parameter 'text' has the name of a key"):
        evaluator("wrong")(lambda forward, windows, /, *, text: {})
    with pytest.raises(PluginError, match="lower case"):
        evaluator("Wrong")


SECTION = '''"""A section."""
import sparksekit as sk


@sk.report_section("where_time_went")
def where_time_went(report):
    """Seconds of each <b>step</b>."""
    return [{{"step": step["method"] + " <i>", "seconds": step["seconds"], "note": None}} for step in report["steps"]]


@sk.report_section("wrong")
def wrong(report):
    return {wrong}
'''.replace("sparksekit", "sparsekit")
SECTIONED = """\
name: one
output: {output}
plugins: [{plugin}]
model: {{path: {model}, device: cpu}}
steps: [{{method: magnitude, pattern: "2:4"}}]
export: {{formats: []}}
report: {{sections: [{sections}]}}
"""


def sectioned(tmp_path: Path, model: Path, sections: str, wrong: str = "[]") -> Path:
    plugin, path = tmp_path / "sections.py", tmp_path / "one.yaml"
    plugin.write_text(SECTION.format(wrong=wrong))
    path.write_text(SECTIONED.format(output=tmp_path / "one", plugin=plugin, model=model, sections=sections))
    return path


def test_a_section_stands_in_the_report_escaped_and_in_the_plan(random_model, tmp_path):
    assert told("run", str(sectioned(tmp_path, random_model, "where_time_went"))).startswith("0 ")
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    (section,) = report["sections"]
    assert section["caption"] == "Where time went"
    assert section["rows"] == [{"step": "magnitude <i>", "seconds": report["steps"][0]["seconds"], "note": None}]
    assert any("report section where_time_went runs plugin where_time_went" in note for note in report["notes"])
    page, text = ((tmp_path / "one" / name).read_text() for name in ("report.html", "report.md"))
    assert "magnitude &lt;i&gt;" in page and "<i>" not in page and "&lt;b&gt;step" in page
    assert "## Where time went" in text


@pytest.mark.parametrize(
    ("sections", "wrong", "message"),
    [
        ("where_time_wend", "[]", "no report section 'where_time_wend'; there is .*Did you mean 'where_time_went'"),
        ("wrong", "1 / 0", "report section wrong failed: ZeroDivisionError"),
        ("wrong", "7", "report section wrong: it returned 7, expected a list of rows"),
        ("wrong", "[7]", "report section wrong: it returned the row 7, expected columns by name"),
        ("wrong", "(1 / 0 for step in report)", "report section wrong failed: ZeroDivisionError"),
        ("wrong", "[{'a': 1}, {'b': 2}]", "report section wrong: columns"),
        ("wrong", "[{'a': [1]}]", "report section wrong: a is \\[1\\], expected text or a number"),
        ("wrong", "[{'a': float('nan')}]", "report section wrong: a is nan, expected a finite number"),
    ],
)
def test_a_section_that_is_none_ends_the_run_by_name(random_model, tmp_path, sections, wrong, message):
    answer = told("run", str(sectioned(tmp_path, random_model, sections, wrong)))
    assert answer.startswith("2 ") and re.search(message, " ".join(answer.split())), answer


WORDY = '''\
import sparsekit as sk


@sk.linear_method("wordy", kind="prune")
def wordy(layer, /):
    """Say a lot.

    One line,
    and another.
    Source: somebody
    said so.

    - a list
    - of two
    """
    return layer
'''


def test_a_page_breaks_where_the_terminal_ends_and_tells_its_source_once(tmp_path):
    plugin = tmp_path / "wordy.py"
    plugin.write_text(WORDY)
    page = CliRunner().invoke(main, ["methods", "wordy", "--plugin", str(plugin)]).output
    assert "One line, and another.\n\nSource: somebody said so.\n\n- a list\n- of two\n" in page
    assert page.count("somebody") == 1
