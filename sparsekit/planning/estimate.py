"""What a recipe will take: memory, disk and time of every step, predicted without reading a weight."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsekit.blockwise.activations import WAITING_SHARE, free_memory, waiting_bytes
from sparsekit.blockwise.activations import on_device as kept_on_device
from sparsekit.blockwise.holding import HOLDINGS
from sparsekit.evaluation.scoring import EVALUATION_TOKENS, check_tasks
from sparsekit.models.shapes import ModelSizes, sizes_of
from sparsekit.models.view import ModelView
from sparsekit.opening import of_texts, open_tokenizer, open_view
from sparsekit.planning import memory_model as memory
from sparsekit.planning import training_memory as training
from sparsekit.planning.disk_model import bound_notes, checkpoint_bytes, exports_bytes, step_bytes
from sparsekit.planning.disk_time import Files, file_seconds
from sparsekit.planning.fates import layers
from sparsekit.planning.fingerprint import NOT_READ
from sparsekit.planning.foreseen import Foreseen
from sparsekit.planning.microbench import Bench
from sparsekit.planning.peak import resident_now
from sparsekit.planning.plan import Plan, PlannedStep, make_plan, texts_of
from sparsekit.planning.reading import check_length, reading_seconds, tokens_bytes, tokens_of
from sparsekit.recipe import Recipe, TextEntry
from sparsekit.training.teacher import open_teacher

FORWARDS_OF_HEAD = 4  # student and teacher forward, two products backward
LOSS_TRAFFIC = {"cuda": 12, "cpu": 120}  # bytes a logit the loss and its gradient move: one kernel, or 30 operations
STEP_TRAFFIC = {"cuda": 36, "cpu": 180}  # bytes a parameter an optimizer step moves: fused, or operation by operation


@dataclass(slots=True)
class Estimator:
    """Works the numbers of a plan out.

    Attributes:
        recipe: The recipe.
        view: The model, opened with `empty`.
        plan: The recipe resolved.
        sizes: Sizes of the model.
        bench: Times what has to be timed.
        process: Bytes of the process before any of it.
        notes: What the prediction leaves out.
        opening: Seconds it took to open the model.
    """

    recipe: Recipe
    view: ModelView
    plan: Plan
    sizes: ModelSizes
    bench: Bench
    process: int
    notes: list[str] = field(default_factory=list)
    opening: float = 0.0
    _forward: dict[tuple[int, int], float] = field(default_factory=dict)

    @classmethod
    def open(cls, recipe: Recipe) -> Estimator:
        """Resolve a recipe against its model's config and headers; texts are not read.

        Raises:
            RecipeError: The recipe does not fit the model.
            CoverageError: Too much of the model is out of reach.
            DataError: A text or a task is missing, or a text is too short.
        """
        check_tasks(recipe)
        process, started = resident_now(), time.perf_counter()
        view = open_view(recipe, empty=True)
        opening = time.perf_counter() - started
        of_texts(recipe, lambda entry: check_length(entry, recipe.resolve))
        plan = make_plan(recipe, view, {}, digest=NOT_READ)
        sizes = sizes_of(view)
        return cls(recipe, view, plan, sizes, Bench(view, sizes), process, opening=opening)

    def all(self) -> dict[str, Any]:
        """Everything, for the terminal and for JSON."""
        self.bench.deadline = time.monotonic() + self.bench.budget
        files = file_seconds(self.bench, self.recipe.output_directory())
        head = self.bench.head_seconds()
        steps = [self._step(planned, head, files) for planned in self.plan.steps]
        scoring = self._scoring(head, files)
        exports, bounds = exports_bytes(Foreseen(self.view, self.plan.steps), self.sizes, self.recipe.export.formats)
        everything = [*steps, *([scoring] if scoring else [])]
        startup, reading = self._startup(), self._reading()
        tokens = tokens_bytes(texts_of(self.recipe).values(), self.recipe.resolve, self.sizes.vocabulary)
        seconds = startup + reading + sum(part["seconds"] for part in steps)
        seconds += sum(files.seconds(1, size) for size in exports.values())
        if scoring:
            seconds += scoring["seconds"] * (1 + len(steps))
        coverage, noted = self.plan.coverage, [*self.plan.notes, *self.notes, *self.bench.notes, *bound_notes(bounds)]
        return {
            "name": self.recipe.name,
            "device": self.view.device.type,
            "layers": list(layers(self.sizes, self.plan)),
            "coverage": {"share": coverage.share, "total": coverage.total, "unreachable": dict(coverage.unreachable)},
            "steps": steps,
            "scoring": scoring,
            "exports": exports,
            "bounds": bounds,
            "disk": sum(part["disk"] for part in steps) + sum(exports.values()) + tokens,
            "tokens": tokens,
            "peak_device": max(part["device"]["bytes"] for part in everything) if everything else 0,
            "peak_host": max(part["host"]["bytes"] for part in everything) if everything else self.process,
            "startup": startup,
            "reading": reading,
            "seconds": seconds,
            "notes": [*noted, *self._warnings(everything)],
        }

    def _reading(self) -> float:
        """Seconds to cut the texts into tokens, which a run does once."""
        entries = list(texts_of(self.recipe).values())
        if not entries:
            return 0.0
        tokenizer = open_tokenizer(self.recipe, self.view)
        return reading_seconds(entries, tokenizer, self.recipe.resolve)

    def _startup(self) -> float:
        """Seconds a process pays once: the model is opened, with its dense twin if that is asked for, and
        kernels are loaded and compiled.
        """  # noqa: D205
        opened = 2 if self.recipe.evaluate.agreeing and self.plan.steps else 1
        if self.bench.startup > 0:
            self.notes.append(
                f"first calls took {self.bench.startup:.1f} s, to load and compile kernels: counted once, as start-up; "
                "compiled Triton kernels stay in its cache, and the next process finds them there"
            )
        return self.bench.startup + opened * self.opening

    def forward_seconds(self, windows: int, seq_len: int) -> float:
        """Seconds for a token through one block, in forwards of so many windows."""
        key = (windows, seq_len)
        if key not in self._forward:
            self._forward[key] = self.bench.forward_seconds(windows, seq_len)
        return self._forward[key]

    def _step(self, planned: PlannedStep, head: float, files: Files) -> dict[str, Any]:
        """One step."""
        method = planned.step.method
        model = method.scope == "model"
        device, host, seconds = self._train(planned, head) if model else self._walk(planned)
        count = len(self.sizes.blocks)
        disk = step_bytes(Foreseen(self.view, self.plan.steps[: planned.index + 1]), self.sizes)
        kept = checkpoint_bytes(self.sizes, planned, seconds) if model else 0
        return {
            "title": planned.title,
            "method": method.name,
            "known": not model or training.foreseen(planned.arguments),
            "device": device.as_dict(),
            "host": host.as_dict(),
            "disk": disk + kept,
            "seconds": seconds + files.seconds(count, disk) if model else _overlapped(seconds, files, count, disk),
        }

    def _walk(self, planned: PlannedStep) -> tuple[memory.Moment, memory.Moment, float]:
        """Memory and time of a step over blocks."""
        data, kind = self.recipe.data.calibration, planned.step.method.stats
        samples, seq_len = (0, 1) if data is None or kind is None else (self._windows(data), data.seq_len)
        hidden = samples * seq_len * self.sizes.width * self.sizes.computed
        holding = HOLDINGS[self.recipe.model.memory]
        on_device = not self.sizes.cuda or kept_on_device(hidden, self.view.device, holding)
        in_order = planned.step.schedule == "group"
        waiting = 0
        other = memory.paired_bytes(self.sizes, kind, samples, seq_len)  # goes group by group, and nothing waits
        if in_order and not other and planned.step.method.scope == "linear" and holding.waits:
            widest = max(self.sizes.largest.inputs())
            waiting = samples * seq_len * waiting_bytes(self.sizes.width, widest, self.sizes.computed)
            waiting = waiting if waiting <= WAITING_SHARE * free_memory(self.view.device) else 0
        grouped = planned.step.method.scope == "group"
        moments = memory.walk_moments(
            self.sizes, planned.step.method.name, kind, grouped=grouped, integers=planned.step.quantizes,
            samples=samples, seq_len=seq_len, on_device=on_device, in_order=in_order, waiting=waiting,
            holding=holding,
        )  # fmt: skip
        held = 0 if on_device else hidden + other
        host = memory.host_of_walk(self.sizes, self.process, hidden=held, holding=holding)
        block, tokens = self.sizes.largest, samples * seq_len
        solving = sum(self.bench.method_seconds(planned, block).values())
        passes = 0.0
        if kind is not None and tokens:
            updates = sum(self.bench.statistic_seconds(kind, inputs) for inputs in block.inputs())
            windows = self.sizes.micro_batch(samples, seq_len, holding.tokens) // seq_len
            last = len(block.groups) - 1
            ends = [] if waiting else range(last + 1) if in_order else [last]  # who waits is run once
            whole = windows / samples  # the first micro-batch; later ones end where nothing more is collected
            rounds = sum(whole + (1 - whole) * block.before(end) for end in ends)
            forward = self.forward_seconds(windows, seq_len)
            looks = windows * seq_len * forward  # one forward shows which linears share an input
            passes = tokens * (forward * (1 + rounds) + updates) + looks
        return *self._split(memory.peak(moments), host), self.sizes.blocks_alike * (solving + passes)

    def _train(self, planned: PlannedStep, head: float) -> tuple[memory.Moment, memory.Moment, float]:
        """Memory and time of a training step."""
        data, given = self.recipe.data.train, planned.arguments
        seq_len = data.seq_len if data else 1
        if not training.foreseen(given):
            self.notes.append(f"{planned.title}: sparsekit knows no memory or time of this method")
            nothing = memory.Moment("unknown", [])
            return *self._split(nothing, nothing), 0.0
        ranks = planned.step.gpus
        micro = given["micro_batch"] or training.train_micro_batch(self.sizes, given["batch"] // ranks, seq_len)
        taught = self._teacher(planned)
        moments = training.training_moments(self.sizes, given, seq_len, micro, ranks=ranks, teacher=taught.sizes)
        host = training.host_of_training(self.sizes, self.process)
        both = self.bench.forward_seconds(micro, seq_len, backward=True)
        again = self.forward_seconds(micro, seq_len) if given["checkpointing"] else 0.0
        teaching = taught.sizes.blocks_alike * taught.forward_seconds(micro, seq_len)
        if given["tokens"] is None:
            return *self._split(memory.peak(moments), host), 60.0 * given["budget"].minutes
        steps = given["tokens"] / (given["batch"] * seq_len)
        rate = self.bench.bytes_per_second()
        losses = self.sizes.vocabulary * LOSS_TRAFFIC[self.view.device.type] / rate
        a_token = self.sizes.blocks_alike * (both + again) + teaching + FORWARDS_OF_HEAD * head + losses
        seconds = given["tokens"] * a_token + steps * self.sizes.numel * STEP_TRAFFIC[self.view.device.type] / rate
        if ranks > 1:
            told = f"memory is that of each of {ranks} processes; what they send one another is not in the time"
            self.notes.append(f"{planned.title}: {told}")
        if self.sizes.cuda:
            seconds /= ranks
            told = "predicted without torch.compile, which takes a minute and then saves time and memory"
            self.notes.append(f"{planned.title}: {told}")
        return *self._split(memory.peak(moments), host), seconds

    def _teacher(self, planned: PlannedStep) -> Bench:
        """Sizes and times of the model a step learns from: the dense original, or the one it names."""
        if planned.step.teacher is None:
            return self.bench
        tokenizer = open_tokenizer(self.recipe, self.view)
        view = open_teacher(self.recipe, planned.index, self.view, tokenizer, empty=True)
        return Bench(view, sizes_of(view), deadline=self.bench.deadline)

    def _split(self, device: memory.Moment, host: memory.Moment) -> tuple[memory.Moment, memory.Moment]:
        """On a CPU the device's memory is the process's own."""
        if self.sizes.cuda:
            return device, host
        process = memory.Part("Python and its libraries", "measured now", self.process)
        both = memory.Moment(device.name, [process, *device.parts])
        return both, both

    def _scoring(self, head: float, files: Files) -> dict[str, Any] | None:
        """One model on all texts."""
        wanted = self.recipe.evaluate
        if not wanted.perplexity:
            return None
        entries = {name: self.recipe.data.evaluation[name] for name in wanted.perplexity}
        moments = [
            moment
            for name, entry in entries.items()
            for moment in memory.scoring_moments(
                self.sizes, self._windows(entry), entry.seq_len, agreement=name in wanted.agreeing
            )
        ]
        device, host = self._split(memory.peak(moments), memory.host_of_walk(self.sizes, self.process, hidden=0))
        inside = (self.sizes.numel - self.sizes.outside) * self.sizes.stored
        seconds = files.constant + files.held(len(self.sizes.blocks), inside) * (2 if wanted.agreeing else 1)
        for name, entry in entries.items():
            models = 2 if name in wanted.agreeing else 1
            batch = max(1, min(self._windows(entry), EVALUATION_TOKENS[self.view.device.type] // entry.seq_len))
            a_token = self.sizes.blocks_alike * self.forward_seconds(batch, entry.seq_len) + head
            compared = self.bench.comparing_seconds(entry.seq_len, dense=models == 2)
            seconds += self._windows(entry) * entry.seq_len * (a_token * models + compared)
        if wanted.lm_eval.tasks:
            self.notes.append("the zero-shot tasks are not in the predicted time")
        peaks = {"device": device.as_dict(), "host": host.as_dict()}
        return {"title": "scoring", "known": True, **peaks, "disk": 0, "seconds": seconds}

    def _windows(self, entry: TextEntry) -> int:
        """Windows of a text, guessed from the size of its files where the recipe does not say."""
        if entry.samples is not None:
            return entry.samples
        tokens = tokens_of(entry, self.recipe.resolve)
        if tokens is None:
            self.notes.append("the length of hub texts is not known before they are fetched; they count as nothing")
            return 0
        return max(1, tokens // entry.seq_len)

    def _warnings(self, parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        """What does not fit."""
        if self.sizes.cuda:
            free = int(torch.cuda.mem_get_info(self.view.device)[0])
            for part in parts:
                needed = part["device"]["bytes"]
                if needed > free:
                    yield f"{part['title']} needs {needed / 1e9:.1f} GB on the device, {free / 1e9:.1f} GB are free"


def _overlapped(working: float, files: Files, count: int, size: int) -> float:
    """Seconds of a step over blocks: a thread reads one and another writes one while a third is worked on."""
    alone = files.seconds(1, size // count)  # the first is read, the last is written, and nothing is worked on
    writing, reading = count * files.constant + size * files.written, size * files.read
    return max(working, writing - alone, reading - alone) + alone
