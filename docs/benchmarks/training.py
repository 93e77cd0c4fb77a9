"""Measure AST's training step on one CUDA device: kernels, loss, tokens a second, memory.

    python docs/benchmarks/training.py --parts check,step,loss,base,1b,7b --out training.json

Run from the repository's root; it needs torch for CUDA with Triton, transformers and pydantic. Parts:

check  the fused optimizer and the loss kernel against their torch references
step   the optimizer step of a 1.2 B model: fused, plain torch reference, and torch's fused AdamW
loss   KL + CE of 4096 tokens, 128,256 logits, width 2048: chunked and plain, extra peak memory and time
base   tokens a second of models/base's shape, 128 x 1024 tokens a step; `of_ast_mean` is to the arm without bits
1b     the same of a 1 B Llama shape, 8 x 2048 tokens a step, without the arms with bits: five do not fit 80 GB
7b     peak memory of AST steps of Llama-2-7B's shape, 16k tokens a micro-batch, leanest memory modes

`base` and `1b` take turns, step by step, between a plain dense distillation step and AST's. The dense
arm is torch.optim.AdamW(fused=True) on bfloat16 parameters with bfloat16 state, the cheapest there is.
Student, teacher, batch, torch.compile of the blocks, gradient clipping and the loss (chunked, with the
Triton kernel) are the same in all arms. `--reference-loss` gives them all the torch loss.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # read when torch is imported
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparsekit.kernels import Kernels, loss_kernel
from sparsekit.methods.ast import AstPolicy
from sparsekit.pattern import Pattern
from sparsekit.quant import Rounding
from sparsekit.training import distill
from sparsekit.training.blocks import blocks_of, compiled, recomputed
from sparsekit.training.distill import Objective, chunked_loss, loss_reference, slice_loss_reference
from sparsekit.training.grids import rounding_of
from sparsekit.training.loop import Fit, TrainJob
from sparsekit.training.lowbits import Memory
from sparsekit.training.optim import Rule, SparseAdamW, Step
from sparsekit.training.schedule import Schedule

GIB = 2**30
PATTERN = Pattern(2, 4)
LEAN = Memory("float8", "bfloat16")
INT4, ODD2 = rounding_of(4, 128, "integer"), rounding_of(2, 128, "odd")
ARMS = ("dense", "ast", "ast_int4", "ast_odd2", "ast_lean")
SHAPES: dict[str, dict[str, Any]] = {
    "base": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 7, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 8192, "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
    },
}  # fmt: skip


def timed(call: Callable[[], object], repeats: int, before: Callable[[], object] = lambda: None) -> list[float]:
    """Milliseconds of each call on the device, after two that warm up; `before` is not timed."""
    times = []
    for index in range(repeats + 2):
        before()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if index >= 2:
            times.append(start.elapsed_time(end))
    return times


def spread(times: list[float]) -> dict[str, float]:
    """Median, mean, extremes and quartiles."""
    quarter = statistics.quantiles(times, n=4)
    return {
        "median_ms": statistics.median(times), "mean_ms": statistics.fmean(times), "min_ms": min(times),
        "max_ms": max(times), "q1_ms": quarter[0], "q3_ms": quarter[2], "count": len(times),
    }  # fmt: skip


def free() -> None:
    """Give back what nobody holds and start a new peak."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def llama(name: str) -> LlamaForCausalLM:
    """A random bfloat16 Llama on the device."""
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=4096)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Magnitude masks of every linear of the blocks."""
    inside = {parameter for block in blocks_of(model) for parameter in block.parameters() if parameter.dim() == 2}
    return {name: PATTERN.keep(p.detach().abs()) for name, p in model.named_parameters() if p in inside}


def sparse_adamw(
    model: nn.Module, memory: Memory, kernels: Kernels = "triton", rounding: Rounding | None = None
) -> SparseAdamW:
    """The optimizer of a model, its kernel for new masks compiled already; on grids where there is a rounding."""
    rule = Rule(rounding=rounding, learned=rounding is not None)
    optimizer = SparseAdamW(model, masks_of(model), PATTERN, rule, memory=memory, kernels=kernels)
    if rounding is not None:
        optimizer.regrid()
    optimizer.advance(Step(1, lr=0.0, refresh=True))  # no gradient yet: it changes nothing
    return optimizer


def part_check() -> dict[str, Any]:
    """Largest differences between kernels and references; raises if they are more than rounding."""
    found: dict[str, Any] = {}
    for label, memory, dtype in (
        ("float32", Memory(), torch.float32), ("bfloat16", Memory(), torch.bfloat16), ("lean", LEAN, torch.bfloat16),
    ):  # fmt: skip
        torch.manual_seed(0)
        nets = [nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 333)).to("cuda", dtype)]
        nets.append(copy.deepcopy(nets[0]))
        pair = []
        for net, kernels in zip(nets, ("reference", "triton"), strict=True):
            masks = {name: PATTERN.keep(p.detach().abs()) for name, p in net.named_parameters() if p.dim() == 2}
            pair.append(SparseAdamW(net, masks, PATTERN, Rule(), memory=memory, kernels=kernels))
        worst, masks_equal, differing = 0.0, True, 0.0
        for number in range(1, 6):
            for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
                a.grad = torch.randn_like(a)
                b.grad = a.grad.clone()
            for optimizer in pair:
                optimizer.advance(Step(number, lr=1e-2, decay=1e-2))
            for key, expected in pair[0].tensors().items():
                have, want = pair[1].tensors()[key].float(), expected.float()
                worst = max(worst, float((have - want).norm() / want.norm().clamp(min=1e-12)))
                differing = max(differing, float((~torch.isclose(have, want, rtol=1e-4, atol=1e-7)).float().mean()))
            pair[1].load_tensors({key: value.clone() for key, value in pair[0].tensors().items()})
            for optimizer, net in zip(pair, nets, strict=True):
                net.zero_grad()
                optimizer.advance(Step(number, lr=0.0, refresh=True))
            masks_equal &= all(torch.equal(pair[1].tensors()[k], v) for k, v in pair[0].tensors().items())
            masks_equal &= [int(x) for x in pair[0].flips] == [int(x) for x in pair[1].flips]
        found[f"optimizer_{label}"] = {"relative_error": worst, "differing": differing, "masks_equal": masks_equal}
        assert masks_equal
        assert worst < 1e-6 if label != "lean" else differing < 3e-3
    for direction in ("forward", "reverse"):
        found[f"loss_{direction}"] = _check_loss(Objective(2 / 3, 2.0, direction))
    return found


def _check_loss(objective: Objective) -> dict[str, float]:
    slice_loss = loss_kernel("triton", torch.empty(0, device="cuda"))
    assert slice_loss is not None
    student, teacher = (4 * torch.randn(256, 128256, device="cuda") for _ in range(2))
    targets = torch.randint(0, 128256, (256,), device="cuda")
    counted = torch.tensor(256, device="cuda")
    errors = {}
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
        own, taught = student.to(dtype), teacher.to(dtype)
        wanted = slice_loss_reference(own, taught, targets, objective, 256, counted)
        have = slice_loss(own, taught, targets, objective, 256, counted)
        name = str(dtype).removeprefix("torch.")
        errors[f"{name}_grad"] = float((have[2].float() - wanted[2]).norm() / wanted[2].norm())
        errors[f"{name}_kl"] = abs(float(have[0] / wanted[0]) - 1)
        assert errors[f"{name}_grad"] < limit
        assert errors[f"{name}_kl"] < 1e-4
    return errors


def _copy_speed() -> float:
    """GB a second of a large copy, bytes read plus bytes written."""
    source = torch.empty(GIB // 2, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(timed(lambda: target.copy_(source), 10)) / 1e6


def part_step() -> dict[str, Any]:
    """The optimizer step alone; bytes a parameter are what each must move (see `kernels/adamw_device.py`)."""
    model = llama("1b")
    count = sum(parameter.numel() for parameter in model.parameters())
    clip = torch.ones((), device="cuda")
    copied = _copy_speed()
    result: dict[str, Any] = {"parameters": count, "copy_gb_s": copied}
    arms: tuple[tuple[str, Memory, Kernels, float, Rounding | None], ...] = (
        ("fused", Memory(), "triton", 29, None),
        ("fused_int4", Memory(), "triton", 29, INT4),
        ("fused_odd2", Memory(), "triton", 29, ODD2),
        ("fused_lean", LEAN, "triton", 13.1, None),
        ("reference", Memory(), "reference", 0, None),
    )
    for name, memory, kernels, bytes_, rounding in arms:
        free()
        optimizer = sparse_adamw(model, memory, kernels, rounding)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        for kind, refresh in (("plain", False), ("refresh", True)):
            step = Step(10, lr=1e-4, decay=1e-3, refresh=refresh)
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            measured: dict[str, Any] = spread(timed(lambda o=optimizer, s=step: o.advance(s, clip), 10))
            measured["extra_gib"] = (torch.cuda.max_memory_allocated() - held) / GIB
            if bytes_:
                measured["gb_s"] = bytes_ * count / measured["median_ms"] / 1e6
                measured["of_copy"] = measured["gb_s"] / copied
            result[f"{name}_{kind}"] = measured
        optimizer.zero_grad()
        del optimizer
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    torch_fused = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    result["torch_fused_bfloat16"] = spread(timed(torch_fused.step, 10))
    for kind in ("plain", "refresh"):
        ratio = result[f"reference_{kind}"]["median_ms"] / result[f"fused_{kind}"]["median_ms"]
        result[f"reference_over_fused_{kind}"] = ratio
        for bits in ("int4", "odd2"):
            extra = result[f"fused_{bits}_{kind}"]["median_ms"] / result[f"fused_{kind}"]["median_ms"]
            result[f"{bits}_over_fused_{kind}"] = extra
    return result


def part_loss() -> dict[str, Any]:
    """Extra peak memory and time of loss and gradients; the head's own gradient is part of the extra."""
    torch.manual_seed(0)
    make = {"bias": False, "device": "cuda", "dtype": torch.bfloat16}
    head, taught = nn.Linear(2048, 128256, **make), nn.Linear(2048, 128256, **make)
    hidden = torch.randn(4096, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teacher_hidden = torch.randn(4096, 2048, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, 128256, (4096,), device="cuda")
    objective = Objective()

    def plain() -> None:
        with torch.no_grad():
            teacher = taught(teacher_hidden)
        loss_reference(head(hidden), teacher, targets, objective)[0].backward()

    def chunked(kernels: Kernels) -> None:
        chunked_loss(hidden, head, teacher_hidden, taught, targets, objective, kernels)[0].backward()

    def clear() -> None:
        hidden.grad = head.weight.grad = None

    result: dict[str, Any] = {"head_gradient_gib": head.weight.nbytes / GIB}
    default = distill.CHUNK_ENTRIES
    arms: list[tuple[str, Callable[[], None], int]] = [
        ("plain", plain, default), ("chunked_reference", lambda: chunked("reference"), default),
        ("chunked", lambda: chunked("triton"), default), ("chunked_2x", lambda: chunked("triton"), 2 * default),
        ("chunked_4x", lambda: chunked("triton"), 4 * default), ("chunked_again", lambda: chunked("triton"), default),
    ]  # fmt: skip
    for name, call, entries in arms:
        distill.CHUNK_ENTRIES = entries
        clear()
        free()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - held
        result[name] = {"extra_gib": extra / GIB, **spread(timed(call, 8, clear))}
    distill.CHUNK_ENTRIES = default
    for name in ("chunked", "chunked_2x", "chunked_4x"):
        result[name]["memory_ratio"] = result["plain"]["extra_gib"] / result[name]["extra_gib"]
        result[name]["time_ratio"] = result["plain"]["median_ms"] / result[name]["median_ms"]
    return result


@dataclass
class DenseOptimizer:
    """torch's fused AdamW where `Fit` expects a `SparseAdamW`; its clipping is the same."""

    names: dict[str, Tensor]
    inner: torch.optim.Optimizer

    def zero_grad(self) -> None:
        """Drop every gradient."""
        self.inner.zero_grad(set_to_none=True)

    def take_gradients(self) -> None:
        """They are where they belong: nothing is sharded."""

    def advance(self, step: Step, clip: Tensor) -> None:
        """One step at the learning rate of `step`."""
        torch._foreach_mul_([parameter.grad for parameter in self.names.values()], clip)
        self.inner.param_groups[0]["lr"] = step.lr
        self.inner.step()


class DensePolicy:
    """No masks: the numbers of a step and nothing after it."""

    def numbers(self, step: int, lr: float) -> Step:
        """Learning rate of a step."""
        return Step(step + 1, lr)

    def after(self, step: int) -> dict[str, Tensor]:
        """Nothing."""
        return {}


def fit_of(
    student: nn.Module, teacher: nn.Module, tokens: Tensor, optimizer: Any, batch: int, micro: int, **options: Any
) -> Fit:
    """A `Fit` whose steps are called one by one."""
    place = Path(tempfile.gettempdir())
    job = TrainJob(student, teacher, {}, tokens, None, 0, place, lambda record: None, lambda done, total: None)
    plan = Schedule(steps=1000, batch=batch, lr=1e-5)
    policy: Any = DensePolicy()
    if isinstance(optimizer, SparseAdamW):
        policy = AstPolicy(
            optimizer=optimizer, steps=1000, decay=1e-3, ramp=0.0, mask_every=10, freeze=0.0, hysteresis=0.0,
            weight_decay=0.0,
        )  # fmt: skip
    fit = Fit(job, optimizer, policy, plan, Objective(), micro, **options)
    fit._heads = fit._plain_heads()
    assert fit._heads is not None
    return fit


def part_tokens(
    name: str, batch: int, length: int, micro: int, rounds: int, kernels: Kernels, arms: Sequence[str] = ARMS
) -> dict[str, Any]:
    """Tokens a second of the dense arm and of AST, exact and lean, one step each in turn."""
    torch.manual_seed(0)
    teacher = llama(name).eval().requires_grad_(False)
    tokens = torch.randint(0, SHAPES[name]["vocab_size"], (4 * batch, length), dtype=torch.int32)
    fits: dict[str, Fit] = {}
    for arm in arms:
        student = copy.deepcopy(teacher).eval().requires_grad_(True)
        optimizer: Any = None
        if arm == "dense":
            named = dict(student.named_parameters())
            optimizer = DenseOptimizer(named, torch.optim.AdamW(named.values(), lr=1e-5, betas=(0.9, 0.95), fused=True))
        else:
            rounding = {"ast_int4": INT4, "ast_odd2": ODD2}.get(arm)
            optimizer = sparse_adamw(student, LEAN if arm == "ast_lean" else Memory(), rounding=rounding)
        fits[arm] = fit_of(student, teacher, tokens, optimizer, batch, micro, kernels=kernels)
    free()
    times: dict[str, list[float]] = {arm: [] for arm in fits}
    with compiled([*(fit.job.student for fit in fits.values()), teacher], True):
        began = time.monotonic()
        for step in range(-3, rounds):
            order = list(fits) if step % 2 else list(fits)[::-1]
            for arm in order:
                took = _one_step(fits[arm], step + 3)
                if step >= 0:
                    times[arm].append(took)
            if step == -1:
                compile_seconds = time.monotonic() - began
    a_step = batch * length
    result: dict[str, Any] = {"tokens_a_step": a_step, "micro_batch": micro, "compile_and_warm_up_s": compile_seconds}
    result |= {"loss": kernels, "peak_gib_of_all_arms": torch.cuda.max_memory_allocated() / GIB}
    for arm, taken in times.items():
        result[arm] = {**spread(taken), "tokens_per_s": a_step / statistics.median(taken) * 1e3, "all_ms": taken}
        result[arm]["of_dense_median"] = statistics.median(times["dense"]) / statistics.median(taken)
        result[arm]["of_ast_mean"] = statistics.fmean(times["ast"]) / statistics.fmean(taken)
        result[arm]["of_dense_mean"] = statistics.fmean(times["dense"]) / statistics.fmean(taken)
    halves = [statistics.median(times["dense"][start::2]) for start in (0, 1)]
    result["dense_against_dense"] = halves[0] / halves[1]
    return result


def _one_step(fit: Fit, step: int) -> float:
    """Milliseconds of a step; its gradients are dropped afterwards, so that the arms fit side by side."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    fit._step(step, 1e-6)
    end.record()
    torch.cuda.synchronize()
    fit.optimizer.zero_grad()
    return start.elapsed_time(end)


def part_7b(length: int = 4096, micro: int = 4) -> dict[str, Any]:
    """Peak memory of steps of one and of two micro-batches."""
    torch.manual_seed(0)
    student = llama("7b").eval().requires_grad_(True)
    optimizer = sparse_adamw(student, LEAN)
    teacher = llama("7b").eval().requires_grad_(False)
    free()
    result: dict[str, Any] = {
        "tokens_a_micro_batch": micro * length,
        "resident_gib": torch.cuda.memory_allocated() / GIB,
    }
    for parts in (1, 2):
        tokens = torch.randint(0, 32000, (2 * micro * parts, length), dtype=torch.int32)
        fit = fit_of(student, teacher, tokens, optimizer, micro * parts, micro, checkpointing=True)
        entry: dict[str, Any] = {}
        try:
            with recomputed(student, True):
                for step in (8, 9):  # the second chooses the masks
                    torch.cuda.reset_peak_memory_stats()
                    entry[f"step_{step}_ms"] = _one_step(fit, step)
                    entry[f"step_{step}_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
                    entry[f"step_{step}_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        except torch.OutOfMemoryError as error:
            entry["out_of_memory"] = str(error)[:300]
            entry["peak_before_gib"] = torch.cuda.max_memory_allocated() / GIB
        result[f"micro_batches_{parts}"] = entry
        optimizer.zero_grad()
        del fit
        free()
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="check,step,loss,base,1b,7b")
    parser.add_argument("--out", type=Path, required=True, help="JSON; parts measured before are kept")
    parser.add_argument("--reference-loss", action="store_true")
    given = parser.parse_args()
    kernels: Kernels = "reference" if given.reference_loss else "triton"
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "check": part_check,
        "step": part_step,
        "loss": part_loss,
        "base": lambda: part_tokens("base", 128, 1024, 32, 20, kernels),
        "1b": lambda: part_tokens("1b", 8, 2048, 4, 20, kernels, ("dense", "ast", "ast_lean")),
        "7b": part_7b,
    }
    results: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    failed = False
    for name in given.parts.split(","):
        free()
        began = time.monotonic()
        try:
            results[name] = parts[name]()
        except Exception as error:  # the other parts are still worth having; the exit status tells
            failed = True
            results[name] = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        results[name]["seconds"] = time.monotonic() - began
        results[name]["device"] = torch.cuda.get_device_name()
        results[name]["torch"] = torch.__version__
        given.out.write_text(json.dumps(results, indent=1))
        print(name, json.dumps(results[name])[:1800], flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
