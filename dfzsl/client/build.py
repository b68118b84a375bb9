"""Build a classifier from a teacher and class names (stages 1 to 3), without a data set or an image."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from dassl.config import get_cfg_default
from dassl.utils import set_random_seed
from yacs.config import CfgNode

from dfzsl.configs import CONFIGS
from dfzsl.io.class_names import check_class_names
from dfzsl.io.files import digest
from dfzsl.train import merge, merge_settings, read_config
from dfzsl.trainers.clip.aligned_text import AlignedText
from dfzsl.trainers.clip.loading import BUILT_IN, parse_identity
from dfzsl.trainers.dfzsl import DFZSL
from dfzsl.trainers.flpt import FLPT
from dfzsl.trainers.generation.classifier import Classifier
from dfzsl.trainers.recovery.open_oracle import open_oracle
from dfzsl.trainers.recovery.teacher import Teacher
from dfzsl.trainers.recovery.virtual_classes import VirtualClasses
from dfzsl.utils.errors import UserError
from dfzsl.utils.log import logged_to_stdout
from dfzsl.utils.progress import hide_progress_bars, progress_bar

MAX_SEED = 2**32 - 1  # of numpy
AnyFLPT = TypeVar("AnyFLPT", bound=FLPT)


def build(
    teacher: Teacher | str | os.PathLike[str],
    new_classnames: Sequence[str],
    backbone: str = "",
    *,
    weights: str = "",
    text: str = "",
    geometry: str | os.PathLike[str] = "",
    access: str = "",
    seed: int = 1,
    folder: str | os.PathLike[str] | None = None,
    settings: Sequence[str] = (),
    quiet: bool = True,
) -> Classifier:
    """Build one classifier for a teacher's base classes and for new classes, known by name only.

    Runs the trainer DFZSL on a data set of class names: recover, align and generate. The result equals, byte
    for byte, the classifier that `train.py --trainer DFZSL` makes of the same teacher, names and seed.
    Everything that is printed meanwhile goes to log.txt in the folder, because Dassl's training loop prints.

    Args:
        teacher: a Teacher, its file, or the address of a server.
        new_classnames: names of the new classes; none is the name of a base class.
        backbone: open_clip's name of the model whose features the teacher reads; by default the teacher's.
        weights: pretrained tag or file of its weights.
        text: prompts of the classes, TEXT.PROMPTS (trainers/clip/class_prompts.py).
        geometry: file of the backbone's feature statistics (dfzsl.measure_feature_statistics); the built-in
            backbone has its own.
        access: what a query returns, TEACHER.ACCESS.
        seed: seed of all random draws.
        folder: folder that keeps the results of the stages; an interrupted build resumes from them.
        settings: KEY, VALUE, ... for the config.
        quiet: show no progress bars.

    Returns:
        The classifier. Its `decision` describes how it was built, or is None if `folder`
            had a finished build.

    Raises:
        UserError: a mistake in the teacher, the names, the backbone or the settings.
    """
    overrides = {"TEACHER.ACCESS": access, "TEXT.PROMPTS": text, "GEOMETRY.FILE": os.fspath(geometry)}
    cfg = _read_settings("DFZSL", overrides, settings, seed)
    # For class names and backbone; the trainer opens its own, which keeps a server's responses in the folder.
    oracle = open_oracle(teacher, cfg.TEACHER.ACCESS)
    check_class_names(new_classnames, "the new classes", taken=oracle.classnames)
    _set_backbone(cfg, backbone, weights, oracle.backbone)
    cfg.TRAINER.DFZSL.NEW_CLASSES = tuple(new_classnames)
    with _run(folder, quiet) as run_folder:
        if isinstance(teacher, Teacher):
            teacher = _write_teacher(teacher, run_folder)
        cfg.TEACHER.FILE, cfg.OUTPUT_DIR = os.fspath(teacher), str(run_folder)
        trainer = _train(DFZSL, cfg)
        assert trainer.classifier is not None
        return trainer.classifier


def align(
    virtual: VirtualClasses,
    new_classnames: Sequence[str] = (),
    backbone: str = "",
    *,
    weights: str = "",
    text: str = "",
    seed: int = 1,
    folder: str | os.PathLike[str] | None = None,
    settings: Sequence[str] = (),
    quiet: bool = True,
) -> AlignedText:
    """Tune prompts on draws of virtual classes (stage 2, FLPT).

    Args:
        virtual: the result of `dfzsl.recover`.
        new_classnames: names of the new classes, which get text embeddings too.
        backbone, weights, text, seed, folder, settings, quiet: see `build`.

    Returns:
        Text embeddings of base and new classes with the tuned context, and the shift of image features.

    Raises:
        UserError: a mistake in the names, the backbone or the settings.
    """
    cfg = _read_settings("FLPT", {"TEXT.PROMPTS": text}, settings, seed)
    check_class_names(new_classnames, "the new classes", taken=virtual.classnames)
    _set_backbone(cfg, backbone, weights, virtual.backbone)
    with _run(folder, quiet) as run_folder:
        cfg.OUTPUT_DIR = str(run_folder)
        return _train(FLPT, cfg, virtual).aligned_text(new_classnames)


@contextlib.contextmanager
def _run(folder: str | os.PathLike[str] | None, quiet: bool) -> Iterator[Path]:
    """Yield the folder of a run; log messages and standard output go to log.txt in it."""
    with contextlib.ExitStack() as stack:
        path = Path(folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="dfzsl-")))
        path.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context(open(path / "log.txt", "a", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(logged_to_stdout())
        stack.enter_context(hide_progress_bars(quiet))
        yield path


def _read_settings(trainer: str, overrides: dict[str, str], settings: Sequence[str], seed: int) -> CfgNode:
    """Return the config of a run without a data set: DFZSL's file, overrides, KEY VALUE pairs."""
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"the seed must be 0 to {MAX_SEED}, got {seed}")
    cfg = get_cfg_default()
    for path, keys in read_config(str(CONFIGS / "trainers/DFZSL" / f"{DFZSL.recipe}.yaml")):
        merge(path, cfg.merge_from_other_cfg, keys)
    _merge_overrides(cfg, overrides)
    merge_settings("KEY VALUE", cfg, settings)
    cfg.TRAINER.NAME, cfg.SEED, cfg.TEST.NO_TEST = trainer, seed, True
    return cfg


