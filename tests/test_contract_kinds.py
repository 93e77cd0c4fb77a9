"""The contract of what a plugin brings besides methods: statistics, evaluators, report sections, exports."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_shelf import example

from sparsekit import testing
from sparsekit.cli import main
from sparsekit.crossgram import CrossGram, StreamGram
from sparsekit.errors import ContractError, PluginError, SparsekitError
from sparsekit.evaluation.measures import EVALUATORS, Measure, evaluator
from sparsekit.formats import FORMATS
from sparsekit.planning.fingerprint import code_digest
from sparsekit.registry import METHODS
from sparsekit.reporting import sections as reporting
from sparsekit.reporting.sections import SECTIONS, Section
from sparsekit.shelf import Origin
from sparsekit.stats import Gram, InputNorm
from sparsekit.testing import evaluators, sections, storages
from sparsekit.testing.scaffold import KINDS, new_method


@pytest.fixture(autouse=True)
def _shelves(monkeypatch):
    """No trace of a test's plugins after it."""
    for shelf in (FORMATS, EVALUATORS, SECTIONS):
        monkeypatch.setattr(shelf, "_things", dict(shelf.items()))
    monkeypatch.setattr(METHODS, "_methods", {method.name: method for method in METHODS})
    monkeypatch.setattr(METHODS, "_loaded", set(METHODS._loaded))


def told(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments))
    return f"{result.exit_code} " + " ".join(result.output.split())


@pytest.mark.parametrize("kind", [InputNorm, Gram, CrossGram, StreamGram])
def test_statistics_of_sparsekit_keep_the_contract(kind):
    testing.check_statistic(kind)


class Sums(InputNorm):
    """A statistic with one thing wrong in each subclass."""


class Uncounted(Sums):
    def update(self, x):
        self.squares += x.float().square().sum(0)


class Last(Sums):
    def update(self, x):
        self.tokens += len(x)
        self.squares = x.float().square().sum(0)


class Keeps(Sums):
    def merge(self, other):
        self.tokens += other.tokens


class Greedy(Sums):
    def merge(self, other):
        super().merge(other)
        other.squares.zero_()


class Uncounting(Sums):
    def merge(self, other):
        self.squares += other.squares


class Narrow(Sums):
    def update(self, x):
        self.tokens += len(x)
        self.squares += x.square().sum(0) if x.dtype == torch.float32 else x.square().cumsum(0, dtype=x.dtype)[-1]


class Takes(Sums):
    def update(self, x):
        super().update(x.mul_(1.5))


class Shaped(Sums):
    def update(self, x):
        self.tokens += len(x)
        self.squares = x.float()


class Fails(Sums):
    def merge(self, other):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Uncounted, r"Uncounted \(counts\): its tokens are 0 after 96 tokens; .*self.tokens \+= x.shape\[0\]"),
        (Last, r"Last \(adds_up\): tokens given in three parts give another squares; sum in float32"),
        (Shaped, r"Shaped \(adds_up\): .* give a squares of \[32, 64\], at once \[96, 64\]"),
        (Keeps, r"Keeps \(merges\): two halves merged give another squares"),
        (Greedy, r"Greedy \(merges\): merge changes the squares of the accumulator that it adds"),
        (Uncounting, r"Uncounting \(merges\): merged from 48 and 48 tokens it counts 48"),
        (Fails, r"Fails \(merges\): merge failed: NotImplementedError"),
        (Narrow, r"Narrow \(narrow\): the same numbers in bfloat16 give another squares"),
        (Takes, r"Takes \(keeps_tokens\): update changes the tokens it is given"),
    ],
)
def test_each_promise_of_a_statistic_can_be_broken(kind, said):
    with pytest.raises(ContractError, match=said):
        testing.check_statistic(kind)


def test_a_method_has_the_promises_of_its_statistic(tmp_path):
    plugin = example("clipped.py", tmp_path)
    plugin.write_text(plugin.read_text().replace("self.tokens += x.shape[0]", "self.tokens = x.shape[0]"))
    said = told("check", "by_largest", "--plugin", str(plugin))
    assert said.startswith("2 ") and "statistic failed statistic Largest (counts): its tokens are 48 after 96" in said


def test_a_class_that_is_no_statistic_is_refused_when_it_is_named(tmp_path):
    plugin = example("clipped.py", tmp_path)
    plugin.write_text(plugin.read_text().replace("def merge", "def join"))
    with pytest.raises(PluginError, match=r"'by_largest': its statistic has no merge; see docs/write-a-plugin.md"):
        METHODS.load_path(plugin)


