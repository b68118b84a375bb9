"""Provide a baseline without training: a fixed ensemble of text embeddings and teacher weights."""

from __future__ import annotations

import torch
from dassl.engine import TRAINER_REGISTRY

from dfzsl.utils.dassl_plugin import add_keys, register
from dfzsl.utils.errors import UserError

from .base import CLIPTrainer
from .recovery.remote_oracle import is_address
from .recovery.teacher import Teacher
from .teacher_zeroshot import teacher_weights

add_keys("TRAINER.TEXTTEACHERMIX", TEXT=0.7)


@register(TRAINER_REGISTRY)
class TextTeacherMix(CLIPTrainer):
    """Base class c: TEXT * t_c + (1 - TEXT) * (w_c, b_c) of unit rows, renormalised. New class: its text."""

    recipe = "vit_b16"
    trains = False
    needs_teacher = True

    def build_model(self) -> None:
        share = self.cfg.TRAINER.TEXTTEACHERMIX.TEXT
        text = self.text_of(self.classnames)
        if is_address(self.cfg.TEACHER.FILE):
            raise UserError(
                f"TextTeacherMix mixes the teacher's rows with text: it needs a file, and "
                f"{self.cfg.TEACHER.FILE} answers questions only; leave it out of --methods"
            )
        teacher = Teacher.load(self.cfg.TEACHER.FILE)
        known, weight, bias = teacher_weights(teacher, self.classnames, text)
        mixed = share * text + (1 - share) * weight
        length = torch.linalg.vector_norm(mixed, dim=1).clamp(min=1e-12)
        self.weight = torch.where(known[:, None], mixed / length[:, None], text)
        self.bias = (1 - share) * bias / length

    def model_inference(self, features: torch.Tensor) -> torch.Tensor:
        cosine = self.backbone.encode_image(features) @ self.weight.T
        return self.backbone.logit_scale * (cosine + self.bias)
