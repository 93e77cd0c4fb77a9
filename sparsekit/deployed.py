"""Adding a deploy card to a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsekit.checkpoint import StepStore
from sparsekit.errors import CheckpointError
from sparsekit.evaluation.deploy import deploy_card
from sparsekit.evaluation.scoring import Watcher
from sparsekit.files import RunLock
from sparsekit.models.chain import Chain
from sparsekit.models.view import ModelView
from sparsekit.opening import open_view
from sparsekit.recipe import read_recipe
from sparsekit.reporting.report import kept_report, write_report


def add_card(directory: Path, watcher: Watcher, *, view: ModelView | None = None) -> dict[str, Any]:
    """Measure a finished run's model beside the dense one and write its report anew.

    Args:
        directory: Of the run.
        watcher: Told how far it is.
        view: The run's model, where it is open; its blocks are empty.
    Returns:
        The report with `deploy`.
    Raises:
        CheckpointError: The run is not finished, or its steps are gone.
    """
    report = kept_report(directory)
    if not report["steps"] or "shared" not in report:
        raise CheckpointError(f"{directory} keeps no steps to measure; run the recipe again with this version")
    view = view or open_view(read_recipe(directory / "recipe.yaml"))
    dense = final = Chain(view)
    for step in report["steps"]:
        place = Path(report["shared"]) / "steps" / f"{step['index'] + 1}-{step['method']}-{step['fingerprint'][:10]}"
        store = StepStore(place, view.dtype)
        if store.finished(step["fingerprint"]) is None:
            raise CheckpointError(f"{place} is missing or damaged; run the recipe again")
        final = final.then(store)
    watcher.started(f"{report['name']}: deploy card")
    report["deploy"] = deploy_card(dense, final, report["exports"], watcher.progress)
    with RunLock(directory):
        write_report(report, directory)
    return report
