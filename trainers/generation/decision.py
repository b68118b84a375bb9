"""Provide the summary of how a classifier was built."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """What stages 1 and 2 gave, and what stage 3 chose and why.

    Attributes:
        teacher: number of base classes, access level and encoder.
        recovered: result of stage 1: method, queries and estimated error.
        geometry: feature statistics of the encoder, or that there are none.
        text: prompts of the classes.
        aligned: epochs of FLPT, or why it was skipped.
        generator: name of the generator of stage 3.
        teacher_weight: mixing weight g of the teacher beside text; None where class weights are trained.
        reason: why this weight was chosen.
        new_classes: number of new classes.
        stacking_bias: bias of the new classes (calibrated stacking), in units of the cosine.
    """

    teacher: str
    recovered: str
    geometry: str
    text: str
    aligned: str
    generator: str
    teacher_weight: float | None
    reason: str
    new_classes: int
    stacking_bias: float

    @property
    def chosen(self) -> str:
        """The choice of stage 3 in one line."""
        if self.teacher_weight is None:
            return f"class weights trained with the generator '{self.generator}'"
        return f"teacher weight {self.teacher_weight:.3g} beside text: {self.reason}"

    def rows(self) -> list[tuple[str, str]]:
        """List (what, value) for a table."""
        return [
            ("teacher", self.teacher),
            ("recovered", self.recovered),
            ("geometry", self.geometry),
            ("text", self.text),
            ("aligned", self.aligned),
            ("chosen", self.chosen),
            ("new classes", f"{self.new_classes}, stacking bias {self.stacking_bias:+.3f} (cosine)"),
        ]
