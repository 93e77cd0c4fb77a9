"""Exports whose files were changed after they were written, and checkpoints that hold more than the model reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_imports import copied, exports, logits, run  # noqa: F401  # fixtures

import sparsekit
from sparsekit.cli import main
from sparsekit.errors import CheckpointError, ModelError
from sparsekit.files import read_json, write_json
from sparsekit.inference.load import load_model
from sparsekit.interchange.since import changes
from sparsekit.models.view import ModelView

QUANTIZED = ["gptq", "awq", "compressed-tensors", "sparsekit-24", "sparsekit-24-compact", "sparsekit-coded"]
UP = "model.layers.1.mlp.up_proj"


def told(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return f"{result.exit_code} " + " ".join(result.output.split())


def edit(path: Path, **values: object) -> None:
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("name", ["dense", *QUANTIZED])
def test_an_export_as_it_was_written_has_no_changes(exports, name):  # noqa: F811
    assert changes(exports[0] / name, weights=True) == []


@pytest.mark.parametrize("name", QUANTIZED)
def test_integers_are_not_read_with_another_configuration(copied, name):  # noqa: F811
    directory = copied(name)
    grid = read_json(directory / "config.json")["quantization_config"]
    other = json.loads(json.dumps(grid).replace('"group_size": 32', '"group_size": 16'))
    assert other != grid
    for changed, words in ((other, "group_size is 16, was 32"), (None, "quantization_config is null, was {")):
        edit(directory / "config.json", quantization_config=changed)
        with pytest.raises(CheckpointError, match=f"config.json was changed after the export: .*{words}"):
            ModelView.open(directory, empty=True)
        if changed is not None:
            with pytest.raises(CheckpointError, match=words):
                sparsekit.load_quantized(directory)
        for command in (["generate", str(directory), "--prompt", "a"], ["inspect", str(directory)]):
            said = told(*command)
            assert said.startswith("2 error: ") and words in said


@pytest.mark.parametrize("name", ["dense", "gptq"])
def test_another_config_is_told_of_wherever_the_model_is_opened(copied, tmp_path, name):  # noqa: F811
    directory = copied(name)
    edit(directory / "config.json", rms_norm_eps=0.1, use_cache=False, transformers_version="9")
    words = "config.json was changed since the export: rms_norm_eps is 0.1, was 1e-06; use_cache is false, was true"
    assert words in told("inspect", str(directory))
    assert words in told("generate", str(directory), "--prompt", "a", "--max-tokens", "1")
    with pytest.warns(UserWarning, match="rms_norm_eps is 0.1"):
        sparsekit.load(directory, device="cpu")
    code, output, report = run(tmp_path, directory, "[]", "dense")
    assert code == 0, output
    assert any(words in note for note in report["notes"])
    assert sum("rms_norm_eps" in note for note in report["notes"]) == 1


@pytest.mark.parametrize("name", ["dense", "sparsekit-24"])
def test_other_files_are_told_of_by_name(copied, name):  # noqa: F811
    directory = copied(name)
    assert load_model(directory, device="cpu").notes == []
    edit(directory / "tokenizer_config.json", model_max_length=7)
    (directory / "tokenizer.json").rename(directory / "gone.json")
    write_json(directory / "generation_config.json", {"eos_token_id": 3})
    found = " ".join(load_model(directory, device="cpu").notes)
    assert "tokenizer_config.json was changed since the export" in found
    assert "tokenizer.json of the export is missing" in found
    assert "generation_config.json" not in found or "generation_config.json was changed" in found


def test_plain_weights_are_compared_by_size_and_by_inspect_whole(copied):  # noqa: F811
    directory = copied("dense")
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert load_model(directory, device="cpu").notes == []
    assert "model.safetensors was changed since the export" in told("inspect", str(directory))
    tensors = load_file(path)
    save_file({**tensors, "more": torch.ones(1)}, path)
    assert any("model.safetensors was changed" in note for note in load_model(directory, device="cpu").notes)


def test_masks_are_held_against_their_digest(copied):  # noqa: F811
    directory = copied("gptq")
    path = directory / "sparsekit" / "masks.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 0xFF]))
    with pytest.raises(CheckpointError, match=r"masks.safetensors was changed after it was written"):
        ModelView.open(directory)


@pytest.mark.parametrize(("values", "words"), [
    ({"config": []}, "does not say what the other files were"),
    ({"companions": {"../x": {"bytes": 1, "sha256": "x"}}}, "outside the directory"),
    ({"companions": {"/dev/zero": {"bytes": 1, "sha256": "x"}}}, "outside the directory"),
    ({"companions": {"tokenizer.json": 3}}, "has no digest of tokenizer.json"),
])  # fmt: skip
def test_a_marker_nobody_wrote_is_refused(copied, values, words):  # noqa: F811
    directory = copied("dense")
    edit(directory / "sparsekit.json", **values)
    with pytest.raises(CheckpointError, match=words):
        ModelView.open(directory)


def test_exports_of_before_are_opened_as_ever(copied):  # noqa: F811
    directory = copied("gptq")
    expected = logits(directory)
    edit(directory / "sparsekit.json", config=None, companions=None)
    edit(directory / "config.json", rope_scaling=None)
    assert torch.equal(logits(directory), expected)


@pytest.fixture
def model(random_model, tmp_path) -> Path:
    return Path(shutil.copytree(random_model, tmp_path / "model"))


def add(model: Path, **more: torch.Tensor) -> None:
    path = model / "model.safetensors"
    save_file({**load_file(path), **{name.replace("__", "."): value for name, value in more.items()}}, path)


def test_tensors_without_a_use_are_told_of_once(model, tmp_path):
    add(model, mtp__head__weight=torch.ones(3), extra=torch.ones(1),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8),  # older releases stored it
        model__layers__0__self_attn__q_proj__bias=torch.zeros(64),  # AutoGPTQ wrote such
        lm_head__weight=load_file(model / "model.safetensors")["model.embed_tokens.weight"])  # fmt: skip
    words = "2 tensors of the files are not used by the model, and left out of exports: extra, mtp.head.weight"
    assert words in told("inspect", str(model))
    view = ModelView.open(model, device="cpu", empty=True)
    assert len(view.notes) == 1 and words in view.notes[0]
    assert words in load_model(model, device="cpu").notes[0]
    code, output, report = run(tmp_path, model, "[]", "dense")
    assert code == 0, output
    assert sum(words in note for note in report["notes"]) == 1 == " ".join(output.split()).count(words)


def test_blocks_that_the_configuration_does_not_count_are_told_of(model):
    edit(model / "config.json", num_hidden_layers=1)
    (note,) = ModelView.open(model, device="cpu", empty=True).notes
    assert "9 tensors of the files are not used" in note
    assert note.endswith("9 of them belong to blocks that config.json does not count")


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda model: add(model, model__layers__0__self_attn__q_proj__bias=torch.ones(64)),
     "gives model.layers.0.self_attn.q_proj no bias, and the files hold one that is not 0"),
    (lambda model: add(model, lm_head__weight=torch.ones(8192, 64)),
     "ties lm_head.weight to model.embed_tokens.weight, and the files hold both with other values"),
    (lambda model: shutil.copyfile(model / "model.safetensors", model / "other.safetensors")
     and (model / "model.safetensors").rename(model / "more.safetensors"), "is in other.safetensors and in more"),
    (lambda model: shutil.copyfile(model / "model.safetensors", model / "part.safetensors") and write_json(
        model / "model.safetensors.index.json", {"weight_map": {"x": "part.safetensors"}}), "and an index that lists"),
])  # fmt: skip
def test_weights_of_another_configuration_are_refused(model, spoil, words):
    spoil(model)
    with pytest.raises(ModelError, match=words):
        ModelView.open(model, device="cpu", empty=True)


def test_files_beside_the_weights_are_not_mixed_in(model):
    expected = ModelView.open(model, device="cpu").dense_block(1).linears[UP].source
    other = {name: torch.zeros_like(value) for name, value in load_file(model / "model.safetensors").items()}
    save_file(other, model / "zeros.safetensors")  # comes later in the alphabet, and its tensors have the same names
    view = ModelView.open(model, device="cpu")
    assert torch.equal(view.dense_block(1).linears[UP].source, expected)
    assert view.notes == ["zeros.safetensors beside the weights: not read"]
