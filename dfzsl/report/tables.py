"""From outcomes to tables: pure functions, and one renderer a format."""

from __future__ import annotations

import csv
import io
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from ..results import harmonic_mean
from .outcomes import PROTOCOLS, Method, Outcome, Scores, transfer_scores

NAMES = {"base2new": "base-to-new", "gzsl": "generalized zero-shot", "xd": "cross-data-set transfer"}
LEGEND = [
    "Accuracies in percent, mean ± standard deviation over seeds.",
    "H: harmonic mean of the averaged accuracies, as published. mean of H: each run's H, then averaged.",
    "shots: images a class to train on; for a method without images, for the teacher it asks.",
    "seconds: all stages of training. trained: parameters. images: training images seen. queries: to the "
    "teacher.",
]


@dataclass(frozen=True)
class Spread:
    """A mean, and over several seeds their population standard deviation (CoOp's parse_test_res.py)."""

    mean: float
    deviation: float | None = None


@dataclass(frozen=True)
class Summary:
    """One method over its seeds, and over data sets where there are several: a row of a table."""

    label: str
    shots: str
    scores: dict[str, Spread]
    h: float | None = None  # harmonic mean of the averaged scores; `xd` has none
    mean_h: Spread | None = None
    seeds: tuple[int, ...] = ()
    seconds: float | None = None
    trained: int | None = None
    images: int | None = None
    queries: int | None = None
    source: str = ""  # where a published figure stands; "" for what was measured
    targets: dict[str, Spread] = field(default_factory=dict)  # of `xd`

    @property
    def headline(self) -> Spread:
        """The one number that methods are ranked by: H, or in `xd` the mean over other data sets."""
        if self.h is None:
            return list(self.scores.values())[:2][-1]
        return Spread(self.h, self.mean_h.deviation if self.mean_h else None)


@dataclass(frozen=True)
class Section:
    """All methods side by side on one data set, or averaged over several.

    summaries: the best first. outcomes: by label, those that are finished and count.
    """

    protocol: str
    datasets: tuple[str, ...]
    summaries: list[Summary]
    notes: list[str]
    outcomes: dict[str, list[Outcome]]

    @property
    def title(self) -> str:
        several = len(self.datasets) > 1
        return f"Average over {len(self.datasets)} data sets" if several else self.datasets[0]

    @property
    def subtitle(self) -> str:
        return ", ".join([NAMES[self.protocol], *(f"backbone {name}" for name in _backbones(self.outcomes))])


def sections(outcomes: Sequence[Outcome], published: bool = False) -> list[Section]:
    """One section a data set, then their average where there are several; protocol after protocol."""
    made = []
    for protocol in PROTOCOLS:
        mine = [outcome for outcome in outcomes if outcome.protocol == protocol]
        labels = label_methods(mine)
        datasets = sorted({outcome.dataset for outcome in mine})
        groups: list[tuple[str, ...]] = [(name,) for name in datasets]
        if len(datasets) > 1 and protocol != "xd":
            groups.append(tuple(datasets))
        made += [_section(protocol, group, mine, labels, published) for group in groups]
    return made


def label_methods(outcomes: Sequence[Outcome]) -> dict[Method, str]:
    """The name of each method, with its config or shots where two on one data set differ in nothing else."""
    alike: dict[tuple[str, str], set[Method]] = defaultdict(set)
    for outcome in outcomes:
        alike[outcome.dataset, outcome.method.label].add(outcome.method)
    several_configs = {label for (_, label), found in alike.items() if len({m.config for m in found}) > 1}
    several_shots = {label for (_, label), found in alike.items() if len({m.shots for m in found}) > 1}

    def name(method: Method) -> str:
        extras = [method.config] if method.label in several_configs else []
        extras += [f"{method.shots} shots"] if method.label in several_shots else []
        return f"{method.label} [{', '.join(extras)}]" if extras else method.label

    return {method: name(method) for found in alike.values() for method in found}


