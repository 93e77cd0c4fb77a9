"""Bad and hostile inputs through the command line: one screen, one named error, exit code 2, nothing written.

The recipes of test_recipe.py go through the same door here; `test_count` counts the whole.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_recipe import BAD, _methods, changed  # noqa: F401  # the fixture registers the methods BAD speaks of

from sparsekit.cli import main

RECIPE = """\
name: bad
output: {base}/out
model: {{path: {base}/model, device: cpu}}
data:
  calibration: {{path: {base}/text.txt, samples: 2, seq_len: 16}}
  evaluation: {{held: {{path: {base}/text.txt, samples: 2, seq_len: 16}}}}
steps:
  - {{method: gptq, group_size: 16}}
evaluate: {{perplexity: [held]}}
"""
Spoil = Callable[[Path], None]


def config(**values: object) -> Spoil:
    """Change keys of the model's config.json; None removes one."""

    def spoil(base: Path) -> None:
        path = base / "model" / "config.json"
        raw = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))

    return spoil


def put(name: str, content: str | bytes) -> Spoil:
    """Write a file."""

    def spoil(base: Path) -> None:
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def without(*names: str) -> Spoil:
    def spoil(base: Path) -> None:
        for name in names:
            (base / "model" / name).unlink()

    return spoil


def written(old: str, new: str, *spoils: Spoil) -> Spoil:
    """Change the recipe."""

    def spoil(base: Path) -> None:
        path = base / "bad.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new.replace("BASE", str(base))))
        for each in spoils:
            each(base)

    return spoil


