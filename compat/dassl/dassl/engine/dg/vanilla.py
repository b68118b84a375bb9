"""Empirical risk minimisation."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...metrics import compute_accuracy
from ..build import TRAINER_REGISTRY
from ..trainer import TrainerX


@TRAINER_REGISTRY.offer
class Vanilla(TrainerX):
    """The cross-entropy of all labelled images."""

    def forward_backward(self, batch: dict[str, Any]) -> dict[str, float]:
        images, labels = self.parse_batch_train(batch)
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        self.model_backward_and_update(loss)
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        return {"loss": loss.item(), "acc": compute_accuracy(logits, labels)[0].item()}

    def parse_batch_train(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return batch["img"].to(self.device), batch["label"].to(self.device)
