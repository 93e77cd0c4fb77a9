"""The decode kernels against their reference, on CUDA."""

import pytest
import torch
from packed import random_packed

from sparsekit.inference.packed import dequantize
from sparsekit.kernels.decode import AT_ONCE, DTYPES, MAX_TOKENS, Setting, expand, multiply
from sparsekit.kernels.decode_layout import arrange

pytestmark = pytest.mark.gpu
SHAPES = [(40, 160, 32, True), (192, 1024, 64, True), (1024, 4096, 128, True), (4096, 1408, 128, True),
          (64, 512, 512, True), (40, 256, 128, False), (192, 320, 64, False), (1024, 4096, 128, False)]  # fmt: skip
CUTS = [
    None,
    Setting(1, 4, 2, 3, 3),
    Setting(2, 2, 2, 1, 2),
    Setting(3, 1, 4, 1, 4),
    Setting(2, 2, 2, 1, 2, split=2),
]  # each is compiled for every count of eight tokens
BOUND = {torch.float16: 1e-3, torch.bfloat16: 6e-3}  # of the norm; the result is rounded to the dtype


@pytest.mark.parametrize(("out", "columns", "group_size", "sparse"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_right_and_repeat(
    out: int, columns: int, group_size: int, sparse: bool, dtype: torch.dtype
) -> None:
    packed = random_packed(out, columns, group_size, sparse, "cuda")
    weight, full = arrange(packed), dequantize(packed, torch.float64)
    for tokens in (1, 8, 9, 17, AT_ONCE, MAX_TOKENS):
        x = torch.randn(tokens, columns, device="cuda").to(dtype)
        expected = x.double() @ full.T
        for cut in CUTS:
            if cut is not None and cut.split > 1 and torch.cuda.get_device_capability() < (9, 0):
                continue
            found = multiply(x, weight, cut)
            assert (found.double() - expected).norm() <= BOUND[dtype] * expected.norm(), (tokens, cut)
            assert torch.equal(found, multiply(x, weight, cut)), (tokens, cut)


@pytest.mark.parametrize(("out", "columns", "group_size", "sparse"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expansion_is_exact(out: int, columns: int, group_size: int, sparse: bool, dtype: torch.dtype) -> None:
    packed = random_packed(out, columns, group_size, sparse, "cuda")
    assert torch.equal(expand(arrange(packed), dtype), dequantize(packed, dtype))


def test_products_run_in_a_graph() -> None:
    weight = arrange(random_packed(1024, 2048, 128, True, "cuda"))
    x = torch.randn(1, 2048, device="cuda").bfloat16()
    multiply(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = multiply(x, weight)
    x.normal_()
    graph.replay()
    assert torch.equal(y, multiply(x, weight))
