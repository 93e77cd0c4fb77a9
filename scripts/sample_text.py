"""Sample the texts that ship with sparsekit from the embedded dense model itself.

    python scripts/sample_text.py [--device cuda]

The project ships no text of others. Documents are drawn at temperature 1 from the model's own
distribution (no top-k, no top-p: the texts stand for what the model has learnt, tails included),
128 at a time, until the model ends them or they reach 512 tokens. They are written one after
another, each closed by a line `<|endoftext|>`.

The same seeds draw other documents on another device. What ships was drawn on the CPU
(calibration, heldout) and on CUDA (train).
"""

from __future__ import annotations

import argparse
import lzma
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ASSETS = Path(__file__).parents[1] / "sparsekit" / "assets"
SEPARATOR = "<|endoftext|>"
LENGTH = 512
BATCH = 128
TEXTS = {"calibration": (1, 1), "heldout": (2, 1), "train": (3, 6)}  # seed, batches of 128 documents


@torch.inference_mode()
def sample(model: PreTrainedModel, batch: int, length: int, seed: int) -> list[list[int]]:
    """Token ids of `batch` documents, without the end-of-text token."""
    generator = torch.Generator(model.device).manual_seed(seed)
    end = model.config.eos_token_id
    token = torch.full((batch, 1), end, device=model.device)
    drawn, cache = [], None
    for _ in range(length):
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values if hasattr(output, "past_key_values") else output.cache
        token = torch.multinomial(output.logits[:, -1].softmax(-1), 1, generator=generator)
        drawn.append(token)
    documents = torch.cat(drawn, 1).tolist()
    return [document[: document.index(end)] if end in document else document for document in documents]


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, out: Path) -> None:
    """Sample one text and write it."""
    seed, batches = TEXTS[name]
    start, tokens, parts = time.perf_counter(), 0, []
    for number in range(batches):
        for document in sample(model, BATCH, LENGTH, seed * 1000 + number):
            text = tokenizer.decode(document).strip()
            if text:
                parts.append(f"{text}\n{SEPARATOR}\n")
                tokens += len(document)
    (out / f"{name}.txt.xz").write_bytes(lzma.compress("".join(parts).encode(), preset=9))
    print(f"{name}: {len(parts)} documents, {tokens:,} tokens, {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(TEXTS))
    parser.add_argument("--out", type=Path, default=ASSETS / "text")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny", dtype=torch.float32).to(given.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    for name in given.names:
        write(model, tokenizer, name, given.out)


if __name__ == "__main__":
    main()
