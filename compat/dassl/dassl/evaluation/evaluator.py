"""What a model's outputs on a test set are worth."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from .build import EVALUATOR_REGISTRY


class EvaluatorBase:
    """Interface: `reset`, then `process` each batch, then `evaluate`."""

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg

    def reset(self) -> None:
        raise NotImplementedError

    def process(self, mo: Tensor, gt: Tensor) -> None:
        raise NotImplementedError

    def evaluate(self) -> OrderedDict[str, float]:
        raise NotImplementedError


@EVALUATOR_REGISTRY.register()
class Classification(EvaluatorBase):
    """Accuracy, error rate and macro F1, in percent."""

    def __init__(self, cfg: CfgNode, lab2cname: dict[int, str] | None = None, **kwargs: Any) -> None:
        super().__init__(cfg)
        self._lab2cname = lab2cname
        if cfg.TEST.PER_CLASS_RESULT and lab2cname is None:
            raise ValueError("TEST.PER_CLASS_RESULT needs the class names (lab2cname)")
        self.reset()

    def reset(self) -> None:
        self._correct = 0
        self._total = 0
        self._y_true: list[int] = []
        self._y_pred: list[int] = []

    def process(self, mo: Tensor, gt: Tensor) -> None:
        """Add a batch: model output (B, C) and labels (B,)."""
        pred = mo.max(1)[1]
        self._correct += int((pred == gt).sum().item())
        self._total += gt.shape[0]
        self._y_true.extend(gt.tolist())
        self._y_pred.extend(pred.tolist())

    def evaluate(self) -> OrderedDict[str, float]:
        """Print and return accuracy, error_rate, macro_f1 and, if asked for, perclass_accuracy.

        macro_f1 is the mean, over the classes that occur in the labels, of 2 TP / (2 TP + FP + FN).
        Raises ValueError if nothing was processed.
        """
        if not self._total:
            raise ValueError("nothing to evaluate: the data loader gave no batch")
        y_true, y_pred = np.array(self._y_true), np.array(self._y_pred)
        accuracy = 100.0 * self._correct / self._total
        labels = np.unique(y_true)
        size = int(max(y_true.max(), y_pred.max())) + 1
        in_true = np.bincount(y_true, minlength=size)[labels]
        in_pred = np.bincount(y_pred, minlength=size)[labels]
        hits = np.bincount(y_true[y_true == y_pred], minlength=size)[labels]
        macro_f1 = 100.0 * float(np.mean(2.0 * hits / (in_true + in_pred)))
        results = OrderedDict(accuracy=accuracy, error_rate=100.0 - accuracy, macro_f1=macro_f1)
        print(
            "=> result\n"
            f"* total: {self._total:,}\n"
            f"* correct: {self._correct:,}\n"
            f"* accuracy: {results['accuracy']:.1f}%\n"
            f"* error: {results['error_rate']:.1f}%\n"
            f"* macro_f1: {results['macro_f1']:.1f}%"
        )
        if self.cfg.TEST.PER_CLASS_RESULT:
            results["perclass_accuracy"] = self._per_class(labels, in_true, hits)
        if self.cfg.TEST.COMPUTE_CMAT:
            self._save_confusion_matrix(y_true, y_pred)
        return results

    def _per_class(self, labels: np.ndarray, totals: np.ndarray, hits: np.ndarray) -> float:
        print("=> per-class result")
        accuracies = 100.0 * hits / totals
        assert self._lab2cname is not None
        for label, total, correct, accuracy in zip(labels, totals, hits, accuracies, strict=True):
            print(
                f"* class: {label} ({self._lab2cname[int(label)]})\t"
                f"total: {total:,}\tcorrect: {correct:,}\tacc: {accuracy:.1f}%"
            )
        average = float(np.mean(accuracies))
        print(f"* average: {average:.1f}%")
        return average

    def _save_confusion_matrix(self, y_true: np.ndarray, y_pred: np.ndarray) -> None:
        """cmat.pt: rows are true classes, columns predictions, over the classes in either."""
        classes, codes = np.unique(np.concatenate([y_true, y_pred]), return_inverse=True)
        n = len(classes)
        true, pred = codes.reshape(2, -1)
        counts = np.bincount(true * n + pred, minlength=n * n).reshape(n, n).astype(float)
        matrix = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        path = os.path.join(self.cfg.OUTPUT_DIR, "cmat.pt")
        torch.save(matrix, path)
        print(f"Confusion matrix is saved to {path}")
