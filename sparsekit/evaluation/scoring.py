"""Scores of the models of a run, kept beside what they are of and read back when nothing has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from sparsekit.data import entry_digest
from sparsekit.errors import DataError, nearest
from sparsekit.evaluation.evaluate import Agreements, lm_eval_scores, perplexity
from sparsekit.evaluation.tasks import chosen, task_files
from sparsekit.files import write_json
from sparsekit.kept import sealed, sha256_file, unsealed
from sparsekit.models.chain import Chain
from sparsekit.models.view import ModelView
from sparsekit.pluginfile import foreign_sources
from sparsekit.recipe import Recipe, TextEntry

EVALUATION_TOKENS = {"cpu": 4096, "cuda": 32768}  # of one forward while scoring

Forward = Callable[[Tensor], Tensor]


class Watcher(Protocol):
    """Told that a measurement begins and how far it is."""

    def started(self, title: str) -> None:
        """A measurement begins."""

    def progress(self, done: int, total: int) -> None:
        """It has come this far, in windows."""


@dataclass(slots=True)
class Twin:
    """The dense model a second time, opened when it is first asked for."""

    view: ModelView
    _opened: ModelView | None = field(default=None)

    @property
    def dense(self) -> Chain:
        """The dense model; its blocks are empty until a forward is asked for."""
        if self._opened is None:
            self._opened = self.view.copy()
        return Chain(self._opened)


@dataclass(slots=True)
class Scoring:
    """Measures models of one recipe.

    Attributes:
        recipe: Says what to measure.
        view: The model.
        tokenizer: Its tokenizer.
        windows: Tokens of a text, int32 [windows, seq_len].
        watcher: Told of every measurement that is really made.
        twin: The dense model, for agreement with it.
    """

    recipe: Recipe
    view: ModelView
    tokenizer: Any
    windows: Callable[[TextEntry], Tensor]
    watcher: Watcher
    twin: Twin

    def texts(self) -> dict[str, str]:
        """Digest of every text whose perplexity is wanted."""
        data = self.recipe.data.evaluation
        return {name: entry_digest(data[name], self.recipe.resolve) for name in self.recipe.evaluate.perplexity}

    def perplexity(self, chain: Chain, directory: Path, fingerprint: str, title: str) -> dict[str, Any]:
        """Perplexity on every text, and agreement with the dense model where the recipe wants it.

        Args:
            chain: The model; its agreement is measured unless it is the dense one.
            directory: Keeps the scores in `perplexity.json`.
            fingerprint: Of the model; scores of another one are not read.
            title: Of the measurement.
        """
        wanted = self.texts()
        agreeing = self.recipe.evaluate.agreeing if chain.stores else []
        path = directory / "perplexity.json"
        known = unsealed(path) or {}
        kept = known.get("scores", {}) if known.get("of") == fingerprint else {}
        scores: dict[str, Any] = {
            name: kept[name]
            for name, digest in wanted.items()
            if name in kept
            and known["texts"].get(name) == digest
            and (name not in agreeing or "agreement" in kept[name])
        }
        missing = [name for name in wanted if name not in scores]
        if missing:
            self.watcher.started(title)
            with chain.forward() as forward, self._reference(agreeing) as dense:
                for name in missing:
                    scores[name] = self._score(forward, dense if name in agreeing else None, name)
        scores = {name: scores[name] for name in wanted}
        if missing or not known:
            write_json(path, sealed({"of": fingerprint, "texts": wanted, "scores": scores}))
        return scores

    def _reference(self, agreeing: list[str]) -> AbstractContextManager[Forward | None]:
        """The dense model's forward, held while a compressed one is scored; None when nobody asks for it."""
        return self.twin.dense.forward() if agreeing else nullcontext()

    def _score(self, forward: Forward, dense: Forward | None, name: str) -> dict[str, Any]:
        entry = self.recipe.data.evaluation[name]
        batch = max(1, EVALUATION_TOKENS[self.view.device.type] // entry.seq_len)
        agreements = Agreements()
        scored = forward if dense is None else agreements.between(forward, dense)
        windows = self.windows(entry)
        with self.view.blamed():
            result = perplexity(scored, windows, batch=batch, progress=self.watcher.progress).as_dict()
        return result if dense is None else {**result, "agreement": agreements.as_dict()}

    def measures(self, chain: Chain, directory: Path, fingerprint: str, title: str) -> dict[str, dict[str, float]]:
        """Numbers of the recipe's evaluators by title; `directory` keeps them in `measures.json`."""
        wanted = self.recipe.evaluate.measures
        if not wanted:
            return {}
        path, asked = directory / "measures.json", measures_basis(self.recipe)
        known = unsealed(path) or {}
        kept = known.get("numbers", {}) if known.get("of") == fingerprint else {}
        before = known.get("asked", {})
        numbers = {name: kept[name] for name, about in asked.items() if name in kept and before.get(name) == about}
        missing = [measure for measure in wanted if measure.title not in numbers]
        if missing:
            self.watcher.started(title)
            with chain.forward() as forward:
                for done, measure in enumerate(missing):
                    self.watcher.progress(done, len(missing))
                    windows = self.windows(self.recipe.data.evaluation[measure.text])
                    numbers[measure.title] = measure.of(forward, windows)
            write_json(path, sealed({"of": fingerprint, "asked": asked, "numbers": numbers}))
        return {name: numbers[name] for name in asked}

    def tasks(self, chain: Chain, directory: Path, fingerprint: str, title: str) -> dict[str, Any]:
        """Zero-shot scores of a model; `directory` keeps them in `tasks.json`."""
        wanted = self.recipe.evaluate.lm_eval
        if not wanted.tasks:
            return {}
        asked = tasks_basis(self.recipe)
        path = directory / "tasks.json"
        known = unsealed(path) or {}
        if known.get("of") == fingerprint and known.get("asked") == asked:
            scores: dict[str, Any] = known["scores"]
            return scores
        self.watcher.started(title)
        with chain.forward():
            scores = lm_eval_scores(
                self.view.module,
                self.tokenizer,
                wanted.tasks,
                tasks_dir=Path(self.recipe.resolve(wanted.tasks_dir)) if wanted.tasks_dir else None,
                limit=wanted.limit,
                seed=self.recipe.seed,
                allow_network=self.recipe.allow_network,
            )
        write_json(path, sealed({"of": fingerprint, "asked": asked, "scores": scores}))
        return scores


def measures_basis(recipe: Recipe) -> dict[str, Any]:
    """What decides the numbers of evaluators besides the model, by title: code, parameters and text."""
    texts = recipe.data.evaluation
    return {
        measure.title: {
            **measure.as_dict(),
            "sha256": [sha256_file(path) for path in foreign_sources(measure.evaluator.function)],
            "content": entry_digest(texts[measure.text], recipe.resolve),
        }
        for measure in recipe.evaluate.measures
    }


def tasks_basis(recipe: Recipe) -> dict[str, Any]:
    """What decides the zero-shot scores besides the model: tasks, their files' content, limit and seed."""
    wanted = recipe.evaluate.lm_eval
    if not wanted.tasks:
        return {}
    directory = Path(recipe.resolve(wanted.tasks_dir)) if wanted.tasks_dir else None
    known = task_files(directory)
    ours, others = chosen(list(wanted.tasks), known)
    members = sorted({name for names in ours.values() for name in names})
    files = {name: _task_digest(known[name].config, known[name].path, directory) for name in members}
    return {"tasks": list(wanted.tasks), "files": files, "hub": others, "limit": wanted.limit, "seed": recipe.seed}


def _task_digest(config: Mapping[str, Any], path: Path, directory: Path | None) -> str:
    """Content of a task file and of its data; a file that is missing is named when the task is read."""
    kwargs = config.get("dataset_kwargs", {})
    named = [*kwargs.get("data_files", {}).values(), *kwargs.get("labels", {}).values()]
    data = [directory / file for file in named] if directory else []
    parts = [sha256_file(file) for file in [path, *data] if file.is_file()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def check_tasks(recipe: Recipe) -> None:
    """Read a recipe's tasks and their data, as scoring will.

    Raises:
        DataError: A task is unknown, or a file of it is missing or damaged.
    """
    wanted = recipe.evaluate.lm_eval
    if not wanted.tasks:
        return
    with recipe.placing("evaluate", "lm_eval"):
        directory = Path(recipe.resolve(wanted.tasks_dir)) if wanted.tasks_dir else None
        known = task_files(directory)
        ours, others = chosen(list(wanted.tasks), known)
        for name in dict.fromkeys(name for names in ours.values() for name in names):
            known[name].with_data(directory)
        if others and not recipe.allow_network:
            hint = nearest(others[0], [*known, *ours])
            raise DataError(f"no task {others[0]!r}.{hint} Tasks of lm-eval itself need allow_network: true.")
