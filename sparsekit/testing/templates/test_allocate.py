"""The promises every method makes, and a figure by hand."""

from pathlib import Path

import pytest
import torch

import sparsekit as sk
from sparsekit.testing import check_method

PLUGIN = Path(__file__).with_name("given_name.py")


def test_contract():
    check_method("given_name", plugin=PLUGIN)


def test_by_hand():
    sk.METHODS.load_path(PLUGIN)
    allocate = sk.METHODS.get("given_name").function
    weight = torch.ones(2, 4)
    layers = [sk.Measured(sk.LinearState(name, weight), None, block, 0) for block, name in enumerate(("first", "last"))]
    assert allocate(layers, 0.5, spread=0.1) == {"first": pytest.approx(0.6), "last": pytest.approx(0.4)}
