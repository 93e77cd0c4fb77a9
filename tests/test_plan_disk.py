"""The bytes a plan foretells, held against those a run writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from sparsekit.cli import main
from sparsekit.listener import Silent
from sparsekit.models.shapes import sizes_of
from sparsekit.models.view import ModelView
from sparsekit.planning.disk_model import exports_bytes, step_bytes
from sparsekit.planning.estimate import Estimator
from sparsekit.planning.foreseen import TILE, Foreseen
from sparsekit.recipe import read_recipe
from sparsekit.run import Run

ASSETS = Path(__file__).parents[1] / "sparsekit" / "assets"
RECIPE = """\
name: disk
output: {base}/run
model: {{path: {model}, device: cpu}}
data:
  calibration: {{path: builtin:calibration, samples: 2, seq_len: 16}}
  train: {{path: builtin:train, samples: 4, seq_len: 16}}
steps: [{steps}]
export: {{formats: [{formats}]}}
"""
PRUNED = '{method: magnitude, pattern: "2:4"}'
AST = 'method: ast, pattern: "2:4", tokens: 64, batch: 2'
ANY = "dense, compressed-tensors, gptq, awq, sparsekit-24, sparsekit-24-compact, sparsekit-compact, sparsekit-coded"
UNPRUNED = "dense, compressed-tensors, gptq, awq, sparsekit-compact, sparsekit-coded"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small Llama with more outputs than a plan packs rows."""
    return saved(tmp_path_factory.mktemp("model"), torch.float32, tied=True)


def saved(directory: Path, dtype: torch.dtype, *, tied: bool) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=64, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "tiny" / name, directory / name)
    return directory


def written(base: Path, model: Path | str, steps: str, formats: str, head: str = "") -> Path:
    path = base / "recipe.yaml"
    path.write_text(head + RECIPE.format(base=base, model=model, steps=steps, formats=formats))
    return path


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def compared(path: Path) -> dict[str, tuple[int, int, str]]:
    """By export and by step: bytes foretold, bytes written, and the word before the former."""
    read = read_recipe(path)
    told = Estimator.open(read)
    sizes, steps = told.sizes, told.plan.steps
    exports, bounds = exports_bytes(Foreseen(told.view, steps), sizes, read.export.formats)
    run = Run.open(read, Silent())
    run.execute()
    found = {n: (exports[n], size(path.parent / "run/export" / n), bounds.get(n, "")) for n in exports}
    for index, planned in enumerate(run.plan.steps):
        foretold = step_bytes(Foreseen(told.view, steps[: index + 1]), sizes)
        found[planned.title] = foretold, size(path.parent / "run/steps" / planned.directory), ""
    return found


@pytest.mark.parametrize(
    ("steps", "formats"),
    [
        (f"{PRUNED}, {{method: rtn, bits: 4, group_size: 32}}", ANY),
        (f"{PRUNED}, {{method: gptq, bits: 4, group_size: 16, symmetric: false, act_order: dynamic}}", "gptq"),
        (f"{PRUNED}, {{method: rtn, bits: 3, group_size: -1}}", "gptq, sparsekit-24-compact, sparsekit-compact"),
        (f"{PRUNED}, {{method: rtn, bits: 2, group_size: 16}}", "gptq, sparsekit-24-compact, sparsekit-coded"),
        (f"{PRUNED}, {{method: rtn, bits: 8, group_size: 16}}", "gptq, compressed-tensors, sparsekit-coded"),
        ("{method: rtn, bits: 4, group_size: 16, symmetric: false}", UNPRUNED),
        ('{method: rtn, bits: 4, group_size: 16, ignore: ["*.down_proj"]}', "gptq, sparsekit-compact"),
        ("{method: gptq, bits: 3, group_size: 16, act_order: dynamic}", "gptq, sparsekit-compact, sparsekit-coded"),
        ('{method: magnitude, pattern: "1:4"}, {method: rtn, group_size: 16}', "sparsekit-24, sparsekit-coded"),
        ('{method: wanda, pattern: "4:8"}, {method: rtn, group_size: 16}', "awq, sparsekit-coded"),
        ("{method: sparsegpt, sparsity: 0.7}, {method: rtn, bits: 2, group_size: 16}", "gptq, sparsekit-compact"),
        (f"{{{AST}}}", "dense"),
        (f"{{{AST}, slorb: 16}}", "dense"),
        (f"{{{AST}, slorb: 16, slorb_projection: sum}}", "dense"),
        (f"{{{AST}, bits: 3, group_size: 16, levels: odd}}", "dense, gptq, sparsekit-24-compact, sparsekit-coded"),
        (f"{{{AST}, bits: 3, group_size: 16, levels: six}}", "dense, gptq, sparsekit-24-compact, sparsekit-coded"),
        (f"{{{AST}, bits: 2, group_size: 16, levels: ternary}}", "gptq, sparsekit-24-compact, sparsekit-compact"),
        ("{method: ast, sparsity: 0, tokens: 64, batch: 2, bits: 3, group_size: 16, levels: odd}", "sparsekit-compact"),
        ("{method: ast, sparsity: 0, tokens: 64, batch: 2, bits: 3, group_size: 16, levels: six}", "sparsekit-compact"),
        (f"{PRUNED}, {{method: lowrank, rank: 4, group_size: 16, bits: null}}", "dense"),
        (f"{PRUNED}, {{method: rtn, group_size: 16}}, {{method: lowrank, rank: 4, bits: 3}}", "gptq, sparsekit-24"),
    ],
)
def test_what_a_run_writes_is_foretold(tmp_path, model, steps, formats):
    check(compared(written(tmp_path, model, steps, formats)))


