"""Running from packed weights: storage, loading, paths, generation, and the command."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import children
import families
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import sparsekit as sk
from sparsekit.branch import Branch
from sparsekit.cli import main
from sparsekit.errors import CheckpointError, ModelError, RecipeError
from sparsekit.evaluation import decoding
from sparsekit.evaluation.decoding import packed_in_place, tokens_per_second
from sparsekit.files import read_json, write_json
from sparsekit.formats import FORMATS
from sparsekit.inference import packed as packing
from sparsekit.inference.decoder import Decoder
from sparsekit.inference.generate import Stats, context_of, stream
from sparsekit.inference.linear import PackedLinear, Product, fused
from sparsekit.inference.load import bytes_of, forms_of, load_model, products
from sparsekit.inference.packed import dequantize, multiply_reference, pack, pack_file, stacked, why_not_packed
from sparsekit.interchange.adapter import attach_adapter, write_adapter
from sparsekit.models.chain import Chain
from sparsekit.models.norms import single_kernel_norms
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid, QuantizedWeight

TINY = Path(sk.__file__).parent / "assets" / "tiny"
INTEGERS = [name for name, form in FORMATS.items() if form.storage is not None]
RECIPE = """\
name: packed
output: {output}
model: {{path: {model}}}
data:
  evaluation: {{heldout: {{path: builtin:heldout, seq_len: 32, samples: 2}}}}
steps: {steps}
evaluate: {{perplexity: [heldout]}}
export: {{formats: [{formats}]}}
"""
SPARSE = '[{method: magnitude, pattern: "2:4"}, {method: rtn, bits: 4, group_size: 32}]'
TOKENS = torch.arange(3, 27).remainder(96).reshape(1, 24)


def integers(out: int, columns: int, size: int, *, sparse: bool, symmetric: bool = True, bits: int = 4):
    """A made-up weight on a grid."""
    weight = torch.randn(out, columns)
    weight = weight * Pattern(2, 4).keep(weight.abs()) if sparse else weight
    grouped = weight.view(out, -1, size)
    grid = Grid.fit(grouped, bits, symmetric=symmetric)
    return QuantizedWeight.of(grid.encode(grouped).view(out, columns), grid, group_size=size, symmetric=symmetric)


def export(directory: Path, model: Path | str, steps: str, formats: str) -> Path:
    """Compress a model; returns where its exports are."""
    recipe = directory / "recipe.yaml"
    recipe.write_text(RECIPE.format(output=directory / "run", model=model, steps=steps, formats=formats))
    result = CliRunner().invoke(main, ["run", str(recipe)])
    assert result.exit_code == 0, result.output
    return directory / "run" / "export"


def dequantized(directory: Path, dense: Path) -> nn.Module:
    """The model with float32 weights, through transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    for name, state in sk.load_quantized(directory).items():
        model.get_submodule(name).weight.data.copy_(state.weight)
    return model


