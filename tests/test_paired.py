"""Paired tests against textbook values and simulation."""

from __future__ import annotations

import math
import random

import pytest

from sparsekit.evaluation.paired import perplexity_change, sign_p, sign_test, student_t, task_tests

T_TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 10: 2.228, 30: 2.042, 120: 1.980}  # 95 %, any statistics book


@pytest.mark.parametrize(("freedom", "expected"), T_TABLE.items())
def test_student_t(freedom, expected):
    assert student_t(0.95, freedom) == pytest.approx(expected, abs=5e-4)


def score(losses: list[float]) -> dict:
    return {"perplexity": math.exp(sum(losses) / len(losses)), "window_losses": losses}


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, truth, held = random.Random(0), 0.03, 0
    for _ in range(400):
        hard = [rng.gauss(3, 0.5) for _ in range(12)]
        after = [loss + rng.gauss(truth, 0.02) for loss in hard]
        change = perplexity_change(score(hard), score(after))
        held += change.low <= math.expm1(truth) <= change.high
    assert 0.92 < held / 400 < 0.975


def test_pairing_is_what_makes_it_narrow():
    hard = [1.0, 5.0, 2.0, 4.0]
    change = perplexity_change(score(hard), score([loss + 0.1 + 0.001 * i for i, loss in enumerate(hard)]))
    assert change.certain
    assert change.high - change.low < 0.01


def test_what_cannot_be_paired_has_no_interval():
    change = perplexity_change(score([1.0, 2.0]), score([1.0, 2.0, 3.0]))
    assert (change.low, change.high, change.certain) == (None, None, False)


def test_sign_test_is_the_exact_binomial():
    assert sign_p(0, 0) == 1.0
    assert sign_p(0, 5) == 2 / 32
    assert sign_p(1, 9) == pytest.approx(2 * (1 + 10) / 1024)
    assert sign_p(5, 5) == 1.0
    assert sign_p(2500, 2300) == pytest.approx(0.0040, abs=2e-4)  # normal with continuity correction: 0.00407
    found = sign_test([1, 1, 0, 0, 1], [0, 1, 1, 0, 0])
    assert (found.lost, found.won) == (2, 1)


def test_groups_pool_the_documents_of_their_tasks():
    def scores(a, b):
        return {
            "blimp": {"acc": 0.5, "documents": {"n": 4, "tasks": ["a", "b"]}},
            "a": {"acc": 0.5, "documents": {"n": 2, "correct": {"acc": a}}},
            "b": {"acc": 0.5, "documents": {"n": 2, "correct": {"acc": b}}},
        }

    found = task_tests(scores([1, 1], [1, 0]), scores([0, 1], [0, 1]))
    assert found["blimp"]["acc"] == {"lost": 2, "won": 1, "p": 1.0}
    assert found["a"]["acc"]["lost"] == 1
