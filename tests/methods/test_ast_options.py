"""AST: learned scales of rows, the steering of λ by the flip rate, and budgets in minutes."""

import json
import time
from dataclasses import replace

import pytest
import torch
from test_ast import SETTING, assert_same, make_job

from sparsekit.errors import MethodError, RecipeError
from sparsekit.methods.ast import ast
from sparsekit.pattern import Pattern
from sparsekit.planning.fingerprint import step_fingerprint
from sparsekit.recipe import read_recipe
from sparsekit.training.annealing import FARTHEST, AstPolicy
from sparsekit.training.optim import Rule, SparseAdamW, Step
from sparsekit.training.scaling import scaled, split_gradient
from sparsekit.training.schedule import Budget, steps_in

TWO_OF_FOUR = Pattern(2, 4)


class Killed(Exception):
    """Ends a run."""


def killed_at(step):
    def progress(done, total):
        if done == step * 64:
            raise Killed

    return progress


def test_gradients_of_weight_and_scale_are_autograds():
    torch.manual_seed(0)
    weight = torch.randn(6, 16, requires_grad=True)
    scale, mask = torch.rand(6, 2, requires_grad=True), TWO_OF_FOUR.keep(weight.detach().abs())
    x, target = torch.randn(5, 16), torch.randn(5, 6)
    effective = scaled(weight.masked_fill(~mask, 0.0), scale)
    effective.retain_grad()
    ((x @ effective.t() - target) ** 2).sum().backward()
    of_weight, of_scale = split_gradient(effective.grad, weight.detach().masked_fill(~mask, 0.0), scale.detach())
    torch.testing.assert_close(of_scale, scale.grad)
    torch.testing.assert_close(of_weight[mask], weight.grad[mask])
    assert bool((of_weight[~mask] != 0).all())  # straight through, where autograd has nothing


def test_scales_are_multiplied_into_the_result(tmp_path, plain):
    job = make_job(tmp_path)
    trained = ast(job, **SETTING, weight_scaling=2)
    modules = dict(job.student.named_modules())
    for name, state in trained.linears.items():
        assert TWO_OF_FOUR.violations(state.weight) == 0
        torch.testing.assert_close(modules[name].weight.detach(), state.weight, rtol=1e-6, atol=1e-8)
    without = plain[1].linears
    assert any(not torch.equal(without[name].weight, state.weight) for name, state in trained.linears.items())


def test_scales_survive_a_kill(tmp_path):
    options = {**SETTING, "weight_scaling": 2, "checkpoint_every": 1}
    whole = ast(make_job(tmp_path / "whole"), **options)
    with pytest.raises(Killed):
        ast(replace(make_job(tmp_path / "cut"), progress=killed_at(8)), **options)
    assert_same(ast(make_job(tmp_path / "cut"), **options), whole)


def test_parts_of_a_row_hold_whole_groups():
    model = torch.nn.Linear(24, 4)
    masks = {"weight": TWO_OF_FOUR.keep(model.weight.detach().abs())}
    with pytest.raises(ValueError, match="24 inputs do not divide into 4 parts of whole groups of 4"):
        SparseAdamW(model, masks, TWO_OF_FOUR, Rule(scaling=4))


def policy(flip_target, changed):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    optimizer = SparseAdamW(model, {"weight": TWO_OF_FOUR.keep(model.weight.detach().abs())}, TWO_OF_FOUR, Rule())
    optimizer.flips = torch.tensor(changed), torch.tensor(changed)
    setting = {"decay": 1.0, "ramp": 0.1, "mask_every": 1, "freeze": 0.0, "hysteresis": 0.0, "weight_decay": 0.0}
    return AstPolicy(optimizer=optimizer, steps=1000, **setting, flip_target=flip_target, peak=1e-3)


@pytest.mark.parametrize(("changed", "direction"), [(16, 1), (0, -1), (2, -1)])
def test_decay_rises_with_too_many_flips_and_falls_with_too_few(changed, direction):
    made = policy(0.1, changed)  # of 32 entries
    made.numbers(0, 1e-3)
    made.after(0)
    assert made.factor == 1.0  # λ is still 0
    factors = []
    for step in range(200, 230):
        made.numbers(step, 1e-3)
        made.after(step)
        factors.append(made.factor)
    assert factors == sorted(factors, reverse=direction < 0)
    assert made.factor == pytest.approx(FARTHEST**direction)
    assert made.decay_at(300) == pytest.approx(FARTHEST**direction)


def test_the_target_follows_the_learning_rate():
    made = policy(0.5, 4)
    made.numbers(200, 0.25e-3)  # a quarter of the peak: 0.125 of 32 is what changed
    made.after(200)
    assert made.factor == 1.0


def test_steering_reaches_its_target_and_survives_a_kill(tmp_path):
    options = {**SETTING, "tokens": 120 * 64, "decay": 1e-3, "flip_target": 2e-3, "mask_every": 1, "kl": 1.0}
    job = make_job(tmp_path / "whole")
    whole = ast(job, **options)
    free = make_job(tmp_path / "free")
    ast(free, **{**options, "flip_target": None})
    late = [line for line in job.student.log if 60 < line["step"] < 90]
    assert max(line["decay"] for line in late) > 2 * max(line["decay"] for line in free.student.log)
    with pytest.raises(Killed):
        ast(replace(make_job(tmp_path / "cut"), progress=killed_at(50)), **options, checkpoint_every=7)
    assert_same(ast(make_job(tmp_path / "cut"), **options, checkpoint_every=7), whole)


