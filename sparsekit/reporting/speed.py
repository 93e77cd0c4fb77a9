"""Measured speed beside the dense model's: the table of deploy cards, and in sentences what was gained and what not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparsekit.reporting.numerals import JOINED, megabytes, percent
from sparsekit.reporting.tables import Cell, Column, Table, numbers, size

Record = Mapping[str, Any]
Cards = Mapping[str, Record]  # deploy cards by name of the run

DENSE, PROMPTS = "dense", "prompts"
CAPTION = "Tokens a second (and times the dense model's)"
FASTER = 1.03  # a ratio below this is no speed-up worth the word


def speed_table(cards: Cards) -> Table | None:
    """Tokens a second by form and work, batches side by side; None when nothing was measured.

    One run has a row for each form and work. Several have a row for each run, under the form and work as a heading.
    """
    held = _by_form(cards)
    batches = sorted({row["batch"] for runs in held.values() for rows in runs.values() for row in rows})
    if not batches:
        return None
    several = len(cards) > 1
    rows = list(_dense_rows(cards, batches))
    for (form, work), runs in held.items():
        label = _label(form, work)
        if several:
            rows.append([Cell(label, tone="strong")])
        for run, found in runs.items():
            cells = [_cell({row["batch"]: row for row in found}.get(batch), cards[run]) for batch in batches]
            rows.append([Cell(run if several else label), *cells, size(cards[run]["memory"][form])])
    titles = (*(f"batch {batch}" for batch in batches), "weights in memory")
    first = Column("arm" if several else "form")
    return Table(CAPTION, [first, *numbers(*titles)], rows)


def _by_form(cards: Cards) -> dict[tuple[str, str], dict[str, list[Record]]]:
    """Rows of each run by form and work, as first measured."""
    held: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for run, card in cards.items():
        for row in card["speed"]:
            held.setdefault((row["form"], _work(row)), {}).setdefault(run, []).append(row)
    return held


def _work(row: Record) -> str:
    return str(row.get("work", PROMPTS))  # cards from before decoding was measured lack it


def _label(form: str, work: str) -> str:
    return form if work == PROMPTS else f"{form}, {work}"


def _dense_rows(cards: Cards, batches: Sequence[int]) -> Iterator[list[Cell]]:
    """The dense model once for each work: the lowest and the highest of what was measured beside the runs."""
    speeds: dict[str, dict[int, list[float]]] = {}
    for card in cards.values():
        for row in card["speed"]:
            speeds.setdefault(_work(row), {}).setdefault(row["batch"], []).append(row["dense"])
    memory = max(card["memory"][DENSE] for card in cards.values())
    for work, found in speeds.items():
        spans = [_span(found.get(batch, []), "{:,.0f}") for batch in batches]
        cells = [Cell(span or "–", "lowest and highest beside the arms" if len(cards) > 1 else "") for span in spans]
        yield [Cell(_label(DENSE, work), tone="strong"), *cells, size(memory)]


def _span(values: Sequence[float], form: str) -> str:
    """`1.41–1.43`, or one number where both are written alike."""
    return "–".join(dict.fromkeys(form.format(end) for end in (min(values), max(values)))) if values else ""


def _cell(row: Record | None, card: Record) -> Cell:
    """`2,397 (1.41 ×)`, green where it is a speed-up."""
    if row is None:
        return Cell("–", "not measured", "quiet")
    title = f"{row['tokens_per_second']:,.1f} tokens/s, dense beside it {row['dense']:,.1f}, ratio {row['ratio']:.4f}"
    text = f"{row['tokens_per_second']:,.0f} ({row['ratio']:.2f}{JOINED}×)"
    return Cell(text, title, "good" if gained(row, card) else "")


def gained(row: Record, card: Record) -> bool:
    """Whether a row is a speed-up: by more than a trifle, and than the dense model's own times lie apart."""
    return bool(row["ratio"] >= max(FASTER, 1 + _apart(row, card)))


def _apart(row: Record, card: Record) -> float:
    """How far the times of the dense model lie apart; older cards tell the most of all their rows."""
    return float(row.get("apart", card.get("noise", 0.0)))


def sentences(cards: Cards) -> Iterator[str]:
    """What was measured and what came of it; what only some of the runs say has their names."""
    for note in dict.fromkeys(note for card in cards.values() for note in card["notes"]):
        names = [name for name, card in cards.items() if note in card["notes"]]
        yield note if len(names) == len(cards) else f"{', '.join(names)}: {note}"
    yield from _spread(cards)
    yield from verdicts(cards)


def _spread(cards: Cards) -> Iterator[str]:
    """How far times of the dense model lie apart at most, where that is more than a trifle."""
    found = [(_apart(row, card), run, row) for run, card in cards.items() for row in card["speed"]]
    found.sort(key=lambda each: -each[0])  # stable: the first of several that are alike
    if found and found[0][0] > FASTER - 1:
        most, run, row = found[0]
        what = f", {_work(row)} at batch {row['batch']}" if "apart" in row else ""
        beside = f" beside {run}" if len(cards) > 1 else ""
        yield (
            "The dense model is measured before and after the others, and the faster time counts. Its two times lie up "
            f"to {percent(most, 0)} apart{what}{beside}; a gain that is smaller than they lie apart counts as none."
        )


def verdicts(cards: Cards) -> Iterator[str]:
    """What was gained and what was not, in plain sentences; a ratio within the noise is no gain."""
    for (form, work), runs in _by_form(cards).items():
        yield f"{_label(form, work)}: {_verdict(cards, runs)}."
        if work == PROMPTS:
            heavy = [run for run in runs if cards[run]["memory"][form] >= cards[run]["memory"][DENSE]]
            if heavy:
                where = "" if len(heavy) == len(runs) else f" in {len(heavy)} of {len(runs)} arms"
                held = " or ".join(dict.fromkeys(megabytes(cards[run]["memory"][form]) for run in heavy))
                yield f"{form}: no less memory than the dense model{where}, {held} of weights."


def _verdict(cards: Cards, runs: Mapping[str, Sequence[Record]]) -> str:
    """Of one form at one work, over all runs: the gain at each batch, or that there is none."""
    by_batch: dict[int, list[tuple[float, bool]]] = {}
    for run, rows in runs.items():
        for row in rows:
            by_batch.setdefault(row["batch"], []).append((row["ratio"], gained(row, cards[run])))
    gains = {batch: [ratio for ratio, real in found if real] for batch, found in by_batch.items()}
    every = [one for found in by_batch.values() for one in found]
    unsure = any(ratio >= FASTER and not real for ratio, real in every)
    if not any(gains.values()):
        spread = ", within the spread of its own times" if unsure else ""
        return f"no speed-up here, {max(every)[0]:.2f} times the dense model's speed at best{spread}"
    told = ", ".join(
        f"{_span(ratios, '{:.2f}')} times the dense model's speed at batch {batch}"
        + (f" in {len(ratios)} of {len(by_batch[batch])} arms" if len(ratios) < len(by_batch[batch]) else "")
        for batch, ratios in gains.items()
        if ratios
    )
    slow = [str(batch) for batch, ratios in gains.items() if not ratios]
    rest = f"; no speed-up here at batch {', '.join(slow)}" if slow else ""
    return told + rest + ("; other gains lie within the spread of the dense model's times" if unsure else "")


__all__ = ["FASTER", "gained", "sentences", "speed_table", "verdicts"]