def weights(change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(base: Path) -> None:
        path = base / "model" / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Spoil:
    def spoil(base: Path) -> None:
        path = base / "model" / "model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path, {"format": "pt"})

    return spoil


def renamed(ending: str) -> Spoil:
    return lambda base: (base / "model" / "model.safetensors").rename(base / "model" / f"pytorch_model.{ending}")  # type: ignore[func-returns-value]


def directory(name: str) -> Spoil:
    def spoil(base: Path) -> None:
        (base / name).unlink(missing_ok=True)
        (base / name).mkdir(parents=True)

    return spoil


def link(name: str, to: str) -> Spoil:
    """Put a link where a file was."""

    def spoil(base: Path) -> None:
        (base / name).unlink(missing_ok=True)
        (base / name).symlink_to(to.replace("BASE", str(base)))

    return spoil


def pipe(name: str) -> Spoil:
    """Put a pipe that nobody writes to where a file was."""

    def spoil(base: Path) -> None:
        (base / name).unlink(missing_ok=True)
        os.mkfifo(base / name)

    return spoil


def index(content: str) -> Spoil:
    return put("model/model.safetensors.index.json", content)


UP = "model.layers.1.mlp.up_proj.weight"
CODE = "from pathlib import Path\nPath(__file__).with_name('ran').write_text('')\nclass C: pass\n"
NEO = {"model_type": "gpt_neo", "max_position_embeddings": 150_000, "hidden_size": 64, "num_layers": 2, "num_heads": 4,
       "attention_types": [[["global", "local"], 1]], "vocab_size": 8192}  # fmt: skip
MODELS: list[tuple[str, Spoil, str]] = [
    ("no config", without("config.json"), "holds no config.json"),
    ("empty config", put("model/config.json", "{}"), "no causal LM"),
    ("empty config file", put("model/config.json", ""), "config.json"),
    ("cut config", put("model/config.json", '{"model_type": "lla'), "config.json"),
    ("list for a config", put("model/config.json", "[]"), "config.json"),
    ("null config", put("model/config.json", "null"), "config.json"),
    ("number for a config", put("model/config.json", "3"), "config.json"),
    ("binary config", put("model/config.json", b"\xff\xfe\x00"), "config.json"),
    ("deep config", put("model/config.json", "[" * 100_000), "config.json"),
    ("unknown type", config(model_type="gpt9"), "no causal LM"),
    ("type is a number", config(model_type=9), "no causal LM"),
    ("no causal model", config(model_type="vit"), "no causal LM"),
    ("no layers", config(num_hidden_layers=0), "no list of repeated blocks"),
    ("minus one layer", config(num_hidden_layers=-1), "num_hidden_layers"),
    ("a billion layers", config(num_hidden_layers=10**9), "num_hidden_layers"),
    ("a billion layers in text_config", config(text_config={"n_layer": 10**9}), "n_layer"),
    ("a billion experts", config(num_local_experts=10**9), "num_local_experts"),
    ("no width", config(hidden_size=0), "no list of repeated blocks"),
    ("width in words", config(hidden_size="big"), "no causal LM"),
    ("negative vocabulary", config(vocab_size=-5), "no causal LM"),
    ("other width", config(hidden_size=96), "the model expects"),
    ("unknown activation", config(hidden_act="swoosh"), "no causal LM"),
    ("code of its own", config(model_type="own", auto_map={"AutoConfig": "own.C"}), "no causal LM"),
    ("code and only the recipe trusts it", written("device: cpu", "device: cpu, trust_remote_code: true"),
     "--trust-remote-code"),
    ("unknown quantization", config(quantization_config={"quant_method": "bitsandbytes"}), "bitsandbytes"),
    ("quantization is a list", config(quantization_config=[1]), "quantization_config"),
    ("quantization is text", config(quantization_config="gptq"), "quantization_config"),
    ("quantization of nothing", config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config"),
    ("gptq without integers", config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 16,
                                     "desc_act": False, "sym": True}), "has no tensor"),
    ("config is a directory", directory("model/config.json"), "config.json"),
    ("no tokenizer", without("tokenizer.json", "tokenizer_config.json"), "holds no tokenizer"),
    ("cut tokenizer", put("model/tokenizer.json", "{"), "cannot load the tokenizer"),
    ("tokenizer is a list", put("model/tokenizer.json", "[]"), "cannot load the tokenizer"),
    ("no weights", without("model.safetensors"), "no .safetensors weights"),
    ("pickle only", renamed("bin"), "pickle file, which sparsekit does not open"),
    ("torch file only", renamed("pt"), "no .safetensors weights"),
    ("cut weights", weights(lambda data: data[:-100]), "no whole safetensors file"),
    ("half of a header", weights(lambda data: data[:200]), "no whole safetensors file"),
    ("empty weights", weights(lambda data: b""), "no whole safetensors file"),
    ("seven bytes", weights(lambda data: data[:7]), "no whole safetensors file"),
    ("header bomb", weights(lambda data: (2**62).to_bytes(8, "little") + data[8:]), "no whole safetensors file"),
    ("header of 256 MB", weights(lambda data: (2**28).to_bytes(8, "little") + data[8:]), "no whole safetensors file"),
    ("header no JSON", weights(lambda data: (8).to_bytes(8, "little") + b"garbage!"), "no whole safetensors file"),
    ("header a list", weights(lambda data: (8).to_bytes(8, "little") + b"[1,2,3]_"), "no whole safetensors file"),
    ("offsets outside", weights(lambda data: data.replace(b'offsets":[0,', b'offsets":[9,', 1)), "no whole"),
    ("pickle in disguise", weights(lambda data: b"\x80\x04cos\nsystem\n(S'true'\ntR."), "no whole safetensors file"),
    ("wrong shape", tensors(lambda found: found.update({UP: torch.zeros(3, 3)})), "has shape [3, 3]"),
    ("missing tensor", tensors(lambda found: found.pop(UP).numel()), "has no tensor"),
    ("no tensor at all", tensors(lambda found: found.clear()), "has no tensor"),
    ("missing shard", index(json.dumps({"weight_map": {UP: "model-00002-of-00002.safetensors"}})), "is missing"),
    ("index outside", index(json.dumps({"weight_map": {UP: "../../x.safetensors"}})), "outside"),
    ("index no JSON", index("{"), "index.json"),
    ("index a list", index("[]"), "index.json"),
    ("weights are a pipe", pipe("model/model.safetensors"), "model.safetensors is no file"),
    ("weights without an end", link("model/model.safetensors", "/dev/zero"), "model.safetensors is no file"),
    ("weights of a cleared cache", link("model/model.safetensors", "/gone"), "points to /gone, which is not there"),
    ("index of a cleared cache", link("model/model.safetensors.index.json", "/gone"), "points to /gone"),
    ("config is a pipe", pipe("model/config.json"), "config.json is no file"),
    ("tokenizer is a pipe", pipe("model/tokenizer.json"), "tokenizer.json is no file"),
    ("generation config is a list", put("model/generation_config.json", "[]"), "generation_config.json is no JSON obj"),
    ("cut generation config", put("model/generation_config.json", '{"a'), "generation_config.json is no JSON"),
    ("too many experts", config(model_type="mixtral", num_hidden_layers=8000, num_local_experts=8000), "8000 experts"),
    ("a mask of 45 GB", put("model/config.json", json.dumps(NEO)), "asks for 45.0 GB of tables beside the weights"),
    ("truth values for weights", tensors(lambda found: found.update({UP: found[UP] > 0})), "stored as torch.bool"),
    ("complex weights", tensors(lambda found: found.update({UP: found[UP] + 1j})), "stored as torch.complex64"),
    ("whole numbers for weights", tensors(lambda found: found.update({UP: found[UP].long()})), "as torch.int64"),
    ("float8 and its scale", tensors(lambda found: found.update({UP: found[UP].to(torch.float8_e4m3fn),
                                     f"{UP}_scale_inv": torch.ones(1)})), f"does not say that {UP} is quantized"),
    ("NaN in a weight", tensors(lambda found: found[UP].fill_(float("nan"))), f"{UP} holds 8,192 values that are inf"),
    ("too large for its dtype", written("device: cpu", "device: cpu, dtype: float16",
                                        tensors(lambda found: found[UP].fill_(1e30))), "inf or NaN in float16"),
    ("path of 300 letters", written("/model,", f"/{'m' * 300},"), "File name too long"),
    ("path of nobody", written("BASE/model,".replace("BASE", ""), "/~nobody/model,"), "is no directory"),
    ("path to nowhere", written("/model,", "/modle,"), "Did you mean 'model'?"),
    ("path is a file", written("/model,", "/text.txt,"), "name the one that holds its config.json"),
    ("hub name without network", written("BASE/model,".replace("BASE", ""), "/../meta/llama,"), "is no directory"),
]  # fmt: skip
CALIBRATION = "/text.txt, samples: 2, seq_len: 16}\n  eval"
TEXTS: list[tuple[str, Spoil, str]] = [
    ("missing text", written(CALIBRATION, CALIBRATION.replace("text", "tetx")), "Did you mean 'text.txt'?"),
    ("text is a directory", written(CALIBRATION, CALIBRATION.replace("text.txt", "model")), "is a directory"),
    ("text in no directory", written(CALIBRATION, CALIBRATION.replace("text", "no/text")), "there is no directory"),
    ("missing evaluation text", written("held: {path: ", "held: {path: /nowhere"), "does not exist"),
    ("empty text", put("text.txt", ""), "is empty"),
    ("latin text", put("text.txt", b"caf\xe9 " * 500), "is not UTF-8"),
    ("binary text", put("text.txt", bytes(range(256)) * 20), "is not UTF-8"),
    ("text is a pipe", pipe("text.txt"), "is a pipe or a device"),
    ("text without an end", link("text.txt", "/dev/zero"), "is a pipe or a device"),
    ("text links to itself", link("text.txt", "BASE/text.txt"), "is a link to"),
    ("short text", put("text.txt", "a few words"), "holds 0 windows"),
    ("too few windows", written("samples: 2, seq_len: 16}\n  eval", "samples: 9999, seq_len: 16}\n  eval"),
     "9999 asked"),
    ("no xz", written(CALIBRATION, CALIBRATION.replace("txt", "xz"), put("text.xz", "no xz")), "damaged xz"),
    ("cut xz", written(CALIBRATION, CALIBRATION.replace("txt", "xz"),
                       put("text.xz", lzma.compress(b"words " * 999)[:-20])), "damaged xz"),
]  # fmt: skip


