r"""Compare what `sparsekit plan` predicts with what the runs take: peak memory, time, disk.

    python docs/benchmarks/plan.py --out docs/benchmarks/plan_h100.json --work /dev/shm/plan \
        --model base=../shared/models/base --text ../shared/text/calibration.txt llama1b base

Parts: `llama1b` makes a random model of Llama-3.2-1B's shape (2.5 GB in --work); every other part is a
name given with --model. The steps of a part run in one process, one after the other, each a recipe that
is predicted and then run without an export; `--steps` chooses, `--within N` starts no step after N
seconds of a part and says which are left. A listener reads the device's peak between events. Printed:
the ratios of predicted to measured; the aim is 0.8 to 1.2 for memory and 1/1.5 to 1.5 for time.

The first step of a process pays for kernels that are loaded or compiled in the prediction already, so
neither its time nor that of the others has them; they are `startup` in the result.
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
    "ast": [{"method": "ast", "pattern": "2:4", "tokens": 8388608, "batch": 128}],  # 64 steps; of plan_h100.json 16
    "awq": [{"method": "awq", "bits": 4, "group_size": 128}],
    "gptq_in_order": [{"method": "gptq", "bits": 4, "group_size": 128, "schedule": "group"}],
    "slorb": [{"method": "ast", "pattern": "2:4", "tokens": 524288, "batch": 32, "slorb": 16}],
}
USUAL = ("wanda", "gptq", "sparsegpt", "ast")
FEW = {"tokens": 1572864, "batch": 32}  # of a training step of llama1b: 48 steps
WITHIN = 100.0  # seconds of a part after which no step is begun
ASIDE = ("Python and its libraries",)


class Meter:
    """A listener that reads the peak of the device and the clock when a step or a measurement ends."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self._open: tuple[str, float] | None = None
        self._moved: list[float] = []

    def started(self, title: str) -> None:
        """Close what ran and begin anew."""
        self.close()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._open = (title, time.perf_counter())
        self._moved = []

    def progress(self, done: int, total: int) -> None:
        """Note when the first and the last part were done: what comes after them are files."""
        self._moved = [*self._moved[:1], time.perf_counter()]

    def close(self) -> None:
        """Note what has just ended."""
        if self._open is not None:
            torch.cuda.synchronize()
            title, begun = self._open
            peak, seconds = torch.cuda.max_memory_allocated(), time.perf_counter() - begun
            moved = {"first": self._moved[0] - begun, "last": self._moved[-1] - begun} if self._moved else {}
            self.found.append({"title": title, "seconds": seconds, "peak": peak, **moved})
            self._open = None

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def llama_1b(directory: Path, layers: int) -> Path:
    """A random model with the shape of Llama-3.2-1B and the embedded tokenizer."""
    if (directory / "config.json").exists():
        return directory
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "tiny" / name, directory / name)
    return directory


def write_recipe(path: Path, model: Path, text: Path, steps: list[dict[str, Any]]) -> Path:
    """A recipe of one step; nothing is exported."""
    windows = {"path": str(text.absolute()), "seq_len": 1024}
    recipe = {
        "name": path.stem,
        "output": str(path.with_suffix("")),
        "model": {"path": str(model.absolute())},
        "data": {
            "calibration": {**windows, "samples": 128},
            "train": {**windows, "samples": 512},
            "evaluation": {"text": {**windows, "samples": 32}},
        },
        "steps": steps,
        "evaluate": {"perplexity": ["text"], "agreement": True},
        "export": {"formats": []},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe))
    return path


def one(recipe: Path) -> dict[str, Any]:
    """Predict and run one recipe."""
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
    return {**found, "startup": told["startup"], "predicted": told["steps"], "moments": meter.found}


def row(name: str, predicted: float, measured: float) -> dict[str, Any]:
    """A prediction beside a measurement."""
    return {"what": name, "predicted": predicted, "measured": measured, "ratio": predicted / measured}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="llama1b, or names given with --model")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIRECTORY")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--steps", nargs="*", default=list(USUAL), choices=list(STEPS))
    parser.add_argument("--layers", type=int, default=16, help="blocks of llama1b")
    parser.add_argument("--within", type=float, default=WITHIN, help="begin no step of a part after so many seconds")
    parser.add_argument("--work", type=Path, default=Path("/tmp/sparsekit-plan"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    models = {name: Path(path) for name, path in (each.split("=", 1) for each in given.model)}
    if given.one:
        part(given, given.one, models)
        return
    for name in given.parts:  # a process of its own for each model: what is on the device goes with it
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", name], check=True)


def part(given: argparse.Namespace, name: str, models: dict[str, Path]) -> None:
    """All steps of one model."""
    began = time.monotonic()
    model = models[name] if name in models else llama_1b(given.work / f"{name}-{given.layers}", given.layers)
    for done, step in enumerate(given.steps):
        if time.monotonic() - began > given.within:
            print(f"{name}: {given.within:.0f} s are over, not run: {', '.join(given.steps[done:])}", flush=True)
            return
        steps = [{**each, **(FEW if name not in models and "tokens" in each else {})} for each in STEPS[step]]
        recipe = write_recipe(given.work / "runs" / f"{name}-{step}.yaml", model, given.text, steps)
        shutil.rmtree(recipe.with_suffix(""), ignore_errors=True)
        found = one(recipe)
        shutil.rmtree(recipe.with_suffix(""))
        results = json.loads(given.out.read_text()) if given.out.exists() else []
        given.out.write_text(json.dumps([*(r for r in results if r["recipe"] != found["recipe"]), found], indent=1))
        print(found["recipe"], f"planned in {found['planning']:.1f} s", found["device"], flush=True)
        for each in found["rows"]:
            told, real = each["predicted"], each["measured"]
            unit = "s" if "seconds" in each["what"] else "MB"
            scale = 1 if unit == "s" else 1e6
            line = f"  {each['what']:<16} {told / scale:10.1f} {real / scale:10.1f} {unit}  x {each['ratio']:.2f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
