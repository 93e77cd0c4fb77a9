"""Recipes: what is read, what is refused and where, overrides, the resolved form, the schema."""

from __future__ import annotations

import random
import textwrap
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import BaseModel, Field

from sparsekit.errors import PluginError, RecipeError, SparsekitError
from sparsekit.pattern import Pattern
from sparsekit.recipe import Recipe, TextEntry, read_recipe, recipe_schema
from sparsekit.recipe.variants import read_arms
from sparsekit.registry import BUILT_IN, METHODS, linear_method, model_method
from sparsekit.state import LinearState

ROOT = Path(__file__).parents[1]
GOOD = """\
name: good
model: {path: builtin:tiny}
data:
  calibration: {path: builtin:calibration, samples: 8, seq_len: 32}
  evaluation:
    heldout: {path: builtin:heldout}
    second: {path: [a.txt, b.txt.xz]}
steps:
  - method: wanda
    pattern: "2:4"
  - {method: rtn, bits: 4}
evaluate: {perplexity: [heldout]}
"""


class Nested(BaseModel):
    model_config = {"extra": "forbid"}
    depth: int = 1


def fake_prune(
    layer: LinearState,
    /,
    *,
    pattern: Pattern,
    power: Annotated[float, Field(gt=0)] = 0.5,
    betas: tuple[float, float] = (0.9, 0.95),
    size: int | None = None,
    nested: Nested = Nested(),
) -> LinearState:
    """Prune nothing."""
    return layer


def fake_train(job: Any, /, *, tokens: int, schedule: str = "cosine") -> None:
    """Train nothing."""


@pytest.fixture(autouse=True)
def _methods():
    """Two methods with awkward parameters, and no trace of a test's methods after it."""
    METHODS.names()
    before, loaded = set(METHODS._methods), set(METHODS._loaded)
    linear_method("fake_prune", kind="prune")(fake_prune)
    model_method("fake_train", kind="train")(fake_train)
    yield
    for name in set(METHODS._methods) - before - set(BUILT_IN):
        del METHODS._methods[name]
    METHODS._loaded = {each for each in METHODS._loaded if each in loaded or each.startswith("sparsekit.methods.")}


def read(tmp_path: Path, text: str | bytes, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_recipe(path, overrides)


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new, 1)


# good recipes


RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_project_reads_and_resolves(path, tmp_path, monkeypatch):
    for recipe in read_arms([path]).recipes.values() if "\nvariants:" in path.read_text() else [read_recipe(path)]:
        reads_and_resolves(recipe, tmp_path, monkeypatch)


def reads_and_resolves(recipe, tmp_path, monkeypatch):
    assert recipe.steps
    monkeypatch.chdir(tmp_path)
    text = recipe.resolved_yaml()
    (tmp_path / "sub").mkdir(exist_ok=True)
    (tmp_path / "sub" / "resolved.yaml").write_text(text)
    again = read_recipe(tmp_path / "sub" / "resolved.yaml")
    assert again.resolved_yaml() == text
    assert [(s.method, s.params, s.targets, s.ignore, s.schedule) for s in again.steps] == [
        (s.method, s.params, s.targets, s.ignore, s.schedule) for s in recipe.steps
    ]
    assert again.model.path == recipe.resolve(recipe.model.path)


def test_defaults(tmp_path):
    recipe = read(tmp_path, "name: small\nmodel: {path: m}\nsteps: [{method: magnitude}]\n")
    assert (recipe.seed, recipe.coverage, recipe.allow_network, recipe.plugins) == (0, 0.95, False, [])
    model = recipe.model
    assert (model.dtype, model.compute_dtype, model.device, model.trust_remote_code) == ("auto", "auto", "auto", False)
    assert (recipe.data.calibration, recipe.data.train, recipe.data.evaluation) == (None, None, {})
    assert recipe.evaluate.perplexity == recipe.evaluate.lm_eval.tasks == []
    assert recipe.evaluate.gates.max_ppl_increase is None
    assert recipe.export.formats == ["dense"]
    (step,) = recipe.steps
    assert (step.targets, step.ignore, step.schedule, step.given) == (["Linear"], [], "block", frozenset())
    assert step.params.pattern == Pattern(2, 4)
    assert recipe.output_directory() == Path("runs/small")
    assert recipe.export_directory() == Path("runs/small/export")


