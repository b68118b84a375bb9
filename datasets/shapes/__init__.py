"""Provide Shapes, the built-in toy data set: 120 classes, drawn and written as PNG files on first use."""

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

IMAGES_PER_CLASS = {"train": 30, "val": 5, "test": 20}


@register(DATASET_REGISTRY, replace=True)
class Shapes(ClassDataset):
    """Images of 64 x 64 pixels of 60 base and 60 new classes, for example "striped teal leaf in the snow".

    The images are written to `DATASET.ROOT`/shapes, in a folder per split, and are the same on all machines.
    A split is written when it is first needed, so a data-free run never writes training images.
    """

    folder = os.path.join("shapes", f"v{VERSION}")
    style = ""  # key of STYLES, for a variant; "": the style of Shapes itself

    def __init__(self, cfg: Any) -> None:
        # The base class raises an error if DATASET.ROOT is empty.
        if cfg.DATASET.ROOT:
            for part in ("test",) if cfg.TEACHER.FILE or self.style else IMAGES_PER_CLASS:
                write_part(Path(cfg.DATASET.ROOT).expanduser() / self.folder, part, self.style)
        super().__init__(cfg)

    def repair_hint(self) -> str:
        return f"delete {self.dataset_dir}; the next run draws the images again"

    def read(self) -> Split:
        parts = {part: list(rows(self.dataset_dir, part)) for part in IMAGES_PER_CLASS}
        if self.data_free or self.style:
            parts["train"] = parts["val"] = []
        return Split([c.name for c in classes()], parts["train"], parts["val"], parts["test"])


class ShapesVariant(Shapes):
    """Test images of the same classes in another style, comparable to ImageNet's variants."""

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
    """Iterate over the images of a split: folder/part/017-striped-teal-leaf-in-the-snow/04.png."""
    for label, composition in enumerate(classes()):
        name = composition.name
        class_folder = os.path.join(folder, part, f"{label:03d}-{name.replace(' ', '-')}", "")
        for number in range(IMAGES_PER_CLASS[part]):
            yield Row(f"{class_folder}{number:02d}.png", label, name)


def write_part(folder: Path, part: str, style: str = "") -> None:
    """Draw the images of a split into folder/part, unless that exists.

    They are written to a temporary folder that is renamed at the end, so that two processes may draw at once.

    Args:
        folder: folder of the data set.
        part: train, val or test.
        style: key of `STYLES`; "": the style of Shapes itself.

    Raises:
        UserError: the folder cannot be written.
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
            rows("", part), f"drawing the {part} images of shapes", len(classes()) * IMAGES_PER_CLASS[part]
        )
        for number, row in enumerate(bar):
            rng = np.random.default_rng((VERSION, series, number))
            path = draft / Path(row.path).relative_to(part)
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(render(classes()[row.label], rng, light)).save(path, compress_level=1)
        draft.rename(target)
    except OSError as error:
        # Another process may have written the folder meanwhile.
        if not target.is_dir():
            raise UserError(
                f"{folder}: cannot write the images ({error.strerror}); choose another --root"
            ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
