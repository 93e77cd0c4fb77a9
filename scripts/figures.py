"""The figures of the docs, from the raw ones in docs/benchmarks: cog runs these functions inside the Markdown files."""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.reporting.svg import Axes, Point, Series, scatter_chart

ROOT = Path(__file__).parents[1]
PLUGIN_FIGURES = ("plugins_h200.json", "plugins_h100.json", "plugins_cpu.json")  # the best first
KINDS = ("every weight kept", "2:4")
ABLATION = {  # arm of recipes/ast: what it is
    "fixed-ce": "the first mask for good, cross-entropy alone (naive training)",
    "adaptive-ce": "AST without distillation",
    "fixed-kd": "the first mask for good, distillation",
    "static": "AST, decay at its plateau from the first step (static SR-STE)",
    "adaptive": "AST",
    "lr-3e-3": "AST, lr 3e-3",
    "fixed-lr-3e-3": "the first mask for good, distillation, lr 3e-3",
    "wanda": "AST from Wanda's masks",
    "sparsegpt": "AST from SparseGPT's masks and weights",
    "alps": "AST from ALPS' masks and weights",
    "floor-0": "AST, the rate falls to 0",
    "squarehead": "AST, with the distance of the blocks' outputs (SquareHead)",
    "mixed-t1": "AST, a third of cross-entropy",
    "reverse-t1": "AST, reverse divergence",
    "forward-t2": "AST, temperature 2",
    "slorb-16-sum": "AST + SLoRB, k = 16, X a sum",
    "slorb-16": "AST + SLoRB, k = 16, X trained",
}
COSTS = {
    "ast": "AST",
    "ast_int4": "AST, bits: 4",
    "ast_odd2": "AST, bits: 2, odd levels",
    "ast_lean": "AST, lean memory",
}
SHAPES = {"base": "models/base, 131,072 tokens a step", "1b": "a Llama of 1.2 B, 16,384 tokens a step"}
TASKS = {"blimp": "BLiMP", "lambada": "LAMBADA", "arc_easy": "ARC-Easy", "piqa": "PIQA"}
FEW = {"ternary": "3 levels", "six": "6 levels"}
LOST = 40.0  # a perplexity that no picture of what is worth having needs to show


def measured(name: str) -> Any:
    """The raw figures of a file of docs/benchmarks."""
    return json.loads((ROOT / f"docs/benchmarks/{name}.json").read_text())


def _benchmark() -> Any:
    """The script of the comparison, which knows how to read its results."""
    spec = importlib.util.spec_from_file_location("plugins_benchmark", ROOT / "docs/benchmarks/plugins.py")
    assert spec is not None and spec.loader is not None  # it is a Python file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plugin_figures() -> str:
    """The tables of every comparison of the plugins: on CUDA if it was run there."""
    files = [path for name in PLUGIN_FIGURES if (path := ROOT / "docs/benchmarks" / name).exists()]
    newest: dict[str, dict[str, Any]] = {}
    for path in files:
        for result in json.loads(path.read_text()):
            newest.setdefault(result["comparison"], result)
    parts = []
    for result in newest.values():
        sparsity = "sparsity 0.7 without positions" if result["comparison"] == "70" else "2:4"
        windows = "all" if result["windows"] == "all" else f"{result['windows']} (seed 0)"
        device = result["environment"]["device"]
        protocol = f"models/base to {sparsity}, {result['calibration']} calibration windows of 1024 tokens"
        recipe = f"`recipes/plugins/{result['recipe']}.yaml`"
        table = _benchmark().table(result)
        parts.append(f"{protocol}, {windows} windows of the valid text, on {device}; {recipe}.\n\n{table}\n")
        parts.append(_better(result))
    return "\n".join(parts) or "Not measured yet; `docs/benchmarks/plugins.py` runs the comparison.\n"


def _better(result: dict[str, Any]) -> str:
    """The arms whose interval lies below SparseGPT, in a sentence."""
    changes = sorted(_benchmark().against_sparsegpt(result).items(), key=lambda item: item[1].value)
    certain = [(name, change) for name, change in changes if change.high is not None and change.high < 0]
    better = [f"`{name}` ({change.value:+.1%})" for name, change in certain]
    return f"Better than SparseGPT here, with the whole 95 % interval: {', '.join(better) or 'none'}.\n"


