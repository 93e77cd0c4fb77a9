"""Tiny random configurations of the families sparsekit is tested on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **TOKENS,
}
GQA = {**SMALL, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**GQA),
    "qwen2": lambda: hf.Qwen2Config(**GQA),
    "qwen3": lambda: hf.Qwen3Config(**GQA, head_dim=8),
    "mistral": lambda: hf.MistralConfig(**GQA, sliding_window=None),
    "gemma2": lambda: hf.Gemma2Config(**GQA, head_dim=8, sliding_window=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**GQA, head_dim=8, sliding_window=8),
    "phi": lambda: hf.PhiConfig(**SMALL),
    "phi3": lambda: hf.Phi3Config(**GQA),
    "opt": lambda: hf.OPTConfig(**{**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gpt2": lambda: hf.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, **TOKENS),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SMALL),
    "mixtral": lambda: hf.MixtralConfig(**GQA, **EXPERTS, num_local_experts=4),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**GQA, **EXPERTS, head_dim=8, moe_intermediate_size=16, num_experts=4),
    "olmo2": lambda: hf.Olmo2Config(**GQA),
}
MIXTURES = ("mixtral", "qwen3_moe")


def save(family: str, directory: Path) -> Path:
    """Write a random model of the family; weights are large enough to tell layers apart."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory


def load(family: str, directory: Path) -> PreTrainedModel:
    """Open it as any user would, with transformers' plain loop over experts."""
    plain: dict[str, Any] = {"experts_implementation": "eager"} if family in MIXTURES else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **plain)
    return model.eval()
