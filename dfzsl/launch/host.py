"""The process in which a checkout's train.py runs; checkouts.py starts it there.

    cd CHECKOUT && python -m dfzsl.launch.host OUTPUT_DIR FORK CHECKPOINT_FREQ [its arguments]

It holds the output folder against other processes for as long as train.py runs, also when whoever started it
was killed. FORK is a folder with a Dassl that goes before ours, or "". A CHECKPOINT_FREQ of 0 says that an
interrupted training cannot be gone on with.
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
    folder = Path(output)
    if fork:
        sys.path.insert(1, fork)
    import_torchvision()
    from dassl.data import data_manager

    from dfzsl.io.run_directory import LOCK_FILE

    _one_at_a_time(data_manager, folder.parents[6] / ".datasets.lock")
    with lock(folder / LOCK_FILE, wait=True):
        if checkpoint_freq == "0":
            for left in list(folder.iterdir()):
                if left.is_dir():
                    shutil.rmtree(left)
                elif left.name.startswith("log.txt"):
                    left.unlink()
        sys.argv = [TRAIN, *arguments]
        runpy.run_path(TRAIN, run_name="__main__")


def _one_at_a_time(manager: Any, place: Path) -> None:
    """Checkouts draw few-shot examples into the data folder where there are none: not two at once."""
    build = manager.build_dataset

    def alone(cfg: Any) -> Any:
        with lock(place, wait=True):
            return build(cfg)

    manager.build_dataset = alone


if __name__ == "__main__":
    main(*sys.argv[1:])