def measure_of(function) -> Measure:
    evaluator("tried")(function)
    return Measure.parse({"evaluator": "tried", "text": "heldout"})


def sure(forward, windows, /):
    """How sure."""
    return {"sure": float(forward(windows).softmax(-1).amax())}


def spoils(forward, windows, /):
    next(forward.__self__.view.module.parameters()).data.zero_()
    return {"x": 1.0}


def writes_windows(forward, windows, /):
    windows.zero_()
    return {"x": 1.0}


def draws(forward, windows, /):
    return {"x": float(torch.rand(()))}


def names_numbers(forward, windows, /):
    return {f"loss {float(forward(windows).mean()):.8f}": 1.0}


def needs_two(forward, windows, /):
    return {"x": float(windows.float().mean(1)[1])}


def returns_a_tensor(forward, windows, /):
    return {"x": windows.float().mean()}


@pytest.mark.parametrize(
    ("check", "function", "said"),
    [
        (evaluators.purity, spoils, "it changed the model: .* differs after the call; only call forward"),
        (evaluators.purity, writes_windows, "it changed the windows, .*windows.clone"),
        (evaluators.determinism, draws, "two calls give x 0.* and 0.*; draw random numbers from"),
        (evaluators.same_names, names_numbers, "it returns loss .* for one model and loss .* for another one"),
        (evaluators.one_window, needs_two, "evaluator tried failed: IndexError"),
        (evaluators.finite, returns_a_tensor, r"x is tensor\(.*expected a finite number; float\(...\) makes one"),
        (evaluators.documented, draws, "it has no docstring"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_each_promise_of_an_evaluator_can_be_broken(check, function, said):
    with pytest.raises(SparsekitError, match=said):
        check(measure_of(function))
    if check is not evaluators.finite:
        check(measure_of(sure))


def section_of(function) -> Section:
    return Section("tried", function, Origin.of(function))


@pytest.fixture(scope="module", autouse=True)
def _reports():
    """The reports of two runs, made once for the file."""
    sections._report(sections.WHOLE)


def fine(report):
    """Fine."""
    return [{"step": step["method"], "note": None, "seconds": step["seconds"]} for step in report["steps"]]


def first_step(report):
    return [{"method": report["steps"][0]["method"]}]


def sorts_in_place(report):
    report["steps"].sort(key=lambda step: -step["index"])
    return fine(report)


def counts_calls(report, seen=[]):  # noqa: B006
    seen.append(1)
    return [{"calls": len(seen)}]


def bold(report):
    return [{"step": f"<b>{step['method']}</b>"} for step in report["steps"]]


@pytest.mark.parametrize(
    ("check", "function", "said"),
    [
        (sections.rows, lambda report: [{"a": 1}, {"b": 2}], r"columns \['b'\] and \['a'\] in one table"),
        (sections.rows, lambda report: [{"a": True}], r"a is True, expected text or a number; str\(...\)"),
        (sections.rows, lambda report: [{"a": float("inf")}], "a is inf, expected a finite number; None stands for"),
        (sections.rows, lambda report: [{1: "a"}], "a column is called 1, expected text"),
        (sections.rows, lambda report: [{}], r"columns \[\] and \[\] in one table"),
        (sections.rows, lambda report: [{"a": report["lost"]}], "report section tried failed: KeyError: 'lost'"),
        (sections.bare, first_step, "for a run without steps, .*IndexError.*return .. when there is nothing"),
        (sections.purity, sorts_in_place, "it changed the report: 'steps' differs after the call"),
        (sections.determinism, counts_calls, "two calls give different rows"),
        (sections.plain, bold, "its text has '<b>', which the page shows as these characters"),
        (sections.documented, bold, "it has no docstring"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_each_promise_of_a_section_can_be_broken(check, function, said):
    with pytest.raises(SparsekitError, match=said):
        check(section_of(function))
    check(section_of(fine))


def test_text_that_says_it_is_markup_is_text():
    markup = pytest.importorskip("markupsafe").Markup("<b>bold</b>")
    stored = section_of(lambda report: [{"a": markup}]).of({})
    assert type(stored["rows"][0]["a"]) is str
    assert reporting.Section("a_b", fine, Origin.of(fine)).of({"steps": []}) == {
        "caption": "A b", "about": "Fine.", "rows": []
    }  # fmt: skip


def test_a_section_sees_what_report_json_holds(random_model, tmp_path):
    plugin = tmp_path / "spoils.py"
    plugin.write_text(
        "import sparsekit as sk\n\n\n"
        '@sk.report_section("spoils")\n'
        "def spoils(report):\n"
        '    """Takes the steps away."""\n'
        '    return [{"method": report["steps"].pop()["method"]}]\n'
    )
    recipe = tmp_path / "one.yaml"
    recipe.write_text(
        f"name: one\noutput: {tmp_path / 'one'}\nplugins: [{plugin}]\nmodel: {{path: {random_model}, device: cpu}}\n"
        'steps: [{method: magnitude, pattern: "2:4"}]\nexport: {formats: []}\nreport: {sections: [spoils]}\n'
    )
    assert told("run", str(recipe)).startswith("0 ")
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert [step["method"] for step in report["steps"]] == ["magnitude"]
    assert report["sections"][0]["rows"] == [{"method": "magnitude"}]
    assert "purity failed it changed the report: 'steps'" in told("check", "spoils", "--plugin", str(plugin))


def test_an_export_that_lies_is_caught(tmp_path, monkeypatch):
    METHODS.load_path(example("bytewise.py", tmp_path))
    form = FORMATS["bytewise"]
    storages.exported(form)
    monkeypatch.setattr(form.storage, "packs", lambda weight, mask: {**packed(weight), "codes": 15 - weight.codes})
    with pytest.raises(ContractError, match=r"an export of a small model fails: .*sparsekit-check-"):
        storages.exported(form)
    monkeypatch.setattr(form.storage, "packs", lambda weight, mask: packed(weight))
    with monkeypatch.context() as patch:
        patch.setattr(storages, "sha256_file", lambda path: "0" * 64)
        with pytest.raises(ContractError, match=r"sparsekit.json has another digest of bytewise.safetensors"):
            storages.exported(form)
    monkeypatch.setattr(storages, "_damage", lambda path: None)
    with pytest.raises(ContractError, match="a changed byte is read as if nothing had happened"):
        storages.exported(form)


def packed(weight):
    return {"codes": weight.codes, "scale": weight.scale, "zero": weight.zero, "group_of": weight.group_of}


def test_check_says_what_the_thing_is_and_takes_its_parameters(tmp_path):
    plugin = str(example("confidence.py", tmp_path))
    assert told("check", "confidence", "--plugin", plugin, "--set", "top=3").startswith("0 evaluator confidence finite")
    said = told("check", "confidence", "--plugin", plugin, "--set", "topp=3")
    assert "evaluator 'confidence', parameter 'topp'" in said and "Did you mean 'top'" in said
    said = told("check", "confidance", "--plugin", plugin)
    assert said.startswith("2 ") and "nothing is called 'confidance', neither method, export format" in said
    assert "Did you mean 'confidence'" in said
    assert "stores every value as it is" in told("check", "dense")
    slow = str(example("slowest_steps.py", tmp_path))
    assert told("check", "slowest_steps", "--plugin", slow).startswith("0 report section slowest_steps rows ok")
    said = told("check", "slowest_steps", "--plugin", slow, "--set", "top=3")
    assert "report section 'slowest_steps' takes no parameters, and top was given" in said


def test_the_functions_for_authors_tests_name_every_broken_promise(tmp_path):
    for name, change, check in (
        ("confidence.py", ('"probability": float(', '"probability": (lambda x: x)('), testing.check_evaluator),
        ("slowest_steps.py", ('"""Steps by the time they took, the longest first."""', ""), testing.check_section),
    ):
        plugin = example(name, tmp_path)
        plugin.write_text(plugin.read_text().replace(*change))
        with pytest.raises(ContractError, match=r"breaks (a promise|\d promises) of the contract:\n  \w+: "):
            check(plugin.stem, plugin=plugin)
    with pytest.raises(PluginError, match="no evaluator 'fluency'; there are confidence"):
        testing.check_evaluator("fluency")


def test_every_kind_has_two_templates_and_the_command_line_offers_it(tmp_path):
    folder = Path(testing.__file__).with_name("templates")
    written = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    assert written == {name for kind in KINDS for name in (f"{kind}.py", f"test_{kind}.py")}
    (option,) = (each for each in main.commands["new-method"].params if each.name == "kind")
    assert tuple(option.type.choices) == KINDS
    with pytest.raises(PluginError, match=r"no kind 'evaluate'.*Did you mean 'evaluator'"):
        new_method("mine", "evaluate", tmp_path)
    with pytest.raises(PluginError, match=r"the name 'gptq' is taken \(method\)"):
        new_method("gptq", "format", tmp_path)


DECLARED = """\
import sparsekit as sk


@sk.linear_method({decorator})
def mine({arguments}) -> sk.LinearState:
    return layer
"""
LAYER = "layer: sk.LinearState, /, *, "


@pytest.mark.parametrize(
    ("decorator", "arguments", "said"),
    [
        ('"mine", kind="pruner"', LAYER + "bits: int = 4", "method 'mine' is of kind 'pruner'; .*Did you mean 'prune'"),
        ('"mine", kind="prune"', LAYER + "bits=4", "parameter 'bits' has no type annotation, as in bits: int = 4"),
        ('"mine", kind="prune"', LAYER + 'bits: int = "4"', "'bits' has the default '4': Input should be a valid int"),
        (
            '"mine", kind="prune"',
            LAYER + 'p: sk.Pattern = "2:4"',
            r"'p' has the default '2:4'; write Pattern\(n=2, m=4",
        ),
        (
            '"mine", kind="prune"',
            LAYER + 'p: "Pattren"',
            "method 'mine': name 'Pattren' is not defined, and an annotation",
        ),
        (
            '"mine", kind="prune"',
            "layer, x, /",
            r"must take \(layer, /, \*, parameters\), 1 positional-only; it has 2 before a /",
        ),
        ('"mine", kind="prune"', "layer", "1 positional-only; it has 0 before a /"),
        ('"mine"', "layer, /", r"missing 1 required keyword-only argument: 'kind' \(.*mine.py:4\)"),
        ('"Mine", kind="prune"', "layer, /", "method name 'Mine' must be lower case"),
        ('3, kind="prune"', "layer, /", "a decorator of methods takes a name, .*it was given 3"),
        ('"mine", kind="prune" kind="prune"', "layer, /", r"failed to load: SyntaxError: .*mine.py:4\)"),
        ('"mine", kind=sk.Prune', "layer, /", "module 'sparsekit' has no attribute 'Prune'"),
    ],
)
def test_declarations_that_cannot_work_are_refused_with_what_to_write(tmp_path, decorator, arguments, said):
    plugin = tmp_path / "mine.py"
    plugin.write_text(DECLARED.format(decorator=decorator, arguments=arguments))
    with pytest.raises(PluginError, match=said):
        METHODS.load_path(plugin)


def test_a_plugin_that_is_not_there_and_one_that_is_a_directory(tmp_path):
    with pytest.raises(PluginError, match=r"plugin .*lost.py is not there"):
        METHODS.load_path(tmp_path / "lost.py")
    with pytest.raises(PluginError, match="is a directory, and none is ever scanned: name a file of it"):
        METHODS.load_path(tmp_path)


def test_a_method_that_does_not_run_fails_once_with_its_line(tmp_path):
    plugin = example("my_wanda.py", tmp_path)
    plugin.write_text(plugin.read_text().replace("layer.source", "layer.sauce").replace('"my_wanda"', '"sauce"'))
    said = told("check", "sauce", "--plugin", str(plugin))
    assert said.count("has no attribute 'sauce'") == 1 and "(/" in said
    assert "not tried, since it fails at 'runs': purity" in said and "'sauce' breaks 1 of 17 promises" in said


PACKAGED = """\
import sparsekit as sk
from packaged_plugin.inner.statistic import Norm


@sk.linear_method("packaged", kind="prune", stats=Norm)
def packaged(layer: sk.LinearState, x: Norm, /, *, pattern: sk.Pattern = sk.Pattern(2, 4)) -> sk.LinearState:
    return layer.masked(pattern.keep(layer.source.abs() * x.norm))
"""


def test_an_edit_anywhere_in_a_plugins_package_is_another_step(tmp_path, monkeypatch):
    package = tmp_path / "packaged_plugin"
    (package / "inner").mkdir(parents=True)
    for folder in (package, package / "inner"):
        (folder / "__init__.py").write_text("")
    (package / "method.py").write_text(PACKAGED)
    statistic = package / "inner" / "statistic.py"
    statistic.write_text("from sparsekit.stats import InputNorm\n\n\nclass Norm(InputNorm):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("packaged_plugin.method")
    first = code_digest(METHODS.get("packaged"))
    assert len(first) == 1 + 4 and code_digest(METHODS.get("packaged")) == first
    statistic.write_text(statistic.read_text() + "\n    far = True\n")
    assert code_digest(METHODS.get("packaged")) != first
    for name in [name for name in sys.modules if name.startswith("packaged_plugin")]:
        del sys.modules[name]


def test_one_file_and_what_is_built_in_have_the_digests_of_their_files(tmp_path):
    plugin = example("clipped.py", tmp_path)
    METHODS.load_path(plugin)
    method = METHODS.get("by_largest")
    assert code_digest(method) == [method.digest, method.digest]
    assert code_digest(METHODS.get("wanda")) == [METHODS.get("wanda").digest]
