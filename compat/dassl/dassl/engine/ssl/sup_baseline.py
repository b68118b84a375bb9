"""What labelled images alone give."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...metrics import compute_accuracy
from ..build import TRAINER_REGISTRY
from ..trainer import TrainerXU


@TRAINER_REGISTRY.offer
class SupBaseline(TrainerXU):
    """The cross-entropy of the labelled images; the unlabelled ones are drawn and left alone."""

    def forward_backward(self, batch_x: dict[str, Any], batch_u: dict[str, Any]) -> dict[str, float]:
        images, labels = self.parse_batch_train(batch_x, batch_u)
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        self.model_backward_and_update(loss)
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        return {"loss": loss.item(), "acc": compute_accuracy(logits, labels)[0].item()}

    def parse_batch_train(self, batch_x: dict[str, Any], batch_u: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return batch_x["img"].to(self.device), batch_x["label"].to(self.device)