def test_values(tmp_path):
    recipe = read(tmp_path, GOOD)
    wanda, rtn = recipe.steps
    assert wanda.method is METHODS.get("wanda")
    assert wanda.given == {"pattern"}
    assert (rtn.params.bits, rtn.params.group_size, rtn.given) == (4, 128, {"bits"})
    assert recipe.data.evaluation["second"].paths == ["a.txt", "b.txt.xz"]
    assert recipe.data.calibration == TextEntry(path="builtin:calibration", samples=8, seq_len=32)
    assert recipe.data.calibration.paths == ["builtin:calibration"]


def test_units_and_numbers(tmp_path):
    text = changed("name: good", "name: good\ncoverage: 90%").replace("seq_len: 32", "seq_len: 1K")
    text = text.replace("[heldout]}", "[heldout], gates: {max_ppl_increase: 5%}, lm_eval: {tasks: [t], limit: 2}}")
    recipe = read(tmp_path, text)
    assert recipe.coverage == pytest.approx(0.9)
    assert recipe.data.calibration is not None and recipe.data.calibration.seq_len == 1000
    assert recipe.evaluate.gates.max_ppl_increase == pytest.approx(0.05)
    assert recipe.evaluate.lm_eval.limit == 2


def test_lists_become_tuples_and_whole_numbers_become_fractions(tmp_path):
    step = '{method: fake_prune, pattern: "1:4", betas: [0.5, 1], power: 2, nested: {depth: 3}}'
    step_read = read(tmp_path, changed("{method: rtn, bits: 4}", step)).steps[1]
    params: Any = step_read.params
    assert (params.betas, params.power, params.nested.depth, params.pattern) == ((0.5, 1.0), 2.0, 3, Pattern(1, 4))


@pytest.mark.parametrize(
    ("step", "pattern"),
    [
        ("sparsity: 0.5", Pattern.unstructured(0.5)),
        ("sparsity: 50%", Pattern.unstructured(0.5)),
        ("sparsity: 0", Pattern.unstructured(0.0)),
        ("sparsity: 0.123456789", Pattern.unstructured(0.123456789)),
        ('pattern: "2:4", sparsity: 0.5', Pattern(2, 4)),
        ('pattern: "1:4", sparsity: 0.75', Pattern(1, 4)),
        ("pattern: unstructured 0.5, sparsity: 0.5", Pattern.unstructured(0.5)),
        ('pattern: "32:64"', Pattern(32, 64)),
        ("sparsity: , pattern: '4:8'", Pattern(4, 8)),
    ],
)
@pytest.mark.parametrize("method", ["magnitude", "fake_prune"])
def test_sparsity_stands_for_a_pattern(tmp_path, method, step, pattern):
    (got,) = read(tmp_path, f"name: n\nmodel: {{path: m}}\nsteps: [{{method: {method}, {step}}}]\n").steps
    params: Any = got.params
    assert params.pattern == pattern
    assert got.given == {"pattern"}
    written = yaml.safe_dump({"name": "n", "model": {"path": "m"}, "steps": [got.as_dict()]})
    assert read(tmp_path, written).steps[0].params == params


def test_a_trainer_has_no_step_schedule_but_may_have_its_own(tmp_path):
    text = """\
        name: n
        model: {path: m}
        data: {train: {path: builtin:train}}
        steps: [{method: fake_train, tokens: 5, schedule: wsd}]
        """
    (step,) = read(tmp_path, textwrap.dedent(text)).steps
    params: Any = step.params
    assert (step.schedule, params.schedule) == ("block", "wsd")
    assert step.as_dict()["schedule"] == "wsd"


def test_keys_that_yaml_reads_as_booleans_stay_text(tmp_path):
    recipe = read(tmp_path, changed("heldout: {", "on: {").replace("[heldout]", '["on"]'))
    assert list(recipe.data.evaluation) == ["on", "second"]


