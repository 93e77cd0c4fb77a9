"""Decoding from packed weights against bf16, in one run: linears of a block, whole model, prompt, memory.

    python docs/benchmarks/decode.py --shape 7b --parts linears,model,prefill,memory --out decode.json

Linears: every way to multiply is recorded as a CUDA graph over so many copies of its weights that no cache
serves them, the graphs are replayed in turn, and the median is divided by the copies. `stream` is the time a
plain kernel takes to read the same bytes. Outputs are compared with float32 arithmetic on the same weights.
Models have random weights, packed from the start; the bf16 model is that of transformers as it is, in the same
runner. On a CPU (`--shape tiny`) the same code runs without graphs.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from decode_linears import contenders, measure, stream
from decode_models import build, latency, memory, prefill

SHAPES = {
    "7b": {"hidden": 4096, "inner": 11008, "heads": 32, "keys": 32, "blocks": 32, "vocabulary": 32000},
    "70b": {"hidden": 8192, "inner": 28672, "heads": 64, "keys": 8, "blocks": 80, "vocabulary": 32000},
    "tiny": {"hidden": 256, "inner": 512, "heads": 4, "keys": 2, "blocks": 2, "vocabulary": 512},
}
BATCHES = [1, 16, 64]
GOALS = {  # (shape, figure): goal, stretch; those marked < must not be exceeded
    ("7b", "block, batch 1: bf16 / ours"): (3.0, 4.0),
    ("7b", "block, batch 1: best dense int4 / ours"): (1.1, 1.25),
    ("70b", "block, batch 1: bf16 / ours"): (4.2, 4.8),
    ("70b", "block, batch 16: bf16 / ours"): (3.5, 4.5),
    ("7b", "gate_up, batch 1: ours / stream <"): (1.4, 1.15),
    ("7b", "down, batch 1: ours / stream <"): (1.4, 1.15),
    ("7b", "model, batch 1: bf16 / ours"): (2.3, 3.0),
    ("7b", "model, batch 1, fused: bf16 / ours"): (2.3, 3.0),
    ("7b", "prefill: bf16 / ours"): (0.88, 0.97),
    ("7b", "memory, GB <"): (3.3, 3.0),
}


def linears_of(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """[out, in] of the fused linears of a block."""
    hidden, inner = shape["hidden"], shape["inner"]
    keys = shape["keys"] * hidden // shape["heads"]
    return {
        "qkv": (hidden + 2 * keys, hidden),
        "o": (hidden, hidden),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def linears(shape: dict[str, int], device: str, rounds: int) -> dict[str, Any]:
    """Every linear at every batch, and their sum; one linear is in memory at a time."""
    rows: dict[str, Any] = {}
    for name, (out, columns) in linears_of(shape).items():
        ways = contenders(out, columns, BATCHES, device)
        rows[name] = {"shape": [out, columns], "ways": {}, "batches": {}}
        for way, found in ways.items():
            rows[name]["ways"][way] = {"bytes": found.nbytes, "copies": len(found.calls), "error": found.error}
        for batch in BATCHES:
            x = torch.randn(batch, columns, device=device, dtype=torch.bfloat16)
            work = {way: (lambda f=found, x=x: [call(x) for call in f.calls]) for way, found in ways.items()}
            if batch == 1:
                floors = {f"stream {way}": stream(f.nbytes, len(f.calls), device) for way, f in ways.items()}
                work |= {way: (lambda f=calls: [call() for call in f]) for way, calls in floors.items()}
            taken = measure(work, rounds, device)
            for way, times in taken.items():
                own = ways[way.removeprefix("stream ")]
                for key in times:
                    times[key] /= len(own.calls)
                times["gb_s"] = own.nbytes / times["us"] / 1000
            rows[name]["batches"][batch] = taken
        del ways, work
        _clear()
    ways = set.intersection(*(set(row["ways"]) for row in rows.values()))
    rows["block"] = {
        "batches": {
            batch: {way: {"us": sum(rows[n]["batches"][batch][way]["us"] for n in linears_of(shape))} for way in ways}
            for batch in BATCHES
        }
    }
    return rows


def models(
    shape: dict[str, int], device: str, rounds: int, parts: list[str], forms: list[str], fuse: bool
) -> dict[str, Any]:
    """Latency, prompt and memory of each form; one model is in memory at a time."""
    found: dict[str, Any] = {"model": {}, "prefill": {}, "memory": {}}
    for form in forms:
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        model = build(shape, form, device)
        found["memory"][form] = memory(model, before)
        if "prefill" in parts:
            found["prefill"][form] = prefill(model, 2048 if device == "cuda" else 64, rounds)
        if "model" in parts:
            for batch in (1, 16):
                for fused in (False, True) if fuse and batch == 1 else (False,):
                    key = f"{form}, batch {batch}{', fused' if fused else ''}"
                    found["model"][key] = latency(model, batch, rounds, fuse=fused)
                    print(key, json.dumps(found["model"][key]), flush=True)
        del model
        _clear()
    return found


def _clear() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def figures(result: dict[str, Any]) -> dict[str, float]:
    """The ratios of the goals, as far as their parts ran; the fused step counts where both sides have it."""
    found: dict[str, float] = {}
    rows, runs = result.get("linears"), result.get("models")
    if rows:
        for batch, ways in rows["block"]["batches"].items():
            ours = ways["2:4 + int4"]["us"]
            found[f"block, batch {batch}: bf16 / ours"] = ways["bf16"]["us"] / ours
            best = min(ways[way]["us"] for way in ("int4", "tinygemm") if way in ways)
            found[f"block, batch {batch}: best dense int4 / ours"] = best / ours
        for name in linears_of(SHAPES[result["shape"]]):
            first = rows[name]["batches"][1]
            found[f"{name}, batch 1: ours / stream <"] = first["2:4 + int4"]["us"] / first["stream 2:4 + int4"]["us"]
    if not runs or not {"bf16", "2:4 + int4"} <= runs["memory"].keys():
        return found
    for kind, timed in runs["model"].items():
        if kind.startswith("bf16"):
            told = kind.removeprefix("bf16, ")
            found[f"model, {told}: bf16 / ours"] = timed["ms"] / runs["model"][kind.replace("bf16", "2:4 + int4")]["ms"]
    if runs["prefill"]:
        found["prefill: bf16 / ours"] = runs["prefill"]["bf16"]["ms"] / runs["prefill"]["2:4 + int4"]["ms"]
    found["memory, GB <"] = max(runs["memory"]["2:4 + int4"].values()) / 1e9
    return found


def lines(result: dict[str, Any]) -> list[str]:
    """What was measured beside what was aimed at."""
    told = []
    for name, value in result["figures"].items():
        goal = GOALS.get((result["shape"], name))
        if goal is None:
            told.append(f"{name}: {value:.3f}")
            continue
        reached = [value <= mark if name.endswith("<") else value >= mark for mark in goal]
        verdict = "stretch reached" if reached[1] else "goal reached" if reached[0] else "MISSED"
        told.append(f"{name}: {value:.3f} (goal {goal[0]}, stretch {goal[1]}): {verdict}")
    return told


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--parts", default="linears,model,prefill,memory")
    parser.add_argument("--forms", default="bf16,2:4 + int4,int4", help="of models; the ratios need the first two")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--fuse", action="store_true", help="measure the compiled step at batch 1 too; a minute a form")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # made-up shapes of this size only wait for each other's threads
    parts, shape = given.parts.split(","), SHAPES[given.shape]
    result: dict[str, Any] = {
        "shape": given.shape,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if "linears" in parts:
        result["linears"] = linears(shape, device, given.rounds)
        for name, row in result["linears"].items():
            print(name, {way: told["error"] for way, told in row.get("ways", {}).items()}, "relative errors")
            for batch, ways in row["batches"].items():
                print(name, batch, {way: round(times["us"], 2) for way, times in ways.items()}, flush=True)
    if {"model", "prefill", "memory"} & set(parts):
        result["models"] = models(shape, device, given.rounds, parts, given.forms.split(","), given.fuse)
    result["figures"] = figures(result)
    print("\n".join(lines(result)))
    given.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
