"""The training driver: gives a model-scope method its student, teacher and tokens, and keeps what it made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsekit.blockwise.stacking import placed, sent
from sparsekit.blockwise.streaming import Behind
from sparsekit.checkpoint import BlockState, StepStore
from sparsekit.errors import MethodError
from sparsekit.files import write_text
from sparsekit.method import Method
from sparsekit.models.chain import Chain
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.state import LinearState
from sparsekit.training.loop import Trained, TrainJob
from sparsekit.training.world import ALONE, World
from sparsekit.verify import told_type, verified

VALID_WINDOWS = 32  # held-out windows whose perplexity is logged while training


@dataclass(slots=True)
class Training:
    """One step of scope model.

    Attributes:
        view: The model; it stays empty, the student and the teacher are copies of their own.
        method: What to apply, with the arguments in `arguments`.
        selected: Full names of the linears the step is meant for.
        patterns: The pattern each linear must hold after the step.
        chain: The model before the step.
        store: Where the result is committed.
        tokens: Training windows [windows, seq_len].
        valid: Held-out windows for the log, or None.
        seed: Of the data order.
        progress: Called with (tokens done, tokens in all).
        noted: Called with a remark to show, the held-out perplexity.
        world: The processes that do this step together.
        taught_by: The model to learn from, its blocks empty; None for the dense original.
    """

    view: ModelView
    method: Method
    arguments: Mapping[str, Any]
    selected: frozenset[str]
    patterns: Mapping[str, Pattern]
    chain: Chain
    store: StepStore
    tokens: Tensor
    valid: Tensor | None
    seed: int
    progress: Callable[[int, int], None]
    noted: Callable[[str], None] = lambda text: None
    world: World = ALONE
    taught_by: ModelView | None = None
    _log: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """Train, verify and commit; returns the method's metrics and the path of its log."""
        student, teacher = self.view.copy(), self.taught_by or self.view.copy()
        blocks = list(self.chain.blocks())
        student.load_rest(self.chain.rest())
        student.materialise_all(blocks)
        teacher.materialise_all(teacher.dense_block(index) for index in range(len(teacher.blocks)))
        linears = {name: state for block in blocks for name, state in block.linears.items() if name in self.selected}
        self.store.directory.mkdir(parents=True, exist_ok=True)
        job = TrainJob(
            student=student.module,
            teacher=teacher.module,
            linears=linears,
            tokens=self.tokens,
            valid=None if self.valid is None else self.valid[:VALID_WINDOWS],
            seed=self.seed,
            directory=self.store.directory / "checkpoint",
            log=self._record,
            progress=self.progress,
            world=self.world,
            another_teacher=self.taught_by is not None,
        )
        trained = self._whole(self.method.guarded(job, **self.arguments), linears)
        if self.world.first:
            self._commit(blocks, trained)
        return {"training": trained.metrics, "curve": self._log}

    def _whole(self, result: object, given: Mapping[str, LinearState]) -> Trained:
        """What the method returned, if it is a state of every linear it was given.

        Raises:
            MethodError: It is not.
        """
        if not isinstance(result, Trained):
            raise MethodError(f"{self.method.name} returned {told_type(result)}, expected a Trained")
        missing = given.keys() - result.linears.keys()
        if missing and self.world.first:  # the other ranks give theirs away
            raise MethodError(f"{self.method.name} returned no state of it", layer=min(missing))
        return result

    def _record(self, record: dict[str, Any]) -> None:
        """Append to the log; a resumed run overwrites what it repeats."""
        if not self.world.first:
            return
        if "valid_perplexity" in record:
            self.noted(f"valid {record['valid_perplexity']:.2f} at {record['tokens'] / 1e6:.1f}M tokens")
        path = self.store.directory / "train.jsonl"
        if not self._log and path.exists():
            self._log = _read_log(path)
        self._log = [*(old for old in self._log if old["step"] < record["step"]), record]
        write_text(path, "".join(json.dumps(line) + "\n" for line in self._log))

    def _commit(self, blocks: Sequence[BlockState], trained: Trained) -> None:
        """Verify what was trained and write it, block by block, each on the device: a CPU takes minutes for it."""
        inside: set[str] = set()
        integers = self.method.quantizes(self.arguments)
        with Behind(self.store) as behind:
            for index, block in enumerate(blocks):
                linears = {name: trained.linears.get(name, state) for name, state in block.linears.items()}
                params = {name: trained.params.get(name, value) for name, value in block.params.items()}
                after = placed(BlockState(linears, params), self.view.device)
                records = [
                    verified(
                        sent(before, self.view.device), after.linears[name], kind=self.method.kind,
                        pattern=self.patterns.get(name), integers=integers,
                    ).as_dict()
                    for name, before in block.linears.items() if name in trained.linears
                ]  # fmt: skip
                behind.commit(index, after, records)
                inside |= params.keys()
        self.store.commit_rest({name: value for name, value in trained.params.items() if name not in inside})


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log up to the first damaged one; it is for people, and no result depends on it."""
    found: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        found.append(record)
    return found
