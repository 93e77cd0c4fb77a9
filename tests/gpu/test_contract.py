"""CPU and CUDA agree for every method, built in or a plugin; the driver hands out tensors of one device."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_devices import FROM_FILES

from sparsekit.cli import main
from sparsekit.formats import FORMATS
from sparsekit.registry import METHODS
from sparsekit.testing import Subject, allocation, check_evaluator, devices, storages, training
from sparsekit.testing.specimens import arguments_of

pytestmark = pytest.mark.gpu
PLUGINS = Path(__file__).parents[2] / "plugins"
PAGE = Path(__file__).parents[2] / "docs" / "write-a-plugin.md"
ERK = PLUGINS / "sparsekit-erk/src/sparsekit_erk/__init__.py"
LINEAR = ("magnitude", "wanda", "sparsegpt", "rtn", "gptq", "awq")
CUDA = torch.device("cuda")


def subject(name, file=None):
    if file is not None:
        METHODS.load_path(file)
    method = METHODS.get(name)
    return Subject(method, arguments_of(method, {}))


@pytest.mark.parametrize("name", LINEAR)
def test_built_in_methods_agree(name):
    devices(subject(name))


@pytest.mark.parametrize(("file", "name"), FROM_FILES)
def test_plugins_agree(file, name):
    devices(subject(name, PLUGINS / f"{file}.py"))


@pytest.mark.parametrize(("file", "name"), [(PLUGINS / "owl.py", "owl"), (ERK, "erk")], ids=["owl", "erk"])
def test_allocations_agree(file, name):
    allocation(subject(name, file))


def test_a_plugin_that_trains_keeps_the_contract():
    pytest.importorskip("scipy")
    training(subject("permute", PLUGINS / "permute.py"), CUDA)


STEPS = {  # plugin file, steps; those that leave integers are exported
    "owl": ("owl", "{method: wanda, sparsity: 0.5, allocate: {method: owl, outlier: 2.0}}"),
    "dsnot": ("dsnot", '{method: wanda, pattern: "2:4"}, {method: dsnot, pattern: "2:4"}'),
    "alps": ("alps", '{method: alps, pattern: "2:4", iterations: 20}'),
    "aimed": (
        "alps",
        '{method: alps_aimed, pattern: "2:4", iterations: 20, owed: 0.25, schedule: group},'
        " {method: gptq, group_size: 16}, {method: lowrank, rank: 4, group_size: 16, schedule: group}",
    ),
    "ria": ("ria", '{method: ria, pattern: "2:4"}, {method: gptq, bits: 4, group_size: 16}'),
}


@pytest.mark.parametrize(("plugin", "steps"), STEPS.values(), ids=STEPS)
def test_plugins_run_on_cuda(tmp_path, random_model, plugin, steps):
    recipe, formats = tmp_path / "recipe.yaml", "[sparsekit-24-compact]" if "gptq" in steps else "[]"
    recipe.write_text(
        f"name: plugin\noutput: {tmp_path / 'run'}\nplugins: [{PLUGINS / plugin}.py]\n"
        f"model: {{path: {random_model}, device: cuda}}\n"
        "data:\n"
        "  calibration: {path: builtin:calibration, samples: 4, seq_len: 32}\n"
        "  evaluation: {heldout: {path: builtin:heldout, seq_len: 32, samples: 4}}\n"
        f"steps: [{steps}]\n"
        f"evaluate: {{perplexity: [heldout]}}\nexport: {{formats: {formats}}}\n"
    )
    result = CliRunner().invoke(main, ["run", str(recipe)])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert all(step["violations"] == 0 for step in report["steps"])


def test_formats_and_evaluators_keep_their_promises_on_cuda(tmp_path):
    for form in (known for known in FORMATS.values() if known.storage is not None):
        storages.devices(form)
    code = re.search(r"<!-- test: file confidence.py -->\n```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)[1]
    (tmp_path / "confidence.py").write_text(code)
    check_evaluator("confidence", plugin=tmp_path / "confidence.py")
