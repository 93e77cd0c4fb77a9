"""Open a checkpoint that other software wrote, in sparsekit's environment.

python open_foreign.py DIRECTORY REFERENCE.npz
"""

import torch
from common import answer_logits, arguments, versions
from transformers import AutoTokenizer

from sparsekit import load_quantized
from sparsekit.models.chain import Chain
from sparsekit.models.view import ModelView


def main() -> None:
    """Load, ask, answer."""
    options = arguments(__doc__)
    found = load_quantized(options.directory)
    told = {"quantizer": found.quantizer, "linears": len(found), "format": found.setting.layout,
            "symmetric": found.setting.symmetric, "act_order": found.setting.act_order}  # fmt: skip
    view = ModelView.open(options.directory, dtype="float32", device="cpu")
    with Chain(view).forward() as forward:
        answer_logits(
            "sparsekit", lambda tokens: forward(torch.from_numpy(tokens))[0].numpy(),
            AutoTokenizer.from_pretrained(options.directory), options,
            versions=versions("torch", "transformers"), **told,
        )  # fmt: skip


if __name__ == "__main__":
    main()