def task(content: str, **files: str) -> Spoil:
    """A task file `own` and the data beside it."""
    spoils = [put("tasks/own.yaml", content), *(put(f"tasks/{n.replace('__', '.')}", t) for n, t in files.items())]
    return written("perplexity: [held]", "perplexity: [held], lm_eval: {tasks: [own], tasks_dir: BASE/tasks}", *spoils)


TASK = """\
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: own.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["a", "b"]
doc_to_target: label
metric_list: [{metric: acc}]
"""
ROW = '{"q": "x", "label": 0}\n'
TASKS: list[tuple[str, Spoil, str]] = [
    ("unknown task", written("[held]}", "[held], lm_eval: {tasks: [arc_esay]}}"), "Did you mean 'arc_easy'?"),
    ("no tasks_dir", written("[held]}", "[held], lm_eval: {tasks: [arc_easy]}}"), "tasks_dir"),
    ("missing tasks_dir", written("[held]}", "[held], lm_eval: {tasks: [a], tasks_dir: /no}}"), "is no directory"),
    ("a function in a task", task(TASK + "process_docs: !function evil.f\n", own__jsonl=ROW), "may not run code"),
    ("python in a task", task(TASK + "x: !!python/object/apply:os.system [a]\n", own__jsonl=ROW), "may not run code"),
    ("task is a list", task("[1]"), "needs task: NAME"),
    ("task no YAML", task("task: ["), "is no task file"),
    ("task without a name", task(TASK.replace("task: own", "x: own")), "needs task: NAME"),
    ("task includes", task(TASK + "include: other.yaml\n", own__jsonl=ROW), "include is not supported"),
    ("task on the hub", task(TASK.replace("path: json", "path: org/evil"), own__jsonl=ROW), "dataset_path: json"),
    ("metric of others", task(TASK.replace("metric: acc", "metric: evil"), own__jsonl=ROW), "metric 'evil'"),
    ("missing data", task(TASK), "no data file"),
    ("data no JSON", task(TASK, own__jsonl="{"), "is no JSON"),
    ("data no objects", task(TASK, own__jsonl="[1, 2]"), "holds no JSON objects"),
    ("empty data", task(TASK, own__jsonl=""), "holds no JSON objects"),
    ("data outside", task(TASK.replace("own.jsonl", "../bad.yaml"), own__jsonl=ROW), "outside"),
    ("data anywhere", task(TASK.replace("own.jsonl", "/etc/passwd"), own__jsonl=ROW), "outside"),
    ("data files are a list", task(TASK.replace("{test: own.jsonl}", "[own.jsonl]"), own__jsonl=ROW), "data_files"),
    ("labels are missing", task(TASK.replace("own.jsonl}", "own.jsonl}, labels: {test: l.txt}"), own__jsonl=ROW),
     "l.txt"),
    ("labels no numbers", task(TASK.replace("own.jsonl}", "own.jsonl}, labels: {test: l.txt}"), own__jsonl=ROW,
                               l__txt="x\n"), "l.txt"),
]  # fmt: skip


