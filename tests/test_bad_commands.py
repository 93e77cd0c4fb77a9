"""Bad and hostile inputs of the commands that take no recipe: inspect, generate, report, check, new-method."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from test_bad_inputs import base, config, pipe, put, seen, tensors, weights  # noqa: F401  # `base` is a fixture
from test_imports import exports  # noqa: F401  # a fixture

from sparsekit.cli import main
from sparsekit.files import remove_temporaries, write_text
from sparsekit.interchange.adapter import ADAPTER, OUR_CONFIG, OUR_WEIGHTS
from sparsekit.training.snapshots import save_atomically

LONG = "x" * 300
PROMPT = ("generate", "BASE/model", "--prompt", "a", "--max-tokens", "1")
CHAT = (*PROMPT, "--chat")
UP = "base_model.model.model.layers.0.mlp.up_proj"


def nothing(base: Path) -> None:  # noqa: F811
    """The input is bad as it is."""


def template(value: object):
    """Give the tokenizer a chat template."""

    def spoil(base: Path) -> None:  # noqa: F811
        path = base / "model" / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": value}))

    return spoil


def adapter(about: object, *shapes: tuple[int, ...]):
    """Put low-rank branches of these shapes beside the weights."""

    def spoil(base: Path) -> None:  # noqa: F811
        put("model/adapter/adapter_config.json", json.dumps(about))(base)
        found = {f"{UP}.lora_{part}.weight": torch.ones(shape) for part, shape in zip("AB", shapes, strict=False)}
        save_file(found, base / "model" / "adapter" / "adapter_model.safetensors")

    return spoil


def ours(about: object):
    """Put low-rank branches of integers beside the weights."""

    def spoil(base: Path) -> None:  # noqa: F811
        put(f"model/{ADAPTER}/{OUR_CONFIG}", json.dumps(about))(base)
        save_file({"x": torch.ones(1)}, base / "model" / ADAPTER / OUR_WEIGHTS)

    return spoil


def branch(bits: object, inputs: object) -> dict[str, object]:
    """Both factors of a branch of integers with these settings."""
    about = {"bits": bits, "inputs": inputs}
    return {"version": 1, "branches": {"x": [about, about]}}


def stage(number: int) -> str:
    choices = (f"c{number}{choice}: {{method: magnitude, sparsity: 0.{choice + 1}}}" for choice in range(10))
    return f"  s{number}: {{{', '.join(choices)}}}\n"


ARMS = "name: arms\nmodel: {path: model}\nvariants:\n" + "".join(map(stage, range(7)))
OURS = {"target_modules": ["model.layers.0.mlp.up_proj"]}
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
COMMANDS = [
    ("inspect a long name", ("inspect", LONG), nothing, "File name too long"),
    ("inspect nobody's model", ("inspect", "~nobody/model"), nothing, "is no directory"),
    ("inspect a run", ("inspect", "BASE/run"), put("run/export/gptq/config.json", "{}"), "run/export/gptq"),
    ("inspect a file", ("inspect", "BASE/text.txt"), nothing, "name the one that holds its config.json"),
    ("inspect a run", ("inspect", "BASE"), nothing, "holds no config.json"),
    ("inspect by no pattern", ("inspect", "BASE/model", "--pattern", "9:4"), nothing, "--pattern: pattern 9:4 must"),
    ("inspect a pipe", ("inspect", "BASE/model"), pipe("model/more.json"), "more.json is no file"),
    ("inspect a deep marker", ("inspect", "BASE/model"), put("model/sparsekit.json", "[" * 10**5), "cannot read"),
    ("inspect a marker of text", ("inspect", "BASE/model"),
     put("model/sparsekit.json", '{"files": {"a": {"bytes": "many", "sha256": "x"}}}'), "has no digest of a"),
    ("inspect half a header", ("inspect", "BASE/model"), weights(lambda data: data[:200]), "cannot read"),
    ("generate from a long name", ("generate", LONG, "--prompt", "a"), nothing, "File name too long"),
    ("generate no token", (*PROMPT[:4], "--max-tokens", "0"), nothing, "--max-tokens is 0"),
    ("generate at NaN degrees", (*PROMPT, "--temperature", "nan"), nothing, "--temperature is nan"),
    ("generate from a large seed", (*PROMPT, "--seed", "9" * 40), nothing, "are seeds"),
    ("generate on a TPU", (*PROMPT, "--device", "tpu"), nothing, "device 'tpu'"),
    ("generate in int4", (*PROMPT, "--dtype", "int4"), nothing, "dtype 'int4'"),
    ("generate from no UTF-8", ("generate", "BASE/model", "--prompt", "\udcff"), nothing, "is no UTF-8 text"),
    ("generate from too much", ("generate", "BASE/model", "--prompt", "word " * 400), nothing, "shorten it"),
    ("generate from NaN", PROMPT, tensors(lambda found: found["model.norm.weight"].fill_(float("nan"))), "NaN after"),
    ("draw from NaN", (*PROMPT, "--temperature", "1"),
     tensors(lambda found: found["model.norm.weight"].fill_(float("nan"))), "computes NaN after the prompt"),
    ("generate with less vocabulary", ("generate", "BASE/model", "--prompt", "The quick brown"), lambda at: (
        config(vocab_size=100)(at), tensors(lambda found: found.update(
            {"model.embed_tokens.weight": found["model.embed_tokens.weight"][:100].clone()}))(at)), "knows 100"),
    ("chat without a template", CHAT, nothing, "this one has none"),
    ("chat in no template", CHAT, template("{% for %}"), "chat template fails: TemplateSyntaxError"),
    ("chat in a number", CHAT, template(7), "chat template fails: TypeError"),
    ("chat in a template that fails", CHAT, template("{{ raise_exception('no') }}"), "fails: TemplateError: no"),
    ("chat in a template that breaks out", CHAT, template("{{ ().__class__.__mro__ }}"), "fails: SecurityError"),
    ("chat in a template without an end", CHAT, template(ENDLESS), "takes more than 0.1 seconds"),
    ("branches of nobody", PROMPT, adapter([], (2, 2)), "has no target_modules"),
    ("branches of no linear", PROMPT, adapter({"target_modules": ["x"]}, (2, 2)), "lacks"),
    ("branches that are no pair", PROMPT, adapter(OURS, (2, 64), (128, 3)), "no pair"),
    ("branches that are no matrices", PROMPT, adapter(OURS, (2,), (128,)), "no pair"),
    ("integer branches of nobody", PROMPT, ours([]), "is not one of ours"),
    ("integer branches of 99 bits", PROMPT, ours(branch(99, 64)), "up has 99 bits and 64 inputs"),
    ("integer branches of bits in words", PROMPT, ours(branch("4", 64)), "up has '4' bits and 64 inputs"),
    ("integer branches of nothing", PROMPT, ours(branch(4, 0)), "up has 4 bits and 0 inputs"),
    ("integer branches of words", PROMPT, ours({"version": 1, "branches": {"x": 3}}), "is not one of ours"),
    ("report of nothing", ("report", "BASE/model"), nothing, "holds no report.json"),
    ("report of a list", ("report", "BASE/run"), put("run/report.json", "[]"), "is no report of this version"),
    ("report of an empty object", ("report", "BASE/run"), put("run/report.json", "{}"), "is no report of this version"),
    ("report of half", ("report", "BASE/run"), put("run/report.json", '{"name": "x'), "cannot read"),
    ("report of steps in words", ("report", "BASE/run"), lambda at: report(at, steps="x"), "is no report of this"),
    ("card of steps in words", ("report", "BASE/run", "--deploy"), lambda at: report(at, steps="x"), "is no report"),
    ("compare a list", ("compare", "BASE/run", "BASE/run"), put("run/report.json", "{}"), "does not say what it was"),
    ("compare ten million arms", ("compare", "BASE/arms.yaml"), put("arms.yaml", ARMS), "10,000,000 arms, more"),
    ("check nothing", ("check", "wnada"), nothing, "Did you mean 'wanda'?"),
    ("check with no pattern", ("check", "magnitude", "--set", "pattern=9:4"), nothing, "pattern 9:4 must keep"),
    ("plugin of a long name", ("methods", "--plugin", f"{LONG}.py"), nothing, "File name too long"),
    ("plugin that links to itself", ("methods", "--plugin", "BASE/p.py"),
     lambda at: (at / "p.py").symlink_to(at / "p.py"), "is not there"),
    ("a method called torch", ("new-method", "torch", "--directory", "BASE/n"), nothing, "'torch' is installed"),
    ("a section called json", ("new-method", "json", "--kind", "section", "--directory", "BASE/n"), nothing, "hide"),
    ("a method called class", ("new-method", "class", "--directory", "BASE/n"), nothing, "no word of Python"),
    ("a method out of its place", ("new-method", "../x", "--directory", "BASE/n"), nothing, "lower case letters"),
    ("a method nowhere", ("new-method", "own", "--directory", "/proc/x"), nothing, "cannot write /proc/x"),
    ("bench on a TPU", ("bench", "--small", "--device", "tpu"), nothing, "device 'tpu'"),
]  # fmt: skip


def report(base: Path, **values: object) -> None:  # noqa: F811
    """Change keys of a finished run's report."""
    path = base / "run" / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def place(base, exports) -> Path:  # noqa: F811
    """A model, a text, and the report of a finished run."""
    (base / "run").mkdir()
    shutil.copyfile(exports[0].parent / "report.json", base / "run" / "report.json")
    return base


