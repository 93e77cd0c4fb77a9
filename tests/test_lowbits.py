"""Stochastic rounding: neighbours, expectation, reproducible bits; invariant T15."""

import pytest
import torch

from sparsekit.training.lowbits import (
    LARGEST,
    SMALLEST,
    Memory,
    mixed,
    packed_bits,
    random_bits,
    step_key,
    stochastic_bfloat16,
    stochastic_float8,
    unpacked_bits,
    widened,
)


def bits(count, step=1, parameter=0, seed=0):
    return random_bits(step_key(seed, step), parameter, count, torch.device("cpu"))


def test_bits_are_a_hash_of_seed_step_parameter_and_element():
    found = bits(1000, step=5, parameter=3, seed=7)[0]
    own = mixed(step_key(7, 5) + 0x9E3779B9 * 4)
    assert found.tolist() == [mixed(index ^ own) for index in range(1000)]
    for other in (bits(1000, 6, 3, 7), bits(1000, 5, 4, 7), bits(1000, 5, 3, 8)):
        assert int((other[0] == found).sum()) == 0
    low = (bits(200_000)[0] & 0xFFFF).float() / 2**16
    assert float(low.mean()) == pytest.approx(0.5, abs=3e-3)
    assert float(low.std()) == pytest.approx(12**-0.5, abs=3e-3)
    pairs = torch.stack([bits(200_000)[0] & 0xFFFF, bits(200_000)[0] >> 16]).float()
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.01


def test_bfloat16_rounds_to_a_neighbour_and_right_on_average():
    torch.manual_seed(0)
    value = torch.randn(4096) * 10 ** torch.randn(4096)
    rounded = [stochastic_bfloat16(value, bits(4096, step)[1]).float() for step in range(400)]
    spacing = 2.0 ** (value.abs().log2().floor() - 7)
    for sample in rounded:
        assert bool(((sample - value).abs() < spacing).all())
    mean = torch.stack(rounded).double().mean(0)
    assert float(((mean - value) / spacing).abs().max()) < 0.15  # 400 samples: 0.025 rms
    assert abs(float(((mean - value) / spacing).mean())) < 0.002
    exact = value.bfloat16()
    assert torch.equal(stochastic_bfloat16(exact.float(), bits(4096)[1]), exact)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    assert torch.equal(stochastic_bfloat16(odd, torch.full((4,), 0xFFFF)).float().nan_to_num(7.0), odd.nan_to_num(7.0))


@pytest.mark.parametrize("keep_positive", [False, True])
@pytest.mark.parametrize("count", [1, 255, 256, 3000])
def test_float8_rounds_to_a_neighbour_and_right_on_average(count, keep_positive):
    torch.manual_seed(0)
    value = torch.randn(count) * 10 ** torch.randn(count)
    value = value.abs() if keep_positive else value
    value[0] = 0.0
    samples = []
    for step in range(200):
        codes, scale = stochastic_float8(value, bits(count, step)[0], keep_positive)
        assert codes.dtype == torch.float8_e4m3fn
        assert float(codes.float().abs().max()) <= LARGEST
        samples.append(widened(codes, scale))
        assert not keep_positive or bool((samples[-1][value > 0] > 0).all())
    spread = scale.repeat_interleave(256)[:count]
    size = value.abs() / spread.where(spread > 0, 1.0)
    spacing = spread * (2.0 ** (size.clamp(min=2.0**-6).log2().floor() - 3)).where(size > 0, 0.0)
    for sample in samples[:20]:
        assert bool(((sample - value).abs() <= spacing * 1.001 + 1e-12).all())
    large = size > 4 * SMALLEST
    if bool(large.any()):
        error = ((torch.stack(samples).mean(0) - value) / spacing.clamp(min=1e-30))[large]
        assert float(error.abs().max()) < 0.2


def test_a_moment_that_fades_is_followed():
    """Rounding to the nearest would hold 0.975 v at v for ever."""
    root = torch.full((256,), 1.0)
    root[0] = 4.0  # another entry sets the scale
    for step in range(60):
        codes, scale = stochastic_float8(root, bits(256, step)[0] >> 16, True)
        root = widened(codes, scale) * 0.95**0.5
        root[0] = 4.0
    assert float(root[1:].mean()) == pytest.approx(0.95**30, rel=0.05)


def test_zero_blocks_stay_zero():
    codes, scale = stochastic_float8(torch.zeros(300), bits(300)[0], True)
    assert torch.equal(widened(codes, scale), torch.zeros(300))


@pytest.mark.parametrize("shape", [(3, 7), (4, 16), (1, 1)])
def test_masks_go_into_bits_and_back(shape):
    mask = torch.rand(shape) < 0.5
    assert torch.equal(unpacked_bits(packed_bits(mask), mask.shape), mask)


def test_bfloat16_masters_without_stochastic_rounding_are_refused():
    with pytest.raises(ValueError, match="stochastic"):
        Memory(masters="bfloat16", stochastic=False)
    weight, update = torch.full((1000,), 0.02), 2e-5
    assert torch.equal((weight.bfloat16().float() - update).bfloat16(), weight.bfloat16())  # what is refused
    moved = weight.bfloat16()
    for step in range(200):
        moved = stochastic_bfloat16(moved.float() - update * 0.1, bits(1000, step)[1])
    assert float(moved.float().mean()) == pytest.approx(float(weight.bfloat16()[0]) - 200 * update * 0.1, rel=5e-3)
