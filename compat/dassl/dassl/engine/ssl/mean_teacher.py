"""Mean teacher (Tarvainen and Valpola, NIPS 2017)."""

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from yacs.config import CfgNode

from ...metrics import compute_accuracy
from ...modeling.ops.utils import ema_model_update, sigmoid_rampup
from ..build import TRAINER_REGISTRY
from ..trainer import TrainerXU


@TRAINER_REGISTRY.offer
class MeanTeacher(TrainerXU):
    """Unlabelled images are to get the probabilities of `teacher`, the mean of the model over its steps.

    TRAINER.MEANTEACHER: WEIGHT_U, which rises over RAMPUP epochs; EMA_ALPHA, the most that a step keeps.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.weight_u = cfg.TRAINER.MEANTEACHER.WEIGHT_U
        self.ema_alpha = cfg.TRAINER.MEANTEACHER.EMA_ALPHA
        self.rampup = cfg.TRAINER.MEANTEACHER.RAMPUP
        self.teacher = copy.deepcopy(self.model).train().requires_grad_(False)

    def forward_backward(self, batch_x: dict[str, Any], batch_u: dict[str, Any]) -> dict[str, float]:
        images, labels, _, unlabelled = self.parse_batch_train(batch_x, batch_u)
        logits = self.model(images)
        loss_x = F.cross_entropy(logits, labels)
        target = self.teacher(unlabelled).softmax(1)
        loss_u = (self.model(unlabelled).softmax(1) - target).square().sum(1).mean()
        weight_u = self.weight_u * sigmoid_rampup(self.epoch, self.rampup)
        self.model_backward_and_update(loss_x + weight_u * loss_u)
        step = self.batch_idx + self.epoch * self.num_batches
        ema_model_update(self.model, self.teacher, min(1 - 1 / (step + 1), self.ema_alpha))
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        accuracy = compute_accuracy(logits, labels)[0].item()
        return {"loss_x": loss_x.item(), "acc_x": accuracy, "loss_u": loss_u.item()}