@pytest.mark.parametrize(("arguments", "spoil", "words"), [case[1:] for case in COMMANDS], ids=[c[0] for c in COMMANDS])
def test_bad_command(place, monkeypatch, arguments, spoil, words):
    monkeypatch.setattr("sparsekit.inference.generate.PATIENCE", 0.1)
    monkeypatch.chdir(place)
    spoil(place)
    before = seen(place)
    result = CliRunner().invoke(main, [word.replace("BASE", str(place)) for word in arguments])
    assert result.exit_code == 2, (result.exit_code, result.output, result.exc_info)
    assert isinstance(result.exception, SystemExit), result.exc_info
    assert words in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output
    assert result.output.count("\n") <= 24
    assert len(result.output) < 2500
    assert seen(place) == before


def test_a_file_that_may_not_be_read_is_named_and_verbose_shows_where(place, monkeypatch):
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/some/tokenizer.json")

    monkeypatch.setattr("sparsekit.models.inspection.inspect_model", denied)
    result = CliRunner().invoke(main, ["inspect", str(place / "model")])
    assert result.exit_code == 2
    assert "error: cannot use /some/tokenizer.json: Permission denied; sparsekit -v shows where" in result.output
    assert isinstance(CliRunner().invoke(main, ["-v", "inspect", "x"]).exception, PermissionError)


def test_what_inspect_finds_striking(place):
    tensors(lambda found: found["model.layers.1.mlp.up_proj.weight"].fill_(float("inf")))(place)
    result = CliRunner().invoke(main, ["inspect", str(place / "model"), "--pattern", "2:7"])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "note: 1 linears hold inf or NaN: model.layers.1.mlp.up_proj" in said
    assert "note: the groups of 2:7 divide the inputs of no layer: nothing was counted" in said


def test_temporaries_of_others_are_left_alone(tmp_path):
    for name in (f".a.json.{os.getpid()}.tmp", ".step-00000008.safetensors.tmp", ".notes.tmp"):
        (tmp_path / name).write_text("")
    for name in (".step-00000008.tmp", ".sparsekit-x1.tmp"):  # shards of a checkpoint; files that time the disk
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("")
    remove_temporaries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".notes.tmp"]


@pytest.mark.parametrize(
    "write", [lambda at: write_text(at, "x"), lambda at: save_atomically(at, {"x": torch.ones(1)})]
)
def test_ctrl_c_in_a_write_leaves_nothing_behind(tmp_path, monkeypatch, write):
    def pressed(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", pressed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
