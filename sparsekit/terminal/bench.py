"""The figures of `sparsekit bench` as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def bench_table(job: str, rows: list[Mapping[str, Any]]) -> Table:
    """One row for each side; equal weights and ratios are to the first."""
    table = Table(title=job, title_justify="left", box=None, pad_edge=False)
    table.add_column("side")
    for name in ("seconds", "from - to", "ratio", "output error", "equal", "memory"):
        table.add_column(name, justify="right")
    for row in rows:
        spread = f"{row['least']:.3f} - {row['most']:.3f}" if row["runs"] > 1 else "once"
        memory = f"{row['peak'] / 1e9:.2f} GB" if row["peak"] else ""
        ratio = f"{row['ratio']:.1f}x" if "ratio" in row else ""
        cells = (f"{row['seconds']:.3f}", spread, ratio, f"{row['error']:.3e}", f"{100 * row['equal']:.3f} %", memory)
        table.add_row(row["side"], *cells)
    return table