def interop(expected: str) -> str:
    """What the readers of tests/interop answered; `expected` is "reads", "opens" or "refuses"."""
    rows = [row for row in measured("interop")["rows"] if row["expected"] == expected]
    if expected == "refuses":
        errors = {row["environment"]: row["error"].split(" Must be one of")[0].replace("|", "\\|") for row in rows}
        table = [f"| {name} | {error.replace(str(ROOT), '')} |" for name, error in errors.items()]
        return "\n".join(["| reader | how it ends |", "|---|---|", *table]) + "\n"
    heading = "| model | format | software | off by | of a largest logit of | its perplexity | sparsekit's |"
    lines = [heading, "|---" * 7 + "|"]
    for row in rows:
        versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items() if name != "torch")
        grid = "" if row.get("symmetric", True) else ", asymmetric"
        form = row["format"] + grid
        theirs, ours = row["perplexity"], row["reference_perplexity"]
        if expected == "opens":
            versions = row["written_by"].replace("==", " ")
            theirs, ours = ours, theirs
        lines.append(
            f"| {row['model']} | {form} | {versions} | {row['largest_difference']:.2g} | {row['largest_logit']:.1f} "
            f"| {theirs:.3f} | {ours:.3f} |"
        )
    return "\n".join(lines) + "\n"


def true_bytes() -> str:
    """Where the bytes of every export of the interoperability runs are."""
    parts = ("codes", "positions", "scales", "zeros", "groups", "dense", "headers", "total", "files")
    titles = ["model", "format", *parts, "÷ FP32", "÷ FP16", "bits a weight"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in measured("interop")["exports"]:
        counted = " | ".join(f"{row['bytes'][part]:,}" for part in parts)
        bits = "–" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.3f}"
        ratios = f"{row['ratio_fp32']:.2f} | {row['ratio_fp16']:.2f}"
        lines.append(f"| {row['model']} | {row['format']} | {counted} | {ratios} | {bits} |")
    return "\n".join(lines) + "\n"


def ast_quantized() -> str:
    """What training on integer grids gave, beside its rivals."""
    found = measured("ast_quantized")
    titles = ("kept values", "pattern", "tokens", "valid", "to dense", "bits a weight", "smaller than FP32")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for arm in sorted(quantized_arms(), key=lambda arm: -arm["bits_per_weight"]):
        late = arm.get("quantize_from", 0.0)
        grid = _grid(arm) + (f", from {late:.0%} of the steps" if late else "")
        grid += f", lr {arm['lr']:g}" if "lr" in arm else ""  # another than the default
        bits = arm["bits_per_weight"]
        lines.append(
            f"| {grid} | {arm['pattern']} | {arm['tokens'] / 1e6:.1f} M | {_of_runs(arm['runs'])} "
            f"| {arm['perplexity'] - found['dense']:+.2f} | {bits:.2f} | {32 / bits:.1f} × |"
        )
    return "\n".join(lines) + "\n"


def quantized_arms() -> list[dict[str, Any]]:
    """Arms of ast_quantized.json, all runs of one together: `perplexity` is their mean, `runs` has every one."""
    together: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in measured("ast_quantized")["arms"]:
        together.setdefault((row["arm"], row["tokens"]), []).append(row)
    arms = []
    for rows in together.values():
        runs = [row["perplexity"] for row in rows]
        coded = [row["coded_bits_per_weight"] for row in rows if "coded_bits_per_weight" in row]
        about = {
            "perplexity": statistics.fmean(runs),
            "runs": runs,
            "coded": statistics.fmean(coded) if coded else None,
        }
        arms.append({**rows[0], **about})
    return arms


def _of_runs(runs: Sequence[float]) -> str:
    """A perplexity; of several runs their mean and what they lie between."""
    several = f" ({min(runs):.2f} to {max(runs):.2f}, {len(runs)} runs)" if runs[1:] else ""
    return f"{statistics.fmean(runs):.2f}{several}"


def _grid(arm: Mapping[str, Any]) -> str:
    levels = FEW.get(arm["levels"], f"{'odd ' if arm['levels'] == 'odd' else ''}{arm['bits']} bits")
    return f"{levels} (a step a row)" if arm.get("group_size") == -1 else levels