def plugin(content: str | bytes, name: str = "own.py") -> Spoil:
    return written("name: bad", f"name: bad\nplugins: [BASE/{name}]", put(name, content))


def method(signature: str, decorator: str = '@sk.linear_method("own", kind="prune")') -> Spoil:
    return plugin(f'import sparsekit as sk\n{decorator}\ndef own{signature}:\n    """Own."""\n    return layer\n')


STATE = "layer: sk.LinearState, /"
PLUGINS: list[tuple[str, Spoil, str]] = [
    ("missing plugin", written("name: bad", "name: bad\nplugins: [BASE/no.py]"), "is not there"),
    ("plugin is a directory", written("name: bad", "name: bad\nplugins: [BASE/model]"), "is a directory"),
    ("plugin no Python", plugin("def (:"), "SyntaxError"),
    ("plugin with zero bytes", plugin(b"x = 1\x00"), "failed to load"),
    ("plugin fails", plugin("1 / 0"), "ZeroDivisionError"),
    ("plugin leaves", plugin("import sys\nsys.exit(0)"), "SystemExit"),
    ("plugin needs what is not there", plugin("import no_such_module"), "no_such_module"),
    ("plugin registers nothing", plugin("x = 1"), "registers nothing; decorate"),
    ("plugin is no file of Python", plugin("x = 1", "own.txt"), "not a Python file"),
    ("built-in name", method(f"({STATE}) -> sk.LinearState", '@sk.linear_method("gptq", kind="prune")'), "gptq"),
    ("bad name", method(f"({STATE}) -> sk.LinearState", '@sk.linear_method("Own!", kind="prune")'), "lower case"),
    ("no state", method("() -> sk.LinearState"), "positional-only"),
    ("two states", method("(layer: sk.LinearState, x: int, /) -> sk.LinearState"), "positional-only"),
    ("state by name", method("(layer: sk.LinearState) -> sk.LinearState"), "positional-only"),
    ("positional parameter", method(f"({STATE}, x: int = 1) -> sk.LinearState"), "must be keyword-only"),
    ("parameter without a type", method(f"({STATE}, *, x=1) -> sk.LinearState"), "no type annotation"),
    ("any parameters", method(f"({STATE}, **x: int) -> sk.LinearState"), "must be keyword-only"),
    ("taken parameter", written("method: gptq, group_size: 16", "method: own",
                                method(f"({STATE}, *, targets: int = 1) -> sk.LinearState")), "every step has"),
]  # fmt: skip
PLACES: list[tuple[str, Spoil, str]] = [
    ("text of 300 letters", written(CALIBRATION, CALIBRATION.replace("text", "t" * 300)), "File name too long"),
    ("export into the model", written("evaluate:", "export: {directory: BASE, formats: [dense]}\nevaluate:",
                                      lambda base: (base / "model").rename(base / "dense"),  # type: ignore[arg-type,func-returns-value]
                                      written("/model,", "/dense,")), "is the model itself"),
    ("export over other files", written("evaluate:", "export: {directory: BASE/x}\nevaluate:", put("x/dense/y", "z")),
     "holds no sparsekit export"),
    ("output is the model", written("output: ", "output: BASE/model #"), "is the model itself"),
    ("output of 300 letters", written("/out\n", f"/{'o' * 300}\n"), "300 characters are too long a name"),
    ("export into a file", written("evaluate:", "export: {directory: BASE/text.txt}\nevaluate:"), "is no directory"),
    ("pattern in other digits", written("{method: gptq, group_size: 16}", '{method: magnitude, pattern: "２:４"}'),
     "is not understood"),
    ("empty groups", written("group_size: 16", "group_size: 0"), "bad.yaml:8: group_size 0 is no number of inputs"),
    ("groups of less", written("group_size: 16", "group_size: -2"), "group_size -2 is no number of inputs"),
    ("output below a file", written("output: ", "output: BASE/text.txt/below #"), "cannot write"),
]  # fmt: skip
CASES = [*TEXTS, *TASKS, *MODELS, *PLUGINS, *PLACES]
PLACED = len(TEXTS) + len(TASKS)  # so many are told with their line in the recipe


