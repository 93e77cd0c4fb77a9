"""Quantize a model with GPTQModel and write down what it computes, for sparsekit to open.

python write_gptqmodel.py MODEL TEXT OUT [--asymmetric]      in the environment of requirements-gptqmodel.txt
"""

import os
import sys

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

from common import compare_with, text_of
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig


def main(source: str, text: str, out: str, *flags: str) -> None:
    """Quantize, save, open again with the exact kernel, ask."""
    symmetric = "--asymmetric" not in flags
    tokenizer = AutoTokenizer.from_pretrained(source)
    content = text_of(text)
    documents = [dict(tokenizer(content[start : start + 1500])) for start in range(0, 48000, 1500)]
    config = QuantizeConfig(bits=4, group_size=64, sym=symmetric, desc_act=False)
    model = GPTQModel.load(source, config, device="cpu")
    model.quantize(documents, batch_size=4)
    model.save(out)
    kernel = GPTQConfig(bits=4, group_size=64, sym=symmetric, desc_act=False, backend="torch")
    written = AutoModelForCausalLM.from_pretrained(out, quantization_config=kernel, dtype="float32", device_map="cpu")
    compare_with(written.eval(), tokenizer, content, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
