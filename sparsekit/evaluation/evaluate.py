"""Scores of a model: perplexity, agreement with the dense model, and zero-shot tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsekit.errors import NumericsError
from sparsekit.evaluation.zeroshot import lm_eval_scores
from sparsekit.shortage import half, twice

__all__ = ["Agreement", "Agreements", "Score", "agreement", "lm_eval_scores", "perplexity", "window_losses"]

CHUNK = 1 << 24  # logits turned to float32 at a time: 64 MB


@dataclass(frozen=True, slots=True)
class Score:
    """Perplexity of a model on the windows of a text.

    Attributes:
        losses: Mean next-token loss of every window in nats, float64 [windows].
        seq_len: Tokens of a window; the first is given, the others are predicted.
        note: What went out of the ordinary.
    """

    losses: Tensor
    seq_len: int
    note: str = ""

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return float(self.losses.mean())

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss."""
        return float(self.losses.mean().exp())

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean loss over windows, whose tokens are not independent; None for one window."""
        count = len(self.losses)
        return None if count < 2 else float(self.losses.std()) / count**0.5

    @property
    def protocol(self) -> str:
        """How the number came to be."""
        predicted = self.seq_len - 1
        return (
            f"mean of the {predicted} next-token losses of {len(self.losses)} windows of {self.seq_len} tokens, "
            "non-overlapping, no BOS, last partial window dropped; float32 log-softmax"
        )

    def as_dict(self) -> dict[str, Any]:
        """The score for JSON."""
        return {
            "perplexity": self.perplexity,
            "loss": self.loss,
            "stderr": self.stderr,
            "tokens": len(self.losses) * (self.seq_len - 1),
            "windows": len(self.losses),
            "seq_len": self.seq_len,
            "protocol": self.protocol,
            "window_losses": [round(loss, 6) for loss in self.losses.tolist()],
            **({"note": self.note} if self.note else {}),
        }


def perplexity(
    forward: Callable[[Tensor], Tensor], windows: Tensor, *, batch: int, progress: Callable[[int, int], None]
) -> Score:
    """Score a model on windows of tokens.

    Args:
        forward: From tokens int [batch, seq_len] to logits [batch, seq_len, vocabulary].
        windows: Tokens int [windows, seq_len], seq_len >= 2.
        batch: Windows of one forward; fix it across the arms of a comparison, it moves the last digits.
        progress: Called with (windows done, windows in all).
    Raises:
        NumericsError: A loss is not finite; the message gives the window.
    """
    losses: list[Tensor] = []
    start, note = 0, ""

    def smaller() -> None:
        nonlocal batch, note
        before, batch = batch, half(batch, "a forward")
        note = f"the device ran out of memory with {before} windows in a forward; {batch} from window {start} on"

    def score() -> Tensor:
        tokens = windows[start : start + batch]
        return window_losses(forward(tokens), tokens)

    while start < len(windows):
        found = twice(score, smaller)
        if not bool(found.isfinite().all()):
            first = start + int((~found.isfinite()).nonzero()[0])
            raise NumericsError(f"the loss on window {first} is not finite: the model's logits overflow or are NaN")
        losses.append(found)
        start += len(found)
        progress(start, len(windows))
    return Score(torch.cat(losses), windows.shape[1], note)


def window_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean next-token loss of every window in nats, float64 [batch] on the CPU.

    Args:
        logits: [batch, seq_len, vocabulary], any float dtype.
        tokens: int [batch, seq_len].
    """
    targets = tokens.to(logits.device, torch.int64)
    sums = torch.zeros(len(tokens), dtype=torch.float64, device=logits.device)
    for index in range(len(tokens)):
        for rows in _chunks(logits.shape[1] - 1, logits.shape[2]):
            predicted = logits[index, rows].float()  # [rows, vocabulary]
            wanted = targets[index, rows.start + 1 : rows.stop + 1]
            sums[index] += functional.cross_entropy(predicted, wanted, reduction="none").double().sum()
    return sums.cpu() / (tokens.shape[1] - 1)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a model's predictions are from the dense model's; sums, so that parts can be added.

    Attributes:
        divergence: Sum over tokens of KL(dense || student) in nats.
        agreed: Tokens whose most likely prediction is the same.
        tokens: Predictions compared.
    """

    divergence: float = 0.0
    agreed: int = 0
    tokens: int = 0

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(self.divergence + other.divergence, self.agreed + other.agreed, self.tokens + other.tokens)

    @property
    def kl(self) -> float:
        """KL(dense || student), mean nats per token."""
        return self.divergence / self.tokens

    @property
    def top1(self) -> float:
        """Share of tokens on which both put the same token first."""
        return self.agreed / self.tokens


def agreement(student_logits: Tensor, dense_logits: Tensor) -> Agreement:
    """Compare the predictions of a model with the dense model's, position by position.

    Every position counts, the last of a window too: both models predict there, no target is needed.

    Args:
        student_logits: [..., vocabulary], any float dtype. Not modified.
        dense_logits: Same shape.
    """
    student = student_logits.reshape(-1, student_logits.shape[-1])
    dense = dense_logits.reshape(-1, dense_logits.shape[-1]).to(student.device)
    total = Agreement()
    for rows in _chunks(*student.shape):
        ours, theirs = student[rows].float().log_softmax(-1), dense[rows].float().log_softmax(-1)
        divergence = functional.kl_div(ours, theirs, reduction="none", log_target=True).double().sum()
        same = (student[rows].argmax(-1) == dense[rows].argmax(-1)).sum()
        total += Agreement(float(divergence), int(same), len(ours))
    return total


@dataclass(slots=True)
class Agreements:
    """Agreement with the dense model, window by window, gathered while a text is scored."""

    windows: list[Agreement] = field(default_factory=list)

    def between(
        self, student: Callable[[Tensor], Tensor], dense: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """The student's forward, which compares every batch with the dense model's on the way.

        No logits outlive their batch. Both take tokens int [batch, seq_len].
        """

        def forward(tokens: Tensor) -> Tensor:
            logits, reference = student(tokens), dense(tokens)
            self.windows += [agreement(ours, theirs) for ours, theirs in zip(logits, reference, strict=True)]
            return logits

        return forward

    def as_dict(self) -> dict[str, Any]:
        """Means over tokens, with standard errors over windows; None for one window."""
        found: dict[str, Any] = {"tokens": sum(window.tokens for window in self.windows)}
        for name, values in (("kl", [w.kl for w in self.windows]), ("top1", [w.top1 for w in self.windows])):
            found[name] = fmean(values)  # windows are of one length
            found[f"{name}_stderr"] = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        return found


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Slices of rows whose float32 logits stay within `CHUNK`."""
    step = max(1, CHUNK // vocabulary)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
