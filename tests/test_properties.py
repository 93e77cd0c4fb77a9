"""Random chains of methods on random tiny models keep what every run promises.

In CI a few, the same ones every time; `scripts/properties.py` tries many and records what was tried.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from sparsekit.blockwise.holding import HOLDINGS
from sparsekit.blockwise.walk import Walk
from sparsekit.checkpoint import StepStore
from sparsekit.errors import SparsekitError
from sparsekit.formats import FORMATS
from sparsekit.inference.load import load_model
from sparsekit.interchange.adapter import ADAPTER, attach_adapter
from sparsekit.interchange.export import export_as
from sparsekit.models.chain import Chain
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.registry import METHODS
from sparsekit.testing.specimens import arguments_of
from sparsekit.training.driver import Training

TRIED: Counter[str] = Counter()
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PATTERNS = ["1:4", "2:4", "3:4", "2:8", "4:8", "1:2", "5:8", "unstructured 0.3", "unstructured 0.7"]


@st.composite
def architectures(draw: st.DrawFn) -> hf.PreTrainedConfig:
    """A tiny model of one of five families, with odd numbers of heads and widths."""
    family = draw(st.sampled_from(["llama", "qwen3", "gpt2", "opt", "mixtral"]))
    heads = draw(st.sampled_from([1, 2, 4]))
    width = draw(st.sampled_from([32, 64]))
    layers = draw(st.integers(1, 2))
    inner = draw(st.sampled_from([32, 64, 96]))
    common: dict[str, Any] = {"vocab_size": 64, "hidden_size": width, "num_hidden_layers": layers,
                              "num_attention_heads": heads, "max_position_embeddings": 32, **TOKENS}  # fmt: skip
    TRIED[family] += 1
    if family == "gpt2":
        return hf.GPT2Config(
            vocab_size=64, n_embd=width, n_layer=layers, n_head=heads, n_positions=32, n_inner=inner, **TOKENS
        )
    if family == "opt":
        return hf.OPTConfig(**common, ffn_dim=inner, word_embed_proj_dim=width)
    grouped = {**common, "num_key_value_heads": draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0]))}
    tied = draw(st.booleans())
    if family == "llama":
        return hf.LlamaConfig(**grouped, intermediate_size=inner, tie_word_embeddings=tied)
    if family == "qwen3":
        return hf.Qwen3Config(**grouped, intermediate_size=inner, head_dim=width // heads, tie_word_embeddings=tied)
    return hf.MixtralConfig(**grouped, intermediate_size=inner, num_local_experts=2, num_experts_per_tok=1)


@st.composite
def chains(draw: st.DrawFn) -> list[tuple[str, dict[str, Any]]]:
    """Now and then a training, up to two pruners, and at most one quantizer behind them; or a training of integers."""
    steps: list[tuple[str, dict[str, Any]]] = []
    if draw(st.sampled_from([False, False, False, True])):
        steps.append(("ast", draw(trainings())))
        if "bits" in steps[0][1]:
            return steps
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(["magnitude", "wanda", "sparsegpt"]))
        steps.append((name, {"pattern": draw(st.sampled_from(PATTERNS))}))
    if not steps or draw(st.booleans()):
        name = draw(st.sampled_from(["rtn", "gptq", "awq"]))
        arguments: dict[str, Any] = {
            "bits": draw(st.integers(2, 8)),
            "group_size": draw(st.sampled_from([8, 16, 32, -1])),
            "symmetric": draw(st.booleans()),
        }
        if name == "gptq":
            arguments["act_order"] = draw(st.sampled_from(["none", "static", "dynamic"]))
        steps.append((name, arguments))
    return steps


@st.composite
def trainings(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `ast`: four steps, with integers, with a low-rank branch, or plain."""
    arguments: dict[str, Any] = {"pattern": draw(st.sampled_from([p for p in PATTERNS if ":" in p])), "tokens": 128,
                                 "batch": 2, "micro_batch": draw(st.sampled_from([1, 2])), "mask_every": 1,
                                 "lr": 1e-3, "compile": False}  # fmt: skip
    kind = draw(st.sampled_from(["plain", "branch", "integers", "odd", "six", "ternary"]))
    if kind == "branch":
        return {**arguments, "slorb": 16}
    if kind == "plain":
        return {**arguments, "score": draw(st.sampled_from(["magnitude", "activation"]))}
    levels = {"integer": draw(st.integers(2, 8)), "odd": draw(st.integers(1, 5)), "six": 3, "ternary": 2}
    kind = "integer" if kind == "integers" else kind
    return {**arguments, "bits": levels[kind], "levels": kind, "group_size": draw(st.sampled_from([8, 16, 32]))}


