"""Low-rank branches in closed form: the least error there is, and their integers on the way to disk and back."""

import json
from dataclasses import replace

import pytest
import torch
from test_run import SPARSEGPT, run, write
from transformers import AutoModelForCausalLM

from sparsekit import load
from sparsekit.branch import Branch
from sparsekit.checkpoint import BlockState, block_of_tensors, block_tensors
from sparsekit.crossgram import StreamGram
from sparsekit.errors import CheckpointError, MethodError, NumericsError, PatternError, RecipeError
from sparsekit.files import read_json, write_json, write_tensors
from sparsekit.interchange.adapter import ADAPTER, attach_adapter, read_adapter, write_adapter
from sparsekit.methods.gptq import gptq
from sparsekit.methods.lowrank import integers, lowrank, nearest, solved
from sparsekit.methods.sparsegpt import sparsegpt
from sparsekit.pattern import Pattern
from sparsekit.recipe import read_recipe
from sparsekit.state import Group, LinearState
from sparsekit.verify import verified

OUT, IN = 24, 64
TOKENS = torch.arange(48).reshape(2, 24)


def made(drift: float = 0.0) -> tuple[LinearState, StreamGram, torch.Tensor, torch.Tensor]:
    """A pruned layer, its statistic, and the inputs now and before."""
    random = torch.Generator().manual_seed(0)
    mixing = torch.randn(IN, IN, generator=random) / IN**0.5 + torch.eye(IN)
    dense_x = torch.randn(500, IN, generator=random) @ mixing
    x = dense_x + drift * torch.randn(500, IN, generator=random) @ mixing.roll(3, 0)
    gram = StreamGram.empty(IN, torch.device("cpu"))
    gram.pair(dense_x, x)
    dense = torch.randn(OUT, IN, generator=random)
    layer = replace(sparsegpt(LinearState("q", dense), gram), dense=dense)
    return layer, gram, x, dense_x


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_no_branch_of_that_rank_is_nearer(rank):
    """Against the singular values of E times a root of H, whose tail is the least error there is."""
    layer, gram, _, _ = made()
    error, matrix = (layer.dense - layer.weight).double(), gram.matrix.double()
    up, down = nearest(error, matrix, rank)
    left = error - up @ down
    values = torch.linalg.svdvals(error @ torch.linalg.cholesky(matrix))
    assert float(torch.trace(left @ matrix @ left.t())) == pytest.approx(float(values[rank:].square().sum()), rel=1e-6)
    assert (up.shape, down.shape) == ((OUT, rank), (rank, IN))


def test_the_other_factor_is_the_least_squares_answer():
    layer, gram, x, _ = made()
    error = (layer.dense - layer.weight).double()
    down = integers(nearest(error, gram.matrix.double(), 4)[1].float(), 4, 16).dequantize().double()
    found = solved(error, gram.matrix.double(), down)
    expected = torch.linalg.lstsq(x.double() @ down.t(), x.double() @ error.t()).solution.t()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def lost(layer: LinearState, gram: StreamGram) -> float:
    return float(gram.energy(layer.dense - layer.effective))


@pytest.mark.parametrize(("bits", "worse"), [(None, 1.0), (8, 1.02), (4, 1.25)])
def test_integers_cost_little_and_the_weight_stays(bits, worse):
    layer, gram, _, _ = made()
    after = lowrank(layer, gram, rank=6, bits=bits, group_size=8, share=0.0)
    record = verified(layer, after, kind="branch", pattern=Pattern(2, 4), statistic=gram)
    assert (record.pattern, record.branch_parameters) == ("2:4+LR", 6 * (OUT + IN))
    best = lost(lowrank(layer, gram, rank=6, bits=None, share=0.0), gram)
    assert best < 0.75 * lost(layer, gram)
    assert lost(after, gram) <= worse * best + 1e-9
    if bits is not None:
        up, down = after.branch.integers
        assert torch.equal(after.branch.up, up.dequantize().t())
        assert torch.equal(after.branch.down, down.dequantize())
        assert (up.bits, up.codes.shape, down.codes.shape) == (bits, (6, OUT), (6, IN))


