"""SLoRB: invariants T10 of the AST reference, and the branch on its way through training, GPTQ and exports."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from families import load, save
from test_ast import SETTING, assert_same, make_job
from torch import nn

from sparsekit.branch import Branch, LowRank, attach, attached, block_sums, detach, mean_branch
from sparsekit.checkpoint import BlockState, block_of_tensors, block_tensors
from sparsekit.errors import CheckpointError, MethodError, PatternError
from sparsekit.formats import FORMATS
from sparsekit.interchange.adapter import ADAPTER, attach_adapter, peft_config
from sparsekit.interchange.export import export_as
from sparsekit.interchange.proof import verify_dense
from sparsekit.methods.ast import ast
from sparsekit.methods.gptq import gptq
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.state import Group, LinearState
from sparsekit.stats import Gram
from sparsekit.verify import verified

TWO_OF_FOUR = Pattern(2, 4)
BRANCHED = {**SETTING, "slorb": 16}


def layer(out=96, width=256, seed=0):
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
    return weight, TWO_OF_FOUR.keep(weight.abs())


@pytest.mark.parametrize("k", [16, 32, 64])
def test_residual_is_the_pruned_part_without_its_block_means(k):
    weight, mask = layer()
    branch = mean_branch(weight, mask, k, trained=True)
    pruned = weight.masked_fill(mask, 0.0).double()
    means = pruned.reshape(96, -1, k).mean(2)
    left = (pruned - branch.matrix.double()).square().sum()
    assert float(left) == pytest.approx(float(pruned.square().sum() - k * means.square().sum()), rel=1e-5)


@pytest.mark.parametrize("k", [16, 32, 64])
def test_sums_of_blocks_are_kept(k):
    weight, mask = layer()
    whole = weight.masked_fill(~mask, 0.0) + mean_branch(weight, mask, k, trained=True).matrix
    sums = [value.reshape(96, -1, k).sum(2) for value in (whole, weight)]
    torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-4)


def test_drop_of_the_residual_is_one_in_k_and_sums_are_a_worse_start():
    k = 16
    weight, mask = layer(2048, 1024)
    branch = mean_branch(weight, mask, k, trained=True)
    pruned = weight.masked_fill(mask, 0.0).double()
    before = pruned.square().sum()
    drop = 1 - float((pruned - branch.matrix.double()).square().sum() / before)
    assert drop == pytest.approx(1 / k, abs=0.001)
    summed = replace(branch, up=branch.up * k)
    assert float((pruned - summed.matrix.double()).square().sum() / before) == pytest.approx(k - 1 + 1 / k, rel=0.1)


def test_parameters_of_a_llama_2_7b():
    """T10: 404,750,336 of S and 443,678,720 of X."""
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    with torch.device("meta"):
        made = [Branch(torch.empty(n, d // 16), torch.empty(d // 16, d), 16) for n, d in shapes]
    assert 32 * sum(branch.up.numel() for branch in made) == 404_750_336
    assert 32 * sum(branch.parameters for branch in made) == 404_750_336 + 443_678_720
    assert sum(replace(branch, down=None).parameters for branch in made) * 32 == 404_750_336


def test_a_block_that_divides_no_layer_is_refused():
    weight, mask = layer(8, 24)
    with pytest.raises(MethodError, match=r"mlp.up: slorb 16 does not divide 24 inputs"):
        mean_branch(weight, mask, 16, trained=True, name="mlp.up")


def test_segment_sum_is_the_product_with_x():
    weight, mask = layer()
    pair = [mean_branch(weight, mask, 32, trained=trained) for trained in (False, True)]
    assert torch.equal(pair[0].projection, pair[1].down)
    assert torch.equal(pair[0].matrix, pair[1].matrix)
    assert torch.equal(pair[1].down, block_sums(8, 32))
    x = torch.randn(5, 7, 256)
    outputs = [LowRank(branch, torch.float32, x.device)(x) for branch in pair]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(outputs[0], x @ pair[0].matrix.t(), rtol=1e-4, atol=1e-4)


def test_a_branch_hangs_on_a_linear_and_comes_off():
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 8), torch.randn(3, 64)
    plain, weight = linear(x), linear.weight.detach()
    branch = mean_branch(weight, TWO_OF_FOUR.keep(weight.abs()), 16, trained=True)
    attach(linear, branch)
    attach(linear, branch)  # once more changes nothing
    torch.testing.assert_close(linear(x), plain + x @ branch.matrix.t())
    assert isinstance(linear, nn.Linear)
    assert attached(linear)
    detach(linear)
    assert torch.equal(linear(x), plain)
    assert [name for name, _ in linear.named_parameters()] == ["weight", "bias"]


class Block(nn.Module):
    """One linear, called as a model's block calls its linears."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(64, 8)

    def forward(self, x):
        return self.proj(x)


