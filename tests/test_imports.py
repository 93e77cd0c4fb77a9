"""Quantized checkpoints opened again: as states, as models, in recipes without steps, by other software."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsekit import load_quantized
from sparsekit.cli import main
from sparsekit.errors import CheckpointError, ModelError, SparsekitError
from sparsekit.files import read_json, write_json
from sparsekit.formats import FORMATS
from sparsekit.interchange.hfdir import sha256_file
from sparsekit.models.chain import Chain
from sparsekit.models.view import ModelView
from sparsekit.terminal.console import export_lines

OURS = {"sparsekit-24", "sparsekit-24-compact", "sparsekit-coded"}  # they hold positions, and so the mask
INTEGERS = [name for name, form in FORMATS.items() if form.storage is not None]
TOKENS = torch.arange(48).remainder(96).reshape(2, 24)
RECIPE = """\
name: {name}
output: {output}
model: {{path: {model}}}
data:
  evaluation: {{heldout: {{path: builtin:heldout, seq_len: 32, samples: 8}}}}
steps: {steps}
evaluate: {{perplexity: [heldout]}}
export: {{formats: [{formats}]}}
"""
STEPS = '[{method: magnitude, pattern: "2:4"}, {method: rtn, bits: 4, group_size: 32}]'


def run(tmp_path: Path, model: Path, steps: str, formats: str, name: str = "run") -> tuple[int, str, dict]:
    recipe, output = tmp_path / f"{name}.yaml", tmp_path / name
    recipe.write_text(RECIPE.format(name=name, output=output, model=model, steps=steps, formats=formats))
    result = CliRunner().invoke(main, ["run", str(recipe)])
    report = output / "report.json"
    return result.exit_code, result.output, json.loads(report.read_text()) if report.exists() else {}


@pytest.fixture(scope="session")
def exports(random_model, tmp_path_factory) -> tuple[Path, dict]:
    """Every format of one 2:4 int4 model, and the report of the run that wrote them."""
    directory = tmp_path_factory.mktemp("exports")
    code, output, report = run(directory, random_model, STEPS, ", ".join(FORMATS))
    assert code == 0, output
    return directory / "run" / "export", report


@pytest.fixture
def copied(exports, tmp_path):
    """A format's directory to damage."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(exports[0] / name, tmp_path / name))

    return copy


def logits(directory: Path, dtype: str = "float32") -> torch.Tensor:
    with Chain(ModelView.open(directory, dtype=dtype, device="cpu")).forward() as forward:
        return forward(TOKENS)


def change(directory: Path, **values) -> None:
    """Other settings, as if the export had been written with them."""
    config, marker = read_json(directory / "config.json"), read_json(directory / "sparsekit.json")
    config["quantization_config"] |= values
    write_json(directory / "config.json", config)
    write_json(directory / "sparsekit.json", {**marker, "config": config})


def rewrite(directory: Path, alter) -> None:
    """Change the tensors of a checkpoint whose digests nobody checks."""
    (directory / "sparsekit.json").unlink()
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    alter(tensors)
    save_file(tensors, path)


def test_all_formats_hold_the_same_model(exports):
    expected = logits(exports[0] / "dense")
    states = dict(load_quantized(exports[0] / "gptq").items())
    assert len(states) == 14
    for name in INTEGERS:
        assert torch.equal(logits(exports[0] / name), expected)
        found = load_quantized(exports[0] / name)
        assert found.keys() == states.keys()
        assert found.setting.bits == 4
        assert found.quantizer == "sparsekit"
        for linear, state in found.items():
            assert state.quantized.equal(states[linear].quantized)
            assert torch.equal(state.mask, states[linear].mask)