# bad recipes: (what is replaced, by what, line of the error, words of the message)

RTN = "  - {method: rtn, bits: 4}"
TRAIN = '  - {method: ast, pattern: "2:4", tokens: 1000000, '
BAD: list[tuple[str, str, int, list[str]]] = [
    ("bits", "bitz", 11, ["unknown key 'bitz' in step 2", "group_size", "Did you mean 'bits'?"]),
    ("seq_len", "seqlen", 4, ["unknown key 'seqlen' in data.calibration", "Did you mean 'seq_len'?"]),
    ("model:", "modle:", 2, ["unknown key 'modle' in the recipe", "Did you mean 'model'?"]),
    ("{perplexity", "{preplexity", 12, ["unknown key 'preplexity' in evaluate", "Did you mean 'perplexity'?"]),
    ("[heldout]", "[heldout], gates: {max_ppl: 5%}", 12, ["in evaluate.gates", "Did you mean 'max_ppl_increase'?"]),
    ("heldout: {path", "heldout: {paht", 6, ["unknown key 'paht' in data.evaluation.heldout", "'path'"]),
    ("name: good", "name: good\n<<: {seed: 1}", 2, ["unknown key '<<'"]),
    ("bits: 4", "sparsity: 0.5", 11, ["unknown key 'sparsity' in step 2"]),
    ("bits: 4", "bits: 4, bits: 3", 11, ["key 'bits' is given twice", "line 11"]),
    ("evaluate:", "name: again\nevaluate:", 12, ["key 'name' is given twice, first on line 1"]),
    ('"2:4"', '"2:4"\n    pattern: "4:8"', 11, ["key 'pattern' is given twice, first on line 10"]),
    ('"2:4"', "2:4", 10, ["an unquoted 2:4 as the number 124", 'write pattern: "2:4"']),
    ('"2:4"', "124", 10, ["124 is a number", '"2:4"']),
    ('"2:4"', '"2-4"', 10, ["'2-4' is not understood", "N:M"]),
    ('"2:4"', '"4:2"', 10, ["4:2", "1 <= N < M"]),
    ("samples: 8", "samples: 2:4", 4, ["2:4", "124"]),
    ("bits: 4", 'bits: "4"', 11, ["bits is the text '4'", "whole number", "write bits: 4 without quotes"]),
    ("bits: 4", "bits: 4.5", 11, ["bits is 4.5", "whole number"]),
    ("bits: 4", "bits: true", 11, ["bits is true", "whole number"]),
    ("bits: 4", "bits:", 11, ["bits is empty", "whole number"]),
    ("bits: 4", "bits: 9", 11, ["bits is 9", "at most 8"]),
    ("bits: 4", "bits: 1", 11, ["bits is 1", "at least 2"]),
    ("bits: 4", "bits: 010", 11, ["010", "octal"]),
    ("bits: 4", "bits: 1e1", 11, ["YAML reads 1e1 as text", "write 10"]),
    ("bits: 4", "symmetric: 'true'", 11, ["true or false", "write true without quotes"]),
    ("bits: 4", "ignore: lm_head", 11, ["ignore is the text 'lm_head'", "a list", "ignore: [lm_head]"]),
    ("bits: 4", "ignore: [3]", 11, ["ignore[0] is 3", 'write "3" in quotes']),
    ("bits: 4", "targets: []", 11, ["targets is empty"]),
    ("bits: 4", "schedule: groups", 11, ["'groups'", "'block' or 'group'", "Did you mean 'group'?"]),
    ("name: good", "name: 12", 1, ["name is 12", 'write "12" in quotes']),
    ("name: good", "name: no", 1, ["unquoted no as false", 'write "no"']),
    ("name: good", "name: ../x", 1, ["'../x'", "letters, digits"]),
    ("name: good", "name: ''", 1, ["letters, digits"]),
    ("name: good\n", "", 1, ["the recipe lacks the required key 'name'"]),
    ("{path: builtin:tiny}", "{dtype: auto}", 2, ["model lacks the required key 'path'"]),
    ("{path: builtin:tiny}", "builtin:tiny", 2, ["expected a mapping", "write model: {path: builtin:tiny}"]),
    ("{path: builtin:tiny}", "", 2, ["model is empty, expected a mapping"]),
    ("builtin:tiny", "a, dtype: bfloat", 2, ["'bfloat'", "'float32'", "Did you mean 'bfloat16'?"]),
    ("builtin:tiny", "a, device: gpu", 2, ["device 'gpu'", "cuda:N", "Did you mean 'cpu'?"]),
    ("builtin:tiny", "a, device: 'cuda:x'", 2, ["'cuda:x'"]),
    ("builtin:tiny", "''", 2, ["path is empty"]),
    ("name: good", "name: good\ncoverage: 1e-4", 2, ["YAML reads 1e-4 as text", "write 1.0e-4"]),
    ("name: good", "name: good\ncoverage: 2", 2, ["coverage is 2", "at most 1"]),
    ("name: good", "name: good\ncoverage: .nan", 2, [".nan", "finite"]),
    ("name: good", "name: good\nseed: -1", 2, ["seed is -1", "at least 0"]),
    ("name: good", "name: good\nseed: 4294967296", 2, ["less than 4294967296"]),
    ("name: good", "name: good\nplugins: [nope.py]", 2, ["plugin", "nope.py is not there"]),
    ("name: good", "name: good\nplugins: nope.py", 2, ["expected a list", "plugins: [nope.py]"]),
    ("name: good", "name: good\n? [a]\n: 3", 2, ["a key must be text"]),
    ("method: wanda", "method: wnada", 9, ["no method 'wnada'", "sparsegpt", "Did you mean 'wanda'?"]),
    ("method: wanda", "methd: wanda", 9, ["lacks the required key 'method'", "wanda"]),
    ("method: wanda", "method: 3", 9, ["method is 3", "wanda"]),
    ("{method: rtn, bits: 4}", "rtn", 11, ["a step is the text 'rtn'", "mapping"]),
    ("{method: rtn, bits: 4}", "method: fake_prune", 11, ["step 2 lacks the required key 'pattern'"]),
    ('pattern: "2:4"', "sparsity: 50", 10, ["sparsity 50", "write 0.5 for 50 %"]),
    ('pattern: "2:4"', "sparsity: 1", 10, ["sparsity 1 is no fraction", "sparsity < 1"]),
    ('pattern: "2:4"', "sparsity: -0.5", 10, ["sparsity is -0.5", "at least 0"]),
    ('pattern: "2:4"', "sparsity: half", 10, ["sparsity", "'half'", "0.05 or 5%"]),
    ('"2:4"', '"2:4"\n    sparsity: 0.6', 11, ['"2:4" has sparsity 0.5', "0.6"]),
    ("{method: rtn, bits: 4}", '{method: fake_prune, pattern: "2:4", power: 5e-1}', 11, ["write 5.0e-1"]),
    ("{method: rtn, bits: 4}", '{method: fake_prune, pattern: "2:4", power: 0.0}', 11, ["more than 0"]),
    ("{method: rtn, bits: 4}", '{method: fake_prune, pattern: "2:4", betas: [x, 1.0]}', 11, ["betas[0]", "'x'"]),
    ("{method: rtn, bits: 4}", '{method: fake_prune, pattern: "2:4", nested: {dept: 1}}', 11, ["'dept'", "'depth'"]),
    ("steps:\n", "x_steps:\n", 8, ["x_steps"]),
    ("bits: 4}", "bits: 4}\n  - {method: magnitude}", 12, ["step 3 (magnitude) prunes", "step 2 (rtn", ":11)"]),
    ("bits: 4}", "bits: 4}\n  - {method: rtn}", 12, ["step 3 (rtn) quantizes", "step 2 (rtn", ":11)"]),
    ("calibration:", "train:", 9, ["step 1 (wanda) reads a calibration text", "builtin:calibration"]),
    (
        "method: wanda\n    pattern",
        "method: fake_train\n    tokens: 3 #",
        9,
        ["reads a training text", "builtin:train"],
    ),
    ("[heldout]", "[heldot]", 12, ["no text 'heldot'", "heldout, second", "Did you mean 'heldout'?"]),
    ("[heldout]", "[heldout, heldout]", 12, ["'heldout' is listed twice"]),
    ("[heldout]", "heldout", 12, ["perplexity is the text 'heldout'", "[heldout]"]),
    ("[heldout]", "[], gates: {max_ppl_increase: 5%}", 12, ["needs a text to measure"]),
    ("[heldout]", "[heldout], gates: {max_ppl_increase: 1e-2}", 12, ["write 1.0e-2"]),
    ("[heldout]", "[heldout], lm_eval: {limit: 5}", 12, ["names no tasks"]),
    ("samples: 8", "samples: 0", 4, ["samples is 0", "at least 1"]),
    ("samples: 8", "samples: many", 4, ["'many' is no count", "50M"]),
    ("seq_len: 32", "seq_len: 1", 4, ["seq_len is 1", "at least 2"]),
    ("builtin:calibration", "builtin:calibraton", 4, ["'calibraton'", "Did you mean 'calibration'?"]),
    ("[a.txt, b.txt.xz]", "[a.txt, 3]", 7, ["path must be text or a list of texts"]),
    ("[a.txt, b.txt.xz]", "[]", 7, ["path must be text or a list of texts"]),
    ("builtin:heldout", "hub:wikitext/raw:test", 6, ["hub:wikitext/raw:test", "allow_network: true"]),
    ("second:", "a/b:", 7, ["'a/b'", "letters, digits"]),
    ("evaluate:", "export: {formats: [onnx]}\nevaluate:", 12, ["format 'onnx'", "dense, gptq"]),
    ("evaluate:", "export: {formats: [gtpq]}\nevaluate:", 12, ["Did you mean 'gptq'?"]),
    ("evaluate:", "export: {formats: [dense, dense]}\nevaluate:", 12, ["'dense' is listed twice"]),
    ("  - {method: rtn, bits: 4}", "export: {formats: [gptq]}", 11, ["gptq export", "no step quantizes"]),
    ("bits: 4}", "bits: 3}\nexport: {formats: [awq]}", 12, ["codes of 4 bits", "step 2 (rtn) have 3"]),
    (RTN, TRAIN + "batch: 8, micro_batch: 3}", 11, ["micro_batch 3 does not divide batch 8"]),
    (RTN, TRAIN + "batch: 9, gpus: 2}", 11, ["batch 9 does not divide among 2 processes"]),
    (RTN, TRAIN + "batch: 8, gpus: 2, micro_batch: 8}", 11, ["8 does not divide the 4 windows that each of 2"]),
    ("model:", "\tmodel:", 2, ["a tab is used", "spaces"]),
    ("[heldout]}", "[heldout}", 12, ["not YAML"]),
    ("name: good", "name: @good", 1, ["not YAML", "quotes"]),
    ("name: good", "name: a: b", 1, ["not YAML", "quotes"]),
    ("name: good", "name: &a good", 1, ["anchor &a"]),
    ("name: good", "name: *a", 1, ["alias *a"]),
    ("name: good", "name: !!python/object/apply:os.system [true]", 1, ["!!python/object/apply:os.system", "refused"]),
    ("name: good", "name: !!str good", 1, ["tags are refused"]),
    ("steps:", "---\nsteps:", 8, ["second document"]),
    ("name: good", f"name: {'[' * 50}{']' * 50}", 1, ["20 levels"]),
    ("name: good", "name: go\x01od", 1, ["#x0001"]),
    ("name: good", 'name: "a\\0b"', 1, ["zero character"]),
    ("name: good", f"name: good\nseed: {'9' * 5000}", 2, ["no number that can be read"]),
]


