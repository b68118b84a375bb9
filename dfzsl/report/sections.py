"""Summarize outcomes into sections, each comparing all methods on one data set or averaged over several."""

from __future__ import annotations

import functools
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dfzsl.io.results import harmonic_mean
from dfzsl.io.untrusted.yaml_reader import read_yaml

from .method_names import PROTOCOL_TITLES, dataset_name, sort_datasets
from .read_runs import PAIRED, PROTOCOL_PARTS, TRANSFER, MethodKey, Outcome, Scores, transfer_scores
from .significance import Draws, average_draws, bootstrap

OTHER_DATASETS = "other data sets"


@dataclass(frozen=True)
class Spread:
    """A mean with its standard deviation over seeds.

    Attributes:
        mean: in percent.
        deviation: population standard deviation, as CoOp's parse_test_res.py; None for a single seed.
        rank: among the methods of a table: 1 printed bold, 2 underlined, 0 plain.
    """

    mean: float
    deviation: float | None = None
    rank: int = 0


@dataclass(frozen=True)
class Summary:
    """Results of one method, averaged over seeds and data sets: a row of a table."""

    label: str
    shots: str
    scores: dict[str, Spread]
    h: float | None = None  # harmonic mean of the averaged scores, if there are two
    mean_h: Spread | None = None
    seeds: tuple[int, ...] = ()
    seconds: float | None = None
    trained: int | None = None
    images: int | None = None
    queries: int | None = None
    source: str = ""  # publication of the result; "" for measured results
    targets: dict[str, Spread] = field(default_factory=dict)  # of `xd` and `dg`

    @property
    def headline_name(self) -> str:
        """Name of the score that ranks methods: H, the mean over other data sets, or the last score."""
        if self.h is not None:
            return "H"
        return OTHER_DATASETS if OTHER_DATASETS in self.scores else list(self.scores)[-1]

    @property
    def headline(self) -> Spread:
        """Score that ranks methods."""
        if self.h is None:
            return self.scores[self.headline_name]
        return Spread(self.h, self.mean_h.deviation if self.mean_h else None)


@dataclass(frozen=True)
class Section:
    """Comparison of all methods on one data set, or averaged over several.

    Attributes:
        protocol: key of `PROTOCOL_PARTS`.
        datasets: data sets that the methods train on.
        summaries: one per method, the best first.
        notes: sentences below the table.
        outcomes: finished runs in the summaries, by label.
        draws: bootstrap draws of the scores, by label.
        members: sections of the single data sets of an average.
    """

    protocol: str
    datasets: tuple[str, ...]
    summaries: list[Summary]
    notes: list[str]
    outcomes: dict[str, list[Outcome]]
    draws: Draws
    members: list[Section] = field(default_factory=list)

    @property
    def title(self) -> str:
        several = len(self.datasets) > 1
        return f"Average over {len(self.datasets)} data sets" if several else dataset_name(self.datasets[0])

    @property
    def headline(self) -> str:
        """Name of the score that ranks methods, see Summary.headline_name."""
        return self.summaries[0].headline_name if self.summaries else ""

    @property
    def subtitle(self) -> str:
        return ", ".join(
            [PROTOCOL_TITLES[self.protocol], *(f"backbone {name}" for name in _backbones(self.outcomes))]
        )


def sections(outcomes: Sequence[Outcome], published: bool = False) -> list[Section]:
    """Return the sections of all protocols, for several data sets their average first.

    Args:
        outcomes: results of runs.
        published: whether to add published results.
    """
    result = []
    for protocol in PROTOCOL_PARTS:
        selected = [outcome for outcome in outcomes if outcome.protocol == protocol]
        labels = label_methods(selected)
        datasets = sort_datasets({outcome.dataset for outcome in selected})
        single = [_section(protocol, (name,), selected, labels, published) for name in datasets]
        if len(datasets) > 1 and protocol not in TRANSFER:
            average = _section(protocol, tuple(datasets), selected, labels, published)
            draws = average_draws(protocol, [part.draws for part in single])
            result.append(replace(average, members=single, draws=draws))
        result += single
    return result


def label_methods(outcomes: Sequence[Outcome]) -> dict[MethodKey, str]:
    """Return a unique label of each method; trainer, config or shots are added only to ambiguous names."""
    same_label: dict[tuple[str, str], set[MethodKey]] = defaultdict(set)
    for outcome in outcomes:
        same_label[outcome.dataset, outcome.method.label].add(outcome.method)

    def labels_with_several(get: Callable[[MethodKey], str]) -> set[str]:
        return {label for (_, label), methods in same_label.items() if len(set(map(get, methods))) > 1}

    getters = (lambda m: m.name, lambda m: m.config, lambda m: f"{m.shots} shots")
    ambiguous = [(labels_with_several(get), get) for get in getters]

    def unique_label(method: MethodKey) -> str:
        extras = [get(method) for labels, get in ambiguous if method.label in labels]
        return f"{method.label} [{', '.join(extras)}]" if extras else method.label

    return {method: unique_label(method) for methods in same_label.values() for method in methods}


