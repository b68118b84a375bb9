"""Run the train.py of another project's checkout as a method, `--methods MaPLe@/path/to/checkout`.

A recipe defines its command line: configs/checkouts/MaPLe.yaml, or dfzsl.yaml in the checkout
(docs/checkouts.md). The checkout remains unchanged; it runs in its own process (host.py), and its log is
converted to results.json.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from dfzsl.configs import CONFIGS
from dfzsl.io.files import digest
from dfzsl.io.results import RESULTS, abbreviate_home, write_result_values
from dfzsl.io.untrusted.yaml_reader import read_yaml
from dfzsl.report.read_runs import read_log
from dfzsl.utils.errors import UserError, one_line, unknown_name

from .host import TRAIN

RECIPES = CONFIGS / "checkouts"
OWN_RECIPE = "dfzsl.yaml"  # recipe in the checkout itself
CONSOLE_LOG = "console.txt"  # console output of train.py, in addition to its own log
QUOTED_LINES = 3  # last lines of the console output in an error message
CHECKPOINT = re.compile(r"model\.pth\.tar-(\d+)")
UNMODIFIED, MODIFIED, NO_GIT = "", "modified", "no git"
CONFIG_PRINTED = re.compile(r"^\*+ Config \*+\n\*+\n(.*?)^(?:Collecting|\*+ System)", re.M | re.S)


@dataclass(frozen=True)
class CheckoutRecipe:
    """Description of how to run a checkout: the keys of a recipe file.

    Attributes:
        trainer: value of --trainer.
        config: config file, a path in the checkout; {dataset} stands for the name of the data set.
        opts: KEY: VALUE pairs of every run.
        cpu: further KEY: VALUE pairs of runs without a GPU.
        load_epoch: value of --load-epoch in a test: last (the last saved one), a number, or own (no flag).
        checkpoint_freq: epochs between checkpoints, from which an interrupted training resumes; 0: it starts
            again. Suitable only if no state but models, optimizers and schedulers persists between epochs.
        dassl: folder in the checkout of a required fork of Dassl, or "".
        images: number of training images, if the log reports another one.
        note: sentence for the tables.
    """

    trainer: str
    config: str
    opts: dict[str, Any] = field(default_factory=dict)
    cpu: dict[str, Any] = field(default_factory=dict)
    load_epoch: int | str = "last"
    checkpoint_freq: int = 0
    dassl: str = ""
    images: int | None = None
    note: str = ""


RECIPE_TYPES: dict[str, Any] = {
    "trainer": str,
    "config": str,
    "opts": dict,
    "cpu": dict,
    "load_epoch": int | str,
    "checkpoint_freq": int,
    "dassl": str,
    "images": int,
    "note": str,
}
# Key of changes for a protocol, data set or number of shots: {"xd": {config: ...}, "base2new shots_1": ...}
CASES_KEY = "when"


@dataclass(frozen=True)
class CodeVersion:
    """Version of the code in a checkout.

    Attributes:
        commit: hash of the commit, or "" without git.
        changes: checksum of the changes since the commit, or without git of all sources; "" if unchanged.
        origin: URL of the git remote, without credentials, or "".
    """

    commit: str
    changes: str
    origin: str

    @property
    def state(self) -> str:
        return NO_GIT if not self.commit else MODIFIED if self.changes else UNMODIFIED

    @property
    def short(self) -> str:
        return "-".join(filter(None, [self.commit[:7], self.state.replace(" ", "-")]))

    @classmethod
    def of(cls, folder: Path) -> CodeVersion:
        """Return the version of the code in a folder."""

        def git(*words: str) -> bytes | None:
            try:
                command = ["git", "-C", str(folder), *words]
                return subprocess.run(command, capture_output=True, check=True).stdout
            except (OSError, subprocess.CalledProcessError):
                return None

        # A folder unpacked inside another project's repository does not belong to that repository.
        tracked = git("ls-files", "--error-unmatch", TRAIN)
        head = git("rev-parse", "HEAD") if tracked else None
        if head is None:
            sources = sorted([*folder.rglob("*.py"), *(folder / "configs").rglob("*.yaml")])
            checksums = [f"{path.relative_to(folder)} {digest(path)}" for path in sources]
            return cls("", _checksum("\n".join(checksums).encode()), "")
        diff = git("diff", "HEAD", "--", ".") or b""
        origin = (git("remote", "get-url", "origin") or b"").decode(errors="replace").strip()
        origin = re.sub(r"(?<=://)[^/@]*@", "", origin)  # remove user and token
        return cls(head.decode().strip(), _checksum(diff) if diff else "", one_line(origin))


@dataclass(frozen=True)
class Checkout:
    """A method given as `NAME@FOLDER[:CONFIG]`: the code in a folder, run by the recipe NAME.

    Attributes:
        recipe_name: name of the recipe file.
        folder: absolute path of the checkout.
        config: name of a config that replaces the recipe's, or "".
        code: version of the code.
    """

    recipe_name: str
    folder: Path
    config: str
    code: CodeVersion

    variant: ClassVar[str] = ""
    trains: ClassVar[bool] = True
    data_free: ClassVar[bool] = False

    @classmethod
    def parse(cls, text: str) -> Checkout | None:
        """Parse a method; return None if it names no folder.

        Raises:
            UserError: the folder is no checkout, or the name has no recipe.
        """
        name, _, place = text.partition("@")
        config = ""
        if ":" in place and not Path(place).expanduser().is_dir():
            place, _, config = place.rpartition(":")
        folder = Path(place).expanduser().resolve()
        if not place or not ("/" in place or "\\" in place or folder.is_dir()):
            return None
        if not folder.is_dir():
            raise UserError(f"{text}: {folder} is not a folder; clone the repository there")
        if not (folder / TRAIN).is_file():
            inside = sorted(path.parent.name for path in folder.glob(f"*/{TRAIN}"))
            hint = f"; there is one in {', '.join(inside)}" if inside else ""
            raise UserError(f"{text}: no {TRAIN} in {folder}{hint}; give the folder that has CoOp's layout")
        recipes = {path.stem.lower(): path.stem for path in RECIPES.glob("*.yaml")}
        checkout = cls(recipes.get(name.lower(), name), folder, config, CodeVersion.of(folder))
        _read_recipe(checkout.recipe_file)
        return checkout

    @property
    def recipe_file(self) -> Path:
        """Recipe file of the checkout, else that of this project. Raises UserError if there is none."""
        for path in (self.folder / OWN_RECIPE, RECIPES / f"{self.recipe_name}.yaml"):
            if path.is_file():
                return path
        error = unknown_name("repository", self.recipe_name, (path.stem for path in RECIPES.glob("*.yaml")))
        raise UserError(
            f"{error}. To add another, write the recipe {self.folder / OWN_RECIPE} with the lines "
            "'trainer: NAME' and 'config: configs/trainers/NAME/FILE.yaml' (docs/checkouts.md)"
        )

    def recipe(self, protocol: str, dataset: str, shots: int) -> CheckoutRecipe:
        """Return the recipe for runs that train on a data set. Raises UserError if its file is invalid."""
        keys = dict(_read_recipe(self.recipe_file))
        labels = {protocol, dataset, f"shots_{shots}"}
        if protocol == "dg":  # dg tests the model that xd trains
            labels.add("xd")
        for case, changes in keys.pop(CASES_KEY, {}).items():
            if set(case.split()) <= labels:
                opts = {**keys.get("opts", {}), **changes.get("opts", {})}
                keys = {**keys, **changes, "opts": opts}
        keys["config"] = keys["config"].replace("{dataset}", dataset)
        if self.config:
            keys["config"] = str(Path(keys["config"]).with_name(f"{self.config}.yaml"))
        return CheckoutRecipe(**keys)

    @property
    def trainer(self) -> str:
        return _read_recipe(self.recipe_file)["trainer"]

    @property
    def name(self) -> str:
        """Folder name of its results; each commit has its own."""
        place = re.sub(r"[^\w.-]", "_", self.folder.name)
        return f"{self.recipe_name}@{place}-{self.code.short}"

    @property
    def provenance(self) -> str:
        """Origin and commit of the code, for the notes below tables."""
        commit = f"commit {self.code.commit[:12]}" if self.code.commit else "not under git"
        place = self.code.origin or abbreviate_home(str(self.folder))
        return f"the code of {place}, {commit}{', modified' if self.code.state == MODIFIED else ''}"

    def config_file(self, recipe: CheckoutRecipe) -> Path:
        return self._file(recipe.config, "config")

    def dataset_config(self, name: str) -> Path:
        return self._file(f"configs/datasets/{name}.yaml", "data set")

    def _file(self, path: str, kind: str) -> Path:
        if (self.folder / path).is_file():
            return self.folder / path
        place = (self.folder / path).parent
        files = sorted(path.stem for path in place.glob("*.yaml"))
        raise UserError(
            f"{self.recipe_name}: the checkout {self.folder} has no {kind} {path}; files in "
            f"{place.name}/: {', '.join(files) or 'none'}"
        )

    def identity(self, recipe: CheckoutRecipe, dataset: str, root: str) -> str:
        """Return the part of a run's identity beside its KEY VALUE pairs: folder, code, configs and data."""
        files = [self.config_file(recipe), self.dataset_config(dataset)]
        text = repr([recipe, *map(digest, files)])
        # The class was named Recipe when existing settings.txt files were written.
        configs = _checksum(text.replace(CheckoutRecipe.__name__, "Recipe", 1).encode())
        code = " ".join(filter(None, [self.code.commit or NO_GIT, self.code.changes]))
        return f"of {self.folder} ({code}) with {recipe.config} ({configs}) on {Path(root).absolute()}"

    def key_values(self, recipe: CheckoutRecipe, seed: int) -> list[str]:
        """Return the KEY VALUE pairs of every run: those of its recipe, and those needed to read its log."""
        required = {"TEST.PER_CLASS_RESULT": True, "TRAIN.CHECKPOINT_FREQ": recipe.checkpoint_freq}
        opts = {key: value for key, value in required.items() if value}
        # CoOp ignores --seed 0.
        return to_arguments(opts | recipe.opts | ({} if seed else {"SEED": 0}))

    @staticmethod
    def with_absolute_paths(arguments: Sequence[str]) -> list[str]:
        """Return arguments of train.py with absolute paths, because it runs in another folder."""
        previous = ["", *arguments]
        paths = ("--root", "--output-dir", "--model-dir")
        return [
            os.path.abspath(word) if flag in paths else word
            for flag, word in zip(previous, arguments, strict=False)
        ]

    def backbone(self, recipe: CheckoutRecipe, opts: Sequence[str]) -> str:
        """Return the name of the backbone that it will load, in CoOp's spelling."""
        values = {**recipe.opts, **dict(zip(opts[::2], opts[1::2], strict=True))}
        if (name := values.get("MODEL.BACKBONE.NAME")) is None:
            config = read_yaml(self.config_file(recipe))
            model = config.get("MODEL") if isinstance(config, dict) else None
            name = ((model or {}).get("BACKBONE") or {}).get("NAME", "")
        return str(name)

    def run(
        self, folder: Path, arguments: Sequence[str], recipe: CheckoutRecipe, fields: Mapping[str, Any]
    ) -> None:
        """Run train.py and write folder/results.json.

        Args:
            folder: output folder.
            arguments: arguments of train.py.
            recipe: recipe of the run.
            fields: fields of results.json that identify the run.

        Raises:
            UserError: train.py failed (with its last console lines), or the checkout was changed.
        """
        current = CodeVersion.of(self.folder)
        git_missing = self.code.commit and not current.commit  # as on some nodes of a cluster
        if current != self.code and not git_missing:
            raise UserError(f"{self.folder} changed during the sweep; start the sweep again")
        words = list(arguments)
        if "--model-dir" in words:
            place = words.index("--model-dir") + 1
            words[place + 1 : place + 1] = _load_epoch(recipe, Path(words[place]))
        cpu_opts = {} if torch.cuda.is_available() else recipe.cpu
        cpu_arguments = to_arguments({key: value for key, value in cpu_opts.items() if key not in words})
        words += cpu_arguments
        started = time.perf_counter()
        self._process(folder.absolute(), words, recipe)
        results, failure = read_log(folder)
        if results is None:
            reason = failure or "it wrote no log.txt"
            raise UserError(
                f"{self.folder / TRAIN} ended without a test result ({reason}); see {folder / CONSOLE_LOG}"
            )
        for row in results["per_class"]:
            row["new"] = fields["classes"] == "new"
        trains = "--eval-only" not in words
        images = results.get("images_used", 0) if recipe.images is None else recipe.images
        notes = [
            self.provenance,
            recipe.note,
            f"without a GPU, so {' '.join(cpu_arguments)}" if cpu_arguments else "",
        ]
        write_result_values(
            folder / RESULTS,
            **fields,
            accuracy=results["accuracy"],
            per_class=results["per_class"],
            images_used=images if trains else 0,
            queries=0,
            seconds=results.get("seconds", {}),
            elapsed=time.perf_counter() - started,
            notes=[note for note in notes if note],
            config=_config_printed(folder),
        )

    def _process(self, folder: Path, words: Sequence[str], recipe: CheckoutRecipe) -> None:
        fork = str(self.folder / recipe.dassl) if recipe.dassl else ""
        host = [sys.executable, "-m", "dfzsl.launch.host", str(folder), fork, str(recipe.checkpoint_freq)]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / CONSOLE_LOG, "w", encoding="utf-8") as console:
            process = subprocess.Popen(
                [*host, *words],
                cwd=self.folder,
                env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
            )
            try:
                process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
        if process.returncode:
            lines = (folder / CONSOLE_LOG).read_text(encoding="utf-8", errors="replace").splitlines()
            last = " | ".join([line.strip() for line in lines if line.strip()][-QUOTED_LINES:])
            killed = process.returncode == -signal.SIGKILL
            status = (
                "was killed, probably because memory ran out (see dmesg)"
                if killed
                else f"ended with code {process.returncode}"
            )
            raise UserError(
                f"{self.folder / TRAIN} {status}: "
                f"{last or 'no output'} (complete output: {folder / CONSOLE_LOG})"
            )