def test_bytes_add_up_in_every_format(exports):
    directory, report = exports
    by_name = {export["format"]: export for export in report["exports"]}
    assert by_name.keys() == FORMATS.keys()
    for name, export in by_name.items():
        held, real = export["bytes"], sum(path.stat().st_size for path in (directory / name).glob("*.safetensors"))
        parts = ("codes", "positions", "scales", "zeros", "groups", "dense", "headers")
        assert held["files"] == real
        assert held["total"] == sum(held[part] for part in parts)
        assert abs(held["total"] - real) <= 0.01 * real
        assert export["ratio_fp32"] == pytest.approx(4 * export["parameters"] / real)
        assert export["engines"]
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    ours = by_name["sparsekit-24"]["bytes"]
    assert (ours["codes"], ours["positions"], ours["scales"]) == (weights // 4, weights // 8, weights // 16)
    assert by_name["sparsekit-24"]["bits_per_weight"] == 3.5  # 3 and a float16 scale for every 32
    assert {name for name, export in by_name.items() if export["bytes"]["positions"]} == OURS
    compact = by_name["sparsekit-24-compact"]
    thirds = sum(
        2 * out * -(-inputs // 12) for out, inputs in [(64, 64)] * 2 + [(32, 64)] * 2 + [(128, 64)] * 2 + [(64, 128)]
    )
    assert (compact["bytes"]["codes"], compact["bytes"]["positions"]) == (weights // 4, thirds)
    for name, export in by_name.items():
        held, alone = export["bytes"], export["linears"]
        packed = sum(held[part] for part in ("codes", "positions", "scales", "zeros", "groups"))
        dense = weights * 4 if name == "dense" else 0
        assert (alone["weights"], alone["bytes"]) == (weights, packed + dense + held["masks"] + held["headers"])
        assert alone["ratio_fp32"] == 4 * weights / alone["bytes"] == 2 * alone["ratio_fp16"]
        assert bool(held["masks"]) is (name not in OURS)


def test_masks_lie_beside_every_format_that_does_not_tell_them(exports):
    for name in FORMATS:
        masks = exports[0] / name / "sparsekit" / "masks.safetensors"
        assert masks.is_file() is (name not in OURS)
        assert "sparsity_config" not in (exports[0] / name / "config.json").read_text()


@pytest.mark.parametrize("name", INTEGERS)
def test_a_recipe_without_steps_measures_and_converts(exports, tmp_path, name):
    code, output, report = run(tmp_path, exports[0] / name, "[]", f"{name}, sparsekit-24, dense", "again")
    if name == "sparsekit-24":
        assert code == 2 and "listed twice" in output
        code, output, report = run(tmp_path, exports[0] / name, "[]", "gptq, sparsekit-24, dense", "again")
    assert code == 0, output
    assert report["steps"] == []
    assert any("the model is quantized: 14 linears" in note for note in report["notes"])
    before = exports[1]["final"]["heldout"]["perplexity"]
    assert report["final"]["heldout"]["perplexity"] == report["dense"]["heldout"]["perplexity"] == before
    for written in ("gptq" if name == "sparsekit-24" else name, "sparsekit-24"):
        (first,), (second,) = (root.glob("*.safetensors") for root in (
            exports[0] / written, tmp_path / "again" / "export" / written
        ))  # fmt: skip
        assert sha256_file(first) == sha256_file(second)


def test_nothing_writes_weights_after_a_quantizer(exports, tmp_path):
    code, output, _ = run(tmp_path, exports[0] / "gptq", STEPS, "dense", "refused")
    assert code == 2
    assert "is quantized, and nothing may write weights after a quantizer" in " ".join(output.split())
    code, output, _ = run(tmp_path, exports[0] / "dense", "[]", "dense, gptq", "none")
    assert code == 2 and "no linear is quantized" in " ".join(output.split())


@pytest.mark.parametrize("name", INTEGERS)
def test_damage_is_named(copied, name):
    directory = copied(name)
    (path,) = directory.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=rf"{path.name} has .* bytes, .* were written"):
        load_quantized(directory)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"sha256 is not the one in sparsekit\.json"):
        ModelView.open(directory)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"is missing, sparsekit.json lists it"):
        load_quantized(directory)
    path.write_bytes(whole)
    write_json(directory / "sparsekit.json", {"files": {}})
    with pytest.raises(CheckpointError, match="lists no weight files"):
        load_quantized(directory)


