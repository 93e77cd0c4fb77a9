"""Write what a quantized export computes according to sparsekit, for the readers to be held against.

    python reference.py EXPORT_DIR TEXT OUT.npz

The export is opened as sparsekit opens any quantized checkpoint, with integers times scales in
float32: readers that do not round the products to the model's dtype see exactly these weights.
"""

import lzma
import pathlib
import sys

import numpy as np
import torch
from common import perplexity
from transformers import AutoTokenizer

from sparsekit.chain import Chain
from sparsekit.model import ModelView

WINDOWS, SEQ_LEN = 6, 256


def main(directory: str, text: str, out: str) -> None:
    """Compute and write."""
    view = ModelView.open(directory, dtype="float32", device="cpu")
    data = pathlib.Path(text).read_bytes()
    data = lzma.decompress(data) if text.endswith(".xz") else data
    content = data.decode()[: WINDOWS * SEQ_LEN * 8]
    ids = AutoTokenizer.from_pretrained(directory)(content, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor(ids[: WINDOWS * SEQ_LEN]).reshape(WINDOWS, SEQ_LEN)
    with Chain(view).forward() as forward:
        logits = torch.cat([forward(row.unsqueeze(0)) for row in tokens]).float().numpy()
    found = perplexity(logits, tokens.numpy())
    np.savez(out, tokens=tokens.numpy(), logits=logits, text=np.array(content), perplexity=np.array(found))
    print(f"{directory}: perplexity {found:.6f}, largest logit {np.abs(logits).max():.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
