"""What was measured: one Outcome a method, data set and seed, from results.json files or from CoOp's logs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfzsl.io.results import RESULTS, per_class_mean, read_results
from dfzsl.utils.errors import UNPRINTABLE, UserError, one_line

from .method_names import method_name

# The folders (parts) of a protocol: where it trains, and where it tests what was trained.
PROTOCOLS = {
    "base2new": ("train_base", "test_new"),
    "gzsl": ("train_base", "test_all"),
    "xd": ("train_all", "test_all"),
    "dg": ("train_all", "test_all"),
    "fewshot": ("train_all",),
}
PAIRED = ("base2new", "gzsl")  # two scores, and H of them
TRANSFER = ("xd", "dg")  # a data set to train on and targets to test on

Scores = dict[str, float]


@dataclass(frozen=True, order=True)
class Method:
    """A trainer (`CoOp`, `CoOp@virtual`, `MaPLe@checkout-904dbd7`) with its shots and its config."""

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
    """One method on one data set with one seed.

    parts: what each part measured, {"train_base": results, "test_new": results}; `xd` and `dg` have one
        entry for training and one for each target data set, `fewshot` one for each "N shots".
    failure: why the run stopped, "" where it did not.
    """

    protocol: str
    dataset: str
    method: Method
    seed: int
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    failure: str = ""

    @property
    def training(self) -> dict[str, Any]:
        """The results of the part that trained, on the most images; it must not be missing."""
        if self.protocol == "fewshot":
            return self.parts[max(self.parts, key=shots_in)]
        return self.parts[PROTOCOLS[self.protocol][0]]

    @property
    def missing(self) -> list[str]:
        """The parts that have no results, as far as the protocol alone says which are due."""
        if self.protocol == "fewshot":
            return []
        due = PROTOCOLS[self.protocol][: 1 if self.protocol in TRANSFER else 2]
        return [part for part in due if part not in self.parts]

    @property
    def targets(self) -> Scores:
        """Accuracy in percent on each target of `xd` and `dg`; empty in other protocols."""
        if self.protocol not in TRANSFER:
            return {}
        return {part: run["accuracy"] for part, run in self.parts.items() if part != "train_all"}

    def classes(self) -> dict[str, list[dict[str, Any]]]:
        """The rows of classes (`per_class` of results) behind each score, and behind each target."""
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
        """The protocol's scores in percent; nothing may be missing.

        base2new: base, new. gzsl: seen S, unseen U (means over classes). xd, dg: source and means over
        targets. fewshot: each number of shots.
        """
        if self.protocol == "base2new":
            return {"base": self.parts["train_base"]["accuracy"], "new": self.parts["test_new"]["accuracy"]}
        if self.protocol == "gzsl":
            return {name: per_class_mean(rows) for name, rows in self.classes().items()}
        if self.protocol == "fewshot":
            return {part: self.parts[part]["accuracy"] for part in sorted(self.parts, key=shots_in)}
        return transfer_scores(self.dataset, self.parts["train_all"]["accuracy"], self.targets)


def shots_in(part: str) -> float:
    """The number in "16 shots"; infinite for "all shots"."""
    number = part.split()[0]
    return float(number) if number.isdecimal() else float("inf")


def transfer_scores(dataset: str, source: Any, targets: dict[str, Any]) -> dict[str, Any]:
    """The scores of `xd` and `dg`: accuracy on the source `dataset`, means over other data sets and over
    shifted sources, whose names start with the source's, as imagenet_a does with imagenet.

    Accuracies are numbers or arrays of equal shape.
    """
    others = [value for name, value in targets.items() if not name.startswith(dataset)]
    shifted = [value for name, value in targets.items() if name.startswith(dataset)]
    scores = {"source": source}
    scores |= {"other data sets": sum(others) / len(others)} if others else {}
    return scores | ({"shifted source": sum(shifted) / len(shifted)} if shifted else {})


def protocol_folders(folder: Path) -> list[tuple[str, Path]]:
    """(protocol, its folder) for an output folder or for the folder of one protocol; [] for any other."""
    parts = {part for pair in PROTOCOLS.values() for part in pair}
    found = []
    for path in [folder, *sorted(child for child in folder.iterdir() if child.is_dir())]:
        present = parts & {child.name for child in path.iterdir()}
        if path.name in PROTOCOLS and present:
            found.append((path.name, path))
        elif present:
            by_parts = "xd" if "train_all" in present else "gzsl" if "test_all" in present else "base2new"
            found.append((by_parts, path))
    return found


def collect(folder: Path) -> list[Outcome]:
    """Every outcome below an output folder or a protocol's folder, in order of data set, method and seed.

    Raises UserError when there is none, and for a results.json that is broken or of another schema.
    """
    return _gather(folder, _read_run, "results")


def collect_logs(folder: Path) -> list[Outcome]:
    """Every outcome of a tree of CoOp's logs, train_base/DATASET/shots_16/TRAINER/CONFIG/seed1/log.txt.

    Raises UserError when there is none.
    """
    return _gather(folder, read_log, "logs of CoOp")


def _gather(
    folder: Path, read: Callable[[Path], tuple[dict[str, Any] | None, str]], what: str
) -> list[Outcome]:
    """The outcomes below `folder`; `read` gives a run's results and why it failed, from its own folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give an output folder, such as output or output/base2new")
    found: dict[tuple[str, str, Method, int], Outcome] = {}
    for protocol, root in protocol_folders(folder):
        for run in sorted(root.glob("*/*/shots_*/*/*/seed*")):
            part, dataset, shots, name, config, seed = map(one_line, run.relative_to(root).parts)
            if part not in PROTOCOLS[protocol] or not re.fullmatch("seed[0-9]{1,9}", seed):
                continue
            results, failure = read(run)
            if results is None and not failure:
                continue
            of, shots = dataset, shots.removeprefix("shots_")
            if protocol in TRANSFER:
                of, part = _source(root), dataset if part == "test_all" else part
            elif protocol == "fewshot":
                part, shots = f"{shots} shot{'' if shots == '1' else 's'}", ""
            key = protocol, of, Method(name, shots, config, read is read_log), int(seed[4:])
            outcome = found.setdefault(key, Outcome(*key))
            if results is not None:
                outcome.parts[part] = results
            outcome.failure = outcome.failure or failure
    if not found:
        raise UserError(f"{folder}: no {what} here; give an output folder, such as output or output/base2new")
    outcomes = [found[key] for key in sorted(found)]
    _repeat_without_images(outcomes)
    return outcomes


