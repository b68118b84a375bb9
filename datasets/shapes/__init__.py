"""The data set `Shapes`: 120 classes of the built-in world, drawn and written as PNG files at first use."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from dassl.data.datasets import DATASET_REGISTRY
from PIL import Image
from tqdm import tqdm

from dfzsl.datasets.base import ClassDataset, Row, Split
from dfzsl.utils.dassl_plugin import register
from dfzsl.utils.errors import UserError

from .world import LAMPLIGHT, STYLES, VERSION, classes, render

IMAGES_PER_CLASS = {"train": 30, "val": 5, "test": 20}  # of each class


@register(DATASET_REGISTRY, replace=True)
class Shapes(ClassDataset):
    """Compositions such as "striped teal leaf in the snow", 60 base and 60 new, 64 x 64 pixels.

    The pictures lie under `DATASET.ROOT`/shapes, in a folder for each part, and are the same everywhere.
    A part is written when it is first needed: a data-free run never makes the training pictures.
    """

    folder = os.path.join("shapes", f"v{VERSION}")
    style = ""  # a variant's, of STYLES; "": the data set's own light

    def __init__(self, cfg: Any) -> None:
        if cfg.DATASET.ROOT:  # without one the base class raises
            for part in ("test",) if cfg.TEACHER.FILE or self.style else IMAGES_PER_CLASS:
                write_part(Path(cfg.DATASET.ROOT).expanduser() / self.folder, part, self.style)
        super().__init__(cfg)

    def repair_hint(self) -> str:
        return f"delete {self.dataset_dir}, and the next run draws it anew"

    def read(self) -> Split:
        parts = {part: list(rows(self.dataset_dir, part)) for part in IMAGES_PER_CLASS}
        if self.data_free or self.style:
            parts["train"] = parts["val"] = []
        return Split([c.name for c in classes()], parts["train"], parts["val"], parts["test"])


class ShapesVariant(Shapes):
    """The same classes in another style, to be tested on alone, as ImageNet's variants are."""

    def __init_subclass__(cls) -> None:
        cls.folder = os.path.join("shapes", f"v{VERSION}-{cls.style}")


@register(DATASET_REGISTRY, replace=True)
class ShapesDark(ShapesVariant):
    style = "dark"


@register(DATASET_REGISTRY, replace=True)
class ShapesDrawing(ShapesVariant):
    style = "drawing"


@register(DATASET_REGISTRY, replace=True)
class ShapesPainting(ShapesVariant):
    style = "painting"


@register(DATASET_REGISTRY, replace=True)
class ShapesPixel(ShapesVariant):
    style = "pixel"


def rows(folder: str | os.PathLike[str], part: str) -> Iterator[Row]:
    """The pictures of a part, class by class: folder/part/017-striped-teal-leaf-in-the-snow/04.png."""
    for label, composition in enumerate(classes()):
        name = composition.name
        of_class = os.path.join(folder, part, f"{label:03d}-{name.replace(' ', '-')}", "")
        for number in range(IMAGES_PER_CLASS[part]):
            yield Row(f"{of_class}{number:02d}.png", label, name)


def write_part(folder: Path, part: str, style: str = "") -> None:
    """Draw the pictures of `part` into folder/part, unless they are there: all of them or none.

    They are written to a folder of their own, which is renamed at the end. Of two processes at once one
    comes first, and the other drops its equal work. Raises UserError if the place cannot be written.
    """
    target = folder / part
    if target.is_dir():
        return
    draft = folder / f".{part}-{uuid.uuid4().hex}"
    series = (
        len(IMAGES_PER_CLASS) + list(STYLES).index(style) if style else list(IMAGES_PER_CLASS).index(part)
    )
    light = STYLES[style] if style else LAMPLIGHT
    try:
        draft.mkdir(parents=True)
        bar = tqdm(
            rows("", part), f"drawing the {part} pictures of shapes", len(classes()) * IMAGES_PER_CLASS[part]
        )
        for number, row in enumerate(bar):
            rng = np.random.default_rng((VERSION, series, number))
            path = draft / Path(row.path).relative_to(part)
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(render(classes()[row.label], rng, light)).save(path, compress_level=1)
        draft.rename(target)
    except OSError as error:
        if not target.is_dir():  # else another process has just put it there
            raise UserError(
                f"{folder}: cannot write the pictures ({error.strerror}); choose another --root"
            ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
