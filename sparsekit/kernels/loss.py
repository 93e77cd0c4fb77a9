# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,misc"
"""The elementwise part of the distillation loss: two passes over a row of logits, no float32 copy.

The first pass finds the largest logits and the sums of both softmaxes as it goes (online softmax,
Milakov and Gimelshein 2018, arXiv:1805.02867), and the divergence with them. The second writes the
gradient where the student's logits were. Reads and writes are 10 bytes for each pair of bfloat16 logits.

The reference is `distill.slice_loss_reference`.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from sparsekit.training.distill import Objective

BLOCK = 4096  # logits of a row in flight
WARPS = 8
LOW = tl.constexpr(-1.0e30)  # below every logit; infinity would make NaN of its differences


@triton.jit
def _rows(
    student, teacher, targets, counted, kl_out, ce_out, cold, ce_share, kl_share,
    VOCABULARY: tl.constexpr, TEACHER: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program.

    `cold` is 1 / T, `ce_share` the weight of the cross-entropy, `kl_share` that of the divergence times T / tokens.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * VOCABULARY
    teacher += row * VOCABULARY
    lanes = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    valid = target >= 0
    hit = tl.load(student + target, mask=valid, other=0.0).to(tl.float32)
    tl.debug_barrier()  # every thread has read the logit that the second pass overwrites
    top, other_top = -1.0e30, -1.0e30
    total, soft, other, gap = 0.0, 0.0, 0.0, 0.0  # Σ e^s, Σ e^(s/T), Σ e^(t/T), Σ weight (a - b) / T
    for start in range(0, VOCABULARY, BLOCK):
        inside = start + lanes < VOCABULARY
        s = tl.load(student + start + lanes, mask=inside, other=LOW).to(tl.float32)
        new_top = tl.maximum(top, tl.max(s, axis=0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(s - new_top), axis=0)
        if TEACHER:
            t = tl.load(teacher + start + lanes, mask=inside, other=LOW).to(tl.float32)
            new_other = tl.maximum(other_top, tl.max(t, axis=0))
            s_shrink, t_shrink = tl.exp((top - new_top) * cold), tl.exp((other_top - new_other) * cold)
            s_soft, t_soft = tl.exp((s - new_top) * cold), tl.exp((t - new_other) * cold)
            difference = tl.where(inside, s - t, 0.0) * cold
            soft = soft * s_shrink + tl.sum(s_soft, axis=0)
            other = other * t_shrink + tl.sum(t_soft, axis=0)
            if REVERSE:
                gap = gap * s_shrink + tl.sum(s_soft * difference, axis=0)
            else:
                gap = gap * t_shrink - tl.sum(t_soft * difference, axis=0)
            other_top = new_other
        top = new_top
    tl.store(ce_out + row, tl.where(valid, top + tl.log(total) - hit, 0.0))
    kl, s_log, t_log = 0.0, 0.0, 0.0
    if TEACHER:
        s_log, t_log = top * cold + tl.log(soft), other_top * cold + tl.log(other)
        kl = gap / soft - s_log + t_log if REVERSE else gap / other - t_log + s_log
    tl.store(kl_out + row, kl)
    weight = tl.where(valid, ce_share / tl.load(counted).to(tl.float32), 0.0)
    for start in range(0, VOCABULARY, BLOCK):
        inside = start + lanes < VOCABULARY
        s = tl.load(student + start + lanes, mask=inside, other=0.0).to(tl.float32)
        grad = (tl.exp(s - top) / total - (start + lanes == target).to(tl.float32)) * weight
        if TEACHER:
            t = tl.load(teacher + start + lanes, mask=inside, other=0.0).to(tl.float32)
            p_s = tl.exp(s * cold - s_log)
            if REVERSE:
                grad += kl_share * p_s * ((s - t) * cold - s_log + t_log - kl)
            else:
                grad += kl_share * (p_s - tl.exp(t * cold - t_log))
        tl.store(student + start + lanes, grad.to(student.dtype.element_ty), mask=inside)


def slice_loss(
    student: Tensor, teacher: Tensor | None, targets: Tensor, objective: Objective, tokens: int, counted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `distill.slice_loss_reference`, but the gradient takes the place of the student's logits.

    Args:
        student: Logits [rows, vocabulary], float32, bfloat16 or float16, contiguous; overwritten.
        teacher: The same or None.
        targets: int64 [rows].
        objective: Weights.
        tokens: Rows of all slices together.
        counted: Rows of all slices that have a target, a scalar on the device.
    Returns:
        Sums of the divergence and the cross-entropy, float32 scalars, and `student`.
    """
    rows, vocabulary = student.shape
    sums = torch.empty(2, rows, dtype=torch.float32, device=student.device)
    other = student if teacher is None else teacher
    with torch.cuda.device_of(student):
        _rows[(rows,)](
            student,
            other,
            targets,
            counted,
            sums[0],
            sums[1],
            1 / objective.temperature,
            float(1.0 if teacher is None else 1 - objective.kl),
            float(objective.kl * objective.temperature / tokens),
            VOCABULARY=vocabulary,
            TEACHER=teacher is not None,
            REVERSE=objective.direction == "reverse",
            BLOCK=min(BLOCK, triton.next_power_of_2(vocabulary)),
            num_warps=WARPS,
        )
    kl, ce = sums.sum(1)
    return kl, ce, student
