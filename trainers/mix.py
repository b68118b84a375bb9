"""A free baseline: a fixed mixture of the text and the teacher classifier, nothing trained."""

from __future__ import annotations

import torch
from dassl.engine import TRAINER_REGISTRY

from dfzsl.utils.dassl_plugin import add_keys, register
from dfzsl.utils.errors import UserError

from .base import CLIPTrainer
from .recovery.oracle import is_address
from .recovery.teacher import Teacher

add_keys("TRAINER.TEXTTEACHERMIX", TEXT=0.7)


@register(TRAINER_REGISTRY)
class TextTeacherMix(CLIPTrainer):
    """Base class c: TEXT * t_c + (1 - TEXT) * (w_c, b_c) of unit rows, renormalised. New class: its text."""

    recipe = "vit_b16"
    trains = False
    needs_teacher = True

    def build_model(self) -> None:
        share = self.cfg.TRAINER.TEXTTEACHERMIX.TEXT
        rows = self.text_of(self.classnames)
        if is_address(self.cfg.TEACHER.FILE):
            raise UserError(
                f"TextTeacherMix mixes the teacher's rows with text: it needs a file, and "
                f"{self.cfg.TEACHER.FILE} answers questions only; leave it out of --methods"
            )
        teacher = Teacher.load(self.cfg.TEACHER.FILE)
        weight, bias = (part.to(rows) for part in teacher.beside_text())
        offset = rows.new_zeros(len(rows))
        known = {name: row for row, name in enumerate(teacher.classnames)}
        for column, name in enumerate(self.classnames):
            if name in known:
                mixed = share * rows[column] + (1 - share) * weight[known[name]]
                length = torch.linalg.vector_norm(mixed).clamp(min=1e-12)
                rows[column], offset[column] = mixed / length, (1 - share) * bias[known[name]] / length
        self.rows, self.offset = rows, offset

    def model_inference(self, features: torch.Tensor) -> torch.Tensor:
        cosine = self.backbone.encode_image(features) @ self.rows.T
        return self.backbone.logit_scale * (cosine + self.offset)
