import torch

import sparsekit as sk
from sparsekit.testing import check_method


def layer(name, rows, columns):
    return sk.Measured(sk.LinearState(name, torch.zeros(rows, columns)), None, 0, 0)


def test_contract():
    check_method("erk")


def test_by_hand():
    erk = sk.METHODS.get("erk").function
    shares = erk(iter([layer("a", 10, 10), layer("b", 10, 30)]), 0.5)
    # densities e · 20/100 and e · 40/300 with 100 · 20/100 e + 300 · 40/300 e = 200
    assert abs(shares["a"] - (1 - 200 / 60 * 0.2)) < 1e-9
    assert abs(shares["b"] - (1 - 200 / 60 * 40 / 300)) < 1e-9


def test_a_full_layer_leaves_its_share_to_the_others():
    erk = sk.METHODS.get("erk").function
    shares = erk(iter([layer("a", 2, 2), layer("b", 20, 20)]), 0.5)
    assert shares["a"] == 0.0
    assert abs(shares["b"] - (1 - (202 - 4) / 400)) < 1e-9
