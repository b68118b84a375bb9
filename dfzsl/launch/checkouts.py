"""Somebody else's code as a method: `--methods MaPLe@/path/to/checkout` runs the checkout's own train.py.

A recipe says how, configs/checkouts/MaPLe.yaml or the checkout's own dfzsl.yaml (docs/checkouts.md). The
checkout is not changed: it runs in a process of its own (host.py), its log becomes results.json.
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
OWN = "dfzsl.yaml"  # a recipe that the checkout brings
CONSOLE = "console.txt"  # what train.py said, beside the log that it writes itself
QUOTED = 3  # lines of it in an error
CHECKPOINT = re.compile(r"model\.pth\.tar-(\d+)")
PLAIN, MODIFIED, NO_GIT = "", "modified", "no git"
CONFIG_PRINTED = re.compile(r"^\*+ Config \*+\n\*+\n(.*?)^(?:Collecting|\*+ System)", re.M | re.S)


@dataclass(frozen=True)
class Recipe:
    """How to run a checkout: the keys of a recipe file.

    trainer: what its --trainer is called. config: its config file, a path in the checkout; {dataset} in it is
    the data set's name. opts: KEY: VALUE for every run; cpu: more of them where there is no GPU.
    load_epoch: what --load-epoch is in a test: last (saved in training), a number, or own (no such flag).
    checkpoint_freq: save every so many epochs, so that an interrupted training goes on. Only where nothing
    but models, optimizers and schedulers goes on from epoch to epoch; otherwise it starts anew.
    dassl: the folder, in the checkout, of a fork of Dassl that it cannot do without.
    images: how many it trains on, where that is not what its log says. note: a sentence for the tables.
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


KINDS: dict[str, Any] = {"trainer": str, "config": str, "opts": dict, "cpu": dict, "load_epoch": int | str}
KINDS |= {"checkpoint_freq": int, "dassl": str, "images": int, "note": str}
CASES = "when"  # {"xd": {config: ...}, "base2new imagenet": ...}: changes for a protocol, data set, shots_1


@dataclass(frozen=True)
class Code:
    """What a checkout holds: its commit with what was changed since, or the files themselves."""

    commit: str  # "" without git
    changes: str  # checksum of what differs from the commit; of the sources where there is none
    origin: str

    @property
    def state(self) -> str:
        return NO_GIT if not self.commit else MODIFIED if self.changes else PLAIN

    @property
    def short(self) -> str:
        return "-".join(filter(None, [self.commit[:7], self.state.replace(" ", "-")]))

    @classmethod
    def of(cls, folder: Path) -> Code:
        def git(*words: str) -> bytes | None:
            try:
                command = ["git", "-C", str(folder), *words]
                return subprocess.run(command, capture_output=True, check=True).stdout
            except (OSError, subprocess.CalledProcessError):
                return None

        # A folder that was unpacked within another project's repository is none of its.
        known = git("ls-files", "--error-unmatch", TRAIN)
        head = git("rev-parse", "HEAD") if known else None
        if head is None:
            sources = sorted([*folder.rglob("*.py"), *(folder / "configs").rglob("*.yaml")])
            held = [f"{path.relative_to(folder)} {digest(path)}" for path in sources]
            return cls("", _checksum("\n".join(held).encode()), "")
        changed = git("diff", "HEAD", "--", ".") or b""
        origin = (git("remote", "get-url", "origin") or b"").decode(errors="replace").strip()
        origin = re.sub(r"(?<=://)[^/@]*@", "", origin)  # no user, no token
        return cls(head.decode().strip(), _checksum(changed) if changed else "", one_line(origin))


