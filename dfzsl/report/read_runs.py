"""Collect results of runs, one Outcome per method, data set and seed, from results.json or CoOp's logs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfzsl.io.results import RESULTS, per_class_mean, read_results
from dfzsl.utils.errors import UNPRINTABLE, UserError, one_line

from .method_names import method_name

# The folders (parts) of each protocol: that of training, and those of further tests of the trained model.
PROTOCOL_PARTS = {
    "base2new": ("train_base", "test_new"),
    "gzsl": ("train_base", "test_all"),
    "xd": ("train_all", "test_all"),
    "dg": ("train_all", "test_all"),
    "fewshot": ("train_all",),
}
PAIRED = ("base2new", "gzsl")  # protocols with two scores and their harmonic mean H
TRANSFER = ("xd", "dg")  # protocols with one training data set and several target data sets

Scores = dict[str, float]


@dataclass(frozen=True, order=True)
class MethodKey:
    """A method as the folders of results identify it.

    Attributes:
        name: trainer, e.g. `CoOp`, `CoOp@virtual` or `MaPLe@checkout-904dbd7`.
        shots: training images per class, or "all".
        config: name of its config file.
        from_log: whether its results come from logs of CoOp.
    """

    name: str
    shots: str
    config: str
    from_log: bool = False

    @property
    def label(self) -> str:
        trainer, _, source = self.name.partition("@")
        name = method_name(trainer, self.config)
        return name + (f" ({source})" if source else "") + (" (log)" if self.from_log else "")


@dataclass
class Outcome:
    """Results of one method on one data set with one seed.

    Attributes:
        protocol: key of `PROTOCOL_PARTS`.
        dataset: data set that the method trains on.
        method: trainer, shots and config.
        seed: seed of the run.
        parts: results of each part, {"train_base": results, "test_new": results}; `xd` and `dg` have one
            entry for training and one for each target data set, `fewshot` one for each "N shots".
        failure: message of the error that stopped the run, or "".
    """

    protocol: str
    dataset: str
    method: MethodKey
    seed: int
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    failure: str = ""

    @property
    def training(self) -> dict[str, Any]:
        """Results of the training part, for `fewshot` that with the most images; it must exist."""
        if self.protocol == "fewshot":
            return self.parts[max(self.parts, key=shots_in)]
        return self.parts[PROTOCOL_PARTS[self.protocol][0]]

    @property
    def missing(self) -> list[str]:
        """Parts without results, among those that the protocol alone determines."""
        if self.protocol == "fewshot":
            return []
        required = PROTOCOL_PARTS[self.protocol][: 1 if self.protocol in TRANSFER else 2]
        return [part for part in required if part not in self.parts]

    @property
    def targets(self) -> Scores:
        """Accuracy in percent on each target of `xd` and `dg`; empty in other protocols."""
        if self.protocol not in TRANSFER:
            return {}
        return {part: run["accuracy"] for part, run in self.parts.items() if part != "train_all"}

    def classes(self) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of classes (`per_class` of results) of each score and each target."""
        if self.protocol == "base2new":
            named = {"base": "train_base", "new": "test_new"}
            return {name: self.parts[part]["per_class"] for name, part in named.items()}
        if self.protocol == "gzsl":
            rows = self.parts["test_all"]["per_class"]
            named_rows = (("seen S", False), ("unseen U", True))
            return {name: [row for row in rows if row["new"] == new] for name, new in named_rows}
        if self.protocol == "fewshot":
            return {part: self.parts[part]["per_class"] for part in sorted(self.parts, key=shots_in)}
        return {"source" if p == "train_all" else p: run["per_class"] for p, run in self.parts.items()}

    def scores(self) -> Scores:
        """Return the scores of the protocol in percent; no part may be missing.

        Returns:
            base2new: base, new. gzsl: seen S, unseen U (means over classes). xd, dg: source and means over
            targets. fewshot: one score for each number of shots.
        """
        if self.protocol == "base2new":
            return {"base": self.parts["train_base"]["accuracy"], "new": self.parts["test_new"]["accuracy"]}
        if self.protocol == "gzsl":
            return {name: per_class_mean(rows) for name, rows in self.classes().items()}
        if self.protocol == "fewshot":
            return {part: self.parts[part]["accuracy"] for part in sorted(self.parts, key=shots_in)}
        return transfer_scores(self.dataset, self.parts["train_all"]["accuracy"], self.targets)


def shots_in(part: str) -> float:
    """Return the number in "16 shots"; infinity for "all shots"."""
    number = part.split()[0]
    return float(number) if number.isdecimal() else float("inf")


