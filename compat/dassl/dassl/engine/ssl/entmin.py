"""Entropy minimisation (Grandvalet and Bengio, NIPS 2004)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from yacs.config import CfgNode

from ...metrics import compute_accuracy
from ..build import TRAINER_REGISTRY
from ..trainer import TrainerXU


@TRAINER_REGISTRY.offer
class EntMin(TrainerXU):
    """Cross-entropy of the labelled + TRAINER.ENTMIN.LMDA of the entropy of the unlabelled images."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.lmda = cfg.TRAINER.ENTMIN.LMDA

    def forward_backward(self, batch_x: dict[str, Any], batch_u: dict[str, Any]) -> dict[str, float]:
        images, labels, _, unlabelled = self.parse_batch_train(batch_x, batch_u)
        logits = self.model(images)
        loss_x = F.cross_entropy(logits, labels)
        p = self.model(unlabelled).softmax(1)
        loss_u = -(p * (p + 1e-5).log()).sum(1).mean()
        self.model_backward_and_update(loss_x + self.lmda * loss_u)
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        accuracy = compute_accuracy(logits, labels)[0].item()
        return {"loss_x": loss_x.item(), "acc_x": accuracy, "loss_u": loss_u.item()}
