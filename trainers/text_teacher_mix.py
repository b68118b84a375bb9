"""Provide a baseline without training: a fixed text-teacher ensemble."""

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
    """Fixed ensemble of text embeddings and teacher weights.

    The weights of base class c are TEXT * t_c + (1 - TEXT) * (w_c, b_c), L2-normalized; those of a new class
    are its text embedding.
    """

    recipe = "vit_b16"
    trains = False
    needs_teacher = True

    def build_model(self) -> None:
        text_weight = self.cfg.TRAINER.TEXTTEACHERMIX.TEXT
        text = self.text_of(self.classnames)
        if is_address(self.cfg.TEACHER.FILE):
            raise UserError(
                "TextTeacherMix needs a file with the teacher's weights, but TEACHER.FILE is the server "
                f"{self.cfg.TEACHER.FILE}; remove TextTeacherMix from --methods"
            )
        teacher = Teacher.load(self.cfg.TEACHER.FILE)
        in_teacher, weight, bias = teacher_weights(teacher, self.classnames, text)
        mixed = text_weight * text + (1 - text_weight) * weight
        norm = torch.linalg.vector_norm(mixed, dim=1).clamp(min=1e-12)
        self.weight = torch.where(in_teacher[:, None], mixed / norm[:, None], text)
        self.bias = (1 - text_weight) * bias / norm

    def model_inference(self, features: torch.Tensor) -> torch.Tensor:
        cosine = self.backbone.encode_image(features) @ self.weight.T
        return self.backbone.logit_scale * (cosine + self.bias)
