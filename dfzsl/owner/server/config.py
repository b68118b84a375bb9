"""Define how much of a teacher an owner's server discloses."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dfzsl.trainers.recovery.oracle import LEVELS
from dfzsl.utils.errors import UserError, unknown_name

# Bytes of JSON that a request needs at most: a float64 has up to 24 characters, separators come on top.
NUMBER_BYTES, ROW_BYTES, ENVELOPE_BYTES = 32, 64, 4096


@dataclass(frozen=True)
class ServerConfig:
    """Access level, precision, budgets and request sizes of a server.

    Args:
        access: the level that discloses most: "logits", "probabilities" or "labels". Levels that disclose
            less are answered too.
        decimals: decimal places that scores are rounded to; None: no rounding.
        top: number of largest probabilities in a response, the others are 0; 0: all of them.
        noise: standard deviation of the noise on the logits, at every level. Equal features get equal noise,
            so that repeated queries do not average it out.
        budget: queries of all clients together; 0: unlimited.
        token_budget: queries of each token without a budget of its own; 0: unlimited.
        rate: queries per second of each client; 0: unlimited.
        batch: queries in a request.
        body: bytes of a request; 0: what `batch` queries need at most.

    Raises:
        UserError: a value is out of its range.
    """

    access: str = "labels"
    decimals: int | None = None
    top: int = 0
    noise: float = 0.0
    budget: int = 0
    token_budget: int = 0
    rate: float = 0.0
    batch: int = 4096
    body: int = 0

    def __post_init__(self) -> None:
        if self.access not in LEVELS[1:]:
            raise unknown_name("access level of a server (--access)", self.access, LEVELS[1:])
        if self.decimals is not None and not 0 <= self.decimals <= 12:
            raise UserError(f"--decimals must be 0 to 12, got {self.decimals}")
        if self.top and self.access == "logits":
            raise UserError(
                "--top limits probabilities; a server with --access logits would disclose them all"
            )
        for name in ("top", "noise", "budget", "token_budget", "rate", "body"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(self, name)}")
        if self.batch < 1:
            raise UserError(f"--batch must be at least 1, got {self.batch}")

    @property
    def levels(self) -> tuple[str, ...]:
        """Access levels that are answered."""
        return LEVELS[LEVELS.index(self.access) :]

    def max_body_bytes(self, dim: int) -> int:
        """Return the largest body of a request whose queries have `dim` numbers."""
        return self.body or self.batch * (dim * NUMBER_BYTES + ROW_BYTES) + ENVELOPE_BYTES
