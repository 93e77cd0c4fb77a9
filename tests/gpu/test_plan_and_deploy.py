"""On CUDA: predicted memory against what was allocated, and semi-structured tensors in the deploy card."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sparsekit.checkpoint import StepStore
from sparsekit.evaluation.deploy import deploy_card
from sparsekit.listener import Silent
from sparsekit.models.chain import Chain
from sparsekit.planning.estimate import Estimator
from sparsekit.planning.peak import measured
from sparsekit.recipe import Recipe, read_recipe
from sparsekit.run import Run

pytestmark = pytest.mark.gpu
ASSETS = Path(__file__).parents[2] / "sparsekit" / "assets"
RECIPE = """\
name: gpu
output: {output}
model: {{path: {model}, device: cuda}}
data:
  calibration: {{path: builtin:calibration, samples: 32, seq_len: 512}}
  train: {{path: builtin:train, samples: 64, seq_len: 512}}
steps: [{step}]
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """Two blocks of 1024 × 4096 in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("wide")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "tiny" / name, directory / name)
    return directory


def recipe(tmp_path: Path, model: Path, step: str) -> Recipe:
    path = tmp_path / "gpu.yaml"
    path.write_text(RECIPE.format(output=tmp_path / "run", model=model, step=step))
    return read_recipe(path)


@pytest.mark.parametrize(
    "step",
    [
        '{method: wanda, pattern: "2:4"}',
        "{method: gptq, bits: 4, group_size: 128}",
        '{method: ast, pattern: "2:4", tokens: 32768, batch: 16, micro_batch: 16}',
    ],
    ids=["wanda", "gptq", "ast"],
)
def test_peak_memory_is_within_a_fifth(tmp_path, wide, step):
    read = recipe(tmp_path, wide, step)
    told = Estimator.open(read).all()["steps"][0]["device"]
    run = Run.open(read, Silent())
    (planned,) = run.plan.steps
    store = StepStore(tmp_path / "s", run.view.dtype)
    result = measured(run.view.device, lambda: run.work.apply(planned, Chain(run.view), store))
    assert told["bytes"] == pytest.approx(result["peak_memory"], rel=0.2), told


@pytest.mark.parametrize("schedule", ["block", "group"])
@pytest.mark.parametrize("mode", ["balanced", "low"])
def test_peak_memory_of_a_mode_is_within_a_fifth(tmp_path, wide, mode, schedule):
    step = f"{{method: gptq, bits: 4, group_size: 128, schedule: {schedule}}}"
    given = recipe(tmp_path, wide, step)
    read = given.model_copy(update={"model": given.model.model_copy(update={"memory": mode})})
    told = Estimator.open(read).all()["steps"][0]["device"]
    run = Run.open(read, Silent())
    (planned,) = run.plan.steps
    store = StepStore(tmp_path / "s", run.view.dtype)
    result = measured(run.view.device, lambda: run.work.apply(planned, Chain(run.view), store))
    assert told["bytes"] == pytest.approx(result["peak_memory"], rel=0.2), told


def test_semi_structured_tensors_compute_the_same_and_are_put_back(tmp_path, wide):
    run = Run.open(recipe(tmp_path, wide, '{method: magnitude, pattern: "2:4"}'), Silent())
    (planned,) = run.plan.steps
    store = StepStore(tmp_path / "store", run.view.dtype)
    run.work.apply(planned, Chain(run.view), store)
    card = deploy_card(Chain(run.view), Chain(run.view).then(store), [], lambda done, total: None)
    forms = {row["form"] for row in card["speed"]}
    assert forms == {"zeros in place", "torch semi-structured"}, card["notes"]
    assert {row["batch"] for row in card["speed"]} == {1, 16, 256}
    assert card["memory"]["torch semi-structured"] < card["memory"]["dense"]
    with Chain(run.view).then(store).forward() as forward:
        logits = forward(torch.arange(64, device="cuda").unsqueeze(0))
    assert bool(logits.isfinite().all())


def test_the_card_has_the_packed_form_and_its_decoding(tmp_path, wide):
    steps = '{method: magnitude, pattern: "2:4"}, {method: rtn, bits: 4, group_size: 128}'
    run = Run.open(recipe(tmp_path, wide, steps), Silent())
    chain = Chain(run.view)
    for index, planned in enumerate(run.plan.steps):
        store = StepStore(tmp_path / f"store{index}", run.view.dtype)
        run.work.apply(planned, chain, store)
        chain = chain.then(store)
    card = deploy_card(Chain(run.view), chain, [], lambda done, total: None)
    (form,) = {row["form"] for row in card["speed"] if row["form"].startswith("2:4 + int4, sparsekit")}
    found = {(row["work"], row["batch"]) for row in card["speed"] if row["form"] == form}
    assert found == {(work, batch) for work in ("prompts", "decoding") for batch in (1, 16, 256)}
    assert card["memory"][form] < 0.6 * card["memory"]["dense"]
    assert not any("operation by operation" in note for note in card["notes"]), card["notes"]
