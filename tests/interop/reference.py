"""Write what a quantized export computes according to sparsekit, for the readers to be held against.

    python reference.py EXPORT_DIR TEXT OUT.npz

The export is opened as sparsekit opens any quantized checkpoint, with integers times scales in
float32: readers that do not round the products to the model's dtype see exactly these weights.
"""

import sys

import torch
from common import SEQ_LEN, WINDOWS, text_of, write_reference
from transformers import AutoTokenizer

from sparsekit.models.chain import Chain
from sparsekit.models.view import ModelView


def main(directory: str, text: str, out: str) -> None:
    """Compute and write."""
    view = ModelView.open(directory, dtype="float32", device="cpu")
    content = text_of(text)
    start = content[: WINDOWS * SEQ_LEN * 8]
    ids = AutoTokenizer.from_pretrained(directory)(start, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor(ids[: WINDOWS * SEQ_LEN]).reshape(WINDOWS, SEQ_LEN)
    with Chain(view).forward() as forward:
        logits = torch.cat([forward(row.unsqueeze(0)) for row in tokens]).float().numpy()
    write_reference(out, tokens.numpy(), logits, content)


if __name__ == "__main__":
    main(*sys.argv[1:])