def test_tokens_of_less_than_a_step_are_named_by_line(tmp_path):
    text = GOOD.replace(RTN, TRAIN + "batch: 999}").replace("data:", "data:\n  train: {path: a.txt}")
    with pytest.raises(RecipeError, match="yaml:12: tokens 1,000,000 is less than one step of 999 x 1024 = 1,022,976"):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("old", "new", "line", "words"), BAD, ids=[f"{i}-{bad[1][:24]!r}" for i, bad in enumerate(BAD)]
)
def test_bad_recipe_is_named_by_line(tmp_path, old, new, line, words):
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, changed(old, new))
    told = next(told for told in str(caught.value).split("\n") if words[0] in told)
    assert told.startswith(f"{tmp_path}/recipe.yaml:{line}: ")
    for word in words:
        assert word in told


def test_several_mistakes_are_told_at_once_in_the_order_of_the_file(tmp_path):
    text = (
        changed("name: good", "nmae: good").replace("seq_len: 32", "seq_len: x").replace("bits: 4", "bits: 4, bits: 5")
    )
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    told = str(caught.value).split("\n")
    assert [line.split(": ")[0].rpartition(":")[2] for line in told] == ["1", "1", "4", "11"]
    assert caught.value.where == f"{tmp_path}/recipe.yaml:1"


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        (b"", 1, "empty"),
        (b"# only a comment\n", 1, "empty"),
        (b"- a\n- b\n", 1, "holds a list"),
        (b"\njust text\n", 2, "the text 'just text'"),
        (b"name: a\nmodel: \xff\n", 2, "0xff is not UTF-8"),
        ("name: a".encode("utf-16"), 1, "not UTF-8"),
        (b"a" * 300_000, None, "larger than 256 KiB"),
    ],
)
def test_file_that_is_no_recipe(tmp_path, text, line, word):
    with pytest.raises(RecipeError, match=word) as caught:
        read(tmp_path, text)
    assert caught.value.where == f"{tmp_path}/recipe.yaml" + (f":{line}" if line else "")


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "wanda_2to4.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=r"no such recipe file\. Did you mean 'wanda_2to4.yaml'\?"):
        read_recipe(tmp_path / "wnda_2to4.yaml")
    with pytest.raises(RecipeError, match=r"no directory .*nowhere"):
        read_recipe(tmp_path / "nowhere" / "wanda.yaml")
    with pytest.raises(RecipeError, match=r"is a directory.*wanda_2to4\.yaml"):
        read_recipe(tmp_path)


