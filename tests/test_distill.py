"""Invariant T11: the distillation loss."""

import pytest
import torch
from torch import nn

from sparsekit.training import distill
from sparsekit.training.distill import (
    IGNORED,
    Objective,
    chunk_rows,
    chunked_loss,
    headless,
    loss_reference,
    next_token_targets,
    plain_head,
)


def case(bias=False, seed=0):
    torch.manual_seed(seed)
    head, teacher_head = nn.Linear(12, 30, bias=bias).double(), nn.Linear(20, 30, bias=bias).double()
    hidden = torch.randn(17, 12, dtype=torch.float64, requires_grad=True)
    teacher_hidden = torch.randn(17, 20, dtype=torch.float64)
    targets = torch.randint(0, 30, (17,))
    targets[[3, 16]] = IGNORED
    return head, teacher_head, hidden, teacher_hidden, targets


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "objective",
    [
        Objective(2 / 3, 2.0),
        Objective(1.0, 1.0),
        Objective(0.0, 2.0),
        Objective(0.3, 0.5),
        Objective(0.7, 3.0, "reverse"),
    ],
)
@pytest.mark.parametrize("entries", [30, 30 * 5, 10**6])
def test_chunks_give_the_loss_and_gradients_of_the_whole(monkeypatch, objective, bias, entries):
    monkeypatch.setattr(distill, "CHUNK_ENTRIES", entries)
    head, teacher_head, hidden, teacher_hidden, targets = case(bias)
    loss, kl, ce = chunked_loss(hidden, head, teacher_hidden, teacher_head, targets, objective)
    (loss * 0.7).backward()
    found = [hidden.grad.clone(), head.weight.grad.clone()] + ([head.bias.grad.clone()] if bias else [])
    hidden.grad = head.weight.grad = None
    if bias:
        head.bias.grad = None
    teacher = teacher_head(teacher_hidden).detach() if objective.kl else None
    expected_loss, expected_kl, expected_ce = loss_reference(head(hidden), teacher, targets, objective)
    (expected_loss * 0.7).backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert ce.item() == pytest.approx(expected_ce.item(), rel=1e-5)
    assert kl.item() == pytest.approx(expected_kl.item(), rel=1e-5, abs=1e-8)
    wanted = [hidden.grad, head.weight.grad] + ([head.bias.grad] if bias else [])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_equal_logits_have_no_divergence_and_no_gradient():
    head, _, hidden, _, targets = case()
    loss, kl, _ = chunked_loss(hidden, head, hidden.detach(), head, targets, Objective(1.0, 2.0))
    loss.backward()
    assert abs(float(kl)) < 1e-7
    assert float(hidden.grad.abs().max()) < 1e-7


def test_direction_is_forward():
    """KL(teacher ‖ student): infinite loss where the student misses mass, none where it adds a little."""
    teacher, student = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    _, kl, _ = loss_reference(student, teacher, torch.tensor([IGNORED]), Objective(1.0, 1.0))
    p = teacher.softmax(-1)
    assert float(kl) == pytest.approx(float((p * (p.log() - torch.tensor([0.5]).log())).sum()), rel=1e-5)
    _, back, _ = loss_reference(teacher, student, torch.tensor([IGNORED]), Objective(1.0, 1.0))
    assert float(back) != pytest.approx(float(kl), rel=0.1)


def test_reverse_direction_swaps_the_models():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 9), torch.randn(6, 9)
    targets = torch.randint(0, 9, (6,))
    forward = loss_reference(student, teacher, targets, Objective(1.0, 2.0))
    reverse = loss_reference(teacher, student, targets, Objective(1.0, 2.0, "reverse"))
    torch.testing.assert_close(forward[1], reverse[1])


def test_the_gradient_is_handed_out_once():
    head, teacher_head, hidden, teacher_hidden, targets = case()
    loss, _, _ = chunked_loss(hidden, head, teacher_hidden, teacher_head, targets, Objective())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken already"):
        loss.backward()


def test_constant_added_to_logits_changes_nothing():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 9), torch.randn(6, 9)
    targets = torch.randint(0, 9, (6,))
    plain = loss_reference(student, teacher, targets, Objective())
    moved = loss_reference(student + 5, teacher - 3 * torch.arange(6.0).unsqueeze(1), targets, Objective())
    assert float(plain[0]) == pytest.approx(float(moved[0]), rel=1e-4)


def test_gradient_hardly_depends_on_temperature_for_small_gaps():
    torch.manual_seed(0)
    teacher = 0.01 * torch.randn(6, 9)
    grads = []
    for temperature in (1.0, 2.0, 4.0):
        student = teacher.clone() + 0.01 * torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
        student.requires_grad_(True)
        loss_reference(student, teacher, torch.zeros(6, dtype=torch.long), Objective(1.0, temperature))[0].backward()
        grads.append(student.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=0.1, atol=5e-6)
    torch.testing.assert_close(grads[0], grads[2], rtol=0.1, atol=5e-6)


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "device", "rows"),
    [
        (4096, 128256, "cuda", 256),
        (16384, 128256, "cuda", 1024),
        (32768, 8192, "cuda", 4096),
        (100, 2**26, "cuda", 128),
        (4096, 128256, "cpu", 261),
        (100, 2**26, "cpu", 1),
    ],
)
def test_chunks_fit_the_memory_and_are_not_too_many(tokens, vocabulary, device, rows):
    assert chunk_rows(tokens, vocabulary, torch.device(device)) == rows


def test_targets_are_the_next_tokens():
    tokens = torch.tensor([[5, 6, 7], [1, 2, 3]])
    assert next_token_targets(tokens).tolist() == [6, 7, IGNORED, 2, 3, IGNORED]


def tiny(kind, **extra):
    torch.manual_seed(0)
    from families import FAMILIES
    from transformers import AutoModelForCausalLM

    config = FAMILIES[kind]()
    for key, value in extra.items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_config(config).eval()


def test_plain_heads_are_found_and_capped_ones_are_not():
    tokens = torch.arange(12).reshape(1, 12)
    llama = tiny("llama")
    head = plain_head(llama, tokens)
    assert head is llama.lm_head
    with torch.no_grad(), headless(llama, head):
        hidden = llama(input_ids=tokens).logits
    torch.testing.assert_close(head(hidden), llama(input_ids=tokens).logits)
    assert plain_head(tiny("gemma2", final_logit_softcapping=0.01), tokens) is None
