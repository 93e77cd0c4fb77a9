"""Methods keep to the device they are given, and the drivers give them one: with a second device that is none."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from elsewhere import THERE, elsewhere

import sparsekit.blockwise.allotment as allotment
from sparsekit.allocate import Allocate
from sparsekit.branch import Branch
from sparsekit.checkpoint import BlockState
from sparsekit.errors import ContractError
from sparsekit.interchange.adapter import branches_of, write_adapter
from sparsekit.methods.lowrank import integers
from sparsekit.registry import METHODS
from sparsekit.state import LinearState
from sparsekit.testing import Subject
from sparsekit.testing.specimens import CPU, arguments_of, specimen
from sparsekit.testing.wholes import _allotted, same_elsewhere

PLUGINS = Path(__file__).parents[1] / "plugins"
ERK = PLUGINS / "sparsekit-erk/src/sparsekit_erk/__init__.py"
BUILT_IN = [(None, name) for name in ("magnitude", "wanda", "sparsegpt", "rtn", "gptq", "awq")]
FROM_FILES = [
    ("ria", "ria"),
    ("random_nm", "random_nm"),
    ("dsnot", "dsnot"),
    ("alps", "alps"),
    ("alps", "pcg"),
    ("alps", "alps_aimed"),
]
QUICK = {"alps": {"iterations": 6}, "alps_aimed": {"iterations": 6}, "awq": {"grid": 3}}


def subject(name, file=None):
    if file is not None:
        METHODS.load_path(PLUGINS / f"{file}.py" if isinstance(file, str) else file)
    method = METHODS.get(name)
    return Subject(method, arguments_of(method, QUICK.get(name, {})))


@pytest.mark.parametrize(("file", "name"), BUILT_IN + FROM_FILES, ids=lambda value: value)
def test_methods_stay_where_their_input_is(file, name):
    tried = subject(name, file)
    here = tried.apply(specimen(tried.method, rows=4))
    with elsewhere():
        there = tried.apply(specimen(tried.method, rows=4, device=THERE))
        for key, state in here.items():
            assert there[key].weight.device == THERE
            assert torch.equal(there[key].weight.cpu(), state.weight)


@pytest.mark.parametrize("astray", [lambda norm: norm.cpu(), lambda norm: torch.ones(norm.shape)], ids=["sent", "made"])
def test_a_method_that_leaves_its_device_is_caught(astray):
    wanda = METHODS.get("wanda")

    def strays(layer, x, /, *, pattern):
        return layer.masked(pattern.keep(layer.source.abs() * astray(x.norm)))

    tried = Subject(replace(wanda, function=strays), arguments_of(wanda, {}))
    with elsewhere():
        given = specimen(wanda, device=THERE)
        with pytest.raises(ContractError, match="same device"):
            tried.apply(given)


@pytest.mark.parametrize(("file", "name"), [("owl", "owl"), (ERK, "erk")], ids=["owl", "erk"])
def test_allocations_agree_elsewhere(file, name):
    tried = subject(name, file)
    here = _allotted(tried, 0.5, CPU)
    with elsewhere():
        same_elsewhere(tried, 0.5, here, THERE)


class Stream:
    """Calibration whose statistics are on the second device."""

    def __init__(self, kind):
        self.kind = kind

    def sample(self, index):
        return ()

    def collect(self, index, groups, kind):
        found = [kind.empty(8, THERE) for _ in groups]
        for statistic in found:
            statistic.update(torch.rand(16, 8, generator=torch.Generator().manual_seed(index)).to(THERE))
        return found

    def advance(self, index):
        pass


def test_an_allocation_is_given_weights_where_the_statistics_are(monkeypatch):
    METHODS.load_path(PLUGINS / "owl.py")
    allocate = Allocate.parse("owl")
    names = [["0.a", "0.b"], ["1.a", "1.b"]]
    weights = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    view = SimpleNamespace(blocks=names, device=THERE, groups=lambda index, *sample: [names[index]])
    monkeypatch.setattr(allotment, "resident", lambda *given: nullcontext())
    monkeypatch.setattr(allotment.Activations, "begin", lambda view, tokens, holding: Stream(allocate.method.stats))

    def block(index):  # as a step's file or the model's are read: on the host
        return BlockState({name: LinearState(name, weights[index]) for name in names[index]}, {})

    every = frozenset(name for block in names for name in block)
    with elsewhere():
        shares = allotment.Allotment(view, allocate, every, block, torch.zeros(1, 4), 0.5).work()
    assert sum(shares.values()) / 4 == pytest.approx(0.5)


@pytest.mark.parametrize("small", [True, False], ids=["integers", "floats"])
def test_an_adapter_is_written_of_branches_that_are_elsewhere(small, tmp_path):
    factors = [torch.randn(2, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    branch = Branch.of_integers(*(integers(factor, 4, 8) for factor in factors))
    state = LinearState("0.a", torch.zeros(16, 16)).with_branch(branch)
    with elsewhere():
        there = BlockState({"0.a": replace(state, source=state.source.to(THERE), branch=branch.to(THERE))}, {})
        found = branches_of(lambda index: there, lambda name: "same", 1, opened=not small)
        written = write_adapter(tmp_path, found, torch.bfloat16, integers=small)
    assert written > 0  # and read back, where it is integers
