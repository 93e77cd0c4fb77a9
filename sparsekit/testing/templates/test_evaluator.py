"""The promises every evaluator makes, and a figure by hand."""

from pathlib import Path

import pytest
import torch

import sparsekit as sk
from sparsekit.evaluation.measures import EVALUATORS
from sparsekit.testing import check_evaluator

PLUGIN = Path(__file__).with_name("given_name.py")


def test_contract():
    check_evaluator("given_name", plugin=PLUGIN)


def test_by_hand():
    sk.METHODS.load_path(PLUGIN)
    measure = EVALUATORS["given_name"].function
    found = measure(lambda tokens: torch.zeros(*tokens.shape, 10), torch.zeros(2, 5, dtype=torch.int32), top=3)
    assert found == {"probability": pytest.approx(0.3)}  # 3 of 10 equal ones
