"""From sections to tables: cells, and which of them is the best beyond noise."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .method_names import BOOK, dataset_name, in_papers_order
from .sections import OTHERS, Section, Spread, Summary
from .significance import interval

Cell = str | int | float | Spread | None
SPREADS = "Accuracies in percent, mean ± standard deviation over seeds."
COSTS = ("mean of H", "shots", "seeds", "seconds", "trained", "images", "queries")  # columns, last in a table
RANKS = " ".join(f"{mark.capitalize()}: {means}." for mark, means in BOOK["marks"].items())


@dataclass(frozen=True)
class Table:
    """Rows of cells; a row whose first cell is empty goes on with the one above it."""

    title: str
    headers: list[str]
    rows: list[list[Cell]]

    @property
    def grouped(self) -> bool:
        return any(row[0] == "" for row in self.rows)

    def texts(self, mark: Callable[[str, int], str] = lambda text, rank: text) -> list[list[str]]:
        """The rows as text; within a column the means stand one below the other. `mark` shows a rank."""
        columns = [_column_texts(column, mark) for column in zip(*self.rows, strict=True)]
        return [list(row) for row in zip(*columns, strict=True)]


def tables(section: Section) -> list[Table]:
    """The table of a section, and where it has several data sets or targets, one with each of them."""
    rows = section.summaries
    labels = [row.label for row in rows]
    names = _names(section)
    if section.protocol == "dg":  # the source, each target, their mean
        names[1:1] = _targets(section)
    columns: dict[str, Sequence[Cell]] = {"method": labels}
    columns |= {dataset_name(name): _scores(section, name, labels) for name in names}
    columns |= {
        "Δ": _behind(section),
        "mean of H": [row.mean_h for row in rows],
        "shots": [row.shots or None for row in rows],
        "seeds": [len(row.seeds) or None for row in rows],
        "seconds": [row.seconds for row in rows],
        "trained": [row.trained for row in rows],
        "images": [row.images for row in rows],
        "queries": [row.queries for row in rows],
    }
    filled = {name: cells for name, cells in columns.items() if any(cell is not None for cell in cells)}
    cells = [list(row) for row in zip(*filled.values(), strict=True)]
    made = [Table(f"{section.title}: {section.subtitle}", list(filled), cells)]
    if section.members:
        made.append(_by_dataset(section))
    if section.protocol == "xd" and (targets := _targets(section)):
        shown = {OTHERS: "Average", **{name: dataset_name(name) for name in targets}}
        by_target: list[list[Cell]] = [[shown[name], *_scores(section, name, labels)] for name in shown]
        made.append(Table(f"{section.title}: accuracy on each target", ["target", *labels], by_target))
    return made


def _by_dataset(section: Section) -> Table:
    """The average, then each data set as papers order them; methods side by side, the best one first.

    Published ones come after those measured here.
    """
    parts = [section, *section.members]
    found = {row.label: bool(row.source) for part in parts for row in part.summaries}
    labels = sorted(found, key=lambda label: found[label])
    rows: list[list[Cell]] = []
    for part in parts:
        title = "Average" if part is section else part.title
        for place, name in enumerate(_names(section)):
            means = [score and replace(score, deviation=None) for score in _scores(part, name, labels)]
            rows.append(["" if place else title, name, *means])
    return Table(f"{section.title}: each of them", ["data set", "score", *labels], rows)


def columns(parts: Sequence[Section]) -> dict[str, str]:
    """What the columns of these sections mean."""
    shown = {re.sub(r"^\w+ shots?$", "N shots", name) for part in parts for name in tables(part)[0].headers}
    return {name: means for name, means in BOOK["columns"].items() if name in shown}


def legend(parts: Sequence[Section]) -> list[str]:
    """How to read the tables of these sections."""
    said = ". ".join(f"{name}: {means}" for name, means in columns(parts).items())
    return [SPREADS, RANKS, f"{said}."]


def _targets(section: Section) -> list[str]:
    return in_papers_order({name for row in section.summaries for name in row.targets})


def _names(section: Section) -> list[str]:
    """The scores of a section's protocol."""
    names = dict.fromkeys(name for row in section.summaries for name in row.scores)
    return [*names, *(["H"] if any(row.h is not None for row in section.summaries) else [])]


def _scores(section: Section, name: str, labels: Sequence[str]) -> list[Spread | None]:
    """One score of each method with its rank; None where a method has none."""
    found = {row.label: spread for row in section.summaries if (spread := _score(row, name))}
    measured = {label: found[label].mean for label in section.outcomes if label in found}
    ranks = _ranks(measured, {label: scores[name] for label, scores in section.draws.items()})
    return [replace(found[label], rank=ranks.get(label, 0)) if label in found else None for label in labels]


def _score(row: Summary, name: str) -> Spread | None:
    if name == "H":
        return None if row.h is None else Spread(row.h)
    return row.scores.get(name) or row.targets.get(name)


def _ranks(means: dict[str, float], draws: dict[str, np.ndarray]) -> dict[str, int]:
    """1 (bold) and 2 (underlined) for the methods that get one, as RANKS says. Without draws none is bold."""
    if len(means) < 2:
        return {}
    best, *rest = sorted(means, key=lambda label: -means[label])
    seconds = [label for label in rest if f"{means[label]:.1f}" == f"{means[rest[0]]:.1f}"]
    if not means.keys() <= draws.keys():
        return dict.fromkeys([best, *seconds], 2)
    tied = [label for label in rest if interval(draws[best], draws[label])[0] <= 0]
    return dict.fromkeys([best, *tied], 2) if tied else {best: 1} | dict.fromkeys(seconds, 2)


def _behind(section: Section) -> list[str | None]:
    """How far each method's headline is from the best one's, with the interval where noise is known."""
    measured = [row for row in section.summaries if not row.source]

    def said(row: Summary) -> str | None:
        if row.source or row is measured[0]:
            return None
        text = f"{row.headline.mean - measured[0].headline.mean:+.1f}"
        names = [label for label in (row.label, measured[0].label) if label in section.draws]
        if len(names) == 2:
            low, high = interval(*(section.draws[label][section.headline] for label in names))
            text += f" [{low:+.1f}, {high:+.1f}]"
        return text.replace("-", "−")

    return [said(row) for row in section.summaries]


def _column_texts(cells: Sequence[Cell], mark: Callable[[str, int], str]) -> list[str]:
    tails = [
        f" ± {cell.deviation:.1f}" if isinstance(cell, Spread) and cell.deviation is not None else ""
        for cell in cells
    ]
    width = max(map(len, tails))
    return [
        mark(_text(cell) + tail, cell.rank if isinstance(cell, Spread) else 0) + " " * (width - len(tail))
        for cell, tail in zip(cells, tails, strict=True)
    ]


def _text(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, Spread):
        return f"{cell.mean:.1f}"
    if isinstance(cell, float):
        return f"{cell:,.1f}" if cell < 100 else f"{cell:,.0f}"
    return f"{cell:,}" if isinstance(cell, int) else cell
