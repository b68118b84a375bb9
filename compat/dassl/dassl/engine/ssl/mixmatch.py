"""MixMatch (Berthelot et al., NeurIPS 2019)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from yacs.config import CfgNode

from ...modeling.ops import mixup
from ...modeling.ops.utils import create_onehot, linear_rampup, sharpen_prob, shuffle_index
from ..build import TRAINER_REGISTRY
from ..trainer import TrainerXU


@TRAINER_REGISTRY.offer
class MixMatch(TrainerXU):
    """Guesses labels from several views of an unlabelled image, and mixes all images with all.

    DATALOADER.K_TRANSFORMS: the views. TRAINER.MIXMATCH: WEIGHT_U, which rises over RAMPUP steps; TEMP, the
    power of the guesses; MIXUP_BETA.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.weight_u = cfg.TRAINER.MIXMATCH.WEIGHT_U
        self.temp = cfg.TRAINER.MIXMATCH.TEMP
        self.beta = cfg.TRAINER.MIXMATCH.MIXUP_BETA
        self.rampup = cfg.TRAINER.MIXMATCH.RAMPUP

    def check_cfg(self, cfg: CfgNode) -> None:
        assert cfg.DATALOADER.K_TRANSFORMS > 1, "MixMatch needs DATALOADER.K_TRANSFORMS of 2 or more"

    def forward_backward(self, batch_x: dict[str, Any], batch_u: dict[str, Any]) -> dict[str, float]:
        images, labels, views = self.parse_batch_train(batch_x, batch_u)
        step = self.batch_idx + self.epoch * self.num_batches
        with torch.no_grad():
            guess = sum(self.model(view).softmax(1) for view in views) / len(views)
            guessed = sharpen_prob(guess, self.temp).repeat(len(views), 1)  # type: ignore[arg-type]
            unlabelled = torch.cat(views)
        others, targets = shuffle_index(torch.cat([images, unlabelled]), torch.cat([labels, guessed]))
        n = len(images)
        images, labels = mixup(images, others[:n], labels, targets[:n], self.beta, preserve_order=True)
        unlabelled, guessed = mixup(
            unlabelled, others[n:], guessed, targets[n:], self.beta, preserve_order=True
        )

        p = self.model(images).softmax(1)
        loss_x = -(labels * (p + 1e-5).log()).sum(1).mean()
        loss_u = (guessed - self.model(unlabelled).softmax(1)).square().mean()
        weight_u = self.weight_u * linear_rampup(step, self.rampup)
        self.model_backward_and_update(loss_x + weight_u * loss_u)
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        return {"loss_x": loss_x.item(), "loss_u": loss_u.item()}

    def parse_batch_train(
        self, batch_x: dict[str, Any], batch_u: dict[str, Any]
    ) -> tuple[Tensor, Tensor, list]:
        """The first view of the labelled images, one-hot labels, all views of the unlabelled ones."""
        labels = create_onehot(batch_x["label"], self.num_classes).to(self.device)
        return batch_x["img"][0].to(self.device), labels, [view.to(self.device) for view in batch_u["img"]]
