"""What can be told before any run starts: of data, weights, the output, and what runs there are made of."""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dassl.data.datasets import DATASET_REGISTRY

from dfzsl import train
from dfzsl.datasets.encoding import checksum
from dfzsl.io.files import supports_locks
from dfzsl.io.run_directory import CONFIG, check_inputs
from dfzsl.trainers.clip.loading import copy_to_clip_cache, identity
from dfzsl.utils.errors import UserError

from .checkouts import Checkout
from .runs import Job


def check(jobs: Sequence[Job]) -> None:
    """Raise UserError for the first thing that would end a run, and for runs in the output that are made of
    other data. Weights that a run needs and that are not there are fetched."""
    _writable(jobs[0].output)
    encoder, offer = functools.cache(identity), functools.cache(copy_to_clip_cache)

    @functools.cache
    def data(of: _Reading) -> dict[str, str]:
        with contextlib.redirect_stdout(io.StringIO()):  # of its draws
            made = DATASET_REGISTRY.get(of.cfg.DATASET.NAME)(of.cfg)
        sums = {"test data": checksum(made, made.test)}
        if of.trains:
            sums["training data"] = checksum(made, [*made.train_x, *made.val])
        return sums

    @functools.cache
    def made_of(arguments: tuple[str, ...], trains: bool, runs: bool) -> tuple[dict[str, str], str]:
        of = _Reading(arguments, trains)
        backbone = of.cfg.MODEL.BACKBONE
        return {**data(of), "backbone": encoder(backbone.NAME, backbone.WEIGHTS, runs)}, of.cfg.DATASET.ROOT

    compared: set[Path] = set()
    looked: set[tuple[str, int]] = set()
    for job in jobs:
        reader, runs = job.reader, not job.finished
        if runs and isinstance(job.method, Checkout):
            given = dict(zip(reader.opts[::2], reader.opts[1::2], strict=True))
            offer(given["MODEL.BACKBONE.NAME"], given["MODEL.BACKBONE.WEIGHTS"])
        for part, ((folder, _), (_, arguments)) in enumerate(zip(job.parts(), reader.parts(), strict=True)):
            there = (folder / CONFIG).exists()
            trains = part == 0 and job.method.trains and not job.method.data_free
            # One draw shows that training images can be read; which they are matters where they were read.
            trains = trains and (there or (job.data.name, job.shots_seen) not in looked)
            if trains:
                looked.add((job.data.name, job.shots_seen))
            few = trains and job.shots_seen > 0  # drawn by the seed
            found, root = made_of(_what_is_read(arguments, few), trains, runs)
            if there:
                check_inputs(folder / CONFIG, found, "--output", root)
            if (same_data := folder.parents[3]) not in compared:  # by other methods and seeds: one table
                compared.add(same_data)
                test = {"test data": found["test data"]}
                for config in sorted(same_data.rglob(CONFIG)):
                    check_inputs(config, test, "--output", root)


def check_locks(output: Path) -> None:
    """Raise UserError where several workers would do the same run."""
    if not supports_locks(_existing(output)):
        raise UserError(
            f"--output {output}: its disk knows no file locks, by which workers keep out of each other's "
            "runs; use one sweep at a time with --workers 1, or another --output"
        )


def _existing(output: Path) -> Path:
    return next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())


def _writable(output: Path) -> None:
    there = _existing(output)
    try:
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise UserError(f"--output {output}: nothing can be written there ({error.strerror})") from None


def _what_is_read(arguments: Sequence[str], few: bool) -> tuple[str, ...]:
    """The arguments of a part without its folders, and without its seed unless that draws the examples."""
    words = list(arguments)
    for flag in ("--output-dir", "--model-dir", *(() if few else ("--seed",))):
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    if "TEACHER.FILE" in words:  # it is made by the sweep
        words[words.index("TEACHER.FILE") + 1] = "-"
    return tuple(words)


class _Reading:
    """The config of a data set that is read; where it does not train, of names and test examples alone."""

    def __init__(self, arguments: Sequence[str], trains: bool) -> None:
        self.cfg, self.trains = train.setup_cfg(train.parser().parse_args(arguments)), trains
        self.cfg.defrost()
        if not trains:
            self.cfg.merge_from_list(["TEACHER.FILE", "-", "DATASET.NUM_SHOTS", 0])
        self.key = (self.cfg.DATASET.dump(), trains, self.cfg.SEED)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Reading) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)