@dataclass(frozen=True)
class Checkout:
    """A method that is the code in a folder: `NAME@FOLDER[:CONFIG]`, by the recipe of that name."""

    recipe_name: str
    folder: Path
    config: str
    code: Code

    variant: ClassVar[str] = ""
    trains: ClassVar[bool] = True
    data_free: ClassVar[bool] = False

    @classmethod
    def parse(cls, given: str) -> Checkout | None:
        """None for what names no folder. Raises UserError for a folder that is no checkout, and for a name
        without a recipe."""
        name, _, place = given.partition("@")
        config = ""
        if ":" in place and not Path(place).expanduser().is_dir():
            place, _, config = place.rpartition(":")
        folder = Path(place).expanduser().resolve()
        if not place or not ("/" in place or "\\" in place or folder.is_dir()):
            return None
        if not folder.is_dir():
            raise UserError(f"{given}: {folder} is no folder; clone the repository there")
        if not (folder / TRAIN).is_file():
            inside = sorted(path.parent.name for path in folder.glob(f"*/{TRAIN}"))
            told = f"; there is one in {', '.join(inside)}" if inside else ""
            raise UserError(f"{given}: no {TRAIN} in {folder}{told}; name the folder of CoOp's layout")
        known = {path.stem.lower(): path.stem for path in RECIPES.glob("*.yaml")}
        made = cls(known.get(name.lower(), name), folder, config, Code.of(folder))
        _book(made.recipe_file)
        return made

    @property
    def recipe_file(self) -> Path:
        for path in (self.folder / OWN, RECIPES / f"{self.recipe_name}.yaml"):
            if path.is_file():
                return path
        error = unknown_name("repository", self.recipe_name, (path.stem for path in RECIPES.glob("*.yaml")))
        raise UserError(
            f"{error}. Another one needs a recipe: write {self.folder / OWN} with the lines 'trainer: NAME' "
            "and 'config: configs/trainers/NAME/FILE.yaml' (docs/checkouts.md)"
        )

    def recipe(self, protocol: str, dataset: str, shots: int) -> Recipe:
        """For runs that train on a data set. Raises UserError for a mistake in its file."""
        keys = dict(_book(self.recipe_file))
        here = {protocol, dataset, f"shots_{shots}"}
        if protocol == "dg":  # of the same model
            here.add("xd")
        for case, changes in keys.pop(CASES, {}).items():
            if set(case.split()) <= here:
                opts = {**keys.get("opts", {}), **changes.get("opts", {})}
                keys = {**keys, **changes, "opts": opts}
        keys["config"] = keys["config"].replace("{dataset}", dataset)
        if self.config:
            keys["config"] = str(Path(keys["config"]).with_name(f"{self.config}.yaml"))
        return Recipe(**keys)

    @property
    def trainer(self) -> str:
        return _book(self.recipe_file)["trainer"]

    @property
    def name(self) -> str:
        """The folder name of its results: each commit has its own."""
        place = re.sub(r"[^\w.-]", "_", self.folder.name)
        return f"{self.recipe_name}@{place}-{self.code.short}"

    @property
    def whose(self) -> str:
        """For a reader of the table: whose code ran, and which."""
        commit = f"commit {self.code.commit[:12]}" if self.code.commit else "not under git"
        place = self.code.origin or abbreviate_home(str(self.folder))
        return f"the code of {place}, {commit}{', modified' if self.code.state == MODIFIED else ''}"

    def config_file(self, recipe: Recipe) -> Path:
        return self._file(recipe.config, "config")

    def dataset_config(self, name: str) -> Path:
        return self._file(f"configs/datasets/{name}.yaml", "data set")

    def _file(self, path: str, kind: str) -> Path:
        if (self.folder / path).is_file():
            return self.folder / path
        place = (self.folder / path).parent
        known = sorted(path.stem for path in place.glob("*.yaml"))
        raise UserError(
            f"{self.recipe_name}: the checkout {self.folder} has no {kind} {path}; in {place.name}/ are: "
            f"{', '.join(known) or 'none'}"
        )

    def identity(self, recipe: Recipe, dataset: str, root: str) -> str:
        """What its runs are of, beside KEY VALUE: folder, code, configs and where the data are."""
        read = [self.config_file(recipe), self.dataset_config(dataset)]
        configs = _checksum(repr([recipe, *map(digest, read)]).encode())
        code = " ".join(filter(None, [self.code.commit or NO_GIT, self.code.changes]))
        return f"of {self.folder} ({code}) with {recipe.config} ({configs}) on {Path(root).absolute()}"

    def key_values(self, recipe: Recipe, seed: int) -> list[str]:
        """KEY VALUE pairs for every run: what its recipe says and what we need to read its log."""
        needed = {"TEST.PER_CLASS_RESULT": True, "TRAIN.CHECKPOINT_FREQ": recipe.checkpoint_freq}
        given = {key: value for key, value in needed.items() if value}
        # CoOp takes --seed 0 for none.
        return in_words(given | recipe.opts | ({} if seed else {"SEED": 0}))

    @staticmethod
    def from_its_folder(arguments: Sequence[str]) -> list[str]:
        """Arguments of train.py whose paths hold where it runs."""
        before = ["", *arguments]
        paths = ("--root", "--output-dir", "--model-dir")
        return [
            os.path.abspath(word) if flag in paths else word
            for flag, word in zip(before, arguments, strict=False)
        ]

    def backbone(self, recipe: Recipe, opts: Sequence[str]) -> str:
        """What it will load, as CoOp spells it."""
        given = {**recipe.opts, **dict(zip(opts[::2], opts[1::2], strict=True))}
        if (name := given.get("MODEL.BACKBONE.NAME")) is None:
            config = read_yaml(self.config_file(recipe))
            model = config.get("MODEL") if isinstance(config, dict) else None
            name = ((model or {}).get("BACKBONE") or {}).get("NAME", "")
        return str(name)

    def run(self, folder: Path, arguments: Sequence[str], recipe: Recipe, about: Mapping[str, Any]) -> None:
        """One part: train.py with these arguments, then FOLDER/results.json with `about`, which names it.

        Raises UserError with the last that it said if it fails.
        """
        now = Code.of(self.folder)
        gitless = self.code.commit and not now.commit  # a node of a cluster
        if now != self.code and not gitless:
            raise UserError(f"{self.folder} was changed while the sweep ran; start it again")
        words = list(arguments)
        if "--model-dir" in words:
            at = words.index("--model-dir") + 1
            words[at + 1 : at + 1] = _load_epoch(recipe, Path(words[at]))
        slow = {} if torch.cuda.is_available() else recipe.cpu
        on_cpu = in_words({key: value for key, value in slow.items() if key not in words})
        words += on_cpu
        started = time.perf_counter()
        self._process(folder.absolute(), words, recipe)
        results, failure = read_log(folder)
        if results is None:
            said = failure or "it wrote no log.txt"
            raise UserError(
                f"{self.folder / TRAIN} ended without a test result ({said}); see {folder / CONSOLE}"
            )
        for row in results["per_class"]:
            row["new"] = about["classes"] == "new"
        trains = "--eval-only" not in words
        images = results.get("images_used", 0) if recipe.images is None else recipe.images
        notes = [self.whose, recipe.note, f"without a GPU, so {' '.join(on_cpu)}" if on_cpu else ""]
        write_result_values(
            folder / RESULTS,
            **about,
            accuracy=results["accuracy"],
            per_class=results["per_class"],
            images_used=images if trains else 0,
            queries=0,
            seconds=results.get("seconds", {}),
            elapsed=time.perf_counter() - started,
            notes=[note for note in notes if note],
            config=_config_printed(folder),
        )

    def _process(self, folder: Path, words: Sequence[str], recipe: Recipe) -> None:
        fork = str(self.folder / recipe.dassl) if recipe.dassl else ""
        host = [sys.executable, "-m", "dfzsl.launch.host", str(folder), fork, str(recipe.checkpoint_freq)]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / CONSOLE, "w", encoding="utf-8") as console:
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
            lines = (folder / CONSOLE).read_text(encoding="utf-8", errors="replace").splitlines()
            last = " | ".join([line.strip() for line in lines if line.strip()][-QUOTED:])
            killed = process.returncode == -signal.SIGKILL
            how = "was killed, as the system does when memory runs out (dmesg tells)" if killed else ""
            raise UserError(
                f"{self.folder / TRAIN} {how or f'ended with code {process.returncode}'}: "
                f"{last or 'it said nothing'} (all that it said: {folder / CONSOLE})"
            )