@pytest.fixture
def base(random_model, tmp_path) -> Path:
    shutil.copytree(random_model, tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    (tmp_path / "bad.yaml").write_text(RECIPE.format(base=tmp_path))
    return tmp_path


def seen(base: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in base.rglob("*") if path.is_file()}


def refused(recipe: Path, words: str) -> str:
    """The command fails by name, on one screen, and leaves everything as it was; returns what it says."""
    before = seen(recipe.parent)
    result = CliRunner().invoke(main, ["run", str(recipe)])
    assert result.exit_code == 2, (result.exit_code, result.output, result.exc_info)
    assert isinstance(result.exception, SystemExit), result.exc_info
    told = result.output[result.output.index("error: ") :]
    assert words in told, told
    assert "Traceback" not in result.output
    assert told.count("\n") <= 24
    assert len(told) < 2500
    new = {name for name, when in seen(recipe.parent).items() if before.get(name) != when}
    kept = ("/.lock", "/out/recipe.yaml")  # of a run that began; the tokens of good texts are kept as well
    assert not {name for name in new if not name.endswith(kept) and "/out/tokens/" not in name}, new
    return told


@pytest.mark.parametrize(
    ("spoil", "words", "placed"),
    [(*case[1:], index < PLACED) for index, case in enumerate(CASES)],
    ids=[case[0] for case in CASES],
)
def test_bad_input(base, spoil, words, placed):
    spoil(base)
    told = refused(base / "bad.yaml", words)
    assert told.startswith(f"error: {base / 'bad.yaml'}:") or not placed, told
    assert not (base / "model" / "ran").exists()


@pytest.mark.parametrize(("old", "new", "line", "words"), BAD, ids=[f"recipe {index}" for index in range(len(BAD))])
def test_bad_recipe(tmp_path, old, new, line, words):
    (tmp_path / "recipe.yaml").write_text(changed(old, new))
    refused(tmp_path / "recipe.yaml", words[0])


def test_verbose_shows_the_traceback(base):
    (base / "model" / "config.json").unlink()
    result = CliRunner().invoke(main, ["-v", "run", str(base / "bad.yaml")])
    assert type(result.exception).__name__ == "ModelError"


@pytest.mark.parametrize(("spoil", "words"), [case[1:] for case in TASKS[:3]], ids=[case[0] for case in TASKS[:3]])
def test_a_plan_reads_the_tasks_too(base, spoil, words):
    """What a run would refuse before its work is refused by its plan."""
    spoil(base)
    for command in (["plan"], ["run", "--dry-run"]):
        told = CliRunner().invoke(main, [*command, str(base / "bad.yaml")])
        assert told.exit_code == 2, told.output
        assert told.output.startswith(f"error: {base / 'bad.yaml'}:"), told.output
        assert words in told.output


def test_a_plan_knows_a_text_that_is_too_short(base):
    (base / "text.txt").write_text("short")
    told = CliRunner().invoke(main, ["plan", str(base / "bad.yaml")])
    assert told.exit_code == 2, told.output
    assert told.output.startswith(f"error: {base / 'bad.yaml'}:"), told.output
    assert "has 5 bytes, too few for" in " ".join(told.output.split())


def test_code_beside_a_known_model_is_not_run(base):
    config(auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C"})(base)
    put("model/own.py", CODE)(base)
    result = CliRunner().invoke(main, ["run", str(base / "bad.yaml"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert not (base / "model" / "ran").exists()


def test_count():
    assert len({case[0] for case in CASES}) == len(CASES) >= 100
    assert len(BAD) >= 80
