"""Invariants T2-T7 and T9 of the AST reference: masks, decay, moments, flips."""

import pytest
import torch
from torch import nn

from sparsekit.pattern import Pattern
from sparsekit.training.optim import Rule, SparseAdamW, Step, adamw_, clip_factor, refreshed

TWO_OF_FOUR = Pattern(2, 4)


def tensors(shape=(8, 16), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), generator


def sparse_model(out=8, width=16, seed=0):
    model = nn.Linear(width, out)
    weight, _ = tensors((out, width), seed)
    with torch.no_grad():
        model.weight.copy_(weight)
    return model, {"weight": TWO_OF_FOUR.keep(weight.abs())}


def optimizer(rule=Rule(), **given):
    model, masks = sparse_model()
    return model, SparseAdamW(model, masks, TWO_OF_FOUR, rule, **given)


def test_decay_touches_only_pruned_weights_and_pulls_them_to_zero():
    model, opt = optimizer()
    before = opt.weight("weight").clone()
    mask = opt.state[model.weight]["mask"]
    last = before.abs()
    for number in range(1, 51):
        model.weight.grad = torch.zeros_like(model.weight)
        opt.advance(Step(number, lr=1e-3, decay=6e-5))
        now = opt.weight("weight")
        assert torch.equal(now[mask], before[mask])
        alive = ~mask & (last > 2e-2)  # the first step is 10 lr: the correction of m scales the decay too
        assert bool((now.abs()[alive] < last[alive]).all())
        assert torch.equal(now[alive].sign(), before[alive].sign())
        last = now.abs().clone()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
def test_masks_of_other_dtypes_are_refused(dtype):
    model, masks = sparse_model()
    with pytest.raises(ValueError, match="bool"):
        SparseAdamW(model, {"weight": masks["weight"].to(dtype)}, TWO_OF_FOUR, Rule())


def test_decay_is_not_remembered_in_the_first_moment():
    _, with_decay = optimizer()
    _, without = optimizer()
    for number in range(1, 30):
        grad, _ = tensors(seed=number)
        for opt, decay in ((with_decay, 1e-2), (without, 0.0)):
            parameter = opt.names["weight"]
            parameter.grad = grad.clone()
            opt.advance(Step(number, lr=1e-3, decay=decay))
    first = [opt.state[opt.names["weight"]]["exp_avg"] for opt in (with_decay, without)]
    assert torch.equal(*first)


