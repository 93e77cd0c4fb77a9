"""Export formats of plugins: registered, listed, exported, read back, named in the manifest, refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_imports import run

import sparsekit
from sparsekit.cli import main
from sparsekit.errors import CheckpointError, PluginError
from sparsekit.formats import FORMATS, export_format
from sparsekit.formats.own import Own
from sparsekit.registry import METHODS
from sparsekit.shelf import Origin, Shelf

PAGE = Path(__file__).parents[1] / "docs" / "write-a-plugin.md"
STEPS = '[{method: magnitude, pattern: "2:4"}, {method: rtn, bits: 3, group_size: 32}]'


@pytest.fixture(autouse=True)
def _shelves(monkeypatch):
    """No trace of a test's formats after it."""
    monkeypatch.setattr(FORMATS, "_things", dict(FORMATS.items()))
    monkeypatch.setattr(METHODS, "_loaded", set(METHODS._loaded))


@pytest.fixture
def plugin(tmp_path) -> Path:
    """The example of the docs."""
    code = re.search(r"<!-- test: file bytewise.py -->\n```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)[1]
    path = tmp_path / "bytewise.py"
    path.write_text(code)
    return path


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
    with pytest.raises(CheckpointError, match="quant_method 'bytewise'; sparsekit reads gptq"):
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
    with pytest.raises(CheckpointError, match="unpack of mine fails: index 7 is out of bounds"):
        format_of(None, lambda found, setting: found["codes"][7]).unpack({"codes": torch.zeros(2)}, None)


def test_entry_points_are_loaded_when_somebody_looks(monkeypatch):
    asked = []
    monkeypatch.setattr(METHODS, "load_entry_points", lambda: asked.append(1))
    shelf: Shelf = Shelf("thing")
    assert (len(shelf), list(shelf), "x" in shelf) == (0, [], False)
    assert len(asked) >= 3
