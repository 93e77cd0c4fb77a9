"""What a run tells of itself: what each step did, whether the gates hold, on which machine."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers

from sparsekit import __version__
from sparsekit.checkpoint import StepStore
from sparsekit.ladder import counted
from sparsekit.models.chain import Chain
from sparsekit.models.view import ModelView
from sparsekit.planning.plan import Plan, PlannedStep
from sparsekit.redo import left_out


def gate_row(name: str, allowed: float, dense: Mapping[str, Any], final: Mapping[str, Any]) -> dict[str, Any]:
    """One quality gate and whether it holds."""
    increase = final[name]["perplexity"] / dense[name]["perplexity"] - 1
    return {
        "text": name,
        "allowed": allowed,
        "dense": dense[name]["perplexity"],
        "final": final[name]["perplexity"],
        "increase": increase,
        "passed": increase <= allowed,
    }


def summarise(
    planned: PlannedStep,
    store: StepStore,
    result: Mapping[str, Any],
    start: Chain,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> dict[str, Any]:
    """What one step did, for the terminal and the report."""
    layers = [layer for index in range(len(start.view.blocks)) for layer in store.layers(index)]
    layers += left_out(planned, start)
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    zeros = sum(layer["sparsity"] * layer["shape"][0] * layer["shape"][1] for layer in layers)
    patterns = sorted({layer["pattern"] for layer in layers if layer["pattern"]})
    bits = sorted({layer["bits"] for layer in layers if layer["bits"]})
    return {
        "index": planned.index,
        "fingerprint": planned.fingerprint,
        "method": planned.step.method.name,
        "kind": planned.step.method.kind,
        "params": planned.step.params.model_dump(mode="json"),
        **planned.step.taught,
        "source": planned.step.method.source,
        "plugins": planned.step.plugins,
        "pattern": ", ".join(patterns) or None,
        "bits": bits,
        "sparsity": zeros / weights if weights else 0.0,
        "groups": sum(layer["groups"] for layer in layers),
        "violations": sum(layer["violations"] for layer in layers),
        "error": sum(layer["error"] for layer in layers) / len(layers) if layers else 0.0,
        "error_of": layers[0]["error_of"] if layers else "weights",
        "numerics": counted(layers),
        "before": dict(before),
        "perplexity": dict(after),
        **({"redone": planned.redone} if planned.redone else {}),
        "notes": [
            *([planned.redone["why"]] if planned.redone else []),
            *said(after, result),
            *branch_note(layers, weights),
            *(f"{layer['name']}: {note}" for layer in layers for note in layer["notes"]),
        ],
        "layers": layers,
        **result,
    }


def branch_note(layers: Sequence[Mapping[str, Any]], weights: int) -> list[str]:
    """What low-rank branches of a step's layers cost, if there are any."""
    count = sum(layer["branch_parameters"] for layer in layers)
    share = count / max(1, weights)
    told = f"low-rank branches: {count:,} parameters beside the linears' {weights:,} ({share:.1%})"
    return [f"{told}; the pattern of the weights alone is N:M, the model is N:M+LR"] if count else []


def said(scores: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[str]:
    """What ran out of memory while training and measuring."""
    if told := (result.get("training") or {}).get("out_of_memory"):
        yield f"training: {told}"
    yield from (f"perplexity on {name}: {score['note']}" for name, score in scores.items() if "note" in score)


def environment(view: ModelView) -> dict[str, str]:
    """Versions and machine, for the report."""
    device = "cpu" if view.device.type == "cpu" else torch.cuda.get_device_name(view.device)
    return {
        "sparsekit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
        "dtype": str(view.dtype).removeprefix("torch."),
        "compute_dtype": str(view.compute_dtype).removeprefix("torch."),
    }


def covered(plan: Plan, view: ModelView, last: PlannedStep | None) -> dict[str, Any]:
    """Which parameters the run reached, for the report.

    Args:
        plan: What was meant to be.
        view: The model.
        last: The last step as it was done; a gate may have made it leave out layers.
    """
    coverage = plan.coverage
    done = [*plan.steps[:-1], *([last] if last else [])]
    dense = frozenset().union(*(step.selected for step in plan.steps)).difference(*(step.selected for step in done))
    left = sum(row.numel for row in view.ledger() if row.category == "linear" and row.name in dense)
    return {
        "compressed": coverage.compressed - left,
        "ignored": coverage.ignored,
        **({"gate": left} if left else {}),
        "by_rule": coverage.by_rule,
        "unreachable": dict(coverage.unreachable),
        "share": coverage.share,
        "total": coverage.total,
    }
