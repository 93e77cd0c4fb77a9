"""AST in less memory: float8 states, bfloat16 masters, recomputed blocks; and the losses that go with it."""

import pytest
import torch
from test_ast import SETTING, assert_same, make_job

from sparsekit.errors import MethodError
from sparsekit.methods.ast import ast
from sparsekit.pattern import Pattern
from sparsekit.training.blocks import block_outputs, blocks_of, recomputed, square_head
from sparsekit.training.lowbits import Memory
from sparsekit.training.optim import Rule, SparseAdamW, Step

TWO_OF_FOUR = Pattern(2, 4)
LONGER = {**SETTING, "tokens": 48 * 64, "kl": 1.0, "temperature": 1.0}
MODES = [{"states": "float8"}, {"masters": "bfloat16"}, {"states": "float8", "masters": "bfloat16"}]


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    job = make_job(tmp_path_factory.mktemp("exact"))
    ast(job, **LONGER)
    return job.student.log


@pytest.mark.parametrize("mode", MODES)
def test_training_converges_like_float32(tmp_path, exact, mode):
    job = make_job(tmp_path)
    trained = ast(job, **LONGER, **mode)
    log = job.student.log
    assert log[0]["kl"] == pytest.approx(exact[0]["kl"], rel=1e-2)
    fell = exact[0]["kl"] - exact[-1]["kl"]
    assert log[-1]["kl"] == pytest.approx(exact[-1]["kl"], abs=0.05 * fell)
    for state in trained.linears.values():
        assert TWO_OF_FOUR.violations(state.weight) == 0
    assert trained.metrics["initial_flip_rate"] > 0


@pytest.mark.parametrize("mode", MODES)
def test_killed_training_continues_to_the_same_bits(tmp_path, mode):
    whole = ast(make_job(tmp_path / "whole"), **SETTING, **mode)
    job = make_job(tmp_path / "cut")

    class Killed(Exception):
        pass

    def progress(done, total):
        if done == 7 * 64:
            raise Killed

    cut = type(job)(**{**{name: getattr(job, name) for name in job.__slots__}, "progress": progress})
    with pytest.raises(Killed):
        ast(cut, **SETTING, **mode, checkpoint_every=1)
    assert len(list((tmp_path / "cut").glob("step-*.safetensors"))) == 1
    assert_same(ast(make_job(tmp_path / "cut"), **SETTING, **mode, checkpoint_every=1), whole)


def test_state_has_the_promised_size():
    torch.manual_seed(0)
    model = torch.nn.Linear(256, 64, bias=False).bfloat16()
    mask = {"weight": TWO_OF_FOUR.keep(model.weight.detach().float().abs())}
    optimizer = SparseAdamW(model, mask, TWO_OF_FOUR, Rule(), memory=Memory("float8", "bfloat16"))
    bytes_ = sum(tensor.numel() * tensor.element_size() for tensor in optimizer.state[model.weight].values())
    assert bytes_ / model.weight.numel() == pytest.approx(2 + 2 + 8 / 256 + 1 + 1 / 8)


def test_packed_first_masks_count_the_same_flips():
    counts = []
    for memory in (Memory(), Memory("float8")):
        torch.manual_seed(0)
        model = torch.nn.Linear(16, 6, bias=False)
        mask = {"weight": TWO_OF_FOUR.keep(model.weight.detach().abs())}
        optimizer = SparseAdamW(model, mask, TWO_OF_FOUR, Rule(), memory=memory)
        optimizer.state[model.weight]["dense"].copy_(torch.randn(6, 16))
        optimizer.advance(Step(1, lr=0.0, refresh=True))
        counts.append([int(count) for count in optimizer.flips])
    assert counts[0] == counts[1]
    assert counts[0][1] > 0


def test_recomputed_blocks_change_no_bit(tmp_path, plain):
    assert_same(plain[1], ast(make_job(tmp_path), **SETTING, checkpointing=True))


def test_both_passes_of_a_recomputed_block_see_the_same_masks(tmp_path):
    """T8: what the linears of a block multiply with, in the forward and again in the backward."""
    job = make_job(tmp_path)
    modules = dict(job.student.named_modules())
    seen: dict[str, list[torch.Tensor]] = {}
    for name in job.linears:
        modules[name].register_forward_pre_hook(
            lambda module, _, name=name: (
                seen.setdefault(name, []).append(module.weight.detach() != 0) if torch.is_grad_enabled() else None
            )
        )
    ast(job, **SETTING, checkpointing=True)
    for name, masks in seen.items():
        assert len(masks) == 2 * 24, name
        assert all(torch.equal(a, b) for a, b in zip(masks[::2], masks[1::2], strict=True))
    assert any(not torch.equal(masks[0], masks[-1]) for masks in seen.values())  # they did change between steps


def test_recomputed_blocks_are_put_back(tmp_path):
    job = make_job(tmp_path)
    before = [block.forward for block in blocks_of(job.student)]
    with recomputed(job.student, True):
        assert all("forward" in block.__dict__ for block in blocks_of(job.student))
    assert [block.forward for block in blocks_of(job.student)] == before
    assert len(before) == 2


@pytest.mark.parametrize(
    "options", [{"hidden": 50.0, "kl": 0.0}, {"hidden": 0.5}, {"hidden": 1.0, "checkpointing": True}]
)
def test_hidden_states_come_closer(tmp_path, options):
    job = make_job(tmp_path)
    tokens = job.tokens[:4].long()

    def distance():
        with torch.no_grad(), block_outputs(job.student) as own, block_outputs(job.teacher) as taught:
            job.student(input_ids=tokens), job.teacher(input_ids=tokens)
        return float(square_head(own, taught))

    ast(job, **{**SETTING, "tokens": 64, "decay": 0.0, "lr": 1e-9})
    first = distance()
    job = make_job(tmp_path / "again")
    ast(job, **{**LONGER, "tokens": 96 * 64, "lr": 1e-3, **options})
    assert 0 < distance() < 0.6 * first


def test_square_head_is_its_formula():
    torch.manual_seed(0)
    own, taught = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(2)], [torch.randn(2, 3, 4) for _ in range(2)]
    found = square_head(own, taught)
    expected = sum(((a - b) ** 2).mean() / ((b**2).mean() + 2**-7) for a, b in zip(own, taught, strict=True))
    torch.testing.assert_close(found, expected)
    with pytest.raises(MethodError, match="blocks and width"):
        square_head(own, taught[:1])


def test_reverse_divergence_trains(tmp_path):
    job = make_job(tmp_path)
    ast(job, **LONGER, kl_direction="reverse")
    assert job.student.log[-1]["kl"] < 0.5 * job.student.log[0]["kl"]


def test_kernels_that_cannot_run_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsekit.kernels.find_spec", lambda name: None)
    with pytest.raises(MethodError, match="kernels: triton cannot run here"):
        ast(make_job(tmp_path, "llama"), **SETTING, kernels="triton")