def in_words(opts: Mapping[str, Any]) -> list[str]:
    """KEY VALUE pairs of a command line."""
    return [str(word) for pair in opts.items() for word in pair]


@functools.cache
def _book(path: Path) -> dict[str, Any]:
    """A recipe file with its cases. Raises UserError for what is no recipe."""
    keys: Any = read_yaml(path)
    cases = (keys.get(CASES) or {}) if isinstance(keys, dict) else {}
    parts = [keys, *(cases.values() if isinstance(cases, dict) else [cases])]
    if not all(isinstance(part, dict) for part in parts) or not {"trainer", "config"} <= keys.keys():
        raise UserError(
            f"{path}: not a recipe: it needs 'trainer: NAME' and 'config: PATH', see docs/checkouts.md"
        )
    for part in parts:
        for key, value in part.items():
            if key not in (KINDS if part is not keys else {*KINDS, CASES}):
                raise unknown_name(f"key in {path}:", str(key), [*KINDS, CASES])
            if key in KINDS and not isinstance(value, KINDS[key]):
                raise UserError(f"{path}: {key} must not be {value!r}")
    return keys


def _load_epoch(recipe: Recipe, trained: Path) -> list[str]:
    """The flag of a test. Raises UserError where training has left nothing to load."""
    if recipe.load_epoch == "own":
        return []
    if recipe.load_epoch != "last":
        return ["--load-epoch", str(recipe.load_epoch)]
    saved = [path.read_text(encoding="utf-8").strip() for path in sorted(trained.glob("*/checkpoint"))]
    if not saved:
        raise UserError(f"{trained}: its training saved no checkpoint; delete its {RESULTS} to train again")
    # Dassl itself saves the best on validation under another name, and takes it without the flag.
    epoch = CHECKPOINT.fullmatch(saved[0])
    return ["--load-epoch", epoch[1]] if epoch else []


def _config_printed(folder: Path) -> str:
    """The config as train.py printed it into its log; "" where it did not."""
    logs = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("log.txt*"))]
    found = CONFIG_PRINTED.search(logs[-1]) if logs else None
    return found[1] if found else ""


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