def test_byte_order_mark_is_accepted(tmp_path):
    assert read(tmp_path, b"\xef\xbb\xbf" + GOOD.encode()).name == "good"


@pytest.mark.parametrize("seed", range(150))
def test_no_damage_to_the_text_escapes_as_another_error(tmp_path, seed):
    chance = random.Random(seed)
    text = GOOD
    for _ in range(chance.randint(1, 4)):
        at, end = sorted(chance.sample(range(len(text)), 2))
        end = min(end, at + 6)
        junk = ["", "[", "}", ": ", "\n", "- ", '"', "null", "1e5", "-1", "~", "{a: 1}", "\t", "é", "*", "!x ", "|\n"]
        text = text[:at] + chance.choice(junk) + text[end:]
    told = ""
    try:
        read(tmp_path, text)
    except SparsekitError as error:
        told = str(error)
    assert not told or told.startswith(f"{tmp_path}/recipe.yaml:")


# overrides


@pytest.mark.parametrize(
    ("argument", "get", "value"),
    [
        ("steps.1.bits=3", lambda r: r.steps[1].params.bits, 3),
        ("steps.1.group_size=-1", lambda r: r.steps[1].params.group_size, -1),
        ("steps.0.pattern=4:8", lambda r: r.steps[0].params.pattern, Pattern(4, 8)),
        ("steps.0.pattern='4:8'", lambda r: r.steps[0].params.pattern, Pattern(4, 8)),
        ("steps.0.ignore=[a, b]", lambda r: r.steps[0].ignore, ["a", "b"]),
        ("steps.0={method: magnitude}", lambda r: r.steps[0].method.name, "magnitude"),
        ("evaluate.gates.max_ppl_increase=5%", lambda r: r.evaluate.gates.max_ppl_increase, 0.05),
        ("data.train.path=/t.txt", lambda r: r.data.train.path, "/t.txt"),
        ("data.evaluation.second.path.1=c.txt", lambda r: r.data.evaluation["second"].paths, ["a.txt", "c.txt"]),
        ("data.calibration.separator=<|endoftext|>", lambda r: r.data.calibration.separator, "<|endoftext|>"),
        ("output=/tmp/out=put", lambda r: r.output, "/tmp/out=put"),
        ("output=", lambda r: r.output, None),
        ("model.trust_remote_code=true", lambda r: r.model.trust_remote_code, True),
    ],
)
def test_override(tmp_path, argument, get, value):
    assert get(read(tmp_path, GOOD, argument)) == value