def test_damage_without_digests_is_named(copied):
    directory = copied("gptq")
    rewrite(directory, lambda tensors: None)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        load_quantized(directory)


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors"])
def test_checkpoints_of_others_need_no_digests_but_every_tensor(copied, name):
    directory, linear = copied(name), "model.layers.1.mlp.up_proj"
    rewrite(directory, lambda tensors: None)
    assert load_quantized(directory)[linear].mask is None
    first, scales = (f"{linear}.{part}" for part in {
        "gptq": ("qweight", "scales"), "awq": ("qweight", "scales"),
        "compressed-tensors": ("weight_packed", "weight_scale"),
    }[name])  # fmt: skip
    tensors = load_file(directory / "model.safetensors")
    save_file({key: value for key, value in tensors.items() if key != scales}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{linear}: lacks the tensor"):
        load_quantized(directory)[linear]
    save_file({key: value for key, value in tensors.items() if key != first}, directory / "model.safetensors")
    with pytest.raises(ModelError, match=rf"has no tensor {linear}.weight"):
        ModelView.open(directory)
    save_file(tensors | {first: tensors[first][:-4]}, directory / "model.safetensors")
    with pytest.raises(SparsekitError, match=r"do not fit|does not divide its 60 inputs"):
        ModelView.open(directory).dense_block(1)


def test_configurations_that_are_not_understood_are_named(copied):
    directory = copied("gptq")
    change(directory, checkpoint_format="gptq_v3")
    with pytest.raises(CheckpointError, match=r"config.json: .*checkpoint_format is 'gptq_v3'; .*'gptq', 'gptq_v2'"):
        ModelView.open(directory)
    change(directory, checkpoint_format="gptq", bits=8)
    with pytest.raises(CheckpointError, match=r"q_proj: qweight holds .* the bits do not fit"):
        ModelView.open(directory).dense_block(0)
    change(directory, quant_method="fp8")
    with pytest.raises(CheckpointError, match="quant_method 'fp8'; sparsekit reads gptq, awq"):
        ModelView.open(directory)
    directory = copied("sparsekit-24")
    change(directory, version=2)
    with pytest.raises(CheckpointError, match="version is 2; this version reads 1"):
        ModelView.open(directory)
    change(directory, version=1)
    (directory / "sparsekit.json").unlink()
    with pytest.raises(CheckpointError, match="without its digests this format is not read"):
        ModelView.open(directory)


@pytest.mark.parametrize("name", sorted(OURS))
def test_transformers_refuses_what_is_ours_alone(exports, name):
    """It only warns about a quant_method it does not know; what stops it is that it finds no weights."""
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(exports[0] / name)


def test_compressed_tensors_reads_our_export(exports):
    """The check of tests/interop for one reader, in this process."""
    pytest.importorskip("compressed_tensors", reason="pip install -e '.[dev]' brings it")
    model = AutoModelForCausalLM.from_pretrained(exports[0] / "compressed-tensors", dtype=torch.float32).eval()
    with torch.inference_mode():
        found = model(input_ids=TOKENS, use_cache=False).logits
    expected = logits(exports[0] / "compressed-tensors")
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_weight_files_can_be_read_by_whoever_may_read_the_configuration(exports):
    for name in FORMATS:
        (path,) = (exports[0] / name).glob("*.safetensors")
        assert path.stat().st_mode == (exports[0] / name / "config.json").stat().st_mode


def test_the_terminal_says_who_reads_an_export(exports):
    by_name = {export["format"]: list(export_lines(export)) for export in exports[1]["exports"]}
    first, alone, *verdicts = by_name["gptq"]
    assert "linears of the blocks alone" in alone and "smaller than FP32" in alone
    assert "codes" in first and "scales" in first and "smaller than FP32" in first
    assert any(line.strip().startswith("loads:") and "vLLM" in line for line in verdicts)
    assert any(line.strip().startswith("refuses:") and "vLLM" in line for line in by_name["sparsekit-24"])
    assert "positions" in by_name["sparsekit-24"][0]
