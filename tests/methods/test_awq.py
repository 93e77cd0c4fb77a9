"""AWQ on tensors: against brute force, against round-to-nearest, with masks, ties and dead channels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsekit.errors import MethodError, NumericsError
from sparsekit.methods.awq import FLOOR, Form, awq, clipped, input_scales, losses
from sparsekit.methods.rtn import rtn
from sparsekit.models.groups import Producer
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid
from sparsekit.registry import METHODS
from sparsekit.state import Group, LinearState
from sparsekit.stats import Gram
from sparsekit.verify import verified

IN, SIZE = 32, 8
TWO_OF_FOUR = Pattern(2, 4)


def identity(vector: torch.Tensor) -> torch.Tensor:
    return vector


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(seed: int = 0, dead: tuple[int, ...] = ()) -> torch.Tensor:
    """Correlated tokens with a few loud channels, as AWQ expects them."""
    x = draw(256, IN, seed=seed) @ (torch.eye(IN) + 0.2 * draw(IN, IN, seed=seed + 1))
    x[:, ::7] *= 12
    x[:, list(dead)] = 0
    return x


def gram(x: torch.Tensor) -> Gram:
    statistic = Gram.empty(x.shape[1], torch.device("cpu"))
    statistic.update(x)
    return statistic


def group(*rows: int, prune: bool = False, why: str = "", seed: int = 2) -> Group:
    linears = {}
    for number, out in enumerate(rows):
        state = LinearState(f"block.{number}", draw(out, IN, seed=seed + number))
        linears[state.name] = state.masked(TWO_OF_FOUR.keep(state.source.abs())) if prune else state
    return Group(linears, why=why) if why else Group(linears, tie=identity, untie=identity)


def loss_of(before: Group, after: Group, x: torch.Tensor) -> float:
    """Sum of squared output changes over tokens, in float64, from the tokens themselves."""
    scale = torch.ones(IN) if after.input_scale is None else after.input_scale
    change = [before.linears[n].weight - after.linears[n].weight / scale for n in before.linears]
    return sum(float((x.double() @ d.double().T).square().sum()) for d in change)


def by_rtn(given: Group, bits: int = 4, group_size: int = SIZE, symmetric: bool = True) -> Group:
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    return given.with_linears({n: rtn(state, **options) for n, state in given.linears.items()})


def slow_scales(given: Group, x: torch.Tensor, grid: int, duo: bool, size: int = SIZE) -> list[torch.Tensor]:
    """The candidates, one number at a time and in float64."""
    weights = [state.weight.double() for state in given.linears.values()]
    masks = [torch.ones_like(s.source).bool() if s.mask is None else s.mask for s in given.linears.values()]
    level, salience, alive = [], [], []
    for j in range(IN):
        first = j // size * size
        shares = [
            float(w[i, j].abs() / w[i, first : first + size].abs().max())
            for w, m in zip(weights, masks, strict=True)
            for i in range(len(w))
            if m[i, j]
        ]
        level.append(float(x[:, j].double().abs().mean()))
        salience.append(max(sum(shares) / len(shares), FLOOR) if shares else 1.0)
        alive.append(bool(shares) and level[-1] > 0)
    found = [torch.ones(IN)]
    for step in range(grid + 1):
        r = step / grid
        pairs = zip(level, salience, strict=True)
        s = [max(v, FLOOR * max(level)) ** r / (w ** (1 - r) if duo else 1) for v, w in pairs]
        living = [value for value, lives in zip(s, alive, strict=True) if lives]
        middle = (max(living) * min(living)) ** 0.5
        found.append(torch.tensor([v / middle if lives else 1.0 for v, lives in zip(s, alive, strict=True)]))
    return found


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("duo", [True, False])
def test_the_search_is_the_brute_force_one(duo, prune):
    x = inputs(dead=(3,))
    given = group(6, 5, prune=prune)
    result = awq(given, gram(x), bits=3, group_size=SIZE, grid=5, duo=duo, clip=False)
    trials = []
    for scale in slow_scales(given, x, 5, duo):
        trial = by_rtn(given.rescaled(scale), bits=3)
        trials.append((loss_of(given, trial, x), scale))
    best, scale = min(trials, key=lambda trial: trial[0])
    assert torch.allclose(result.input_scale, scale, rtol=1e-4)
    assert loss_of(given, result, x) == pytest.approx(best, rel=1e-3)


def test_candidates_and_their_losses_match_the_slow_ones():
    x = inputs()
    given, form = group(4, 3, prune=True), Form(4, SIZE, symmetric=False)
    candidates = input_scales(given, gram(x), form, grid=4, duo=True)
    slow = slow_scales(given, x, 4, duo=True)
    assert torch.allclose(candidates, torch.stack(slow), rtol=1e-4)
    expected = [loss_of(given, by_rtn(given.rescaled(s), symmetric=False), x) / len(x) for s in candidates]
    actual = losses(given, gram(x).matrix, candidates, form)
    assert torch.allclose(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_clip_search_is_the_brute_force_one(symmetric):
    x = inputs()
    form = Form(3, SIZE, symmetric)
    weight = draw(5, IN, seed=9)
    matrix = gram(x).matrix
    blocks = torch.stack([matrix[j : j + SIZE, j : j + SIZE] for j in range(0, IN, SIZE)])
    found = clipped(form.grouped(weight), blocks, form)
    shrunk = 0
    for row in range(len(weight)):
        for number in range(IN // SIZE):
            columns = slice(number * SIZE, (number + 1) * SIZE)
            w, tokens = weight[row, columns], x[:, columns].double()
            trials = []
            for i in range(10):
                bound = float(w.abs().max()) * (1 - i / 20)
                grids = Grid.fit(w.clamp(-bound, bound), 3, symmetric=symmetric)
                trials.append((float((tokens @ (w - grids.round(w)).double()).square().sum()), float(grids.scale)))
            shrunk += min(trials)[1] < trials[0][1]
            actual = Grid(found.scale[row, number], found.zero[row, number], 3).round(w)
            loss = float((tokens @ (w - actual).double()).square().sum())
            assert loss == pytest.approx(min(trials)[0], rel=1e-3)
    assert shrunk > 5  # the search has something to do


@pytest.mark.parametrize("group_size", [SIZE, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("prune", [False, True])
def test_the_loss_is_never_above_that_of_rounding_to_nearest(prune, symmetric, bits, group_size):
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    for seed in range(3):
        x = inputs(seed) if seed else draw(64, IN, seed=5)  # also tokens without any structure
        given = group(7, 3, prune=prune, seed=seed)
        plain = loss_of(given, by_rtn(given, **options), x)
        unclipped = loss_of(given, awq(given, gram(x), clip=False, **options), x)
        full = loss_of(given, awq(given, gram(x), **options), x)
        alone = loss_of(given, awq(replace(given, tie=None), gram(x), **options), x)
        assert full <= unclipped * (1 + 1e-5)
        assert unclipped <= plain * (1 + 1e-5)
        assert alone <= plain * (1 + 1e-5)
        if seed and bits <= 4 and group_size == SIZE:
            assert full < 0.9 * plain  # loud channels are what it is for


def test_rows_that_clipping_would_hurt_are_left_alone():
    """Groups looked at one by one may gain while their errors add up; the row as a whole decides."""
    x = inputs()
    x[:, SIZE : 2 * SIZE] = -x[:, :SIZE] + 0.01 * draw(256, SIZE, seed=3)  # errors of two groups cancel or add
    given = Group({"a": LinearState("a", draw(64, IN, seed=4))}, why="nothing")
    loose = awq(given, gram(x), bits=3, group_size=SIZE, clip=False)
    tight = awq(given, gram(x), bits=3, group_size=SIZE)
    change = [(x @ (given.linears["a"].weight - r.linears["a"].weight).T).square().sum(0) for r in (loose, tight)]
    assert bool((change[1] <= change[0] * (1 + 1e-4)).all())
    kept = (loose.linears["a"].quantized.scale == tight.linears["a"].quantized.scale).all(1)
    assert 0 < int(kept.sum()) < 64


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_masks_and_zeros_stay(bits, symmetric):
    given, statistic = group(8, 4, prune=True), gram(inputs())
    result = awq(given, statistic, bits=bits, group_size=SIZE, symmetric=symmetric)
    assert bits == 4 or result.input_scale is not None
    for name, after in result.linears.items():
        before = given.linears[name]
        assert torch.equal(after.mask, before.mask)
        pruned = after.weight[~before.mask]
        assert not pruned.any()
        assert not torch.signbit(pruned).any()
        record = verified(
            before, after, kind="quantize", pattern=TWO_OF_FOUR, statistic=statistic, input_scale=result.input_scale
        )
        assert (record.violations, record.bits) == (0, bits)
        assert record.error < 0.1


def test_the_mask_decides_what_is_pruned_not_the_zeros():
    state = LinearState("a", draw(8, IN, seed=1))
    state = replace(state, source=state.source.masked_fill(draw(8, IN, seed=2) > 0.5, 0.0))  # zeros, but kept
    result = awq(Group({"a": state}, tie=identity, untie=identity), gram(inputs()), group_size=SIZE)
    assert result.linears["a"].mask is None


def test_a_dead_channel_gets_scale_1_and_moves_no_other():
    """Neither a channel without inputs nor one without kept weights changes what the others get."""
    x, form = inputs(), Form(4, IN, symmetric=True)
    state = group(6).linears["block.0"]
    whole = Group({"a": state}, tie=identity, untie=identity)
    usual = input_scales(whole, gram(x), form, grid=5, duo=True)
    silent = x.clone()
    silent[:, 10] = 0
    without = input_scales(whole, gram(silent), form, grid=5, duo=True)
    others = torch.arange(IN) != 10
    assert torch.equal(without[:, 10], torch.ones(7))
    assert torch.allclose(without[:, others], usual[:, others])  # channel 10 is no extreme of `usual`
    mask = torch.ones(6, IN, dtype=torch.bool)
    mask[:, 10] = False
    pruned = Group({"a": state.masked(mask)}, tie=identity, untie=identity)
    without = input_scales(pruned, gram(x), form, grid=5, duo=True)
    assert torch.equal(without[:, 10], torch.ones(7))
    zeros = LinearState("a", pruned.linears["a"].weight)  # control: no mask, so 0 counts as a small weight
    naive = input_scales(replace(pruned, linears={"a": zeros}), gram(x), form, grid=5, duo=True)
    assert float(naive.max()) > 10 * float(without.max())


def test_all_channels_dead_or_nearly_so_stays_finite():
    for x in (torch.zeros(16, IN), torch.full((16, IN), 1e-30), inputs() * 1e-12, inputs() * 1e12):
        result = awq(group(4), gram(x), group_size=SIZE)
        assert torch.isfinite(result.linears["block.0"].weight).all()
        if result.input_scale is not None:
            assert 1e-3 < float(result.input_scale.min()) <= float(result.input_scale.max()) < 1e3
    uneven = torch.ones(16, IN)
    uneven[:, 0] = 1e-30
    scales = input_scales(group(4), gram(uneven), Form(4, SIZE, symmetric=True), grid=20, duo=True)
    assert float(scales.max() / scales.min()) < 1.01 / FLOOR


def test_activations_that_are_not_finite_are_refused():
    x = inputs()
    x[0, 0] = torch.inf
    with pytest.raises(NumericsError, match="not finite"):
        awq(group(4), gram(x), group_size=SIZE)


def test_a_scale_is_searched_as_it_is_tied():
    """4 query heads of width 8 on 2 key-value heads: o's inputs come as [kv, repeat, width]."""
    expand = torch.arange(16).view(2, 1, 8).expand(2, 2, 8).reshape(-1)
    producer = Producer("v", "linear", slice(None), expand)
    given = replace(group(6), tie=producer.tie, untie=producer.untie)
    x = inputs()
    result = awq(given, gram(x), bits=3, group_size=SIZE)
    heads = result.input_scale.view(2, 2, 8)
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert not torch.equal(heads[0], heads[1])
    level = gram(x).abs_mean.view(2, 2, 8).mean(1).reshape(-1)
    scales = input_scales(given, gram(x), Form(3, SIZE, symmetric=True), grid=4, duo=False)
    tied = level / (level.max() * level.min()).sqrt()
    assert torch.allclose(scales[-1], producer.tie(tied), rtol=1e-4)
    v = draw(16, IN, seed=8)
    heads_out = lambda weight: (x @ weight.T)[:, expand]  # noqa: E731
    expected = heads_out(v) @ given.linears["block.0"].weight.T
    actual = heads_out(producer.divided(v, producer.free(result.input_scale))) @ result.linears["block.0"].weight.T
    assert float((actual - expected).norm() / expected.norm()) < 0.2
    exact = given.rescaled(result.input_scale).linears["block.0"].source
    kept = heads_out(producer.divided(v, producer.free(result.input_scale))) @ exact.T
    assert torch.allclose(kept, expected, rtol=1e-4, atol=1e-3)


