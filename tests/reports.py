"""A report as a run of AST and GPTQ on a model of 12 blocks makes it, for tests and for looking at pages."""

from __future__ import annotations

import math
import random
from typing import Any

BLOCKS = 12
SHAPES = {
    "self_attn.q_proj": (384, 384),
    "self_attn.k_proj": (128, 384),
    "self_attn.v_proj": (128, 384),
    "self_attn.o_proj": (384, 384),
    "mlp.gate_proj": (1024, 384),
    "mlp.up_proj": (1024, 384),
    "mlp.down_proj": (384, 1024),
}
PROTOCOL = (
    "windows that do not overlap, no beginning-of-text token, mean of the next-token losses of each window, "
    "float32 softmax"
)


def score(perplexity: float, windows: int, seq_len: int, seed: int) -> dict[str, Any]:
    """What evaluating one text returns."""
    rng, own = random.Random(seed), random.Random(perplexity)  # windows differ much, the arms little
    losses = [math.log(perplexity) + rng.gauss(0, 0.25) + own.gauss(0, 0.01) for _ in range(windows)]
    return {
        "perplexity": perplexity,
        "loss": math.log(perplexity),
        "stderr": 0.25 / math.sqrt(windows),
        "tokens": windows * (seq_len - 1),
        "windows": windows,
        "seq_len": seq_len,
        "protocol": PROTOCOL,
        "window_losses": losses,
    }


def scores(valid: float, wikitext: float) -> dict[str, Any]:
    """Both texts."""
    return {"valid": score(valid, 480, 1024, 1), "wikitext2": score(wikitext, 284, 1024, 2)}


def layers(method: str, error_of: str) -> list[dict[str, Any]]:
    """Records of 12 x 7 linears."""
    rng = random.Random(method)
    found = []
    for block in range(BLOCKS):
        for kind, (rows, columns) in SHAPES.items():
            base = {"self_attn": 0.9, "mlp": 1.4}[kind.partition(".")[0]] * (0.02 if method == "ast" else 0.004)
            error = base * math.exp(rng.gauss(0, 0.5)) * (1 + block / 6) * (9 if kind.endswith("down_proj") else 1)
            noted = method == "gptq" and block == 7 and kind.endswith("down_proj")
            found.append(
                {
                    "name": f"model.layers.{block}.{kind}",
                    "shape": [rows, columns],
                    "sparsity": 0.5,
                    "pattern": "2:4",
                    "groups": rows * columns // 4,
                    "violations": 0,
                    "error": error,
                    "error_of": error_of,
                    "bits": None if method == "ast" else 4,
                    "seconds": 0.0 if method == "ast" else 0.42,
                    "notes": ["3 inputs never fire, their weights are rounded alone"] if noted else [],
                }
            )
    return found


def curve(records: int = 200) -> list[dict[str, Any]]:
    """The log of a training step."""
    rng, found = random.Random(0), []
    for index in range(records):
        share = index / (records - 1)
        kl, ce = 0.9 * math.exp(-6 * share) + 0.12 + rng.gauss(0, 0.01), 3.4 + 0.8 * math.exp(-7 * share)
        found.append(
            {
                "step": index + 1,
                "tokens": (index + 1) * 131072,
                "loss": 2 / 3 * kl + 1 / 3 * ce,
                "kl": kl,
                "ce": ce + rng.gauss(0, 0.02),
                "grad_norm": 0.4 + 2 * math.exp(-9 * share) + abs(rng.gauss(0, 0.03)),
                "lr": 1e-3 * min(1.0, share / 0.05) * (0.55 + 0.45 * math.cos(math.pi * share)),
                "decay": 1e-3 * min(1.0, share / 0.25),
                **({"flip_rate": 0.02 * math.exp(-4 * share)} if index % 10 == 9 else {}),
                **({"initial_flip_rate": 0.16 * (1 - math.exp(-3 * share))} if index % 10 == 9 else {}),
                **({"valid_perplexity": 28.4 + 15 * math.exp(-8 * share)} if index % 20 == 19 else {}),
            }
        )
    return found


