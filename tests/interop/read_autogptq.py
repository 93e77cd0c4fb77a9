"""Read an export with auto-gptq and compare it with the dense export of the same model.

Runs in the environment of `requirements-autogptq.txt`, which holds nothing of sparsekit:

    python read_autogptq.py GPTQ_DIR --dense DENSE_DIR --text FILE

Prints one JSON line; exits with 1 when the two exports disagree by more than `--tolerance` of the
largest logit.
"""

import argparse
import hashlib
import json
import logging
import pathlib
import sys

import torch
import transformers
from auto_gptq import AutoGPTQForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

logging.disable(logging.WARNING)
WINDOW = 512


def windows(directory: str, text: str, count: int) -> torch.Tensor:
    """The first tokens of a text, [count, WINDOW]."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with open(text, encoding="utf-8") as file:
        tokens = tokenizer(file.read(count * WINDOW * 8), add_special_tokens=False)["input_ids"]
    return torch.tensor(tokens[: count * WINDOW]).reshape(count, WINDOW)


def scores(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits and perplexity, one window at a time."""
    with torch.inference_mode():
        logits = torch.cat([model(input_ids=row.unsqueeze(0)).logits.float() for row in tokens])
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return logits, float(loss.exp())


def restore_tied(model: torch.nn.Module, directory: str) -> list[str]:
    """Read tied tensors again.

    auto-gptq 0.7.1 with accelerate 1.2 leaves a head that is tied to the embeddings, and the
    embeddings with it, at what they were initialised to, unless the checkpoint holds both names.
    """
    tensors = {}
    for path in pathlib.Path(directory).glob("*.safetensors"):
        tensors |= load_file(path)
    restored = []
    for name, parameter in model.named_parameters():
        if name in tensors and not torch.equal(parameter, tensors[name].to(parameter.dtype)):
            parameter.data.copy_(tensors[name])
            restored.append(name)
    return restored


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory")
    parser.add_argument("--dense", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tolerance", type=float, default=0.005)
    arguments = parser.parse_args()
    tokens = windows(arguments.directory, arguments.text, arguments.windows)
    quantized = AutoGPTQForCausalLM.from_quantized(
        arguments.directory,
        device="cpu",
        use_triton=False,
        use_safetensors=True,
        disable_exllama=True,
        disable_exllamav2=True,
        inject_fused_attention=False,
        inject_fused_mlp=False,
        torch_dtype=torch.float32,
    )
    dense = AutoModelForCausalLM.from_pretrained(arguments.dense, torch_dtype=torch.float32)
    restored = restore_tied(quantized.model, arguments.directory)
    found, perplexity = scores(quantized.model.eval(), tokens)
    expected, dense_perplexity = scores(dense.eval(), tokens)
    difference = float((found - expected).abs().max())
    largest = float(expected.abs().max())
    kinds = {type(module).__module__ for module in quantized.modules() if type(module).__name__ == "QuantLinear"}
    print(
        json.dumps(
            {
                "transformers": transformers.__version__,
                "kernels": sorted(kinds),
                "restored": restored,
                "tokens": tokens.numel(),
                "perplexity": perplexity,
                "dense_perplexity": dense_perplexity,
                "largest_difference": difference,
                "largest_logit": largest,
                "digest": hashlib.sha256(found.round(decimals=1).numpy().tobytes()).hexdigest()[:16],
            }
        )
    )
    return int(not difference <= arguments.tolerance * largest)


if __name__ == "__main__":
    sys.exit(main())
