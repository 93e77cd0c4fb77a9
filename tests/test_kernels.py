"""Triton kernels against their references, run by Triton's interpreter on CPU tensors."""

import os
from importlib.util import find_spec

import pytest
import torch
from torch import nn

if find_spec("triton") is None or torch.cuda.is_available():
    pytest.skip("for Triton's interpreter; tests/gpu runs the compiled kernels", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported

from sparsekit.pattern import Pattern
from sparsekit.training.distill import IGNORED, Objective, chunked_loss, slice_loss_reference
from sparsekit.training.grids import on_grid, rounding_of
from sparsekit.training.lowbits import Memory
from sparsekit.training.optim import Rule, SparseAdamW, Step

TWO_OF_FOUR = Pattern(2, 4)
LEAN = Memory("float8", "bfloat16", seed=3)


class Net(nn.Module):
    """Two sparse weights (whole chunks, and a rest), an ordinary one, two vectors."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(64, 48, bias=True), nn.Linear(40, 13, bias=False)
        self.embed, self.scale = nn.Embedding(50, 24), nn.Parameter(torch.ones(7))
        self.to(dtype)


def pair(dtype, rule, pattern=TWO_OF_FOUR, memory=Memory(), importance=False):
    made = []
    for kernels in ("reference", "triton"):
        net = Net(dtype)
        masks = {f"{name}.weight": pattern.keep(getattr(net, name).weight.detach().float().abs()) for name in "ab"}
        norms = {"a.weight": torch.rand(64, generator=torch.Generator().manual_seed(4))} if importance else None
        made.append((net, SparseAdamW(net, masks, pattern, rule, importance=norms, memory=memory, kernels=kernels)))
    return made


def give_gradients(nets, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameters in zip(*(net.parameters() for net in nets), strict=True):
        grad = torch.randn(parameters[0].shape, generator=generator).to(parameters[0].dtype)
        for parameter in parameters:
            parameter.grad = grad.clone()


def compare(a, b, rtol, atol, equal_masks=True):
    for key, expected in a.tensors().items():
        found = b.tensors()[key]
        assert found.dtype == expected.dtype
        if expected.dtype == torch.bool:
            assert torch.equal(found, expected) or not equal_masks, key
        else:
            torch.testing.assert_close(found.float(), expected.float(), rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("rule", "pattern", "dtype"),
    [
        (Rule(), TWO_OF_FOUR, torch.float32),
        (Rule(second_moment="gradient", decay_rule="l1"), Pattern(4, 8), torch.float32),
        (Rule(decay_rule="l1", masked=False), Pattern(1, 4), torch.bfloat16),
        (Rule(), Pattern(3, 8), torch.float16),
    ],
)
def test_fused_step_is_the_references(rule, pattern, dtype):
    (one, reference), (two, fused) = pair(dtype, rule, pattern, importance=True)
    for number in range(1, 5):
        give_gradients((one, two), number)
        step = Step(
            number, lr=1e-2, decay=1e-2, mix=number / 9, weight_decay=0.1, refresh=number % 2 == 0, hysteresis=0.05
        )
        clip = None if number == 3 else torch.tensor(0.7)
        reference.advance(step, clip)
        fused.advance(step, clip)
        compare(reference, fused, rtol=2e-6, atol=2e-7)
        for name in ("a", "b"):
            torch.testing.assert_close(getattr(one, name).weight, getattr(two, name).weight, rtol=1e-2, atol=1e-6)
        assert [int(count) for count in reference.flips] == [int(count) for count in fused.flips]
    assert int(fused.flips[1]) > 0
    fused.finalize()
    fused.advance(Step(5, lr=1e-2), None)
    assert torch.equal(two.a.weight != 0, fused.state[two.a.weight]["mask"])


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Pattern(4, 8), Pattern(1, 8)])
@pytest.mark.parametrize("hysteresis", [0.0, 0.3])
def test_masks_are_exactly_the_references_also_in_ties(pattern, hysteresis):
    (one, reference), (two, fused) = pair(torch.float32, Rule(), pattern)
    generator = torch.Generator().manual_seed(1)
    for optimizer, net in ((reference, one), (fused, two)):
        net.zero_grad()
        generator.manual_seed(1)
        for name in "ab":
            dense = optimizer.state[getattr(net, name).weight]["dense"]
            dense.copy_(torch.randint(-2, 3, dense.shape, generator=generator).float() / 4)
        optimizer.advance(Step(1, lr=0.0, refresh=True, hysteresis=hysteresis))  # no gradient: only the masks
    compare(reference, fused, 0, 0)
    assert [int(count) for count in reference.flips] == [int(count) for count in fused.flips]
    assert int(reference.flips[0]) > 0


@pytest.mark.parametrize(
    ("memory", "dtype"),
    [
        (LEAN, torch.bfloat16),
        (Memory("float8", "float32", seed=1), torch.float32),
        (Memory("float32", "bfloat16", seed=2), torch.bfloat16),
        (LEAN, torch.float32),
    ],
)
def test_low_precision_state_has_the_references_bits(memory, dtype):
    (one, reference), (two, fused) = pair(dtype, Rule(), memory=memory)
    for number in range(1, 5):
        give_gradients((one, two), number)
        spans = torch.Generator().manual_seed(number)
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            # eight decades in a block: the small ones fall below float8's range, where the root must not be 0
            a.grad *= 10 ** (-8 * torch.rand(a.shape, generator=spans)).to(a.dtype)
            b.grad = a.grad.clone()
        step = Step(number, lr=1e-2, decay=1e-2, refresh=number % 2 == 0)
        reference.advance(step)
        fused.advance(step)
        for key, expected in reference.tensors().items():
            found, expected = fused.tensors()[key].float(), expected.float()
            # values a rounding apart fall on other sides of a random threshold now and then
            differing = int((~torch.isclose(found, expected, rtol=1e-5, atol=1e-7)).sum())
            assert differing <= 1 + 0.01 * expected.numel(), key
        fused.load_tensors({key: value.clone() for key, value in reference.tensors().items()})


@pytest.mark.parametrize(
    ("bits", "levels", "size", "pattern", "memory", "dtype"),
    [
        (4, "integer", 8, TWO_OF_FOUR, Memory(), torch.float32),
        (3, "integer", -1, Pattern(3, 8), Memory(), torch.float32),
        (2, "odd", 8, TWO_OF_FOUR, Memory(), torch.float32),
        (1, "odd", -1, Pattern.unstructured(0.0), LEAN, torch.bfloat16),
        (3, "six", 8, TWO_OF_FOUR, Memory(), torch.float32),
        (3, "six", -1, Pattern.unstructured(0.0), LEAN, torch.bfloat16),
        (2, "ternary", 8, Pattern.unstructured(0.0), Memory(), torch.float32),
    ],
)
def test_weights_go_on_the_references_grids(bits, levels, size, pattern, memory, dtype, monkeypatch):
    monkeypatch.setattr("sparsekit.quant.MSE_STEPS", 6)
    made = pair(dtype, Rule(rounding=rounding_of(bits, size, levels)), pattern, memory=memory)
    (one, reference), (two, fused) = made
    for number in range(1, 4):
        give_gradients((one, two), number)
        for _, optimizer in made:
            optimizer.advance(Step(number, lr=1e-2, decay=1e-2, refresh=number % 2 == 0))
            if number == 1:
                optimizer.regrid()
        fused.load_tensors({key: value.clone() for key, value in reference.tensors().items()})
        for net, optimizer in made:  # ties and values beyond the range, and no update
            net.zero_grad()
            for name in "ab":
                state = optimizer.state[getattr(net, name).weight]
                generator = torch.Generator().manual_seed(number)
                halves = torch.randint(-20, 21, state["dense"].shape, generator=generator) / 2
                values = halves.reshape(*state["step"].shape, -1) * state["step"].unsqueeze(2)
                state["dense"].copy_(values.reshape(halves.shape))
            optimizer.advance(Step(number, lr=0.0))
        reference.rewrite()
        for name in "ab":
            expected, found = getattr(one, name).weight, getattr(two, name).weight
            # the interpreter cuts bfloat16 off where a device rounds
            torch.testing.assert_close(found, expected, rtol=0.0 if dtype == torch.float32 else 2**-7, atol=0)
            assert not torch.signbit(found[found == 0]).any()
            assert len(expected.unique()) > 2
    state = fused.state[two.a.weight]
    state["dense"][0] = float("nan")
    fused.compute_with(masked=True, rounded=True)
    assert torch.equal(two.a.weight[0].isnan(), state["mask"][0])  # what is not finite is not made finite


@pytest.mark.parametrize(
    ("bits", "levels", "size", "dtype"),
    [
        (4, "integer", 8, torch.bfloat16),
        (3, "integer", -1, torch.float32),
        (2, "odd", 8, torch.float32),
        (3, "six", 8, torch.float32),
        (2, "ternary", 8, torch.float32),
    ],
)
def test_learned_steps_are_the_references(bits, levels, size, dtype):
    made = pair(dtype, Rule(rounding=rounding_of(bits, size, levels), learned=True))
    (one, reference), (two, fused) = made
    for _, optimizer in made:
        optimizer.regrid()
    for number in range(1, 5):
        give_gradients((one, two), number)
        clip = None if number == 2 else torch.tensor(0.7)
        for _, optimizer in made:
            optimizer.advance(Step(number, lr=1e-2, decay=1e-2, refresh=number == 3), clip)
        for key, expected in reference.tensors().items():
            if key.startswith("step"):  # a stored step is a rounding of its master, which may fall on either side
                tolerance = 2**-10 if key.startswith("step/") else 1e-5
                torch.testing.assert_close(fused.tensors()[key], expected, rtol=tolerance, atol=1e-6)
        for name in "ab":
            state = fused.state[getattr(two, name).weight]
            assert torch.equal(state["step"], state["step_dense"].half().float())
            computed = on_grid(state["dense"], state["mask"], state["step"], fused.rule.rounding)
            rough = 0.0 if dtype == torch.float32 else 2**-7
            torch.testing.assert_close(getattr(two, name).weight.float(), computed, rtol=rough, atol=0)
        fused.load_tensors({key: value.clone() for key, value in reference.tensors().items()})


def test_parameters_without_a_gradient_stay():
    (_, _), (net, fused) = pair(torch.float32, Rule())
    before = {key: value.clone() for key, value in fused.tensors().items()}
    net.embed.weight.grad = torch.ones_like(net.embed.weight)
    fused.advance(Step(1, lr=1e-2, decay=1.0))
    changed = {key for key, value in fused.tensors().items() if not torch.equal(value, before[key])}
    assert changed == {"parameter/embed.weight", "exp_avg/embed.weight", "exp_avg_sq/embed.weight"}


def logits(rows, vocabulary, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (4 * torch.randn(rows, vocabulary, generator=generator) for _ in range(2))
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[rows // 2] = IGNORED
    return student.to(dtype), teacher.to(dtype), targets


@pytest.mark.parametrize("vocabulary", [7, 4096, 5000, 9001])
@pytest.mark.parametrize(
    "objective", [Objective(), Objective(1.0, 1.0), Objective(0.4, 3.0, "reverse"), Objective(0.0)]
)
def test_loss_kernel_is_the_reference(vocabulary, objective):
    from sparsekit.kernels.loss import slice_loss

    student, teacher, targets = logits(3, vocabulary, torch.float32)
    given = teacher if objective.kl else None
    counted = torch.tensor(2)
    kl, ce, grad = slice_loss_reference(student, given, targets, objective, 11, counted)
    found = slice_loss(student, given, targets, objective, 11, counted)
    assert found[2] is student
    torch.testing.assert_close(found[0], kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], ce, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[2], grad, rtol=1e-4, atol=1e-8)


def test_loss_kernel_writes_bfloat16_and_takes_huge_logits():
    from sparsekit.kernels.loss import slice_loss

    student, teacher, targets = logits(3, 300, torch.bfloat16)
    student, teacher = student * 1000, teacher * 1000
    expected = slice_loss_reference(student, teacher, targets, Objective(), 3, torch.tensor(2))
    found = slice_loss(student, teacher, targets, Objective(), 3, torch.tensor(2))
    assert found[2].dtype == torch.bfloat16
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=1e-2, atol=1e-6)


def test_chunked_loss_with_the_kernel():
    torch.manual_seed(0)
    head, hidden = nn.Linear(12, 50), torch.randn(9, 12, requires_grad=True)
    targets = torch.randint(0, 50, (9,))
    results = []
    for kernels in ("reference", "triton"):
        head.zero_grad()
        hidden.grad = None
        loss, kl, ce = chunked_loss(hidden, head, hidden.detach() * 2, head, targets, Objective(), kernels)
        loss.backward()
        results.append([loss.detach(), kl, ce, hidden.grad, head.weight.grad.clone(), head.bias.grad.clone()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