def test_of_untied_embeddings_in_half_precision(tmp_path):
    model = saved(tmp_path / "model", torch.float16, tied=False)
    steps = f"{PRUNED}, {{method: rtn, bits: 4, group_size: 16}}, {{method: lowrank, rank: 4, bits: 3}}"
    check(compared(written(tmp_path, model, steps, "dense, gptq, sparsekit-24-compact, sparsekit-coded")))


def check(found: dict[str, tuple[int, int, str]]) -> None:
    for name, (foretold, wrote, word) in found.items():
        low, high = (0.0, 0.1) if word == "at most" else (-0.005, 0.01)
        assert low * wrote <= foretold - wrote <= high * wrote, (name, foretold, wrote)
        assert word == ("at most" if name == "sparsekit-coded" else ""), name


def test_rows_are_enough_to_tell_all(model):
    shapes = {shape for block in sizes_of(ModelView.open(model, empty=True)).blocks for shape in block.linears.values()}
    assert max(out for out, _ in shapes) > 2 * TILE > min(out for out, _ in shapes)


PLUGIN = '''\
"""A format whose bytes depend on its integers, and a quantizer that does not say what levels it has."""

import torch

import sparsekit as sk
from sparsekit.quant import Grid, QuantizedWeight


def unpack(found, setting):
    grid = Grid.of_scale(found["scale"].float(), setting.bits)
    return QuantizedWeight.of(found["codes"], grid, group_size=setting.group_size, symmetric=True)


@sk.export_format("bytewise", unpack=unpack, parts={"codes": "codes", "scale": "scales"})
def pack(weight, mask):
    """A byte for each code."""
    return {"codes": weight.codes, "scale": weight.scale}


def unpack_loosely(found, setting):
    return unpack({**found, "codes": found["codes"][: found["scale"].shape[0]]}, setting)


@sk.export_format("loose", unpack=unpack_loosely, parts={"codes": "codes", "scale": "scales"})
def loose(weight, mask):
    """Codes, and a row more for every level there is."""
    levels = len(weight.codes.unique())
    return {"codes": torch.cat((weight.codes, weight.codes[:1].expand(levels, -1))), "scale": weight.scale}


@sk.linear_method("odd_ones", kind="quantize")
def odd_ones(state, /, *, bits: int = 4, group_size: int = 16):
    """Rounds to one step above or below zero."""
    scale = state.weight.abs().amax(1, keepdim=True).clamp(min=1e-3).expand(-1, state.weight.shape[1] // group_size)
    codes = torch.where(state.weight >= 0, 2 ** (bits - 1) + 1, 2 ** (bits - 1) - 1)
    return state.with_quantized(
        QuantizedWeight.of(codes, Grid.of_scale(scale, bits), group_size=group_size, symmetric=True)
    )
'''


def test_formats_and_quantizers_of_plugins(tmp_path, model):
    (tmp_path / "brought.py").write_text(PLUGIN)
    head = "plugins: [brought.py]\n"
    step = "{method: rtn, bits: 4, group_size: 16}"
    found = compared(written(tmp_path, model, step, "bytewise, loose", head))
    assert found["bytewise"][0] == pytest.approx(found["bytewise"][1], rel=0.01)
    assert [found[name][2] for name in ("bytewise", "loose")] == ["", "at most"]
    assert found["loose"][0] >= found["loose"][1] * 0.997
    shutil.rmtree(tmp_path / "run")
    found = compared(written(tmp_path, model, "{method: odd_ones}", "gptq, sparsekit-compact", head))
    assert [found[name][2] for name in ("gptq", "sparsekit-compact")] == ["about", "about"]
    assert found["gptq"][0] == pytest.approx(found["gptq"][1], rel=0.01)
    assert found["sparsekit-compact"][0] > found["sparsekit-compact"][1]  # 4 bits may be any, and are six levels


def test_exports_of_a_quantized_model_are_about(tmp_path, model):
    compared(written(tmp_path, model, "{method: rtn, bits: 4, group_size: 16}", "gptq"))
    other = tmp_path / "other"
    other.mkdir()
    found = compared(written(other, tmp_path / "run/export/gptq", "", "dense, gptq, sparsekit-compact"))
    for name, (foretold, wrote, word) in found.items():
        assert word == "about", name
        assert foretold == pytest.approx(wrote, rel=0.02), name


def test_the_table_says_how_well_bytes_are_known(tmp_path, random_model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    path = written(tmp_path, random_model, "{method: rtn, group_size: 16}", "gptq, sparsekit-coded")
    lines = CliRunner().invoke(main, ["plan", str(path)]).output.splitlines()
    exports = [line for line in lines if line.strip().startswith("export ")]
    assert ["at most" in line for line in exports] == [False, True], lines
    assert any(line.startswith("note: export sparsekit-coded takes at most so many bytes") for line in lines)


def test_tokens_that_a_run_keeps_are_counted(tmp_path, random_model):
    path = written(tmp_path, random_model, f"{{{AST}}}", "dense")
    told = Estimator.open(read_recipe(path)).all()
    Run.open(read_recipe(path), Silent()).execute()
    assert told["tokens"] == pytest.approx(size(tmp_path / "run/tokens"), rel=0.1)
    assert told["disk"] == told["tokens"] + told["exports"]["dense"] + told["steps"][0]["disk"]
