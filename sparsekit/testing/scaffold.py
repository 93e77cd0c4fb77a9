"""`sparsekit new-method`: a plugin file that works, and its test."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template
from typing import Literal

from sparsekit.errors import PluginError
from sparsekit.files import write_text
from sparsekit.registry import METHODS

Kind = Literal["prune", "quantize"]

PRUNE = Template('''\
"""$title: say here what it is and where it comes from."""

import sparsekit as sk


@sk.linear_method("$name", kind="prune", stats=sk.InputNorm)
def $name(layer: sk.LinearState, x: sk.InputNorm, /, *, pattern: sk.Pattern = sk.Pattern(2, 4)) -> sk.LinearState:
    """Keep the highest |weight| times input norm; replace the score by your own.

    Args:
        pattern: "N:M", or unstructured through `sparsity`.

    Source: your paper, its equation.
    """
    score = layer.source.abs() * x.norm  # [out, in], higher = more important
    return layer.masked(pattern.keep(score))
''')

QUANTIZE = Template('''\
"""$title: say here what it is and where it comes from."""

import sparsekit as sk
from sparsekit.quant import resolve_group_size


@sk.linear_method("$name", kind="quantize")
def $name(layer: sk.LinearState, /, *, bits: int = 4, group_size: int = 128) -> sk.LinearState:
    """Round to the nearest value of each group's grid; replace the grid or the codes by your own.

    Args:
        bits: Bits of a code, 2 to 8.
        group_size: Inputs that share a scale; -1 for one group a row.

    Source: your paper, its equation.
    """
    size = resolve_group_size(group_size, layer.weight.shape[1])
    grouped = layer.weight.reshape(len(layer.weight), -1, size)  # [out, groups, size]
    grid = sk.Grid.fit(grouped, bits)  # zero is on every grid, so pruned weights stay 0
    codes = grid.encode(grouped).reshape(layer.weight.shape)
    return layer.with_quantized(sk.QuantizedWeight.of(codes, grid, group_size=size, symmetric=True))
''')

TEST = Template('''\
"""The promises every method makes, and a figure by hand."""

from pathlib import Path

import torch

import sparsekit as sk
from sparsekit.testing import check_method

PLUGIN = Path(__file__).with_name("$name.py")


def test_contract():
    check_method("$name", plugin=PLUGIN)


def test_by_hand():
    sk.METHODS.load_path(PLUGIN)
    $name = sk.METHODS.get("$name").function
$body''')

PRUNE_BODY = """\
    layer = sk.LinearState("example", torch.tensor([[1.0, -4.0, 3.0, 2.0]]))
    x = sk.InputNorm.empty(4, torch.device("cpu"))
    x.update(torch.tensor([[8.0, 1.0, 1.0, 1.0]]))
    assert NAME(layer, x).mask.tolist() == [[True, True, False, False]]  # scores 8, 4, 3, 2
"""

QUANTIZE_BODY = """\
    layer = sk.LinearState("example", torch.tensor([[7.5, -7.5, 0.4, 0.0]]))
    result = NAME(layer, bits=4, group_size=4)  # levels -8..7, one step is 1
    assert result.quantized.codes.tolist() == [[15, 0, 8, 8]]
    assert result.weight.tolist() == [[7.0, -8.0, 0.0, 0.0]]
"""


def new_method(name: str, kind: Kind, directory: Path) -> tuple[Path, Path]:
    """Write `NAME.py` and `test_NAME.py`; existing files are never overwritten.

    Returns:
        The plugin and its test.
    Raises:
        PluginError: The name is taken or no lower-case identifier, or a file is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise PluginError(f"method name {name!r} must be lower case letters, digits and _, as in my_pruner")
    if name in METHODS.names():
        raise PluginError(f"there is a method {name!r} already, of {METHODS.get(name).origin}; choose another name")
    plugin, test = directory / f"{name}.py", directory / f"test_{name}.py"
    for path in (plugin, test):
        if path.exists():
            raise PluginError(f"{path} exists already; choose another name or --directory")
    title = name.replace("_", " ").capitalize()
    template, body = (PRUNE, PRUNE_BODY) if kind == "prune" else (QUANTIZE, QUANTIZE_BODY)
    write_text(plugin, template.substitute(name=name, title=title))
    write_text(test, TEST.substitute(name=name, body=body.replace("NAME", name)))
    return plugin, test