def step(index: int, method: str, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Summary of a step."""
    trains = method == "ast"
    held = layers(method, "weights" if trains else "outputs")
    made: dict[str, Any] = {
        "index": index,
        "method": method,
        "kind": "prune" if trains else "quantize",
        "params": {"pattern": "2:4", "tokens": 26214400, "lr": 1e-3, "kl_weight": 2 / 3}
        if trains
        else {"bits": 4, "group_size": 128, "symmetric": True, "act_order": False, "damp": 0.01},
        "source": "Huang et al. 2024, arXiv:2407.20584" if trains else "Frantar et al. 2022, arXiv:2210.17323, Alg. 1",
        "pattern": "2:4",
        "bits": [] if trains else [4],
        "sparsity": 0.5 if trains else 0.50731,
        "groups": sum(layer["groups"] for layer in held),
        "violations": 0,
        "error": sum(layer["error"] for layer in held) / len(held),
        "error_of": "weights" if trains else "outputs",
        "before": before,
        "perplexity": after,
        "notes": [f"{layer['name']}: {note}" for layer in held for note in layer["notes"]],
        "layers": held,
        "seconds": 725.2 if trains else 48.3,
        "peak_memory": 6_442_450_944 if trains else 1_288_490_188,
        "peak_memory_of": "device memory allocated",
    }
    if trains:
        made |= {"training": {"tokens": 26214400, "steps": 200, "final_loss": 1.31, "flips": 240_113}, "curve": curve()}
    return made


def exports(parameters: int) -> list[dict[str, Any]]:
    """A dense and a GPTQ export."""
    weights = BLOCKS * sum(rows * columns for rows, columns in SHAPES.values())
    packed = {
        "codes": weights // 2,
        "positions": 0,
        "scales": weights // 128 * 2,
        "zeros": weights // 128 // 2,
        "groups": BLOCKS * 4 * sum(columns for _, columns in SHAPES.values()),
        "dense": (parameters - weights) * 4,
        "headers": 41_216,
        "masks": weights // 8,
    }
    whole = dict.fromkeys(packed, 0) | {"dense": parameters * 4, "headers": 10_320}
    checked = "2026-11-24"
    loads = {"verdict": "loads", "checked": checked}
    engines = {
        "dense": [
            {
                "engine": "Transformers 5.23",
                "sentence": "Opens like the original; the run compares its logits.",
                **loads,
            },
            {
                "engine": "other readers of the original model",
                "verdict": "not checked",
                "sentence": "The zeros are stored as zeros: same size and same speed as the original.",
                "checked": checked,
            },
        ],
        "gptq": [
            {"engine": "Transformers 5.23 with gptqmodel 7.6 and optimum 2.3", "sentence": "Checked on CPU.", **loads},
            {
                "engine": "auto-gptq 0.7.1 with Transformers 4.57",
                "verdict": "misreads",
                "sentence": "It takes every linear of a block for quantized.",
                "checked": checked,
            },
            {
                "engine": "vLLM 0.32 (CPU build)",
                "verdict": "refuses",
                "sentence": "Asymmetric GPTQ: 'Unsupported quantization config: sym=False'.",
                "checked": checked,
            },
        ],
    }
    notes = ["the zeros of the pattern are stored as ordinary codes: no smaller and no faster than dense integers"]
    made = []
    for name, held in (("dense", whole), ("gptq", packed)):
        total = sum(value for key, value in held.items() if key != "masks")
        sizes = {**held, "total": total, "files": total, "fp32": parameters * 4, "fp16": parameters * 2}
        made.append(
            {
                "format": name,
                "directory": f"runs/ast-gptq4/export/{name}",
                "parameters": parameters,
                "bytes": sizes,
                "ratio_fp32": parameters * 4 / total,
                "ratio_fp16": parameters * 2 / total,
                "bits_per_weight": None if name == "dense" else 4.19,
                "linears": {"weights": 10**7, "bytes": 10**7, "ratio_fp32": 4.0, "ratio_fp16": 2.0},
                "engines": engines[name],
                "notes": [] if name == "dense" else notes,
                "files": {"model.safetensors": {"size": total, "sha256": "0" * 64}},
            }
        )
    return made


def make_report() -> dict[str, Any]:
    """The whole report."""
    weights = BLOCKS * sum(rows * columns for rows, columns in SHAPES.values())
    embeddings, norms = 8192 * 384, 25 * 384
    parameters = weights + embeddings + norms
    dense, pruned, final = scores(27.54, 41.29), scores(28.381, 41.02), scores(29.204, 42.377)
    gates = [
        {"text": "valid", "allowed": 0.05, "dense": 27.54, "final": 29.204, "increase": 0.0604, "passed": False},
        {"text": "wikitext2", "allowed": 0.05, "dense": 41.29, "final": 42.377, "increase": 0.0263, "passed": True},
    ]
    return {
        "name": "ast-gptq4-base",
        "recipe": "name: ast-gptq4-base\nseed: 0\nmodel: {path: models/base}\nsteps: [{method: ast}, {method: gptq}]\n",
        "environment": {
            "sparsekit": "0.1.0",
            "python": "3.11.7",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "device": "NVIDIA H200",
            "dtype": "float32",
            "compute_dtype": "bfloat16",
        },
        "model": {"path": "/work/shared/models/base", "parameters": parameters, "digest": "9c1f" * 16},
        "coverage": {
            "compressed": weights,
            "ignored": 0,
            "by_rule": embeddings + norms,
            "unreachable": {},
            "share": 1.0,
            "total": parameters,
        },
        "notes": [],
        "dense": dense,
        "final": final,
        "steps": [step(0, "ast", dense, pruned), step(1, "gptq", pruned, final)],
        "tasks": {
            "dense": {
                "arc_easy": {"alias": "arc_easy", "acc,none": 0.4251, "acc_stderr,none": 0.0101},
                "piqa": {"alias": "piqa", "acc,none": 0.5974, "acc_stderr,none": 0.0114},
            },
            "final": {
                "arc_easy": {"alias": "arc_easy", "acc,none": 0.4188, "acc_stderr,none": 0.0101},
                "piqa": {"alias": "piqa", "acc,none": 0.5941, "acc_stderr,none": 0.0115},
            },
        },
        "exports": exports(parameters),
        "gates": gates,
    }