def to_arguments(opts: Mapping[str, Any]) -> list[str]:
    """Return KEY VALUE pairs as command-line arguments."""
    return [str(word) for pair in opts.items() for word in pair]


@functools.cache
def _read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe file with its cases. Raises UserError if it is invalid."""
    keys: Any = read_yaml(path)
    cases = (keys.get(CASES_KEY) or {}) if isinstance(keys, dict) else {}
    parts = [keys, *(cases.values() if isinstance(cases, dict) else [cases])]
    if not all(isinstance(part, dict) for part in parts) or not {"trainer", "config"} <= keys.keys():
        raise UserError(
            f"{path}: not a recipe: it needs 'trainer: NAME' and 'config: PATH', see docs/checkouts.md"
        )
    for part in parts:
        for key, value in part.items():
            if key not in (RECIPE_TYPES if part is not keys else {*RECIPE_TYPES, CASES_KEY}):
                raise unknown_name(f"key in {path}:", str(key), [*RECIPE_TYPES, CASES_KEY])
            if key in RECIPE_TYPES and not isinstance(value, RECIPE_TYPES[key]):
                raise UserError(f"{path}: {key} must not be {value!r}")
    return keys


def _load_epoch(recipe: CheckoutRecipe, trained: Path) -> list[str]:
    """Return the --load-epoch flag of a test. Raises UserError if training saved no checkpoint."""
    if recipe.load_epoch == "own":
        return []
    if recipe.load_epoch != "last":
        return ["--load-epoch", str(recipe.load_epoch)]
    saved = [path.read_text(encoding="utf-8").strip() for path in sorted(trained.glob("*/checkpoint"))]
    if not saved:
        raise UserError(f"{trained}: training saved no checkpoint; delete its {RESULTS} to train again")
    # Dassl saves the best checkpoint on validation under another name, and loads it without the flag.
    epoch = CHECKPOINT.fullmatch(saved[0])
    return ["--load-epoch", epoch[1]] if epoch else []


def _config_printed(folder: Path) -> str:
    """Return the config that train.py printed into its log, or ""."""
    logs = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("log.txt*"))]
    match = CONFIG_PRINTED.search(logs[-1]) if logs else None
    return match[1] if match else ""


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