def test_without_a_producer_ranges_are_searched_and_the_reason_noted():
    x = inputs()
    given = group(6, why="no operation before it absorbs a scale of its input (tried act)")
    result = awq(given, gram(x), bits=3, group_size=SIZE)
    assert result.input_scale is None
    (state,) = result.linears.values()
    assert state.notes == (f"no scale search: {given.why}",)
    assert loss_of(given, result, x) < loss_of(given, by_rtn(given, bits=3), x)
    plain = awq(given, gram(x), bits=3, group_size=SIZE, clip=False).linears["block.0"].quantized
    assert torch.equal(plain.codes, by_rtn(given, bits=3).linears["block.0"].quantized.codes)


def test_row_parts_change_nothing(monkeypatch):
    given, statistic = group(9, 5, prune=True), gram(inputs())
    whole = awq(given, statistic, group_size=SIZE)
    monkeypatch.setattr("sparsekit.methods.awq.ROOM", 2 * IN)
    by_parts = awq(given, statistic, group_size=SIZE)
    assert torch.equal(whole.input_scale, by_parts.input_scale)
    for name, state in whole.linears.items():
        assert torch.equal(state.weight, by_parts.linears[name].weight)


def test_parameters_are_checked():
    method = METHODS.get("awq")
    assert (method.kind, method.scope, method.stats) == ("quantize", "group", Gram)
    assert method.source.startswith("Lin et al. 2023")
    with pytest.raises(ValueError, match="less than or equal to 8"):
        method.parameters(bits=9)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        method.parameters(grid=0)
    with pytest.raises(MethodError, match="group_size 5 does not divide the 32 inputs"):
        awq(group(4), gram(inputs()), group_size=5)
