"""Fit the owner's classifier of base classes on training images, and write teacher.safetensors.

Tested on classes the teacher knows it is the teacher, on others zero-shot CLIP. Tables call it
"Linear probe + CLIP", the free baseline that any data-free method has to beat.
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

# The regression's C; 0: by cross-validation, like the teacher's weight beside text, and noted on its card.
add_keys("TEACHER", STRENGTH=0.0)

TEACHER = "teacher.safetensors"


@register(TRAINER_REGISTRY)
class TeacherZeroshot(CLIPTrainer):
    """Multinomial logistic regression on the image features of the base classes; text for all others."""

    recipe = "vit_b16"

    def check_cfg(self, cfg) -> None:
        if cfg.TEACHER.FILE:
            raise UserError("TeacherZeroshot makes a teacher from images: leave TEACHER.FILE empty")

    def build_model(self) -> None:
        self.text = self.text_of(self.classnames)
        self.teacher: Teacher | None = None

    def train(self) -> None:
        """Fit on all training images (or NUM_SHOTS a class) unless that is done, save, test."""
        self.require_training_images()
        started = time.perf_counter()
        path = Path(self.cfg.OUTPUT_DIR) / TEACHER
        if path.exists():
            self.teacher = Teacher.load(path)
        else:
            features, labels = self.encode(self.dm.dataset.train_x)
            strength = self.cfg.TEACHER.STRENGTH
            self.teacher = fit_teacher(
                features.float(),
                labels,
                self.classnames,
                self.backbone.identity,
                **(
                    {"C": strength} if strength else {"text": self.text.cpu(), "said": self.texts.description}
                ),
            )
            if card := self.teacher.card:
                logger.info(f"The teacher's card: {card}")
            self.folder.write_config()
            self.teacher.save(path)
        self.stage_seconds["teacher"] = time.perf_counter() - started
        self.test()

    @property
    def trained_parameters(self) -> int:
        return self.teacher.weight.numel() if self.teacher else 0

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        self.teacher = Teacher.load(Path(directory) / TEACHER)

    def model_inference(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (n, C): the teacher's where it knows the class, cosines to the text elsewhere."""
        assert self.teacher is not None, "train or load first"
        known, weight, bias = teacher_weights(self.teacher, self.classnames, self.text)
        cosine = self.backbone.encode_image(features) @ torch.where(known[:, None], weight, self.text).T
        return self.backbone.logit_scale * (cosine + bias)


def teacher_weights(
    teacher: Teacher, classnames: Sequence[str], text: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Look up the teacher's class weights beside text embeddings.

    Args:
        teacher: of some of the classes.
        classnames: C names.
        text: (C, d) text embeddings, whose type and device the results have.

    Returns:
        Whether the teacher knows each class (C,), its class weights (C, d) and biases (C,) in units of the
        cosine; both are 0 for other classes.
    """
    weight, bias = (part.to(text) for part in teacher.beside_text())
    row = {name: row for row, name in enumerate(teacher.classnames)}
    index = torch.tensor([row.get(name, -1) for name in classnames], device=text.device)
    known = index >= 0
    return known, torch.where(known[:, None], weight[index], 0.0), torch.where(known, bias[index], 0.0)
