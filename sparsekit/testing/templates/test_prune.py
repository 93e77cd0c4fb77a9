"""The promises every method makes, and a figure by hand."""

from pathlib import Path

import torch

import sparsekit as sk
from sparsekit.testing import check_method

PLUGIN = Path(__file__).with_name("given_name.py")


def test_contract():
    check_method("given_name", plugin=PLUGIN)


def test_by_hand():
    sk.METHODS.load_path(PLUGIN)
    prune = sk.METHODS.get("given_name").function
    layer = sk.LinearState("example", torch.tensor([[1.0, -4.0, 3.0, 2.0]]))
    x = sk.InputNorm.empty(4, torch.device("cpu"))
    x.update(torch.tensor([[8.0, 1.0, 1.0, 1.0]]))
    assert prune(layer, x).mask.tolist() == [[True, True, False, False]]  # scores 8, 4, 3, 2
