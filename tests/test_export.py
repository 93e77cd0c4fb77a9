import errno
import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from sparsekit.checkpoint import BlockState, unpack_mask
from sparsekit.errors import CheckpointError, PatternError
from sparsekit.files import read_json, read_tensors, write_json
from sparsekit.formats import FORMATS
from sparsekit.formats.base import Setting
from sparsekit.interchange import hfdir
from sparsekit.interchange.export import export_as
from sparsekit.interchange.hfdir import reader_config
from sparsekit.interchange.imports import load_quantized
from sparsekit.interchange.proof import verify_dense
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid, QuantizedWeight
from sparsekit.state import LinearState

export_dense = partial(export_as, FORMATS["dense"])
export_gptq = partial(export_as, FORMATS["gptq"])

TOKENS = torch.arange(24).remainder(96).reshape(2, 12)


class View:
    """The smallest thing that can be exported: a whole Transformers model in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.module = AutoModelForCausalLM.from_pretrained(path).eval()
        self.config = self.module.config
        self.dtype = self.compute_dtype = torch.float32
        self.device = torch.device("cpu")
        self.trust_remote_code = False
        stem = "transformer.h" if hasattr(self.module, "transformer") else "model.layers"
        self.blocks = [f"{stem}.{i}" for i in range(self.config.num_hidden_layers)]

    def linear_names(self, index: int) -> list[str]:
        block = self.module.get_submodule(self.blocks[index])
        kinds = (nn.Linear, Conv1D)
        return [f"{self.blocks[index]}.{name}" for name, m in block.named_modules() if isinstance(m, kinds)]

    def transposed(self, name: str) -> bool:
        return isinstance(self.module.get_submodule(name), Conv1D)

    def form(self, name: str) -> str:
        return "transposed" if self.transposed(name) else "same"

    def dense_block(self, index: int) -> BlockState:
        weights = {name: self.module.get_submodule(name).weight.detach() for name in self.linear_names(index)}
        linears = {n: LinearState(n, (w.T if self.transposed(n) else w).clone()) for n, w in weights.items()}
        prefix, own = f"{self.blocks[index]}.", {f"{name}.weight" for name in linears}
        params = {n: p.detach() for n, p in self.module.named_parameters() if n.startswith(prefix) and n not in own}
        return BlockState(linears, params)

    def to_hf(self, index: int, block: BlockState) -> dict[str, torch.Tensor]:
        weights = {n: state.weight.T if self.transposed(n) else state.weight for n, state in block.linears.items()}
        return {f"{n}.weight": w.to(self.dtype) for n, w in weights.items()} | dict(block.params)

    def rest_to_hf(self) -> dict[str, torch.Tensor]:
        inside = tuple(f"{block}." for block in self.blocks)
        return {name: tensor for name, tensor in self.module.state_dict().items() if not name.startswith(inside)}


def save(model, path: Path) -> View:
    with torch.no_grad():  # logits of a size that tells models apart
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.2)
    model.save_pretrained(path)
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "TokenizersBackend", "model_max_length": 64})
    write_json(path / "tokenizer.json", {"version": "1.0"})
    return View(path)


def llama(**changes) -> LlamaForCausalLM:
    settings = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 96, "max_position_embeddings": 64, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


@pytest.fixture
def view(tmp_path) -> View:
    return save(llama(), tmp_path / "model")


def quantize(state: LinearState, bits: int = 4, group: int = 32, symmetric: bool = True) -> LinearState:
    grouped = state.weight.reshape(state.source.shape[0], -1, group)
    grid = Grid.fit(grouped, bits, symmetric=symmetric)
    codes = grid.encode(grouped).reshape(state.source.shape)
    return state.with_quantized(QuantizedWeight.of(codes, grid, group_size=group, symmetric=symmetric))


def blocks_of(view: View, change):
    """Dense blocks with `change` applied to every linear."""

    def block(index: int) -> BlockState:
        dense = view.dense_block(index)
        return BlockState({name: change(state) for name, state in dense.linears.items()}, dense.params)

    return block


def pruned(state: LinearState) -> LinearState:
    return state.masked(Pattern(2, 4).keep(state.source.abs()))


def reference_logits(view: View, blocks) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(view.path)
    for index in range(len(view.blocks)):
        model.load_state_dict(view.to_hf(index, blocks(index)), strict=False)
    with torch.inference_mode():
        return model(TOKENS).logits


def patterns(view: View) -> dict[str, Pattern]:
    return {name: Pattern(2, 4) for i in range(len(view.blocks)) for name in view.linear_names(i)}


def unpacked(directory: Path) -> dict[str, QuantizedWeight]:
    return {name: state.quantized for name, state in load_quantized(directory).items()}


def test_dense_export_computes_the_same_logits(view, tmp_path):
    blocks = blocks_of(view, pruned)
    report = export_dense(view, blocks, tmp_path / "out", patterns=patterns(view)).as_dict()
    logits = reference_logits(view, blocks)
    assert verify_dense(tmp_path / "out", TOKENS, logits, view) == 0.0
    assert not torch.equal(logits, reference_logits(view, view.dense_block))
    with pytest.raises(CheckpointError, match="computes other logits"):
        verify_dense(tmp_path / "out", TOKENS, logits + 1, view)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in tensors  # tied
    assert float((tensors["model.layers.0.mlp.up_proj.weight"] == 0).float().mean()) == 0.5
    config = read_json(tmp_path / "out" / "config.json")
    assert "sparsity_config" not in config and "quantization_config" not in config
    about = read_json(tmp_path / "out" / "sparsekit.json")
    layer = about["linears"]["model.layers.1.mlp.down_proj"]
    assert (layer["pattern"], layer["violations"], layer["groups"]) == ("2:4", 0, 64 * 96 // 4)
    assert report["parameters"] == sum(p.numel() for p in view.module.parameters())


def test_config_and_tokenizer_for_transformers_4(view, tmp_path):
    export_dense(view, view.dense_block, tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    assert config["rope_theta"] == 500000.0
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert read_json(tmp_path / "out" / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_scaled_rope_in_both_forms(tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    view = save(llama(rope_parameters=rope), tmp_path / "model")
    export_dense(view, view.dense_block, tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    assert config["rope_scaling"]["factor"] == 8.0
    assert config["rope_scaling"]["type"] == config["rope_scaling"]["rope_type"] == "llama3"
    assert "rope_theta" not in config["rope_scaling"]
    assert verify_dense(tmp_path / "out", TOKENS, reference_logits(view, view.dense_block), view) == 0.0
    nested, notes = reader_config({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, torch.bfloat16)
    assert "rope_theta" not in nested and len(notes) == 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_export_holds_exactly_the_integers(view, tmp_path, bits):
    blocks = blocks_of(view, lambda state: quantize(pruned(state), bits))
    report = export_gptq(view, blocks, tmp_path / "out", name="r", patterns=patterns(view))
    found = unpacked(tmp_path / "out")
    states = {name: state for index in range(2) for name, state in blocks(index).linears.items()}
    assert found.keys() == states.keys()
    for name, state in states.items():
        assert torch.equal(found[name].dequantize(), state.weight)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(name.endswith("_proj.weight") for name in tensors)
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= tensors.keys()
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert config["checkpoint_format"] == config["format"] == "gptq"
    assert config["meta"]["quantizer"][0].startswith("sparsekit:")
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (bits, 32, True, False)
    assert read_json(tmp_path / "out" / "quantize_config.json")["bits"] == bits
    weights = sum(state.source.numel() for state in states.values())
    assert report.bytes.codes == weights * bits // 8
    assert report.bytes.scales == weights // 32 * 2
    assert report.bytes.positions == 0


def odd(state: LinearState, kept_bits: int, top: int, group: int = 32) -> LinearState:
    """What training to odd levels up to `top` leaves: a symmetric grid of one bit more, only kept codes odd."""
    state = pruned(state)
    bits, grouped = kept_bits + 1, state.source.reshape(state.source.shape[0], -1, group)
    step = (grouped.abs().amax(-1) / top).half().float()
    levels = torch.floor(grouped / step.unsqueeze(-1) / 2).mul(2).add(1).clamp(-top, top)
    codes = (levels.reshape(state.source.shape) * state.mask + 2**kept_bits).to(torch.uint8)
    grid = Grid(step, torch.full_like(step, 2.0**kept_bits), bits)
    return state.with_quantized(QuantizedWeight.of(codes, grid, group_size=group, symmetric=True))


@pytest.mark.parametrize(
    ("levels", "bits", "top"), [("odd", 1, 1), ("odd", 2, 3), ("odd", 3, 7), ("odd", 4, 15), ("six", 3, 5)]
)
def test_compact_export_of_levels_without_zero(view, tmp_path, levels, bits, top):
    blocks = blocks_of(view, lambda state: odd(state, bits, top))
    report = export_as(FORMATS["sparsekit-24-compact"], view, blocks, tmp_path / "out", patterns=patterns(view))
    states = {name: state for index in range(2) for name, state in blocks(index).linears.items()}
    found = load_quantized(tmp_path / "out")
    assert found.keys() == states.keys()
    for name, state in states.items():
        assert found[name].quantized.equal(state.quantized)
        assert torch.equal(found[name].mask, state.mask)
    about = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert (about["bits"], about["levels"], about["version"]) == (bits, levels, 1)
    assert not (tmp_path / "out" / "sparsekit").exists()  # the patterns are the mask
    weights = sum(state.source.numel() for state in states.values())
    if levels == "six":  # a byte for a group, its positions too
        assert (report.bytes.codes, report.bytes.positions) == (weights // 4, 0)
        assert report.bits_per_weight == 2 + 16 / 32
    else:
        assert report.bytes.codes == weights * bits // 16
        expected = bits / 2 + 2 / 3 + 16 / 32
        assert report.bits_per_weight == pytest.approx(expected, abs=0.09)  # short rows end in part of a byte
    real = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert abs(report.bytes.total - real) <= 0.01 * real
    assert any(f"levels {levels}" in note for note in report.notes)


def test_masks_travel_beside_the_model(view, tmp_path):
    blocks = blocks_of(view, lambda state: quantize(pruned(state)))
    export_gptq(view, blocks, tmp_path / "out")
    about = read_json(tmp_path / "out" / "sparsekit.json")
    bits, metadata = read_tensors(tmp_path / "out" / about["masks"])
    shapes = json.loads(metadata["shapes"])
    for name, state in blocks(1).linears.items():
        assert torch.equal(unpack_mask(bits[name], shapes[name]), state.mask)
    # loaders read every *.safetensors beside the model, so the masks are not there
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    digest = hfdir.sha256_file(tmp_path / "out" / "model.safetensors")
    assert about["files"]["model.safetensors"]["sha256"] == digest


def test_asymmetric_goes_to_version_2_and_whole_rows_to_minus_1(view, tmp_path):
    blocks = blocks_of(view, lambda state: quantize(state, symmetric=False))
    report = export_gptq(view, blocks, tmp_path / "asym")
    assert report.format == "gptq_v2"
    assert {note.engine.split()[0]: note.verdict for note in report.engines} == {
        "Transformers": "not checked", "auto-gptq": "misreads", "vLLM": "refuses"
    }  # fmt: skip
    for name, weight in unpacked(tmp_path / "asym").items():
        state = blocks(int(name.split(".")[2])).linears[name]
        assert torch.equal(weight.dequantize(), state.weight)
    export_gptq(view, blocks_of(view, lambda s: quantize(s, group=s.source.shape[1])), tmp_path / "rows")
    assert read_json(tmp_path / "rows" / "config.json")["quantization_config"]["group_size"] == -1


def test_linears_left_dense_are_named(view, tmp_path):
    blocks = blocks_of(view, lambda state: state if state.name.endswith("down_proj") else quantize(state))
    report = export_gptq(view, blocks, tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert list(config["dynamic"]) == [rf"-:^model\.layers\.{i}\.mlp\.down_proj$" for i in range(2)]
    assert any("2 linears inside the blocks stay dense" in note for note in report.notes)
    assert {note.verdict for note in report.engines} == {"not checked", "misreads"}


def test_conv1d_is_packed_as_a_linear(tmp_path):
    config = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=96, n_positions=64, bos_token_id=0, eos_token_id=0)
    view = save(GPT2LMHeadModel(config), tmp_path / "model")
    blocks = blocks_of(view, quantize)
    export_dense(view, blocks, tmp_path / "dense")
    assert verify_dense(tmp_path / "dense", TOKENS, reference_logits(view, blocks), view) == 0.0
    export_gptq(view, blocks, tmp_path / "gptq")
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    assert tensors["transformer.h.0.attn.c_attn.qweight"].shape == (64 // 8, 192)
    assert tensors["transformer.h.0.attn.c_attn.bias"].shape == (192,)
    name = "transformer.h.1.mlp.c_proj"
    assert torch.equal(unpacked(tmp_path / "gptq")[name].dequantize(), blocks(1).linears[name].weight)


def failing(view: View, tmp_path: Path, change, message: str, **arguments) -> None:
    with pytest.raises(CheckpointError, match=message):
        export_gptq(view, blocks_of(view, change), tmp_path / "out", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_gptq_cannot_say_is_named_before_anything_is_written(view, tmp_path):
    def mixed(state):
        return quantize(state, 8 if "down" in state.name else 4)

    def groups(state):
        return quantize(state, group=16 if "down" in state.name else 32)

    failing(view, tmp_path, lambda state: state, "no linear is quantized")
    failing(view, tmp_path, mixed, "one setting.*4 bits symmetric.*8 bits symmetric.*down_proj")
    failing(view, tmp_path, groups, "one group size.*group size 16.*down_proj")
    failing(view, tmp_path, lambda state: quantize(state, 5), r"q_proj.*and 10 more: 5 bits have no GPTQ layout")
    asymmetric = blocks_of(view, lambda state: quantize(state.updated(state.source.abs()), symmetric=False))
    with pytest.raises(CheckpointError, match="gptq_v2, or quantize symmetrically"):
        export_gptq(view, asymmetric, tmp_path / "out", layout="gptq")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_fused_tensors_have_no_layout(view, tmp_path, monkeypatch):
    monkeypatch.setattr(View, "form", lambda self, name: "expert" if "up_proj" in name else "same")
    failing(view, tmp_path, quantize, "layers.0.mlp.up_proj.*fused tensor")


def test_a_broken_pattern_is_not_exported(view, tmp_path):
    with pytest.raises(PatternError, match=r"q_proj: \d+ groups break the 2:4 pattern"):
        export_dense(view, view.dense_block, tmp_path / "out", patterns=patterns(view))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("where", ["shard", "sync", "config"])
def test_a_full_disk_leaves_nothing(view, tmp_path, monkeypatch, where):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = {
        "shard": "os.fsync",
        "sync": "sparsekit.interchange.hfdir._sync",
        "config": "sparsekit.interchange.export.write_json",
    }
    with monkeypatch.context() as patch:
        patch.setattr(target[where], full)
        with pytest.raises(CheckpointError, match="No space left"):
            export_dense(view, view.dense_block, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_earlier_export_is_replaced_whole_or_kept(view, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export_gptq(view, blocks_of(view, quantize), out)
    before = {path.name for path in out.iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(hfdir, "write_tensors", full)
        with pytest.raises(CheckpointError):
            export_dense(view, view.dense_block, out)
    assert {path.name for path in out.iterdir()} == before
    (tmp_path / ".out.1.export").mkdir()  # a killed process left it
    export_dense(view, view.dense_block, out)
    assert "quantize_config.json" not in {path.name for path in out.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    monkeypatch.setattr(hfdir, "_exchange", lambda one, two: False)  # a system without renameat2
    export_gptq(view, blocks_of(view, quantize), out)
    assert {path.name for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_directories_that_are_no_exports_are_left_alone(view, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds no sparsekit export"):
        export_dense(view, view.dense_block, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    with pytest.raises(CheckpointError, match="is the model itself"):
        export_dense(view, view.dense_block, view.path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        export_dense(view, view.dense_block, tmp_path / "file" / "out")


def test_bytes_are_those_of_the_files_and_shards_have_an_index(view, tmp_path):
    for export in (export_dense, export_gptq):
        blocks = blocks_of(view, quantize)
        report = export(view, blocks, tmp_path / "out", max_shard=40_000).as_dict()
        shards = sorted((tmp_path / "out").glob("*.safetensors"))
        assert len(shards) > 1
        real = sum(path.stat().st_size for path in shards)
        assert report["bytes"]["files"] == real
        assert abs(report["bytes"]["total"] - real) <= 0.01 * real
        index = read_json(tmp_path / "out" / "model.safetensors.index.json")
        assert set(index["weight_map"].values()) == {path.name for path in shards}
        assert report["ratio_fp32"] == pytest.approx(4 * report["parameters"] / real)
        assert report["ratio_fp16"] == pytest.approx(report["ratio_fp32"] / 2)
        assert json.loads(json.dumps(report)) == report
        if export is export_dense:
            assert verify_dense(tmp_path / "out", TOKENS, reference_logits(view, blocks), view) == 0.0


def test_engines_say_what_was_tried():
    def verdicts(**changes) -> list[str]:
        setting = {
            "bits": 4, "group_size": 64, "symmetric": True, "act_order": False, "layout": "gptq",
            "complete": True,
        }  # fmt: skip
        notes = FORMATS["gptq"].engines(Setting(**(setting | changes)))
        assert all(note.checked == "2026-11-24" and note.sentence.endswith(".") for note in notes)
        return [note.verdict for note in notes]

    assert verdicts() == ["loads", "loads", "loads"]
    assert verdicts(act_order=True) == ["loads", "loads", "refuses"]
    assert verdicts(symmetric=False) == ["loads", "loads", "refuses"]
    assert verdicts(bits=8) == ["loads", "loads", "refuses"]
