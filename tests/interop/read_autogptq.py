"""Read a GPTQ export with auto-gptq, which shares no code with sparsekit.

python read_autogptq.py EXPORT_DIR REFERENCE.npz      in the environment of requirements-autogptq.txt
"""

import logging
import pathlib

import torch
from auto_gptq import AutoGPTQForCausalLM
from common import answer_logits, arguments, versions
from safetensors.torch import load_file
from transformers import AutoTokenizer

logging.disable(logging.WARNING)


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


def main() -> None:
    """Load, ask, answer."""
    options = arguments(__doc__)
    quantized = AutoGPTQForCausalLM.from_quantized(
        options.directory,
        device="cpu",
        use_triton=False,
        use_safetensors=True,
        disable_exllama=True,
        disable_exllamav2=True,
        inject_fused_attention=False,
        inject_fused_mlp=False,
        torch_dtype=torch.float32,
    )
    restored = restore_tied(quantized.model, options.directory)
    model = quantized.model.eval()

    def forward(tokens):
        with torch.inference_mode():
            return model(input_ids=torch.from_numpy(tokens)).logits[0].float().numpy()

    kernels = {type(module).__module__ for module in model.modules() if type(module).__name__ == "QuantLinear"}
    about = versions("auto-gptq", "transformers", "torch", "accelerate")
    tokenizer = AutoTokenizer.from_pretrained(options.directory)
    answer_logits("auto-gptq", forward, tokenizer, options, versions=about, kernels=sorted(kernels), restored=restored)


if __name__ == "__main__":
    main()