@pytest.mark.parametrize("rule", ["l2", "l1"])
@pytest.mark.parametrize("second_moment", ["momentum", "gradient"])
def test_update_matches_ten_written_lines(second_moment, rule):
    weight, generator = tensors()
    mask = TWO_OF_FOUR.keep(weight.abs())
    w, m, v = weight.double().clone(), torch.zeros(8, 16).double(), torch.zeros(8, 16).double()
    weight = weight.double()
    first, second = torch.zeros_like(w), torch.zeros_like(w)
    b1, b2, lr, lam, wd, eps = 0.9, 0.95, 1e-3, 1e-2, 0.1, 1e-8
    settings = Rule(betas=(b1, b2), second_moment=second_moment, decay_rule=rule)
    for k in range(1, 101):
        g = torch.randn(8, 16, generator=generator).double()
        mix = k / 100
        adamw_(weight, g, first, second, mask, settings, Step(k, lr, lam, mix, wd))
        w = (1 - lr * wd) * w
        m = b1 * m + (1 - b1) * g
        if rule == "l2":
            u, pulled = m + lam * (~mask * w), g + lam * (~mask * w)
        else:
            u = torch.where(mask, m, (1 - mix) * m + mix * lam * w.sign())
            pulled = torch.where(mask, g, (1 - mix) * g + mix * lam * w.sign())
        of = u if second_moment == "momentum" else pulled
        v = b2 * v + (1 - b2) * of**2
        w = w - lr / (1 - b1**k) * u / ((v / (1 - b2**k)).sqrt() + eps)
    torch.testing.assert_close(weight, w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("second_moment", ["momentum", "gradient"])
def test_a_pruned_weight_without_a_gradient_is_not_thrown_across_zero(second_moment):
    weight, mask = torch.full((1, 4), 0.5), torch.tensor([[True, True, False, False]])
    first, second, rule = torch.zeros(1, 4), torch.zeros(1, 4), Rule(second_moment=second_moment)
    for number in range(100, 400):
        adamw_(weight, torch.zeros(1, 4), first, second, mask, rule, Step(number, 4e-3, 1e-3))
    assert float(weight.abs().max()) <= 0.5
    assert float(weight[~mask].abs().max()) < 0.05


def test_without_decay_and_with_the_gradient_it_is_torch_adamw():
    model, opt = optimizer(Rule(second_moment="gradient", masked=False))
    other, _ = sparse_model()
    with torch.no_grad():
        other.bias.copy_(model.bias)
    plain = torch.optim.AdamW(other.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for number in range(1, 60):
        grad, _ = tensors(seed=number)
        bias, _ = tensors((8,), seed=-number)
        model.weight.grad, model.bias.grad = grad.clone(), bias.clone()
        other.weight.grad, other.bias.grad = grad.clone(), bias.clone()
        opt.advance(Step(number, lr=1e-3))
        plain.step()
    torch.testing.assert_close(model.weight, other.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.bias, other.bias, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("second_moment", "expected"), [("momentum", 0.98), ("gradient", 0.23)])
def test_step_on_noise_has_the_size_the_second_moment_gives(second_moment, expected):
    weight, generator = tensors((64, 64))
    first, second = torch.zeros(64, 64), torch.zeros(64, 64)
    mask = torch.ones(64, 64, dtype=torch.bool)
    rule = Rule(second_moment=second_moment)
    for number in range(1, 201):
        before = weight.clone()
        noise = torch.randn(64, 64, generator=generator)
        adamw_(weight, noise, first, second, mask, rule, Step(number, lr=1e-3))
    rms = float((weight - before).square().mean().sqrt() / 1e-3)
    assert rms == pytest.approx(expected, abs=0.03)


def test_the_model_computes_with_exactly_two_of_four():
    model, opt = optimizer()
    for number in range(1, 20):
        groups = (model.weight != 0).reshape(8, 4, 4).sum(-1)
        assert int(groups.max()) <= 2
        model.weight.grad, _ = tensors(seed=number)
        opt.advance(Step(number, lr=0.3, decay=1e-3))
        if number % 3 == 0:
            opt.refresh()
    assert not bool(torch.signbit(model.weight[~opt.state[model.weight]["mask"]]).any())


def test_gradient_reaches_pruned_entries():
    """T3: the gradient of W ⊙ M is what the optimizer sees at every entry."""
    model, opt = optimizer()
    x, _ = tensors((5, 16), seed=3)
    model(x).square().sum().backward()
    mask = opt.state[model.weight]["mask"]
    assert bool((model.weight.grad[~mask] != 0).all())
    before = opt.weight("weight").clone()
    opt.advance(Step(1, lr=1e-2))
    assert bool((opt.weight("weight")[~mask] != before[~mask]).all())


def test_refresh_keeps_the_largest_and_counts_flips():
    model, opt = optimizer()
    state = opt.state[model.weight]
    state["dense"].copy_(tensors(seed=9)[0])
    old, first = state["mask"].clone(), state["initial_mask"].clone()
    changed, away = opt.refresh()
    new = state["mask"]
    groups, kept = state["dense"].abs().reshape(-1, 4), new.reshape(-1, 4)
    for group, keep in zip(groups, kept, strict=True):
        assert int(keep.sum()) == 2
        assert group[keep].min() >= group[~keep].max()
    assert int(changed) == int((new != old).sum())
    assert int(away) == int((new != first).sum())
    assert int(changed) % 2 == 0
    assert [int(value) for value in opt.refresh()] == [0, int(away)]


@pytest.mark.parametrize("weight", [torch.zeros(4, 8), torch.ones(4, 8), torch.randn(4, 8).bfloat16().float().round()])
def test_ties_keep_exactly_n(weight):
    mask = refreshed(weight, torch.ones(4, 8, dtype=torch.bool), TWO_OF_FOUR, None, 0.0)
    assert bool((mask.reshape(-1, 4).sum(-1) == 2).all())


def test_constant_importance_is_magnitude_and_hysteresis_keeps_the_mask():
    weight, _ = tensors()
    mask = TWO_OF_FOUR.keep(tensors(seed=5)[0].abs())
    plain = refreshed(weight, mask, TWO_OF_FOUR, None, 0.0)
    assert torch.equal(refreshed(weight, mask, TWO_OF_FOUR, torch.full((16,), 3.0), 0.0), plain)
    assert torch.equal(refreshed(weight, mask, TWO_OF_FOUR, None, 1e9), mask)


def test_dense_forward_until_finalized():
    model, opt = optimizer(Rule(masked=False))
    assert bool((model.weight != 0).all())
    opt.finalize()
    assert torch.equal(model.weight != 0, opt.state[model.weight]["mask"])


def test_state_goes_out_and_in():
    model, opt = optimizer()
    for number in range(1, 6):
        model.weight.grad, _ = tensors(seed=number)
        model.bias.grad = torch.ones(8)
        opt.advance(Step(number, lr=1e-2, decay=1e-3))
    opt.refresh()
    saved = {key: value.clone() for key, value in opt.tensors().items()}
    other_model, other = optimizer()
    other.load_tensors(saved)
    assert torch.equal(other_model.weight, model.weight)
    assert torch.equal(other_model.bias, model.bias)
    with pytest.raises(KeyError):
        other.load_tensors({**saved, "mask/other": saved["mask/weight"]})


def test_clip_factor_is_torchs():
    model, _ = sparse_model()
    model.weight.grad, _ = tensors(seed=1)
    model.bias.grad = torch.ones(8)
    factor, norm = clip_factor(model.parameters(), 1.0)
    expected = torch.nn.utils.get_total_norm([model.weight.grad, model.bias.grad])
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    assert float(factor) == pytest.approx(1 / float(expected), rel=1e-5)
    assert float(clip_factor(model.parameters(), 1e9)[0]) == 1.0


def test_bfloat16_parameters_keep_float32_masters():
    model, masks = sparse_model()
    model = model.bfloat16()
    opt = SparseAdamW(model, masks, TWO_OF_FOUR, Rule())
    assert opt.weight("weight").dtype == torch.float32
    assert opt.weight("bias").dtype == torch.float32
    model.weight.grad = torch.full_like(model.weight, 1e-3)
    model.bias.grad = torch.zeros_like(model.bias)
    before = opt.weight("weight").clone()
    opt.advance(Step(1, lr=2e-5))  # far below bfloat16's resolution of these weights
    assert bool((opt.weight("weight") != before).all())