def test_it_repairs_a_quantizer_too():
    layer, gram, _, _ = made()
    coarse = replace(gptq(layer, gram, bits=3, group_size=16), dense=layer.dense)
    after = lowrank(coarse, gram, rank=6, share=0.0)
    assert after.quantized is coarse.quantized
    assert lost(after, gram) < 0.8 * lost(coarse, gram)


def test_the_aim_is_what_the_dense_model_computes():
    layer, gram, x, before = made(drift=0.3)

    def missed(share):
        after = lowrank(layer, gram, rank=OUT, bits=None, share=share, aim_damp=1e-6)
        return float((before @ layer.dense.t() - x @ after.effective.t()).square().mean())

    assert missed(1.0) < missed(0.5) < missed(0.0)
    best = torch.linalg.lstsq(x, before @ layer.dense.t()).solution
    expected = float((before @ layer.dense.t() - x @ best).square().mean())
    assert missed(1.0) == pytest.approx(expected, rel=1e-3)  # of full rank: all that its inputs can tell


def test_what_the_stream_lacks_is_part_of_the_aim():
    layer, gram, x, before = made(drift=0.3)
    lacking = x @ torch.randn(IN, OUT, generator=torch.Generator().manual_seed(5)) / IN**0.5
    gram.owe(lacking, x)
    goal = before @ layer.dense.t() + lacking
    missed = []
    for owed in (0.0, 1.0):
        after = lowrank(layer, gram, rank=OUT, bits=None, share=1.0, owed=owed, aim_damp=1e-6)
        missed.append(float((goal - x @ after.effective.t()).square().mean()))
    best = goal - x @ torch.linalg.lstsq(x, goal).solution
    assert missed[1] == pytest.approx(float(best.square().mean()), rel=1e-3)
    assert missed[1] < 0.9 * missed[0]


def test_a_rank_above_the_layers_and_a_layer_without_error():
    layer, gram, _, _ = made()
    after = lowrank(layer, gram, rank=999, bits=None, share=0.0)
    assert after.branch.up.shape == (OUT, OUT)
    assert lost(after, gram) < 1e-6 * lost(layer, gram)
    same = lowrank(replace(layer, dense=layer.weight), gram, share=0.0)
    assert not same.branch.matrix.any()


def test_what_it_refuses():
    layer, gram, _, _ = made()
    after = lowrank(layer, gram)
    with pytest.raises(MethodError, match="q: it has a low-rank branch already"):
        lowrank(replace(after, dense=layer.dense), gram)
    broken = StreamGram.empty(IN, torch.device("cpu"))
    broken.update(torch.full((4, IN), float("inf")))
    for share in (0.0, 0.5):
        with pytest.raises(NumericsError, match="not finite"):
            lowrank(layer, broken, share=share)
    with pytest.raises(MethodError, match="holds integers and cannot be rescaled"):
        Group({"q": after}, tie=lambda free: free, untie=lambda full: full).rescaled(torch.ones(IN))


def test_the_driver_holds_it_to_its_kind():
    layer, gram, _, _ = made()
    after = lowrank(layer, gram)

    def told(changed, kind=MethodError):
        with pytest.raises(kind) as caught:
            verified(layer, changed, kind="branch", pattern=Pattern(2, 4))
        return str(caught.value)

    assert "returns layer.with_branch" in told(layer)
    assert "another mask or weight" in told(replace(after, source=2 * after.source), PatternError)
    assert "another mask or weight" in told(replace(after, mask=~after.mask, source=after.source * 0), PatternError)
    assert "returns layer.with_branch" in told(gptq(after, gram, group_size=16))