def _section(
    protocol: str,
    datasets: tuple[str, ...],
    outcomes: Sequence[Outcome],
    labels: dict[Method, str],
    with_published: bool,
) -> Section:
    members = [outcome for outcome in outcomes if outcome.dataset in datasets]
    targets = {name for outcome in members for name in outcome.targets}
    done: dict[str, list[Outcome]] = defaultdict(list)
    notes = []
    for outcome in members:
        missing = outcome.missing + sorted(targets - outcome.targets.keys())
        label = labels[outcome.method]
        where = f"{label}, seed {outcome.seed}" + (f" on {outcome.dataset}" if len(datasets) > 1 else "")
        if not missing:
            done[label].append(outcome)
        elif outcome.failure:
            notes.append(f"{where}: failed and left out: {outcome.failure}")
        else:
            notes.append(f"{where}: not finished and left out, no {', '.join(missing)}")
        if not missing and outcome.failure:
            notes.append(f"{where}: stopped early: {outcome.failure}")
    for label in sorted(done):
        absent = sorted(set(datasets) - {outcome.dataset for outcome in done[label]})
        if absent:
            notes.append(f"{label}: left out of the average, no result on {', '.join(absent)}")
            del done[label]
    notes += _differences(done, datasets)
    summaries = [summarise(label, runs) for label, runs in done.items()]
    if with_published:
        figures = published_summaries(protocol, datasets, targets)
        summaries += figures
        others = [name for name in _backbones(done) if name.replace("/", "-") != "ViT-B-16"]
        if figures and others:
            notes.append(f"Published figures are of ViT-B/16, runs here of {', '.join(others)}")
    summaries.sort(key=lambda row: -row.headline.mean)
    return Section(protocol, datasets, summaries, notes, dict(done))


def _backbones(outcomes: dict[str, list[Outcome]]) -> list[str]:
    parts = [part for runs in outcomes.values() for outcome in runs for part in outcome.parts.values()]
    return sorted({part["backbone"] for part in parts if part.get("backbone")})


def legend(parts: Sequence[Section]) -> list[str]:
    """What the columns mean, and where the published figures stand."""
    sources = [
        f"{row.label}, {NAMES[section.protocol]}: {row.source}"
        for section in parts
        for row in section.summaries
        if row.source
    ]
    return LEGEND + list(dict.fromkeys(sources))


def _differences(done: dict[str, list[Outcome]], datasets: tuple[str, ...]) -> list[str]:
    """What makes a comparison of the methods unequal, and what the runs say of themselves."""
    notes = []
    every_seed = {outcome.seed for runs in done.values() for outcome in runs}
    unequal: dict[str, list[str]] = defaultdict(list)
    for label, runs in done.items():
        for dataset in datasets:
            seeds = {outcome.seed for outcome in runs if outcome.dataset == dataset}
            if missing := _listed(every_seed - seeds):
                where = f" on {dataset}" if len(datasets) > 1 else ""
                unequal[f"no result for seed {missing}{where}; averaged over {_listed(seeds)}"].append(label)
    notes += [f"{', '.join(labels)}: {what}, unlike the others" for what, labels in unequal.items()]
    if len(_backbones(done)) > 1:
        notes += [
            f"{label}: backbone {', '.join(sorted(_backbones({label: done[label]})))}" for label in done
        ]
    for label, runs in done.items():
        said = {note for outcome in runs for part in outcome.parts.values() for note in part["notes"]}
        notes += [" ".join(f"{label}: {note}".split()) for note in sorted(said)]
    return notes


def _listed(numbers: set[int]) -> str:
    return ", ".join(str(number) for number in sorted(numbers))


def summarise(label: str, outcomes: Sequence[Outcome]) -> Summary:
    """One method's row from its finished outcomes."""
    scores = {(outcome.dataset, outcome.seed): outcome.scores() for outcome in outcomes}
    targets = {(outcome.dataset, outcome.seed): outcome.targets for outcome in outcomes}
    runs = [outcome.training for outcome in outcomes]
    averages = _averages(scores)
    h, mean_h = None, None
    if outcomes[0].protocol != "xd":
        h = harmonic_mean(*(score.mean for score in averages.values()))
        mean_h = average({key: harmonic_mean(*values.values()) for key, values in scores.items()})
    seconds = [sum(run["seconds"].values()) for run in runs if run.get("seconds") is not None]
    return Summary(
        label=label,
        shots=outcomes[0].method.shots,
        scores=averages,
        h=h,
        mean_h=mean_h,
        seeds=tuple(_common_seeds(scores)),
        seconds=statistics.fmean(seconds) if seconds else None,
        trained=_mean_of("trained_parameters", runs),
        images=_mean_of("images_used", runs),
        queries=_mean_of("queries", runs),
        targets=_averages(targets),
    )