def _merge_overrides(cfg: CfgNode, overrides: dict[str, str]) -> None:
    for key, value in overrides.items():
        if value:
            cfg.merge_from_list([key, value])


def _set_backbone(cfg: CfgNode, backbone: str, weights: str, identity: str) -> None:
    """Set the backbone that the caller names, else that of `identity`, and the built-in one's statistics."""
    _merge_overrides(cfg, {"MODEL.BACKBONE.NAME": backbone, "MODEL.BACKBONE.WEIGHTS": weights})
    if not backbone:
        cfg.MODEL.BACKBONE.NAME, tag = parse_identity(identity)
        cfg.MODEL.BACKBONE.WEIGHTS = weights or tag
    if cfg.MODEL.BACKBONE.NAME == BUILT_IN and not cfg.GEOMETRY.FILE:
        cfg.GEOMETRY.FILE = BUILT_IN


def _train(kind: type[AnyFLPT], cfg: CfgNode, *inputs: Any) -> AnyFLPT:
    """Build a trainer and run its stages, with a progress bar of the epochs."""
    cfg.freeze()
    with _seeded(cfg.SEED):
        trainer = kind(cfg, *inputs)
        total = trainer.max_epoch
        with progress_bar(desc="align", unit="epoch", total=total, leave=True, disable=not total) as epochs:
            trainer.epoch_callback = lambda epoch: epochs.update(epoch + 1 - epochs.n)
            trainer.train()
    return trainer


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed all global random generators as `train.py` does, and restore their states after the block."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        set_random_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


def _write_teacher(teacher: Teacher, folder: Path) -> Path:
    """Write a teacher to the folder of a run. Raises UserError if the folder has another teacher."""
    path = folder / "teacher.safetensors"
    if path.exists():
        with tempfile.TemporaryDirectory() as other:
            teacher.save(Path(other) / path.name)
            if digest(Path(other) / path.name) != digest(path):
                raise UserError(f"{folder} has the build of another teacher; choose another folder")
    else:
        teacher.save(path)
    return path


@contextlib.contextmanager
def temporary_folder(output: str | os.PathLike[str], keep: Path | None = None) -> Iterator[Path]:
    """Yield a folder for the results of a build's stages, from which an interrupted build resumes.

    After a user's mistake it is deleted, unless it has responses of a server, which cost budget.

    Args:
        output: file that the build writes.
        keep: the folder; by default one beside `output`, which is deleted if the block succeeds.
    """
    folder = keep or Path(output).with_name(f".{Path(output).name}.build")
    delete = True
    try:
        yield folder
    except UserError:
        delete = not (folder / "answers").exists()
        raise
    except BaseException:
        delete = False
        raise
    finally:
        if delete and keep is None:
            shutil.rmtree(folder, ignore_errors=True)
