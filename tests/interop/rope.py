"""Rotary settings that Transformers 5 moved: does Transformers 4 compute the same with an export?

python rope.py write DIRECTORY     in sparsekit's environment: small models, exported, and their logits
python rope.py read DIRECTORY      in the environment of requirements-autogptq.txt; one JSON line a model
"""

import json
import pathlib
import sys

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS = torch.arange(240).reshape(2, 120).remainder(96)
ROPE = {
    "theta": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 32,
    },
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 96, "max_position_embeddings": 64,
}  # fmt: skip


def write(directory: pathlib.Path) -> None:
    """Models, exports, logits."""
    from sparsekit.interchange.export import export_as
    from sparsekit.formats import FORMATS
    from sparsekit.models.view import ModelView

    kinds = [("llama", name, rope) for name, rope in ROPE.items()]
    kinds += [("qwen2", "theta", ROPE["theta"]), ("phi", "partial", {**ROPE["theta"], "partial_rotary_factor": 0.5})]
    for kind, name, rope in kinds:
        config = AutoConfig.for_model(kind, **SMALL, rope_parameters=rope)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4)  # logits of a size that tells models apart
        source = directory / f"{kind}-{name}-source"
        model.save_pretrained(source)
        view = ModelView.open(source)
        export_as(FORMATS["dense"], view, view.dense_block, directory / f"{kind}-{name}")
        with torch.inference_mode():
            np.save(directory / f"{kind}-{name}.npy", model(input_ids=TOKENS, use_cache=False).logits.numpy())


def read(directory: pathlib.Path) -> None:
    """Open every export and compare."""
    for path in sorted(directory.glob("*.npy")):
        expected = np.load(path)
        model = AutoModelForCausalLM.from_pretrained(path.with_suffix(""), torch_dtype=torch.float32).eval()
        with torch.inference_mode():
            found = model(input_ids=TOKENS, use_cache=False).logits.numpy()
        about = {"model": path.stem, "largest_difference": float(np.abs(found - expected).max())}
        print(json.dumps({**about, "largest_logit": float(np.abs(expected).max())}))


if __name__ == "__main__":
    torch.set_num_threads(1)  # the first forward of a process rounds differently with several
    {"write": write, "read": read}[sys.argv[1]](pathlib.Path(sys.argv[2]))
