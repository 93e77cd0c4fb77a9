"""AST: invariants T1, T5, T8, T9, T12 and T13 of its reference, on a random Llama of two blocks."""

import copy
from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from transformers import AutoModelForCausalLM

from sparsekit.errors import MethodError
from sparsekit.methods.ast import AstPolicy, ast
from sparsekit.pattern import Pattern
from sparsekit.state import LinearState
from sparsekit.training.loop import TrainJob
from sparsekit.training.optim import Rule, SparseAdamW
from sparsekit.training.schedule import Schedule, windows_of

TWO_OF_FOUR = Pattern(2, 4)
SETTING = {"tokens": 24 * 64, "batch": 4, "micro_batch": 4, "lr": 3e-3, "mask_every": 3, "freeze": 0.2, "decay": 1e-2}


def make_job(directory, family="llama", seed=0, tied=False) -> TrainJob:
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    config.tie_word_embeddings |= tied
    teacher = AutoModelForCausalLM.from_config(config).float()
    for parameter in teacher.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    student = copy.deepcopy(teacher).requires_grad_(False)
    linears = {
        name: LinearState(name, module.weight.detach().clone())
        for name, module in student.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    }
    tokens = torch.randint(0, 128, (40, 16), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    log: list = []
    directory.mkdir(parents=True, exist_ok=True)
    job = TrainJob(student, teacher, linears, tokens, tokens[:4], 0, directory, log.append, lambda done, total: None)
    job.student.log = log
    return job


def assert_same(a, b):
    assert a.linears.keys() == b.linears.keys()
    for name in a.linears:
        assert torch.equal(a.linears[name].source, b.linears[name].source), name
        assert torch.equal(a.linears[name].mask, b.linears[name].mask), name
    for name in a.params:
        assert torch.equal(a.params[name], b.params[name]), name


def test_every_matmul_sees_two_of_four(tmp_path):
    job = make_job(tmp_path)
    seen = []

    def look(module, arguments):
        groups = (module.weight != 0).reshape(len(module.weight), -1, 4).sum(-1)
        seen.append(int(groups.max()))

    modules = dict(job.student.named_modules())
    for name in job.linears:
        modules[name].register_forward_pre_hook(look)
    ast(job, **{**SETTING, "micro_batch": 2})
    # 24 steps of 2 micro-batches, and held-out scores
    assert len(seen) >= 24 * 2 * len(job.linears)
    assert set(seen) == {2}


def test_result_is_what_the_student_computes(plain):
    job, trained = plain
    fresh = copy.deepcopy(job.teacher)
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            linear = name.removesuffix(".weight")
            parameter.copy_(trained.linears[linear].weight if linear in trained.linears else trained.params[name])
    tokens = job.tokens[:3].long()
    assert torch.equal(fresh(input_ids=tokens).logits, job.student(input_ids=tokens).logits)
    for state in trained.linears.values():
        assert TWO_OF_FOUR.violations(state.weight) == 0
        assert float((state.weight == 0).float().mean()) == 0.5
        assert not bool(torch.signbit(state.weight[~state.mask]).any())
    assert len(trained.linears) + len(trained.params) == len(list(fresh.named_parameters()))


def test_training_lowers_the_loss_and_leaves_the_teacher_alone(tmp_path):
    job = make_job(tmp_path)
    before = [parameter.clone() for parameter in job.teacher.parameters()]
    trained = ast(job, **{**SETTING, "tokens": 48 * 64, "kl": 1.0, "temperature": 1.0})
    log = job.student.log
    assert log[-1]["kl"] < 0.5 * log[0]["kl"]
    assert all(torch.equal(a, b) for a, b in zip(before, job.teacher.parameters(), strict=True))
    assert not job.teacher.training
    assert trained.metrics["refreshes"] > 0
    assert 0 < trained.metrics["initial_flip_rate"] < 0.5


@pytest.mark.parametrize("kept", [6, 7, 12])
def test_killed_training_continues_to_the_same_bits(tmp_path, plain, kept):
    setting = {**SETTING, "checkpoint_every": 1}

    class Killed(Exception):
        pass

    def progress(done, total):
        if done == kept * 64:
            raise Killed

    with pytest.raises(Killed):
        ast(replace(make_job(tmp_path / "cut"), progress=progress), **setting)
    assert len(list((tmp_path / "cut").glob("step-*.safetensors"))) == 1
    again = make_job(tmp_path / "cut", seed=5)  # what the fresh models hold must not matter
    again = replace(again, teacher=make_job(tmp_path / "cut").teacher)
    assert_same(ast(again, **setting), plain[1])


def test_a_damaged_checkpoint_is_not_used(tmp_path, plain):
    for name in ("step-00000007.safetensors", "step-00000007.json"):
        (tmp_path / "damaged").mkdir(exist_ok=True)
        (tmp_path / "damaged" / name).write_bytes(b"{}")
    assert_same(ast(make_job(tmp_path / "damaged"), **SETTING), plain[1])


def test_micro_batches_change_the_sum_only_up_to_rounding(tmp_path, plain):
    a, b = plain[1], ast(make_job(tmp_path), **{**SETTING, "micro_batch": 2})
    for name in a.linears:
        torch.testing.assert_close(a.linears[name].weight, b.linears[name].weight, rtol=0, atol=5e-3)


def policy(steps=100, **given) -> AstPolicy:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    optimizer = SparseAdamW(model, {"weight": TWO_OF_FOUR.keep(model.weight.detach().abs())}, TWO_OF_FOUR, Rule())
    setting = {"decay": 2.0, "ramp": 0.25, "mask_every": 10, "freeze": 0.05, "hysteresis": 0.0, "weight_decay": 0.0}
    return AstPolicy(optimizer=optimizer, steps=steps, **{**setting, **given})


def test_decay_rises_over_the_ramp_stays_and_ends_with_the_freeze():
    decay = [policy().decay_at(step) for step in range(100)]
    assert decay[0] == 0
    assert decay[:26] == pytest.approx([2.0 * step / 25 for step in range(26)])
    assert set(decay[25:95]) == {2.0}
    assert set(decay[95:]) == {0.0}


@pytest.mark.parametrize(("steps", "every", "freeze"), [(100, 10, 0.05), (97, 7, 0.0), (24, 3, 0.2)])
def test_masks_are_chosen_again_exactly_every_so_many_steps(steps, every, freeze):
    made = policy(steps, mask_every=every, freeze=freeze)
    for step in range(steps):
        made.after(step)
    assert made.refreshes == made.frozen_from // every


def test_schedule_rises_and_falls():
    plan = Schedule(steps=100, batch=1, lr=1.0, warmup=0.1, floor=0.1)
    rates = [plan.lr_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    flat = Schedule(steps=100, batch=1, lr=1.0, warmup=0.0, floor=0.0, shape="wsd")
    assert [flat.lr_at(step) for step in (1, 50, 80)] == [1.0, 1.0, 1.0]
    assert flat.lr_at(90) == pytest.approx(0.5)


def test_every_window_is_read_once_an_epoch():
    epoch = torch.cat([windows_of(step, 5, 40, seed=3) for step in range(8)])
    assert sorted(epoch.tolist()) == list(range(40))
    second = torch.cat([windows_of(step, 5, 40, seed=3) for step in range(8, 16)])
    assert sorted(second.tolist()) == list(range(40))
    assert second.tolist() != epoch.tolist()
    crossing = windows_of(2, 30, 40, seed=3)
    assert len(set(crossing[:20].tolist())) == 20


def test_an_earlier_steps_mask_and_values_are_the_start(tmp_path):
    job = make_job(tmp_path)
    pruned = {
        name: state.updated(state.source * 2, TWO_OF_FOUR.keep(torch.rand_like(state.source)))
        for name, state in job.linears.items()
    }
    job = replace(job, linears=pruned)
    trained = ast(job, **{**SETTING, "lr": 1e-9, "mask_every": 1000, "decay": 0.0})
    for name, state in pruned.items():
        assert torch.equal(trained.linears[name].mask, state.mask)
        torch.testing.assert_close(trained.linears[name].weight, state.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"score": "activation"},
        {"forward": "dense", "decay_rule": "l1"},
        {"second_moment": "gradient", "schedule": "wsd"},
        {"kl": 0.0},
        {"kl": 1.0, "temperature": 1.0},
        {"pattern": Pattern(4, 8)},
        {"pattern": Pattern(1, 4), "hysteresis": 0.1},
    ],
)
def test_options_hold_the_pattern(tmp_path, options):
    trained = ast(make_job(tmp_path), **{**SETTING, **options})
    pattern = options.get("pattern", TWO_OF_FOUR)
    for state in trained.linears.values():
        assert pattern.violations(state.weight) == 0


@pytest.mark.parametrize("family", ["gemma2", "opt", "gpt_neox"])
def test_other_families_train(tmp_path, family):
    job = make_job(tmp_path, family)
    trained = ast(job, **SETTING)
    assert all(TWO_OF_FOUR.violations(state.weight) == 0 for state in trained.linears.values())
    assert trained.metrics["chunked_loss"] is (family != "gemma2")


def test_errors_are_named(tmp_path):
    with pytest.raises(MethodError, match="less than one step of 4 x 16 = 64"):
        ast(make_job(tmp_path), **{**SETTING, "tokens": 63})
    with pytest.raises(MethodError, match="micro_batch 3 does not divide batch 4"):
        ast(make_job(tmp_path), **{**SETTING, "micro_batch": 3})
    with pytest.raises(MethodError, match="N:M"):
        ast(make_job(tmp_path), **{**SETTING, "pattern": Pattern.unstructured(0.5)})
    with pytest.raises(MethodError, match="the loss is"):
        ast(make_job(tmp_path), **{**SETTING, "lr": 1e30})
