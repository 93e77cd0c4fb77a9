"""The contract suite over every method, and that each of its properties can fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import children
import pytest
import torch
from click.testing import CliRunner

from sparsekit import testing
from sparsekit.cli import main
from sparsekit.errors import ContractError, PluginError
from sparsekit.method import Method
from sparsekit.pattern import Pattern
from sparsekit.registry import BUILT_IN, METHODS
from sparsekit.state import LinearState
from sparsekit.stats import InputNorm
from sparsekit.testing import Subject, check_method, outcomes
from sparsekit.testing.scaffold import KINDS
from sparsekit.testing.specimens import arguments_of

PLUGINS = Path(__file__).parents[1] / "plugins"
SMALL = {"ast": {"tokens": 128, "batch": 2, "micro_batch": 2}}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_methods_keep_the_contract(name):
    check_method(name, arguments=SMALL.get(name))


@pytest.mark.parametrize("path", sorted(PLUGINS.glob("*.py")), ids=lambda path: path.stem)
def test_plugins_keep_the_contract(path):
    before = set(METHODS.names())
    METHODS.load_path(path)
    names = {method.name for method in METHODS if method.origin == str(path)} or set(METHODS.names()) - before
    assert names
    for name in names:
        check_method(name)


def fake(function, **changes) -> Subject:
    """Wanda with another function."""
    method: Method = replace(METHODS.get("wanda"), function=function, **changes)
    return Subject(method, {"pattern": Pattern(2, 4)})


def masked(layer, pattern):
    return layer.masked(pattern.keep(layer.source.abs()))


def in_place(layer, x, /, *, pattern):
    layer.source.mul_(2)
    return masked(layer, pattern)


def on_the_statistic(layer, x, /, *, pattern):
    x.squares.zero_()
    return masked(layer, pattern)


def transposed(layer, x, /, *, pattern):
    return LinearState(layer.name, layer.source.t().contiguous())


def half_precision(layer, x, /, *, pattern):
    return replace(masked(layer, pattern), source=layer.source.half())


def not_finite(layer, x, /, *, pattern):
    return masked(replace(layer, source=layer.source / 0), pattern)


def nothing(layer, x, /, *, pattern):
    return layer


def dense_values(layer, x, /, *, pattern):
    return replace(layer, mask=torch.ones_like(layer.source, dtype=torch.bool))


def a_number(layer, x, /, *, pattern):
    return 3


def divides(layer, x, /, *, pattern):
    return replace(masked(layer, pattern), source=layer.source / x.norm)


def random_values(layer, x, /, *, pattern):
    return layer.masked(pattern.keep(torch.rand(layer.source.shape)))


def drops_the_row(layer, x, /, *, pattern):
    return layer.masked(pattern.keep(layer.source.abs() / (len(layer.source) - 1) * 0 + layer.source.abs()))


def wide_only(layer, x, /, *, pattern):
    return masked(replace(layer, source=layer.source - layer.source[:, 8:9]), pattern)


def pattern_blind(layer, x, /, *, pattern):
    return layer.masked(Pattern(2, 4).keep(layer.source.abs()) & (layer.source > 0))


@pytest.mark.parametrize(
    ("check", "function", "said"),
    [
        (testing.purity, in_place, "changed its input: the layer's source"),
        (testing.purity, on_the_statistic, "the statistic's squares"),
        (testing.shapes, transposed, "[16, 256] weight into [256, 16]"),
        (testing.shapes, a_number, "returned int, not LinearState"),
        (testing.dtype, half_precision, "torch.float16 values; end with .float()"),
        (testing.dtype, not_finite, "inf or NaN"),
        (testing.pattern, nothing, "no mask; use layer.masked"),
        (testing.pattern, dense_values, "groups break the 2:4 pattern"),
        (testing.unstructured, pattern_blind, "asked for sparsity 0.5 it pruned 0.7"),
        (testing.dead_inputs, divides, "x.norm.clamp"),
        (testing.determinism, random_values, "manual_seed(seed)"),
        (testing.one_row, drops_the_row, "a pruning score is NaN"),
        (testing.one_group, wide_only, "it failed on a [16, 4] weight"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_each_promise_can_be_broken(check, function, said):
    with pytest.raises(ContractError) as caught:
        check(fake(function))
    assert said in str(caught.value)


def test_a_quantizer_that_forgets_the_mask_is_caught():
    rtn = METHODS.get("rtn")

    def forgets(layer, /, **parameters):
        return rtn.function(replace(layer, mask=None), **parameters)

    subject = Subject(replace(rtn, function=forgets), arguments_of(rtn, {}))
    with pytest.raises(ContractError, match="changed the mask of a pruned layer"):
        testing.mask_kept(subject)


def test_a_result_that_does_not_survive_the_disk_is_caught():
    rtn = METHODS.get("rtn")

    def precise(layer, /, **parameters):
        state = rtn.function(layer, **parameters)
        return replace(state, source=state.source + 1e-3)

    with pytest.raises(ContractError, match="written and read back"):
        testing.resume(Subject(replace(rtn, function=precise), arguments_of(rtn, {})))


def test_a_trainer_that_touches_the_teacher_is_caught():
    ast = METHODS.get("ast")

    def careless(job, /, **parameters):
        next(job.teacher.parameters()).data.add_(1)
        return ast.function(job, **parameters)

    with pytest.raises(ContractError, match="changed the teacher"):
        testing.training(Subject(replace(ast, function=careless), arguments_of(ast, SMALL["ast"])))


def test_required_and_unknown_parameters_are_named(tmp_path):
    plugin = tmp_path / "asks_for_more.py"
    plugin.write_text(
        "import sparsekit as sk\n\n\n"
        '@sk.linear_method("asks_for_more", kind="prune")\n'
        "def asks_for_more(layer: sk.LinearState, /, *, strength: float) -> sk.LinearState:\n"
        '    """Never called."""\n'
        "    return layer\n"
    )
    with pytest.raises(PluginError, match=r"'strength'.*--set strength=VALUE"):
        outcomes("asks_for_more", plugin=plugin)
    with pytest.raises(PluginError, match="'bitz'"):
        outcomes("rtn", arguments={"bitz": 4})


def test_the_statistic_is_what_the_driver_collects():
    given = testing.specimen(METHODS.get("wanda"))
    assert isinstance(given.statistic, InputNorm)
    assert given.statistic.tokens == 512


def test_check_prints_a_table_and_fails_with_2(tmp_path):
    good = CliRunner().invoke(main, ["check", "wanda"])
    assert good.exit_code == 0, good.output
    assert "purity" in good.output
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import sparsekit as sk\n\n\n"
        '@sk.linear_method("broken_purity", kind="prune")\n'
        "def broken_purity(layer: sk.LinearState, /, *, pattern: sk.Pattern = sk.Pattern(2, 4)) -> sk.LinearState:\n"
        '    """Spoil the input."""\n'
        "    layer.source.mul_(2)\n"
        "    return layer.masked(pattern.keep(layer.source.abs()))\n"
    )
    bad = CliRunner().invoke(main, ["check", "broken_purity", "--plugin", str(broken)])
    assert bad.exit_code == 2, bad.output
    assert "changed its input" in " ".join(bad.output.split())
    assert "Traceback" not in bad.output


def test_new_methods_pass_as_written(tmp_path):
    names = {"fresh_pruner": "prune", **{f"fresh_{kind}": kind for kind in KINDS if kind != "prune"}}
    for name, kind in names.items():
        made = CliRunner().invoke(main, ["new-method", name, "--kind", kind, "--directory", str(tmp_path)])
        assert made.exit_code == 0, made.output
    again = CliRunner().invoke(main, ["new-method", "fresh_pruner", "--directory", str(tmp_path)])
    assert again.exit_code == 2 and "exists already" in again.output
    log = tmp_path / "log"
    tried = children.started(children.module, "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path), log=log)
    output = children.ended(tried, log)
    assert tried.exitcode == 0, output
    assert f"{2 * len(KINDS)} passed" in output


def test_new_method_refuses_names_that_are_taken_or_no_names(tmp_path):
    for name, said in (("wanda", "the name 'wanda' is taken (method)"), ("My-Pruner", "as in my_pruner")):
        result = CliRunner().invoke(main, ["new-method", name, "--directory", str(tmp_path)])
        assert result.exit_code == 2 and said in result.output
    assert not list(tmp_path.iterdir())


def test_dense_values_reach_a_method_that_asks_for_them():
    given = testing.specimen(replace(METHODS.get("wanda"), dense=True), masked=True)
    (state,) = given.layers.values()
    assert state.dense is not None and torch.equal(state.dense, state.source)
