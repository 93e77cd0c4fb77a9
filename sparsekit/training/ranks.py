"""A training step on several devices: one process for each, started by torch.distributed.run.

The run directory is the channel, as between steps: the parent writes what is to be done into the
step's directory, the ranks train, the first of them commits the blocks and tells what came of it.
While it works it writes one line of JSON for every event to its standard output, which the parent reads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from sparsekit import errors
from sparsekit.checkpoint import StepStore
from sparsekit.errors import MethodError, RecipeError, SparsekitError
from sparsekit.files import read_json, write_json
from sparsekit.planning.plan import PlannedStep

JOB, DONE = "ranks.json", "ranks-done.json"
TOLD = 40  # lines of other output that an error shows at most


class Ear(Protocol):
    """Told of progress; a `sparsekit.listener.Listener` is one."""

    def progress(self, done: int, total: int) -> None:
        """So many tokens of all."""

    def noted(self, text: str) -> None:
        """A remark beside the bar."""


@dataclass(frozen=True, slots=True)
class Place:
    """What the ranks must know of the run.

    Attributes:
        recipe: File with the resolved recipe.
        where: Place of `gpus` in the recipe as the user wrote it, for errors.
        shared: Directory with the steps and the tokens.
        model_digest: Of the model, which each rank would have to work out.
        device: Of the parent.
    """

    recipe: Path
    where: str
    shared: Path
    model_digest: str
    device: torch.device


def check_devices(gpus: int, place: Place) -> None:
    """Refuse more processes than there are devices.

    Raises:
        RecipeError: By the line that says `gpus`.
    """
    there = torch.cuda.device_count() if place.device.type == "cuda" else gpus
    if gpus > there:
        raise RecipeError(f"gpus: {gpus}, and this machine has {there}", where=place.where)
    if place.device.index is not None:
        message = f"gpus: {gpus} takes the first ones; write device: cuda, not {place.device}"
        raise RecipeError(message, where=place.where)


def launch(
    planned: PlannedStep, before: Sequence[StepStore], store: StepStore, place: Place, ear: Ear
) -> dict[str, Any]:
    """Do a training step on `gpus` processes; returns what one process would have returned.

    On a CPU they are processes that share it: slower than one, and there to try things out.

    Args:
        planned: The step.
        before: Stores of the finished steps.
        store: Of this step.
        place: Where the run is.
        ear: Told of progress.
    Raises:
        SparsekitError: As a rank raised it.
        MethodError: A rank failed in another way, which the message quotes.
    """
    gpus = planned.step.gpus
    check_devices(gpus, place)
    job = {
        "recipe": str(place.recipe),
        "step": planned.index,
        "fingerprint": planned.fingerprint,
        "model_digest": place.model_digest,
        "shared": str(place.shared),
        "device": place.device.type,
        "before": [store.directory.name for store in before],
    }
    (store.directory / DONE).unlink(missing_ok=True)
    write_json(store.directory / JOB, job)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    threads = max(1, torch.get_num_threads() // (gpus if place.device.type == "cpu" else 1))
    process = subprocess.Popen(
        [*command, "-m", "sparsekit.training.rank", str(store.directory)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        error, other = _listened(process, ear)
        process.wait()
    finally:  # also when the user stops the run
        process.terminate()
        process.communicate()
    if error is not None:
        raise _same_error(error)
    if process.returncode or not (store.directory / DONE).exists():
        raise MethodError(f"{planned.step.method.name} failed on {gpus} processes:\n{''.join(other[-TOLD:])}")
    result: dict[str, Any] = read_json(store.directory / DONE)
    for name in (JOB, DONE):
        (store.directory / name).unlink()
    return result


def _listened(process: subprocess.Popen[str], ear: Ear) -> tuple[dict[str, str] | None, Sequence[str]]:
    """Pass the events on until the ranks end; returns the first error and what else they wrote."""
    error: dict[str, str] | None = None
    other: list[str] = []
    assert process.stdout is not None  # it is a pipe
    for line in process.stdout:
        event = _event(line)
        if event is None:
            other.append(line)
        elif "progress" in event:
            ear.progress(*event["progress"])
        elif "noted" in event:
            ear.noted(event["noted"])
        elif error is None:
            error = event["error"]
    return error, other


def _event(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and set(event) <= {"progress", "noted", "error"} else None


def _same_error(told: Mapping[str, str]) -> SparsekitError:
    """The error of a rank, of the same class here."""
    kind = getattr(errors, told["type"])
    made: SparsekitError = kind(told["message"])
    return made
