"""Export classifiers to ONNX, with or without the image encoder, or to a weight matrix."""

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

MAX_LOGIT_DIFFERENCE = 2e-3  # logits go up to 100


class _ExportModule(nn.Module):
    """Compute logits (n, C) from images (n, 3, h, w), or from features (n, d) if there is no encoder."""

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
    """Write an ONNX model and compare it with the classifier.

    Its input is `features` (n, d), or `pictures` (n, 3, h, w) if there is a backbone; its output is `logits`
    (n, C). Its metadata have the class names and the preprocessing of images as JSON.

    Args:
        classifier: the classifier.
        path: the .onnx file to write.
        backbone: image encoder to include, or None.

    Returns:
        The largest difference of a logit between onnxruntime and torch, on batches of one and three.

    Raises:
        UserError: the difference is above MAX_LOGIT_DIFFERENCE.
    """
    import onnx
    import onnxruntime

    about: dict[str, Any] = {"classnames": classifier.classnames, "backbone": classifier.backbone}
    model = _ExportModule(classifier, backbone.model.visual if backbone is not None else None).eval()
    name, shape = "features", (classifier.weight.shape[1],)
    if backbone is not None:
        name, shape = "pictures", (3, *backbone.preprocess_cfg["size"])
        about["preprocess"] = backbone.preprocess_cfg
    rng = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, *shape, generator=rng) for n in (3, 1)]
    with atomic(path) as temporary:
        # The exporter prints messages that only its authors can use.
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
        exported = onnx.load(str(temporary))
        for key, value in about.items():
            exported.metadata_props.add(key=key, value=json.dumps(value))
        onnx.save(exported, str(temporary))
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        with torch.no_grad():
            difference = max(
                float((torch.from_numpy(session.run(None, {name: x.numpy()})[0]) - model(x)).abs().max())
                for x in batches
            )
        if difference > MAX_LOGIT_DIFFERENCE:
            raise UserError(
                f"{path}: not written; onnxruntime and torch differ by {difference:.2g} in a logit"
            )
    return difference


def export_matrix(classifier: Classifier, path: str | os.PathLike[str]) -> list[str]:
    """Write the weight matrix (d, C) in the format of open_clip and CLIP_benchmark, with torch.save.

    The class names are written to a .txt file beside it.

    Returns:
        Descriptions of the parts of the classifier that a matrix cannot represent.

    Raises:
        UserError: the .txt file exists and is not that of an earlier export.
    """
    names_file = Path(path).with_suffix(".txt")
    if names_file.exists() and not Path(path).exists():
        raise UserError(f"{names_file} exists, where the class names would be written; choose another output")
    with atomic(path) as temporary:
        torch.save(classifier.weight.T.contiguous(), temporary)
    with atomic(names_file) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in classifier.classnames), encoding="utf-8")
    omitted = [] if classifier.shift is None else ["the shift of image features"]
    return omitted + (["the bias of new classes"] if bool(classifier.bias.any()) else [])
