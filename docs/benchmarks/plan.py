"""Compare what `sparsekit plan` predicts with what the runs take: peak memory, time, disk.

    python docs/benchmarks/plan.py --out docs/benchmarks/plan_h100.json --work /tmp/plan \
        --model base=../shared/models/base --text ../shared/text/calibration.txt llama1b base

Parts: `llama1b` makes a random model of Llama-3.2-1B's shape (2.5 GB on disk); every other part is a
name given with --model. For each of the steps below a recipe is written, predicted, and run in a
process of its own, whose listener reads the device's peak between events. Printed: the ratios of
predicted to measured; the aim is 0.8 to 1.2 for memory and 1/1.5 to 1.5 for time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from sparsekit.models.locate import ASSETS
from sparsekit.planning.estimate import Estimator
from sparsekit.recipe import read_recipe
from sparsekit.run import Run

STEPS: dict[str, list[dict[str, Any]]] = {
    "wanda": [{"method": "wanda", "pattern": "2:4"}],
    "gptq": [{"method": "gptq", "bits": 4, "group_size": 128}],
    "sparsegpt": [{"method": "sparsegpt", "pattern": "2:4"}],
    "awq": [{"method": "awq", "bits": 4, "group_size": 128}],
    "ast": [{"method": "ast", "pattern": "2:4", "tokens": 2097152, "batch": 128}],
}
ASIDE = ("Python and its libraries",)


class Meter:
    """A listener that reads the peak of the device and the clock when a step or a measurement ends."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self._open: tuple[str, float] | None = None

    def started(self, title: str) -> None:
        """Close what ran and begin anew."""
        self.close()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._open = (title, time.perf_counter())

    def close(self) -> None:
        """Note what has just ended."""
        if self._open is not None:
            torch.cuda.synchronize()
            title, begun = self._open
            peak = torch.cuda.max_memory_allocated()
            self.found.append({"title": title, "seconds": time.perf_counter() - begun, "peak": peak})
            self._open = None

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def llama_1b(directory: Path) -> Path:
    """A random model with the shape of Llama-3.2-1B and the embedded tokenizer."""
    if (directory / "config.json").exists():
        return directory
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "tiny" / name, directory / name)
    return directory


def write_recipe(path: Path, model: Path, text: Path, step: str) -> Path:
    """A recipe of one step."""
    windows = {"path": str(text.absolute()), "seq_len": 1024}
    recipe = {
        "name": path.stem,
        "output": str(path.with_suffix("")),
        "model": {"path": str(model.absolute())},
        "data": {
            "calibration": {**windows, "samples": 128},
            "train": {**windows, "samples": 512},
            "evaluation": {"text": {**windows, "samples": 64}},
        },
        "steps": STEPS[step],
        "evaluate": {"perplexity": ["text"], "agreement": True},
        "export": {"formats": ["dense"]},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe))
    return path


def one(recipe: Path, out: Path) -> None:
    """Predict and run one recipe; called in a process of its own."""
    read = read_recipe(recipe)
    began = time.perf_counter()
    told = Estimator.open(read).all()
    planning = time.perf_counter() - began
    torch.cuda.empty_cache()
    meter = Meter()
    report = Run.open(read, meter).execute()  # type: ignore[arg-type]  # it answers every event
    meter.close()
    step, predicted = report["steps"][0], told["steps"][0]
    parts = sum(part["bytes"] for part in predicted["device"]["parts"] if part["name"] not in ASIDE)
    scoring = next((m for m in meter.found if "perplexity" in m["title"] and "dense" not in m["title"]), None)
    disk = sum(file.stat().st_size for file in (read.output_directory() / "steps").rglob("*") if file.is_file())
    rows = [
        row("step memory", parts, step["peak_memory"]),
        row("step seconds", predicted["seconds"], step["seconds"]),
        row("steps on disk", predicted["disk"], disk),
    ]
    if scoring is not None:
        rows.append(row("scoring memory", told["scoring"]["device"]["bytes"], scoring["peak"]))
        rows.append(row("scoring seconds", told["scoring"]["seconds"], scoring["seconds"]))
    found = {"recipe": recipe.stem, "device": torch.cuda.get_device_name(), "planning": planning, "rows": rows}
    out.write_text(json.dumps({**found, "predicted": told["steps"], "moments": meter.found}, indent=1))


def row(name: str, predicted: float, measured: float) -> dict[str, Any]:
    """A prediction beside a measurement."""
    return {"what": name, "predicted": predicted, "measured": measured, "ratio": predicted / measured}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="llama1b, or names given with --model")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIRECTORY")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--steps", nargs="*", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--work", type=Path, default=Path("/tmp/sparsekit-plan"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one(given.one, given.out)
        return
    models = {name: Path(path) for name, path in (each.split("=", 1) for each in given.model)}
    results = json.loads(given.out.read_text()) if given.out.exists() else []
    for part in given.parts:
        model = models[part] if part in models else llama_1b(given.work / part)
        for step in given.steps:
            recipe = write_recipe(given.work / "runs" / f"{part}-{step}.yaml", model, given.text, step)
            shutil.rmtree(recipe.with_suffix(""), ignore_errors=True)
            result = recipe.with_suffix(".json")
            subprocess.run([sys.executable, __file__, "--one", str(recipe), "--out", str(result)], check=True)
            found = json.loads(result.read_text())
            results = [*(old for old in results if old["recipe"] != found["recipe"]), found]
            given.out.write_text(json.dumps(results, indent=1))
            print(found["recipe"], f"planned in {found['planning']:.1f} s", found["device"])
            for each in found["rows"]:
                told, real = each["predicted"], each["measured"]
                unit = "s" if "seconds" in each["what"] else "MB"
                scale = 1 if unit == "s" else 1e6
                print(f"  {each['what']:<16} {told / scale:10.1f} {real / scale:10.1f} {unit}  x {each['ratio']:.2f}")


if __name__ == "__main__":
    main()