def stepped(view, name: str, written: dict[str, Any], chain: Chain, patterns, store: StepStore, seed: int) -> Chain:
    """The model after one more step; the seed chooses what is held where, and in which order groups are done."""
    method, memory = METHODS.get(name), list(HOLDINGS)[seed % len(HOLDINGS)]
    arguments = arguments_of(method, written)
    names = frozenset(name for index in range(len(view.blocks)) for name in view.linears(index))
    generator = torch.Generator().manual_seed(seed)
    if method.scope == "model":
        tokens = torch.randint(0, 64, (16, 16), generator=generator, dtype=torch.int32)
        Training(view=view, method=method, arguments=arguments, selected=names, patterns=patterns, chain=chain,
                 store=store, tokens=tokens, valid=None, seed=seed, progress=lambda *_: None).run()  # fmt: skip
    else:
        tokens = torch.randint(0, 64, (4, 16), generator=generator)
        with torch.inference_mode():
            Walk(view=view, method=method, arguments=arguments, selected=names, patterns=patterns, before=chain.block,
                 store=store, tokens=tokens if method.stats else None, schedule=("block", "group")[seed // 4 % 2],
                 progress=lambda *_: None, holding=HOLDINGS[memory]).run()  # fmt: skip
    TRIED[f"memory {memory}"] += 1
    TRIED[" ".join([name, *(key for key in ("bits", "slorb") if name == "ast" and key in written)])] += 1
    return chain.then(store, trains=method.kind == "train")


def proved(config: hf.PreTrainedConfig, steps: list[tuple[str, dict[str, Any]]], seed: int, work: Path) -> None:
    """Run a chain on a random model and check everything a run promises."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(work / "model")
    view = ModelView.open(work / "model", dtype="float32", device="cpu")
    tokens = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(seed))
    names = frozenset(name for index in range(len(view.blocks)) for name in view.linears(index))
    chain, patterns = Chain(view), {}
    for number, (name, written) in enumerate(steps):
        if "pattern" in written:
            patterns = dict.fromkeys(names, Pattern.parse(written["pattern"]))
        chain = stepped(view, name, written, chain, patterns, StepStore(work / f"{number}", view.dtype), seed)
    last = METHODS.get(steps[-1][0])
    quantized = last.quantizes(arguments_of(last, steps[-1][1]))
    for index in range(len(view.blocks)):
        for state in chain.block(index).linears.values():
            weight = state.weight
            assert torch.isfinite(weight).all()
            pattern: Pattern | None = patterns.get(state.name)
            if pattern is not None:
                assert pattern.violations(weight) == 0
                assert state.mask is not None
                assert not weight[~state.mask].any()
                assert not torch.signbit(weight[~state.mask]).any()
            assert (state.quantized is not None) == quantized
    with chain.forward() as forward:
        expected = forward(tokens)
    assert torch.isfinite(expected).all()
    reloaded(view, chain, patterns, tokens, expected, work, quantized)


def reloaded(view, chain, patterns, tokens, expected, work: Path, quantized: bool) -> None:
    """Export and reload: the dense directory with transformers, the 2:4 formats with sparsekit where they fit."""
    export_as(FORMATS["dense"], view, chain.block, work / "dense", patterns=patterns)
    plain = AutoModelForCausalLM.from_pretrained(work / "dense", dtype=torch.float32).eval()
    if (work / "dense" / ADAPTER).is_dir():
        attach_adapter(plain, work / "dense")
    with torch.inference_mode():
        found = plain(input_ids=tokens, use_cache=False).logits
    largest = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= 1e-5 * largest
    for name in ("sparsekit-24", "sparsekit-24-compact", "sparsekit-compact", "sparsekit-coded") if quantized else ():
        repacked(name, view, chain, patterns, tokens, expected, work / name)


def repacked(name, view, chain, patterns, tokens, expected, directory: Path) -> None:
    """Export in a format of ours and open it again, or be told why not before anything is written."""
    refused = ""
    try:
        export_as(FORMATS[name], view, chain.block, directory, patterns=patterns)
    except SparsekitError as error:
        refused = str(error)
    if refused:  # other bits, other patterns
        assert f"no {name} export" in refused
        assert not directory.exists()
        return
    if (directory / ADAPTER).is_dir():  # what a view does not read
        with torch.inference_mode():
            found = load_model(directory, device="cpu").model(input_ids=tokens, use_cache=False).logits
        assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    else:
        with Chain(ModelView.open(directory, dtype="float32", device="cpu")).forward() as forward:
            assert torch.equal(forward(tokens), expected)
    TRIED[name] += 1


def once(config: hf.PreTrainedConfig, steps: list[tuple[str, dict[str, Any]]], seed: int) -> None:
    with tempfile.TemporaryDirectory(prefix="sparsekit-property-") as work:
        refused = ""
        try:
            proved(config, steps, seed, Path(work))
        except SparsekitError as error:
            refused = str(error)
        if refused:  # a group size that divides no row is told by name; nothing else may go wrong
            known = ("does not divide", "is no multiple of", "do not divide", "fused tensor", "can carry no low-rank")
            assert any(words in refused for words in known), refused
            TRIED["refused by name"] += 1


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=QUIET, phases=[Phase.generate])
@given(architectures(), chains(), st.integers(0, 99))
def test_random_chains_keep_every_promise(config, steps, seed):
    once(config, steps, seed)


@pytest.mark.parametrize(
    ("pruner", "quantizer", "bits"),
    [("sparsegpt", "gptq", 4), ("sparsegpt", "awq", 4), ("wanda", "gptq", 3), ("wanda", "rtn", 2)],
)
def test_chains_of_2_4_and_few_bits_come_back_from_the_formats_of_ours(pruner, quantizer, bits):
    before = Counter(TRIED)
    config = hf.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                            num_attention_heads=2, max_position_embeddings=32, **TOKENS)  # fmt: skip
    once(config, [(pruner, {"pattern": "2:4"}), (quantizer, {"bits": bits, "group_size": 16})], 0)
    assert TRIED["sparsekit-24"] == before["sparsekit-24"] + (bits == 4)
    assert TRIED["sparsekit-24-compact"] == before["sparsekit-24-compact"] + 1
    assert TRIED["sparsekit-coded"] == before["sparsekit-coded"] + 1
