"""Whose an output folder is: what a run left there is gone on with by the same run, and by no other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import atomic, digest
from .toolbox import changes

REMARK = "#:"  # begins the lines of config.yaml that are for a reader


class Folder:
    """OUTPUT_DIR of one run: its config.yaml says of which settings and, in a line of its own, which teacher.

    What they change of the defaults stands before them in comments, for a reader; these are not compared.
    Raises UserError where the folder is another run's. It may move, so its own path is no part of it.
    """

    def __init__(self, cfg: Any) -> None:
        described = cfg.clone()
        described.defrost()
        described.OUTPUT_DIR = described.RESUME = ""
        self.path = Path(cfg.OUTPUT_DIR) / "config.yaml"
        self.text = described.dump()
        if os.path.isfile(cfg.TEACHER.FILE):
            self.text = f"# the teacher's file: sha256 {digest(cfg.TEACHER.FILE)}\n{self.text}"
        self.remarks = "".join(f"{REMARK} {line}\n" for line in [*changes(cfg), "All keys:"])
        if self.path.exists() and _settings(self.path.read_text(encoding="utf-8")) != self.text:
            raise UserError(
                f"{self.path.parent} holds another experiment, of other settings or another teacher (its "
                "config.yaml); choose another --output-dir"
            )

    def claim(self) -> None:
        """Write config.yaml. Not before the run is built: a wrong path must not mark the folder."""
        if not self.path.exists():
            with atomic(self.path) as temporary:
                temporary.write_text(self.remarks + self.text, encoding="utf-8")


def _settings(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(REMARK))
