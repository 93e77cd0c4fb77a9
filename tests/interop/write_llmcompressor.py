"""Quantize a model with llm-compressor and write down what it computes, for sparsekit to open.

python write_llmcompressor.py MODEL TEXT OUT [--asymmetric]    in the environment of requirements-llmcompressor.txt
"""

import sys

from common import compare_with, text_of
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(source: str, text: str, out: str, *flags: str) -> None:
    """Quantize, save, open again, ask."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    content = text_of(text)
    documents = [{"text": content[start : start + 1500]} for start in range(0, 48000, 1500)]
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric="--asymmetric" not in flags, strategy="group", group_size=64
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    modifier = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    oneshot(model=model, tokenizer=tokenizer, dataset=Dataset.from_list(documents), recipe=modifier,
            max_seq_length=256, num_calibration_samples=len(documents))  # fmt: skip
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)
    written = AutoModelForCausalLM.from_pretrained(out, dtype="float32")
    compare_with(written.eval(), tokenizer, content, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
