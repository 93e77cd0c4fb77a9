"""Zero-shot accuracy of compressed models beside the dense one, document by document.

    python docs/benchmarks/zeroshot.py --dense ../shared/models/base --tasks-dir ../shared/tasks \
        --model "2:4, odd 2 bits"=runs/front/arms/odd2-late/export/sparsekit-24-compact \
        blimp=200 arc_easy=500 piqa=500 lambada=500 --out docs/benchmarks/zeroshot.json

A task may have a limit of documents, from the start; a group like blimp has it for each of its tasks. A model is
anything that sparsekit opens, exports among them; its linears are computed dequantized, as a whole on the device.
Beside every accuracy stands its standard error, and McNemar's exact test on the documents that only one of the two
models got right. Results are written after every model.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from sparsekit.data import load_tokenizer
from sparsekit.evaluation.paired import task_tests
from sparsekit.evaluation.zeroshot import lm_eval_scores
from sparsekit.models.chain import Chain
from sparsekit.models.view import ModelView

DENSE = "dense"


def scored(directory: Path, tasks: dict[str, int | None], tasks_dir: Path, device: str) -> dict[str, Any]:
    """Scores of a model, by task."""
    view = ModelView.open(directory, device=device)
    tokenizer = load_tokenizer(view.path, trust_remote_code=False)
    chain, found = Chain(view), dict[str, Any]()
    with chain.forward():
        for task, limit in tasks.items():
            found |= lm_eval_scores(
                view.module, tokenizer, [task], tasks_dir=tasks_dir, limit=limit, seed=0, allow_network=False
            )
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", metavar="TASK[=DOCUMENTS]")
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIRECTORY")
    parser.add_argument("--tasks-dir", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    limits = {name: int(limit) if limit else None for name, _, limit in (each.partition("=") for each in given.tasks)}
    places = {DENSE: given.dense, **{name: Path(place) for name, _, place in (m.partition("=") for m in given.model)}}
    result: dict[str, Any] = {"limits": limits, "models": {}}
    dense: dict[str, Any] = {}
    for name, place in places.items():
        begun = time.perf_counter()
        scores = scored(place, limits, given.tasks_dir, given.device)
        dense = dense or scores
        tests = {} if name == DENSE else task_tests(dense, scores)
        kept = {task: {**scores[task], "documents": scores[task]["documents"]["n"]} for task in limits}
        told_tests = {task: tests[task] for task in limits if task in tests}
        result["models"][name] = {"scores": kept, "tests": told_tests, "seconds": round(time.perf_counter() - begun)}
        given.out.write_text(json.dumps(result, indent=1))
        for task in limits:
            told = {key: round(value, 4) for key, value in kept[task].items() if isinstance(value, float)}
            print(name, task, told, tests.get(task, {}), flush=True)


if __name__ == "__main__":
    main()
