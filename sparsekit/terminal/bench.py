"""The figures of `sparsekit bench` as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

LEGEND = (
    "seconds: median of the runs, shortest and longest; to ...: times as long as that schedule of ours; error: of the "
    "block's outputs; equal: weights equal to the first row's"
)


def bench_table(job: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each side; `LEGEND` says what its columns are."""
    table = Table(title=job, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("side", no_wrap=True)
    ours = list(rows[-1]["ratios"]) if rows else []
    to = [f"to {name.rpartition(' ')[2]}" for name in ours]
    memory = any(row.get("peak") for row in rows)  # told on CUDA only
    for name in ("seconds", "from - to", *to, "error", "equal", *["memory"] * memory):
        table.add_column(name, justify="right")
    for row in rows:
        stopped = "stopped" in row
        ratios = [f"{'> ' * stopped}{row['ratios'][name]:.1f}x" if name in row["ratios"] else "" for name in ours]
        if stopped:
            table.add_row(row["side"], f"> {row['seconds']:.3f}", row["stopped"], *ratios)
            continue
        spread = f"{row['least']:.3f} - {row['most']:.3f}" if row["runs"] > 1 else "once"
        cells = (f"{row['error']:.2e}", f"{100 * row['equal']:.3f} %", f"{row['peak'] / 1e9:.2f} GB")
        table.add_row(row["side"], f"{row['seconds']:.3f}", spread, *ratios, *cells[: 2 + memory])
    return table