def test_overrides_apply_in_order(tmp_path):
    recipe = read(tmp_path, GOOD, "steps.1={method: rtn, bits: 2}", "steps.1.bits=5")
    assert recipe.steps[1].params.bits == 5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("argument", "line", "words"),
    [
        ("steps.1.bits=99", 11, ["bits is 99"]),
        ("steps.1.bitz=3", 11, ["unknown key 'bitz'", "Did you mean 'bits'?"]),
        ("steps.1={method: rtn, bitz: 3}", 11, ["unknown key 'bitz'"]),
        ("steps.2.bits=3", 8, ["no entry '2'", "steps.0 to steps.1"]),
        ("steps.-1.bits=3", 8, ["no entry '-1'"]),
        ("steps.last.bits=3", 8, ["no entry 'last'"]),
        ("modle.path=x", 1, ["unknown key 'modle'", "Did you mean 'model'?"]),
        ("name.x=3", 1, ["name is the text 'good'", "no key 'x'"]),
        ("steps.1.bits=[1", 11, ["not YAML"]),
        ("steps.1.bits=1e1", 11, ["write 10"]),
        ("steps.1.bits={a: 1, a: 2}", 11, ["given twice"]),
        ("evaluate.perplexity.0=heldot", 12, ["Did you mean 'heldout'?"]),
    ],
)
def test_bad_override_names_itself(tmp_path, argument, line, words):
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, GOOD, argument)
    for word in [f"recipe.yaml:{line} (--set {argument}): ", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("argument", ["steps", "=3", "steps..bits=3", ".=1", ""])
def test_override_that_is_no_assignment(tmp_path, argument):
    with pytest.raises(RecipeError, match="KEY=VALUE"):
        read(tmp_path, GOOD, argument)


# where and resolve


def test_where(tmp_path):
    recipe = read(tmp_path, GOOD, "steps.1.bits=3", "evaluate.gates.max_ppl_increase=1")
    file = f"{tmp_path}/recipe.yaml"
    assert recipe.where() == f"{file}:1"
    assert recipe.where("steps", 0, "pattern") == f"{file}:10"
    assert recipe.where("steps", 0, "ignore", 3) == f"{file}:9"
    assert recipe.where("steps", 1) == f"{file}:11"
    assert recipe.where("steps", 1, "bits") == f"{file}:11 (--set steps.1.bits=3)"
    assert recipe.where("export", "formats") == f"{file}:1"
    assert "(--set evaluate.gates" in recipe.where("evaluate", "gates", "max_ppl_increase")


def test_resolve(tmp_path):
    recipe = read(tmp_path, GOOD)
    assert recipe.resolve("builtin:tiny") == "builtin:tiny"
    assert recipe.resolve("../x") == str(tmp_path.parent / "x")
    assert recipe.resolve("org/name") == str(tmp_path / "org" / "name")
    assert recipe.resolve("/a/b") == "/a/b"
    assert not recipe.resolve("~/a").startswith("~")
    online = read(tmp_path, GOOD, "allow_network=true", "data.evaluation.hub={path: 'hub:a/b:test'}")
    assert online.resolve("org/name") == "org/name"
    assert online.resolve("./org/name") == str(tmp_path / "org" / "name")
    assert online.resolve("hub:a/b:test") == "hub:a/b:test"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert online.resolve("org/name") == str(tmp_path / "org" / "name")


def test_output_is_relative_to_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    recipe = read(tmp_path / "deep", GOOD, "output=out")
    assert recipe.output_directory() == Path("out")
    assert f"output: {tmp_path}/out\n" in recipe.resolved_yaml()
    assert f"directory: {tmp_path}/out/export\n" in recipe.resolved_yaml()
    assert read(tmp_path / "deep", GOOD, "export.directory=e").export_directory() == Path("e")


def test_resolved_recipe_is_complete_and_absolute(tmp_path):
    recipe = read(tmp_path, changed("[heldout]}", "[heldout], lm_eval: {tasks: [t], tasks_dir: tasks}}"))
    values = yaml.safe_load(recipe.resolved_yaml())
    assert list(values) == list(Recipe.model_fields)
    assert values["data"]["evaluation"]["second"]["path"] == [f"{tmp_path}/a.txt", f"{tmp_path}/b.txt.xz"]
    assert values["evaluate"]["lm_eval"]["tasks_dir"] == f"{tmp_path}/tasks"
    assert values["steps"][1]["group_size"] == 128
    assert values["steps"][1]["targets"] == ["Linear"]


# plugins

PLUGIN = '''
import sparsekit as sk

@sk.linear_method("{name}", kind="prune")
def {name}(layer: sk.LinearState, /, *, {parameter}: int = 1) -> sk.LinearState:
    """Nothing."""
    return layer
'''


def test_plugin_of_the_recipe_and_of_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(PLUGIN.format(name="own_one", parameter="x"))
    (tmp_path / "extra.py").write_text(PLUGIN.format(name="extra_one", parameter="x"))
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: n\nmodel: {path: m}\nplugins: [own.py]\nsteps: [{method: own_one, x: 3}, {method: extra_one}]\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(path, plugins=[Path("extra.py")])
    assert recipe.plugins == ["own.py", f"{tmp_path}/extra.py"]
    assert yaml.safe_load(recipe.resolved_yaml())["plugins"] == [f"{tmp_path}/own.py", f"{tmp_path}/extra.py"]
    assert recipe.steps[0].params.x == 3  # type: ignore[attr-defined]


def test_bad_plugins(tmp_path):
    (tmp_path / "good.yaml").write_text(GOOD)
    with pytest.raises(PluginError, match=r"nope\.py is not there"):
        read_recipe(tmp_path / "good.yaml", plugins=[tmp_path / "nope.py"])
    (tmp_path / "taken.py").write_text(PLUGIN.format(name="taken_one", parameter="targets"))
    with pytest.raises(PluginError, match="'targets' has the name of a key that every step has"):
        read(tmp_path, "name: n\nmodel: {path: m}\nplugins: [taken.py]\nsteps: [{method: taken_one}]\n")
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(RecipeError, match=r"recipe.yaml:3: plugin .*broken.py failed to load: ZeroDivisionError"):
        read(tmp_path, "name: n\nmodel: {path: m}\nplugins: [broken.py]\nsteps: [{method: rtn}]\n")


# schema


def test_schema_has_a_branch_for_every_method():
    schema = recipe_schema()
    branches = schema["properties"]["steps"]["items"]["oneOf"]
    assert {branch["$ref"].rpartition("/")[2] for branch in branches} == {
        m.name for m in METHODS if m.kind != "allocate"
    }
    for method in (found for found in METHODS if found.kind != "allocate"):
        properties = schema["$defs"][method.name]["properties"]
        assert set(method.parameters.model_fields) <= set(properties)
        assert properties["method"]["const"] == method.name
    assert schema["$defs"]["wanda"]["properties"]["pattern"]["type"] == "string"
    assert schema["$defs"]["fake_prune"]["anyOf"] == [{"required": ["pattern"]}, {"required": ["sparsity"]}]
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["name", "model", "steps"]


def test_every_reference_of_the_schema_resolves():
    schema = recipe_schema()
    references = [part.split('"')[0] for part in str(schema).replace("'", '"').split('"#/$defs/')[1:]]
    assert references
    assert set(references) <= set(schema["$defs"])
