"""The promises every export format makes, and a size by hand."""

from pathlib import Path

import torch

import sparsekit as sk
from sparsekit.formats import FORMATS
from sparsekit.testing import check_format

PLUGIN = Path(__file__).with_name("given_name.py")


def test_contract():
    check_format("given_name", plugin=PLUGIN)


def test_by_hand():
    sk.METHODS.load_path(PLUGIN)
    values = torch.tensor([[7.0, -8.0, 1.0, 0.0]])
    grid = sk.Grid.fit(values.unsqueeze(1), 4)
    weight = sk.QuantizedWeight.of(grid.encode(values.unsqueeze(1)).view(1, 4), grid, group_size=4, symmetric=True)
    codes = FORMATS["given_name"].storage.pack(weight, "v1")["codes"]
    assert codes.nbytes == 4  # a byte a code
