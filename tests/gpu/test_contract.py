"""CPU and CUDA agree for every linear and group method, built in or a plugin."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsekit.registry import METHODS
from sparsekit.testing import Subject, devices
from sparsekit.testing.specimens import arguments_of

pytestmark = pytest.mark.gpu
PLUGINS = Path(__file__).parents[2] / "plugins"
LINEAR = ("magnitude", "wanda", "sparsegpt", "rtn", "gptq", "awq")


@pytest.mark.parametrize("name", LINEAR)
def test_built_in_methods_agree(name):
    method = METHODS.get(name)
    devices(Subject(method, arguments_of(method, {})))


@pytest.mark.parametrize(
    ("file", "name"),
    [("ria", "ria"), ("random_nm", "random_nm"), ("dsnot", "dsnot"), ("alps", "alps"), ("alps", "pcg")],
)
def test_plugins_agree(file, name):
    METHODS.load_path(PLUGINS / f"{file}.py")
    method = METHODS.get(name)
    devices(Subject(method, arguments_of(method, {})))
