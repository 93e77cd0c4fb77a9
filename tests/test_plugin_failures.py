"""Plugins that fail in their maths, or return something else than they promised: named with layer and line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_bad_inputs import base, seen  # noqa: F401  # `base` is a fixture

from sparsekit.cli import main
from sparsekit.registry import METHODS

HEAD = "from dataclasses import replace\nimport sys, torch, sparsekit as sk\nfrom sparsekit.errors import MethodError\n"
HEAD += "from sparsekit.training.job import Trained, TrainJob\n\n"
LINEAR = (
    HEAD
    + '''\
@sk.linear_method("own{n}", kind="prune"{stats})
def own(layer: sk.LinearState, {x}/) -> sk.LinearState:
    """Own."""
    {body}
'''
)
GROUP = (
    HEAD
    + '''\
@sk.group_method("own{n}", kind="quantize", stats=sk.InputNorm)
def own(group: sk.Group, x: sk.InputNorm, /) -> sk.Group:
    """Own."""
    {body}
'''
)
ALLOCATION = (
    HEAD
    + '''\
@sk.allocation_method("own{n}", stats=sk.InputNorm)
def own(layers, sparsity: float, /) -> dict[str, float]:
    """Own."""
    {body}
'''
)
TRAINER = (
    HEAD
    + '''\
@sk.model_method("own{n}", kind="train")
def own(job: TrainJob, /) -> Trained:
    """Own."""
    {body}
'''
)
STATISTIC = (
    HEAD
    + '''\
class Own(sk.InputNorm):
    {body}


@sk.linear_method("own{n}", kind="prune", stats=Own)
def own(layer: sk.LinearState, x: Own, /) -> sk.LinearState:
    """Own."""
    return layer.masked(x.norm.expand_as(layer.source) > 0)
'''
)
RECIPE = """\
name: failing
output: {base}/out
model: {{path: {base}/model, device: cpu}}
data:
  calibration: {{path: {base}/text.txt, samples: 2, seq_len: 16}}
  train: {{path: {base}/text.txt, samples: 2, seq_len: 16}}
plugins: [{plugin}]
steps: [{step}]
"""
FIRST = "model.layers.0.self_attn.q_proj"
QKV = ", ".join(FIRST.replace("q_proj", name) for name in ("q_proj", "k_proj", "v_proj"))
ZERO = r"method own\d+ failed: ZeroDivisionError: division by zero \(\S*own\d+\.py:9\); sparsekit -v shows the"
IN_TORCH = r"failed: NotImplementedError: .* \(\S*own\d+\.py:9, in \S*torch\S*\.py:\d+\); sparsekit -v shows"
Case = tuple[str, str, str, str]
CASES: list[Case] = [
    ("linear", LINEAR, "1 / 0", FIRST + ": " + ZERO),
    ("statistic", LINEAR, "1 / 0", FIRST + ": " + ZERO),
    ("leaves", LINEAR, "sys.exit(0)", FIRST + r": method own\d+ failed: SystemExit: 0 \("),
    ("no words", LINEAR, "assert layer.name == 1", FIRST + r": method own\d+ failed: AssertionError \("),
    ("in torch", LINEAR, "return torch.nn.functional.interpolate(layer.source, scale_factor=object())", IN_TORCH),
    ("in sparsekit", LINEAR, "return layer.updated(7)", r"own\d+\.py:9, in \S*sparsekit/state\.py:\d+\)"),
    ("named itself", LINEAR, "raise MethodError('no')", FIRST + ": no$"),
    ("none", LINEAR, "return None", FIRST + ": the method returned None, expected a LinearState"),
    ("tensor", LINEAR, "return layer.source", FIRST + ": the method returned a Tensor, expected a LinearState"),
    ("half", LINEAR, "return replace(layer, source=layer.source.half())", "returned values in torch.float16, expected"),
    ("list", LINEAR, "return replace(layer, source=[1.0])", "the method returned values that are none: a list"),
    ("rows", LINEAR, "return layer.updated(layer.source[:3])",
     FIRST + r": the method changed the shape: values of \[3,"),
    ("mask", LINEAR, "return replace(layer, mask=layer.source > 9e9, source=layer.source[:, :8])", "changed the shape"),
    ("float mask", LINEAR, "return replace(layer, mask=layer.source)", "a mask in torch.float32, expected torch.bool"),
    ("wide mask", LINEAR, "return replace(layer, mask=torch.ones(1, 1) > 0)", r"shape: a mask of \[1, 1\]"),
    ("integers", LINEAR, "return replace(layer, quantized=layer.source)", "returned integers that are none"),
    ("group", GROUP, "1 / 0", "down_proj: " + ZERO),
    ("group none", GROUP, "return group.linears", "down_proj: the method returned a dict, expected the Group"),
    ("group others", GROUP, "return group.with_linears({'x': 1})", "returned the linears x, not those it was given"),
    ("group wrong", GROUP, "return group.with_linears(dict.fromkeys(group.linears))",
     "returned None, expected a Linear"),
    ("allocation", ALLOCATION, "return {layer.state.name: 1 / 0 for layer in layers}", "error: " + ZERO),
    ("words", ALLOCATION, "return {layer.state.name: 'half' for layer in layers}", r"own\d+ returned no numbers by"),
    ("nothing", ALLOCATION, "list(layers)", r"own\d+ returned no numbers by layer"),
    ("one number", ALLOCATION, "return sum(1 for _ in layers)", r"own\d+ returned no numbers by layer"),
    ("trainer", TRAINER, "1 / 0", "error: " + ZERO),
    ("trainer none", TRAINER, "return 3", r"own\d+ returned a int, expected a Trained"),
    ("trainer little", TRAINER, "return Trained({}, {}, {})",
     r"model.layers.0.mlp.down_proj: own\d+ returned no state"),
    ("update", STATISTIC, "def update(self, x): 1 / 0",
     r"update of statistic Own failed: ZeroDivisionError: .*own\d+\.py:7"),
    ("empty", STATISTIC, "@classmethod\n    def empty(cls, width, device): 1 / 0",
     "empty of statistic Own failed: ZeroDiv"),
    ("empties", STATISTIC, "@classmethod\n    def empty(cls, width, device): return 7",
     "empty of statistic Own must return"),
    ("ladder", STATISTIC, "def __getattribute__(self, name): return 1 / 0", "empty of statistic Own failed: ZeroDiv"),
]  # fmt: skip


def plugin_and_step(number: int, case: Case) -> tuple[str, str]:
    """A plugin's text and the step that uses it."""
    name, form, body, _ = case
    stats = ("", "") if name != "statistic" else (", stats=sk.InputNorm", "x: sk.InputNorm, ")
    code = form.format(n=number, body=body, stats=stats[0], x=stats[1])
    use = f"{{method: magnitude, sparsity: 0.5, allocate: own{number}}}"
    return code, use if form is ALLOCATION else f"{{method: own{number}}}"


