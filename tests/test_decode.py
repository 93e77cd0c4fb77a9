"""The decode kernel's order of a weight, checked without a GPU: what tensor cores would make of it, in float64."""

import pytest
import torch
from packed import random_packed
from torch import Tensor

from sparsekit.inference.packed import dequantize
from sparsekit.kernels.decode import TOKEN_TILE, Device, choose
from sparsekit.kernels.decode_layout import DecodeWeight, arrange


def words(tensor: Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in tensor.tolist()]


def float16s(halves: list[int]) -> Tensor:
    return torch.tensor(halves, dtype=torch.int32).to(torch.int16).view(torch.float16).double()


def operands(x: Tensor, unit: list[int], sparse: bool, step: int) -> list[tuple[Tensor, Tensor]]:
    """A [16, K] and B [K, tokens] of every matrix instruction for 32 inputs, lane by lane as the PTX ISA says.

    "Matrix fragments for sparse mma.m16n8k32 with .f16" and "for mma.m16n8k16"; what the lanes of `decode.cu` hold.
    """
    found = []
    for half in range(1 if sparse else 2):
        deep = 32 if sparse else 16
        a, b = torch.zeros(16, deep, dtype=torch.float64), torch.zeros(deep, len(x), dtype=torch.float64)
        for lane in range(32):
            g, t = divmod(lane, 4)
            own = x[:, 16 * half : 16 * half + deep].unflatten(1, (deep // 8, 4, 2))[:, :, t]  # of every eight inputs
            for index in range(deep // 8):
                b[2 * t + 8 * index : 2 * t + 8 * index + 2] = own[:, index].T
            word = unit[4 * lane + step] if sparse else unit[128 * (step // 2) + 4 * lane + 2 * (step % 2) + half]
            for index in range(4):
                one, two = ((word >> 4 * place & 15) - 8 for place in (index, index + 4))
                row, column = g + 8 * (index % 2), index // 2
                if sparse:
                    group = t + 4 * column
                    told = unit[128 + 2 * (4 * g + 2 * (step % 2) + group // 4) + step // 2]
                    bits = told >> (16 * (index % 2) + 4 * (group % 4))
                    a[row, 4 * group + (bits & 3)] += one
                    a[row, 4 * group + (bits >> 2 & 3)] += two
                else:
                    a[row, 2 * t + 8 * column], a[row, 2 * t + 8 * column + 1] = one, two
        found.append((a, b))
    return found


def simulated(x: Tensor, weight: DecodeWeight) -> Tensor:
    """The product as the kernel forms it, in float64."""
    units, row_tiles, size = weight.units.shape
    padded = torch.nn.functional.pad(x.double(), (0, 128 * units - x.shape[1]))
    y = torch.zeros(len(x), row_tiles, 16, dtype=torch.float64)
    for r in range(row_tiles):
        for u in range(units):
            unit = words(weight.units[u, r])
            for step in range(4):
                at = size - 8 * weight.scales + 8 * (step * weight.scales // 4)
                pairs = unit[at : at + 8]
                scale = float16s([pair & 0xFFFF for pair in pairs] + [pair >> 16 for pair in pairs])
                inputs = padded[:, 128 * u + 32 * step : 128 * u + 32 * step + 32]
                for a, b in operands(inputs, unit, weight.sparse, step):
                    y[:, r] += (a @ b).T * scale
    return y.flatten(1)[:, : weight.shape[0]]


@pytest.mark.parametrize(
    ("out", "columns", "group_size", "sparse"),
    [(24, 160, 32, True), (40, 256, 128, True), (16, 192, 64, True), (16, 128, 32, True), (24, 256, 256, True),
     (24, 256, 128, False), (16, 192, 64, False)],
)  # fmt: skip
def test_tensor_cores_see_the_weight(out: int, columns: int, group_size: int, sparse: bool) -> None:
    packed = random_packed(out, columns, group_size, sparse)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ dequantize(packed, torch.float64).T
    torch.testing.assert_close(simulated(x, arrange(packed)), expected, rtol=1e-12, atol=1e-12)


def test_a_weight_takes_three_bits_and_its_scales() -> None:
    weight = arrange(random_packed(128, 512, 128, True))
    assert weight.units.nbytes * 8 == 128 * 512 * 3.125


@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 32])
@pytest.mark.parametrize("row_tiles", [1, 8, 24, 256, 512, 640, 768, 1376, 3584])
@pytest.mark.parametrize(
    "device",
    [Device(132, 227 * 1024, True), Device(108, 163 * 1024, False), Device(82, 99 * 1024, False)],
    ids=["H200", "A100", "RTX 3090"],
)
def test_every_cut_can_run(tokens: int, row_tiles: int, device: Device) -> None:
    for sparse, group_size in ((True, 128), (True, 32), (False, 128), (False, 32)):
        unit = 4 * arrange(random_packed(16, 128, group_size, sparse)).units.shape[2]
        cut = choose(tokens, row_tiles, unit, device)
        assert cut.threads <= 512
        assert cut.shared_bytes(-(-tokens // TOKEN_TILE), unit) <= device.shared
        assert cut.split == 1 or device.clusters
        assert cut.stages >= 2
        assert cut.row_warps == 1 or cut.input_warps < 16, "named barriers"
