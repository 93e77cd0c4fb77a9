"""SparseGPT with bits: a mask and integers in one sweep, and what a recipe may do with it."""

from __future__ import annotations

import json

import brute
import pytest
import torch
from click.testing import CliRunner
from layers import gram_of, inputs, layer

from sparsekit.blockwise.stacking import joined, pieces
from sparsekit.cli import main
from sparsekit.errors import MethodError, RecipeError
from sparsekit.methods.sparsegpt import sparsegpt
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid
from sparsekit.recipe import read_recipe
from sparsekit.testing import check_method
from sparsekit.verify import relative_error, verified

PATTERNS = [Pattern(2, 4), Pattern(4, 8), Pattern(1, 2), Pattern.unstructured(0.6)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_order", ["natural", "descending"])
@pytest.mark.parametrize(("bits", "group"), [(2, 8), (4, 16), (4, 32)])
def test_by_the_book(bits, group, group_order, symmetric):
    given, x = layer(rows=6, columns=32), inputs(tokens=96, columns=32)
    found = sparsegpt(given, gram_of(x), group_order=group_order, bits=bits, group_size=group, symmetric=symmetric)
    weight, columns = given.source.double(), torch.arange(32)
    gram = x.double().t() @ x.double() / len(x)
    gram += 0.01 * gram.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    if group_order == "descending":
        energy = gram.diagonal().reshape(-1, 4).sum(1).argsort(descending=True, stable=True)
        columns = (4 * energy[:, None] + torch.arange(4)).flatten()
    grid = Grid.fit(weight.float().reshape(6, -1, group), bits, symmetric=symmetric)
    grids = [each.double().repeat_interleave(group, dim=1)[:, columns] for each in (grid.scale, grid.zero)]
    moved, both = weight[:, columns], gram[columns][:, columns]
    result, keep, codes = brute.surgery(moved, both, pattern=Pattern(2, 4), bits=bits, grids=grids)
    assert torch.equal(found.mask[:, columns], keep)
    assert torch.equal(found.quantized.codes[:, columns].double(), codes)
    torch.testing.assert_close(found.weight[:, columns].double(), result)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"mse": True}, {"group_order": "natural"}], ids=str)
def test_mask_and_integers_agree_and_are_proven(pattern, options):
    given, gram = layer(), gram_of(inputs())
    found = sparsegpt(given, gram, pattern=pattern, bits=3, group_size=32, **options)
    record = verified(given, found, kind="prune", pattern=pattern, integers=True, statistic=gram)
    integers = found.quantized
    assert (record.bits, record.violations) == (3, 0)
    zero = integers.zero[:, integers.group_of.long()]
    assert torch.equal(integers.codes[~found.mask], zero[~found.mask])
    assert not found.weight[~found.mask].any()
    assert not torch.signbit(found.weight[~found.mask]).any()
    assert torch.equal(found.weight, integers.dequantize())
    assert int((~found.mask).sum()) == int(pattern.sparsity * given.source.numel())


def test_many_bits_are_no_bits():
    """8 bits on a grid that holds everything: the error is that of pruning alone, up to the grid."""
    given, gram = layer(), gram_of(inputs())
    plain = relative_error(given.source, sparsegpt(given, gram).weight, gram)[0]
    fine = relative_error(given.source, sparsegpt(given, gram, bits=8, group_size=-1).weight, gram)[0]
    coarse = relative_error(given.source, sparsegpt(given, gram, bits=2, group_size=64).weight, gram)[0]
    assert fine < 1.1 * plain < coarse


def test_nothing_pruned_is_gptq():
    from sparsekit.methods.gptq import gptq

    given, gram = layer(), gram_of(inputs())
    ours = sparsegpt(given, gram, pattern=Pattern.unstructured(0.0), bits=4, group_size=16)
    theirs = gptq(given, gram, bits=4, group_size=16, act_order="none")
    rtol = relative_error(theirs.weight, ours.weight, gram)[0]
    assert ours.mask.all()
    assert rtol < 0.05  # their grids are fitted on the way, ours beforehand


def test_rows_in_pieces_are_the_whole():
    given, gram = layer(), gram_of(inputs())
    options = {"bits": 4, "group_size": 16}
    whole = sparsegpt(given, gram, **options)
    parts = joined(given, [sparsegpt(part, gram, **options) for part in pieces(given, 5 * 64)])
    assert torch.equal(parts.mask, whole.mask)
    assert parts.quantized.equal(whole.quantized)


