"""Provide DFZSL: recover virtual base classes, tune prompts by FLPT, generate one classifier for all classes.

Tang et al., Data-Free Generalized Zero-Shot Learning, AAAI 2024.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from dassl.engine import TRAINER_REGISTRY

from dfzsl.io.class_names import check_class_names
from dfzsl.utils.dassl_plugin import add_keys, keys_of, register
from dfzsl.utils.errors import UserError
from dfzsl.utils.log import logger

from .clip.aligned_text import AlignedText
from .flpt import FLPT
from .generation.classifier import Classifier
from .generation.generate import generate
from .generation.training import GenerationSettings

add_keys("TRAINER.DFZSL", FLPT=True, NEW_CLASSES=())
add_keys("GENERATOR", **keys_of(GenerationSettings))

CLASSIFIER_FILE = "classifier.safetensors"


@register(TRAINER_REGISTRY)
class DFZSL(FLPT):
    """Data-free generalized zero-shot learning.

    The three stages fill Dassl's training loop: `before_train` recovers virtual classes (stage 1), the epochs
    tune prompts on their draws (stage 2), `after_train` generates the classifier (stage 3). Each leaves its
    result in OUTPUT_DIR, from which an interrupted run resumes: virtual.safetensors, prompt_learner/,
    classifier.safetensors.

    The run reads TEACHER.FILE and class names, and no training data. Without a text encoder, or with
    TRAINER.DFZSL.FLPT False, stage 2 is skipped and text embeddings are those of CLIP.
    """

    recipe = "dfzsl"
    needs_teacher = True

    def check_cfg(self, cfg) -> None:
        if not cfg.TEACHER.FILE:
            raise UserError(
                "DFZSL needs a teacher: set TEACHER.FILE (train.py --trainer TeacherZeroshot fits one)"
            )

    def build_model(self) -> None:
        self.classifier: Classifier | None = None
        self.tunes_prompts = self.cfg.TRAINER.DFZSL.FLPT and self.backbone.has_text_encoder
        if self.tunes_prompts:
            super().build_model()
        else:
            logger.info(self.notes()[0])
            self.max_epoch = 0

    @property
    def trained_parameters(self) -> int:
        """Number of parameters of the prompts and of the classifier, without the generator's."""
        weights = self.classifier.weight.numel() if self.classifier else 0
        return super().trained_parameters + weights

    def notes(self) -> list[str]:
        if self.tunes_prompts:
            return []
        if self.backbone.has_text_encoder:
            return ["FLPT left out (TRAINER.DFZSL.FLPT False)"]
        return ["FLPT left out (features without a text encoder)"]

    @property
    def configured_new_classnames(self) -> list[str]:
        return list(self.cfg.TRAINER.DFZSL.NEW_CLASSES)

    @property
    def new_classnames(self) -> list[str]:
        """Classes to add: TRAINER.DFZSL.NEW_CLASSES, else the new classes of the data set, if any."""
        return self.configured_new_classnames or [
            name for name in self.dm.dataset.new_classnames if name not in self.classnames
        ]

    def before_train(self) -> None:
        check_class_names(self.new_classnames, "the new classes", taken=self.classnames)
        super().before_train()

    @torch.no_grad()
    def after_train(self) -> None:
        started = time.perf_counter()
        path = Path(self.output_dir) / CLASSIFIER_FILE
        if path.exists():
            self.classifier = Classifier.load(path)
        else:
            self.classifier = self.generate()
            self.classifier.save(path)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        self.stage_seconds["generate"] = time.perf_counter() - started
        super().after_train()

    @property
    def checkpoints(self) -> Path:
        """Directory of trained generators; stage 3 deletes it when the classifier is written."""
        return Path(self.output_dir) / "generator"

    @torch.enable_grad()
    def generate(self) -> Classifier:
        """Run stage 3 on the results of stages 1 and 2."""
        assert self.virtual is not None, "run stage 1 first"
        classifier = generate(
            self.virtual,
            self.aligned_text(self.new_classnames),
            GenerationSettings(**{key.lower(): value for key, value in self.cfg.GENERATOR.items()}),
            generator=self.stage_generator(),
            folder=self.checkpoints,
        )
        assert classifier.decision is not None
        logger.info(f"Class weights: {classifier.decision.class_weights}")
        return classifier

    def aligned_text(self, new_classnames: Sequence[str]) -> AlignedText:
        if self.tunes_prompts:
            return super().aligned_text(new_classnames)
        base = self.text_of(self.classnames)
        return AlignedText(
            base,
            self.text_of(list(new_classnames)) if new_classnames else base[:0],
            list(new_classnames),
            prompts=self.texts,
            backbone=self.backbone.name,
            weights=self.backbone.weights_id,
            note="; ".join(filter(None, [*self.notes(), self.text_note])),
        )

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        """Load the classifier and add the classes of this run that it lacks (as in another data set).

        The weights of added classes are their text embeddings, in the tuned context if there is one.

        Args:
            directory: the output directory of the run.
            epoch: ignored.
        """
        classifier = Classifier.load(Path(directory) / CLASSIFIER_FILE)
        if unknown := [name for name in self.classnames if name not in classifier.classnames]:
            classifier = classifier.add(unknown, self.backbone, self.texts)
        self.classifier = classifier

    def model_inference(self, input: torch.Tensor) -> torch.Tensor:
        """Return logits (n, C) of images or features."""
        assert self.classifier is not None, "train or load first"
        return self.classifier.logits(self.backbone.encode_image(input), self.classnames)
