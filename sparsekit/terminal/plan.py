"""What the terminal shows of a plan's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsekit.planning.estimate import Estimator
from sparsekit.planning.fates import kinds_of
from sparsekit.recipe import Recipe
from sparsekit.reporting.numerals import duration, megabytes
from sparsekit.terminal.console import Terminal


def print_plan(console: Console, recipe: Recipe) -> None:
    """The plan of a run, then the prediction, which takes some seconds to measure."""
    estimator = Estimator.open(recipe)
    Terminal(console).planned(recipe, estimator.plan, estimator.view)
    print_estimate(console, estimator.all())


def print_estimate(console: Console, found: Mapping[str, Any]) -> None:
    """What will be done to each kind of layer, and what each step takes."""
    console.print(layers_table(found))
    console.print(steps_table(found))
    for part in [*found["steps"], *([found["scoring"]] if found["scoring"] else [])]:
        if not part["known"]:
            continue
        device = part["device"]
        if device["parts"]:
            console.print(f"[bold]{part['title']}[/bold] is largest while {device['moment']}:", highlight=False)
        for piece in device["parts"]:
            if piece["bytes"]:
                line = f"{megabytes(piece['bytes']):>14}  {piece['name']}: {piece['formula']}"
                console.print(f"    {line}", highlight=False)
    share = found["coverage"]["share"]
    console.print(f"coverage {share:.1%} of the matrices inside the blocks", highlight=False)
    for name, numel in found["coverage"]["unreachable"].items():
        console.print(f"out of reach: {name}, {numel:,} parameters", highlight=False)
    for note in dict.fromkeys(found["notes"]):
        console.print(f"note: {note}", highlight=False)


def layers_table(found: Mapping[str, Any]) -> Table:
    """Every kind of linear and its fate."""
    table = Table(title="Layers", box=None, padding=(0, 2), title_justify="left")
    for title in ("layer", "number", "shape", "what happens"):
        table.add_column(title, justify="right" if title == "number" else "left")
    for kind in kinds_of(found["layers"]):
        shape = " × ".join(map(str, kind["shape"]))
        table.add_row(kind["kind"], str(kind["count"]), shape, ", then ".join(kind["steps"]) or "left as it is")
    return table


def steps_table(found: Mapping[str, Any]) -> Table:
    """Memory, disk and time."""
    table = Table(title="Predicted", box=None, padding=(0, 1), title_justify="left")
    table.add_column("", no_wrap=True)
    titles = ["peak device", "peak host"] if found["device"] != "cpu" else ["peak memory"]
    for title in (*titles, "disk", "time"):
        table.add_column(title, justify="right")
    parts = [*found["steps"], *([found["scoring"]] if found["scoring"] else [])]
    for part in parts:
        peaks = [part["device"]["bytes"], part["host"]["bytes"]][: len(titles)]
        disk = megabytes(part["disk"]) if part["disk"] else "–"
        each = " each time" if part["title"] == "scoring" else ""
        told = [*map(megabytes, peaks), disk, duration(part["seconds"]) + each]
        if not part["known"]:
            told = [*["not known"] * len(peaks), disk, "not known"]
        table.add_row(part["title"], *told)
    for name, size in found["exports"].items():
        most = f"{found['bounds'].get(name, '')} {megabytes(size)}".strip()
        table.add_row(f"export {name}", *["–"] * len(titles), most, "–")
    if found["startup"] >= 0.05:
        table.add_row("start-up", *["–"] * len(titles), "–", duration(found["startup"]) + " once")
    if found["tokens"]:
        kept, once = f"about {megabytes(found['tokens'])}", f"{duration(found['reading'])} once"
        table.add_row("texts into tokens", *["–"] * len(titles), kept, once)
    least = "" if all(part["known"] for part in parts) else "≥ "
    memory = [least + megabytes(size) for size in (found["peak_device"], found["peak_host"])[: len(titles)]]
    table.add_row("in all", *memory, megabytes(found["disk"]), least + duration(found["seconds"]), style="bold")
    return table
