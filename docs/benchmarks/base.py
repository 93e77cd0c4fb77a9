"""Run the reference arms on models/base and collect their figures.

    python docs/benchmarks/base.py --out docs/benchmarks/base_h200.json --runs /tmp/runs recipes/base/*.yaml ...

Each recipe runs in its own directory under --runs. The result keeps, for every arm, the resolved
recipe, the dense and final perplexities, time, peak memory, violations and the environment.
`--set` is handed to every recipe. `--table` prints the Markdown table of a result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

KEPT = ("name", "environment", "dense", "final", "recipe", "exports", "tasks")
STEP_KEPT = (
    "method", "pattern", "bits", "sparsity", "groups", "violations", "error", "error_of", "perplexity",
    "seconds", "peak_memory", "peak_memory_of", "notes", "training", "curve",
)  # fmt: skip


def arm(recipe: Path, runs: Path, overrides: list[str]) -> dict[str, Any]:
    """Run one recipe and keep what a reader of the benchmark needs."""
    directory = runs / recipe.stem
    command = [sys.executable, "-m", "sparsekit", "run", str(recipe), "--set", f"output={directory}"]
    for override in overrides:
        command += ["--set", override]
    subprocess.run(command, check=True)
    report = json.loads((directory / "report.json").read_text())
    kept = {key: report[key] for key in KEPT}
    kept["steps"] = [{key: step[key] for key in STEP_KEPT if key in step} for step in report["steps"]]
    return kept


def table(arms: list[dict[str, Any]]) -> str:
    """One row for each arm, the dense model of the same run first."""
    texts = list(arms[0]["dense"])
    lines = ["| arm | " + " | ".join(texts) + " | broken groups | seconds | peak memory |"]
    lines.append("|---" * (len(texts) + 4) + "|")
    dense = " | ".join(f"{arms[0]['dense'][text]['perplexity']:.2f}" for text in texts)
    lines.append(f"| dense | {dense} | | | |")
    for run in arms:
        scores = " | ".join(f"{run['final'][text]['perplexity']:.2f}" for text in texts)
        groups = sum(step["groups"] for step in run["steps"])
        broken = f"{sum(step['violations'] for step in run['steps'])} of {groups:,}" if groups else ""
        seconds = sum(step["seconds"] for step in run["steps"])
        peak = max(step["peak_memory"] for step in run["steps"]) / 2**30
        lines.append(f"| {run['name']} | {scores} | {broken} | {seconds:.1f} | {peak:.2f} GiB |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, required=True, help="JSON; arms of the same name are replaced")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    arms: list[dict[str, Any]] = json.loads(given.out.read_text()) if given.out.exists() else []
    for recipe in given.recipes:
        result = arm(recipe, given.runs, given.overrides)
        arms = [*(old for old in arms if old["name"] != result["name"]), result]
        given.out.write_text(json.dumps(arms, indent=1))
    if given.table:
        print(table(arms))


if __name__ == "__main__":
    main()
