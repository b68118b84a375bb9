"""Manage run directories: lock them, and refuse to mix runs of different settings or inputs."""

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
COMMENT_PREFIX = "#: "  # of the lines that list the changed settings; they are not compared
INPUT_PREFIX = "# made of "  # of the lines that identify the inputs of a run
LOCK_FILE = ".running"
PARTIAL_FILE = re.compile(r"\..+\.[0-9a-f]{8}\.tmp|.+\.partial-\d+")  # names of files that are being written
DATASET_ROOT = re.compile("(?<=^  ROOT: ).*$", re.MULTILINE)  # in the settings


class RunDirectory:
    """The output directory of one run.

    Its config.yaml lists, in comments, the settings that differ from the defaults and the digests of the
    run's inputs (data, weights, teacher); below stand all settings. A run resumes only in a directory with
    the same settings and inputs. The directory may be moved, so its path is not compared.

    Args:
        cfg: the config of the run.

    Attributes:
        path: config.yaml of the directory.
        settings: the settings as YAML, without OUTPUT_DIR and RESUME.
        inputs: digest of each input by its description, e.g. {"test data": "9f86..."}.

    Raises:
        UserError: the directory holds a run with other settings or another teacher.
    """

    def __init__(self, cfg: Any) -> None:
        normalized = cfg.clone()
        normalized.defrost()
        normalized.OUTPUT_DIR = normalized.RESUME = ""
        self.path = Path(cfg.OUTPUT_DIR) / CONFIG
        self.settings = normalized.dump()
        self.comments = "".join(f"{COMMENT_PREFIX}{line}\n" for line in [*list_changes(cfg), "All keys:"])
        self.inputs: dict[str, str] = {}
        if self.path.exists() and (settings := read_run_config(self.path)[1]) != self.settings:
            raise UserError(
                f"{self.path.parent} holds another experiment with other settings "
                f"({_first_difference(settings, self.settings)}); choose another folder, or delete this one"
            )
        if os.path.isfile(cfg.TEACHER.FILE):
            self.add({"teacher weights": digest(cfg.TEACHER.FILE)})

    def add(self, inputs: Mapping[str, str]) -> None:
        """Record inputs of the run.

        Args:
            inputs: digest of each input by its description.

        Raises:
            UserError: the directory holds a run with other inputs.
        """
        if self.path.exists():
            check_inputs(self.path, inputs, "--output-dir")
        self.inputs.update(inputs)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory in this block, after removing files that killed processes left incomplete.

        On a disk without file locks nothing is locked and nothing is removed.

        Raises:
            UserError: another process has locked the directory.
        """
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / LOCK_FILE) as acquired:
            if acquired is False:
                raise UserError(
                    f"another process is using {folder}; wait for it, or choose another --output-dir"
                )
            # A subfolder with a lock file is the directory of another run.
            for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
                if acquired and (place == folder or not (place / LOCK_FILE).exists()):
                    for name in filter(PARTIAL_FILE.fullmatch, os.listdir(place)):
                        (place / name).unlink(missing_ok=True)
            yield

    def write_config(self) -> None:
        """Write config.yaml.

        Call this when all inputs have been read: a run that fails before must not occupy the directory.
        """
        previous = read_run_config(self.path)[0] if self.path.exists() else {}
        inputs = {**previous, **self.inputs}
        if inputs != previous or not self.path.exists():
            lines = "".join(f"{INPUT_PREFIX}{name}: {value}\n" for name, value in inputs.items())
            with atomic(self.path) as temporary:
                temporary.write_text(self.comments + lines + self.settings, encoding="utf-8")


def _first_difference(existing: str, requested: str) -> str:
    """Return the first lines of two configs that differ."""
    for there, here in zip(existing.splitlines(), requested.splitlines(), strict=False):
        if there != here:
            return f"'{there.strip()}' there, '{here.strip()}' here"
    return f"see its {CONFIG}"


def read_run_config(config: Path) -> tuple[dict[str, str], str]:
    """Read the config.yaml of a run directory.

    Returns:
        The digests of the inputs by description ({} if an older version wrote the file), and the settings.
    """
    lines = read_text(config).splitlines(keepends=True)
    marked = [line.removeprefix(INPUT_PREFIX).strip() for line in lines if line.startswith(INPUT_PREFIX)]
    inputs = {name: value for name, _, value in (line.partition(": ") for line in marked)}
    return inputs, "".join(line for line in lines if not line.startswith("#"))


def check_inputs(config: Path, inputs: Mapping[str, str], flag: str, root: str = "") -> None:
    """Check that a finished or interrupted run has the same inputs.

    An input that an older version did not record is not compared, except that the data folder is compared
    in place of the data.

    Args:
        config: config.yaml of the run directory.
        inputs: digest of each input by its description.
        flag: option that names the directory, for the message.
        root: data folder of the new run; "" to skip the comparison of data folders.

    Raises:
        UserError: an input differs.
    """
    recorded, settings = read_run_config(config)
    recorded_root = (DATASET_ROOT.search(settings) or [""])[0].strip()
    for name, value in inputs.items():
        compare_roots = name not in recorded and name.endswith("data") and root
        other_root = compare_roots and os.path.abspath(recorded_root) != os.path.abspath(root)
        if recorded.get(name, value) != value or other_root:
            then = f"{recorded_root}, {recorded.get(name, 'not recorded')[:12]}"
            now = f"{root or 'now'}, {value[:12]}"
            raise UserError(
                f"{config.parent} holds another experiment with other {name} (DATASET.ROOT {then}; here "
                f"{now}); choose another {flag}"
            )
