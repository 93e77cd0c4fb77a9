"""Figures of the front pages, from the measured files of docs/benchmarks; `figures` has those of the other pages."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import figures
from figures import measured

BASE = (  # of base_h100.json, as a page shows it: a heading, or an arm and what it is
    ("2:4", None),
    ("magnitude-2to4", "magnitude"),
    ("wanda-2to4", "Wanda"),
    ("sparsegpt-2to4", "SparseGPT"),
    ("ast", "AST, 26.2 M tokens"),
    ("50 % of the weights, any place", None),
    ("sparsegpt-50", "SparseGPT"),
    ("quantized, groups of 128", None),
    ("rtn-int4", "RTN int4"),
    ("gptq-int4", "GPTQ int4"),
    ("awq-int4", "AWQ int4"),
    ("gptq-int3", "GPTQ int3"),
    ("2:4, then int4", None),
    ("wanda-gptq4", "Wanda → GPTQ"),
    ("sparsegpt-gptq4", "SparseGPT → GPTQ"),
    ("sparsegpt-awq4", "SparseGPT → AWQ"),
    ("ast-gptq4-base", "AST → GPTQ"),
)
OTHERS = (  # part of oneshot_h200.json or, llm-compressor's, oneshot_h100.json; job, whose, and what it is
    ("block", "sparsegpt 2:4", "SparseGPT class", "SparseGPT 2:4: the authors' class"),
    ("llmcompressor", "sparsegpt 2:4", "llm-compressor, tuned", "SparseGPT 2:4: llm-compressor 0.14, H100"),
    ("block", "gptq int4 g128", "AutoGPTQ class", "GPTQ int4: AutoGPTQ's class"),
    ("llmcompressor", "gptq int4 g128", "llm-compressor, tuned", "GPTQ int4: llm-compressor 0.14, H100"),
    (
        "llmcompressor",
        "gptq int4 g128 static",
        "llm-compressor, tuned",
        "GPTQ int4, static groups: llm-compressor 0.14, H100",
    ),
)


def base_figures() -> str:
    """Perplexity of models/base under every built-in method."""
    runs, dense = _base()
    lines = ["| | perplexity | broken groups |", "|---|---|---|", f"| dense | {dense:.2f} | |"]
    for name, title in BASE:
        if title is None:
            lines.append(f"| **{name}** | | |")
        else:
            score, broken = runs[name]
            lines.append(f"| {title} | {score:.2f} | {broken} |")
    return "\n".join(lines) + "\n"


def headline(folder: str = "") -> str:
    """What to expect, for the front page and the README: perplexity and size of models/base; pages are in `folder`."""
    runs, dense = _base()
    arms = next(result["arms"] for result in measured("plugins_h200") if result["comparison"] == "tuned")
    tuned = {arm["arm"]: arm["final"]["valid"]["perplexity"] for arm in arms}
    longer = min(_longest(measured("ast_ablation")["arms"]))
    trained = [arm for arm in figures.quantized_arms() if arm["pattern"] == "2:4"]
    together = [min((arm for arm in trained if arm["bits"] == bits), key=_valid) for bits in (4, 3, 2)]
    sizes = {point.name: point.times for point in figures._front()}
    rows = [
        ("dense, bf16", dense, sizes["dense, bf16"]),
        ("GPTQ int4", runs["gptq-int4"][0], sizes["GPTQ int4"]),
        ("SparseGPT 2:4", runs["sparsegpt-2to4"][0], None),
        (f"[ALPS, aimed]({folder}plugins.md#alps_aimed): 2:4 in one shot", tuned["aimed"], None),
        (
            f"the same, then [block-wise training]({folder}plugins.md#ebft) on the calibration text",
            tuned["aimed-ebft"],
            None,
        ),
        (f"[AST]({folder}methods/ast.md) 2:4, 26.2 M tokens", runs["ast"][0], None),
        ("AST 2:4, 99.6 M tokens", longer, None),
        ("AST 2:4, 26.2 M tokens, then GPTQ int4", runs["ast-gptq4-base"][0], sizes["AST, then GPTQ int4"]),
    ]
    for arm in together:
        coded = arm["coded"]
        told = f"{arm['tokens'] / 1e6:.1f} M" + (", coded" if coded else "")
        title = f"2:4 and {figures._grid(arm)} trained together, {told}"
        rows.append((title, arm["perplexity"], 32 / (coded or arm["bits_per_weight"])))
    lines = ["| | perplexity | linears, of FP32 |", "|---|---|---|"]
    for title, score, size in rows:
        lines.append(f"| {title} | {score:.2f} | {'' if size is None else f'{size:.1f} × smaller'} |")
    return "\n".join(lines) + "\n"


def _longest(arms: list[dict[str, Any]]) -> Iterator[float]:
    """Perplexities of AST, the mask chosen anew, after 99.6 M tokens."""
    for arm in arms:
        if arm["metrics"]["tokens"] > 9e7 and not arm["arm"].startswith("fixed"):
            yield float(arm["score"]["perplexity"])


def _valid(arm: dict[str, Any]) -> tuple[float, float]:
    """The better one as the page shows it; of two alike the smaller one."""
    return round(float(arm["perplexity"]), 2), arm["bits_per_weight"]


def _base() -> tuple[dict[str, tuple[float, str]], float]:
    """Perplexity and broken groups of the arms of base_h100.json, AST alone among them, and of the dense model."""
    found: dict[str, tuple[float, str]] = {}
    for run in measured("base_h100"):
        steps = {run["name"]: run["steps"][-1]}
        if run["steps"][0]["method"] == "ast":
            steps["ast"] = run["steps"][0]
        for name, step in steps.items():
            broken = f"{step['violations']} of {step['groups']:,}" if step["groups"] else ""
            found[name] = (step["perplexity"]["valid"]["perplexity"], broken)
        dense = float(run["dense"]["valid"]["perplexity"])
    return found, dense


def solver() -> str:
    """Factor and sweep of the linears of a Llama-2-7B block, beside the papers' column recursion."""
    found = measured("oneshot_h200")["solve"]
    titles = {"qkv": "q, k and v together", "o": "o", "gate_up": "gate and up together", "down": "down"}
    lines = ["| | SparseGPT 2:4 | recursion | GPTQ int4 | recursion |", "|---" * 5 + "|"]
    for name, title in titles.items():
        row, cells = found[name], []
        for ours, theirs in (("2:4", "recursion_2to4"), ("int4", "recursion_int4")):
            cells.append(f"{row['our_factor']['ms'] + row[ours]['ms']:.0f} ms")
            cells.append(f"{row[theirs]['ms']:,.0f} ms" if theirs in row else "not run")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def blocks() -> str:
    """A whole block by sparsekit, by the authors' classes and by llm-compressor."""
    found = measured("oneshot_h100") | measured("oneshot_h200")
    lines = ["| | theirs | output error | one pass | output error | in parity | output error |", "|---" * 7 + "|"]
    for part, job, side, title in OTHERS:
        rows = {row["side"]: row for row in found[part]["jobs"][job]}
        if side not in rows:
            continue
        theirs, cells = rows[side], []
        for schedule in ("group", "block"):
            ours = rows[f"sparsekit {schedule}"]
            cells.append(
                f"{ours['seconds']:.2f} s, **{theirs['seconds'] / ours['seconds']:.1f} ×** | {ours['error']:.5f}"
            )
        lines.append(f"| {title} | {theirs['seconds']:.1f} s | {theirs['error']:.5f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def decoding(folder: str = "") -> str:
    """How fast a token of a 7B shape comes, in a paragraph; pages are in `folder`."""
    found = measured("decode_h200")["7b"]
    runs, block = found["models"], found["linears"]["block"]["batches"]
    (dense, quick), (packed, fast) = (
        tuple(runs["model"][f"{form}, batch 1{how}"]["ms"] for how in ("", ", fused"))
        for form in ("bf16", "2:4 + int4")
    )
    held = [runs["memory"][form]["allocated"] / 1e9 for form in ("2:4 + int4", "bf16")]
    ours, (int4, bf16) = block["1"]["2:4 + int4"]["us"], (block["1"][form]["us"] for form in ("int4", "bf16"))
    told = (
        f"[`sparsekit generate`]({folder}generate.md) runs 2:4 + int4 as it is packed.",
        f"On one H200 a token of a model of Llama 7B's shape takes {packed:.1f} ms and {held[0]:.1f} GB,",
        f"in bf16 {dense:.1f} ms and {held[1]:.1f} GB; with `--fuse` {fast:.1f} and {quick:.1f} ms.",
        f"The linears of a block are {int4 / ours:.2f} times faster than from dense int4",
        f"and {bf16 / ours:.1f} times faster than in bf16; for 64 tokens at once {_even(block['64'])}.",
    )
    return textwrap.fill(" ".join(told), 118, break_long_words=False, break_on_hyphens=False) + "\n"


def _even(times: dict[str, Any]) -> str:
    """How bf16 and our packed weights compare where neither is far ahead."""
    ratio = times["bf16"]["us"] / times["2:4 + int4"]["us"]
    return f"they take {1 / ratio - 1:.0%} longer" if ratio < 1 else f"they are {ratio - 1:.0%} faster"


def coded() -> str:
    """What entropy coding saves of the bytes of exports."""
    titles = ("steps", "format", "bits a weight", "coded", "codes", "patterns", "scales", "smaller by", "than FP32")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in measured("coded")["rows"]:
        before, parts = sum(row["before"].values()), row["coded"]
        bits = sum(parts.values())
        each = " | ".join(f"{parts[name]:.3f}" if name in parts else "–" for name in ("values", "patterns", "scales"))
        lines.append(
            f"| {row['name']} | `{row['format']}` | {before:.3f} | {bits:.3f} | {each} "
            f"| {1 - bits / before:.1%} | {32 / bits:.1f} × |"
        )
    return "\n".join(lines) + "\n"


def coded_speed() -> str:
    """How fast the coder is."""
    found = measured("coded")["speed"]
    return (
        f"One core decodes {found['decoded_a_second'] / 1e6:.0f} M codes a second of an [11008, 4096] linear, 2:4 and "
        f"4 bits, and encodes {found['encoded_a_second'] / 1e6:.0f} M; counted in CPU time.\n"
    )