def front() -> str:
    """Every measured way to make models/base's linears smaller: a drawing of perplexity against size, and the rows.

    The dense model, and what is there coded too, are in the table alone.
    """
    points = _front()
    coded = {(point.kind, point.name.removesuffix(", coded")) for point in points if point.name.endswith(", coded")}
    drawn = [point for point in points if point.times > 4 and (point.kind, point.name) not in coded]
    chart = scatter_chart(
        [Series(kind, [point.drawn() for point in drawn if point.kind == kind]) for kind in KINDS],
        Axes(
            "Perplexity against size",
            x="times smaller than FP32, linears, all counted",
            y="perplexity, valid text",
            log_x=True,
            width=680,
            height=520,
        ),
    )
    lines = ["| | linears | smaller than FP32 | valid |", "|---|---|---|---|"]
    for point in sorted(points, key=lambda point: point.times):
        lines.append(f"| {point.name} | {point.kind} | {point.times:.1f} × | {_of_runs(point.runs)} |")
    return f'<div class="chart">{chart}</div>\n\n' + "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Small:
    """A way to make the linears smaller.

    Attributes:
        name: For a row of the table.
        kind: One of `KINDS`.
        times: Smaller than FP32.
        runs: Perplexity of each on the valid text.
    """

    name: str
    kind: str
    times: float
    runs: Sequence[float]

    def drawn(self) -> Point:
        """In the picture, which has little room."""
        label = self.name.removeprefix("trained ").replace("a step a row", "row steps")
        return Point(self.times, statistics.fmean(self.runs), label=label)


def _front() -> list[Small]:
    """What was measured, but for what lost more than is worth a picture."""
    scales, places = 16 / 128, 2 / 3
    named = {row["name"]: row["final"]["valid"]["perplexity"] for row in measured("base_h100")}
    sparse = 2 + places + scales  # 4 bits for half of the weights
    points = [Small("dense, bf16", KINDS[0], 2.0, [measured("ast_quantized")["dense"]])]
    for title, bits in (("gptq-int4", 4), ("gptq-int3", 3)):
        points.append(Small(title.replace("gptq-", "GPTQ "), KINDS[0], 32 / (bits + scales), [named[title]]))
    points.append(Small("AST, then GPTQ int4", KINDS[1], 32 / sparse, [named["ast-gptq4-base"]]))
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for arm in quantized_arms():
        if arm["perplexity"] < LOST:
            key = (arm["pattern"], _grid(arm), round(arm["tokens"] / 1e6))
            best[key] = min(best.get(key, arm), arm, key=lambda each: each["perplexity"])
    for (pattern, grid, tokens), arm in best.items():
        kind = KINDS[1] if pattern == "2:4" else KINDS[0]
        title = f"trained {grid}, {tokens} M"
        points.append(Small(title, kind, 32 / arm["bits_per_weight"], arm["runs"]))
        if arm["coded"]:
            points.append(Small(f"{title}, coded", kind, 32 / arm["coded"], arm["runs"]))
    return points


def decode_linears() -> str:
    """Times of a block's linears from packed weights, beside bf16 and the dense integers."""
    found = measured("decode_h200")
    ours, ways = "2:4 + int4", {"bf16": "cuBLAS bf16", "int4": "int4", "tinygemm": "torch's int4"}
    heading = ["block of", "tokens", "2:4 + int4", *(f"{way} (times ours)" for way in ways.values())]
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for shape in ("7b", "70b"):
        for batch, times in found[shape]["linears"]["block"]["batches"].items():
            rest = [f"{times[way]['us']:.0f} µs ({times[way]['us'] / times[ours]['us']:.2f})" for way in ways]
            lines.append(f"| Llama {shape.upper()} | {batch} | {times[ours]['us']:.0f} µs | {' | '.join(rest)} |")
    return "\n".join(lines) + "\n"


def decode_model() -> str:
    """A whole model of Llama 7B's shape: milliseconds of a token and of a prompt, gigabytes."""
    runs = measured("decode_h200")["7b"]["models"]
    lines = ["| 7B shape | bf16 | 2:4 + int4 | |", "|---|---|---|---|"]
    told = {"a token, batch 1": "batch 1", "the same with --fuse": "batch 1, fused", "a token, batch 16": "batch 16"}
    rows = [(title, runs["model"], f", {key}", "ms", 1.0) for title, key in told.items()]
    rows.append(("a prompt of 2,048 tokens", runs["prefill"], "", "ms", 1.0))
    rows.append(("device memory", runs["memory"], "", "allocated", 1e9))
    for title, table, suffix, key, unit in rows:
        dense, packed = (table[f"{form}{suffix}"][key] / unit for form in ("bf16", "2:4 + int4"))
        name = "GB" if unit > 1 else "ms"
        lines.append(f"| {title} | {dense:.2f} {name} | {packed:.2f} {name} | {dense / packed:.2f} × |")
    return "\n".join(lines) + "\n"


