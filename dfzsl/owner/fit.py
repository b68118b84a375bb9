"""Fit a teacher on labeled images or on a file of their features."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch

from dfzsl.datasets.labeled_images import read_labeled_features
from dfzsl.trainers.clip.class_prompts import ClassPrompts
from dfzsl.trainers.clip.loading import load_backbone, parse_identity
from dfzsl.trainers.recovery.teacher import Teacher, fit_teacher
from dfzsl.utils.errors import UserError


def fit_teacher_on(
    data: str | os.PathLike[str],
    *,
    classnames: Sequence[str] | None = None,
    backbone: str = "ViT-B-16",
    weights: str = "",
    text: str = "",
    shots: int = 0,
    normalized: bool = True,
    seed: int = 1,
    batch_size: int = 64,
    num_workers: int = 4,
    device: str | torch.device = "cpu",
    quiet: bool = True,
) -> Teacher:
    """Fit a teacher, and cross-validate it against text where the classes' text features are known.

    Args:
        data: a folder that has a folder of images for each class, or a feature file, of which the training
            and validation parts are used.
        classnames: the classes of the teacher, in this order; None for all of the data.
        backbone: open_clip's name of the image encoder for a folder. A feature file names its own.
        weights: the encoder's pretrained tag or weights file; "" for OpenAI's.
        text: prompt template, "ensemble" or .json file that the text features are made of. "" stands for the
            default template with a folder, and for the file's own text features with a feature file.
        shots: images of each class, drawn at random; 0 for all.
        normalized: serve cosines, else the scores x.w of the linear classifier.
        seed: seed of the random draw.
        batch_size: images that are encoded at a time.
        num_workers: processes that decode images.
        device: device of the encoder.
        quiet: hide the progress bar.

    Returns:
        The teacher. It has no card if neither `text` nor the feature file has text features.

    Raises:
        UserError: the data cannot be used, or an image cannot be read.
    """
    # The encoder is loaded once, and only if the data are images.
    open_backbone = functools.cache(lambda: load_backbone(backbone, weights or "openai", device))
    data_set = read_labeled_features(
        data,
        open_backbone,
        ("train", "val"),
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        quiet=quiet,
    )
    if data_set.errors:
        raise UserError(data_set.errors[0])
    if classnames:
        data_set = data_set.select_classes(classnames)
    text_features, texts = data_set.text, ClassPrompts((data_set.template,) if data_set.template else ())
    is_folder = os.path.isdir(data)
    if text or is_folder:
        texts = ClassPrompts.parse(text)
        encoder = open_backbone() if is_folder else load_backbone(*parse_identity(data_set.backbone), device)
        text_features = texts.features(encoder, data_set.classnames).cpu()
    return fit_teacher(
        data_set.features,
        data_set.labels,
        data_set.classnames,
        data_set.backbone,
        text=text_features,
        prompts=texts.description,
        normalized=normalized,
        shots=shots,
        generator=torch.Generator().manual_seed(seed),
    )
