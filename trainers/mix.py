"""A free baseline: a fixed mixture of the text and the teacher classifier, nothing trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dassl.engine import TRAINER_REGISTRY

from dfzsl.toolbox import add_keys, register

from .base import CLIPTrainer
from .recovery.teacher import Teacher

add_keys("TRAINER.TEXTTEACHERMIX", TEXT=0.7)


@register(TRAINER_REGISTRY)
class TextTeacherMix(CLIPTrainer):
    """Base class c: TEXT * t_c + (1 - TEXT) * w_c of unit rows, renormalised. New class: its text."""

    recipe = "vit_b16"
    trains = False
    needs_teacher = True

    def build_model(self) -> None:
        share = self.cfg.TRAINER.TEXTTEACHERMIX.TEXT
        rows = self.backbone.class_features(self.classnames, [self.template])
        teacher = Teacher.load(self.cfg.TEACHER.FILE)
        known = {name: row for row, name in enumerate(teacher.classnames)}
        for column, name in enumerate(self.classnames):
            if name in known:
                weight = F.normalize(teacher.weight[known[name]], dim=0).to(rows)
                rows[column] = F.normalize(share * rows[column] + (1 - share) * weight, dim=0)
        self.rows = rows

    def model_inference(self, features: torch.Tensor) -> torch.Tensor:
        return self.backbone.logit_scale * self.backbone.encode_image(features) @ self.rows.T
