"""From a teacher and names to a classifier, without a data set and without an image.

`Builder` is the trainer DFZSL with names in the place of a data set: the same stages, settings and files, and
bit for bit the classifier that `train.py --trainer DFZSL` makes of the same teacher, names and seed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from dassl.config import get_cfg_default
from dassl.utils import set_random_seed

from dfzsl.configs import CONFIGS
from dfzsl.datasets.base import ClassDataset
from dfzsl.io.class_names import checked_names
from dfzsl.io.class_names import read_classnames as read_classnames
from dfzsl.train import merge, read_config
from dfzsl.trainers.clip.backbone import Backbone
from dfzsl.trainers.clip.loading import BUILT_IN, BUILT_INS, load_backbone
from dfzsl.trainers.dfzsl import DFZSL
from dfzsl.trainers.generation.classifier import Classifier
from dfzsl.trainers.recovery.oracle import Oracle, open_oracle
from dfzsl.trainers.recovery.teacher import Teacher
from dfzsl.utils.errors import UserError
from dfzsl.utils.progress import bar, hidden


class Builder(DFZSL):
    """DFZSL on the names of a teacher's classes and of TRAINER.DFZSL.NEW_CLASSES.

    Attributes: `oracle`, the teacher as it was asked; `decided`, what stage 3 said of its choices.
    """

    oracle: Oracle
    decided: tuple[str, ...] = ()

    def __init__(self, cfg: Any, oracle: Oracle) -> None:
        self.oracle = oracle
        super().__init__(cfg)

    def data_manager(self) -> Any:
        """Names, where a data set would name pictures too."""
        base = self.oracle.classnames
        new = list(self.cfg.TRAINER.DFZSL.NEW_CLASSES)
        dataset = SimpleNamespace(
            classnames=base,
            new_classnames=new,
            all_classnames=[*base, *new],
            text_features=None,
            template=ClassDataset.template,
            test_only=False,
            **{part: [] for part in ("train_x", "train_u", "val", "test")},
        )
        return SimpleNamespace(
            dataset=dataset, num_classes=len(base), num_source_domains=0, lab2cname=dict(enumerate(base))
        )

    def open_teacher(self, journal: Path | None) -> Oracle:
        self.oracle.journal = journal
        return self.oracle

    def recover_virtual_features(self):
        answer = self.oracle.answer

        def counted(x: torch.Tensor) -> torch.Tensor:
            answers = answer(x)
            shown.update(len(x))
            return answers

        with bar(desc="recover", unit="query", leave=True) as shown:
            self.oracle.answer = counted
            try:
                return super().recover_virtual_features()
            finally:
                self.oracle.answer = answer

    def before_train(self) -> None:
        super().before_train()
        self.bar = bar(
            desc="align",
            unit="epoch",
            total=self.max_epoch,
            initial=self.start_epoch,
            leave=True,
            disable=not self.tuned,
        )

    def after_epoch(self) -> None:
        super().after_epoch()
        self.bar.update()

    def generate(self) -> Classifier:
        self.bar.close()
        said = _Lines()
        with bar(desc="generate", unit="classifier", total=1, leave=True) as shown:
            with contextlib.redirect_stdout(said):
                classifier = super().generate()
            shown.update()
        self.decided = tuple(said.lines)
        return classifier


class _Lines:
    """A text stream that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, text: str) -> int:
        self.lines += filter(None, map(str.strip, text.splitlines()))
        return len(text)

    def flush(self) -> None:
        pass


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
    """One classifier for a teacher's base classes and for new ones, of which there is a name only.

    Args:
        teacher: a Teacher, its file, or the address of a server.
        new_classnames: none is named like a base class.
        backbone: open_clip's name of the model whose features the teacher reads; its own, where it says.
        weights: tag or file of its weights.
        text: TEXT.PROMPTS, what is said of a class (trainers/clip/texts.py).
        geometry: GEOMETRY.FILE, how the backbone's image features scatter (dfzsl.measure_geometry); the
            built-in backbone has its own.
        access: TEACHER.ACCESS, what a query returns.
        folder: where the stages' results stay; a build that was interrupted goes on from them.
        settings: KEY, VALUE, ... for the config.
        quiet: no progress bars.

    Raises UserError for whatever is wrong with the teacher, the names, the backbone or the settings.
    """
    return built(
        teacher, new_classnames, backbone, weights, text, geometry, access, seed, folder, settings, quiet
    )[0]


