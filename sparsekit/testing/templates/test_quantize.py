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
    quantize = sk.METHODS.get("given_name").function
    layer = sk.LinearState("example", torch.tensor([[7.5, -7.5, 0.4, 0.0]]))
    result = quantize(layer, bits=4, group_size=4)  # levels -8..7, one step is 1
    assert result.quantized.codes.tolist() == [[15, 0, 8, 8]]
    assert result.weight.tolist() == [[7.0, -8.0, 0.0, 0.0]]
