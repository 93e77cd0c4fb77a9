"""On CUDA: the decoding step as a graph, every family, the paths of a packed linear, memory."""

from __future__ import annotations

import gc
from pathlib import Path

import families
import pytest
import torch
from test_inference import SPARSE, TOKENS, export, integers

import sparsekit as sk
from sparsekit.inference.decoder import Decoder
from sparsekit.inference.generate import Stats, stream
from sparsekit.inference.linear import Product, fused
from sparsekit.inference.load import bytes_of, products
from sparsekit.inference.packed import dequantize, pack

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("cuda"), "builtin:tiny", SPARSE.replace("32", "64"), "gptq, sparsekit-24")


def steps(decoder: Decoder, count: int) -> tuple[list[int], list[torch.Tensor]]:
    decoder.prefill(TOKENS)
    tokens, logits = decoder.read()(), []
    for _ in range(count):
        decoder.step()
        logits.append(decoder.logits.clone())
        tokens += decoder.read()()
    return tokens, logits


@pytest.mark.parametrize("form", ["gptq", "sparsekit-24"])
def test_a_recorded_step_computes_what_the_step_computes(tiny, form):
    model = sk.load(tiny / form, device="cuda")
    assert model.dtype == torch.bfloat16
    decoder = Decoder(model, 64)
    expected, logits = steps(decoder, 30)
    decoder.prefill(TOKENS)
    decoder.capture()
    assert decoder.eager == ""
    found, recorded = steps(decoder, 30)
    assert found == expected
    assert all(torch.equal(one, two) for one, two in zip(recorded, logits, strict=True))
    stats = Stats()
    assert list(stream(model, TOKENS.cuda(), max_tokens=31, stats=stats)) == expected
    assert stats.eager == "" and stats.per_second > 0 and stats.peak > stats.model_bytes
    drawn = [list(stream(model, TOKENS, max_tokens=20, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.filterwarnings("ignore:.*stored under other names")  # as some families are
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_recorded_or_says_why_not(family, tmp_path):
    families.save(family, tmp_path)
    model = sk.load(tmp_path, device="cuda", dtype="float32")
    decoder = Decoder(model, 40)
    expected, _ = steps(decoder, 12)
    decoder.prefill(TOKENS)
    decoder.capture()
    mixture = family in families.MIXTURES
    assert ("cannot be recorded" in decoder.eager) if mixture else decoder.eager == ""
    assert steps(decoder, 12)[0] == expected
    if not mixture:
        torch.cuda.set_sync_debug_mode("error")
        try:
            decoder._step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_path_multiplies_with_the_same_weight(sparse, dtype):
    torch.manual_seed(0)
    weight = integers(1024, 2048, 128, sparse=sparse)
    expected = weight.dequantize().cuda()
    product = Product(pack(weight).to("cuda"), None, dtype)
    torch.testing.assert_close(product.dense().float(), expected.to(dtype).float(), rtol=2**-7, atol=1e-6)
    for tokens in (1, 3, 16, 64, 65, 512):
        x = torch.randn(tokens, 2048, device="cuda", dtype=dtype)
        exact = x.float() @ expected.t()
        error = (product(x).float() - exact).norm() / exact.norm()
        assert error < 0.01, (tokens, product.limit, float(error))
        assert torch.equal(product(x), product(x))


def test_a_product_of_several_linears_is_recorded():
    torch.manual_seed(0)
    weights = [integers(out, 1024, 128, sparse=True) for out in (512, 128, 128)]
    held = fused([(pack(weight).to("cuda"), None) for weight in weights], torch.bfloat16)
    x = torch.randn(1, 1024, device="cuda", dtype=torch.bfloat16)
    for module in held:
        module(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [module(x) for module in held]
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        for output, weight in zip(outputs, weights, strict=True):
            exact = x.float() @ weight.dequantize().cuda().t()
            assert (output.float() - exact).norm() < 0.01 * exact.norm()


def test_only_packed_weights_are_in_memory(tiny):
    first = sk.load(tiny / "sparsekit-24", device="cuda")  # cuBLAS allocates its workspace once
    first(torch.zeros(1, 128, dtype=torch.long, device="cuda"), logits_to_keep=1)
    del first
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = sk.load(tiny / "sparsekit-24", device="cuda")
    taken = torch.cuda.memory_allocated() - before
    tensors = 2 * sum(1 for _ in model.modules()) * 512  # the allocator rounds each up to 512 bytes
    assert bytes_of(model) <= taken <= bytes_of(model) + tensors
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        model(torch.zeros(1, 128, dtype=torch.long, device="cuda"), logits_to_keep=1)
    largest = max(product.out_features * product.in_features for product in products(model))
    assert torch.cuda.max_memory_allocated() - before - taken < 2 * largest + 16 * 2**20


def test_a_large_product_is_not_held_dense():
    weight = pack(integers(4096, 4096, 128, sparse=True)).to("cuda")
    product = Product(weight, None, torch.bfloat16)
    expected = dequantize(weight, torch.bfloat16)
    del weight
    product(torch.randn(256, 4096, device="cuda", dtype=torch.bfloat16))  # cuBLAS allocates its workspace once
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    product(torch.randn(256, 4096, device="cuda", dtype=torch.bfloat16))
    assert torch.cuda.memory_allocated() <= before + 2**20
    assert torch.equal(product.dense(), expected)
