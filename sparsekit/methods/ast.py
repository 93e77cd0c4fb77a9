"""AST, the Adaptive Sparse Trainer (Huang et al. 2024, arXiv:2407.20584)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from sparsekit.branch import Branch, check_length, hollow
from sparsekit.errors import MethodError
from sparsekit.kernels import Kernels
from sparsekit.pattern import Pattern
from sparsekit.quant import Levels, is_odd
from sparsekit.registry import model_method
from sparsekit.training.annealing import AstPolicy
from sparsekit.training.distill import Direction, Objective
from sparsekit.training.grids import rounding_of
from sparsekit.training.loop import Fit, Trained, TrainJob
from sparsekit.training.lowbits import Masters, Memory, States, mixed
from sparsekit.training.optim import DecayRule, Rule, SecondMoment, SparseAdamW
from sparsekit.training.schedule import Budget, Schedule, micro_batch_of, steps_of
from sparsekit.training.sparse_start import add_branches, first_masks, input_norms, result
from sparsekit.units import Count, Fraction


def _trainable(pattern: Pattern) -> Pattern:
    """Refuse a pattern without groups, unless it prunes nothing."""
    if not pattern.structured and pattern.sparsity:
        raise ValueError(f'ast trains N:M patterns, as in pattern: "2:4"; got {pattern}')
    return pattern


NM = Annotated[Pattern, AfterValidator(_trainable)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[Fraction, Field(ge=0, le=1)]

WITHOUT_GRID = {"levels": "integer", "scales": "learned", "quantize_from": 0.0, "group_size": 128}  # without bits
ONLY_BITS = {"ternary": 2, "six": 3}  # of levels that there is one number of
COMPILE_MINUTES = 3.0
COMPILE_STEPS = 100  # shorter runs do not earn the compilation back


def _wrong(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """What is wrong between parameters."""
    if values["tokens"] is None and values["budget"] is None:
        return "tokens", "ast needs tokens: 26.2M, or budget: {minutes: 30}"
    if values["tokens"] is not None and values["budget"] is not None:
        return "budget", "ast has tokens and a budget of minutes; keep one"
    if values["flip_target"] is not None and not values["decay"]:
        return "flip_target", "flip_target steers the decay, and decay is 0"
    return _wrong_grids(values)


def _wrong_grids(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """What is wrong with the bits and what belongs to them."""
    bits, pattern = values["bits"], values["pattern"]
    if not pattern.structured and pattern.sparsity:
        return "sparsity", f'ast trains N:M patterns, as in pattern: "2:4"; got {pattern}'
    if bits is None:
        for key, absent in WITHOUT_GRID.items():
            if values[key] != absent:
                told = f"{key} belongs to the grid, and without bits there is none"
                return key, f"{told}; add bits: {ONLY_BITS.get(values['levels'], 4)}, or drop {key}"
        if not pattern.sparsity:
            return "pattern", 'ast without bits trains N:M patterns, as in pattern: "2:4"; sparsity is 0'
        return None
    if wrong := _wrong_levels(bits, values["levels"]):
        return "bits", wrong
    if values["forward"] == "dense":
        return "forward", "forward: dense computes with pruned weights, and the grid has no place for them"
    if values["weight_scaling"]:
        return "weight_scaling", "weight_scaling multiplies rows, and the steps of the grid scale them already"
    return None


def _wrong_levels(bits: int, levels: Levels) -> str | None:
    """Why there are no such levels of so many bits."""
    if levels == "ternary" and bits != ONLY_BITS[levels]:
        return f"levels: ternary are -1, 0 and 1, codes of 2 bits; write bits: 2 in place of {bits}"
    if levels == "six" and bits != ONLY_BITS[levels]:
        return f"levels: six are ±1, ±3 and ±5, which take log2 6 = 2.6 bits; write bits: 3 in place of {bits}"
    if levels == "integer" and bits == 1:
        return "1 bit has the levels -1 and 0; levels: odd gives a kept weight a sign and no 0"
    if levels == "odd" and bits == 8:
        return "levels: odd takes up to 7 bits: a code has one more, for the 0 of pruned weights"
    return None


def _integers(values: Mapping[str, Any]) -> int | None:
    """Bits of a code of the result; that of a grid without a level at 0 has one for pruned weights."""
    bits: int | None = values["bits"]
    return None if bits is None else bits + is_odd(values["levels"])


def _branches(values: Mapping[str, Any], out: int, into: int) -> Branch | None:
    """The shapes of the branch beside a linear."""
    length = values["slorb"]
    if length is None:
        return None
    check_length(length, into)
    return hollow(into // length, out, into, length=length, down=values["slorb_projection"] == "trained")


@model_method("ast", kind="train", check=_wrong, integers=_integers, branches=_branches)
def ast(
    job: TrainJob,
    /,
    *,
    pattern: NM = Pattern(2, 4),
    tokens: Count | None = None,
    budget: Budget | None = None,
    bits: Annotated[int, Field(ge=1, le=8)] | None = None,
    group_size: int = 128,
    levels: Levels = "integer",
    scales: Literal["learned", "fitted"] = "learned",
    quantize_from: Share = 0.0,
    batch: Annotated[int, Field(ge=1)] = 32,
    micro_batch: Annotated[int, Field(ge=1)] | None = None,
    lr: Positive = 2e-3,
    lr_floor: Share = 0.1,
    warmup: Share = 0.05,
    schedule: Literal["cosine", "wsd"] = "cosine",
    decay: NotNegative = 1e-3,
    decay_ramp: Share = 0.25,
    decay_rule: DecayRule = "l2",
    mask_every: Annotated[int, Field(ge=1)] = 10,
    freeze: Share = 0.05,
    flip_target: Annotated[float, Field(gt=0, lt=1)] | None = None,
    hysteresis: NotNegative = 0.0,
    score: Literal["magnitude", "activation"] = "magnitude",
    forward: Literal["masked", "dense"] = "masked",
    kl: Share = 1.0,
    temperature: Positive = 1.0,
    kl_direction: Direction = "forward",
    hidden: NotNegative = 0.0,
    weight_scaling: Annotated[int, Field(ge=0)] = 0,
    slorb: Literal[16, 32, 64] | None = None,
    slorb_projection: Literal["trained", "sum"] = "trained",
    second_moment: SecondMoment = "gradient",
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: NotNegative = 0.0,
    clip: Positive = 1.0,
    compile: bool | None = None,
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None,
    checkpointing: bool = False,
    states: States = "float32",
    masters: Masters = "float32",
    kernels: Kernels = "auto",
) -> Trained:
    """Train N:M sparse weights against the dense model, choosing the mask again as training goes.

    Every weight keeps its dense value. The model computes with the kept ones, all of them receive the
    gradient, pruned ones are pulled towards zero by a decay that grows over the first quarter, and
    every few steps each group keeps its largest values anew. A step before it that pruned (SparseGPT,
    Wanda) gives the first mask and the first values.

    Defaults are the best measured with 26.2 M tokens of models/base, on held-out text (perplexity 27.95;
    28.35 with the paper's form: batch 128, lr 1e-3, second_moment momentum, kl 2/3, temperature 2).
    Args:
        pattern: "N:M". With bits also sparsity: 0, which chooses no mask: everything stays, or what a step
            before has kept.
        tokens: Training tokens in all; decides the number of steps.
        budget: In place of tokens, `{minutes: 30}`: as many steps as fit, after measuring the first ones.
            A run that is continued has the number of steps it began with. In a recipe `{tokens: 26.2M}` is
            another spelling of tokens.
        bits: Train integers: the model computes with kept weights rounded to a grid of so many bits, the
            gradient goes straight through, and the result needs no quantizer. None trains floats.
        group_size: Inputs of a row that share a step of the grid; -1 for one group a row.
        levels: `integer` has -2^(bits-1)..2^(bits-1)-1. `odd` has ±1, ±3, ..., ±(2^bits - 1) and no 0 for kept
            weights, which their place tells from pruned ones; their codes have one bit more in formats that
            store zeros. From 1 bit on. `six` has ±1, ±3 and ±5, with bits: 3, of which a format may store two and
            their places in a group of 2:4 in a byte. `ternary` has -1, 0 and 1, with bits: 2, of which a format
            may store five in a byte.
        scales: `learned` fits the steps of the grid to the kept weights once, when they go on it, and trains
            them from there; `fitted` fits them whenever the mask is chosen, and a last time when it freezes.
        quantize_from: Share of the steps before the weights go on the grid.
        batch: Windows of one optimizer step.
        micro_batch: Windows of one forward; by default what fills the device.
        lr: Highest learning rate. With second_moment momentum a step is about 4 times larger than
            with gradient at the same rate (RMS 0.98 lr against 0.23 lr on noise); rates do not carry over.
        lr_floor: Share of lr at the end.
        warmup: Share of the steps over which the rate rises.
        schedule: `cosine`, or `wsd`: constant, then falling over the last fifth.
        decay: λ of the plateau. It acts relative to the momentum; it does not make weights exactly
            zero, the mask does. More of it means fewer changes of the mask.
        decay_ramp: Share of the steps over which λ rises from 0.
        decay_rule: `l2` pulls by λ·w (AST), `l1` mixes in λ·sign(w) with a share that grows to 1 (CAST).
        mask_every: Steps between choices of the mask.
        freeze: Share of the steps at the end during which the mask stays and λ is 0.
        flip_target: Share of the mask's entries that a choice of the masks shall change while the rate is at
            its highest, in proportion to the rate later. λ is raised and lowered to hold it. The paper's
            group saw 2e-3 and less.
        hysteresis: A pruned weight must be larger than a kept one by this share to replace it.
        score: Choose by |w|, or by |w| times the input norm measured once on the dense model.
        forward: `masked` computes with pruned weights at zero from the first step; `dense` computes with
            all weights until the mask freezes, and lets the decay push them to zero.
        kl: Weight of the divergence from the dense model; cross-entropy gets the rest.
        temperature: Of the divergence, with the usual factor T².
        kl_direction: `forward` is KL(teacher ‖ student), `reverse` the other way around.
        hidden: Weight of the distance of the blocks' outputs from the teacher's (SquareHead).
        weight_scaling: Learned scales of a row of a sparse weight (2 in CAST), multiplied into it at the end.
        slorb: Inputs of a block of the low-rank branch (k of the paper's AST-Boosted); no branch when absent.
            The branch is dense, trains with everything else, and the result is "2:4+LR", not 2:4.
        slorb_projection: `trained` makes X a parameter as in the paper, `sum` adds the inputs of a block
            up and has no parameters: 1/k of the layer instead of about twice as many.
        second_moment: v averages the square of the `momentum` plus decay (paper) or of the `gradient`
            plus decay, which is AdamW for kept weights.
        betas: Of the two moments.
        weight_decay: Ordinary weight decay.
        clip: Limit of the global norm of the gradient; the decay is added after it.
        compile: Compile the blocks with torch.compile; by default on CUDA for runs of 100 steps or more.
        checkpoint_every: Steps between checkpoints; by default one every two minutes.
        checkpointing: Keep only the blocks' inputs and compute each block again in the backward.
        states: Precision of the two moments; float8 holds a scale for every 256 and takes a quarter.
        masters: Precision of the dense weights; bfloat16 ones are rounded stochastically.
        kernels: `auto` runs Triton kernels on CUDA; `reference` plain torch; `triton` fails without them.

    Source: Huang et al. 2024, "Pruning Large Language Models with Semi-Structural Adaptive Sparse
    Training", arXiv:2407.20584, Algorithm 1, Eq. 2-4; l1 rule and dense forward: arXiv:2509.25996.

    Deviations: the released optimizer has the sign of the decay inverted by an integer mask; here it
    pulls pruned weights to zero, as the paper writes. Masks come from float32 weights, between steps.
    The mask is frozen for the last steps, which the paper leaves to λ. Dropout is off. The paper's
    Eq. 4 has no temperature, its code has T = 2; here it is a parameter. By default the loss is the
    divergence alone and v is AdamW's for kept weights.
    """
    given = {"pattern": pattern, "tokens": tokens, "budget": budget, "flip_target": flip_target, "decay": decay}
    grids = {"bits": bits, "group_size": group_size, "levels": levels, "scales": scales, "quantize_from": quantize_from}
    wrong = _wrong({**given, **grids, "forward": forward, "weight_scaling": weight_scaling})
    if wrong is not None:
        raise MethodError(wrong[1])
    steps = 1 if tokens is None else steps_of(tokens, job.tokens, batch)  # a budget is sized when it is measured
    long = steps >= COMPILE_STEPS if budget is None else budget.minutes >= COMPILE_MINUTES
    plan = Schedule(steps=steps, batch=batch, lr=lr, warmup=warmup, floor=lr_floor, shape=schedule)
    norms = input_norms(job) if score == "activation" else {}
    masks, weights = first_masks(job, pattern, norms)
    if slorb is not None:
        add_branches(job, masks, slorb, trained=slorb_projection == "trained")
    job.student.requires_grad_(True)
    job.world.shard(job.student)  # before the optimizer, which holds the rows that are here
    job.world.shard(job.teacher)  # or its copy on every rank would soon be most of the memory
    rule = Rule(
        betas=betas,
        second_moment=second_moment,
        decay_rule=decay_rule,
        scaling=weight_scaling,
        masked=forward == "masked",
        rounding=None if bits is None else rounding_of(bits, group_size, levels),
        learned=scales == "learned",
    )
    seed = mixed(job.seed + job.world.rank) if job.world.rank else job.seed  # ranks round with bits of their own
    memory = Memory(states, masters, seed=seed)
    optimizer = SparseAdamW(
        job.student,
        masks,
        pattern,
        rule,
        importance=norms,
        weights=weights,
        memory=memory,
        kernels=kernels,
        world=job.world,
    )
    policy = AstPolicy(
        optimizer=optimizer,
        steps=steps,
        decay=decay,
        ramp=decay_ramp,
        mask_every=mask_every,
        freeze=freeze,
        hysteresis=hysteresis,
        weight_decay=weight_decay,
        flip_target=flip_target,
        peak=lr,
        rounded_after=None if bits is None else quantize_from,
    )
    policy.begin()
    metrics = Fit(
        job=job,
        optimizer=optimizer,
        policy=policy,
        schedule=plan,
        objective=Objective(kl, temperature, kl_direction, hidden),
        micro_batch=micro_batch or micro_batch_of(job.tokens, max(1, batch // job.world.size), job.device),
        clip=clip,
        checkpoint_every=checkpoint_every,
        compile=job.device.type == "cuda" and long if compile is None else compile,
        checkpointing=checkpointing,
        kernels=kernels,
        minutes=None if budget is None else budget.minutes,
    ).run()
    return result(job, optimizer, {**metrics, **policy.metrics(), "fused_optimizer": optimizer.fused})