def test_no_integers_where_bits_were_asked_for_are_an_error():
    given, gram = layer(), gram_of(inputs())
    with pytest.raises(MethodError, match="asked for bits returned no integers"):
        verified(given, sparsegpt(given, gram), kind="prune", pattern=Pattern(2, 4), integers=True)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_contract_is_kept(bits):
    check_method("sparsegpt", arguments={"bits": bits})


RECIPE = """\
name: joint
output: {output}
model: {{path: {model}}}
data:
  calibration: {{path: builtin:calibration, samples: 4, seq_len: 32}}
  train: {{path: builtin:train, seq_len: 32, samples: 64}}
  evaluation: {{heldout: {{path: builtin:heldout, seq_len: 32, samples: 8}}}}
steps: [{steps}]
evaluate: {{perplexity: [heldout]{gates}}}
export: {{formats: [{formats}]}}
"""
JOINT = '{method: sparsegpt, pattern: "2:4", bits: 4, group_size: 64}'
REDO = ", gates: {max_ppl_increase: 5%, redo: {bits: 8}}"


def written(tmp_path, steps, formats="", gates="", model="builtin:tiny"):
    path = tmp_path / "joint.yaml"
    path.write_text(RECIPE.format(output=tmp_path / "run", model=model, steps=steps, formats=formats, gates=gates))
    return path


@pytest.mark.parametrize(
    ("steps", "formats", "gates", "message"),
    [
        (f"{JOINT}, {{method: gptq}}", "", "", r"joint.yaml:8: step 2 \(gptq\) quantizes what step 1"),
        (f"{JOINT}, {{method: wanda}}", "", "", r"joint.yaml:8: step 2 \(wanda\) prunes weights that step 1"),
        (f"{JOINT}, {{method: ast, tokens: 1K}}", "", "", r"joint.yaml:8: step 2 \(ast\) trains weights that step 1"),
        (f"{{method: rtn}}, {JOINT}", "", "", r"joint.yaml:8: step 2 \(sparsegpt\) quantizes what step 1"),
        (JOINT.replace(", bits: 4", ""), "", "", "joint.yaml:8: group_size belongs to the grid, and without bits"),
        (JOINT.replace("64}", "6}"), "", "", r"joint.yaml:8: group_size 6 is no multiple of 4 \(pattern 2:4\)"),
        (JOINT.replace("4, group", "9, group"), "", "", "joint.yaml:8: bits is 9, expected at most 8"),
        (JOINT.replace("4, group", "5, group"), "sparsekit-24", "", r"those of step 1 \(sparsegpt\) have 5"),
        ("{method: sparsegpt}", "gptq", "", "no step quantizes"),
        ("{method: sparsegpt}", "", REDO, r"sparsegpt\) has no bits; leave them out"),
        (JOINT.replace("4, group", "8, group"), "", REDO, "bits 8 is no higher precision"),
    ],
)
def test_a_step_with_bits_is_the_quantizer(tmp_path, steps, formats, gates, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(written(tmp_path, steps, formats, gates))


def test_what_a_plan_tells_is_what_a_run_leaves(tmp_path):
    path = written(tmp_path, JOINT, "gptq, sparsekit-24")
    found = CliRunner().invoke(main, ["plan", str(path), "--json"])
    assert found.exit_code == 0, found.output
    plan = json.loads(found.output)
    assert all(layer["steps"] == ["sparsegpt 2:4 4 bits"] for layer in plan["layers"])
    found = CliRunner().invoke(main, ["run", str(path)])
    assert found.exit_code == 0, found.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    (step,) = report["steps"]
    assert (step["bits"], step["violations"]) == ([4], 0)
    assert step["groups"] > 0
    assert step["sparsity"] >= 0.5
    ratios = {export["format"]: export["linears"]["ratio_fp16"] for export in report["exports"]}
    assert ratios == {"gptq": pytest.approx(2.9, abs=0.1), "sparsekit-24": pytest.approx(4.85, abs=0.1)}
    stored = sum(file.stat().st_size for file in (tmp_path / "run" / "steps").rglob("*.safetensors"))
    assert plan["steps"][0]["disk"] == pytest.approx(stored, rel=0.1)


def test_worst_layers_get_more_bits(tmp_path, random_model):
    path = written(tmp_path, JOINT.replace("64", "16"), "dense", REDO.replace("5%", "0.0"), random_model)
    CliRunner().invoke(main, ["run", str(path)])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"][-1]["bits"] == [4, 8]
    assert report["steps"][-1]["violations"] == 0
