"""Fit the teacher, the owner's classifier of base classes, on training images; write teacher.safetensors.

In a test, base classes are scored by the teacher and all others by zero-shot CLIP. Tables call this baseline
"Linear probe + CLIP".
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from dassl.engine import TRAINER_REGISTRY

from dfzsl.utils.dassl_plugin import add_keys, register
from dfzsl.utils.errors import UserError
from dfzsl.utils.log import logger

from .base import CLIPTrainer
from .recovery.teacher import Teacher, fit_teacher

# C of the logistic regression. If 0, cross-validation selects C and the mixing weight, and the model card of
# the teacher records both.
add_keys("TEACHER", STRENGTH=0.0)

TEACHER_FILE = "teacher.safetensors"


@register(TRAINER_REGISTRY)
class TeacherZeroshot(CLIPTrainer):
    """Multinomial logistic regression on image features for base classes, zero-shot CLIP for all others."""

    recipe = "vit_b16"

    def check_cfg(self, cfg) -> None:
        if cfg.TEACHER.FILE:
            raise UserError("TeacherZeroshot fits a teacher on images: leave TEACHER.FILE empty")

    def build_model(self) -> None:
        self.text = self.text_of(self.classnames)
        self.teacher: Teacher | None = None

    def train(self) -> None:
        """Fit on all training images (or NUM_SHOTS per class), save and test; reuse a saved teacher."""
        self.require_training_images()
        started = time.perf_counter()
        path = Path(self.cfg.OUTPUT_DIR) / TEACHER_FILE
        if path.exists():
            self.teacher = Teacher.load(path)
        else:
            features, labels = self.encode(self.dm.dataset.train_x)
            strength = self.cfg.TEACHER.STRENGTH
            text = {"text": self.text.cpu(), "prompts": self.texts.description}
            self.teacher = fit_teacher(
                features.float(),
                labels,
                self.classnames,
                self.backbone.identity,
                **({"C": strength} if strength else text),
            )
            if card := self.teacher.card:
                logger.info(f"Model card of the teacher: {card}")
            self.folder.write_config()
            self.teacher.save(path)
        self.stage_seconds["teacher"] = time.perf_counter() - started
        self.test()

    @property
    def trained_parameters(self) -> int:
        return self.teacher.weight.numel() if self.teacher else 0

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        self.teacher = Teacher.load(Path(directory) / TEACHER_FILE)

    def model_inference(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits (n, C): the teacher's for its classes, those of zero-shot CLIP for all others."""
        assert self.teacher is not None, "train or load first"
        in_teacher, weight, bias = teacher_weights(self.teacher, self.classnames, self.text)
        cosine = self.backbone.encode_image(features) @ torch.where(in_teacher[:, None], weight, self.text).T
        return self.backbone.logit_scale * (cosine + bias)


def teacher_weights(
    teacher: Teacher, classnames: Sequence[str], text: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Look up the teacher's class weights, scaled as text embeddings are.

    Args:
        teacher: a teacher of some of the classes.
        classnames: C class names.
        text: (C, d) text embeddings; the results have their type and device.

    Returns:
        A mask (C,) of the teacher's classes, class weights (C, d) and biases (C,) in units of the cosine.
        Weights and biases of other classes are 0.
    """
    weight, bias = (part.to(text) for part in teacher.cosine_scale_weights())
    row = {name: row for row, name in enumerate(teacher.classnames)}
    index = torch.tensor([row.get(name, -1) for name in classnames], device=text.device)
    in_teacher = index >= 0
    return (
        in_teacher,
        torch.where(in_teacher[:, None], weight[index], 0.0),
        torch.where(in_teacher, bias[index], 0.0),
    )
