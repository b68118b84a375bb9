"""Provide the settings of stage 1 (recovery)."""

from __future__ import annotations

from dataclasses import dataclass

from dfzsl.utils.errors import UserError, unknown_name

METHODS = ("closed_form", "moments", "simulator", "gmm", "generator")


@dataclass
class RecoverySettings:
    """Settings of stage 1: the config keys RECOVERY.* in lower case.

    The defaults are this project's. The paper's own values are in configs/trainers/DFZSL/paper/.

    Attributes:
        method: how the teacher's class weights are learned.
            "closed_form": exactly, as far as the access level determines them (weight_recovery.py).
            "simulator" (paper): prototypes trained on vMF draws, with epochs x draws x classes queries.
            "moments": the simulator's expected loss from the vMF's second moment, with about d queries.
            "gmm" (paper): no training; the prototypes are the text embeddings.
            "generator" (paper): an MLP on text and noise in place of a vMF.
        directions: mean directions of the classes: "geometry" (class_directions.py), or "teacher" for the
            learned class weights. The methods gmm and generator use the text embeddings instead.
        concentration: "geometry" (one value, from `coherence`) or "paper" (from angles between texts).
        theta: factor on the concentration.
        epochs: training epochs of simulator, moments and generator.
        lr: their initial learning rate.
        draws: features drawn per class and epoch by simulator and generator.
        coherence: mean resultant length of a class. 0: that of the model card of the teacher, else 0.88, a
            typical value of real data sets.
        cone: class-mean cosine, i.e. mean cosine of class means to their common mean. 0: that of the model
            card of the teacher, else `estimate_class_mean_cosine` of the texts.
        rays: search directions per class and dimension at access level labels.
        bisections: queries per search direction at access level labels.
        tolerance: relative error of the class weights at which no more logits or probabilities are queried.
        num_per_class: virtual features per class and pass (datasets/virtual_features.py).
        filter: whether to use only virtual features that the recovered teacher assigns to their own class.
        fresh: whether to draw new virtual features for each pass.

    Raises:
        UserError: a value is unknown or out of range.
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
        for name, choices in (
            ("method", METHODS),
            ("directions", ("geometry", "teacher")),
            ("concentration", ("geometry", "paper")),
        ):
            if (value := getattr(self, name)) not in choices:
                raise unknown_name(f"RECOVERY.{name.upper()}", value, choices)
        for name in ("theta", "lr", "epochs", "draws", "bisections", "tolerance", "num_per_class"):
            if not getattr(self, name) > 0:
                raise UserError(f"RECOVERY.{name.upper()} must be greater than 0, got {getattr(self, name)}")
        if not self.rays > 1:
            raise UserError(f"RECOVERY.RAYS must be greater than 1, got {self.rays}")
