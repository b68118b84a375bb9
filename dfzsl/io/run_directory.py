"""Claim a run directory: what a run left there is resumed by the same run, and by no other."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dfzsl.utils.dassl_plugin import list_changes
from dfzsl.utils.errors import UserError

from .files import atomic, digest, lock, read_text

CONFIG = "config.yaml"
COMMENT_PREFIX = "#: "  # begins its lines that are for a reader
PROVENANCE_PREFIX = "# made of "
LOCK_FILE = ".running"
PARTIAL_FILE = re.compile(r"\..+\.[0-9a-f]{8}\.tmp|.+\.partial-\d+")  # files that are being written
ROOT = re.compile("(?<=^  ROOT: ).*$", re.MULTILINE)  # of DATASET, in the settings


class RunDirectory:
    """OUTPUT_DIR of one run: its config.yaml holds the settings and, in lines above, what the run is made of.

    What the settings change of the defaults stands before them in comments, for a reader; these are not
    compared. Raises UserError where the folder is another run's. It may move, so its path is no part of it.
    """

    def __init__(self, cfg: Any) -> None:
        described = cfg.clone()
        described.defrost()
        described.OUTPUT_DIR = described.RESUME = ""
        self.path = Path(cfg.OUTPUT_DIR) / CONFIG
        self.settings = described.dump()
        self.remarks = "".join(f"{COMMENT_PREFIX}{line}\n" for line in [*list_changes(cfg), "All keys:"])
        self.made_of: dict[str, str] = {}
        if self.path.exists() and read(self.path)[1] != self.settings:
            raise UserError(
                f"{self.path.parent} holds another experiment, of other settings (its {CONFIG}); choose "
                "another --output-dir"
            )
        if os.path.isfile(cfg.TEACHER.FILE):
            self.add({"teacher weights": digest(cfg.TEACHER.FILE)})

    def add(self, made_of: Mapping[str, str]) -> None:
        """Note what the run is made of. Raises UserError where the folder's run is of something else."""
        if self.path.exists():
            check_provenance(self.path, made_of, "--output-dir")
        self.made_of.update(made_of)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder against other processes, and remove what killed ones left half written in it.

        Raises UserError while another process is at work there. Where a disk knows no locks, nothing is held
        and nothing is removed.
        """
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / LOCK_FILE) as held:
            if held is False:
                raise UserError(
                    f"another process is at work in {folder}; wait for it, or choose another --output-dir"
                )
            # A folder in it that has been held is another run's.
            for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
                if held and (place == folder or not (place / LOCK_FILE).exists()):
                    for left in filter(PARTIAL_FILE.fullmatch, os.listdir(place)):
                        (place / left).unlink(missing_ok=True)
            yield

    def write_config(self) -> None:
        """Write config.yaml, when all that the run reads was read: a mistake must not mark the folder."""
        was = read(self.path)[0] if self.path.exists() else {}
        made_of = {**was, **self.made_of}
        if made_of != was or not self.path.exists():
            marked = "".join(f"{PROVENANCE_PREFIX}{what}: {value}\n" for what, value in made_of.items())
            with atomic(self.path) as temporary:
                temporary.write_text(self.remarks + marked + self.settings, encoding="utf-8")


def read(config: Path) -> tuple[dict[str, str], str]:
    """What a run is made of (nothing, where an older version wrote it), and its settings."""
    lines = read_text(config).splitlines(keepends=True)
    marked = [
        line.removeprefix(PROVENANCE_PREFIX).strip() for line in lines if line.startswith(PROVENANCE_PREFIX)
    ]
    made_of = {what: value for what, _, value in (line.partition(": ") for line in marked)}
    return made_of, "".join(line for line in lines if not line.startswith("#"))


def check_provenance(config: Path, made_of: Mapping[str, str], flag: str, root: str = "") -> None:
    """Raise UserError unless the run that wrote `config` is made of `made_of`.

    What an older version did not note is not compared; in the place of data its `root` is, if one is given.
    """
    was, settings = read(config)
    there = (ROOT.search(settings) or [""])[0].strip()
    for what, value in made_of.items():
        silent = what not in was and what.endswith("data") and root
        if was.get(what, value) != value or (silent and os.path.abspath(there) != os.path.abspath(root)):
            then, now = f"{there}, {was.get(what, 'not noted')[:12]}", f"{root or 'now'}, {value[:12]}"
            raise UserError(
                f"{config.parent} holds another experiment, made of other {what} (DATASET.ROOT {then}; here "
                f"{now}); choose another {flag}"
            )