def greedy(model, count: int) -> list[int]:
    return model.generate(TOKENS, max_new_tokens=count, do_sample=False, attention_mask=torch.ones_like(TOKENS))[
        0, TOKENS.shape[1] :
    ].tolist()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Exports of the embedded model, 2:4 and int4."""
    directory = tmp_path_factory.mktemp("tiny")
    return export(directory, "builtin:tiny", SPARSE.replace("32", "64"), "dense, gptq, sparsekit-24")


@pytest.fixture(scope="session")
def exports(random_model, tmp_path_factory) -> Path:
    """Every format of the random model, 2:4 and int4."""
    return export(tmp_path_factory.mktemp("packed"), random_model, SPARSE, ", ".join(FORMATS))


# storage


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("shape", [(8, 32, 32), (96, 256, 64), (33, 128, 128)], ids=str)
def test_packed_weights_are_exactly_the_integers(sparse, shape, monkeypatch):
    torch.manual_seed(0)
    out, columns, size = shape
    weight = integers(out, columns, size, sparse=sparse)
    held = pack(weight)
    assert (held.positions is not None) is sparse
    assert held.nbytes * 8 == weight.codes.numel() * (3 if sparse else 4) + 16 * weight.scale.numel()
    x = torch.randn(5, columns)
    expected = weight.dequantize()
    assert torch.equal(dequantize(held, torch.float32), expected)
    assert torch.equal(dequantize(held, torch.bfloat16), expected.bfloat16())
    torch.testing.assert_close(multiply_reference(x, held), x @ expected.t(), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(packing, "CHUNK", 3 * columns)  # three rows at a time, and the last piece smaller
    assert torch.equal(dequantize(held, torch.float32), expected)
    torch.testing.assert_close(multiply_reference(x, held), x @ expected.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3])
def test_fewer_bits_are_the_same_weights_at_four(bits):
    weight = integers(16, 64, 32, sparse=True, bits=bits)
    assert torch.equal(dequantize(pack(weight), torch.float32), weight.dequantize())


def test_rows_below_each_other_are_one_weight():
    torch.manual_seed(0)
    weights = [integers(out, 64, 32, sparse=True) for out in (8, 16, 24)]
    whole = stacked([pack(weight) for weight in weights])
    assert whole.shape == (48, 64)
    assert torch.equal(dequantize(whole, torch.float32), torch.cat([weight.dequantize() for weight in weights]))
    with pytest.raises(ValueError, match="different kinds"):
        stacked([pack(weights[0]), pack(integers(8, 64, 32, sparse=False))])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"bits": 5}, "5 bits"),
        ({"symmetric": False}, "asymmetric"),
        ({"columns": 36, "size": 36}, "not a multiple of 8"),
    ],
)
def test_what_cannot_be_packed_says_why(change, why):
    given = {"columns": 64, "size": 32, "symmetric": True, "bits": 4} | change
    weight = integers(
        8, given["columns"], given["size"], sparse=False, symmetric=given["symmetric"], bits=given["bits"]
    )
    assert why in why_not_packed(weight)


# linears


def linears(count: int, bias: bool = True) -> tuple[list[PackedLinear], list[nn.Linear]]:
    """Packed linears with one input, and the same ones dense."""
    torch.manual_seed(0)
    weights = [integers(out, 64, 32, sparse=True) for out in (16, 8, 8)[:count]]
    biases = [torch.randn(len(w.codes)) if bias and index != 1 else None for index, w in enumerate(weights)]
    dense = []
    for weight, given in zip(weights, biases, strict=True):
        linear = nn.Linear(64, len(weight.codes), bias=given is not None).requires_grad_(False)
        linear.weight.copy_(weight.dequantize())
        if given is not None:
            linear.bias.copy_(given)
        dense.append(linear)
    held = fused([(pack(w), b) for w, b in zip(weights, biases, strict=True)], torch.float32)
    return held, dense


def same(one: torch.Tensor, two: torch.Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_one_product_serves_all_linears_with_one_input(monkeypatch):
    held, dense = linears(3)
    product, calls = held[0].product, []
    monkeypatch.setattr(product, "forward", lambda x, real=product.forward: calls.append(1) or real(x))
    for shape in ((64,), (1, 64), (2, 7, 64)):
        x = torch.randn(*shape)
        for one, two in zip(held, dense, strict=True):
            same(one(x), two(x))
    assert len(calls) == 3
    assert held[0].shared.left is None  # nothing is kept beyond the last linear


def test_a_product_left_for_another_input_is_not_taken():
    held, dense = linears(3)
    x, other = torch.randn(2, 64), torch.randn(2, 64)
    held[0](x)
    same(held[1](other), dense[1](other))
    held[0](x)
    x.mul_(2)  # the same tensor, changed in place
    same(held[1](x), dense[1](x))
    same(held[2](x), dense[2](x))  # before the first one
    with torch.inference_mode():
        for order in ((2, 0, 1), (1, 2, 0), (0, 0, 2, 1)):
            x = torch.randn(2, 64)
            for index in order:
                same(held[index](x), dense[index](x))


def test_threads_do_not_take_each_others_products():
    held, dense = linears(3)
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(100):
            x = torch.randn(2, 64, generator=generator)
            for one, two in zip(held, dense, strict=True):
                if not torch.allclose(one(x), two(x), rtol=1e-4, atol=1e-4):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_scales_are_not_rounded_when_the_model_is():
    held, _ = linears(1)
    before = held[0].product.scales.clone()
    held[0].to(torch.bfloat16)
    assert held[0].product.scales.dtype == torch.float16
    assert torch.equal(held[0].product.scales, before)


# loading


@pytest.mark.parametrize("name", INTEGERS)
def test_every_format_computes_what_the_dequantized_model_does(exports, name):
    expected = dequantized(exports / name, exports / "dense")
    model = sk.load(exports / name, device="cpu")
    assert type(model) is type(expected)
    assert forms_of(model) == {"2:4 + int4": 8}  # of 14 linears: q, k, v and gate, up are one
    assert not any(isinstance(module, nn.Linear) for module in model.model.modules())
    with torch.no_grad():
        logits = expected(TOKENS).logits
        same(model(TOKENS).logits, logits)
    assert greedy(model, 24) == greedy(expected, 24)
    assert list(stream(model, TOKENS, max_tokens=24)) == greedy(expected, 24)


def test_in_bfloat16_a_cpu_multiplies_with_torchs_int4_product(tiny):
    model = sk.load(tiny / "sparsekit-24", device="cpu", dtype="bfloat16")
    expected = dequantized(tiny / "sparsekit-24", tiny / "dense")
    with torch.no_grad():
        found, logits = model(TOKENS).logits.float(), expected(TOKENS).logits
        dense = expected.bfloat16()(TOKENS).logits.float()
    own, usual = (float((each - logits).norm() / logits.norm()) for each in (found, dense))
    assert own < 2 * usual + 0.005  # no worse than bfloat16 arithmetic with the dequantized weights
    assert len(list(stream(model, TOKENS, max_tokens=8))) == 8


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_torchs_int4_product_has_the_same_weight(sparse):
    torch.manual_seed(0)
    weight = integers(48, 256, 64, sparse=sparse)
    expected, x = weight.dequantize(), torch.randn(7, 256).bfloat16()
    product = Product(pack(weight), None, torch.bfloat16)
    assert product.limit and not product.why_reference
    close = {"rtol": 2**-7, "atol": 1e-6}
    torch.testing.assert_close(product.dense().float(), expected, **close)
    exact = x.float() @ expected.t()
    assert float((product(x).float() - exact).norm() / exact.norm()) < 0.01
    assert product(x[:0]).shape == (0, 48)
    odd = Product(pack(integers(33, 128, 128, sparse=sparse)), None, torch.bfloat16)
    assert odd.limit == 0 and "no shape [33, 128]" in odd.why_reference
    assert odd(x[:, :128]).shape == (7, 33)


def test_a_dense_export_loads_as_it_is(exports):
    model = sk.load(exports / "dense", device="cpu")
    expected = AutoModelForCausalLM.from_pretrained(exports / "dense", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)
    assert not products(model)
    assert list(stream(model, TOKENS, max_tokens=12)) == greedy(expected, 12)


def test_models_tiny_takes_the_bytes_it_should(tiny):
    """Packed weights as in the file, everything else in float32, rotary tables, and nothing besides."""
    model = sk.load(tiny / "sparsekit-24", device="cpu")
    report = read_json(tiny.parent / "report.json")
    (ours,) = (entry["bytes"] for entry in report["exports"] if entry["format"] == "sparsekit-24")
    buffers = sum(buffer.nbytes for buffer in model.model.rotary_emb.buffers())
    assert bytes_of(model) == ours["codes"] + ours["positions"] + ours["scales"] + 2 * ours["dense"] + buffers
    assert bytes_of(sk.load(tiny / "gptq", device="cpu")) == bytes_of(model)
    half, weights = sk.load(tiny / "sparsekit-24", device="cpu", dtype="bfloat16"), 4 * ours["codes"]
    assert all(product.limit for product in products(half))  # torch's int4 product: 4 bits, two bfloat16 for a scale
    assert bytes_of(half) == weights // 2 + 2 * ours["scales"] + ours["dense"] + buffers


def test_greedy_text_of_models_tiny_is_that_of_the_dequantized_model(tiny):
    expected = dequantized(tiny / "sparsekit-24", tiny / "dense")
    model = sk.load(tiny / "sparsekit-24", device="cpu")
    assert list(stream(model, TOKENS, max_tokens=48)) == greedy(expected, 48)


@pytest.mark.parametrize(
    ("quantizer", "why"),
    [
        ("{method: rtn, bits: 8, group_size: 32}", "8 bits"),
        ("{method: rtn, bits: 4, group_size: 32, symmetric: false}", "asymmetric"),
        ("{method: gptq, bits: 4, group_size: 32, act_order: dynamic}", "act-order"),
    ],
)
def test_what_is_not_packed_is_said_once_and_right(random_model, tmp_path, quantizer, why):
    steps = f"[{quantizer}]"
    recipe = RECIPE.replace("data:\n", "data:\n  calibration: {{path: builtin:calibration, samples: 2, seq_len: 32}}\n")
    (tmp_path / "recipe.yaml").write_text(
        recipe.format(output=tmp_path / "run", model=random_model, steps=steps, formats="dense, gptq")
    )
    assert CliRunner().invoke(main, ["run", str(tmp_path / "recipe.yaml")]).exit_code == 0
    directory = tmp_path / "run" / "export"
    with pytest.warns(UserWarning, match=rf"^14 linears are held dense, not packed \(.*q_proj.*\): {why}") as said:
        model = sk.load(directory / "gptq", device="cpu")
    assert len(said) == 1
    expected = dequantized(directory / "gptq", directory / "dense")
    with torch.no_grad():
        same(model(TOKENS).logits, expected(TOKENS).logits)


def test_a_dense_int4_export_is_packed_dense(random_model, tmp_path):
    directory = export(tmp_path, random_model, "[{method: rtn, bits: 4, group_size: 32}]", "dense, gptq")
    model = sk.load(directory / "gptq", device="cpu")
    assert forms_of(model) == {"int4": 8}
    with torch.no_grad():
        same(model(TOKENS).logits, dequantized(directory / "gptq", directory / "dense")(TOKENS).logits)


def test_a_low_rank_branch_beside_an_export_is_computed(exports, tmp_path):
    directory = Path(shutil.copytree(exports / "sparsekit-24", tmp_path / "branched"))
    expected = dequantized(directory, exports / "dense")
    torch.manual_seed(0)
    branches = {
        f"model.layers.{index}.{name}": Branch(torch.randn(out, 8), torch.randn(8, 64), length=8)
        for index, name, out in ((0, "self_attn.k_proj", 32), (1, "mlp.gate_proj", 128))
    }
    write_adapter(directory, branches, torch.float32)
    with torch.no_grad():
        without = expected(TOKENS).logits
        attach_adapter(expected, directory)
        model = sk.load(directory, device="cpu")
        same(model(TOKENS).logits, expected(TOKENS).logits)
        assert not torch.allclose(model(TOKENS).logits, without, atol=1e-2)
    assert list(stream(model, TOKENS, max_tokens=8)) == greedy(expected, 8)


def test_damage_is_named(exports, tmp_path):
    held = {"values": torch.zeros(8, 8, dtype=torch.uint8), "positions": torch.zeros(8, 4, dtype=torch.uint8)}
    held["scales"] = torch.ones(8, 1, dtype=torch.float16)
    setting = FORMATS["sparsekit-24"].storage.setting(
        read_json(exports / "sparsekit-24" / "config.json")["quantization_config"]
    )
    with pytest.raises(CheckpointError, match="positions of a group must rise"):
        pack_file(held, setting)
    with pytest.raises(CheckpointError, match="does not divide"):
        pack_file(held | {"values": torch.zeros(8, 9, dtype=torch.uint8)}, setting)
    with pytest.raises(ModelError, match="no directory"):
        sk.load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="device 'gpu' is not one of"):
        sk.load(exports / "gptq", device="gpu")


def test_a_run_holds_its_model_packed_for_a_while(exports, monkeypatch):
    """As the deploy card does."""
    monkeypatch.setattr(decoding, "STEPS", 2)
    view = ModelView.open(exports / "gptq", dtype="float32", device="cpu")
    chain = Chain(view)
    with chain.forward() as forward:
        expected, whole = forward(TOKENS), bytes_of(view.module)
        with packed_in_place(chain) as form:
            assert form == "2:4 + int4, sparsekit without its kernel"
            same(forward(TOKENS), expected)
            assert not any(isinstance(module, nn.Linear) for module in view.module.model.modules())
            assert bytes_of(view.module) == bytes_of(sk.load(exports / "gptq", device="cpu")) < whole
            speed, eager = tokens_per_second(chain, 2, 8)
            assert speed > 0 and eager == "CUDA graphs need CUDA"
    with chain.forward() as forward:
        assert torch.equal(forward(TOKENS), expected)
    dense = Chain(ModelView.open(exports / "dense", device="cpu"))
    with dense.forward(), packed_in_place(dense) as form:
        assert form is None


# generation


class Spy(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_goes_on_as_with_transformers(family, tmp_path):
    """And its step asks nothing of the host, so that CUDA can record it; only mixtures of experts do."""
    expected = families.load(family, families.save(family, tmp_path))
    loaded = load_model(tmp_path, device="cpu")
    model = loaded.model
    renamed = family in (*families.MIXTURES, "gpt_neox")  # stored under other names than Transformers computes with
    assert ["the whole model was loaded on the host" in note for note in loaded.notes] == [True] * renamed
    assert list(stream(model, TOKENS, max_tokens=20)) == greedy(expected, 20)
    decoder = Decoder(model, 40)
    decoder.prefill(TOKENS)
    decoder.step()
    logits = decoder.logits.clone()
    decoder.prefill(TOKENS)
    decoder._norms = norms = single_kernel_norms(model)  # as on CUDA
    assert len(norms) == sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    decoder.step()
    same(decoder.logits, logits)
    assert not any("forward" in vars(module) for module, _ in norms)
    with Spy() as spy:
        decoder.step()
    asks = {name for name in spy.seen if re.search("_local_scalar|nonzero|unique|masked_select|lift_fresh", name)}
    assert bool(asks) is (family in families.MIXTURES), asks


def test_a_decoder_reads_another_prompt_and_several_at_once(exports):
    model = sk.load(exports / "sparsekit-24", device="cpu")
    decoder = Decoder(model, 32)
    for start in (0, 7):
        prompt = TOKENS[:, start : start + 16]
        decoder.prefill(prompt)
        found = [decoder.read()()[0]]
        for _ in range(8):
            decoder.step()
            found += decoder.read()()
        assert found == list(stream(model, prompt, max_tokens=9))
    both = Decoder(model, 32, batch=2)
    both.prefill(torch.cat([TOKENS[:, :16], TOKENS[:, 7:23]]))
    both.step()
    assert both.read()() == [list(stream(model, TOKENS[:, at : at + 16], max_tokens=2))[1] for at in (0, 7)]


def test_torch_compile_sees_the_whole_step_as_one_graph(exports):
    """With its real backend that takes a minute; without one it is what matters here: no break in the graph."""
    model = sk.load(exports / "sparsekit-24", device="cpu")
    decoder = Decoder(model, 40)
    decoder._call = torch.compile(model.forward, dynamic=False, fullgraph=True, backend="eager")
    decoder.prefill(TOKENS)
    found = decoder.read()()
    for _ in range(8):
        decoder.step()
        found += decoder.read()()
    assert found == list(stream(model, TOKENS, max_tokens=9))


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(exports):
    model = sk.load(exports / "sparsekit-24", device="cpu")
    decoder = Decoder(model, 40, fuse=True)

    def refuse(**given):
        raise RuntimeError("no compiler\nand more")

    decoder._call = refuse
    decoder.prefill(TOKENS)
    found = decoder.read()()
    decoder.capture()
    assert decoder.unfused == "no compiler" and decoder.eager == "CUDA graphs need CUDA"
    for _ in range(8):
        decoder.step()
        found += decoder.read()()
    assert found == list(stream(model, TOKENS, max_tokens=9))


class StrangeRMSNorm(nn.Module):
    """Named like a norm, and is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(8)), 1e-6

    def forward(self, x):
        return self.weight * x / x.abs().mean(-1, keepdim=True)