def transfer_scores(dataset: str, source: Any, targets: dict[str, Any]) -> dict[str, Any]:
    """Return the scores of `xd` and `dg`.

    Args:
        dataset: name of the source. A target whose name starts with it (imagenet_a) is a shifted source.
        source: accuracy on the source, a number or an array.
        targets: accuracy on each target, of the same shape.

    Returns:
        The source's accuracy, and the means over other data sets and over shifted sources.
    """
    others = [value for name, value in targets.items() if not name.startswith(dataset)]
    shifted = [value for name, value in targets.items() if name.startswith(dataset)]
    scores = {"source": source}
    scores |= {"other data sets": sum(others) / len(others)} if others else {}
    return scores | ({"shifted source": sum(shifted) / len(shifted)} if shifted else {})


def protocol_folders(folder: Path) -> list[tuple[str, Path]]:
    """Return (protocol, folder) pairs below an output folder, or for the folder of one protocol."""
    parts = {part for pair in PROTOCOL_PARTS.values() for part in pair}
    folders = []
    for path in [folder, *sorted(child for child in folder.iterdir() if child.is_dir())]:
        present = parts & {child.name for child in path.iterdir()}
        if path.name in PROTOCOL_PARTS and present:
            folders.append((path.name, path))
        elif present:
            protocol = "xd" if "train_all" in present else "gzsl" if "test_all" in present else "base2new"
            folders.append((protocol, path))
    return folders


def collect(folder: Path) -> list[Outcome]:
    """Return all outcomes below an output folder or the folder of a protocol.

    Returns:
        Outcomes in order of protocol, data set, method and seed.

    Raises:
        UserError: there is no result, or a results.json is invalid or has another schema.
    """
    return _gather(folder, _read_run, "results")


def collect_logs(folder: Path) -> list[Outcome]:
    """Return all outcomes of a tree of CoOp's logs.

    Args:
        folder: folder with train_base/DATASET/shots_16/TRAINER/CONFIG/seed1/log.txt, or a parent of it.

    Raises:
        UserError: there is no log.
    """
    return _gather(folder, read_log, "logs of CoOp")


def _gather(
    folder: Path, read: Callable[[Path], tuple[dict[str, Any] | None, str]], kind: str
) -> list[Outcome]:
    """Return the outcomes below `folder`; `read` returns (results, failure message) of a run's folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give an output folder, e.g. output or output/base2new")
    by_key: dict[tuple[str, str, MethodKey, int], Outcome] = {}
    for protocol, root in protocol_folders(folder):
        for run in sorted(root.glob("*/*/shots_*/*/*/seed*")):
            part, dataset, shots, name, config, seed = map(one_line, run.relative_to(root).parts)
            if part not in PROTOCOL_PARTS[protocol] or not re.fullmatch("seed[0-9]{1,9}", seed):
                continue
            results, failure = read(run)
            if results is None and not failure:
                continue
            source, shots = dataset, shots.removeprefix("shots_")
            if protocol in TRANSFER:
                source, part = _source(root), dataset if part == "test_all" else part
            elif protocol == "fewshot":
                part, shots = f"{shots} shot{'' if shots == '1' else 's'}", ""
            key = protocol, source, MethodKey(name, shots, config, read is read_log), int(seed[4:])
            outcome = by_key.setdefault(key, Outcome(*key))
            if results is not None:
                outcome.parts[part] = results
            outcome.failure = outcome.failure or failure
    if not by_key:
        raise UserError(f"{folder}: no {kind} here; give an output folder, e.g. output or output/base2new")
    outcomes = [by_key[key] for key in sorted(by_key)]
    _repeat_zero_shots(outcomes)
    return outcomes


def _repeat_zero_shots(outcomes: Sequence[Outcome]) -> None:
    """Repeat the `fewshot` results of methods without images ("0 shots") at every number of shots."""
    fewshot = [outcome for outcome in outcomes if outcome.protocol == "fewshot"]
    for outcome in fewshot:
        numbers = {part for other in fewshot if other.dataset == outcome.dataset for part in other.parts}
        if outcome.parts.keys() == {"0 shots"} != numbers:
            outcome.parts = dict.fromkeys(numbers - {"0 shots"}, outcome.parts["0 shots"])


def _source(root: Path) -> str:
    """Return the training data set of a folder of `xd` or `dg`."""
    names = sorted(path.name for path in root.glob("train_all/*"))
    if len(names) > 1:
        raise UserError(f"{root}: the folder has runs from several training data sets: {', '.join(names)}")
    return names[0] if names else "unknown source"


Check = Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e15 < value < 1e15


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1e15


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not UNPRINTABLE.search(value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _list_of(is_valid: Check) -> Check:
    return lambda values: isinstance(values, list) and all(map(is_valid, values))


def _dict_of(is_valid: Check) -> Check:
    return lambda values: isinstance(values, dict) and all(map(is_valid, values.values()))


def _row_of(**checks: Check) -> Check:
    return lambda row: isinstance(row, dict) and all(check(row.get(name)) for name, check in checks.items())


REQUIRED_FIELDS: dict[str, Check] = {
    "accuracy": lambda value: _is_number(value) and 0 <= value <= 100,
    "per_class": _list_of(
        _row_of(**{"class": _is_text}, correct=_is_count, total=_is_count, new=_is_bool),
    ),
    "images_used": _is_count,
    "queries": _is_count,
    "seconds": _dict_of(_is_number),
    "notes": _list_of(_is_text),
}
OPTIONAL_FIELDS: dict[str, Check] = {
    "backbone": _is_text,
    "trained_parameters": _is_count,
    "versions": _dict_of(_is_text),
    "curves": _dict_of(_list_of(_is_number)),
}


def _read_run(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Return (results, failure message) of a run with results.json or failed.txt."""
    path, failed = folder / RESULTS, folder / "failed.txt"
    failure = one_line(failed.read_text(encoding="utf-8", errors="replace")) if failed.exists() else ""
    if not path.exists():
        return None, failure
    results = read_results(path)
    invalid = [name for name, is_valid in REQUIRED_FIELDS.items() if not is_valid(results.get(name))]
    invalid += [
        name for name, is_valid in OPTIONAL_FIELDS.items() if name in results and not is_valid(results[name])
    ]
    if invalid:
        raise UserError(f"{path}: invalid {', '.join(invalid)}; delete the file and repeat the run")
    return results, failure


