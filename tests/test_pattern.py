"""Patterns: parsing, exact counts, ties, and the verifier with its control."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from sparsekit.errors import MethodError
from sparsekit.pattern import Pattern


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2:4", Pattern(2, 4)),
        (" 4 : 8 ", Pattern(4, 8)),
        ("unstructured 0.5", Pattern.unstructured(0.5)),
        ("unstructured 0", Pattern.unstructured(0.0)),
        (Pattern(1, 2), Pattern(1, 2)),
    ],
)
def test_parse(text, expected):
    assert Pattern.parse(text) == expected
    assert Pattern.parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (124, 'write pattern: "2:4"'),  # what YAML 1.1 makes of an unquoted 2:4
        (5, "is a number"),
        (True, "is not text"),
        (0.5, "is not text"),
        ("4:2", "1 <= N < M"),
        ("0:4", "1 <= N < M"),
        ("4:4", "1 <= N < M"),
        ("50%", "is not understood"),
        ("unstructured 1.5", "not a fraction"),
    ],
)
def test_what_is_no_pattern_is_explained(text, message):
    with pytest.raises(ValueError, match=message):
        Pattern.parse(text)


def test_sparsity_is_derived_and_checked():
    assert Pattern(2, 4).sparsity == 0.5
    assert Pattern(1, 4).sparsity == 0.75  # N is what is kept
    assert Pattern(2, 4, 0.5) == Pattern(2, 4)
    with pytest.raises(ValueError, match=r"has sparsity 0\.5, not 0\.25"):
        Pattern(2, 4, 0.25)


def test_recipe_form():
    class Model(BaseModel):
        pattern: Pattern

    assert Model(pattern="4:8").pattern == Pattern(4, 8)
    assert Model(pattern="4:8").model_dump(mode="json") == {"pattern": "4:8"}
    assert Model.model_json_schema()["properties"]["pattern"]["type"] == "string"
    with pytest.raises(ValidationError, match="1 <= N < M"):
        Model(pattern="8:4")


def test_describe():
    assert Pattern(2, 4).describe() == "2:4 = keep 2 of 4, sparsity 0.50"
    assert Pattern.unstructured(0.7).describe() == "unstructured, sparsity 0.70"


def by_definition(score, n, m):
    """The mask, by sorting each group: highest first, equal ones by index."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    for row in range(score.shape[0]):
        for start in range(0, score.shape[1], m):
            order = sorted(range(start, start + m), key=lambda j: (-float(score[row, j]), j))
            mask[row, order[:n]] = True
    return mask


@given(st.integers(2, 16), st.data())
@settings(max_examples=40, deadline=None)
def test_keep_is_the_definition_whatever_the_ties(m, data):
    n = data.draw(st.integers(1, m - 1))
    values = data.draw(st.lists(st.integers(-2, 2), min_size=6 * m, max_size=6 * m))
    score = torch.tensor(values, dtype=torch.float32).reshape(2, 3 * m)
    mask = Pattern(n, m).keep(score)
    assert torch.equal(mask, by_definition(score, n, m))


def test_ties_keep_the_lowest_index():
    assert Pattern(2, 4).keep(torch.zeros(1, 8)).tolist() == [[True, True, False, False] * 2]
    assert Pattern.unstructured(0.5).keep(torch.zeros(2, 4)).tolist() == [[True, True, False, False]] * 2
    assert Pattern.unstructured(0.5).keep(torch.zeros(2, 4), per="layer").tolist() == [[True] * 4, [False] * 4]


@given(st.floats(0, 1), st.integers(1, 7), st.integers(1, 40), st.sampled_from(["row", "layer"]))
@settings(max_examples=60, deadline=None)
def test_unstructured_counts_are_exact(sparsity, rows, columns, per):
    score = torch.randint(0, 3, (rows, columns), generator=torch.Generator().manual_seed(0)).bfloat16()
    pruned = ~Pattern.unstructured(sparsity).keep(score, per=per)
    if per == "row":
        assert (pruned.sum(1) == int(sparsity * columns)).all()
    else:
        assert int(pruned.sum()) == int(sparsity * (rows * columns))


def test_scores_that_are_nan_and_misfits_are_rejected():
    with pytest.raises(MethodError, match="NaN"):
        Pattern(2, 4).keep(torch.tensor([[1.0, float("nan"), 0.0, 2.0]]))
    with pytest.raises(MethodError, match="6 inputs do not divide into groups of 4"):
        Pattern(2, 4).keep(torch.ones(1, 6))
    assert Pattern(2, 4).keep(torch.tensor([[1.0, float("inf"), 0.0, 2.0]])).tolist() == [[False, True, False, True]]


def test_violations_are_counted_along_the_inputs():
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    mask = Pattern(2, 4).keep(weight.abs())
    assert Pattern(2, 4).violations(mask) == 0
    assert Pattern(2, 4).violations(weight.masked_fill(~mask, 0.0)) == 0
    mask[3, 4:8] = True
    assert Pattern(2, 4).violations(mask) == 1
    assert Pattern(2, 4).groups(weight) == 16
    assert Pattern.unstructured(0.5).violations(weight) == 0
    assert Pattern.unstructured(0.5).groups(weight) == 0


def test_control_mask_along_the_wrong_axis_is_caught():
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    across = Pattern(2, 4).keep(weight.abs().t()).t()
    assert Pattern(2, 4).violations(across) > 0
    assert Pattern(2, 4).violations(across.t()) == 0
