"""Answer queries with a teacher's rounded, truncated or noisy scores."""

from __future__ import annotations

import hmac

import numpy as np
import torch

from dfzsl.trainers.recovery.teacher import Teacher
from dfzsl.utils.errors import UserError

from .config import ServerConfig


class LimitedTeacher:
    """A teacher whose answers disclose no more than a config allows.

    Args:
        teacher: the teacher.
        config: decimals, top and noise of the answers.
        secret: key from which noise is derived.

    Raises:
        UserError: the config does not fit the teacher.
    """

    def __init__(self, teacher: Teacher, config: ServerConfig, secret: bytes) -> None:
        if config.top > len(teacher.classnames):
            raise UserError(
                f"--top {config.top} is more than the teacher's {len(teacher.classnames)} classes"
            )
        self.teacher, self.config, self.secret = teacher, config, secret

    def answer(self, level: str, features: np.ndarray) -> list:
        """Answer queries at an access level.

        Args:
            level: "logits", "probabilities" or "labels".
            features: float32 array of shape (n, d).

        Returns:
            n labels, or n lists of C scores.
        """
        logits = self.teacher.logits(torch.from_numpy(features.astype(np.float64)))
        if self.config.noise:
            noise = np.stack([self._noise(row) for row in features])
            logits = logits + self.config.noise * torch.from_numpy(noise)
        if level == "labels":
            return logits.argmax(1).tolist()
        scores = logits.softmax(1) if level == "probabilities" else logits
        if self.config.top and self.config.top < scores.shape[1]:
            largest = scores.topk(self.config.top, dim=1)
            scores = torch.zeros_like(scores).scatter(1, largest.indices, largest.values)
        if self.config.decimals is not None:
            scores = scores.round(decimals=self.config.decimals)
        return scores.tolist()

    def _noise(self, row: np.ndarray) -> np.ndarray:
        """Return standard normal noise (C,) that is a function of the query and the secret."""
        # Adding 0 turns -0 into 0: both are the same query.
        key = hmac.digest(self.secret, (row + np.float32(0.0)).tobytes(), "sha256")
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
        return generator.standard_normal(len(self.teacher.classnames))