def test_a_norm_that_computes_something_else_is_left_alone():
    assert single_kernel_norms(StrangeRMSNorm()) == []


def test_drawing_follows_the_seed(exports):
    model = sk.load(exports / "sparsekit-24", device="cpu")
    drawn = [list(stream(model, TOKENS, max_tokens=12, temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    decoder = Decoder(model, 32)
    decoder.prefill(TOKENS)
    decoder.logits.fill_(-20.0)[0, :3] = torch.tensor([0.0, 1.0, 2.0])
    generator, counts = torch.Generator().manual_seed(0), Counter()
    for _ in range(2000):
        decoder.choose(1.0, generator)
        counts[decoder.read()()[0]] += 1
    for token, chance in enumerate(torch.softmax(torch.tensor([0.0, 1.0, 2.0]), 0).tolist()):
        assert counts[token] / 2000 == pytest.approx(chance, abs=0.04)


def test_a_generation_ends_at_an_end_of_text_and_at_the_context(exports):
    model = sk.load(exports / "sparsekit-24", device="cpu")
    whole = list(stream(model, TOKENS, max_tokens=8))
    model.generation_config.eos_token_id = [whole[2]]
    stats = Stats()
    assert list(stream(model, TOKENS, max_tokens=8, stats=stats)) == whole[: whole.index(whole[2]) + 1]
    assert stats.ended == "end of text"
    model.generation_config.eos_token_id = None
    room = context_of(model) - TOKENS.shape[1]
    assert len(list(stream(model, TOKENS, max_tokens=10**6, stats=stats))) == room == stats.tokens
    assert stats.ended == "context" and stats.per_second > 0
    with pytest.raises(RecipeError, match="prompt has 128 tokens and the model's context is 128"):
        stream(model, torch.ones(1, 128, dtype=torch.long))


# the command


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["generate", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_generate_prints_what_the_model_goes_on_with(tiny):
    from transformers import AutoTokenizer

    code, text, told = call(tiny / "sparsekit-24", "--prompt", "Once upon a time", "--max-tokens", 20, "--stats")
    assert code == 0, told
    tokenizer = AutoTokenizer.from_pretrained(tiny / "dense")
    ids = tokenizer("Once upon a time", return_tensors="pt")
    expected = dequantized(tiny / "sparsekit-24", tiny / "dense").generate(**ids, max_new_tokens=20, do_sample=False)
    assert text == tokenizer.decode(expected[0, ids.input_ids.shape[1] :], skip_special_tokens=True) + "\n"
    assert re.search(
        r"tokens of prompt, 20 generated, ended by length\nfirst token after .* ms, then .* tokens/s", told
    )
    assert "no CUDA graph: CUDA graphs need CUDA" in told
    assert "24 packed weights of 2:4 + int4" in told
    drawn = [
        call(TINY, "--prompt", "Once", "--max-tokens", 5, "--temperature", 1.5, "--seed", seed) for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "--prompt", "a"), "model nowhere is no directory"),
        ((TINY.parent, "--prompt", "a"), "holds no config.json"),
        ((TINY, "--prompt", "  "), "the prompt is empty"),
        ((TINY, "--prompt", "word " * 5000), "context is"),
        ((TINY, "--prompt", "a", "--chat"), "a tokenizer with a chat template"),
        ((TINY, "--prompt", "a", "--max-tokens", 0), "--max-tokens is 0"),
        ((TINY, "--prompt", "a", "--temperature", -1), "--temperature is -1"),
        ((TINY, "--prompt", "a", "--seed", 2**70), "--seed is 1180591620717411303424; 0 to 9223372036854775807"),
        ((TINY, "--prompt", b"a\xff".decode("utf-8", "surrogateescape")), "the prompt is no UTF-8 text"),
        ((TINY, "--prompt", "a", "--device", "gpu"), "device 'gpu'"),
        ((TINY, "--prompt", "a", "--device", "meta"), "device 'meta' is not one of"),
        ((TINY, "--prompt", "a", "--device", "mps"), "device 'mps' is not one of"),
        ((TINY, "--prompt", "a", "--dtype", "float8"), "dtype 'float8' is not one of"),
    ],
)
def test_mistakes_are_named(arguments, message):
    code, text, told = call(*arguments)
    assert (code, text) == (2, "")
    assert message in told


def test_a_model_without_its_tokenizer_is_named(tmp_path):
    families.save("llama", tmp_path)
    code, _, told = call(tmp_path, "--prompt", "a")
    assert code == 2 and "holds no tokenizer" in told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "generation_config.json is no JSON: "),
        ("[]", "generation_config.json is no JSON object"),
        ('{"eos_token_id": "x"}', "generation_config.json: eos_token_id is 'x', expected a token"),
        ('{"eos_token_id": [2, 3]}', None),
        ('{"eos_token_id": [2, "x"]}', "eos_token_id is [2, 'x'], expected a token"),
    ],
)
def test_what_a_directory_says_about_generating_is_checked(tiny, tmp_path, content, message):
    directory = Path(shutil.copytree(tiny / "dense", tmp_path / "model"))
    (directory / "generation_config.json").write_text(content)
    code, text, told = call(directory, "--prompt", "Once", "--max-tokens", 1)
    assert code == (2 if message else 0), told
    assert message is None or (text == "" and message in told)


