"""Provide the summary of how a classifier was built."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """Results of stages 1 and 2, and the choice of stage 3.

    Attributes:
        teacher: number of base classes, access level and encoder.
        recovery: result of stage 1: method, queries and estimated error.
        feature_statistics: feature statistics of the encoder, or that there are none.
        prompts: prompts of the classes.
        alignment: epochs of FLPT, or why it was skipped.
        generator: name of the generator of stage 3.
        teacher_weight: mixing weight g of the teacher; None where class weights are trained.
        reason: why this weight was chosen.
        new_classes: number of new classes.
        stacking_bias: bias of the new classes (calibrated stacking), in units of the cosine.
    """

    teacher: str
    recovery: str
    feature_statistics: str
    prompts: str
    alignment: str
    generator: str
    teacher_weight: float | None
    reason: str
    new_classes: int
    stacking_bias: float

    @property
    def class_weights(self) -> str:
        """The choice of stage 3 in one line."""
        if self.teacher_weight is None:
            return f"trained with the generator '{self.generator}'"
        return f"mixture of text and teacher, teacher weight {self.teacher_weight:.3g}: {self.reason}"

    def rows(self) -> list[tuple[str, str]]:
        """List (label, value) pairs for a table."""
        return [
            ("teacher", self.teacher),
            ("recovery", self.recovery),
            ("feature statistics", self.feature_statistics),
            ("prompts", self.prompts),
            ("prompt tuning", self.alignment),
            ("class weights", self.class_weights),
            ("new classes", f"{self.new_classes}, stacking bias {self.stacking_bias:+.3f} (cosine)"),
        ]
