"""A teacher that is not the dense original: larger, of the same tokenizer, part of the step's identity."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sparsekit.errors import RecipeError
from sparsekit.listener import Silent
from sparsekit.planning.estimate import Estimator
from sparsekit.recipe import read_recipe
from sparsekit.run import Run
from sparsekit.terminal.console import Terminal

ASSETS = Path(__file__).parents[1] / "sparsekit" / "assets"
RECIPE = """\
name: taught
output: {output}
model: {{path: {model}}}
data:
  train: {{path: builtin:train, samples: 8, seq_len: 32}}
  evaluation: {{heldout: {{path: builtin:heldout, seq_len: 32, samples: 2}}}}
steps:
  - {{method: ast, pattern: "2:4", tokens: 512, batch: 4, micro_batch: 2{more}}}
evaluate: {{perplexity: [heldout]}}
export: {{formats: []}}
"""


def model(directory: Path, *, width: int, layers: int, vocabulary: int = 8192) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(width)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "tiny" / name, directory / name)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A small model and a larger one, with more blocks."""
    place = tmp_path_factory.mktemp("models")
    model(place / "small", width=32, layers=2)
    model(place / "large", width=64, layers=3)
    return place


def recipe(tmp_path: Path, models: Path, more: str = ""):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(output=tmp_path / "run", model=models / "small", more=more))
    return read_recipe(path)


def taught(tmp_path: Path, models: Path, more: str = ""):
    run = Run.open(recipe(tmp_path, models, more), Silent())
    (planned,) = run.plan.steps
    report = run.execute()
    return planned, report["steps"][0]


@pytest.mark.parametrize("more", ["", ", score: activation", ", kl: 0.5, temperature: 2.0"])
def test_a_larger_teacher_trains(tmp_path, models, more):
    planned, step = taught(tmp_path, models, f", teacher: {models / 'large'}{more}")
    assert step["violations"] == 0
    assert step["training"]["kl"] > 0
    other = Run.open(recipe(tmp_path, models, more), Silent()).plan.steps[0]
    assert planned.fingerprint != other.fingerprint
    assert f"<td>{models / 'large'}</td>" in (tmp_path / "run" / "report.html").read_text()


def test_the_plan_names_the_teacher_and_says_the_budget_in_words(tmp_path, models):
    path, console = tmp_path / "recipe.yaml", Console(width=400)
    recipe(tmp_path, models, f", teacher: {models / 'large'}")
    path.write_text(path.read_text().replace("tokens: 512", "budget: {minutes: 0.7}"))
    run = Run.open(read_recipe(path), Silent())
    with console.capture() as captured:
        Terminal(console).planned(run.recipe, run.plan, run.view)
    (line,) = (line for line in captured.get().splitlines() if "step 1" in line)
    assert line.endswith(f"batch 4, micro_batch 2, teacher {models / 'large'}")
    assert "budget minutes 0.7," in line


def test_naming_the_model_itself_teaches_as_the_dense_original(tmp_path, models):
    for name in ("own", "named"):
        (tmp_path / name).mkdir()
    _, own = taught(tmp_path / "own", models)
    _, named = taught(tmp_path / "named", models, f", teacher: {models / 'small'}")
    assert named["training"]["kl"] == own["training"]["kl"]
    assert named["perplexity"]["heldout"]["perplexity"] == own["perplexity"]["heldout"]["perplexity"]


def test_other_weights_of_the_teacher_are_another_step(tmp_path, models):
    shutil.copytree(models / "large", tmp_path / "large")
    more = f", teacher: {tmp_path / 'large'}"
    first = Run.open(recipe(tmp_path, models, more), Silent()).plan.steps[0].fingerprint
    model(tmp_path / "large", width=48, layers=1)
    assert Run.open(recipe(tmp_path, models, more), Silent()).plan.steps[0].fingerprint != first


def test_a_relative_teacher_is_absolute_in_the_resolved_recipe(tmp_path, models):
    shutil.copytree(models / "large", tmp_path / "large")
    read = recipe(tmp_path, models, ", teacher: large")
    assert str((tmp_path / "large").resolve()) in read.resolved_yaml()
    assert "teacher:" not in recipe(tmp_path, models).resolved_yaml()


def test_another_vocabulary_is_refused_by_name(tmp_path, models):
    model(tmp_path / "wide", width=32, layers=1, vocabulary=8200)
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+.*vocabulary of 8200 ids, the model has 8192"):
        Run.open(recipe(tmp_path, models, f", teacher: {tmp_path / 'wide'}"), Silent())


def swap_two_words(raw):
    words = raw["model"]["vocab"]
    one, other = list(words)[300:302]
    words[one], words[other] = words[other], words[one]


def drop_pre_tokenizer(raw):
    raw["pre_tokenizer"] = None


@pytest.mark.parametrize(
    ("change", "said"),
    [(swap_two_words, "more entries of the vocabulary"), (drop_pre_tokenizer, "its pre tokenizer")],
)
def test_another_tokenizer_is_refused_by_name(tmp_path, models, change, said):
    shutil.copytree(models / "large", tmp_path / "large")
    path = tmp_path / "large" / "tokenizer.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(RecipeError, match="another tokenizer") as caught:
        Run.open(recipe(tmp_path, models, f", teacher: {tmp_path / 'large'}"), Silent())
    assert said in str(caught.value)


def test_a_missing_teacher_is_named_and_hidden_losses_need_the_same_shape(tmp_path, models):
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+.*teacher: .*nowhere"):
        Run.open(recipe(tmp_path, models, ", teacher: nowhere"), Silent())
    with pytest.raises(Exception, match="needs a teacher with the student's blocks and width"):
        taught(tmp_path, models, f", hidden: 1.0, teacher: {models / 'large'}")


def test_the_plan_counts_the_teacher(tmp_path, models, monkeypatch):
    monkeypatch.setattr("sparsekit.planning.microbench.SLOW", 0.0)
    parts = []
    for more in ("", f", teacher: {models / 'large'}"):
        told = Estimator.open(recipe(tmp_path, models, more)).all()["steps"][0]
        parts.append({part["name"]: part["bytes"] for part in told["device"]["parts"]})
    plain, larger = parts
    assert larger["student"] == plain["student"]
    assert larger["teacher"] > 2 * plain["teacher"]
