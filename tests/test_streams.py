"""What a layer owes the stream: found by running blocks, summed over both models, aimed at in closed form."""

from __future__ import annotations

import entering
import families
import pytest
import torch
from torch import nn

from sparsekit.blockwise.walk import Walk
from sparsekit.checkpoint import StepStore
from sparsekit.crossgram import CrossGram, StreamGram
from sparsekit.models.streams import stream_doors
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.registry import METHODS, linear_method

TOKENS = torch.randint(0, 128, (7, 16), generator=torch.Generator().manual_seed(1))
SEEN: dict[str, StreamGram] = {}
CPU = torch.device("cpu")


@linear_method("noting_streams", kind="prune", stats=StreamGram)
def noting_streams(layer, gram, /):
    """Keep the largest of every four, and write down the statistic."""
    SEEN[layer.name] = gram
    return layer.masked(Pattern(2, 4).keep(layer.source.abs()))


class Block(nn.Module):
    """Attention and MLP in one: what is added, and how, is chosen."""

    def __init__(self, form):
        super().__init__()
        self.form, self.norm, self.norm_after = form, nn.RMSNorm(8), nn.RMSNorm(8)
        self.first, self.up, self.down = (nn.Linear(8, n, bias=False) for n in (8, 16, 8))
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x):
        first = self.first(self.norm(x))
        if self.form == "parallel":
            return x + first + self.down(self.up(self.norm(x)).relu())
        scale = 0.3 if self.form == "scaled" else 1.0
        x = x + (self.norm_after(first) if self.form == "normed after" else scale * first)
        return x + scale * self.down(self.up(self.norm_after(x) if self.form == "usual" else x).relu())


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("usual", {"first": "norm", "down": "norm_after"}),
        ("scaled", {}),
        ("normed after", {}),  # and no norm sees the stream before the second one
        ("parallel", {}),  # one difference, two linears in it
    ],
)
def test_only_linears_that_add_to_the_stream_alone_are_found(form, expected):
    torch.manual_seed(0)
    block = Block(form)
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        found = stream_doors(block, linears, lambda: block(x))
    modules = {module: name for name, module in block.named_modules()}
    assert {name: modules[door] for name, door in found.items()} == expected
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in block.modules())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi", "gpt2"])
def test_doors_of_architectures(family, tmp_path):
    view = ModelView.open(families.save(family, tmp_path / "model"), device="cpu")
    with torch.inference_mode():
        hidden, calls = view.begin(TOKENS[:2])
        view.materialise(0, view.dense_block(0))
        found = {name.rpartition(".")[2] for name in view.doors(0, hidden, calls[0])}
    expected = {"llama": {"o_proj", "down_proj"}, "qwen3": {"o_proj", "down_proj"}, "gpt2": {"c_proj"}}
    assert found == expected.get(family, set())  # Gemma norms what it adds, Phi adds two at once


def streams_of(view, blocks):
    """The stream before every linear that adds to it, and its input, in a whole model: [tokens, ...]."""
    modules = {}
    for index in range(len(view.blocks)):
        block = view.module.get_submodule(view.blocks[index])
        for door, linear in ((block, block.self_attn.o_proj), (block.post_attention_layernorm, block.mlp.down_proj)):
            name = next(name for name, module in view.linears(index).items() if module is linear)
            modules |= {(name, "stream"): door, (name, "x"): linear}
    return entering.inputs_of(view, blocks, TOKENS, modules)


@pytest.mark.parametrize("quick", [(), ("cpu",)], ids=["", "norms as on CUDA"])
def test_the_walk_sums_what_the_stream_lacks(quick, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsekit.blockwise.activations.MICRO_BATCH_TOKENS", {"cpu": 32})
    monkeypatch.setattr("sparsekit.blockwise.activations.QUICK", quick)
    SEEN.clear()
    view = ModelView.open(families.save("llama", tmp_path / "model"), device="cpu")
    store = StepStore(tmp_path / "step", view.dtype)
    names = [name for index in range(len(view.blocks)) for name in view.linears(index)]
    with torch.inference_mode():
        Walk(
            view=view, method=METHODS.get("noting_streams"), arguments={}, selected=frozenset(names), patterns={},
            before=view.dense_block, store=store, tokens=TOKENS, schedule="group", progress=lambda done, total: None,
        ).run()  # fmt: skip
    dense = streams_of(view, [view.dense_block(index) for index in range(len(view.blocks))])
    now = streams_of(view, [store.block(index) for index in range(len(view.blocks))])
    for name, gram in SEEN.items():
        if (name, "x") not in now:
            assert gram.owed is None
            continue
        lacking = dense[name, "stream"] - now[name, "stream"]
        torch.testing.assert_close(gram.owed, lacking.t() @ now[name, "x"], rtol=1e-3, atol=1e-4)
    assert sum(gram.owed is not None and bool(gram.owed.any()) for gram in SEEN.values()) == len(now) // 2 - 1


def owing(tokens=200):
    random = torch.Generator().manual_seed(0)
    dense = torch.randn(tokens, 16, generator=random)
    now = dense @ (torch.eye(16) + 0.1 * torch.randn(16, 16, generator=random))
    lacking = torch.randn(tokens, 5, generator=random) + now[:, :5]
    gram = StreamGram.empty(16, CPU)
    for part in (slice(0, 70), slice(70, None)):
        other = StreamGram.empty(16, CPU)
        other.pair(dense[part], now[part])
        other.owe(lacking[part], now[part])
        gram.merge(other)
    return gram, dense, now, lacking


def test_the_aim_at_the_stream_is_the_ridge_regression():
    gram, dense, now, lacking = owing()
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    ridge = (0.1 * len(now) * gram.matrix.diagonal().mean()).sqrt().double()
    rows = torch.cat([now.double(), ridge * torch.eye(16)])
    goal = torch.cat([dense.double() @ weight.double().t() + lacking.double(), ridge * weight.double().t()])
    best = torch.linalg.lstsq(rows, goal).solution.t()
    torch.testing.assert_close(gram.aimed_at_stream(weight, 0.1, 1.0, 1.0).double(), best, rtol=1e-4, atol=1e-4)
    half = (weight.double() + best) / 2
    torch.testing.assert_close(gram.aimed_at_stream(weight, 0.1, 0.5, 0.5).double(), half, rtol=1e-4, atol=1e-4)


def test_nothing_owed_is_the_aim_to_the_last_bit():
    gram, dense, now, _ = owing()
    plain = CrossGram.empty(16, CPU)
    for part in (slice(0, 70), slice(70, None)):
        other = CrossGram.empty(16, CPU)
        other.pair(dense[part], now[part])
        plain.merge(other)
    weight = torch.randn(5, 16)
    assert torch.equal(gram.aimed_at_stream(weight, 0.01, 0.5, 0.0), plain.aimed(weight, 0.01, 0.5))


def test_the_ladder_takes_broken_channels_out_of_what_is_owed():
    gram, *_ = owing()
    gram.owed[:, 2] = torch.inf
    assert gram.broken.tolist() == [column == 2 for column in range(16)]
    mended = gram.without(gram.broken)
    assert isinstance(mended, StreamGram)
    assert torch.isfinite(mended.aimed_at_stream(torch.randn(5, 16), 0.01, 0.5, 0.5)).all()
    weight = torch.randn(5, 16)
    torch.testing.assert_close(gram.diagonal().aimed_at_stream(weight, 0.01, 0.5, 0.5), weight)
