"""Magnitude, Wanda and RTN against their definitions in plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from sparsekit.methods.magnitude import magnitude
from sparsekit.methods.rtn import rtn
from sparsekit.methods.wanda import wanda
from sparsekit.pattern import Pattern
from sparsekit.registry import METHODS
from sparsekit.state import LinearState
from sparsekit.stats import InputNorm
from sparsekit.verify import verified

CPU = torch.device("cpu")
HALF = Pattern.unstructured(0.5)


def layer(rows=12, columns=32, ties=False):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    return LinearState("block.linear", weight.round() if ties else weight)


def norm_of(x):
    norm = InputNorm.empty(x.shape[1], CPU)
    norm.update(x)
    return norm


def inputs(columns=32, ties=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, columns, generator=generator) * (1 + 3 * torch.rand(columns, generator=generator))
    return x.sign() if ties else x


def dropped(scores, count):
    """Indices of the `count` lowest, equal ones from the right."""
    return sorted(range(len(scores)), key=lambda j: (scores[j], -j))[:count]


def wanda_by_definition(weight, x, pattern):
    norm = [math.sqrt(sum(float(v) ** 2 for v in x[:, j]) / len(x)) for j in range(x.shape[1])]
    mask = torch.ones_like(weight, dtype=torch.bool)
    for row in range(len(weight)):
        score = [abs(float(weight[row, j])) * norm[j] for j in range(weight.shape[1])]
        if pattern.structured:
            for start in range(0, len(score), pattern.m):
                group = score[start : start + pattern.m]
                mask[row, [start + j for j in dropped(group, pattern.m - pattern.n)]] = False
        else:
            mask[row, dropped(score, int(pattern.sparsity * len(score)))] = False
    return mask


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8), Pattern(1, 4), HALF], ids=str)
def test_wanda_by_definition(pattern, ties):
    given, x = layer(ties=ties), inputs(ties=ties)
    pruned = wanda(given, norm_of(x), pattern=pattern)
    assert torch.equal(pruned.mask, wanda_by_definition(given.source, x, pattern))
    assert torch.equal(pruned.source, given.source)  # what GPTQ will start from
    assert torch.equal(pruned.weight, given.source.masked_fill(~pruned.mask, 0.0))
    verified(given, pruned, kind="prune", pattern=pattern)


def test_wanda_is_invariant_to_a_scale_that_the_producer_absorbs():
    given, x = layer(), inputs()
    scale = torch.rand(32, generator=torch.Generator().manual_seed(2)) + 0.5
    moved = LinearState("moved", given.source * scale)
    assert torch.equal(wanda(given, norm_of(x)).mask, wanda(moved, norm_of(x / scale)).mask)


@pytest.mark.parametrize("per", ["row", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 1.0])
def test_magnitude_counts_are_exact_with_ties(sparsity, per):
    given = layer(ties=True)
    pruned = magnitude(given, pattern=Pattern.unstructured(sparsity), per=per)
    zeros = ~pruned.mask
    if per == "row":
        assert (zeros.sum(1) == int(sparsity * 32)).all()
        kept = [given.source[i].abs()[pruned.mask[i]].min() >= given.source[i].abs()[zeros[i]].max()
                for i in range(12) if zeros[i].any() and pruned.mask[i].any()]  # fmt: skip
        assert all(kept)
    else:
        assert int(zeros.sum()) == int(sparsity * 384)
        expected = dropped(given.source.abs().flatten().tolist(), int(sparsity * 384))
        assert sorted(zeros.flatten().nonzero().flatten().tolist()) == sorted(expected)


def test_magnitude_is_wanda_on_equal_inputs():
    given = layer()
    assert torch.equal(magnitude(given, pattern=Pattern(2, 4)).mask, wanda(given, norm_of(torch.ones(5, 32))).mask)


def test_no_pruning_is_bit_identical():
    given, nothing = layer(), Pattern.unstructured(0.0)
    assert torch.equal(magnitude(given, pattern=nothing).weight, given.source)
    assert torch.equal(wanda(given, norm_of(inputs()), pattern=nothing).weight, given.source)


@pytest.mark.parametrize("group_size", [8, 32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rtn_by_definition(bits, group_size):
    given = layer()
    size = 32 if group_size == -1 else group_size
    result = rtn(given, bits=bits, group_size=group_size)
    for row in range(12):
        for start in range(0, 32, size):
            group = given.source[row, start : start + size]
            scale = (2 * group.abs().max() / (2**bits - 1)).half().float()
            codes = torch.clamp(torch.round(group / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            assert torch.equal(result.weight[row, start : start + size], codes * scale + 0.0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("mse", [True, False])
def test_rtn_keeps_pruned_entries_exactly_zero(symmetric, mse):
    pruned = magnitude(layer(), pattern=Pattern(2, 4))
    result = rtn(pruned, group_size=16, symmetric=symmetric, mse=mse)
    record = verified(pruned, result, kind="quantize", pattern=Pattern(2, 4))
    assert (record.violations, record.bits) == (0, 4)
    assert not torch.signbit(result.weight[~pruned.mask]).any()


def test_parameters_are_the_recipe_schema():
    for name, parameters in {
        "magnitude": {"pattern", "per"},
        "wanda": {"pattern"},
        "sparsegpt": {"pattern", "damp", "block_size", "group_order", "bits", "group_size", "symmetric", "mse"},
        "rtn": {"bits", "group_size", "symmetric", "mse"},
        "gptq": {"bits", "group_size", "symmetric", "act_order", "mse", "damp"},
    }.items():
        method = METHODS.get(name)
        assert set(method.parameters.model_fields) == parameters
        assert method.source
        for field in method.parameters.model_fields.values():
            assert field.description
