"""What an export refuses after hours of work is refused by the plan, where recipe and configuration tell."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from families import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsekit.cli import main

ASSETS = Path(__file__).parents[1] / "sparsekit" / "assets"
RECIPE = """\
name: foreseen
output: {base}/out
model: {{path: {base}/model, device: cpu}}
data:
  calibration: {{path: builtin:calibration, samples: 2, seq_len: 16}}
  train: {{path: builtin:train, samples: 4, seq_len: 16}}
steps: [{steps}]
export: {{formats: [dense, {formats}]}}
"""
AST = 'method: ast, pattern: "2:4", tokens: 64, batch: 2'
PRUNED = '{method: magnitude, pattern: "2:4"}'
CASES = [  # family, steps, formats, what is said of the export
    ("gpt2", f"{{{AST}, slorb: 16}}", "", "transformer.h.0.attn.c_attn: Transformers computes it by a Conv1D"),
    ("gpt2", f"{PRUNED}, {{method: lowrank, rank: 4}}", "", "by a Conv1D, which can carry no low-rank branch"),
    ("mixtral", f"{{{AST}, slorb: 16}}", "", "inside a fused tensor, and an adapter has no place"),
    ("mixtral", f"{PRUNED}, {{method: lowrank}}", "", "leave it out of the step that adds branches"),
    ("mixtral", "{method: rtn, group_size: 16}", "gptq", "inside a fused tensor, for which GPTQ has no layout"),
    ("llama", "{method: rtn, group_size: 16}", "gptq", "k_proj, model.layers.0.self_attn.v_proj"),
    ("llama", "{method: rtn, group_size: 16}", "awq", "its shape [16, 32] is not a multiple of 32 both ways"),
    ("qwen3", f"{{{AST}, bits: 4, group_size: 16}}", "awq", "its shape [16, 32] is not a multiple of 32"),
    ("opt", "{method: gptq, group_size: 16, act_order: dynamic}", "awq", "AWQ has no group index"),
    ("opt", "{method: rtn, group_size: 16}", "sparsekit-24", "groups of 4 hold more than two weights"),
    ("opt", "{method: rtn, group_size: 16}", "sparsekit-24-compact", "groups of 4 hold more than two weights"),
    ("opt", '{method: wanda, pattern: "4:8"}, {method: rtn, group_size: 16}', "sparsekit-24", "more than two weights"),
    ("opt", f"{{{AST}, bits: 4, group_size: 16}}".replace("2:4", "3:4"), "sparsekit-24", "more than two weights"),
    ("opt", "{method: rtn, group_size: 16, bits: 5}", "sparsekit-compact", "5 bits have no sparsekit-compact layout"),
    ("opt", f"{PRUNED}, {{method: rtn, group_size: 16, bits: 5}}", "sparsekit-24-compact", "5 bits have no"),
    ("opt", "", "gptq", "no linear is quantized; GPTQ export needs a quantizer among the steps"),
]  # fmt: skip


def written(base: Path, family: str, steps: str, formats: str) -> Path:
    """A recipe beside a random model of a family."""
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config.vocab_size = 8192  # of the tokenizer
    AutoModelForCausalLM.from_config(config).save_pretrained(base / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "tiny" / name, base / "model" / name)
    path = base / "recipe.yaml"
    path.write_text(RECIPE.format(base=base, steps=steps, formats=formats))
    return path


@pytest.mark.parametrize(("family", "steps", "formats", "words"), CASES)
def test_a_refusal_of_the_export_is_foreseen(tmp_path, family, steps, formats, words):
    path = written(tmp_path, family, steps, formats)
    found = CliRunner().invoke(main, ["plan", str(path)])
    told = " ".join(found.output.split())
    assert found.exit_code == 2, found.output
    assert words in told, told
    assert "recipe.yaml:8: " in told
    assert not (tmp_path / "out").exists()


BRANCHES = [
    (f"{PRUNED}, {{method: lowrank}}, {{method: lowrank}}", "q_proj: it has a low-rank branch already; keep one step"),
    (f"{{{AST}, slorb: 16}}, {{method: lowrank}}", "it has a low-rank branch already"),
    (
        f"{{{AST}, slorb: 16}}, {{{AST}, slorb: 32}}",
        "blocks of 32, and an earlier step left a branch with blocks of 16",
    ),
    (f"{{{AST}, slorb: 64}}", "slorb 64 does not divide 32 inputs"),
    (f"{PRUNED}, {{method: lowrank, group_size: 0}}", "group_size 0 is no number of inputs"),
]


@pytest.mark.parametrize(("steps", "words"), BRANCHES)
def test_branches_that_come_too_late_are_foreseen(tmp_path, steps, words):
    path = written(tmp_path, "llama", steps, "")
    path.write_text(path.read_text().replace("[dense, ]", "[]"))
    found = CliRunner().invoke(main, ["plan", str(path)])
    assert found.exit_code == 2, found.output
    assert words in " ".join(found.output.split())
    assert "recipe.yaml:7: " in found.output


@pytest.mark.parametrize(
    ("family", "steps", "formats"),
    [
        ("gpt2", f"{PRUNED}, {{method: gptq, group_size: 16}}, {{method: lowrank, rank: 4}}", "sparsekit-24"),
        ("opt", f"{PRUNED}, {{method: rtn, group_size: 16}}", "gptq, awq, sparsekit-24, sparsekit-24-compact"),
        ("opt", f"{{{AST}, bits: 4, group_size: 16, levels: odd}}", "sparsekit-24-compact"),
        ("opt", f"{{{AST}, bits: 2, group_size: 16, levels: ternary}}", "sparsekit-compact, sparsekit-coded"),
        ("opt", f"{{{AST}, bits: 3, group_size: 16, levels: six}}", "sparsekit-24-compact, sparsekit-coded"),
        ("opt", "{method: gptq, group_size: -1, act_order: dynamic, symmetric: false}", "awq, sparsekit-compact"),
        ("phi", '{method: magnitude, pattern: "1:2"}, {method: rtn, group_size: 16}', "sparsekit-24"),
    ],
)
def test_what_an_export_takes_is_planned_and_taken(tmp_path, family, steps, formats):
    path = written(tmp_path, family, steps, formats)
    if family == "gpt2":  # what its dense export refuses
        path.write_text(path.read_text().replace("dense, ", ""))
    found = CliRunner().invoke(main, ["run", str(path)])
    assert found.exit_code == 0, found.output


def test_zeros_of_the_models_own_count(tmp_path):
    path = written(tmp_path, "opt", "{method: rtn, group_size: 16}", "sparsekit-24")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if "layers" in name and tensor.dim() == 2:
            tensors[name] = tensor * torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(tensor.shape[1] // 4)
    save_file(tensors, weights, {"format": "pt"})
    found = CliRunner().invoke(main, ["run", str(path), "--dry-run"])
    assert found.exit_code == 0, found.output
