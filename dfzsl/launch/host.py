"""Run the train.py of a checkout in its own process; checkouts.py starts it.

    cd CHECKOUT && python -m dfzsl.launch.host OUTPUT_DIR FORK CHECKPOINT_FREQ [ARGUMENT]...

The process locks the output folder while train.py runs, also if the parent process is killed. FORK is a
folder with another Dassl, or "". With CHECKPOINT_FREQ 0, an interrupted training starts again.
"""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

from dfzsl.io.files import lock
from dfzsl.utils.torchvision_import import import_torchvision

TRAIN = "train.py"


def main(output: str, fork: str, checkpoint_freq: str, *arguments: str) -> None:
    """Run train.py in the working directory.

    Args:
        output: output folder.
        fork: folder of a fork of Dassl, or "".
        checkpoint_freq: epochs between checkpoints; "0": delete what an interrupted training has saved.
        arguments: arguments of train.py.
    """
    folder = Path(output)
    if fork:
        sys.path.insert(1, fork)
    import_torchvision()
    from dassl.data import data_manager

    from dfzsl.io.run_directory import LOCK_FILE

    _serialize_dataset_builds(data_manager, folder.parents[6] / ".datasets.lock")
    with lock(folder / LOCK_FILE, wait=True):
        if checkpoint_freq == "0":
            for path in list(folder.iterdir()):
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name.startswith("log.txt"):
                    path.unlink()
        sys.argv = [TRAIN, *arguments]
        runpy.run_path(TRAIN, run_name="__main__")


def _serialize_dataset_builds(manager: Any, lock_file: Path) -> None:
    """Build data sets under a lock, because checkouts write new few-shot splits into the data folder."""
    build = manager.build_dataset

    def build_locked(cfg: Any) -> Any:
        with lock(lock_file, wait=True):
            return build(cfg)

    manager.build_dataset = build_locked


if __name__ == "__main__":
    main(*sys.argv[1:])
