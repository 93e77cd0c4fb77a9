"""RIA's channel permutation, for the channels where it is free (Zhang et al. 2024, ICLR, "Plug-and-Play")."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import sparsekit as sk
from sparsekit.errors import MethodError
from sparsekit.training.loop import Trained, TrainJob

Windows = Annotated[int, Field(ge=1)]
Rounds = Annotated[int, Field(ge=0)]
TOLERANCE = 1e-3  # relative change of the logits; a wrong candidate changes them by tens of percent
TINY = 1e-30


@sk.model_method("permute", kind="train")
def permute(
    job: TrainJob,
    /,
    *,
    for_pattern: str = "2:4",
    power: float = 0.5,
    windows: Windows = 32,
    rounds: Rounds = 4,
) -> Trained:
    """Reorder channels so that an N:M pattern keeps more of RIA's score; the model computes the same.

    A step before the pruner. It permutes the inputs of a linear together with the output rows of the
    linears that feed it, where that changes nothing: this is tried out by running the model, and holds
    for the inputs of a down projection. The inputs of query, key, value, gate and up projections are
    the residual stream, and those of an output projection belong to heads, so they stay.

    Args:
        for_pattern: What the next step prunes to, "N:M"; this one prunes nothing.
        power: Exponent of the input norm in RIA's score.
        windows: Training windows that measure the input norms.
        rounds: Rounds of linear sum assignment after the channels are dealt out.

    Source: Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large
    Language Models", ICLR, section 4: heuristic allocation, then linear sum assignment.

    Deviations: only permutations that cost nothing at run time. Assignment repeats over all places of
    a group until the kept score no longer rises, at most `rounds` times. Needs scipy.
    """
    pattern = read(for_pattern)
    modules = {n: m for n, m in job.student.named_modules() if n in job.linears}
    norms = input_norms(job, modules, windows)
    linears, params, gains = dict(job.linears), {}, {}
    for consumer, producers in movable(job, modules):
        score = relative_importance(linears[consumer].source) * norms[consumer].cpu() ** power
        order, before, after = arranged(score, pattern, rounds)
        gains[consumer] = after / before - 1
        note = f"channels permuted, the kept score of {pattern} rises by {gains[consumer]:.1%}"
        linears[consumer] = replace(linears[consumer], source=linears[consumer].source[:, order]).noted(note)
        for name in producers:
            linears[name] = replace(linears[name], source=linears[name].source[order]).noted("rows permuted")
            bias = modules[name].bias
            if isinstance(bias, Tensor):
                params[f"{name}.bias"] = bias.detach().cpu()[order]
    mean = sum(gains.values()) / max(len(gains), 1)
    return Trained(linears, params, {"permuted": len(gains), "kept_score_gain": mean})


def read(text: str) -> sk.Pattern:
    """An N:M pattern.

    Raises:
        MethodError: It is none.
    """
    try:
        pattern = sk.Pattern.parse(text)
    except ValueError as error:
        raise MethodError(f"for_pattern: {error}") from error
    if not pattern.structured:
        raise MethodError(f'permute orders channels for an N:M pattern, as in for_pattern: "2:4"; got {pattern}')
    return pattern


def relative_importance(weight: Tensor) -> Tensor:
    """|w| as a share of its row plus |w| as a share of its column, [out, in]."""
    size = weight.abs()
    return size / size.sum(1, keepdim=True).clamp(min=TINY) + size / size.sum(0, keepdim=True).clamp(min=TINY)


def arranged(score: Tensor, pattern: sk.Pattern, rounds: int) -> tuple[Tensor, float, float]:
    """An order of the columns that raises the score an N:M pattern keeps.

    Args:
        score: [out, in].
        pattern: N:M.
        rounds: Of assignment.
    Returns:
        The order, int64 [in], and the kept score before and after; the identity if nothing is better.
    """
    columns = score.shape[1]
    identity = torch.arange(columns).reshape(-1, pattern.m)  # [groups, m]
    before = kept(score, identity, pattern)
    ranked = score.sum(0).argsort(descending=True, stable=True)
    dealt = ranked.reshape(pattern.m, -1).t()  # the best of every group first: strong channels do not compete
    best, most = max(((places, kept(score, places, pattern)) for places in (identity, dealt)), key=lambda pair: pair[1])
    for _ in range(rounds):
        trial = best.clone()
        for place in range(pattern.m):
            trial = reassigned(score, trial, place, pattern)
        found = kept(score, trial, pattern)
        if found <= most * (1 + 1e-6):
            break
        best, most = trial, found
    return best.flatten(), before, most


def kept(score: Tensor, places: Tensor, pattern: sk.Pattern) -> float:
    """The score a pattern keeps when its groups are `places`, int64 [groups, m]."""
    return float(score[:, places].topk(pattern.n, dim=-1).values.double().sum())


def reassigned(score: Tensor, places: Tensor, place: int, pattern: sk.Pattern) -> Tensor:
    """The channels at one place of every group dealt out anew, so that the kept score is as large as it can be."""
    others = torch.cat([places[:, :place], places[:, place + 1 :]], dim=1)
    highest = score[:, others].sort(dim=-1, descending=True).values  # [out, groups, m - 1]
    rival = highest[:, :, pattern.n - 1]  # what a new member has to beat, [out, groups]
    moving = score[:, places[:, place]]  # [out, groups]
    gain = torch.stack([torch.relu(moving - rival[:, [group]]).sum(0) for group in range(len(places))])
    _, chosen = linear_sum_assignment(gain.double().numpy(), maximize=True)  # [group, channel]
    result = places.clone()
    result[:, place] = places[torch.from_numpy(chosen), place]
    return result


def input_norms(job: TrainJob, modules: Mapping[str, torch.nn.Module], windows: int) -> dict[str, Tensor]:
    """Root mean square of every linear's inputs, float32 [in]."""
    found = {name: sk.InputNorm.empty(job.linears[name].source.shape[1], job.device) for name in modules}

    def feeder(statistic: sk.InputNorm) -> Callable[..., None]:
        return lambda module, arguments: statistic.update(arguments[0].reshape(-1, arguments[0].shape[-1]))

    handles = [module.register_forward_pre_hook(feeder(found[name])) for name, module in modules.items()]
    try:
        for window in job.tokens[:windows]:
            logits(job, window)
    finally:
        for handle in handles:
            handle.remove()
    return {name: statistic.norm for name, statistic in found.items()}


