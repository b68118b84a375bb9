"""A classifier for other programs: as ONNX, alone or behind its image encoder, or as a plain matrix."""

from __future__ import annotations

import contextlib
import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfzsl.io.files import atomic
from dfzsl.trainers.clip.loading import logging_disabled
from dfzsl.trainers.generation.classifier import Classifier
from dfzsl.utils.errors import UserError

TOLERANCE = 2e-3  # of a logit; they run to 100


class _Whole(nn.Module):
    """Logits (n, C) of pictures (n, 3, h, w), or of features (n, d) where there is no encoder."""

    weight: Tensor
    bias: Tensor
    shift: Tensor | None

    def __init__(self, classifier: Classifier, encoder: nn.Module | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.temperature = classifier.temperature
        self.register_buffer("weight", classifier.weight)
        self.register_buffer("bias", classifier.bias)
        self.register_buffer("shift", classifier.shift)

    def forward(self, x: Tensor) -> Tensor:
        if self.encoder is not None:
            x = self.encoder(x)
        x = F.normalize(x, dim=1)
        if self.shift is not None:
            x = F.normalize(x + self.shift, dim=1)
        return (x @ self.weight.T + self.bias) / self.temperature


def export_onnx(classifier: Classifier, path: str | os.PathLike[str], backbone: Any = None) -> float:
    """Write an ONNX model with input `features` (n, d), or with a backbone `pictures` (n, 3, h, w), and
    output `logits` (n, C); its metadata hold classnames and how pictures are prepared, as JSON.

    Returns the largest difference of a logit to ours, by onnxruntime on batches of one and of three. Raises
    UserError where that is more than `TOLERANCE`.
    """
    import onnx
    import onnxruntime

    about: dict[str, Any] = {"classnames": classifier.classnames, "backbone": classifier.backbone}
    model = _Whole(classifier, backbone.model.visual if backbone is not None else None).eval()
    name, shape = "features", (classifier.weight.shape[1],)
    if backbone is not None:
        name, shape = "pictures", (3, *backbone.preprocess_cfg["size"])
        about["preprocess"] = backbone.preprocess_cfg
    rng = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, *shape, generator=rng) for n in (3, 1)]
    with atomic(path) as temporary:
        # What the exporter says is for its own authors.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), logging_disabled():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (batches[0],),
                input_names=[name],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            program.save(str(temporary))
        made = onnx.load(str(temporary))
        for key, value in about.items():
            made.metadata_props.add(key=key, value=json.dumps(value))
        onnx.save(made, str(temporary))
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        with torch.no_grad():
            off = max(
                float((torch.from_numpy(session.run(None, {name: x.numpy()})[0]) - model(x)).abs().max())
                for x in batches
            )
        if off > TOLERANCE:
            raise UserError(f"{path}: onnxruntime differs from torch by {off:.2g} in a logit: not written")
    return off


def export_matrix(classifier: Classifier, path: str | os.PathLike[str]) -> list[str]:
    """Write the zero-shot weight matrix (d, C) of unit columns, as open_clip and CLIP_benchmark take it
    (torch.save), and the class names beside it (.txt). Returns what has no place in a matrix."""
    with atomic(path) as temporary:
        torch.save(classifier.weight.T.contiguous(), temporary)
    with atomic(Path(path).with_suffix(".txt")) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in classifier.classnames), encoding="utf-8")
    left = [] if classifier.shift is None else ["the shift of image features"]
    return left + (["the bias of new classes"] if bool(classifier.bias.any()) else [])
