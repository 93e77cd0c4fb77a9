from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, load, save
from safetensors.torch import load_file, save_file

from sparsekit.errors import MethodError, ModelError
from sparsekit.models.groups import Producer
from sparsekit.models.view import ModelView

TOKENS = torch.randint(3, 128, (3, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save("llama", tmp_path_factory.mktemp("llama"))


def replay(view: ModelView) -> torch.Tensor:
    hidden, calls = view.begin(TOKENS)
    for index, call in enumerate(calls):
        view.materialise(index, view.dense_block(index))
        hidden = view.run_block(index, hidden, call)
        view.release(index)
    return view.logits(TOKENS, hidden)


@torch.inference_mode()
def test_replay_equals_the_full_forward_bit_for_bit(family):
    name, directory = family
    view = ModelView.open(directory)
    replayed = replay(view)
    view.materialise_all(view.dense_block(index) for index in range(len(view.blocks)))
    assert torch.equal(replayed, view.module(TOKENS).logits)
    assert torch.equal(replayed, load(name, directory)(TOKENS).logits)


def test_what_is_written_back_loads_as_the_same_model(family, tmp_path):
    name, directory = family
    view = ModelView.open(directory)
    tensors = view.rest_to_hf()
    for index in range(len(view.blocks)):
        tensors |= view.to_hf(index, view.dense_block(index))
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    view.config.save_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(load(name, tmp_path)(TOKENS).logits, load(name, directory)(TOKENS).logits)


def test_ledger_counts_every_parameter_once(family):
    name, directory = family
    rows = ModelView.open(directory).ledger()
    model = load(name, directory)
    assert sum(row.numel for row in rows) == sum(parameter.numel() for parameter in model.parameters())
    inside = sum(row.numel for row in rows if row.category != "kept by rule")
    reached = sum(row.numel for row in rows if row.category == "linear")
    assert reached / inside > 0.95  # only the routers of mixtures are left out


EXPECTED_GROUPS = {
    "llama": [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}],
    "phi": [{"q_proj", "k_proj", "v_proj", "fc1"}, {"dense"}, {"fc2"}],
    "gpt2": [{"c_attn"}, {"c_proj"}, {"c_fc"}, {"c_proj"}],
}
EXPECTED_PRODUCERS = {
    "llama": ["input_layernorm/norm", "v_proj/linear", "post_attention_layernorm/norm", "up_proj/linear"],
    "gemma2": ["input_layernorm/unit norm", "v_proj/linear", "pre_feedforward_layernorm/unit norm", "up_proj/linear"],
    "opt": ["self_attn_layer_norm/norm", "v_proj/linear", "final_layer_norm/norm", "fc1/linear"],
    "phi": ["input_layernorm/norm", "v_proj/linear", None],
    "phi3": ["input_layernorm/norm", "qkv_proj/linear", "post_attention_layernorm/norm", "gate_up_proj/linear"],
    "gpt2": ["ln_1/norm", "c_attn/linear", "ln_2/norm", None],
    "olmo2": [None, "v_proj/linear", None, "up_proj/linear"],
}


@torch.inference_mode()
def structure(view: ModelView) -> tuple[list[list[str]], list[Producer | str]]:
    hidden, calls = view.begin(TOKENS)
    view.materialise(0, view.dense_block(0))
    groups = view.groups(0, hidden, calls[0])
    producers = view.producers(0, groups, hidden, calls[0])
    view.release(0)
    return groups, producers


def test_groups_and_producers(family):
    name, directory = family
    view = ModelView.open(directory)
    groups, producers = structure(view)
    assert sorted(linear for group in groups for linear in group) == sorted(view.linears(0))
    if name in EXPECTED_GROUPS:
        assert [{linear.rpartition(".")[2] for linear in group} for group in groups] == EXPECTED_GROUPS[name]
    if name in EXPECTED_PRODUCERS:
        found = [None if isinstance(p, str) else f"{p.module.rpartition('.')[2]}/{p.form}" for p in producers]
        assert found == EXPECTED_PRODUCERS[name]


@torch.inference_mode()
def test_rescaling_a_group_and_folding_keeps_the_function(family):
    _, directory = family
    view = ModelView.open(directory)
    groups, producers = structure(view)
    hidden, calls = view.begin(TOKENS)
    block = view.dense_block(0)
    view.materialise(0, block)
    expected = view.run_block(0, hidden, calls[0])
    generator = torch.Generator().manual_seed(1)
    for group, producer in zip(groups, producers, strict=True):
        if isinstance(producer, str):
            continue
        free = torch.rand(int(producer.expand.max()) + 1, generator=generator) + 0.5
        scale = producer.tie(free)
        assert torch.allclose(producer.untie(scale), free)
        assert torch.equal(producer.free(scale), free)
        block = producer.fold(block, scale)
        for name in group:
            state = block.linears[name]
            block.linears[name] = state.updated(state.source * scale)
    view.materialise(0, block)
    actual = view.run_block(0, hidden, calls[0])
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_quantized_producer_refuses_a_scale(llama):
    from sparsekit.methods.rtn import rtn

    view = ModelView.open(llama)
    _, producers = structure(view)
    block = view.dense_block(0)
    producer = producers[1]
    assert isinstance(producer, Producer)
    block.linears[producer.module] = rtn(block.linears[producer.module], group_size=-1)
    with pytest.raises(MethodError, match=r"v_proj: is quantized already"):
        producer.fold(block, torch.ones(32))


def test_rest_can_be_replaced_and_returns(llama):
    view = ModelView.open(llama)
    (name,) = [name for name in view.rest() if "embed" in name]
    original = view.rest()[name].clone()
    view.load_rest({name: original + 1})
    assert torch.allclose(view.rest()[name], original + 1)
    view.load_rest({})
    assert torch.equal(view.rest()[name], original)


def test_missing_directory_names_the_nearest(llama, tmp_path, monkeypatch):
    (tmp_path / "llama-2").symlink_to(llama)
    (tmp_path / "llama-3").mkdir()  # as near, and no model
    with pytest.raises(ModelError, match=r"no directory\. Did you mean 'llama-2'"):
        ModelView.open(tmp_path / "llama-X")
    with pytest.raises(ModelError, match=r"no directory\. A hub id"):
        ModelView.open(tmp_path / "nowhere" / "llama-2")
    with pytest.raises(ModelError, match="there is tiny"):
        ModelView.open("builtin:tinny")
    monkeypatch.setattr("sparsekit.models.locate.ASSETS", tmp_path / "nowhere")  # a checkout without the embedded model
    with pytest.raises(ModelError, match="no built-in model 'tiny'; there is none"):
        ModelView.open("builtin:tiny")


def test_damaged_models_are_named(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"no \.safetensors weights"):
        ModelView.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickle"):
        ModelView.open(tmp_path)
    whole = (llama / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="no whole safetensors file"):
        ModelView.open(tmp_path)
    tensors = load_file(llama / "model.safetensors")
    wrong = {**tensors, "model.layers.0.mlp.up_proj.weight": torch.ones(3, 3)}
    save_file(wrong, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj.weight has shape \[3, 3\], the model expects \[64, 32\]"):
        ModelView.open(tmp_path).dense_block(0)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ModelError, match="no causal LM"):
        ModelView.open(tmp_path)


def test_dtypes_and_devices_are_named(llama):
    assert ModelView.open(llama, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ModelError, match="Did you mean 'bfloat16'"):
        ModelView.open(llama, dtype="bfloat61")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="torch sees none"):
            ModelView.open(llama, device="cuda")