@pytest.fixture
def failing(base, request, monkeypatch) -> tuple[Path, str]:  # noqa: F811
    """A recipe whose only step fails, and what is to be said."""
    number, case = request.param
    monkeypatch.setattr(METHODS, "_methods", {method.name: method for method in METHODS})
    code, step = plugin_and_step(number, case)
    (base / f"own{number}.py").write_text(code)
    (base / "bad.yaml").write_text(RECIPE.format(base=base, plugin=base / f"own{number}.py", step=step))
    return base, case[3]


@pytest.mark.parametrize("failing", list(enumerate(CASES)), indirect=True, ids=[case[0] for case in CASES])
def test_a_failing_plugin_is_named_with_layer_and_line(failing):
    directory, words = failing
    before = seen(directory)
    result = CliRunner().invoke(main, ["run", str(directory / "bad.yaml")])
    assert result.exit_code == 2, (result.output, result.exc_info)
    assert isinstance(result.exception, SystemExit), result.exc_info
    told = result.output[result.output.index("error: ") :].strip()
    assert re.search(words, told), told
    assert "Traceback" not in result.output
    assert told.count("\n") == 0
    new = {name for name, when in seen(directory).items() if before.get(name) != when}
    assert not {name for name in new if name.endswith((".safetensors", "DONE")) and "/tokens/" not in name}, new


@pytest.mark.parametrize("failing", [(0, CASES[0])], indirect=True)
def test_verbose_shows_where(failing):
    result = CliRunner().invoke(main, ["-v", "run", str(failing[0] / "bad.yaml")])
    assert type(result.exception).__name__ == "PluginError"
    cause = result.exception
    while cause.__cause__ is not None:
        cause = cause.__cause__
    assert type(cause) is ZeroDivisionError


@pytest.mark.parametrize("failing", [(1, CASES[1]), (16, CASES[16])], indirect=True)
@pytest.mark.parametrize("command", [["run", "--dry-run"], ["plan", "--json"], ["compare", "other.yaml"]])
def test_plans_and_comparisons_name_it_too(failing, command):
    recipe = failing[0] / "bad.yaml"
    (failing[0] / "other.yaml").write_text(recipe.read_text().replace("name: failing", "name: other"))
    words = [str(failing[0] / word) if word.endswith("yaml") else word for word in command]
    result = CliRunner().invoke(main, [*words, str(recipe)])
    assert result.exit_code == 2, (result.output, result.exc_info)
    assert re.search(r"(k|o|q|down)_proj.*: " + ZERO, result.output), result.output


def test_a_bug_of_sparsekit_stays_a_traceback(base, monkeypatch):  # noqa: F811
    (base / "bad.yaml").write_text(RECIPE.format(base=base, plugin="", step='{method: magnitude, pattern: "2:4"}'))
    monkeypatch.setattr("sparsekit.state.LinearState.masked", lambda self, mask: 1 / 0)
    result = CliRunner().invoke(main, ["run", str(base / "bad.yaml")])
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_decorator_around_a_method_does_not_hide_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(METHODS, "_methods", {method.name: method for method in METHODS})
    path = tmp_path / "wrapped.py"
    code = LINEAR.format(n="wrapped", body="1 / 0", stats="", x="").replace("def own", "@torch.no_grad()\ndef own")
    path.write_text(code)
    METHODS.load_path(path)
    assert METHODS.get("ownwrapped").origin == str(path)
