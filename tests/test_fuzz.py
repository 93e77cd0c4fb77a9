"""Random and hostile bytes for the readers of files: an error by name, soon, and in bounded memory."""

from __future__ import annotations

import json
import math
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from sparsekit.errors import SparsekitError
from sparsekit.files import read_tensors
from sparsekit.formats import FORMATS, streams
from sparsekit.formats.base import Setting
from sparsekit.models.weights import _index
from sparsekit.quant import QuantizedWeight
from sparsekit.recipe import read_recipe

FEW = settings(max_examples=60, derandomize=True, deadline=5000, suppress_health_check=list(HealthCheck))
MOST_MEMORY = 64 * 2**20
WORDS = [
    "name", "model", "path", "steps", "method", "gptq", "wanda", "bits", "data", "evaluate", "&a", "*a", "!!x", "<<",
    "{", "}", "[", "]", ":", "- ", "\n", "  ", "2:4", "1e9", "~", "'", '"', "%", "|", ">", "#", "\t", "0x", ".inf",
]  # fmt: skip


def survives(read: Callable[[Path], Any], content: bytes, name: str) -> bool:
    """Whether a reader takes some content; it may refuse it by name and do nothing else."""
    with tempfile.TemporaryDirectory(prefix="sparsekit-fuzz-") as directory:
        path = Path(directory) / name
        path.write_bytes(content)
        tracemalloc.start()
        try:
            read(path)
        except SparsekitError as error:
            refusal = str(error)
        else:
            return True
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < MOST_MEMORY
    assert refusal
    return False


@FEW
@given(st.binary(max_size=400) | st.lists(st.sampled_from(WORDS), max_size=80).map(lambda w: "".join(w).encode()))
def test_recipes_of_any_bytes(content):
    survives(read_recipe, content, "recipe.yaml")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS[:10]), inner, max_size=4),
    max_leaves=12,
)


SECTIONS = ("name", "seed", "model", "data", "numerics", "evaluate", "export", "plugins")
KEYS = ("bits", "pattern", "group_size", "targets", "ignore", "schedule", "sparsity", "allocate")
STEP = st.fixed_dictionaries(
    {"method": st.sampled_from(["gptq", "wanda", "ast"]) | PLAIN}, optional=dict.fromkeys(KEYS, PLAIN)
)


@FEW
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(SECTIONS, PLAIN)), st.lists(STEP | PLAIN, max_size=3))
def test_recipes_of_any_structure(values, steps):
    content = yaml.safe_dump({"name": "n", "model": {"path": "m"}, **values, "steps": steps})
    survives(read_recipe, content.encode(), "recipe.yaml")


GOOD = save({"a.weight": torch.ones(4, 8), "b": torch.arange(6)}, {"format": "pt"})


def header(changes: Any) -> bytes:
    text = json.dumps(changes).encode()
    return len(text).to_bytes(8, "little") + text + GOOD[-176:]


ENTRY = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "I64", "BOOL", "F8_E4M3", "X", ""]),
    "shape": st.lists(st.sampled_from([0, 1, 4, 8, 2**31, 2**40, 2**63, -1]), max_size=4),
    "data_offsets": st.lists(st.sampled_from([0, 8, 128, 176, 2**40, 2**63, -8]), min_size=0, max_size=3),
})  # fmt: skip


@FEW
@given(st.one_of(
    st.dictionaries(st.sampled_from(["a.weight", "b", "__metadata__", "../x"]), ENTRY | PLAIN, max_size=3).map(header),
    st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)).map(
        lambda at: GOOD[: at[0]] + bytes([at[1]]) + GOOD[at[0] + 1 :]
    ),
    st.integers(0, len(GOOD)).map(lambda end: GOOD[:end]),
    st.integers(0, 2**64 - 1).map(lambda size: size.to_bytes(8, "little") + GOOD[8:]),
    st.binary(max_size=300),
))  # fmt: skip
def test_headers_that_lie(content):
    survives(read_tensors, content, "x.safetensors")
    survives(lambda path: _index(path.parent), content, "x.safetensors")


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8]), max_size=3)
DTYPES = st.sampled_from([torch.uint8, torch.int32, torch.float16, torch.float32, torch.bool])