def ast_ablation() -> str:
    """What each part of AST is worth, as in the paper's Table 4; seeds of an arm are one row."""
    found = measured("ast_ablation")
    dense = found["dense"]["valid"]["perplexity"]
    rows: dict[tuple[bool, int], list[Any]] = {}
    for arm in found["arms"]:
        if arm["arm"] in ABLATION and "failed" not in arm:
            place = (arm["metrics"]["tokens"] > 3e7, list(ABLATION).index(arm["arm"]))
            rows.setdefault(place, []).append(arm)
    lines = [
        "| | tokens | pattern | parameters beside it | valid | seeds | to dense | flipped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines.append(f"| dense | | | | {dense:.3f} | | | |")
    for _, arms in sorted(rows.items()):
        metrics, scores = arms[0]["metrics"], [arm["score"]["perplexity"] for arm in arms]
        count, mean = metrics.get("branch_parameters"), statistics.fmean(scores)
        beside = f"{count:,} ({metrics['branch_share']:.2%} of the linears)" if count else ""
        spread = f"{min(scores):.3f} to {max(scores):.3f}" if len(scores) > 1 else f"{scores[0]:.3f}"
        lines.append(
            f"| {ABLATION[arms[0]['arm']]} | {metrics['tokens'] / 1e6:.1f} M | {'2:4+LR' if count else '2:4'} "
            f"| {beside} | {mean:.3f}{f' ({spread})' if len(scores) > 1 else ''} | {len(scores)} | {mean - dense:+.3f} "
            f"| {metrics['initial_flip_rate']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def ast_cost() -> str:
    """What AST's step takes beside a plain dense distillation step, and its parts beside their plain forms."""
    found = measured("training")
    lines = ["| | measured | beside |", "|---|---|---|"]
    for name, shape in SHAPES.items():
        arms = found.get(name, {})
        for arm, title in COSTS.items():
            if arm in arms:
                mean, speed = arms[arm]["of_dense_mean"], arms[arm]["tokens_per_s"]
                lines.append(f"| {title}, {shape} | {speed:,.0f} tokens/s | {mean:.2f} × plain dense distillation |")
    step, loss = found["step"], found["loss"]
    for kind, title in (("plain", "optimizer step of 1.2 B"), ("refresh", "the same when masks are chosen")):
        fused, plain = step[f"fused_{kind}"]["median_ms"], step[f"reference_{kind}"]["median_ms"]
        lines.append(f"| {title} | {fused:.1f} ms | {plain:.0f} ms unfused: {plain / fused:.1f} × |")
    own, plain = loss["chunked"], loss["plain"]
    lines.append(
        f"| KL and CE, 4,096 tokens, vocabulary 128,256: extra memory | {own['extra_gib']:.2f} GiB "
        f"| {plain['extra_gib']:.1f} GiB plain: {plain['extra_gib'] / own['extra_gib']:.0f} × |"
    )
    seven = found["7b"]
    peak = max(seven[f"micro_batches_{parts}"]["step_9_peak_gb"] for parts in (1, 2))
    lines.append(
        f"| Llama-2-7B's shape, {seven['tokens_a_micro_batch']:,} tokens a micro-batch, `states: float8, "
        f"masters: bfloat16, checkpointing: true` | {peak:.0f} GB at the peak | teacher included |"
    )
    return "\n".join(lines) + "\n"


PLANNED = {"base": "models/base", "llama1b": "1.2 B"}


def plan() -> str:
    """What `sparsekit plan` predicted beside what the runs took."""
    found = measured("plan_h200")
    kinds = {"step memory": ("MB", 1e6), "scoring memory": ("MB", 1e6), "step seconds": ("s", 1.0)}
    lines = ["| | peak memory of the step | peak memory of scoring | seconds of the step |", "|---" * 4 + "|"]
    for run in found:
        rows, cells = {row["what"]: row for row in run["rows"]}, []
        for kind, (unit, scale) in kinds.items():
            row = rows[kind]
            told, real = row["predicted"] / scale, row["measured"] / scale
            digits = 1 if unit == "s" else 0
            cells.append(f"{told:,.{digits}f} {unit}, was {real:,.{digits}f}: {row['ratio']:.2f}")
        model, _, step = run["recipe"].partition("-")
        lines.append(f"| {PLANNED[model]}, {step} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def zeroshot() -> str:
    """Zero-shot accuracy of points of the front, with McNemar's test against the dense model."""
    found = measured("zeroshot")["models"]
    documents = {task: score["documents"] for task, score in found["dense"]["scores"].items()}
    heads = [f"{title}, {documents[task]:,}" for task, title in TASKS.items()]
    lines = [f"| accuracy, documents | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, model in found.items():
        cells = []
        for task in TASKS:
            score, test = model["scores"][task], model["tests"].get(task, {}).get("acc")
            told = f"; p {test['p']:.2f}" if test else ""
            cells.append(f"{score['acc']:.1%} ± {score['acc_stderr']:.1%}{told}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