def _section(
    protocol: str,
    datasets: tuple[str, ...],
    outcomes: Sequence[Outcome],
    labels: dict[MethodKey, str],
    with_published: bool,
) -> Section:
    members = [outcome for outcome in outcomes if outcome.dataset in datasets]
    targets = {name for outcome in members for name in outcome.targets}
    measured = {part for outcome in members for part in outcome.parts}
    finished: dict[str, list[Outcome]] = defaultdict(list)
    notes = []
    for outcome in members:
        missing = outcome.missing
        missing += sort_datasets(measured - outcome.parts.keys() - {*missing})
        label = labels[outcome.method]
        where = f"{label}, seed {outcome.seed}" + (
            f" on {dataset_name(outcome.dataset)}" if len(datasets) > 1 else ""
        )
        if not missing:
            finished[label].append(outcome)
        elif outcome.failure:
            notes.append(f"{where}: failed, excluded: {outcome.failure}")
        else:
            notes.append(f"{where}: not finished, excluded: no {', '.join(missing)}")
        if not missing and outcome.failure:
            notes.append(f"{where}: stopped early: {outcome.failure}")
    for label in sorted(finished):
        absent = set(datasets) - {outcome.dataset for outcome in finished[label]}
        if absent:
            names = ", ".join(map(dataset_name, sort_datasets(absent)))
            notes.append(f"{label}: excluded from the average: no result on {names}")
            del finished[label]
    notes += _comparison_notes(finished, datasets)
    summaries = [summarize(label, runs) for label, runs in finished.items()]
    if with_published:
        figures = published_summaries(protocol, datasets, targets)
        summaries += figures
        others = [name for name in _backbones(finished) if name.replace("/", "-") != "ViT-B-16"]
        if figures and others:
            notes.append(f"Published results use ViT-B/16, the runs here {', '.join(others)}")
    summaries.sort(key=lambda row: -row.headline.mean)
    draws = bootstrap(finished) if len(datasets) == 1 else {}
    return Section(protocol, datasets, summaries, notes, dict(finished), draws)


def _backbones(outcomes: dict[str, list[Outcome]]) -> list[str]:
    parts = [part for runs in outcomes.values() for outcome in runs for part in outcome.parts.values()]
    return sorted({part["backbone"] for part in parts if part.get("backbone")})


def sources(parts: Sequence[Section]) -> list[str]:
    """Return the publication of each published result."""
    lines = [
        f"{row.label}, {PROTOCOL_TITLES[section.protocol]}: {row.source}"
        for section in parts
        for row in section.summaries
        if row.source
    ]
    return list(dict.fromkeys(lines))


def _comparison_notes(finished: dict[str, list[Outcome]], datasets: tuple[str, ...]) -> list[str]:
    """Return notes on unequal seeds and backbones of the methods, and the notes of the runs."""
    notes = []
    every_seed = {outcome.seed for runs in finished.values() for outcome in runs}
    unequal: dict[str, list[str]] = defaultdict(list)
    for label, runs in finished.items():
        for dataset in datasets:
            seeds = {outcome.seed for outcome in runs if outcome.dataset == dataset}
            if missing := _join(every_seed - seeds):
                where = f" on {dataset_name(dataset)}" if len(datasets) > 1 else ""
                unequal[f"no result for seed {missing}{where}; averaged over {_join(seeds)}"].append(label)
    notes += [
        f"{', '.join(labels)}: {difference}, unlike the others" for difference, labels in unequal.items()
    ]
    if len(_backbones(finished)) > 1:
        notes += [
            f"{label}: backbone {', '.join(sorted(_backbones({label: finished[label]})))}"
            for label in finished
        ]
    for label, runs in finished.items():
        run_notes = {note for outcome in runs for part in outcome.parts.values() for note in part["notes"]}
        notes += [" ".join(f"{label}: {note}".split()) for note in sorted(run_notes)]
    return notes


def _join(numbers: set[int]) -> str:
    return ", ".join(str(number) for number in sorted(numbers))


def summarize(label: str, outcomes: Sequence[Outcome]) -> Summary:
    """Return the summary of one method from its finished outcomes."""
    scores = {(outcome.dataset, outcome.seed): outcome.scores() for outcome in outcomes}
    targets = {(outcome.dataset, outcome.seed): outcome.targets for outcome in outcomes}
    runs = [outcome.training for outcome in outcomes]
    averages = _averages(scores)
    h, mean_h = None, None
    if outcomes[0].protocol in PAIRED:
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
    """Return the mean over data sets of means over seeds.

    Args:
        values: one number for each (data set, seed).

    Returns:
        The mean, and the standard deviation over seeds of each seed's mean over data sets.
    """
    datasets = {dataset for dataset, _ in values}
    mean = statistics.fmean(
        statistics.fmean(value for (name, _), value in values.items() if name == dataset)
        for dataset in datasets
    )
    seeds = _common_seeds(values)
    per_seed = [statistics.fmean(values[dataset, seed] for dataset in datasets) for seed in seeds]
    return Spread(mean, statistics.pstdev(per_seed) if len(seeds) > 1 else None)


def _common_seeds(keyed: dict[tuple[str, int], Any]) -> list[int]:
    """Return the seeds that every data set has."""
    datasets = {dataset for dataset, _ in keyed}
    return sorted({seed for _, seed in keyed if all((dataset, seed) in keyed for dataset in datasets)})


def _mean_of(name: str, runs: Sequence[dict[str, Any]]) -> int | None:
    values = [run[name] for run in runs if name in run]
    return round(statistics.fmean(values)) if values else None


@functools.cache
def _published() -> Any:
    return read_yaml(Path(__file__).parent / "published.yaml")


def published_summaries(protocol: str, datasets: Sequence[str], targets: set[str]) -> list[Summary]:
    """Return published results of methods that have them for all these data sets (and targets)."""
    entries = _published().get("xd" if protocol == "dg" else protocol, [])
    every = {name for entry in entries for name in entry.get("figures", ())}
    rows = []
    for entry in entries:
        figures = entry.get("figures", {})
        h, mean_h = None, None
        if protocol in TRANSFER and {*datasets, *targets} <= figures.keys():
            on_targets = {name: figures[name] for name in targets}
            scores = transfer_scores(datasets[0], figures[datasets[0]], on_targets)
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
