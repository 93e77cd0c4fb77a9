"""What the terminal shows of a model that was looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsekit.reporting.charts import place, short_names
from sparsekit.reporting.numerals import megabytes, percent

Record = Mapping[str, Any]


def print_inspection(console: Console, found: Record) -> None:
    """Architecture first, then what the layers hold."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    say(f"[bold]{found['path']}[/bold]  {megabytes(found['bytes'])} in {found['files']} weight files")
    if "architecture" in found:
        say(f"  {found['architecture']}: {found['parameters']:,} parameters, {found['blocks']} blocks")
        for category, count in found["ledger"].items():
            say(f"  {count:>15,}  {category} ({percent(count / found['parameters'])})")
        for name, count in found["unreachable"].items():
            say(f"  out of reach: {name}, {count:,}")
        for kind in found["kinds"]:
            console.print(_groups(kind))
    for note in found["notes"]:
        say(f"  note: {note}")
    console.print(layers_table(found["layers"]))
    groups, broken = (sum(layer[key] for layer in found["layers"]) for key in ("groups", "violations"))
    if groups:
        counted = next(layer["counted"] for layer in found["layers"] if layer["counted"])
        say(f"{broken:,} of {groups:,} groups break {counted}")


def _groups(kind: Record) -> Table:
    table = Table(title=f"{kind['count']} blocks like {kind['first']}", box=None, padding=(0, 2), title_justify="left")
    for title in ("linears with one input", "inputs", "fed by"):
        table.add_column(title, overflow="fold")
    for group in kind["groups"]:
        fed = group["producer"] or f"cannot be scaled: {group['why']}"
        table.add_row(", ".join(group["linears"]), str(group["inputs"]), fed)
    return table


def layers_table(layers: Sequence[Record]) -> Table:
    """One row for layers of one kind that hold the same; ranges where they differ."""
    kinds: dict[tuple[Any, ...], list[Record]] = {}
    for layer in layers:
        at = place(layer["name"])
        held = layer["dtype"] or f"int{layer['bits']} g{layer['group_size']}"
        key = (at[0] if at else layer["name"], "×".join(map(str, layer["shape"])), layer["pattern"], held)
        kinds.setdefault(key, []).append(layer)
    table = Table(title="Layers", box=None, padding=(0, 1), title_justify="left")
    for title in ("layer", "×", "shape", "zeros", "pattern", "broken groups", "stored as"):
        table.add_column(title, justify="right" if title in ("×", "zeros", "broken groups") else "left", no_wrap=True)
    names = list(dict.fromkeys(key[0] for key in kinds))
    called = dict(zip(names, short_names(names), strict=True))
    for (name, shape, pattern, held), members in kinds.items():
        shares = [layer["sparsity"] for layer in members]
        low, high = percent(min(shares)), percent(max(shares))
        zeros = low if low == high else f"{100 * min(shares):.1f}–{high}"  # one sign: 7B fills 80 columns
        groups, broken = (sum(layer[key] for layer in members) for key in ("groups", "violations"))
        counted = f"{broken:,} of {groups:,}" if groups else "–"
        table.add_row(called[name], str(len(members)), shape, zeros, pattern, counted, held)
    return table