@st.composite
def stored(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors of a 2:4 linear as nobody wrote them: of any shape, or of the right one and any bytes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    right = {"values": (8, draw(st.sampled_from([4, 6]))), "positions": (8, 2), "patterns": (8, 2), "scales": (8, 2),
             "zeros": (8, 1), "group_of": (16,)}  # fmt: skip
    found = {}
    for name in draw(st.sets(st.sampled_from(list(right)))):
        shape, dtype = right[name], {"scales": torch.float16, "group_of": torch.int32}.get(name, torch.uint8)
        if draw(st.integers(0, 3)) == 0:
            shape, dtype = tuple(draw(SHAPES)), draw(DTYPES)
        found[name] = torch.randint(0, draw(st.sampled_from([3, 216, 256])), shape, generator=generator).to(dtype)
        if name in ("positions", "patterns") and draw(st.booleans()):
            found[name] = torch.full(shape, {"positions": 0x44, "patterns": 5}[name]).to(dtype)
    return found


@settings(FEW, max_examples=150)
@given(
    stored(), st.sampled_from([-1, 8, 16, 7, 0]), st.booleans(), st.booleans(),
    st.sampled_from([("", "v1", 4), ("-compact", "integer", 4), ("-compact", "odd", 5), ("-compact", "six", 4),
                     ("-compact", "integer", 2)]),
)  # fmt: skip
def test_integers_of_any_bytes(found, group_size, symmetric, order, form):
    name, layout, bits = form
    storage = FORMATS[f"sparsekit-24{name}"].storage
    assert storage is not None
    try:
        weight = storage.unpack(found, Setting(bits, group_size, symmetric, order, layout))
        kept = storage.mask(found)
    except SparsekitError:
        return
    assert isinstance(weight, QuantizedWeight)
    assert torch.isfinite(weight.dequantize()).all()
    assert kept is not None
    assert not weight.dequantize()[~kept].any()


@settings(FEW, max_examples=80)
@given(
    stored(), st.sampled_from([-1, 8, 16, 7, 0]), st.booleans(), st.booleans(),
    st.sampled_from([("ternary", 2), ("odd", 3), ("six", 4), ("integer", 3), ("integer", 2)]),
)  # fmt: skip
def test_integers_of_any_bytes_without_a_pattern(found, group_size, symmetric, order, form):
    layout, bits = form
    storage = FORMATS["sparsekit-compact"].storage
    assert storage is not None
    try:
        weight = storage.unpack(found, Setting(bits, group_size, symmetric, order, layout))
    except SparsekitError:
        return
    assert torch.isfinite(weight.dequantize()).all()
    assert weight.codes.shape[1] % 16 == 0


@st.composite
def coded(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors of a coded linear with some bytes changed, cut off, or of another shape and kind."""
    right = {"values": (7, 8, 8), "patterns": (5, 8, 4), "scales": (60, 8, 2), "zeros": (7, 8, 2), "group_of": (1, 16)}
    found = {}
    for name, (highest, *shape) in right.items():
        numbers = torch.arange(math.prod(shape)).reshape(shape) % (highest + 1)
        good = torch.from_numpy(streams.written(numbers.to(torch.uint8).numpy())) if len(shape) == 2 else numbers.int()
        found[name] = torch.cat((good, good)) if name == "scales" else good
    found["values"] = torch.cat((torch.tensor([2], dtype=torch.uint8), found["values"]))
    for name in draw(st.sets(st.sampled_from(list(found)), max_size=3)):
        kind, place = draw(st.integers(0, 4)), draw(st.integers(0, len(found[name]) - 1))
        if kind == 0:
            found[name] = torch.zeros(draw(SHAPES), dtype=draw(DTYPES))
        elif kind == 1:
            del found[name]
        elif kind == 2:
            found[name] = found[name][:place]
        else:
            found[name] = found[name].clone()
            found[name][place] = draw(st.integers(0, 255))
    return found


@settings(FEW, max_examples=150)
@given(coded(), st.sampled_from([-1, 8, 16, 7, 0]), st.booleans(), st.booleans(), st.sampled_from([2, 3, 8]))
def test_coded_integers_of_any_bytes(found, group_size, symmetric, order, bits):
    storage = FORMATS["sparsekit-coded"].storage
    assert storage is not None
    tracemalloc.start()
    try:
        weight = storage.unpack(found, Setting(bits, group_size, symmetric, order, "v1"))
        kept = storage.mask(found)
    except SparsekitError:
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_MEMORY
    assert torch.isfinite(weight.dequantize()).all()
    assert int(weight.codes.max()) < 2**bits
    assert kept is None or not weight.dequantize()[~kept].any()


@FEW
@given(st.dictionaries(st.sampled_from(["quant_method", "version", "pattern", "bits", "group_size", "levels"]), PLAIN))
def test_quantization_settings_of_any_structure(about):
    for storage in (entry.storage for entry in FORMATS.values() if entry.storage is not None):
        try:
            setting = storage.setting(about)
        except SparsekitError:
            continue
        assert isinstance(setting, Setting)
