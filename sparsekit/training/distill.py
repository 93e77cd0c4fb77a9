"""The distillation loss, computed a slice of tokens at a time together with the output head.

A model with 128,256 tokens in its vocabulary makes 2 GB of float32 logits from 4,096 tokens, and a
plain loss keeps several such tensors. Here the head's product, the loss and its gradient are made for
`chunk` tokens at a time, so that no tensor of size [tokens, vocabulary] exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.kernels import Kernels, loss_kernel
from sparsekit.training.update import widest

CHUNK_ENTRIES = 2**25  # logits held at once: 4,096 tokens of an 8,192 vocabulary, 128 MB in float32
CHUNK_ROWS = 128  # on CUDA a chunk is a multiple of it, the height of a tile of the head's product
CHUNKS = 16  # at most so many on CUDA: each rounds the head's gradient and reads and writes all of it
IGNORED = -100  # a target that has no cross-entropy, as in torch

Direction = Literal["forward", "reverse"]


@dataclass(frozen=True, slots=True)
class Objective:
    """L = kl · T² · KL + (1 - kl) · CE + hidden · SquareHead, divergence and cross-entropy means over tokens.

    Attributes:
        kl: Weight of the divergence from the teacher, in [0, 1]; cross-entropy gets the rest.
        temperature: T, divides the logits of both inside the divergence.
        direction: `forward` is KL(teacher_T ‖ student_T), `reverse` KL(student_T ‖ teacher_T).
        hidden: Weight of the distance of the blocks' outputs, see `hidden.square_head`; no part of the
            functions below.
    """

    kl: float = 2 / 3
    temperature: float = 2.0
    direction: Direction = "forward"
    hidden: float = 0.0


SliceLoss = Callable[[Tensor, Tensor | None, Tensor, Objective, int, Tensor], tuple[Tensor, Tensor, Tensor]]


def loss_reference(
    student: Tensor, teacher: Tensor | None, targets: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss written out, for tests and for heads that cannot be chunked.

    Args:
        student: Logits [tokens, vocabulary].
        teacher: Logits [tokens, vocabulary], None when `objective.kl` is 0.
        targets: int64 [tokens], `IGNORED` where there is no next token.
        objective: Weights.
    Returns:
        Loss, divergence (without T²) and cross-entropy, scalars.
    """
    student = student.to(widest(student.dtype))
    ce = F.cross_entropy(student, targets, ignore_index=IGNORED)
    if teacher is None:
        return ce, torch.zeros_like(ce), ce
    t = objective.temperature
    log_s = F.log_softmax(student / t, -1)
    log_t = F.log_softmax(teacher.to(student.dtype) / t, -1)
    if objective.direction == "reverse":
        log_s, log_t = log_t, log_s
    kl = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    return objective.kl * t**2 * kl + (1 - objective.kl) * ce, kl, ce