def test_a_budget_is_sized_once_and_its_run_is_the_run_of_that_many_steps(tmp_path, monkeypatch):
    setting = {key: value for key, value in SETTING.items() if key != "tokens"} | {"budget": Budget(minutes=1)}
    monkeypatch.setattr("sparsekit.training.loop.steps_in", lambda minutes, spent, a_step: 18)
    with pytest.raises(Killed):
        ast(replace(make_job(tmp_path / "cut"), progress=killed_at(7)), **setting, checkpoint_every=3)
    length = json.loads((tmp_path / "cut" / "length.json").read_text())
    assert length["steps"] == 18
    assert length["seconds_a_step"] > 0
    assert json.loads((tmp_path / "cut" / "step-00000006.json").read_text())["steps"] == 18
    monkeypatch.setattr("sparsekit.training.loop.steps_in", lambda *_: pytest.fail("measured again"))
    resumed = ast(make_job(tmp_path / "cut"), **setting, checkpoint_every=3)
    assert resumed.metrics["steps"] == 18
    assert_same(resumed, ast(make_job(tmp_path / "tokens"), **{**SETTING, "tokens": 18 * 64}))


def test_a_budget_is_kept(tmp_path):
    setting = {key: value for key, value in SETTING.items() if key != "tokens"} | {"budget": Budget(minutes=0.08)}
    began = time.monotonic()
    trained = ast(make_job(tmp_path), **setting)
    assert trained.metrics["steps"] > 1
    assert time.monotonic() - began < 10 * 4.8  # other work on the machine may slow it down, not tenfold


def test_steps_that_fit():
    assert steps_in(1.0, 7.0, 0.5) == 100
    with pytest.raises(MethodError, match=r"budget: 1 minutes are too few: 50 s have passed"):
        steps_in(1.0, 50.0, 8.0)


STEP = """\
name: x
model: {path: builtin:tiny}
data: {train: {path: builtin:train}}
steps:
  - {method: ast, pattern: "2:4"%s}
"""


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("", r"x.yaml:5: .*ast needs tokens: 26.2M, or budget"),
        (", tokens: 1M, budget: {minutes: 3}", r"x.yaml:5: .*tokens and a budget of minutes; keep one"),
        (", tokens: 1M, budget: {tokens: 1M}", r"x.yaml:5: tokens and budget: .* are two spellings of one thing"),
        (", budget: {tokens: 1M, minutes: 3}", r"x.yaml:5: budget takes minutes or tokens, one of them"),
        (", budget: {}", r"x.yaml:5: budget takes minutes or tokens, one of them"),
        (", budget: {tokens: many}", r"x.yaml:5: .*'many' is no count"),
        (", budget: {tokens: 8}", r"x.yaml:5: tokens 8 is less than one step"),
        (", budget: {hours: 3}", r"unknown key 'hours' in step 1, budget; it takes minutes, tokens"),
        (", tokens: 1M, flip_target: 1.0e-3, decay: 0.0", r"flip_target steers the decay, and decay is 0"),
        (", tokens: 1M, gpus: 0", "gpus"),
        (", tokens: 1M, slorb: 20", "slorb"),
    ],
)
def test_contradictions_are_told_with_their_line(tmp_path, keys, message):
    path = tmp_path / "x.yaml"
    path.write_text(STEP % keys)
    with pytest.raises(RecipeError, match=message):
        read_recipe(path)


def test_a_budget_and_ranks_read_back_from_the_resolved_recipe(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(STEP % ", budget: {minutes: 30}, gpus: 8, slorb: 16, weight_scaling: 2")
    recipe = read_recipe(path)
    (tmp_path / "again.yaml").write_text(recipe.resolved_yaml())
    again = read_recipe(tmp_path / "again.yaml")
    assert again.steps[0].params == recipe.steps[0].params
    assert again.steps[0].gpus == 8
    assert again.steps[0].params.budget == Budget(minutes=30)


def test_tokens_as_a_budget_are_the_same_step(tmp_path):
    steps = []
    for name, keys in {"one": "tokens: 26.2M", "two": "budget: {tokens: 26.2M}"}.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(STEP % f", {keys}")
        steps.append(read_recipe(path).steps[0])
    assert steps[0] == steps[1]
    assert steps[1].given == {"pattern", "tokens"}
    assert len({step_fingerprint("upstream", step, ["x"], 0) for step in steps}) == 1


def test_measuring_leaves_no_trace():
    model = torch.nn.Linear(8, 4)
    masks = {"weight": TWO_OF_FOUR.keep(model.weight.detach().abs())}
    optimizer = SparseAdamW(model, masks, TWO_OF_FOUR, Rule())
    before = {key: value.clone() for key, value in optimizer.tensors().items()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.advance(Step(1, lr=0.0))
    assert optimizer.moved
    optimizer.forget()
    assert not optimizer.moved
    assert all(torch.equal(value, before[key]) for key, value in optimizer.tensors().items())
