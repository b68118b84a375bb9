"""From outcomes to sections: all methods side by side, on one data set or averaged over several."""

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

from .method_names import NAMES, dataset_name, in_papers_order
from .read_runs import PAIRED, PROTOCOLS, TRANSFER, Method, Outcome, Scores, transfer_scores
from .significance import Draws, averaged, draws

OTHERS = "other data sets"


@dataclass(frozen=True)
class Spread:
    """A mean, and over several seeds their population standard deviation (CoOp's parse_test_res.py).

    rank: among the methods of a table, 1 for what it prints bold, 2 underlined.
    """

    mean: float
    deviation: float | None = None
    rank: int = 0


@dataclass(frozen=True)
class Summary:
    """One method over its seeds, and over data sets where there are several: a row of a table."""

    label: str
    shots: str
    scores: dict[str, Spread]
    h: float | None = None  # harmonic mean of the averaged scores, where there are two
    mean_h: Spread | None = None
    seeds: tuple[int, ...] = ()
    seconds: float | None = None
    trained: int | None = None
    images: int | None = None
    queries: int | None = None
    source: str = ""  # where a published figure stands; "" for what was measured
    targets: dict[str, Spread] = field(default_factory=dict)  # of `xd` and `dg`

    @property
    def headline_name(self) -> str:
        """What methods are ranked by: H, the mean over other data sets, or the last score."""
        if self.h is not None:
            return "H"
        return OTHERS if OTHERS in self.scores else list(self.scores)[-1]

    @property
    def headline(self) -> Spread:
        """The one number that methods are ranked by."""
        if self.h is None:
            return self.scores[self.headline_name]
        return Spread(self.h, self.mean_h.deviation if self.mean_h else None)


@dataclass(frozen=True)
class Section:
    """All methods side by side on one data set, or averaged over several.

    summaries: the best first. outcomes: by label, those that are finished and count. draws: what chance
        makes of each method's scores, by label. members: of an average, the data sets' own sections.
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
        """The score that methods are ranked by: see Summary.headline_name."""
        return self.summaries[0].headline_name if self.summaries else ""

    @property
    def subtitle(self) -> str:
        return ", ".join([NAMES[self.protocol], *(f"backbone {name}" for name in _backbones(self.outcomes))])


def sections(outcomes: Sequence[Outcome], published: bool = False) -> list[Section]:
    """The average where there are several data sets, then one section for each; protocol after protocol."""
    made = []
    for protocol in PROTOCOLS:
        mine = [outcome for outcome in outcomes if outcome.protocol == protocol]
        labels = label_methods(mine)
        datasets = in_papers_order({outcome.dataset for outcome in mine})
        single = [_section(protocol, (name,), mine, labels, published) for name in datasets]
        if len(datasets) > 1 and protocol not in TRANSFER:
            average = _section(protocol, tuple(datasets), mine, labels, published)
            noise = averaged(protocol, [part.draws for part in single])
            made.append(replace(average, members=single, draws=noise))
        made += single
    return made


def label_methods(outcomes: Sequence[Outcome]) -> dict[Method, str]:
    """The name of each method, with its trainer, config or shots where it does not tell two apart."""
    alike: dict[tuple[str, str], set[Method]] = defaultdict(set)
    for outcome in outcomes:
        alike[outcome.dataset, outcome.method.label].add(outcome.method)

    def several(of: Callable[[Method], str]) -> set[str]:
        return {label for (_, label), found in alike.items() if len(set(map(of, found))) > 1}

    told = [(several(of), of) for of in (lambda m: m.name, lambda m: m.config, lambda m: f"{m.shots} shots")]

    def name(method: Method) -> str:
        extras = [of(method) for labels, of in told if method.label in labels]
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
    measured = {part for outcome in members for part in outcome.parts}
    done: dict[str, list[Outcome]] = defaultdict(list)
    notes = []
    for outcome in members:
        missing = outcome.missing
        missing += in_papers_order(measured - outcome.parts.keys() - {*missing})
        label = labels[outcome.method]
        where = f"{label}, seed {outcome.seed}" + (
            f" on {dataset_name(outcome.dataset)}" if len(datasets) > 1 else ""
        )
        if not missing:
            done[label].append(outcome)
        elif outcome.failure:
            notes.append(f"{where}: failed and left out: {outcome.failure}")
        else:
            notes.append(f"{where}: not finished and left out, no {', '.join(missing)}")
        if not missing and outcome.failure:
            notes.append(f"{where}: stopped early: {outcome.failure}")
    for label in sorted(done):
        absent = set(datasets) - {outcome.dataset for outcome in done[label]}
        if absent:
            names = ", ".join(map(dataset_name, in_papers_order(absent)))
            notes.append(f"{label}: left out of the average, no result on {names}")
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
    noise = draws(done) if len(datasets) == 1 else {}
    return Section(protocol, datasets, summaries, notes, dict(done), noise)


def _backbones(outcomes: dict[str, list[Outcome]]) -> list[str]:
    parts = [part for runs in outcomes.values() for outcome in runs for part in outcome.parts.values()]
    return sorted({part["backbone"] for part in parts if part.get("backbone")})


def sources(parts: Sequence[Section]) -> list[str]:
    """Where the published figures stand."""
    told = [
        f"{row.label}, {NAMES[section.protocol]}: {row.source}"
        for section in parts
        for row in section.summaries
        if row.source
    ]
    return list(dict.fromkeys(told))


def _differences(done: dict[str, list[Outcome]], datasets: tuple[str, ...]) -> list[str]:
    """What makes a comparison of the methods unequal, and what the runs say of themselves."""
    notes = []
    every_seed = {outcome.seed for runs in done.values() for outcome in runs}
    unequal: dict[str, list[str]] = defaultdict(list)
    for label, runs in done.items():
        for dataset in datasets:
            seeds = {outcome.seed for outcome in runs if outcome.dataset == dataset}
            if missing := _listed(every_seed - seeds):
                where = f" on {dataset_name(dataset)}" if len(datasets) > 1 else ""
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


@functools.cache
def _published() -> Any:
    return read_yaml(Path(__file__).parent / "published.yaml")


def published_summaries(protocol: str, datasets: Sequence[str], targets: set[str]) -> list[Summary]:
    """Published figures of the same data sets (and targets), of the methods that have them all."""
    entries = _published().get("xd" if protocol == "dg" else protocol, [])
    every = {name for entry in entries for name in entry.get("figures", ())}
    rows = []
    for entry in entries:
        figures = entry.get("figures", {})
        h, mean_h = None, None
        if protocol in TRANSFER and {*datasets, *targets} <= figures.keys():
            of = {name: figures[name] for name in targets}
            scores = transfer_scores(datasets[0], figures[datasets[0]], of)
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