def test_integers_are_stored_with_the_block():
    layer, gram, _, _ = made()
    after = lowrank(layer, gram, group_size=8)
    back = block_of_tensors(*block_tensors(BlockState({"q": after}), torch.bfloat16)).linears["q"].branch
    assert all(one.equal(two) for one, two in zip(back.integers, after.branch.integers, strict=True))
    assert torch.equal(back.matrix, after.branch.matrix)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_integers_come_back_from_an_adapter_and_wrong_ones_are_named(tmp_path, bits):
    layer, gram, _, _ = made()
    branch = lowrank(layer, gram, rank=5, bits=bits, group_size=8).branch
    size = write_adapter(tmp_path, {"a.q": branch}, torch.bfloat16, integers=True)
    directory = tmp_path / ADAPTER
    assert size == (directory / "lowrank.safetensors").stat().st_size
    (found,) = read_adapter(tmp_path).values()
    assert all(one.equal(two) for one, two in zip(found.integers, branch.integers, strict=True))
    about = read_json(directory / "lowrank.json")
    for change, message in (
        ({"version": 2}, "this version reads 1"),
        ({"branches": {"a.k": about["branches"]["a.q"]}}, r"lacks 'a\.k\.up'"),
        ({"branches": {"a.q": [{"bits": 8, "inputs": 8}] * 2}}, r"a\.q\.up and its configuration do not fit"),
    ):
        write_json(directory / "lowrank.json", {**about, **change})
        with pytest.raises(CheckpointError, match=message):
            read_adapter(tmp_path)
    write_json(directory / "lowrank.json", about)
    write_tensors(directory / "lowrank.safetensors", {})
    with pytest.raises(CheckpointError, match="lacks"):
        read_adapter(tmp_path)


LOWRANK = "  - {method: lowrank, rank: 4, group_size: 32}\n"
GPTQ = "  - {method: gptq, bits: 4, group_size: 32}\n"


def test_a_run_after_the_quantizer_counts_and_loads_it(tmp_path, random_model):
    steps = SPARSEGPT + GPTQ + LOWRANK
    run(write(tmp_path, random_model, steps, formats="dense, gptq, sparsekit-24-compact"))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    last = report["steps"][-1]
    assert (last["pattern"], last["violations"], last["bits"]) == ("2:4+LR", 0, [4])
    assert last["error_of"] == "outputs"
    shapes = [(64, 64)] * 2 + [(32, 64)] * 2 + [(128, 64)] * 2 + [(64, 128)]
    factors = 2 * sum(4 * (out + into) for out, into in shapes)
    assert sum(layer["branch_parameters"] for layer in last["layers"]) == factors
    exports = {export["format"]: export for export in report["exports"]}
    small, floats = (exports[name]["bytes"]["adapter"] for name in ("sparsekit-24-compact", "gptq"))
    assert floats > 4 * factors  # float32 as the model is
    headers = small - factors // 2 - 2 * factors // 32
    assert 0 < headers < 200 * 4 * len(shapes) * 2
    folder = tmp_path / "run" / "export" / "sparsekit-24-compact"
    assert not (folder / ADAPTER / "adapter_config.json").exists()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export" / "dense").eval()
    with torch.no_grad():
        plain = expected(TOKENS).logits
        attach_adapter(expected, tmp_path / "run" / "export" / "dense")
        wanted = expected(TOKENS).logits
        found = load(folder, device="cpu")(TOKENS).logits
    assert float((wanted - plain).abs().max()) > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_its_place_among_the_steps(tmp_path, random_model):
    read_recipe(write(tmp_path, random_model, SPARSEGPT + LOWRANK + GPTQ))
    read_recipe(write(tmp_path, random_model, SPARSEGPT + GPTQ + LOWRANK))
    with pytest.raises(RecipeError, match="prunes weights that step 1"):
        read_recipe(write(tmp_path, random_model, GPTQ + LOWRANK + SPARSEGPT))


def test_a_branch_on_a_device_and_in_a_dtype_is_the_same():
    branch = Branch(torch.full((4, 2), 1.001), torch.full((2, 8), 0.3333), 4)
    stored = branch.stored(torch.bfloat16)
    assert torch.equal(stored.up, branch.up.bfloat16().float())
    assert torch.equal(stored.down, branch.down.bfloat16().float())
    assert branch.to(torch.device("cpu")).integers is None