def logits(job: TrainJob, window: Tensor) -> Tensor:
    """The student's logits of one window, [seq_len, vocabulary]."""
    with torch.no_grad():
        result: Tensor = job.student(input_ids=window.long().unsqueeze(0).to(job.device), use_cache=False).logits[0]
    return result.float()


def movable(job: TrainJob, modules: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Linears whose inputs may be permuted, each with the linears whose rows move along: proven by running."""
    window = job.tokens[0][:64]
    expected = logits(job, window)
    generator = torch.Generator().manual_seed(0)
    for name, module in modules.items():
        parent = name.rpartition(".")[0]
        width = module.in_features
        siblings = [n for n in modules if n.rpartition(".")[0] == parent and n != name]
        feeding = [n for n in siblings if modules[n].out_features == width]
        order = torch.randperm(width, generator=generator).to(job.device)
        for count in range(len(feeding), 0, -1):
            for producers in itertools.combinations(feeding, count):
                with moved(module, [modules[n] for n in producers], order):
                    change = float((logits(job, window) - expected).norm() / expected.norm())
                if change < TOLERANCE:
                    break
            else:
                continue
            yield name, list(producers)
            break


@contextmanager
def moved(consumer: Any, producers: list[Any], order: Tensor) -> Iterator[None]:
    """The weights permuted for a while."""
    touched = [consumer.weight, *(p.weight for p in producers), *(p.bias for p in producers if p.bias is not None)]
    saved = [parameter.data for parameter in touched]
    consumer.weight.data = consumer.weight.data[:, order]
    for parameter in touched[1:]:
        parameter.data = parameter.data[order]
    try:
        yield
    finally:
        for parameter, data in zip(touched, saved, strict=True):
            parameter.data = data