def _averages(scores: dict[tuple[str, int], Scores]) -> dict[str, Spread]:
    names = list(next(iter(scores.values())))
    return {name: average({key: values[name] for key, values in scores.items()}) for name in names}


def average(values: dict[tuple[str, int], float]) -> Spread:
    """Mean over data sets of means over seeds, from {(data set, seed): value}.

    The deviation is over seeds, of each seed's mean over the data sets.
    """
    datasets = {dataset for dataset, _ in values}
    mean = statistics.fmean(
        statistics.fmean(value for (of, _), value in values.items() if of == dataset) for dataset in datasets
    )
    seeds = _common_seeds(values)
    per_seed = [statistics.fmean(values[dataset, seed] for dataset in datasets) for seed in seeds]
    return Spread(mean, statistics.pstdev(per_seed) if len(seeds) > 1 else None)


def _common_seeds(keyed: dict[tuple[str, int], Any]) -> list[int]:
    """The seeds that every data set has."""
    datasets = {dataset for dataset, _ in keyed}
    return sorted({seed for _, seed in keyed if all((dataset, seed) in keyed for dataset in datasets)})


def _mean_of(name: str, runs: Sequence[dict[str, Any]]) -> int | None:
    values = [run[name] for run in runs if name in run]
    return round(statistics.fmean(values)) if values else None


def published_summaries(protocol: str, datasets: Sequence[str], targets: set[str]) -> list[Summary]:
    """Published figures of the same data sets (for `xd`: and targets), of the methods that have them all."""
    book = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text(encoding="utf-8"))
    entries = book.get(protocol, [])
    every = {name for entry in entries for name in entry.get("figures", ())}
    rows = []
    for entry in entries:
        figures = entry.get("figures", {})
        h, mean_h = None, None
        if protocol == "xd" and {*datasets, *targets} <= figures.keys():
            scores = transfer_scores(figures[datasets[0]], {name: figures[name] for name in targets})
        elif protocol == "base2new" and figures.keys() >= set(datasets):
            pairs = [figures[name] for name in datasets]
            scores = dict(zip(("base", "new"), map(statistics.fmean, zip(*pairs, strict=True)), strict=True))
            mean_h = Spread(statistics.fmean(harmonic_mean(*pair) for pair in pairs))
        elif "average" in entry and every == set(datasets):
            scores = dict(zip(("base", "new"), entry["average"], strict=True))
        else:
            continue
        if protocol == "base2new":
            h = harmonic_mean(*scores.values())
        rows.append(
            Summary(
                label=f"{entry['method']} (published)",
                shots=str(entry["shots"]),
                scores={name: Spread(score) for name, score in scores.items()},
                h=h,
                mean_h=mean_h,
                source=entry["source"],
                targets={name: Spread(figures[name]) for name in targets},
            )
        )
    return rows


# What would break a Markdown table or be HTML in it.
MARKDOWN = str.maketrans({"|": r"\|", "<": "&lt;"})

Cell = str | int | float | Spread | None


@dataclass(frozen=True)
class Table:
    title: str
    headers: list[str]
    rows: list[list[Cell]]

    def texts(self) -> list[list[str]]:
        """The rows as text; within a column the means stand one below the other."""
        columns = [_column_texts(column) for column in zip(*self.rows, strict=True)]
        return [list(row) for row in zip(*columns, strict=True)]

    def escaped(self) -> Table:
        """The same with names that Markdown takes as they are."""
        rows = [[c.translate(MARKDOWN) if isinstance(c, str) else c for c in row] for row in self.rows]
        return Table(self.title, [header.translate(MARKDOWN) for header in self.headers], rows)


def tables(section: Section) -> list[Table]:
    """The table of a section; for `xd` a second one with every target. Columns without an entry go."""
    rows = section.summaries
    columns: dict[str, list[Cell]] = {"method": [row.label for row in rows]}
    for name in {name: None for row in rows for name in row.scores}:
        columns[name] = [row.scores.get(name) for row in rows]
    columns |= {
        "H": [None if row.h is None else Spread(row.h) for row in rows],
        "mean of H": [row.mean_h for row in rows],
        "shots": [row.shots for row in rows],
        "seeds": [len(row.seeds) or None for row in rows],
        "seconds": [row.seconds for row in rows],
        "trained": [row.trained for row in rows],
        "images": [row.images for row in rows],
        "queries": [row.queries for row in rows],
    }
    made = [_table(f"{section.title}: {section.subtitle}", columns)]
    if any(row.targets for row in rows):
        names = sorted({name for row in rows for name in row.targets})
        by_target: dict[str, list[Cell]] = {"target": list(names)}
        by_target |= {row.label: [row.targets.get(name) for name in names] for row in rows}
        made.append(_table(f"{section.title}: accuracy on each target", by_target))
    return made


