"""Provide the settings of stage 1."""

from __future__ import annotations

from dataclasses import dataclass

from dfzsl.utils.errors import UserError, unknown_name

METHODS = ("closed_form", "moments", "simulator", "gmm", "generator")


@dataclass
class RecoverySettings:
    """Config keys RECOVERY.*, in upper case. The paper's own values: configs/trainers/DFZSL/paper/.

    method: how the teacher is learned.
        closed_form  its rows, exactly where the access level shows them (weight_recovery.py)
        simulator    the paper: prototypes learned on vMF draws, epochs x draws x classes queries
        moments      the simulator's expected loss from the vMF's second moment: no draws, d queries
        gmm          the paper's: nothing is learned, prototypes are the text features
        generator    the paper's: an MLP from text and noise instead of a vMF
    directions: mean directions of the classes: "geometry" (class_directions.py), or "teacher": the learned
        rows. gmm and generator start from the text features instead.
    concentration: "geometry" (one value from `coherence`) or "paper" (angles between text features).
    theta: factor on the concentration.
    epochs, lr, draws: of simulator, moments and generator; draws per class and epoch.
    coherence: mean cosine of a class's features to their mean; cone: of class means to their common mean. 0:
        what the teacher's card says, else 0.88, amid real data sets, and `estimate_class_mean_cosine` the texts.
    rays, bisections: the price of a teacher that answers labels alone.
    tolerance: relative error of the rows below which no more logits or probabilities are asked for.
    num_per_class, filter, fresh: the virtual-feature loader's (datasets/virtual_features.py).
    """

    method: str = "closed_form"
    directions: str = "geometry"
    concentration: str = "geometry"
    theta: float = 1.0
    epochs: int = 1000
    lr: float = 3e-3
    draws: int = 50
    coherence: float = 0.0
    cone: float = 0.0
    rays: float = 1.25
    bisections: int = 12
    tolerance: float = 0.02
    num_per_class: int = 100
    filter: bool = False
    fresh: bool = True

    def __post_init__(self) -> None:
        for name, known in (
            ("method", METHODS),
            ("directions", ("geometry", "teacher")),
            ("concentration", ("geometry", "paper")),
        ):
            if (value := getattr(self, name)) not in known:
                raise unknown_name(f"RECOVERY.{name.upper()}", value, known)
        for name in ("theta", "lr", "epochs", "draws", "bisections", "tolerance", "num_per_class"):
            if not getattr(self, name) > 0:
                raise UserError(f"RECOVERY.{name.upper()} must be greater than 0, got {getattr(self, name)}")
        if not self.rays > 1:
            raise UserError(f"RECOVERY.RAYS must be greater than 1, got {self.rays}")
