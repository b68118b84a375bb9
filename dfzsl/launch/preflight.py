"""Check data, weights and the output folder of a sweep before its first run."""

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
    """Check that all runs can start, and download missing weights.

    Args:
        jobs: jobs of a sweep, finished or not.

    Raises:
        UserError: data or weights are missing or invalid, the output folder is not writable, or it has runs
            with other data.
    """
    _check_writable(jobs[0].output)
    encoder, offer = functools.cache(identity), functools.cache(copy_to_clip_cache)

    @functools.cache
    def data_checksums(config: _DataConfig) -> dict[str, str]:
        with contextlib.redirect_stdout(io.StringIO()):  # the data set prints its few-shot split
            dataset = DATASET_REGISTRY.get(config.cfg.DATASET.NAME)(config.cfg)
        sums = {"test data": checksum(dataset, dataset.test)}
        if config.trains:
            sums["training data"] = checksum(dataset, [*dataset.train_x, *dataset.val])
        return sums

    @functools.cache
    def inputs(arguments: tuple[str, ...], trains: bool, pending: bool) -> tuple[dict[str, str], str]:
        """Return checksums of the data with the id of the backbone, and the data folder."""
        config = _DataConfig(arguments, trains)
        sums = data_checksums(config)  # before the encoder, which may download weights
        backbone = config.cfg.MODEL.BACKBONE
        encoder_id = encoder(backbone.NAME, backbone.WEIGHTS, pending)
        return {**sums, "backbone": encoder_id}, config.cfg.DATASET.ROOT

    compared_folders: set[Path] = set()
    checked_training_data: set[tuple[str, int]] = set()
    for job in jobs:
        data_job, pending = job.data_job, not job.finished
        if pending and isinstance(job.method, Checkout):
            opts = dict(zip(data_job.opts[::2], data_job.opts[1::2], strict=True))
            offer(opts["MODEL.BACKBONE.NAME"], opts["MODEL.BACKBONE.WEIGHTS"])
        for part, ((folder, _), (_, arguments)) in enumerate(zip(job.parts(), data_job.parts(), strict=True)):
            exists = (folder / CONFIG).exists()
            trains = part == 0 and job.method.trains and not job.method.data_free
            # Reading one few-shot split shows that training images are readable. The split of a seed matters
            # only for an existing run, whose checksum is compared.
            trains = trains and (exists or (job.data.name, job.shots_seen) not in checked_training_data)
            if trains:
                checked_training_data.add((job.data.name, job.shots_seen))
            seeded = trains and job.shots_seen > 0  # the seed selects the images
            checksums, root = inputs(_data_arguments(arguments, seeded), trains, pending)
            if exists:
                check_inputs(folder / CONFIG, checksums, "--output", root)
            # Runs of other methods and seeds appear in the same table, so their test data must be the same.
            if (dataset_folder := folder.parents[3]) not in compared_folders:
                compared_folders.add(dataset_folder)
                test = {"test data": checksums["test data"]}
                for config in sorted(dataset_folder.rglob(CONFIG)):
                    check_inputs(config, test, "--output", root)


def check_locks(output: Path) -> None:
    """Raise UserError if the disk has no file locks, without which workers would repeat each other's runs."""
    if not supports_locks(_existing_parent(output)):
        raise UserError(
            f"--output {output}: its disk does not support file locks, which workers need to share runs; "
            "run one sweep at a time with --workers 1, or choose another --output"
        )


def _existing_parent(output: Path) -> Path:
    return next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())


def _check_writable(output: Path) -> None:
    parent = _existing_parent(output)
    try:
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"--output {output}: not writable ({error.strerror})") from None


def _data_arguments(arguments: Sequence[str], seeded: bool) -> tuple[str, ...]:
    """Return the arguments that determine the data: without folders, and without the seed unless `seeded`."""
    words = list(arguments)
    for flag in ("--output-dir", "--model-dir", *(() if seeded else ("--seed",))):
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    if "TEACHER.FILE" in words:  # the sweep trains it later
        words[words.index("TEACHER.FILE") + 1] = "-"
    return tuple(words)


class _DataConfig:
    """Config of a data set, hashable by what determines its data; only test data unless `trains`."""

    def __init__(self, arguments: Sequence[str], trains: bool) -> None:
        self.cfg, self.trains = train.setup_cfg(train.parser().parse_args(arguments)), trains
        self.cfg.defrost()
        if not trains:
            self.cfg.merge_from_list(["TEACHER.FILE", "-", "DATASET.NUM_SHOTS", 0])
        self.key = (self.cfg.DATASET.dump(), trains, self.cfg.SEED)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _DataConfig) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)