def built(
    teacher: Teacher | str | os.PathLike[str],
    new_classnames: Sequence[str],
    backbone: str,
    weights: str,
    text: str,
    geometry: str | os.PathLike[str],
    access: str,
    seed: int,
    folder: str | os.PathLike[str] | None,
    settings: Sequence[str],
    quiet: bool,
) -> tuple[Classifier, dict[str, str]]:
    """`build`, and what was recovered and decided, in words."""
    with contextlib.ExitStack() as stack:
        where = Path(folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="dfzsl-")))
        cfg = get_cfg_default()
        for path, keys in read_config(str(CONFIGS / "trainers/DFZSL" / f"{DFZSL.recipe}.yaml")):
            merge(path, cfg.merge_from_other_cfg, keys)
        given = {"TEACHER.ACCESS": access, "TEXT.PROMPTS": text}
        given["GEOMETRY.FILE"] = os.fspath(geometry)
        given |= {"MODEL.BACKBONE.NAME": backbone, "MODEL.BACKBONE.WEIGHTS": weights}
        for key, value in given.items():
            if value:
                cfg.merge_from_list([key, value])
        merge("KEY VALUE", cfg.merge_from_list, list(settings))
        oracle = open_oracle(teacher, cfg.TEACHER.ACCESS, budget=cfg.TEACHER.BUDGET)
        checked_names(new_classnames, "the new classes", taken=oracle.classnames)
        if not backbone:
            cfg.MODEL.BACKBONE.NAME, tag = named(oracle.backbone)
            cfg.MODEL.BACKBONE.WEIGHTS = weights or tag
        if cfg.MODEL.BACKBONE.NAME == BUILT_IN and not cfg.GEOMETRY.FILE:
            cfg.GEOMETRY.FILE = BUILT_IN
        where.mkdir(parents=True, exist_ok=True)
        if isinstance(teacher, Teacher):
            teacher.save(where / "teacher.safetensors")
            teacher = where / "teacher.safetensors"
        cfg.TEACHER.FILE, cfg.OUTPUT_DIR, cfg.SEED = os.fspath(teacher), str(where), seed
        cfg.TRAINER.NAME, cfg.DATASET.NAME, cfg.TEST.NO_TEST = "DFZSL", "names", True
        cfg.TRAINER.DFZSL.NEW_CLASSES = tuple(new_classnames)
        cfg.freeze()
        set_random_seed(seed)
        stack.enter_context(
            contextlib.redirect_stdout(stack.enter_context(open(where / "log.txt", "a", encoding="utf-8")))
        )
        stack.enter_context(hidden(quiet))
        builder = Builder(cfg, oracle)
        builder.train()
        assert builder.classifier is not None and builder.virtual is not None
        return builder.classifier, _summary(builder, builder.classifier)


def named(identity: str) -> tuple[str, str]:
    """(name, weights) of a backbone from its `identity`. Raises UserError where that tells neither."""
    match = re.fullmatch(r"(\S+) \((.+)\)", identity)
    if not match or match[1] == "features":
        raise UserError(
            f"the teacher does not say whose features it reads ({identity or 'no backbone'}): name the model "
            "with --backbone"
        )
    return match[1], "openai" if match[1] in BUILT_INS else match[2]


def identity_of(backbone: str, weights: str) -> str:
    """The `identity` of a backbone; it is loaded only where its weights are a file, which it is known by."""
    tag = weights or "openai"
    if backbone in BUILT_INS or os.path.isfile(tag):
        return load_backbone(backbone, tag).identity
    return f"{backbone.replace('/', '-')} ({tag})"


def _summary(builder: Builder, classifier: Classifier) -> dict[str, str]:
    virtual = builder.virtual
    assert virtual is not None
    new = int(classifier.is_new.sum())
    card = builder.oracle.card
    other = card.measured_elsewhere(builder.texts.about) if card else ""
    kappa = f"kappa {float(virtual.kappa.mean()):,.0f}"
    epochs = f"FLPT, {builder.max_epoch} epochs" if builder.tuned else builder.notes()[0]
    return {
        "teacher": f"{len(virtual.classnames)} base classes, {virtual.level} of {builder.backbone.identity}",
        "recovered": f"{virtual.told}, {kappa}",
        "geometry": str(builder.virtual.geometry) if builder.virtual.geometry else "none given: isotropic",
        "text": classifier.texts.about + (f" ({other})" if other else ""),
        "aligned": epochs,
        "decided": "; ".join(builder.decided) or "-",
        "new classes": f"{new}, bias {classifier.new_bias:+.3f} of the cosine",
        "classifier": repr(classifier),
    }


def backbone_of(
    classifier: Classifier,
    weights: str = "",
    device: str | torch.device = "cpu",
    where: object = "the classifier",
) -> Backbone:
    """The image encoder that a classifier reads. Raises UserError where that cannot be told or is another."""
    if not classifier.backbone:
        raise UserError(
            f"{where} was made of features alone: it does not know how to read pictures and names"
        )
    tag = "openai" if classifier.backbone in BUILT_INS else classifier.weights
    if not weights and os.path.exists(tag):
        raise UserError(f"{where} asks for the file {tag}; give it with --weights if you trust it")
    backbone = load_backbone(classifier.backbone, weights or tag, device)
    if backbone.weights_id != classifier.weights:
        raise UserError(f"--weights: expected weights {classifier.weights}, found {backbone.weights_id}")
    return backbone


@contextlib.contextmanager
def kept_until_done(output: str | os.PathLike[str], keep: Path | None = None) -> Iterator[Path]:
    """The folder `keep`, else one beside `output`, which goes where the block ends well and else stays."""
    folder = keep or Path(output).with_name(f".{Path(output).name}.build")
    yield folder
    if keep is None:
        shutil.rmtree(folder, ignore_errors=True)