def _repeat_without_images(outcomes: Sequence[Outcome]) -> None:
    """What sees no image in `fewshot` ("0 shots") has the same results at every number the others have."""
    few = [outcome for outcome in outcomes if outcome.protocol == "fewshot"]
    for outcome in few:
        numbers = {part for other in few if other.dataset == outcome.dataset for part in other.parts}
        if outcome.parts.keys() == {"0 shots"} != numbers:
            outcome.parts = dict.fromkeys(numbers - {"0 shots"}, outcome.parts["0 shots"])


def _source(root: Path) -> str:
    """The data set that the runs of a folder with targets train on."""
    names = sorted(path.name for path in root.glob("train_all/*"))
    if len(names) > 1:
        raise UserError(f"{root}: runs of several sources share their tests' folders: {', '.join(names)}")
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


def _list_of(is_right: Check) -> Check:
    return lambda values: isinstance(values, list) and all(map(is_right, values))


def _dict_of(is_right: Check) -> Check:
    return lambda values: isinstance(values, dict) and all(map(is_right, values.values()))


def _row_of(**checks: Check) -> Check:
    return lambda row: isinstance(row, dict) and all(check(row.get(name)) for name, check in checks.items())


FIELDS: dict[str, Check] = {
    "accuracy": lambda value: _is_number(value) and 0 <= value <= 100,
    "per_class": _list_of(
        _row_of(**{"class": _is_text}, correct=_is_count, total=_is_count, new=_is_bool),
    ),
    "images_used": _is_count,
    "queries": _is_count,
    "seconds": _dict_of(_is_number),
    "notes": _list_of(_is_text),
}
OPTIONAL: dict[str, Check] = {
    "backbone": _is_text,
    "trained_parameters": _is_count,
    "versions": _dict_of(_is_text),
    "curves": _dict_of(_list_of(_is_number)),
}


def _read_run(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """(results, failure) of one run of ours."""
    path, failed = folder / RESULTS, folder / "failed.txt"
    failure = one_line(failed.read_text(encoding="utf-8", errors="replace")) if failed.exists() else ""
    if not path.exists():
        return None, failure
    results = read_results(path)
    broken = [name for name, is_right in FIELDS.items() if not is_right(results.get(name))]
    broken += [name for name, is_right in OPTIONAL.items() if name in results and not is_right(results[name])]
    if broken:
        raise UserError(f"{path}: a broken results file, see {', '.join(broken)}; run it again")
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
    """(results, failure) of one run of CoOp: the last of its log files that comes to a test result."""
    failure = ""
    for path in sorted(folder.glob("log.txt*"), reverse=True):
        results = parse_log(path.read_text(encoding="utf-8", errors="replace"))
        if results:
            return results, ""
        failure = f"{path.name} ends before a test result"
    return None, failure


def parse_log(text: str) -> dict[str, Any] | None:
    """Results from the text of a log of CoOp; None where the run did not come to its test.

    A run that trains tests on validation images between its epochs, so that only what stands after
    "Finish training" is its test result. Rows of classes are those that TEST.PER_CLASS_RESULT prints; which
    of them are `new` a log does not tell.
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
    total, correct = (_number(found[1]) if (found := of.search(last)) else 0 for of in (TOTAL, CORRECT))
    # What is printed has one digit after the point.
    if total and abs(100 * correct / total - results["accuracy"]) < 0.06:
        results["accuracy"] = 100 * correct / total
    results["per_class"] = [
        {"class": one_line(name), "correct": _number(right), "total": _number(of), "new": False}
        for name, of, right in CLASS.findall(last)
    ]
    if ended and (elapsed := ELAPSED.search(after)):
        days, hours, minutes, seconds = (int(part or 0) for part in elapsed.groups())
        results["seconds"] = {"train": ((days * 24 + hours) * 60 + minutes) * 60 + seconds}
    if ended and (images := IMAGES.search(text)):
        results["images_used"] = _number(images[1])
    return results


def _number(printed: str) -> int:
    return int(printed.replace(",", ""))
