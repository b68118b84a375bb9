"""FixMatch (Sohn et al., NeurIPS 2020)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode

from ...data import DataManager
from ...data.transforms import build_transform
from ...metrics import compute_accuracy
from ..build import TRAINER_REGISTRY
from ..trainer import TrainerXU


@TRAINER_REGISTRY.offer
class FixMatch(TrainerXU):
    """A strongly augmented image is to get the label that its weakly augmented self got with confidence.

    TRAINER.FIXMATCH: STRONG_TRANSFORMS; WEIGHT_U; CONF_THRE, the least probability of a label that counts.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.weight_u = cfg.TRAINER.FIXMATCH.WEIGHT_U
        self.conf_thre = cfg.TRAINER.FIXMATCH.CONF_THRE

    def check_cfg(self, cfg: CfgNode) -> None:
        assert len(cfg.TRAINER.FIXMATCH.STRONG_TRANSFORMS) > 0, "TRAINER.FIXMATCH.STRONG_TRANSFORMS is empty"

    def build_data_loader(self) -> None:
        strong = self.cfg.TRAINER.FIXMATCH.STRONG_TRANSFORMS
        transforms = [build_transform(self.cfg), build_transform(self.cfg, choices=strong)]
        self.take_data(DataManager(self.cfg, custom_tfm_train=transforms))

    def assess_y_pred_quality(self, y_pred: Tensor, y_true: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Accuracy of the labels that count (`mask` is 1) and of all, and the share that counts."""
        right = (y_pred == y_true).float()
        kept = mask.sum()
        return {
            "acc_thre": (right * mask).sum() / (kept + 1e-5),
            "acc_raw": right.mean(),
            "keep_rate": kept / mask.numel(),
        }

    def forward_backward(self, batch_x: dict[str, Any], batch_u: dict[str, Any]) -> dict[str, Any]:
        weak_x, strong_x, labels, weak_u, strong_u, truth = self.parse_batch_train(batch_x, batch_u)
        n = len(weak_x)
        with torch.no_grad():
            confidence, guessed = self.model(torch.cat([weak_x, weak_u])).softmax(1).max(1)
            mask = (confidence >= self.conf_thre).float()
            quality = self.assess_y_pred_quality(guessed[n:], truth, mask[n:])
        logits = self.model(weak_x)
        loss_x = F.cross_entropy(logits, labels)
        each = F.cross_entropy(self.model(torch.cat([strong_x, strong_u])), guessed, reduction="none")
        loss_u = (each * mask).mean()
        self.model_backward_and_update(loss_x + self.weight_u * loss_u)
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        return {
            "loss_x": loss_x.item(),
            "acc_x": compute_accuracy(logits, labels)[0].item(),
            "loss_u": loss_u.item(),
            "y_u_pred_acc_raw": quality["acc_raw"],
            "y_u_pred_acc_thre": quality["acc_thre"],
            "y_u_pred_keep": quality["keep_rate"],
        }

    def parse_batch_train(self, batch_x: dict[str, Any], batch_u: dict[str, Any]) -> tuple[Tensor, ...]:
        """Labelled images weak and strong, labels, unlabelled images weak and strong, and their labels, which
        only tell how good the guesses are."""
        names = ((batch_x, "img"), (batch_x, "img2"), (batch_x, "label"))
        names += ((batch_u, "img"), (batch_u, "img2"), (batch_u, "label"))
        return tuple(batch[name].to(self.device) for batch, name in names)
