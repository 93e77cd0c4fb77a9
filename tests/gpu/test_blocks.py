"""Blocks on a CUDA device: read ahead, written behind, siblings solved as one."""

from __future__ import annotations

import families
import pytest
import torch

from sparsekit.blockwise import activations
from sparsekit.blockwise.activations import Activations
from sparsekit.blockwise.holding import HOLDINGS
from sparsekit.blockwise.stacking import at_once
from sparsekit.blockwise.streaming import Ahead, Behind
from sparsekit.blockwise.walk import resident
from sparsekit.checkpoint import BlockState, StepStore
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.planning.memory_model import _factor
from sparsekit.quant import Grid, QuantizedWeight
from sparsekit.registry import METHODS
from sparsekit.state import Group, LinearState
from sparsekit.stats import Gram
from sparsekit.sweep.obs import sweep

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def block(index: int, device: torch.device) -> BlockState:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(index)).bfloat16().float()
    pruned = LinearState("a.q", weight.to(device)).masked(Pattern(2, 4).keep(weight.abs()).to(device))
    grid = Grid.fit_reference(weight.reshape(512, -1, 128), 4, symmetric=True, mse=False)
    codes = grid.encode(weight.reshape(512, -1, 128)).reshape(512, 1024)
    integers = QuantizedWeight.of(codes, grid, group_size=128, symmetric=True).to(device)
    return BlockState(
        {"a.q": pruned, "a.o": LinearState("a.o", weight.to(device)).with_quantized(integers)},
        {"a.norm": torch.ones(1024, device=device)},
    )


def test_files_are_those_of_the_host_and_come_back_on_the_device(tmp_path):
    host, device = (StepStore(tmp_path / name, torch.bfloat16) for name in ("host", "device"))
    with torch.inference_mode(), Behind(device) as behind:
        for index in range(4):
            host.commit_block(index, block(index, torch.device("cpu")), [])
            behind.commit(index, block(index, CUDA), [])
    for index in range(4):
        assert host.block_path(index).read_bytes() == device.block_path(index).read_bytes()
    with torch.inference_mode(), Ahead(lambda index: device.stored(index), CUDA, 4) as ahead:
        for index in range(4):
            found, expected = ahead(index), block(index, CUDA)
            for name, state in expected.linears.items():
                assert found.linears[name].source.is_cuda
                assert torch.equal(found.linears[name].weight, state.weight)
            assert torch.equal(found.linears["a.q"].mask, expected.linears["a.q"].mask)


@pytest.mark.parametrize("name", ["sparsegpt", "gptq"])
def test_a_stack_gives_what_each_linear_gives_alone(name):
    gram = Gram.empty(1024, CUDA)
    generator = torch.Generator(CUDA).manual_seed(0)
    gram.update(torch.randn(4096, 1024, generator=generator, device=CUDA) * torch.rand(1024, device=CUDA).exp())
    states = [LinearState(str(n), torch.randn(rows, 1024, device=CUDA)) for n, rows in enumerate((1024, 256, 256))]
    method = METHODS.get(name)
    found = at_once(method, states, [{}] * 3, gram)
    assert found is not None
    for given, (state, _) in zip(states, found, strict=True):
        expected = method.function(given, gram)
        assert state.name == given.name
        near = (state.weight - expected.weight).abs() <= 1e-4 * expected.weight.abs() + 1e-6
        assert float(near.float().mean()) > 0.99
        own, other = (float(gram.energy(given.source - each.weight)) for each in (state, expected))
        assert own == pytest.approx(other, rel=1e-2)


