"""The work of one step: blocks compressed one by one, or a model trained, here or by several processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.blockwise.allotment import Allotment
from sparsekit.blockwise.holding import HOLDINGS
from sparsekit.blockwise.streaming import Ahead
from sparsekit.blockwise.walk import Walk
from sparsekit.checkpoint import HOST, StepStore
from sparsekit.errors import RecipeError
from sparsekit.ladder import Ladder
from sparsekit.listener import Listener
from sparsekit.models.chain import Chain
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.planning.plan import PlannedStep
from sparsekit.recipe import Recipe, TextEntry
from sparsekit.recipe.step import params_pattern
from sparsekit.training.driver import Training
from sparsekit.training.ranks import Place, launch
from sparsekit.training.teacher import open_teacher
from sparsekit.training.world import ALONE, World


@dataclass(frozen=True, slots=True)
class StepWork:
    """Does the steps of one run.

    Attributes:
        recipe: Whose steps they are.
        view: The model; its blocks are empty before and after.
        tokenizer: The model's.
        windows: Tokens of a text, int32 [windows, seq_len].
        listener: Told how far it is.
        directory: Of the run, with the resolved recipe.
        shared: Where steps and tokens are kept.
        model_digest: Of the model's files.
    """

    recipe: Recipe
    view: ModelView
    tokenizer: Any
    windows: Callable[[TextEntry], Tensor]
    listener: Listener
    directory: Path
    shared: Path
    model_digest: str

    def apply(self, planned: PlannedStep, chain: Chain, store: StepStore) -> dict[str, Any]:
        """Do a step's work; returns what it wants remembered."""
        with self.view.blamed():
            return self._apply(planned, chain, store)

    def _apply(self, planned: PlannedStep, chain: Chain, store: StepStore) -> dict[str, Any]:
        method = planned.step.method
        self.view.load_rest(chain.rest())
        if method.scope == "model" and planned.step.gpus > 1:
            return self._on_ranks(planned, chain, store)
        if method.scope == "model":
            return self.train(planned, chain, store)
        data = self.recipe.data.calibration
        tokens = self.windows(data) if planned.step.calibrated and data is not None else None
        allotted = self._allotted(planned, chain, store, tokens)
        holding = HOLDINGS[self.recipe.model.memory]
        blocks = Ahead(chain.stored, self.view.device if holding.blocks else HOST, len(self.view.blocks))
        with torch.inference_mode(), blocks:
            Walk(
                view=self.view,
                method=method,
                arguments=planned.arguments,
                selected=planned.selected,
                patterns=planned.patterns,
                before=blocks,
                store=store,
                tokens=tokens,
                schedule=planned.step.schedule,
                progress=self.listener.progress,
                reference=chain.reference,
                allotted=allotted,
                overrides=planned.overrides,
                ladder=Ladder(self.recipe.numerics.max_rung),
                holding=holding,
            ).run()
        used = {} if tokens is None else {"calibration_tokens": tokens.numel()}
        allocation = {name: pattern.sparsity for name, pattern in allotted.items()}
        return {**used, "allocation": allocation} if allocation else used

    def _allotted(
        self, planned: PlannedStep, chain: Chain, store: StepStore, tokens: Tensor | None
    ) -> dict[str, Pattern]:
        """The pattern of each layer of a step that writes `allocate`."""
        step, pattern = planned.step, params_pattern(planned.step.method, planned.step.params)
        if step.allocate is None or pattern is None:
            return {}
        selected, holding = planned.selected, HOLDINGS[self.recipe.model.memory]
        return Allotment(self.view, step.allocate, selected, chain.block, tokens, pattern.sparsity, holding).kept(store)

    def _on_ranks(self, planned: PlannedStep, chain: Chain, store: StepStore) -> dict[str, Any]:
        """Have a step done by several processes."""
        self.training_texts(planned)  # cut into tokens once, and not by every rank
        place = Place(
            recipe=self.directory / "recipe.yaml",
            where=self.recipe.where("steps", planned.index, "gpus"),
            shared=self.shared,
            model_digest=self.model_digest,
            device=self.view.device,
        )
        return launch(planned, chain.stores, store, place, self.listener)

    def training_texts(self, planned: PlannedStep) -> tuple[Tensor, Tensor | None]:
        """The windows a training step reads, and the held-out ones it is watched with."""
        data = self.recipe.data
        if data.train is None:
            raise RecipeError(f"{planned.step.method.name} needs data.train")
        valid = next((data.evaluation[name] for name in self.recipe.evaluate.perplexity), None)
        return self.windows(data.train), None if valid is None else self.windows(valid)

    def train(self, planned: PlannedStep, chain: Chain, store: StepStore, world: World = ALONE) -> dict[str, Any]:
        """Do a training step, alone or as one of several processes."""
        tokens, valid = self.training_texts(planned)
        taught_by = None
        if planned.step.teacher is not None:
            taught_by = open_teacher(self.recipe, planned.index, self.view, self.tokenizer)
        return Training(
            view=self.view,
            method=planned.step.method,
            arguments=planned.arguments,
            selected=planned.selected,
            patterns=planned.patterns,
            chain=chain,
            store=store,
            tokens=tokens,
            valid=valid,
            seed=self.recipe.seed,
            progress=self.listener.progress,
            noted=self.listener.noted,
            world=world,
            taught_by=taught_by,
        ).run()