def slice_loss_reference(
    student: Tensor, teacher: Tensor | None, targets: Tensor, objective: Objective, tokens: int, counted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the divergence and the cross-entropy of a slice, and ∂L/∂student [rows, vocabulary].

    Args:
        student: Logits [rows, vocabulary].
        teacher: The same or None.
        targets: int64 [rows].
        objective: Weights.
        tokens: Rows of all slices together, the divisor of the divergence.
        counted: Rows of all slices that have a target, the divisor of the cross-entropy.
    """
    student = student.to(widest(student.dtype))
    log_s = F.log_softmax(student, -1)
    valid = targets != IGNORED
    safe = targets.clamp(min=0).unsqueeze(1)
    ce = -(log_s.gather(1, safe).squeeze(1) * valid).sum()
    share = (1 - objective.kl if teacher is not None else 1.0) / counted.to(student.dtype)
    weight = (valid * share).unsqueeze(1)  # [rows, 1]
    grad = log_s.exp() * weight
    grad.scatter_add_(1, safe, -weight)
    if teacher is None:
        return torch.zeros_like(ce), ce, grad
    t, teacher = objective.temperature, teacher.to(student.dtype)
    log_s = log_s if t == 1 else F.log_softmax(student / t, -1)
    log_t = F.log_softmax(teacher if t == 1 else teacher / t, -1)
    if objective.direction == "reverse":
        p_s, ratio = log_s.exp(), log_s - log_t
        own = (p_s * ratio).sum(-1, keepdim=True)  # [rows, 1]
        grad += p_s * (ratio - own) * (objective.kl * t / tokens)
        return own.sum(), ce, grad
    p_t = log_t.exp()
    kl = (p_t * (log_t - log_s)).sum()
    grad += (log_s.exp() - p_t) * (objective.kl * t / tokens)
    return kl, ce, grad


class _ChunkedLoss(torch.autograd.Function):
    """Loss of hidden states through a linear head; its backward only hands out what forward has made."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        teacher_bias: Tensor | None,
        targets: Tensor,
        objective: Objective,
        chunk: int,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = len(hidden)
        counted = (targets != IGNORED).sum().clamp(min=1)
        low = hidden.is_cuda and head.dtype in (torch.bfloat16, torch.float16)
        grad_hidden = torch.empty_like(hidden)
        # the half-precision product accumulates in float32 inside and rounds once a chunk, as micro-batches do
        wide = widest(head.dtype)
        grad_head = torch.zeros_like(head, dtype=head.dtype if low else wide)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        kl = torch.zeros((), device=hidden.device, dtype=wide)
        ce = torch.zeros((), device=hidden.device, dtype=wide)
        for start in range(0, tokens, chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], head, bias)
            taught = None
            if teacher_hidden is not None and teacher_head is not None:
                taught = F.linear(teacher_hidden[rows], teacher_head, teacher_bias)
            slice_loss = loss_kernel(kernels, logits) or slice_loss_reference
            part_kl, part_ce, grad = slice_loss(logits, taught, targets[rows], objective, tokens, counted)
            del logits, taught
            kl += part_kl
            ce += part_ce
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=wide)
            grad = grad.to(hidden.dtype)
            grad_hidden[rows] = grad @ head
            if low:
                grad_head.addmm_(grad.t(), hidden[rows])
            else:
                grad_head.addmm_(grad.t().to(wide), hidden[rows].to(wide))
            del grad  # before the next chunk's logits are made
        ctx.made = [grad_hidden, grad_head.to(head.dtype), grad_bias]
        kl, ce = kl / tokens, ce / counted
        if teacher_hidden is None:
            return ce.clone(), kl, ce
        loss = objective.kl * objective.temperature**2 * kl + (1 - objective.kl) * ce
        return loss, kl, ce

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        if ctx.made is None:
            raise RuntimeError("the gradient of the chunked loss has been taken already; it is not kept")
        # handed over and not kept: a second gradient of the head does not fit beside the first
        made, ctx.made = ctx.made, None
        for grad in made:
            if grad is not None:
                grad.mul_(upstream[0].to(grad.dtype))
        return (*made, *([None] * 7))


def chunk_rows(tokens: int, vocabulary: int, device: torch.device) -> int:
    """Tokens of a chunk."""
    fitting = max(1, CHUNK_ENTRIES // vocabulary)
    if device.type != "cuda":
        return fitting
    return max(fitting - fitting % CHUNK_ROWS, -(-tokens // (CHUNKS * CHUNK_ROWS)) * CHUNK_ROWS)


def chunked_loss(
    hidden: Tensor,
    head: nn.Linear,
    teacher_hidden: Tensor | None,
    teacher_head: nn.Linear | None,
    targets: Tensor,
    objective: Objective,
    kernels: Kernels = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, divergence and cross-entropy without a [tokens, vocabulary] tensor.

    Args:
        hidden: What enters the student's head, [tokens, width].
        head: The student's head.
        teacher_hidden: What enters the teacher's head, [tokens, width of the teacher].
        teacher_head: The teacher's head; the vocabulary must be the same.
        targets: int64 [tokens], `IGNORED` where there is no next token.
        objective: Weights.
        kernels: Whether a Triton kernel makes the elementwise part on CUDA.
    Returns:
        Three scalars; only the first carries a gradient, and its backward runs once.
    """
    chunk = chunk_rows(len(hidden), head.weight.shape[0], hidden.device)
    taught = teacher_hidden if objective.kl > 0 else None
    weight = None if teacher_head is None else teacher_head.weight.detach()
    bias = None if teacher_head is None or teacher_head.bias is None else teacher_head.bias.detach()
    loss, kl, ce = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, taught, weight, bias, targets, objective, chunk, kernels
    )
    return loss, kl.detach(), ce.detach()


def next_token_targets(tokens: Tensor) -> Tensor:
    """Targets of windows [batch, seq_len]: the next token, `IGNORED` at the last position; int64 [tokens]."""
    targets = F.pad(tokens[:, 1:].long(), (0, 1), value=IGNORED)
    return targets.flatten()


@contextmanager
def headless(model: nn.Module, head: nn.Module) -> Iterator[None]:
    """Let the model return, as logits, what would enter its head."""
    head.forward = lambda x: x
    try:
        yield
    finally:
        del head.forward


def plain_head(model: Any, tokens: Tensor) -> nn.Linear | None:
    """The model's head if its logits are exactly what the head makes of its input, else None.

    A model that caps or scales its logits (Gemma 2, Cohere, Granite) has no plain head.

    Args:
        model: A Hugging Face causal LM.
        tokens: int [batch, seq_len], a few to try it on.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return None
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        with headless(model, head):
            hidden = model(input_ids=tokens, use_cache=False).logits
        if hidden.shape[-1] != head.in_features:
            return None
        found = head(hidden)
    return head if torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())) else None
