"""Make tables from sections, and rank the methods of each column by statistical significance."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .method_names import GLOSSARY, dataset_name, sort_datasets
from .sections import OTHER_DATASETS, Section, Spread, Summary
from .significance import difference_interval

Cell = str | int | float | Spread | None
SPREAD_LEGEND = "Accuracies in percent, mean ± standard deviation over seeds."
# The last columns of a table, which a narrow terminal omits.
COST_COLUMNS = ("mean of H", "shots", "seeds", "seconds", "trained parameters", "training images", "queries")
RANK_LEGEND = " ".join(f"{mark.capitalize()}: {means}." for mark, means in GLOSSARY["marks"].items())


@dataclass(frozen=True)
class Table:
    """Rows of cells. An empty first cell continues the group of the row above."""

    title: str
    headers: list[str]
    rows: list[list[Cell]]

    @property
    def grouped(self) -> bool:
        return any(row[0] == "" for row in self.rows)

    def texts(self, mark: Callable[[str, int], str] = lambda text, rank: text) -> list[list[str]]:
        """Return the rows as text, with means aligned within each column.

        Args:
            mark: formats a text by its rank: 0 none, 1 best, 2 second best.
        """
        columns = [_column_texts(column, mark) for column in zip(*self.rows, strict=True)]
        return [list(row) for row in zip(*columns, strict=True)]


def tables(section: Section) -> list[Table]:
    """Return the table of a section; with several data sets or targets, also a table of each of them."""
    rows = section.summaries
    labels = [row.label for row in rows]
    names = _score_names(section)
    if section.protocol == "dg":  # columns: source, each target, mean over targets
        names[1:1] = _targets(section)
    columns: dict[str, Sequence[Cell]] = {"method": labels}
    columns |= {dataset_name(name): _scores(section, name, labels) for name in names}
    columns |= {
        "Δ": _differences_to_best(section),
        "mean of H": [row.mean_h for row in rows],
        "shots": [row.shots or None for row in rows],
        "seeds": [len(row.seeds) or None for row in rows],
        "seconds": [row.seconds for row in rows],
        "trained parameters": [row.trained for row in rows],
        "training images": [row.images for row in rows],
        "queries": [row.queries for row in rows],
    }
    filled = {name: cells for name, cells in columns.items() if any(cell is not None for cell in cells)}
    cells = [list(row) for row in zip(*filled.values(), strict=True)]
    result = [Table(f"{section.title}: {section.subtitle}", list(filled), cells)]
    if section.members:
        result.append(_by_dataset(section))
    if section.protocol == "xd" and (targets := _targets(section)):
        titles = {OTHER_DATASETS: "Average", **{name: dataset_name(name) for name in targets}}
        by_target: list[list[Cell]] = [[titles[name], *_scores(section, name, labels)] for name in titles]
        result.append(Table(f"{section.title}: accuracy on each target", ["target", *labels], by_target))
    return result


def _by_dataset(section: Section) -> Table:
    """Return a table with one column per method and rows for the average and each data set.

    Methods stand in order of their rank, published ones last.
    """
    parts = [section, *section.members]
    is_published = {row.label: bool(row.source) for part in parts for row in part.summaries}
    labels = sorted(is_published, key=lambda label: is_published[label])
    rows: list[list[Cell]] = []
    for part in parts:
        title = "Average" if part is section else part.title
        for place, name in enumerate(_score_names(section)):
            means = [score and replace(score, deviation=None) for score in _scores(part, name, labels)]
            rows.append(["" if place else title, name, *means])
    return Table(f"{section.title}: each data set", ["data set", "score", *labels], rows)


def columns(parts: Sequence[Section]) -> dict[str, str]:
    """Return the meaning of each column of these sections."""
    headers = {re.sub(r"^\w+ shots?$", "N shots", name) for part in parts for name in tables(part)[0].headers}
    return {name: means for name, means in GLOSSARY["columns"].items() if name in headers}


def legend(parts: Sequence[Section]) -> list[str]:
    """Return lines that explain how to read the tables of these sections."""
    meanings = ". ".join(f"{name}: {means}" for name, means in columns(parts).items())
    return [SPREAD_LEGEND, RANK_LEGEND, f"{meanings}."]


def _targets(section: Section) -> list[str]:
    return sort_datasets({name for row in section.summaries for name in row.targets})


def _score_names(section: Section) -> list[str]:
    """Return the names of the scores of a section."""
    names = dict.fromkeys(name for row in section.summaries for name in row.scores)
    return [*names, *(["H"] if any(row.h is not None for row in section.summaries) else [])]


def _scores(section: Section, name: str, labels: Sequence[str]) -> list[Spread | None]:
    """Return one score of each method with its rank, None for a method without this score."""
    spreads = {row.label: spread for row in section.summaries if (spread := _score(row, name))}
    measured = {label: spreads[label].mean for label in section.outcomes if label in spreads}
    ranks = _ranks(measured, {label: scores[name] for label, scores in section.draws.items()})
    return [
        replace(spreads[label], rank=ranks.get(label, 0)) if label in spreads else None for label in labels
    ]


def _score(row: Summary, name: str) -> Spread | None:
    if name == "H":
        return None if row.h is None else Spread(row.h)
    return row.scores.get(name) or row.targets.get(name)


def _ranks(means: dict[str, float], draws: dict[str, np.ndarray]) -> dict[str, int]:
    """Return rank 1 (bold) and 2 (underlined) of methods, as RANK_LEGEND defines them.

    No method has rank 1 unless all have bootstrap draws.
    """
    if len(means) < 2:
        return {}
    best, *rest = sorted(means, key=lambda label: -means[label])
    seconds = [label for label in rest if f"{means[label]:.1f}" == f"{means[rest[0]]:.1f}"]
    if not means.keys() <= draws.keys():
        return dict.fromkeys([best, *seconds], 2)
    tied = [label for label in rest if difference_interval(draws[best], draws[label])[0] <= 0]
    return dict.fromkeys([best, *tied], 2) if tied else {best: 1} | dict.fromkeys(seconds, 2)


def _differences_to_best(section: Section) -> list[str | None]:
    """Return the difference of each method's headline score to the best one's, with its interval if known."""
    measured = [row for row in section.summaries if not row.source]

    def difference(row: Summary) -> str | None:
        if row.source or row is measured[0]:
            return None
        text = f"{row.headline.mean - measured[0].headline.mean:+.1f}"
        names = [label for label in (row.label, measured[0].label) if label in section.draws]
        if len(names) == 2:
            low, high = difference_interval(*(section.draws[label][section.headline] for label in names))
            text += f" [{low:+.1f}, {high:+.1f}]"
        return text.replace("-", "−")

    return [difference(row) for row in section.summaries]


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
