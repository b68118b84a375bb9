"""Where training a prompt spends its time: python benchmarks/training.py [--trainers CoOp,FLPT]

One run of each trainer on the built-in world, 16 images of each of its base classes, as `train.py` makes it,
from a cache that has the features. Processor seconds of a process of its own, each counted in one place;
"times the encoder" says how much more a step costs than the text encoder, "learned" is a digest of the
last checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tabulate import tabulate

TRAINERS = ("CoOp", "CoCoOp", "KgCoOp", "ProGrad", "FLPT")
STEP = ("text encoder", "loader", "optimiser", "logging", "checkpoints", "rest of a step")
PARTS = ("start", *STEP, "test")


class Clock:
    """Processor seconds of parts that lie within each other: what an inner one takes is not the outer's."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.open, self.since = ["start"], 0.0  # a process's time starts with it

    def settle(self) -> None:
        now = time.process_time()
        self.spent[self.open[-1]] += now - self.since
        self.since = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.settle()
        self.open.append(name)
        yield
        self.settle()
        self.open.pop()

    def charge(self, name: str, owner: Any, *attributes: str) -> None:
        """Count calls of `owner`'s functions as this part."""
        for attribute in attributes:
            setattr(owner, attribute, self._counted(name, getattr(owner, attribute)))

    def _counted(self, name: str, function: Any) -> Any:
        @functools.wraps(function)
        def run(*args: Any, **settings: Any) -> Any:
            with self.part(name):
                return function(*args, **settings)

        return run

    def charge_batches(self, loader: type) -> None:
        """Count the time in which batches are made as the loader's."""
        batches = loader.__iter__  # type: ignore[misc]

        def counted(self_: Any) -> Iterator[Any]:
            iterator = batches(self_)
            while True:
                with self.part("loader" if "rest of a step" in self.open else self.open[-1]):
                    try:
                        batch = next(iterator)
                    except StopIteration:
                        return
                yield batch

        loader.__iter__ = counted  # type: ignore[misc]


def measure(trainer: str, data: str) -> dict[str, Any]:
    """Seconds of the parts of one run, and a digest of what it learned."""
    import torch
    from dassl.engine import TrainerX
    from dassl.engine import trainer as engine

    from dfzsl import train
    from dfzsl.configs import CONFIGS
    from dfzsl.datasets.loader import FeatureLoader
    from dfzsl.trainers.base import CLIPTrainer
    from dfzsl.trainers.clip.prompts import Prompts
    from dfzsl.trainers.coop import CoOp

    clock = Clock()
    clock.charge("text encoder", Prompts, "encode")
    clock.charge("text encoder", torch.Tensor, "backward")
    clock.charge("text encoder", torch.autograd, "grad")
    clock.charge("optimiser", torch.amp.GradScaler, "step", "update")
    clock.charge("optimiser", engine.TrainerBase, "model_zero_grad", "update_lr")
    clock.charge("logging", CLIPTrainer, "write_scalar")
    clock.charge("logging", CoOp, "summary")
    clock.charge("checkpoints", CLIPTrainer, "save_model")
    clock.charge("test", CLIPTrainer, "test")
    clock.charge("rest of a step", TrainerX, "run_epoch")
    clock.charge_batches(FeatureLoader)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        words = ["--trainer", trainer, "--seed", "1", "--root", data, "--output-dir", folder]
        words += ["--dataset-config-file", str(CONFIGS / "datasets" / "shapes.yaml")]
        words += ["--config-file", str(CONFIGS / "trainers" / trainer / "shapes.yaml")]
        train.main([*words, "DATASET.SUBSAMPLE_CLASSES", "base", "DATASET.NUM_SHOTS", "16"])
        clock.settle()
        last = max(Path(folder, "prompt_learner").glob("model.pth.tar-*"))
        state = torch.load(last, weights_only=False)["state_dict"]
        learned = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()
    return {"spent": clock.spent, "learned": learned[:12]}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--trainers", default=",".join(TRAINERS))
    flags.add_argument("--data", default="data", help="where the built-in world's pictures are, or will be")
    flags.add_argument("--one", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.data)))
        return
    rows = []
    for trainer in args.trainers.split(","):
        command = [sys.executable, __file__, "--data", args.data, "--one", trainer]
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        ran = subprocess.run(command, check=True, text=True, **quiet)
        found = json.loads(ran.stdout.splitlines()[-1])
        spent = defaultdict(float, found["spent"])
        step = sum(spent[part] for part in STEP)
        times = step / spent["text encoder"]
        rows.append([trainer, *(spent[part] for part in PARTS), times, found["learned"]])
    heads = ["trainer", *PARTS, "times the encoder", "learned"]
    print(tabulate(rows, heads, floatfmt=".2f", tablefmt="github"))


if __name__ == "__main__":
    main()
