"""Part `base` of oneshot.py: where the time of a step on a real model goes."""

from __future__ import annotations

import cProfile
import io
import json
import pstats
import tempfile
import time
from pathlib import Path
from typing import Any

from sparsekit.listener import Silent
from sparsekit.recipe import read_recipe
from sparsekit.run import run_recipe


def base(model: Path, text: Path) -> dict[str, Any]:
    """A step on a real model: seconds, and which kernels and host functions take them."""
    found: dict[str, Any] = {}
    for label, steps in {
        "sparsegpt": '[{method: sparsegpt, pattern: "2:4"}]',
        "gptq": "[{method: gptq, bits: 4, group_size: 128}]",
    }.items():
        for attempt in ("first", "second"):
            with tempfile.TemporaryDirectory() as directory:
                recipe = Path(directory) / "recipe.yaml"
                recipe.write_text(
                    f"name: {label}\nseed: 0\nmodel:\n  path: {model.resolve()}\ndata:\n"
                    f"  calibration: {{path: {text.resolve()}, samples: 128, seq_len: 1024}}\n"
                    f"steps: {steps}\noutput: {directory}/run\n"
                )
                profile = cProfile.Profile()
                start = time.perf_counter()
                profile.enable()
                run_recipe(read_recipe(recipe), Silent())
                profile.disable()
                seconds = time.perf_counter() - start
                report = json.loads((Path(directory) / "run" / "report.json").read_text())
            step = report["steps"][0]["seconds"]
            found[f"{label} {attempt}"] = {"step_seconds": step, "run_seconds": seconds}
            print(label, attempt, f"step {step:.3f} s, run {seconds:.3f} s", flush=True)
        out = io.StringIO()
        pstats.Stats(profile, stream=out).sort_stats("tottime").print_stats(22)
        lines = [line for line in out.getvalue().splitlines() if line.strip()][4:]
        found[label] = lines
        print("\n".join(line[:150] for line in lines))
    return found