def test_a_graph_that_was_compiled_without_the_branch_is_not_taken():
    """As in a process that trains one arm without and the next one with it; a hook failed here."""
    torch.manual_seed(0)
    dense, x = Block(), torch.randn(3, 64)
    weight = dense.proj.weight.detach()
    branch = mean_branch(weight, TWO_OF_FOUR.keep(weight.abs()), 16, trained=True)
    for with_branch in (False, True, False):
        block = copy.deepcopy(dense)
        if with_branch:
            attach(block.proj, branch)
        expected = block(x)
        block.compile(backend="eager", dynamic=False)
        torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("projection", ["trained", "sum"])
def test_it_trains_with_everything_else_and_is_counted(tmp_path, projection):
    job = make_job(tmp_path)
    trained = ast(job, **{**BRANCHED, "slorb_projection": projection})
    counted = 0
    for name, state in trained.linears.items():
        out, width = state.source.shape
        assert TWO_OF_FOUR.violations(state.weight) == 0
        dense = job.linears[name].source
        first = mean_branch(dense, TWO_OF_FOUR.keep(dense.abs()), 16, trained=True)
        assert state.branch.up.shape == (out, width // 16)
        assert bool((state.branch.up != first.up).any())
        assert (state.branch.down is None) == (projection == "sum")
        assert projection == "sum" or bool((state.branch.down != first.down).any())
        counted += state.branch.parameters
    assert trained.metrics["branch_parameters"] == counted > 0
    assert not any("slorb" in name for name in trained.params)


def test_the_branch_lowers_the_loss(tmp_path):
    longer = {**SETTING, "tokens": 48 * 64, "lr": 1e-3}
    jobs = [make_job(tmp_path / name) for name in ("plain", "branched")]
    for job, options in zip(jobs, ({}, {"slorb": 16}), strict=True):
        ast(job, **longer, **options)
    plain, branched = (job.student.log for job in jobs)
    assert branched[0]["kl"] < plain[0]["kl"]
    assert branched[-1]["kl"] < plain[-1]["kl"]


def test_killed_training_with_a_branch_continues_to_the_same_bits(tmp_path):
    whole = ast(make_job(tmp_path / "whole"), **BRANCHED)

    class Killed(Exception):
        pass

    def progress(done, total):
        if done == 9 * 64:
            raise Killed

    with pytest.raises(Killed):
        ast(replace(make_job(tmp_path / "cut"), progress=progress), **BRANCHED, checkpoint_every=1)
    again = ast(make_job(tmp_path / "cut"), **BRANCHED, checkpoint_every=1)
    assert_same(again, whole)
    for name, state in whole.linears.items():
        assert torch.equal(state.branch.up, again.linears[name].branch.up)


def test_an_earlier_branch_of_another_length_is_refused(tmp_path):
    job = make_job(tmp_path)
    states = ast(job, **BRANCHED).linears
    with pytest.raises(MethodError, match="an earlier step left a branch with blocks of 16"):
        ast(replace(make_job(tmp_path / "again"), linears=states), **{**SETTING, "slorb": 32})


def branched_state(out=32, width=64, trained=True):
    weight, mask = layer(out, width)
    return LinearState("q", weight, mask, branch=mean_branch(weight, mask, 16, trained=trained))


def test_gptq_quantizes_the_weight_and_leaves_the_branch():
    state = branched_state()
    gram = Gram.empty(64, torch.device("cpu"))
    gram.update(torch.randn(512, 64, generator=torch.Generator().manual_seed(3)))
    after = gptq(state, gram, bits=4, group_size=16)
    plain = gptq(replace(state, branch=None), gram, bits=4, group_size=16)
    assert after.branch is state.branch
    assert torch.equal(after.weight, plain.weight)
    record = verified(state, after, kind="quantize", pattern=TWO_OF_FOUR, statistic=gram)
    assert (record.pattern, record.violations) == ("2:4+LR", 0)
    assert record.branch_parameters == state.branch.parameters
    assert 0 < record.error < 0.1


def test_folding_is_refused():
    state = branched_state()
    folded = replace(state, source=state.effective, mask=None, branch=None)
    with pytest.raises(MethodError, match="dropped the low-rank branch; folded into the weight"):
        verified(state, folded, kind="prune", pattern=TWO_OF_FOUR)
    with pytest.raises(PatternError, match="break the 2:4 pattern"):
        verified(state, replace(folded, branch=state.branch), kind="prune", pattern=TWO_OF_FOUR)


@pytest.mark.parametrize("trained", [True, False])
def test_rescaled_inputs_leave_the_function(trained):
    state = branched_state(trained=trained)
    scale = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5
    group = Group({"q": state}, tie=lambda free: free, untie=lambda full: full).rescaled(scale)
    x = torch.randn(5, 64)
    torch.testing.assert_close((x / scale) @ group.linears["q"].effective.t(), x @ state.effective.t())


@pytest.mark.parametrize("trained", [True, False])
def test_it_is_stored_with_its_block(trained):
    state = branched_state(trained=trained)
    back = block_of_tensors(*block_tensors(BlockState({"q": state}), torch.float32)).linears["q"]
    assert torch.equal(back.branch.up, state.branch.up)
    assert (back.branch.down is None) == (not trained)
    assert torch.equal(back.effective, state.effective)


def branched_blocks(view):
    """Every block with pruned linears and trained-looking branches."""
    blocks = []
    for index in range(len(view.blocks)):
        block = view.dense_block(index)
        for name, state in block.linears.items():
            mask = TWO_OF_FOUR.keep(state.source.abs())
            branch = mean_branch(state.source, mask, 16, trained=True)
            noise = torch.randn(branch.down.shape, generator=torch.Generator().manual_seed(index))
            block.linears[name] = replace(state, mask=mask, branch=replace(branch, down=branch.down + 0.05 * noise))
        blocks.append(block)
    return blocks


def logits_of(view, blocks, tokens):
    view.materialise_all(blocks)
    with torch.inference_mode():
        found = view.module(input_ids=tokens, use_cache=False).logits
    for index in range(len(blocks)):
        view.release(index)
    return found


def test_an_export_has_an_adapter_that_computes_the_branch(tmp_path):
    view = ModelView.open(save("llama", tmp_path / "model"))
    blocks, tokens = branched_blocks(view), torch.arange(24).reshape(2, 12)
    expected = logits_of(view, blocks, tokens)
    report = export_as(FORMATS["dense"], view, blocks.__getitem__, tmp_path / "out", patterns=patterns_of(blocks))
    assert verify_dense(tmp_path / "out", tokens, expected, view) == pytest.approx(0.0, abs=1e-5)
    assert any("2:4+LR and not 2:4" in note for note in report.notes)
    assert report.bytes.adapter == (tmp_path / "out" / ADAPTER / "adapter_model.safetensors").stat().st_size
    plain = load("llama", tmp_path / "out").requires_grad_(False)  # the directory itself is the sparse model
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and "proj" in name:
            assert TWO_OF_FOUR.violations(module.weight.detach()) == 0
    assert float((plain(input_ids=tokens).logits - expected).abs().max()) > 1e-3
    attach_adapter(plain, tmp_path / "out")
    torch.testing.assert_close(plain(input_ids=tokens).logits, expected, rtol=0, atol=1e-5)
    marker = json.loads((tmp_path / "out" / "sparsekit.json").read_text())
    assert {about["pattern"] for about in marker["linears"].values()} == {"2:4+LR"}
    assert "adapter holds low-rank branches that are not read" in ModelView.open(tmp_path / "out").notes[0]


def test_peft_computes_the_same(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is no dependency; the arithmetic is tested above")
    view = ModelView.open(save("llama", tmp_path / "model"))
    blocks, tokens = branched_blocks(view), torch.arange(24).reshape(2, 12)
    expected = logits_of(view, blocks, tokens)
    export_as(FORMATS["dense"], view, blocks.__getitem__, tmp_path / "out", patterns=patterns_of(blocks))
    model = peft.PeftModel.from_pretrained(load("llama", tmp_path / "out"), tmp_path / "out" / ADAPTER)
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=0, atol=1e-5)


def patterns_of(blocks):
    return {name: TWO_OF_FOUR for block in blocks for name in block.linears}


def test_ranks_differ_by_layer_and_the_scaling_is_one():
    branches = {"a.q": Branch(torch.zeros(4, 2), None, 16), "a.k": Branch(torch.zeros(4, 2), None, 16)}
    branches["a.down"] = Branch(torch.zeros(4, 8), None, 16)
    config = peft_config(branches)
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"^a\\.down$": 8}
    assert config["target_modules"] == ["a.q", "a.k", "a.down"]


def test_fused_experts_have_no_adapter(tmp_path):
    view = ModelView.open(save("mixtral", tmp_path / "model"))
    blocks = branched_blocks(view)
    with pytest.raises(CheckpointError, match="fused tensor"):
        export_as(FORMATS["dense"], view, blocks.__getitem__, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_copy_of_a_model_keeps_its_branches():
    linear = nn.Linear(64, 8)
    weight = linear.weight.detach()
    attach(linear, mean_branch(weight, TWO_OF_FOUR.keep(weight.abs()), 16, trained=False))
    x = torch.randn(3, 64)
    assert torch.equal(copy.deepcopy(linear)(x), linear(x))