def test_the_reason_why_a_model_cannot_be_built_is_told(tiny, tmp_path):
    directory = Path(shutil.copytree(tiny / "dense", tmp_path / "model"))
    write_json(directory / "config.json", read_json(directory / "config.json") | {"hidden_size": 513})
    code, _, told = call(directory, "--prompt", "Once")
    assert code == 2 and "hidden size (513) is not a multiple" in told


def test_settings_are_refused_before_the_model_is_read(tmp_path):
    code, _, told = call(tmp_path, "--prompt", "a", "--max-tokens", 0)
    assert code == 2 and "--max-tokens is 0" in told


def test_chat_puts_the_prompt_into_the_template(tiny, tmp_path):
    directory = Path(shutil.copytree(tiny / "dense", tmp_path / "chat"))
    settings = read_json(directory / "tokenizer_config.json")
    template = "{% for m in messages %}Question: {{ m.content }}\nAnswer:{% endfor %}"
    write_json(directory / "tokenizer_config.json", settings | {"chat_template": template})
    chat = call(directory, "--prompt", "Who?", "--chat", "--max-tokens", 8)
    assert chat[:2] == call(tiny / "dense", "--prompt", "Question: Who?\nAnswer:", "--max-tokens", 8)[:2]
    assert chat[0] == 0 and "note: tokenizer_config.json was changed since the export" in chat[2]
    assert chat[:2] != call(tiny / "dense", "--prompt", "Who?", "--max-tokens", 8)[:2]


def test_ctrl_c_ends_it(tmp_path):
    log, asked = tmp_path / "log", ("generate", str(TINY), "--prompt", "a", "--max-tokens", "1000")
    process = children.started(children.command, *asked, log=log)
    while not (log.exists() and log.read_text()):
        assert process.is_alive(), children.said(log)
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    process.join(timeout=30)
    assert process.exitcode == 130
    text = log.read_text()
    assert len(text) > 1 and text.endswith("\n")
    assert children.errors_of(log).read_text().strip() == "stopped"
