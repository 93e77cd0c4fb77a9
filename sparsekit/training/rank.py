"""What one of several training processes does: `python -m sparsekit.training.rank STEP_DIRECTORY`, see `ranks`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparsekit.checkpoint import StepStore
from sparsekit.errors import CheckpointError, SparsekitError
from sparsekit.files import read_json, write_json
from sparsekit.models.chain import Chain
from sparsekit.planning.peak import measured
from sparsekit.recipe import read_recipe
from sparsekit.run import Run
from sparsekit.training.ranks import DONE, JOB
from sparsekit.training.world import World


class Told:
    """A `sparsekit.listener.Listener` that writes events to standard output; silent on other ranks."""

    def __init__(self, speaks: bool) -> None:
        self._speaks = speaks

    def planned(self, *_: Any) -> None:
        """The parent has shown it."""

    def started(self, title: str) -> None:
        """The parent has shown it."""

    def progress(self, done: int, total: int) -> None:
        """Tell the parent."""
        self._tell("progress", [done, total])

    def noted(self, text: str) -> None:
        """Tell the parent."""
        self._tell("noted", text)

    def finished(self, summary: Mapping[str, Any], *, cached: bool) -> None:
        """A rank finishes no step."""

    def closed(self, report: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        """A rank closes no run."""

    def _tell(self, kind: str, what: Any) -> None:
        if self._speaks:  # a broken pipe ends a rank whose parent was killed
            sys.stdout.write(json.dumps({kind: what}) + "\n")
            sys.stdout.flush()


def work(directory: Path) -> None:
    """What one rank does in a step's directory."""
    job = read_json(directory / JOB)
    if job["device"] == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what torch.distributed.run tells a rank
    world = World.join(job["device"])
    try:
        recipe = read_recipe(Path(job["recipe"]))
        run = Run.rank(recipe, Told(world.first), Path(job["shared"]), job["model_digest"])
        planned = run.plan.steps[job["step"]]
        if planned.fingerprint != job["fingerprint"]:
            raise CheckpointError(f"a rank read {job['recipe']} as another step than its parent; run it again")
        chain = Chain(run.view)
        for name, before in zip(job["before"], run.plan.steps, strict=False):
            store = StepStore(run.shared / "steps" / name, run.view.dtype)
            chain = chain.then(store, trains=before.step.method.kind == "train")
        step = StepStore(directory, run.view.dtype)
        result = measured(run.view.device, lambda: run.work.train(planned, chain, step, world))
        if world.first:
            write_json(directory / DONE, result)
        world.wait()
    finally:
        dist.destroy_process_group()


def main(directory: Path) -> None:
    """Work; a named error goes to the parent as an event."""
    try:
        work(directory)
    except SparsekitError as error:
        sys.stdout.write(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}) + "\n")
        sys.stdout.flush()
        os._exit(error.exit_code)  # others may wait for this rank in a collective; the launcher ends them


if __name__ == "__main__":
    main(Path(sys.argv[1]))