ACCURACY = re.compile(r"\* accuracy: (100(?:\.0+)?|\d\d?(?:\.\d+)?)%", re.ASCII)
TOTAL = re.compile(r"^\* total: (\d[\d,]{0,14})$", re.ASCII | re.MULTILINE)
CORRECT = re.compile(r"^\* correct: (\d[\d,]{0,14})$", re.ASCII | re.MULTILINE)
CLASS = re.compile(
    r"^\* class: \d+ \((.*)\)\s+total: (\d[\d,]{0,14})\s+correct: (\d[\d,]{0,14})\s+acc: ",
    re.ASCII | re.MULTILINE,
)
TRAINING_ENDED = re.compile(r"Finish\w* training")
TRAINING = re.compile(r"^epoch \[\d+/\d+\]", re.MULTILINE)
ELAPSED = re.compile(r"Elapsed: (?:(\d{1,5}) days?, )?(\d{1,5}):(\d\d):(\d\d)", re.ASCII)
IMAGES = re.compile(r"# train_x\s+(\d[\d,]{0,14})", re.ASCII)


def read_log(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Return (results, failure message) of a run of CoOp, from its latest log with a test result."""
    failure = ""
    for path in sorted(folder.glob("log.txt*"), reverse=True):
        results = parse_log(path.read_text(encoding="utf-8", errors="replace"))
        if results:
            return results, ""
        failure = f"{path.name} ends before a test result"
    return None, failure


def parse_log(text: str) -> dict[str, Any] | None:
    """Return the results in the text of a log of CoOp, None if the run did not reach its test.

    Training prints accuracies on validation images between epochs, so only the text after "Finish training"
    holds the test result. TEST.PER_CLASS_RESULT prints the rows of classes; a log does not contain which of
    them are `new`.
    """
    ended = TRAINING_ENDED.search(text)
    if TRAINING.search(text) and not ended:
        return None
    after = text[ended.end() :] if ended else text[max(text.find("=> result"), 0) :]
    accuracies = ACCURACY.findall(after)
    if not accuracies:
        return None
    results: dict[str, Any] = {"accuracy": float(accuracies[-1]), "notes": []}
    last = after[after.rfind("=> result") :]
    total, correct = (
        _number(match[1]) if (match := pattern.search(last)) else 0 for pattern in (TOTAL, CORRECT)
    )
    # The printed accuracy has one decimal; the counts give the exact one.
    if total and abs(100 * correct / total - results["accuracy"]) < 0.06:
        results["accuracy"] = 100 * correct / total
    results["per_class"] = [
        {"class": one_line(name), "correct": _number(right), "total": _number(tested), "new": False}
        for name, tested, right in CLASS.findall(last)
    ]
    if ended and (elapsed := ELAPSED.search(after)):
        days, hours, minutes, seconds = (int(part or 0) for part in elapsed.groups())
        results["seconds"] = {"train": ((days * 24 + hours) * 60 + minutes) * 60 + seconds}
    if ended and (images := IMAGES.search(text)):
        results["images_used"] = _number(images[1])
    return results


def _number(printed: str) -> int:
    return int(printed.replace(",", ""))
