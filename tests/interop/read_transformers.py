"""Read an export with Transformers 5 and whatever its quantization_config makes it look for.

    python read_transformers.py EXPORT_DIR REFERENCE.npz

Environments: requirements-gptqmodel.txt for gptq and awq, requirements-compressed-tensors.txt for
compressed-tensors.
"""

import json
import logging
import os
import pathlib
from importlib import metadata

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # gptqmodel 7.6 starts one worker on two cores and asks for two

import torch
from common import answer_logits, arguments, versions
from transformers import AutoModelForCausalLM, AutoTokenizer, AwqConfig, GPTQConfig

logging.disable(logging.WARNING)
KERNELS = {"gptq": "torch", "awq": "torch_awq"}  # the exact ones; those chosen by "auto" round activations to int8


def requested(directory: str) -> dict:
    """What from_pretrained is told about the kernel."""
    about = json.loads((pathlib.Path(directory) / "config.json").read_text())["quantization_config"]
    kernel = KERNELS.get(about["quant_method"])
    if kernel is None:
        return {}
    if about["quant_method"] == "awq":
        keys = ("bits", "group_size", "zero_point", "version", "modules_to_not_convert")
        return {"quantization_config": AwqConfig(backend=kernel, **{key: about[key] for key in keys})}
    keys = ("bits", "group_size", "sym", "desc_act", "checkpoint_format")
    return {"quantization_config": GPTQConfig(backend=kernel, **{key: about[key] for key in keys})}


def main() -> None:
    """Load, ask, answer."""
    options = arguments(__doc__)
    model = AutoModelForCausalLM.from_pretrained(
        options.directory, dtype=torch.float32, local_files_only=True, device_map="cpu", **requested(options.directory)
    ).eval()

    def forward(tokens):
        with torch.inference_mode():
            return model(input_ids=torch.from_numpy(tokens)).logits[0].float().numpy()

    present = {distribution.metadata["Name"].lower() for distribution in metadata.distributions()}
    wanted = ("transformers", "torch", "gptqmodel", "optimum", "compressed-tensors")
    about = versions(*(name for name in wanted if name in present))
    kernels = {type(module).__name__ for module in model.model.layers[0].modules()}
    kernels = sorted(name for name in kernels if "Linear" in name)
    tokenizer = AutoTokenizer.from_pretrained(options.directory)
    answer_logits("transformers", forward, tokenizer, options, versions=about, kernels=kernels)


if __name__ == "__main__":
    main()
