"""Running a recipe: one directory, one step after another, each skipped when it is done.

The run directory is the only channel between steps. `sparsekit run` is also the command that
resumes: a finished step is recognised by its fingerprint, an unfinished one continues at the block
or the training checkpoint where it stopped.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import transformers
from torch import Tensor

from sparsekit import __version__
from sparsekit.blockwise.allotment import Allotment
from sparsekit.blockwise.streaming import Ahead
from sparsekit.blockwise.walk import Walk
from sparsekit.checkpoint import RunLock, StepStore, remove_temporaries, write_text
from sparsekit.data import entry_digest, load_tokenizer, token_windows
from sparsekit.errors import GateError, RecipeError
from sparsekit.evaluation.basis import basis
from sparsekit.evaluation.scoring import Scoring, Twin
from sparsekit.formats import FORMATS
from sparsekit.interchange.export import export_as, verify_dense
from sparsekit.interchange.hfdir import check_place
from sparsekit.ladder import Ladder, counted
from sparsekit.models.chain import Chain
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.planning.peak import peak_since, start_peak
from sparsekit.planning.plan import Plan, PlannedStep, make_plan, reads
from sparsekit.recipe import Recipe, TextEntry
from sparsekit.recipe.entries import Redo
from sparsekit.recipe.step import params_pattern
from sparsekit.redo import redone, rounds, told, worst_layers
from sparsekit.reporting.report import write_report
from sparsekit.shortage import named
from sparsekit.training.driver import Training
from sparsekit.training.ranks import Place, launch
from sparsekit.training.teacher import open_teacher
from sparsekit.training.world import ALONE, World

KEPT_TOKENS = 2**26  # of a text that stays in memory between its uses; a longer one is read from its file again


class Listener(Protocol):
    """Told what a run is doing; the terminal is one."""

    def planned(self, recipe: Recipe, plan: Plan, view: ModelView) -> None:
        """The recipe was resolved against the model."""

    def started(self, title: str) -> None:
        """A step or an evaluation begins."""

    def progress(self, done: int, total: int) -> None:
        """It has come this far, in blocks, tokens or windows."""

    def noted(self, text: str) -> None:
        """A remark about what is being done, such as the perplexity on the way; the last one stands."""

    def finished(self, summary: Mapping[str, Any], *, cached: bool) -> None:
        """A step is done; `cached` if an earlier run had done it."""

    def closed(self, report: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        """The run is complete."""


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
        tokenizer = load_tokenizer(view.path, trust_remote_code=recipe.model.trust_remote_code)
        directory = recipe.output_directory()
        run = cls(recipe, listener, directory, view, plan_for(recipe, view), tokenizer, directory, Twin(view))
        run._check()
        listener.planned(recipe, run.plan, view)
        return run

    def _check(self) -> None:
        """Find what would fail at the end of a run before its start: texts, tasks, teachers and places."""
        self.scoring.texts()
        self.scoring.check_tasks()
        self._check_teachers()
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
        tokenizer = load_tokenizer(view.path, trust_remote_code=recipe.model.trust_remote_code)
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
        data = self.recipe.data
        wanted = {reads(planned.step): None for planned in self.plan.steps}
        named = {"calibration": data.calibration, "train": data.train}
        scored = [*self.recipe.evaluate.perplexity, *(measure.text for measure in self.recipe.evaluate.measures)]
        entries = [named.get(name) for name in wanted] + [data.evaluation[name] for name in dict.fromkeys(scored)]
        for entry in filter(None, entries):
            self.windows(entry)

    def _step(self, planned: PlannedStep, chain: Chain, before: dict[str, Any]) -> tuple[Chain, dict[str, Any]]:
        directory = self.shared / "steps" / planned.directory
        store = StepStore(directory, self.view.dtype)
        record = store.finished(planned.fingerprint)
        cached = record is not None
        if record is None:
            self.listener.started(planned.title)
            result = self.measured(lambda: self._apply(planned, chain, store))
            store.finish(planned.fingerprint, result)
        else:
            result = record["result"]
        chain = chain.then(store, trains=planned.step.method.kind == "train")
        after = self.scoring.perplexity(chain, directory, planned.fingerprint, f"{planned.title}: perplexity")
        summary = summarise(planned, store, result, len(self.view.blocks), before, after)
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
            names = worst[:count]
            self._repeated = redone(self.plan.steps[-1], redo, names, patterns)
            chain, after = self._step(self._repeated, start, before)
            summary = self.summaries[-1]
            summary["redone"] = {"bits": redo.bits, "layers": names}
            summary["notes"] = [told(redo, names, errors), *summary["notes"]]
        return chain, after

    def _gates(self, dense: Mapping[str, Any], final: Mapping[str, Any]) -> list[dict[str, Any]]:
        gate = self.recipe.evaluate.gates.max_ppl_increase
        return [] if gate is None else [gate_row(name, gate, dense, final) for name in dense]

    def _apply(self, planned: PlannedStep, chain: Chain, store: StepStore) -> dict[str, Any]:
        """Do a step's work; returns what it wants remembered."""
        method = planned.step.method
        self.view.load_rest(chain.rest())
        if method.scope == "model" and planned.step.gpus > 1:
            return self._train_on_ranks(planned, chain, store)
        if method.scope == "model":
            return self.train(planned, chain, store)
        data = self.recipe.data.calibration
        tokens = self.windows(data) if planned.step.calibrated and data is not None else None
        allotted = self._allotted(planned, chain, store, tokens)
        blocks = Ahead(chain.stored, self.view.device, len(self.view.blocks))
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
        selected = planned.selected
        return Allotment(self.view, step.allocate, selected, chain.block, tokens, pattern.sparsity).kept(store)

    def _train_on_ranks(self, planned: PlannedStep, chain: Chain, store: StepStore) -> dict[str, Any]:
        """Have a step done by several processes."""
        self.training_texts(planned)  # cut into tokens once, and not by every rank
        place = Place(
            recipe=self.directory / "recipe.yaml",
            where=self.recipe.where("steps", planned.index, "gpus"),
            shared=self.shared,
            model_digest=self.plan.model_digest,
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

    def measured(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Time and peak memory of some work."""
        fresh, start = start_peak(self.view.device), time.perf_counter()
        result = work()
        seconds = time.perf_counter() - start
        peak, of = peak_since(self.view.device, fresh)
        # a step of several processes has measured itself
        return {"peak_memory": peak, "peak_memory_of": of, **result, "seconds": seconds}

    def _report(self, chain: Chain, dense: dict[str, Any], final: dict[str, Any]) -> dict[str, Any]:
        """Export, verify what was written, and write the report."""
        self.listener.started("export")
        exports, files = self._export(chain)
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
            "coverage": {
                "compressed": coverage.compressed,
                "ignored": coverage.ignored,
                "by_rule": coverage.by_rule,
                "unreachable": dict(coverage.unreachable),
                "share": coverage.share,
                "total": coverage.total,
            },
            "notes": [*self.plan.notes, *_said(dense, {})],
            "dense": dense,
            "final": final,
            "steps": self.summaries,
            "tasks": tasks,
            "measures": measures,
            "exports": exports,
        }
        report["gates"] = self._gates(dense, final)
        files |= write_report(report, self.directory)
        self.listener.closed(report, files)
        return report

    def _export(self, chain: Chain) -> tuple[list[dict[str, Any]], dict[str, Path]]:
        self.view.load_rest(chain.rest())
        target = self.recipe.export_directory()
        reports, files = [], {}
        for name in self.recipe.export.formats:
            with Ahead(chain.stored, self.view.device, len(self.view.blocks)) as blocks:
                result = export_as(
                    FORMATS[name],
                    self.view,
                    blocks,
                    target / name,
                    name=self.recipe.name,
                    patterns=self._patterns(),
                )
            reports.append(result.as_dict())
            files[name] = target / name
        plain = [directory for name, directory in files.items() if FORMATS[name].storage is None]
        if plain:
            tokens = torch.arange(64).remainder(self.view.config.get_text_config().vocab_size).unsqueeze(0)
            with chain.forward() as forward:
                logits = forward(tokens)
                for directory in plain:
                    verify_dense(directory, tokens, logits, self.view)
        return reports, files

    def _patterns(self) -> Mapping[str, Pattern]:
        return self.last.patterns if self.last else {}

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


def open_view(recipe: Recipe) -> ModelView:
    """The recipe's model."""
    model = recipe.model
    return ModelView.open(
        recipe.resolve(model.path),
        dtype=model.dtype,
        compute_dtype=model.compute_dtype,
        device=model.device,
        trust_remote_code=model.trust_remote_code,
        allow_network=recipe.allow_network,
    )


def plan_for(recipe: Recipe, view: ModelView, digest: str | None = None) -> Plan:
    """The plan of a recipe; its texts are read for their digests only. `digest` is the model's where it is known."""
    used = {"calibration": recipe.data.calibration, "train": recipe.data.train}
    texts = {name: entry_digest(entry, recipe.resolve) for name, entry in used.items() if entry}
    return make_plan(recipe, view, texts, digest)


def gate_row(name: str, allowed: float, dense: Mapping[str, Any], final: Mapping[str, Any]) -> dict[str, Any]:
    """One quality gate and whether it holds."""
    increase = final[name]["perplexity"] / dense[name]["perplexity"] - 1
    return {
        "text": name,
        "allowed": allowed,
        "dense": dense[name]["perplexity"],
        "final": final[name]["perplexity"],
        "increase": increase,
        "passed": increase <= allowed,
    }


def summarise(
    planned: PlannedStep,
    store: StepStore,
    result: Mapping[str, Any],
    blocks: int,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> dict[str, Any]:
    """What one step did, for the terminal and the report."""
    layers = [layer for index in range(blocks) for layer in store.layers(index)]
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    zeros = sum(layer["sparsity"] * layer["shape"][0] * layer["shape"][1] for layer in layers)
    patterns = sorted({layer["pattern"] for layer in layers if layer["pattern"]})
    bits = sorted({layer["bits"] for layer in layers if layer["bits"]})
    return {
        "index": planned.index,
        "fingerprint": planned.fingerprint,
        "method": planned.step.method.name,
        "kind": planned.step.method.kind,
        "params": planned.step.params.model_dump(mode="json"),
        "source": planned.step.method.source,
        "plugins": planned.step.plugins,
        "pattern": ", ".join(patterns) or None,
        "bits": bits,
        "sparsity": zeros / weights if weights else 0.0,
        "groups": sum(layer["groups"] for layer in layers),
        "violations": sum(layer["violations"] for layer in layers),
        "error": sum(layer["error"] for layer in layers) / len(layers) if layers else 0.0,
        "error_of": layers[0]["error_of"] if layers else "weights",
        "numerics": counted(layers),
        "before": dict(before),
        "perplexity": dict(after),
        "notes": [
            *_said(after, result),
            *branch_note(layers, weights),
            *(f"{layer['name']}: {note}" for layer in layers for note in layer["notes"]),
        ],
        "layers": layers,
        **result,
    }


def branch_note(layers: Sequence[Mapping[str, Any]], weights: int) -> list[str]:
    """What low-rank branches of a step's layers cost, if there are any."""
    count = sum(layer["branch_parameters"] for layer in layers)
    share = count / max(1, weights)
    told = f"low-rank branches: {count:,} dense parameters beside the linears' {weights:,} ({share:.1%})"
    return [f"{told}; the pattern of the weights alone is N:M, the model is N:M+LR"] if count else []


def _said(scores: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[str]:
    """What ran out of memory while training and measuring."""
    if told := (result.get("training") or {}).get("out_of_memory"):
        yield f"training: {told}"
    yield from (f"perplexity on {name}: {score['note']}" for name, score in scores.items() if "note" in score)


def environment(view: ModelView) -> dict[str, str]:
    """Versions and machine, for the report."""
    device = "cpu" if view.device.type == "cpu" else torch.cuda.get_device_name(view.device)
    return {
        "sparsekit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
        "dtype": str(view.dtype).removeprefix("torch."),
        "compute_dtype": str(view.compute_dtype).removeprefix("torch."),
    }
