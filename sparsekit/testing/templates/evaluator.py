"""Given name: say here what it measures and where it comes from."""

from torch import Tensor

import sparsekit as sk


@sk.evaluator("given_name")
def given_name(forward: sk.Forward, windows: Tensor, /, *, top: int = 1) -> dict[str, float]:
    """Mean probability of the most likely next tokens; replace it by your own numbers.

    Args:
        top: How many tokens.
    """
    shares = []
    for window in windows:  # int32 [seq_len], on the CPU
        logits = forward(window.unsqueeze(0)).float()  # [1, seq_len, vocabulary], where the model is
        shares.append(float(logits.softmax(-1).topk(top).values.sum(-1).mean()))
    return {"probability": sum(shares) / len(shares)}
