"""A Llama of some shape with made-up weights, in bf16 or packed from the start, and how fast it reads and writes."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from accelerate import init_empty_weights
from decode_linears import random_packed
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparsekit.inference.decoder import Decoder
from sparsekit.inference.linear import fused
from sparsekit.inference.load import bytes_of

FUSED = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
PROMPT, STEPS = 128, 20


def build(shape: dict[str, int], form: str, device: str) -> LlamaForCausalLM:
    """A model in eval mode; packed weights are made packed, there is never a dense copy."""
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["blocks"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["keys"],
        max_position_embeddings=4096,
    )
    config.dtype = torch.bfloat16
    torch.manual_seed(0)
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(config).eval()
    if form != "bf16":
        for layer in model.model.layers:
            for part, names in FUSED:
                parent = layer.get_submodule(part)
                weights = [(_packed(parent.get_submodule(name), form, device), None) for name in names]
                for name, module in zip(names, fused(weights, torch.bfloat16), strict=True):
                    setattr(parent, name, module)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            size = parameter.shape
            values = torch.ones(size, device=device) if len(size) == 1 else 0.02 * torch.randn(size, device=device)
            setattr(module, name, nn.Parameter(values.bfloat16(), requires_grad=False))
    return model.to(device)


def _packed(linear: nn.Linear, form: str, device: str) -> Any:
    return random_packed(linear.out_features, linear.in_features, sparse=form != "int4", device=device)


def latency(model: LlamaForCausalLM, batch: int, rounds: int, *, fuse: bool) -> dict[str, Any]:
    """Milliseconds of a token, after a prompt; what a step needs to be set up is apart."""
    decoder = Decoder(model, PROMPT + 8 + rounds * STEPS, batch, fuse=fuse)
    decoder.prefill(torch.randint(0, model.config.vocab_size, (batch, PROMPT)))
    begun = time.perf_counter()
    decoder.capture()
    decoder.step()
    _wait(decoder.device)
    setup, times = time.perf_counter() - begun, []
    for _ in range(rounds):
        _wait(decoder.device)
        begun = time.perf_counter()
        for _ in range(STEPS):
            decoder.step()
        _wait(decoder.device)
        times.append(1000 * (time.perf_counter() - begun) / STEPS)
    spread = {"ms": statistics.median(times), "least": min(times), "most": max(times)}
    return {**spread, "eager": decoder.eager, "setup_s": setup}


def prefill(model: LlamaForCausalLM, tokens: int, rounds: int) -> dict[str, float]:
    """Milliseconds of reading a prompt."""
    prompt = torch.randint(0, model.config.vocab_size, (1, tokens), device=model.device)
    times = []
    with torch.no_grad():
        for round in range(rounds + 2):
            _wait(model.device)
            begun = time.perf_counter()
            model(input_ids=prompt, logits_to_keep=1)
            _wait(model.device)
            if round >= 2:
                times.append(1000 * (time.perf_counter() - begun))
    return {"ms": statistics.median(times), "least": min(times), "most": max(times)}


def memory(model: LlamaForCausalLM, before: int) -> dict[str, int]:
    """Bytes of the model's tensors, and what the device has allocated since `before`."""
    cuda = model.device.type == "cuda"
    return {"tensors": bytes_of(model), "allocated": torch.cuda.memory_allocated() - before if cuda else 0}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
