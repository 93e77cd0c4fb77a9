"""AST, the Adaptive Sparse Trainer (Huang et al. 2024, arXiv:2407.20584)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from sparsekit.branch import attach, collected, mean_branch
from sparsekit.distill import Direction, Objective
from sparsekit.errors import MethodError
from sparsekit.kernels import Kernels
from sparsekit.lowbits import Masters, Memory, States, mixed
from sparsekit.optim import DecayRule, Rule, SecondMoment, SparseAdamW, Step
from sparsekit.pattern import Pattern
from sparsekit.registry import model_method
from sparsekit.state import LinearState
from sparsekit.stats import InputNorm
from sparsekit.train import Fit, Schedule, Trained, TrainJob, micro_batch_of, steps_of
from sparsekit.units import Count, Fraction


def _structured(pattern: Pattern) -> Pattern:
    """Refuse a pattern without groups."""
    if not pattern.structured:
        raise ValueError(f'ast trains N:M patterns, as in pattern: "2:4"; got {pattern}')
    return pattern


NM = Annotated[Pattern, AfterValidator(_structured)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[Fraction, Field(ge=0, le=1)]

COMPILE_STEPS = 100  # shorter runs do not earn the compilation back
SCORE_WINDOWS = 64  # windows that measure the input norms of activation-aware scores


@model_method("ast", kind="train")
def ast(
    job: TrainJob,
    /,
    *,
    pattern: NM = Pattern(2, 4),
    tokens: Count,
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
    hysteresis: NotNegative = 0.0,
    score: Literal["magnitude", "activation"] = "magnitude",
    forward: Literal["masked", "dense"] = "masked",
    kl: Share = 1.0,
    temperature: Positive = 1.0,
    kl_direction: Direction = "forward",
    hidden: NotNegative = 0.0,
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
        pattern: "N:M".
        tokens: Training tokens in all; decides the number of steps.
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
        hysteresis: A pruned weight must be larger than a kept one by this share to replace it.
        score: Choose by |w|, or by |w| times the input norm measured once on the dense model.
        forward: `masked` computes with pruned weights at zero from the first step; `dense` computes with
            all weights until the mask freezes, and lets the decay push them to zero.
        kl: Weight of the divergence from the dense model; cross-entropy gets the rest.
        temperature: Of the divergence, with the usual factor T².
        kl_direction: `forward` is KL(teacher ‖ student), `reverse` the other way around.
        hidden: Weight of the distance of the blocks' outputs from the teacher's (SquareHead).
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
    if not pattern.structured:
        raise MethodError(f'ast trains N:M patterns, as in pattern: "2:4"; got {pattern}')
    steps = steps_of(tokens, job.tokens, batch)
    plan = Schedule(steps=steps, batch=batch, lr=lr, warmup=warmup, floor=lr_floor, shape=schedule)
    norms = input_norms(job) if score == "activation" else {}
    masks, weights = first_masks(job, pattern, norms)
    if slorb is not None:
        add_branches(job, masks, slorb, trained=slorb_projection == "trained")
    job.student.requires_grad_(True)
    job.world.shard(job.student)  # before the optimizer, which holds the rows that are here
    job.world.shard(job.teacher)  # it is the larger half of what does not shrink with the ranks otherwise
    rule = Rule(betas=betas, second_moment=second_moment, decay_rule=decay_rule, masked=forward == "masked")
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
    )
    metrics = Fit(
        job=job,
        optimizer=optimizer,
        policy=policy,
        schedule=plan,
        objective=Objective(kl, temperature, kl_direction, hidden),
        micro_batch=micro_batch or micro_batch_of(job.tokens, max(1, batch // job.world.size), job.device),
        clip=clip,
        checkpoint_every=checkpoint_every,
        compile=job.device.type == "cuda" and steps >= COMPILE_STEPS if compile is None else compile,
        checkpointing=checkpointing,
        kernels=kernels,
    ).run()
    return result(job, optimizer, {**metrics, **policy.metrics(), "fused_optimizer": optimizer.fused})


@dataclass(slots=True)
class AstPolicy:
    """λ of each step, and when the mask is chosen again.

    Attributes:
        optimizer: Holds weights and masks.
        steps: Steps of the run.
        decay: λ of the plateau.
        ramp: Share of the steps over which it rises.
        mask_every: Steps between choices.
        freeze: Share of the steps at the end without choices.
        hysteresis: Advantage of kept weights.
        weight_decay: Ordinary weight decay.
    """

    optimizer: SparseAdamW
    steps: int
    decay: float
    ramp: float
    mask_every: int
    freeze: float
    hysteresis: float
    weight_decay: float
    refreshes: int = 0
    flips: dict[str, float] = field(default_factory=lambda: {"flip_rate": 0.0, "initial_flip_rate": 0.0})
    _latest: dict[str, Tensor] = field(default_factory=dict)

    @property
    def frozen_from(self) -> int:
        """First step of the freeze."""
        return self.steps - round(self.freeze * self.steps)

    def decay_at(self, step: int) -> float:
        """λ of a step counted from 0: rises linearly over the ramp, then stays; 0 in the freeze."""
        if step >= self.frozen_from:
            return 0.0
        rising = self.ramp * self.steps
        return self.decay * (min(1.0, step / rising) if rising else 1.0)

    def numbers(self, step: int, lr: float) -> Step:
        """The numbers of a step."""
        return Step(
            number=step + 1,
            lr=lr,
            decay=self.decay_at(step),
            mix=step / max(1, self.steps),
            weight_decay=self.weight_decay,
            refresh=self._refreshes(step),
            hysteresis=self.hysteresis,
        )

    def _refreshes(self, step: int) -> bool:
        """Whether the masks are chosen again after the update of a step."""
        done = step + 1
        return done % self.mask_every == 0 and done <= self.frozen_from

    def after(self, step: int) -> dict[str, Tensor]:
        """Note what the choice of the masks changed, if it was time; returns the flip rates."""
        done = step + 1
        if self._refreshes(step):
            changed, away = self.optimizer.flips
            count = self.optimizer.sparse_numel
            self._latest = {"flip_rate": changed / count, "initial_flip_rate": away / count}
            self.refreshes += 1
        if done == self.frozen_from:
            self.optimizer.finalize()
        lam = torch.tensor(self.decay_at(step))
        return {"decay": lam, **self._rates()}

    def _rates(self) -> dict[str, Tensor]:
        return self._latest or {name: torch.tensor(value) for name, value in self.flips.items()}

    def state(self) -> dict[str, Any]:
        """What a restart needs."""
        return {
            "refreshes": self.refreshes,
            "masked": self.optimizer.masked,
            "flips": {name: float(value) for name, value in self._rates().items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        self.refreshes = int(state["refreshes"])
        self.flips = dict(state["flips"])
        self._latest = {}
        if state["masked"]:
            self.optimizer.finalize()

    def metrics(self) -> dict[str, Any]:
        """For the report."""
        return {"refreshes": self.refreshes, **{name: float(value) for name, value in self._rates().items()}}


def first_masks(
    job: TrainJob, pattern: Pattern, norms: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The mask each sparse parameter starts with, and its dense values.

    An earlier step's mask is taken when it holds the pattern; otherwise the largest scores are kept.

    Returns:
        bool [out, in] and float32 [out, in] by parameter name.
    """
    masks, weights = {}, {}
    for linear, state in job.linears.items():
        name = f"{linear}.weight"
        weights[name] = state.source
        if state.mask is not None and pattern.violations(state.mask) == 0:
            masks[name] = state.mask
        else:
            score = state.source.abs()
            masks[name] = pattern.keep(score * norms[name].to(score.device) if name in norms else score)
    return masks, weights


