"""EBFT: each block trained to give the dense block's outputs with the weights a pruner kept (arXiv:2402.12419)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

import sparsekit as sk
from sparsekit.errors import MethodError
from sparsekit.models.blocks import BlockModel, Call
from sparsekit.training.loop import Trained, TrainJob
from sparsekit.training.schedule import Schedule

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
BETAS = (0.9, 0.95)


@sk.model_method("ebft", kind="train")
def ebft(
    job: TrainJob,
    /,
    *,
    windows: Count = 128,
    epochs: Count = 10,
    lr: Positive = 0.03,
    batch: Count = 8,
    share: Share = 0.5,
) -> Trained:
    """Train the kept weights of one block after another until its outputs are those of the dense block.

    A step after a pruner, for models that are too large to be trained as a whole, or where there is no text but the
    calibration windows: nothing is propagated back beyond a block. Masks stay. It reads data.train, so give that
    the calibration text. Both models and four copies of the hidden states of all windows are on the device. A
    killed step begins anew.

    Args:
        windows: Training windows, the first ones.
        epochs: Passes over them, for each block; 10 in the reference.
        lr: Learning rate of Adam as a share of a linear's root mean square.
        batch: Windows a step.
        share: How far the target goes from what the dense block makes of the inputs that the compressed model
            has here, as in the reference, towards what it makes of the dense model's own.

    Source: Guo et al. 2024, arXiv:2402.12419 (EBFT), and its reference, lib/finetune.py of sunggo/EBFT.

    Deviations: `share`, as in alps_aimed; the reference's is 0. The whole model is pruned before, where the
    reference prunes a block and trains it. The rate is relative to a linear's weights, warms up and falls by a
    cosine, where the reference's falls in a line from 2e-4. Norms stay, and there is no weight decay.
    """
    if job.another_teacher:
        raise MethodError("ebft learns from the blocks of the dense original; leave `teacher` out")
    student, teacher = (BlockModel(Path(), model, job.device) for model in (job.student, job.teacher))
    tokens = job.tokens[:windows]
    inputs, calls = embedded(student, tokens, batch)
    dense, _ = embedded(teacher, tokens, batch)
    linears, errors = dict(job.linears), list[tuple[float, float]]()
    for index, path in enumerate(student.blocks):
        called = {size: found[index] for size, found in calls.items()}
        own, dense = (through(teacher, index, states, called) for states in (inputs, dense))
        block = student.module.get_submodule(path)
        kept = {name.removeprefix(f"{path}."): name for name in linears if name.startswith(f"{path}.")}
        if kept:
            masks = {local: linears[name].mask for local, name in kept.items()}
            order = batches(len(tokens), batch, epochs, seed=job.seed + index)
            trained, error = fitted(block, masks, inputs, own.lerp(dense, share), order, called, lr)
            for local, weight in trained.items():
                linears[kept[local]] = linears[kept[local]].updated(weight.cpu())
                block.get_submodule(local).weight.data.copy_(linears[kept[local]].weight)
            errors.append(error)
        inputs = through(student, index, inputs, called)
        job.progress((index + 1) * tokens.numel(), len(student.blocks) * tokens.numel())
    before, after = (sum(each) / len(errors) for each in zip(*errors, strict=True))
    return Trained(linears, {}, {"windows": len(tokens), "block_error_before": before, "block_error": after})


def embedded(model: BlockModel, tokens: Tensor, batch: int) -> tuple[Tensor, dict[int, list[Call]]]:
    """Hidden states [windows, seq_len, width] that enter the first block, and what each is called with besides.

    Args:
        model: Its blocks are not run.
        tokens: int [windows, seq_len].
        batch: Windows a forward; the last one may have fewer, so calls are kept by their number.
    """
    hidden, calls = list[Tensor](), dict[int, list[Call]]()
    with torch.no_grad():
        for part in tokens.split(batch):
            states, calls[len(part)] = model.begin(part)
            hidden.append(states)
    return torch.cat(hidden), calls


def through(model: BlockModel, index: int, inputs: Tensor, calls: Mapping[int, Call]) -> Tensor:
    """What a block makes of hidden states [windows, seq_len, width]; calls by the number of windows."""
    with torch.no_grad():
        parts = inputs.split(max(calls))
        return torch.cat([model.run_block(index, part, calls[len(part)]) for part in parts])


def batches(windows: int, batch: int, epochs: int, seed: int) -> list[Tensor]:
    """Which windows each step takes, int64; every epoch has all of them in another order."""
    random = torch.Generator().manual_seed(seed)
    return [part for _ in range(epochs) for part in torch.randperm(windows, generator=random).split(batch)]


def fitted(
    block: nn.Module,
    masks: Mapping[str, Tensor | None],
    inputs: Tensor,
    target: Tensor,
    order: list[Tensor],
    calls: Mapping[int, Call],
    lr: float,
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """Weights of a block's linears for which its outputs are near the target.

    Args:
        block: It is as it was afterwards.
        masks: bool [out, in], or None, of each linear to train, by its name in the block.
        inputs: [windows, seq_len, width].
        target: The same shape.
        order: Windows of each step.
        calls: What the block is called with besides, by the number of windows.
        lr: As a share of a weight's root mean square.
    Returns:
        Weights, float32 [out, in], and |output - target|² relative to |target - inputs|² of the first and of the
        last steps that together take all windows once.
    """
    given = {name: block.get_submodule(name).weight.detach() for name in masks}
    weights = {name: weight.float().clone().requires_grad_() for name, weight in given.items()}
    kept = {name: mask.to(target.device) for name, mask in masks.items() if mask is not None}
    optimizer = torch.optim.Adam(
        [{"params": [weight], "lr": lr * float(weight.detach().square().mean().sqrt())} for weight in weights.values()],
        betas=BETAS, fused=target.is_cuda,
    )  # fmt: skip
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, Schedule(len(order), max(calls), lr=1.0).lr_at)
    scale = (target.float() - inputs.float()).square().mean()
    losses = []
    for chosen in order:
        part, call = chosen.to(target.device), calls[len(chosen)]
        with torch.enable_grad():
            masked = {name: weight * kept[name] if name in kept else weight for name, weight in weights.items()}
            values = {f"{name}.weight": weight.to(given[name].dtype) for name, weight in masked.items()}
            output: Any = functional_call(block, values, (inputs[part], *call.args), dict(call.kwargs))
            output = output[0] if isinstance(output, tuple) else output
            loss = (output.float() - target[part].float()).square().mean() / scale
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        falling.step()
        losses.append(loss.detach() * len(chosen))
    once = math.ceil(len(inputs) / max(calls))
    first, last = (float(torch.stack(some).sum()) / len(inputs) for some in (losses[:once], losses[-once:]))
    return {name: weight.detach() for name, weight in weights.items()}, (first, last)