def test_root_and_energies_are_those_of_the_host():
    generator = torch.Generator(CUDA).manual_seed(0)
    x = torch.randn(9000, 3000, generator=generator, device=CUDA).bfloat16()
    gram, host = Gram.empty(3000, CUDA), Gram.empty(3000, torch.device("cpu"))
    gram.update(x)
    host.sum, host.tokens = gram.sum.cpu(), gram.tokens
    order = torch.randperm(3000, generator=generator, device=CUDA)
    gram.root(0.01, order)  # libraries take their workspaces
    gram._roots.clear()
    torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_allocated()
    root = gram.root(0.01, order)[0].matrix
    peak = (torch.cuda.max_memory_allocated() - resting) / gram.sum.numel()
    assert peak < 16, f"{peak} bytes an entry"  # some rows as gathered, and cuSOLVER's workspace, come on top of 12
    expected = host.root(0.01, order.cpu())[0].matrix
    assert torch.allclose(root.cpu(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    weights = [torch.randn(64, 3000, generator=generator, device=CUDA) / scale for scale in (1, 30)]
    found = [float(value) for value in gram.energies(*weights)]
    assert found == pytest.approx([float(host.energy(weight.cpu())) for weight in weights], rel=1e-3)


def test_a_packed_root_is_the_root_and_takes_the_memory_it_is_planned_to():
    generator = torch.Generator(CUDA).manual_seed(0)
    gram = Gram.empty(6000, CUDA)
    gram.update(torch.randn(9000, 6000, generator=generator, device=CUDA).bfloat16())
    order = torch.randperm(6000, generator=generator, device=CUDA)
    expected, used = gram.root(0.01, order)
    weight = torch.randn(256, 6000, generator=generator, device=CUDA)
    whole = sweep(weight, expected, pattern=Pattern(2, 4))
    gram.packed = True
    gram._roots.clear()
    del expected
    assert gram.sum.is_cuda  # mirrored before anything is measured
    torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_allocated()
    root, damping = gram.root(0.01, order)
    taken, kept, _ = _factor(6000, HOLDINGS["low"])
    assert torch.cuda.max_memory_allocated() - resting == pytest.approx(taken, rel=0.25)
    assert torch.cuda.memory_allocated() - resting == pytest.approx(kept, rel=0.1)
    assert damping == used
    found = sweep(weight, root, pattern=Pattern(2, 4))
    assert float((found.keep == whole.keep).float().mean()) > 0.9999
    assert float(found.loss) == pytest.approx(float(whole.loss), rel=1e-4)


def test_statistics_with_norms_of_one_operation_are_those_of_the_model(tmp_path, monkeypatch):
    view = ModelView.open(families.save("llama", tmp_path), device="cuda", dtype="bfloat16")
    tokens = torch.randint(0, 128, (16, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        stream = Activations.begin(view, tokens)
        stream.micro_batch = 4
        with resident(view, 0, view.dense_block(0)):
            groups = view.groups(0, *stream.sample(0))
            found = stream.collect(0, groups, Gram)
            monkeypatch.setattr(activations, "QUICK", ())
            expected = stream.collect(0, groups, Gram)
    for own, other in zip(found, expected, strict=True):
        assert own.tokens == other.tokens
        assert float((own.sum - other.sum).norm() / other.sum.norm()) < 1e-2


def test_awq_chooses_what_it_chooses_on_the_host():
    generator = torch.Generator(CUDA).manual_seed(0)
    x = torch.randn(8192, 1024, generator=generator, device=CUDA)
    x *= 1 + 20 * torch.rand(1024, generator=generator, device=CUDA) ** 8
    gram, host = Gram.empty(1024, CUDA), Gram.empty(1024, torch.device("cpu"))
    gram.update(x)
    host.sum, host.tokens, host.absolute = gram.sum.cpu(), gram.tokens, gram.absolute.cpu()
    weight = torch.randn(512, 1024, generator=generator, device=CUDA)
    found, expected = (
        METHODS.get("awq").function(Group({"w": LinearState("w", w)}, tie=lambda v: v, untie=lambda v: v), statistic)
        for w, statistic in ((weight, gram), (weight.cpu(), host))
    )
    assert expected.input_scale is not None
    assert torch.allclose(found.input_scale.cpu(), expected.input_scale, rtol=1e-3)
    same = found.linears["w"].quantized.codes.cpu() == expected.linears["w"].quantized.codes
    assert float(same.float().mean()) > 0.99
