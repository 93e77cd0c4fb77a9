"""Compare the plugins with SparseGPT on models/base and collect their figures.

    python docs/benchmarks/plugins.py --out docs/benchmarks/plugins_h100.json --runs /tmp/runs
    python docs/benchmarks/plugins.py --out docs/benchmarks/plugins_cpu.json --windows 32 --only 2to4

Every comparison of recipes/plugins runs under --runs; a stopped one continues. The result keeps, for
every arm, perplexity with its standard error, sparsity, broken groups, mean output error, time and
bytes of the linears, and what all arms had in common. `--windows N` reduces calibration and evaluation to N windows
each. `--table` prints the Markdown table of a result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from sparsekit.evaluation.paired import Change, perplexity_change

ROOT = Path(__file__).parents[2]
COMPARISONS = {
    "2to4": "pruners_2to4",
    "70": "pruners_70",
    "permuted": "permuted_2to4",  # needs scipy
    "oneshot": "oneshot_2to4",
    "tuned": "tuned_2to4",
    "lowrank": "lowrank_2to4",
    "lowrank-int4": "lowrank_int4",
}
STEP_KEPT = ("method", "pattern", "sparsity", "groups", "violations", "error", "error_of", "seconds")


def compared(name: str, runs: Path, windows: int | None) -> dict[str, Any]:
    """Run one comparison and keep what a reader needs."""
    out = runs / COMPARISONS[name]
    command = [sys.executable, "-m", "sparsekit", "compare", str(ROOT / f"recipes/plugins/{COMPARISONS[name]}.yaml")]
    command += ["--out", str(out)]
    if windows is not None:
        command += ["--set", f"data.calibration.samples={windows}", "--set", f"data.evaluation.valid.samples={windows}"]
    subprocess.run(command, check=True)
    arms = []
    for path in sorted(out.glob("**/report.json")):
        report = json.loads(path.read_text())
        steps = [{key: step[key] for key in STEP_KEPT if key in step} for step in report["steps"]]
        sizes = {export["format"]: export["linears"] for export in report["exports"]}
        scores = {"dense": report["dense"], "final": report["final"]}
        arms.append({"arm": report["name"], **scores, "steps": steps, "linears": sizes})
        about = {"environment": report["environment"], "model": report["model"]["digest"]}
    counts = {"calibration": windows or 128, "windows": windows or "all"}
    return {"comparison": name, "recipe": COMPARISONS[name], **counts, **about, "arms": arms}


def against_sparsegpt(result: dict[str, Any]) -> dict[str, Change]:
    """Change of every arm's perplexity from SparseGPT's, paired over windows."""
    scores = {arm["arm"]: arm["final"]["valid"] for arm in result["arms"]}
    return {name: perplexity_change(scores["sparsegpt"], score) for name, score in scores.items()}


def table(result: dict[str, Any]) -> str:
    """One row for each arm, the best perplexity first, and how far from SparseGPT it is, with the 95 % interval."""
    arms = sorted(result["arms"], key=lambda arm: arm["final"]["valid"]["perplexity"])
    changes = against_sparsegpt(result)
    sized = any(arm.get("linears") for arm in arms)  # results from before there were sizes have none
    lines = ["| arm | valid | against SparseGPT | sparsity | broken groups | seconds |", "|---|---|---|---|---|---|"]
    lines.append(f"| dense | {arms[0]['dense']['valid']['perplexity']:.2f} | | 0 | | |")
    if sized:
        lines = [f"{line}{end}" for line, end in zip(lines, (" linears of FP32 |", "---|", " |"), strict=True)]
    for arm in arms:
        score, last = arm["final"]["valid"]["perplexity"], arm["steps"][-1]
        seconds = sum(step["seconds"] for step in arm["steps"])
        broken = f"{last['violations']} of {last['groups']:,}" if last["groups"] else ""
        change = changes[arm["arm"]]
        interval = "" if change.low is None or change.high is None else f" [{change.low:+.1%}, {change.high:+.1%}]"
        against = f"{change.value:+.1%}{interval}" if change.value else ""
        lines.append(f"| {arm['arm']} | {score:.2f} | {against} | {last['sparsity']:.3f} | {broken} | {seconds:.1f} |")
        if sized:
            ratio = max((size["ratio_fp32"] for size in arm["linears"].values()), default=0.0)
            lines[-1] += f" {ratio:.1f} × smaller |"
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON; comparisons of the same name are replaced")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--windows", type=int)
    parser.add_argument("--only", choices=COMPARISONS, action="append")
    parser.add_argument("--table", action="store_true", help="Only print the tables of --out.")
    given = parser.parse_args()
    results: list[dict[str, Any]] = json.loads(given.out.read_text()) if given.out.exists() else []
    if not given.table:
        for name in given.only or COMPARISONS:
            result = compared(name, given.runs, given.windows)
            results = [*(old for old in results if old["comparison"] != name), result]
            given.out.write_text(json.dumps(results, indent=1))
    for result in results:
        print(f"{result['comparison']}, {result['windows']} windows, {result['environment']['device']}\n")
        print(table(result), "\n")


if __name__ == "__main__":
    main()
