"""Looking at model directories: patterns found by brute force, other people's zeros, quantized checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from sparsekit.cli import main
from sparsekit.errors import ModelError, RecipeError
from sparsekit.models.inspection import detected, inspect_model, main_pattern, pattern_of
from sparsekit.pattern import Pattern


def inspect(*arguments: object) -> dict:
    result = CliRunner().invoke(main, ["inspect", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output + str(result.exception)
    return json.loads(result.output)


@pytest.mark.parametrize("told", ["1:2", "2:4", "1:4", "3:8", "5:8", "7:16", "11:32"])
def test_patterns_are_found(told):
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    n, m = map(int, told.split(":"))
    assert detected(weight.masked_fill(~Pattern(n, m).keep(weight.abs()), 0.0)) == told


def test_what_is_no_pattern():
    torch.manual_seed(0)
    weight = torch.randn(64, 96)
    assert detected(weight) == "dense"
    assert detected(weight.masked_fill(~Pattern.unstructured(0.5).keep(weight.abs()), 0.0)) == "unstructured"
    assert detected(torch.zeros(4, 8)) == "all zero"
    assert detected(torch.randn(4, 7)) == "dense"  # divides into nothing


def test_architecture_and_groups(random_model):
    found = inspect(random_model)
    assert found["architecture"] == "LlamaForCausalLM"
    assert found["blocks"] == 2
    assert sum(found["ledger"].values()) == found["parameters"]
    (kind,) = found["kinds"]
    groups = {tuple(group["linears"]): group["producer"] for group in kind["groups"]}
    assert groups[("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")] == "input_layernorm"
    assert groups[("mlp.down_proj",)] == "mlp.up_proj"
    assert {layer["pattern"] for layer in found["layers"]} == {"dense"}
    assert all(layer["counted"] is None for layer in found["layers"])


@pytest.fixture
def pruned(tmp_path, random_model) -> Path:
    """Somebody else's 2:4 model, stored as dense with zeros, with one group broken by hand."""
    directory = tmp_path / "pruned"
    shutil.copytree(random_model, directory)
    tensors = load_file(directory / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = weight.masked_fill(~Pattern(2, 4).keep(weight.abs()), 0.0)
    tensors["model.layers.1.mlp.up_proj.weight"][0, :4] = 1.0
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_violations_of_a_dense_model_with_zeros(pruned):
    found = inspect(pruned)
    broken = {layer["name"]: layer["violations"] for layer in found["layers"] if layer["violations"]}
    assert broken == {"model.layers.1.mlp.up_proj": 1}
    assert {layer["counted"] for layer in found["layers"]} == {"2:4"}
    result = CliRunner().invoke(main, ["inspect", str(pruned)])
    assert "groups break 2:4" in result.output
    other = inspect(pruned, "--pattern", "1:4")
    assert sum(layer["violations"] for layer in other["layers"]) > 100


def test_a_directory_transformers_cannot_build_is_looked_at_tensor_by_tensor(tmp_path):
    torch.manual_seed(0)
    weight = torch.randn(16, 32)
    tensors = {"odd.weight": weight.masked_fill(~Pattern(2, 4).keep(weight.abs()), 0.0), "ids": torch.arange(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    found = inspect(tmp_path)
    assert [(layer["name"], layer["pattern"], layer["violations"]) for layer in found["layers"]] == [("odd", "2:4", 0)]
    assert "looked at one by one" in found["notes"][0]
    assert "architecture" not in found
    assert "2:4" in CliRunner().invoke(main, ["inspect", str(tmp_path)]).output


def test_bits_of_a_quantized_export(tmp_path, random_model):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: rtn\noutput: {tmp_path / 'run'}\nmodel: {{path: {random_model}}}\n"
        'steps: [{method: magnitude, pattern: "2:4"}, {method: rtn, bits: 4, group_size: 16}]\n'
        "export: {formats: [gptq]}\n"
    )
    assert CliRunner().invoke(main, ["run", str(recipe)]).exit_code == 0
    found = inspect(tmp_path / "run" / "export" / "gptq")
    assert {(layer["bits"], layer["group_size"], layer["violations"]) for layer in found["layers"]} == {(4, 16, 0)}
    assert all(layer["sparsity"] >= 0.5 for layer in found["layers"])


def test_the_pattern_a_model_is_meant_to_hold():
    assert main_pattern({"a": "2:4", "b": "2:4", "c": "1:4"}, {}) == Pattern(2, 4)
    assert main_pattern({"a": "unstructured"}, {"a": 0.5}) == Pattern(2, 4)
    assert main_pattern({"a": "dense"}, {"a": 0.0}) is None


def test_mistakes_are_named(tmp_path):
    with pytest.raises(RecipeError, match="--pattern"):
        pattern_of("2-4")
    with pytest.raises(ModelError):
        inspect_model(str(tmp_path / "nothing"))
