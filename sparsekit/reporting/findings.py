"""What a report says in sentences: what was achieved, on which basis, and what was not gained."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparsekit.reporting.numerals import change, megabytes, numbered, perplexity, short

Record = Mapping[str, Any]

SIXTEEN_BIT = ("float16", "bfloat16")
NO_SMALLER = 1.02  # a ratio below this is no gain in size worth the word


def headline(report: Record) -> str:
    """One sentence: bytes, perplexity, broken groups."""
    parts = [_bytes_clause(report), _perplexity_clause(report), _groups_clause(report["steps"])]
    sentence = "; ".join(part for part in parts if part)
    return sentence[:1].upper() + sentence[1:] + "."


def _bytes_clause(report: Record) -> str:
    if not report["exports"]:
        return f"{short(report['model']['parameters'])} parameters, nothing was exported"
    export = min(report["exports"], key=lambda one: one["bytes"]["files"])
    held, name = export["bytes"], report.get("environment", {}).get("dtype", "float32")
    stored, ratio = _basis(export, name)
    if ratio < NO_SMALLER:
        return (
            f"the {export['format']} export is no smaller than the original: {megabytes(held['files'])} of weight files"
        )
    other = "" if name in SIXTEEN_BIT else f" ({export['ratio_fp16']:.2f} times smaller than 16 bit)"
    return (
        f"{megabytes(stored)} of weights in {name} became {megabytes(held['files'])} of {export['format']} files: "
        f"{ratio:.2f} times smaller{other}, embeddings, norms and file headers counted"
    )


def _basis(export: Record, dtype: str) -> tuple[float, float]:
    """Bytes of the parameters as the original stores them, and how many times smaller the export is."""
    width = "fp16" if dtype in SIXTEEN_BIT else "fp32"
    return export["bytes"][width], export[f"ratio_{width}"]


def _perplexity_clause(report: Record) -> str:
    parts = []
    for name, dense in report["dense"].items():
        final = report["final"].get(name)
        if final is not None:
            rise = final["perplexity"] / dense["perplexity"] - 1
            parts.append(
                f"{perplexity(dense['perplexity'])} → {perplexity(final['perplexity'])} on {name} ({change(rise)})"
            )
    return f"perplexity {', '.join(parts)}" if parts else "no perplexity was measured"


def _groups_clause(steps: Sequence[Record]) -> str:
    patterned = [step for step in steps if step["groups"]]
    if not patterned:
        return "no N:M pattern to hold"
    last = patterned[-1]
    return f"{last['violations']:,} of {last['groups']:,} groups break the {last['pattern']} pattern"


def paired_change(dense: Record, final: Record) -> tuple[float, float | None]:
    """Relative change of the perplexity and its standard error over the windows both were scored on.

    Most of the spread of a perplexity is between easy and hard windows and is the same before and
    after; the differences of the losses window by window tell the change more exactly.
    """
    rise = final["perplexity"] / dense["perplexity"] - 1
    before, after = dense.get("window_losses") or (), final.get("window_losses") or ()
    if len(before) != len(after) or len(before) < 2:
        return rise, None
    differences = [end - start for start, end in zip(before, after, strict=True)]
    if not all(map(math.isfinite, differences)) or not math.isfinite(rise):
        return rise, None
    return rise, (1 + rise) * statistics.stdev(differences) / math.sqrt(len(differences))


def protocols(report: Record) -> list[str]:
    """How the perplexities were measured, one sentence for each way."""
    ways: dict[str, list[str]] = {}
    for name, score in report["dense"].items():
        ways.setdefault(str(score.get("protocol") or "protocol not recorded"), []).append(name)
    return [f"{', '.join(names)}: {way.rstrip('.')}." for way, names in ways.items()]


def no_gains(report: Record) -> Iterator[str]:
    """What the run did not bring, said plainly."""
    sparse = any(step["sparsity"] > 0.05 and (step["pattern"] or step["kind"] == "prune") for step in report["steps"])
    name = report.get("environment", {}).get("dtype", "float32")
    for export in report["exports"]:
        if export["bits_per_weight"] is None:
            smaller = _basis(export, name)[1]
            if smaller < NO_SMALLER:
                stores = "stores every zero and " if sparse else ""
                yield f"The {export['format']} export {stores}is as large as the original and no faster."
        elif sparse and not export["bytes"].get("positions"):
            yield (
                f"The {export['format']} export stores the zeros of the pattern as ordinary codes: "
                "no smaller than dense integers of the same width, and no faster."
            )
    if not report.get("deploy"):
        yield "Serving speed was not measured; nothing here says that the result runs faster."


def named(step: Record) -> str:
    """`gptq`; of a step that a gate made repeat also how: `gptq, 4 layers in 8 bits`, `wanda, 1 layer left out`."""
    if not (redone := step.get("redone")):
        return str(step["method"])
    how = f"in {redone['bits']} bits" if redone["bits"] else "left out"
    return f"{step['method']}, {numbered(redone['layers'], 'layer')} {how}"


def memory_notes(steps: Sequence[Record]) -> list[str]:
    """Of what the peak memory is, and what the times leave out."""
    kinds = sorted({step["peak_memory_of"] for step in steps if step.get("peak_memory_of")})
    notes = [f"Peak memory: {', '.join(kinds)}."] if kinds else []
    if any("since it began" in kind for kind in kinds):
        notes.append(
            "Resident memory is the highest since the process began, so a step can show that of an earlier one."
        )
    notes.append("Time: of the last start of the step; work done before an interruption is not in it.")
    return notes


def numerics_notes(steps: Sequence[Record]) -> list[str]:
    """On how many layers of each step which rung of the numerics ladder was needed."""
    notes = []
    for step in steps:
        if used := step.get("numerics"):
            told = ", ".join(f"{rung} on {count:,} of {len(step['layers']):,} layers" for rung, count in used.items())
            notes.append(f"Numerics of step {step['index'] + 1}, {step['method']}: {told}.")
    return notes
