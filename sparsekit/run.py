"""Running a recipe: one directory, one step after another, each skipped when it is done.

The run directory is the only channel between steps. `sparsekit run` is also the command that
resumes: a finished step is recognised by its fingerprint, an unfinished one continues at the block
or the training checkpoint where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from sparsekit.checkpoint import StepStore
from sparsekit.data import entry_digest, token_windows
from sparsekit.errors import CheckpointError, GateError
from sparsekit.evaluation.basis import basis
from sparsekit.evaluation.scoring import Scoring, Twin, check_tasks
from sparsekit.files import RunLock, check_writable, remove_temporaries, write_text
from sparsekit.interchange.exports import export_all
from sparsekit.interchange.hfdir import check_place
from sparsekit.listener import Listener
from sparsekit.models.chain import Chain
from sparsekit.models.view import ModelView
from sparsekit.opening import open_tokenizer, open_view, plan_for
from sparsekit.planning.peak import measured
from sparsekit.planning.plan import Plan, PlannedStep, texts_of
from sparsekit.recipe import Recipe, TextEntry
from sparsekit.recipe.entries import Redo
from sparsekit.redo import redone, rounds, worst_layers
from sparsekit.reporting.report import finite, write_report
from sparsekit.reporting.sections import sections
from sparsekit.shortage import named
from sparsekit.stepwork import StepWork
from sparsekit.summary import covered, environment, gate_row, said, summarise
from sparsekit.training.teacher import open_teacher

KEPT_TOKENS = 2**26  # of a text that stays in memory between its uses; a longer one is read from its file again


Measuring = Callable[[Chain, Path, str, str], dict[str, Any]]


@dataclass(slots=True)
class Run:
    """One recipe on its way through one directory.

    Attributes:
        recipe: What to do.
        listener: Told how far it is.
        directory: Where the report goes.
        view: The model; its blocks are empty between steps.
        plan: The recipe resolved against the model.
        tokenizer: The model's.
        shared: Where steps, tokens and scores are kept; the run's own directory, or that of a
            comparison, whose arms find what another one has done.
        twin: The dense model beside the compressed one, for their agreement.
        summaries: What each finished step did.
        cut: Tokens of the texts read so far, by entry; the arms of a comparison share them.
    """

    recipe: Recipe
    listener: Listener
    directory: Path
    view: ModelView
    plan: Plan
    tokenizer: Any
    shared: Path
    twin: Twin
    summaries: list[dict[str, Any]] = field(default_factory=list)
    cut: dict[str, Tensor] = field(default_factory=dict)
    _repeated: PlannedStep | None = None

    @classmethod
    def open(cls, recipe: Recipe, listener: Listener) -> Self:
        """Open the model and work the plan out; nothing is written."""
        view = open_view(recipe)
        tokenizer = open_tokenizer(recipe, view)
        directory = recipe.output_directory()
        run = cls(recipe, listener, directory, view, plan_for(recipe, view), tokenizer, directory, Twin(view))
        run._check()
        listener.planned(recipe, run.plan, view)
        return run

    def _check(self) -> None:
        """Find what would fail at the end of a run before its start: tasks, teachers and places."""
        check_tasks(self.recipe)
        self._check_teachers()
        check_writable(self.directory.absolute())
        if self.directory.resolve() == self.view.path:
            raise CheckpointError(f"{self.directory} is the model itself; choose another output directory")
        for name in self.recipe.export.formats:
            check_place((self.recipe.export_directory() / name).absolute(), self.view.path)

    def _check_teachers(self) -> None:
        """Refuse a teacher that speaks another language."""
        for index, step in enumerate(self.recipe.steps):
            if step.teacher is not None:
                open_teacher(self.recipe, index, self.view, self.tokenizer, empty=True)

    def arm(self, recipe: Recipe) -> Self:
        """Another recipe for the same model, which shares what this run keeps."""
        plan = plan_for(recipe, self.view)
        directory = recipe.output_directory()
        shared = self.shared, self.twin
        arm = type(self)(recipe, self.listener, directory, self.view, plan, self.tokenizer, *shared, cut=self.cut)
        arm._check_teachers()
        return arm

    @classmethod
    def rank(cls, recipe: Recipe, listener: Listener, shared: Path, digest: str) -> Self:
        """The run as one of several training processes sees it; see `sparsekit.training.rank`."""
        view = open_view(recipe)
        tokenizer = open_tokenizer(recipe, view)
        plan = plan_for(recipe, view, digest)
        return cls(recipe, listener, recipe.output_directory(), view, plan, tokenizer, shared, Twin(view))

    @property
    def last(self) -> PlannedStep | None:
        """The step that decides the result: the recipe's last one, or its repetition; None without steps."""
        return self._repeated or (self.plan.steps[-1] if self.plan.steps else None)

    @property
    def scoring(self) -> Scoring:
        """Measures models as the recipe says."""
        return Scoring(self.recipe, self.view, self.tokenizer, self.windows, self.listener, self.twin)

    @property
    def work(self) -> StepWork:
        """Does the steps."""
        where = self.directory, self.shared, self.plan.model_digest
        return StepWork(self.recipe, self.view, self.tokenizer, self.windows, self.listener, *where)

    def windows(self, entry: TextEntry) -> Tensor:
        """Tokens of a text, int32 [windows, seq_len]."""
        key = entry_digest(entry, self.recipe.resolve)
        if key in self.cut:
            return self.cut[key]
        tokens = token_windows(
            entry,
            self.tokenizer,
            resolve=self.recipe.resolve,
            cache=self.shared / "tokens",
            allow_network=self.recipe.allow_network,
            vocabulary=self.view.config.get_text_config().vocab_size,
        )
        if tokens.numel() <= KEPT_TOKENS:
            self.cut[key] = tokens
        return tokens

    def execute(self) -> dict[str, Any]:
        """Run what is not done, evaluate, export and report."""
        with RunLock(self.directory), named():
            remove_temporaries(self.directory)
            write_text(self.directory / "recipe.yaml", self.recipe.resolved_yaml())
            self._read_texts()
            chain = Chain(self.view)
            dense = self.scoring.perplexity(chain, self.shared / "dense", self.plan.model_digest, "dense model")
            after = dense
            for planned in self.plan.steps:
                start, before = chain, after
                chain, after = self._step(planned, start, before)
            if self.recipe.evaluate.gates.redo is not None:
                chain, after = self._redo_worst(self.recipe.evaluate.gates.redo, start, before, chain, after, dense)
            report = self._report(chain, dense, after)
        self._check_gates(report)
        return report

    def _read_texts(self) -> None:
        """Cut every text that is needed into tokens, so that a bad one ends the run before its work."""
        for keys, entry in texts_of(self.recipe).items():
            with self.recipe.placing(*keys):
                self.windows(entry)

    def _step(self, planned: PlannedStep, start: Chain, before: dict[str, Any]) -> tuple[Chain, dict[str, Any]]:
        directory = self.shared / "steps" / planned.directory
        store = StepStore(directory, self.view.dtype)
        record = store.finished(planned.fingerprint)
        cached = record is not None
        if record is None:
            self.listener.started(planned.title)
            result = measured(self.view.device, lambda: self.work.apply(planned, start, store))
            store.finish(planned.fingerprint, result)
        else:
            result = record["result"]
        chain = start.then(store, trains=planned.step.method.kind == "train")
        after = self.scoring.perplexity(chain, directory, planned.fingerprint, f"{planned.title}: perplexity")
        summary = summarise(planned, store, result, start, before, after)
        self.summaries.append(summary)
        self.listener.finished(summary, cached=cached)
        return chain, after

    def _redo_worst(
        self,
        redo: Redo,
        start: Chain,
        before: dict[str, Any],
        chain: Chain,
        after: dict[str, Any],
        dense: dict[str, Any],
    ) -> tuple[Chain, dict[str, Any]]:
        """Repeat the last step, which began at `start`, with its worst layers more precise while a gate is missed."""
        patterns = self.plan.steps[-2].patterns if len(self.plan.steps) > 1 else {}
        layers = self.summaries[-1]["layers"]
        worst, errors = worst_layers(layers), {layer["name"]: layer["error"] for layer in layers}
        for count in rounds(len(worst), redo.most):
            if all(row["passed"] for row in self._gates(dense, after)):
                break
            self._repeated = redone(self.plan.steps[-1], redo, worst[:count], patterns, errors)
            chain, after = self._step(self._repeated, start, before)
        return chain, after

    def _gates(self, dense: Mapping[str, Any], final: Mapping[str, Any]) -> list[dict[str, Any]]:
        gate = self.recipe.evaluate.gates.max_ppl_increase
        return [] if gate is None else [gate_row(name, gate, dense, final) for name in dense]

    def _report(self, chain: Chain, dense: dict[str, Any], final: dict[str, Any]) -> dict[str, Any]:
        """Export, verify what was written, and write the report."""
        self.listener.started("export")
        patterns = self.last.patterns if self.last else {}
        exports, files = export_all(self.recipe, self.view, chain, patterns)
        wanted = self.recipe.evaluate
        tasks = self._dense_and_final(chain, self.scoring.tasks, "tasks") if wanted.lm_eval.tasks else {}
        measures = self._dense_and_final(chain, self.scoring.measures, "measures") if wanted.measures else {}
        coverage = self.plan.coverage
        report = {
            "name": self.recipe.name,
            "recipe": self.recipe.resolved_yaml(),
            "basis": basis(self.recipe, self.plan, self.view),
            "shared": str(self.shared.absolute()),
            "environment": environment(self.view),
            "model": {"path": str(self.view.path), "parameters": coverage.total, "digest": self.plan.model_digest},
            "coverage": covered(self.plan, self.view, self.last),
            "notes": [*self.plan.notes, *said(dense, {})],
            "dense": dense,
            "final": final,
            "steps": self.summaries,
            "tasks": tasks,
            "measures": measures,
            "exports": exports,
        }
        report["gates"] = self._gates(dense, final)
        report["sections"] = sections(finite(report), self.recipe.report.sections)
        files |= write_report(report, self.directory)
        self.listener.closed(report, files)
        return report

    def _dense_and_final(self, chain: Chain, measure: Measuring, what: str) -> dict[str, Any]:
        """What a measurement says of the dense and of the compressed model."""
        last, steps = self.last, self.shared / "steps"
        found = {
            "dense": measure(Chain(self.view), self.shared / "dense", self.plan.model_digest, f"dense model: {what}")
        }
        if last is not None:
            found["final"] = measure(chain, steps / last.directory, last.fingerprint, f"{last.title}: {what}")
        return found

    def _check_gates(self, report: Mapping[str, Any]) -> None:
        missed = [row for row in report["gates"] if not row["passed"]]
        if missed:
            worst = max(missed, key=lambda row: row["increase"])
            raise GateError(
                f"perplexity on {worst['text']} rose by {worst['increase']:.1%} "
                f"({worst['dense']:.2f} -> {worst['final']:.2f}), the recipe allows {worst['allowed']:.1%}; "
                f"the results are in {self.directory}"
            )


def run_recipe(recipe: Recipe, listener: Listener) -> dict[str, Any]:
    """Run a recipe from where it stands to its report.

    Raises:
        SparsekitError: See `sparsekit.errors`; `exit_code` tells the kind.
    """
    return Run.open(recipe, listener).execute()