def add_branches(job: TrainJob, masks: Mapping[str, Tensor], length: int, *, trained: bool) -> None:
    """Give every sparse linear of the student a low-rank branch; one from an earlier step stays as it is.

    Raises:
        MethodError: The blocks do not divide a layer, or an earlier branch has blocks of another length.
    """
    modules = dict(job.student.named_modules())
    for linear, state in job.linears.items():
        if state.branch is None:
            branch = mean_branch(state.source, masks[f"{linear}.weight"], length, trained=trained, name=linear)
            module = modules[linear]
            assert isinstance(module, nn.Linear)  # so are all of job.linears
            attach(module, branch)
        elif state.branch.length != length:
            message = f"slorb {length}, and an earlier step left a branch with blocks of {state.branch.length}"
            raise MethodError(message, layer=linear)


def input_norms(job: TrainJob) -> dict[str, Tensor]:
    """Root mean square of every sparse linear's inputs in the dense model, float32 [in] by parameter name."""
    found = {name: InputNorm.empty(job.linears[name].source.shape[1], job.device) for name in job.linears}
    modules = dict(job.teacher.named_modules())

    def feeder(statistic: InputNorm) -> Any:
        return lambda module, arguments: statistic.update(arguments[0].reshape(-1, arguments[0].shape[-1]))

    handles = [modules[name].register_forward_pre_hook(feeder(statistic)) for name, statistic in found.items()]
    try:
        with torch.no_grad():
            for window in job.tokens[:SCORE_WINDOWS]:
                job.teacher(input_ids=window.long().unsqueeze(0).to(job.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {f"{name}.weight": statistic.norm for name, statistic in found.items()}


def result(job: TrainJob, optimizer: SparseAdamW, metrics: Mapping[str, Any]) -> Trained:
    """Linears with pruned entries at exact zero, and every other parameter; of the first rank only."""
    linears: dict[str, LinearState] = {}
    params: dict[str, Tensor] = {}
    sparse = {f"{name}.weight": name for name in job.linears}
    for name in optimizer.names:
        weight = optimizer.weight(name)  # all ranks take part
        mask = optimizer.mask(name) if name in sparse else None
        if not job.world.first:
            continue
        if mask is not None:
            linears[sparse[name]] = job.linears[sparse[name]].updated(weight.cpu(), mask.cpu())
        else:
            params[name] = weight.cpu()
    branched = dict(collected(job.student, params))
    linears = {name: replace(state, branch=branched.get(name)) for name, state in linears.items()}
    counted = sum(branch.parameters for branch in branched.values())
    of_linears = sum(state.source.numel() for state in job.linears.values())
    about = {"branch_parameters": counted, "branch_share": counted / of_linears} if counted else {}
    return Trained(linears, params, {**metrics, **about})
