"""A Llama of one block with random weights: what `sparsekit bench` compresses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sparsekit.files import write_json, write_tensors


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the block and the calibration tokens."""

    width: int
    inner: int
    heads: int
    samples: int
    length: int


def write_model(directory: Path, shape: Shape, dtype: torch.dtype) -> Path:
    """A Llama of one block with random weights, as a model directory."""
    generator = torch.Generator().manual_seed(0)
    width, inner = shape.width, shape.inner
    layer = "model.layers.0."
    sizes = {f"{layer}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
    sizes |= {f"{layer}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
    sizes |= {f"{layer}mlp.down_proj.weight": (width, inner), "model.embed_tokens.weight": (256, width)}
    tensors = {
        name: (torch.randn(size, generator=generator) / size[1] ** 0.5).to(dtype) for name, size in sizes.items()
    }
    tensors["model.embed_tokens.weight"] *= width**0.5
    for name in (f"{layer}input_layernorm", f"{layer}post_attention_layernorm", "model.norm"):
        tensors[f"{name}.weight"] = torch.ones(width, dtype=dtype)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / "model.safetensors", tensors)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": 1, "num_attention_heads": shape.heads, "num_key_value_heads": shape.heads,
        "vocab_size": 256, "max_position_embeddings": shape.length, "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    write_json(directory / "config.json", config)
    return directory
