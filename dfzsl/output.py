"""Whose an output folder is: what a run left there is gone on with by the same run, and by no other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import atomic, digest


class Folder:
    """OUTPUT_DIR of one run: its config.yaml says of which settings, and by its first line of which teacher.

    Raises UserError where that is another run's. The folder may move, so its own path is no part of it.
    """

    def __init__(self, cfg: Any) -> None:
        described = cfg.clone()
        described.defrost()
        described.OUTPUT_DIR = described.RESUME = ""
        self.path = Path(cfg.OUTPUT_DIR) / "config.yaml"
        self.text = described.dump()
        if os.path.isfile(cfg.TEACHER.FILE):
            self.text = f"# the teacher's file: sha256 {digest(cfg.TEACHER.FILE)}\n{self.text}"
        if self.path.exists() and self.path.read_text(encoding="utf-8") != self.text:
            raise UserError(
                f"{self.path.parent} holds another experiment, of other settings or another teacher (its "
                "config.yaml); choose another --output-dir"
            )

    def claim(self) -> None:
        """Write config.yaml. Not before the run is built: a wrong path must not mark the folder."""
        if not self.path.exists():
            with atomic(self.path) as temporary:
                temporary.write_text(self.text, encoding="utf-8")