def _table(title: str, columns: dict[str, list[Cell]]) -> Table:
    filled = {name: cells for name, cells in columns.items() if any(cell is not None for cell in cells)}
    return Table(title, list(filled), [list(row) for row in zip(*filled.values(), strict=True)])


def _column_texts(cells: Sequence[Cell]) -> list[str]:
    tails = [
        f" ± {cell.deviation:.1f}" if isinstance(cell, Spread) and cell.deviation is not None else ""
        for cell in cells
    ]
    width = max(map(len, tails))
    return [_text(cell) + tail.ljust(width) for cell, tail in zip(cells, tails, strict=True)]


def _text(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, Spread):
        return f"{cell.mean:.1f}"
    if isinstance(cell, float):
        return f"{cell:,.1f}" if cell < 100 else f"{cell:,.0f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def _tabulated(table: Table, style: str) -> str:
    if not table.rows:
        return "no finished run yet"
    return tabulate(
        table.texts(),
        table.headers,
        tablefmt=style,
        disable_numparse=True,
        preserve_whitespace=True,
        colalign=["left"] + ["right"] * (len(table.headers) - 1),
    )


def terminal(parts: Sequence[Section]) -> str:
    """Plain text, notes below each table."""
    blocks = []
    for section in parts:
        blocks += [f"{table.title}\n\n{_tabulated(table, 'simple')}" for table in tables(section)]
        if section.notes:
            blocks.append("\n".join(_wrapped(note, "  * ") for note in section.notes))
    return "\n\n".join([*blocks, "\n".join(_wrapped(line, "") for line in legend(parts))]) + "\n"


def _wrapped(line: str, bullet: str) -> str:
    return textwrap.fill(line, 110, initial_indent=bullet, subsequent_indent=" " * len(bullet))


def markdown(parts: Sequence[Section]) -> str:
    """GitHub's Markdown."""
    blocks = []
    for section in parts:
        for table in tables(section):
            blocks += [f"### {table.title}", _tabulated(table.escaped(), "github")]
        if section.notes:
            blocks.append("\n".join(f"- {note}" for note in section.notes))
    return "\n\n".join([*blocks, *legend(parts)]) + "\n"


def latex(parts: Sequence[Section]) -> str:
    """A tabular of the booktabs package for each table; titles and notes are comments."""
    blocks = []
    for section in parts:
        for table in tables(section):
            body = _tabulated(table, "latex_booktabs").replace("±", r"$\pm$").replace("–", "--")
            blocks.append(f"% {table.title}\n{body}")
        blocks += [f"% {note}" for note in section.notes]
    return "\n".join([*blocks, *(f"% {line}" for line in legend(parts))]) + "\n"


def comma_separated(parts: Sequence[Section]) -> str:
    """CSV with one line a method and table, numbers in full; `NAME sd` is the deviation over seeds.

    A name that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    rows: list[dict[str, Any]] = []
    for section in parts:
        for summary in section.summaries:
            row: dict[str, Any] = {"protocol": section.protocol, "data set": section.title}
            row |= {"method": summary.label, "shots": summary.shots}
            spreads = summary.scores | summary.targets
            spreads |= {"mean of H": summary.mean_h} if summary.mean_h else {}
            for name, spread in spreads.items():
                row |= {name: round(spread.mean, 4)}
                row |= {} if spread.deviation is None else {f"{name} sd": round(spread.deviation, 4)}
            row["H"] = None if summary.h is None else round(summary.h, 4)
            row |= {"seeds": " ".join(map(str, summary.seeds)), "seconds": summary.seconds}
            row |= {"trained": summary.trained, "images": summary.images, "queries": summary.queries}
            row |= {"published in": summary.source}
            rows.append({name: _no_formula(cell) for name, cell in row.items()})
    out = io.StringIO()
    names = list({name: None for row in rows for name in row})
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writerow({name: _no_formula(name) for name in names})
    writer.writerows(rows)
    return out.getvalue()


def _no_formula(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@")) else cell


FORMATS = {"terminal": terminal, "markdown": markdown, "latex": latex, "csv": comma_separated}
