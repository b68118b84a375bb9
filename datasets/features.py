"""Image features: read from a file, made once by a frozen encoder and kept on disk, served in batches."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from dassl.data.datasets import DATASET_REGISTRY, Datum
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from dfzsl import ranks
from dfzsl.errors import UserError
from dfzsl.files import NUMBERS, bounded, checked_names, load_tensors, save_tensors
from dfzsl.toolbox import register

from .base import ClassDataset, Row, Split

TEXTS = ("classnames", "backbone", "weights", "template")  # what of a feature file is not numbers
WHOLE = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
# Pillow hands others to programs of the system, Ghostscript for one, whatever the file's name.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
PART = 512  # images a part file holds: what an interrupted encoding can lose, and what ranks share out


class Encoder(Protocol):
    """What encoding needs of a backbone."""

    name: str
    weights_id: str
    precision: str
    dim: int

    def encode_image(self, images: torch.Tensor) -> torch.Tensor: ...


# ---------------------------------------------------------------- feature files


class FeatureDatum(Datum):
    """A Datum that carries its (d,) unit feature; `impath` is the feature file."""

    def __init__(self, feature: torch.Tensor, impath: str, label: int, domain: int = 0, classname: str = ""):
        super().__init__(impath=impath, label=label, domain=domain, classname=classname)
        self._feature = feature

    @property
    def feature(self) -> torch.Tensor:
        return self._feature


@register(DATASET_REGISTRY, replace=True)
class Features(ClassDataset):
    """A file of image features, .npz or .safetensors; `DATASET.ROOT` is its path.

    Arrays: `x_test` (n, d) and `y_test` (n,) labels from 0; `x_train`, `y_train`, `x_val`, `y_val` where
    the owner has them (without x_train, x_val is the training set); `text` (C, d), the class names'
    text features; `new` (k,), the labels of the new classes (else the second half). `classnames` (C,) is an
    array of text in an npz, a JSON list in the metadata of a safetensors file, and so are, if present,
    `backbone`, `weights` and `template`. Features of any norm and float type; they become unit float32 rows.
    """

    backbone_id: str | None = None
    weights_id: str | None = None

    def how_to_get(self) -> str:
        return "DATASET.ROOT names the feature file, .npz or .safetensors"

    def read(self) -> Split:
        path = self.dataset_dir
        arrays, about = open_features(path)
        classnames = checked_names(about.get("classnames"), path)
        if len(set(classnames)) < len(classnames):
            raise UserError(f"{path}: two classes have the same name")
        self.backbone_id, self.weights_id = about.get("backbone"), about.get("weights")
        if template := about.get("template"):
            if not isinstance(template, str) or re.findall("[{}]+", template) != ["{}"]:
                raise UserError(f"{path}: its template must be a text with one {{}} for the class name")
            self.template = template

        def rows(part: str) -> list[Row]:
            if f"x_{part}" not in arrays:
                return []
            x = unit_rows(arrays[f"x_{part}"](), f"{path}: x_{part}")
            y = arrays[f"y_{part}"]() if f"y_{part}" in arrays else torch.empty(0)
            if y.shape != x.shape[:1] or y.dtype not in WHOLE:
                raise UserError(f"{path}: y_{part} must hold {len(x)} whole numbers, one a row of x_{part}")
            labels = y.tolist()
            if labels and not 0 <= min(labels) <= max(labels) < len(classnames):
                raise UserError(
                    f"{path}: y_{part} must lie in 0 to {len(classnames) - 1}, the classes' numbers"
                )
            return [Row(path, int(c), classnames[c], feature) for feature, c in zip(x, labels, strict=True)]

        test = rows("test")
        if not test:
            raise UserError(f"{path}: it has no test features (x_test, y_test)")
        train = [] if self.data_free else rows("train")
        val = [] if self.data_free else rows("val")
        if not train:
            train, val = val, []
        widths = {
            row.feature.shape[0] for row in [*train[:1], *val[:1], *test[:1]] if row.feature is not None
        }
        if "text" in arrays:
            text = unit_rows(arrays["text"](), f"{path}: text")
            if len(text) != len(classnames):
                raise UserError(f"{path}: {len(text)} text rows for {len(classnames)} class names")
            widths.add(text.shape[1])
            self.text_features = dict(zip(classnames, text, strict=True))
        if len(widths) > 1:
            raise UserError(f"{path}: features of different dimensions: {sorted(widths)}")
        new = None
        if "new" in arrays:
            labels = arrays["new"]()
            new = sorted(labels.tolist()) if labels.ndim == 1 and labels.dtype in WHOLE else [-1]
            if len(set(new)) < len(new) or not set(new) < set(range(len(classnames))):
                raise UserError(f"{path}: 'new' must name some of the labels 0 to {len(classnames) - 1}")
        return Split(classnames, train, val, test, new)

    def datum(self, row: Row, label: int) -> FeatureDatum:
        assert row.feature is not None
        return FeatureDatum(row.feature, row.path, label, classname=row.classname)


def open_features(path: str) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, Any]]:
    """(name -> call that reads the array, description) of a feature file; no call, no reading."""
    try:
        if path.endswith(".npz"):
            with zipfile.ZipFile(path) as archive:
                members = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            names = [name for name in members if name not in TEXTS]
            about = {name: read_member(path, name).tolist() for name in TEXTS if name in members}
            return {name: partial(_array, path, name) for name in names}, about
        if path.endswith(".safetensors"):
            tensors = safe_open(path, framework="pt")
            about = {name: json.loads(value) for name, value in (tensors.metadata() or {}).items()}
            return {name: partial(_tensor, tensors, name, path) for name in tensors.keys()}, about  # noqa: SIM118
    except UserError:
        raise
    # A RuntimeError for archives that need a password or a newer zipfile.
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, SafetensorError) as error:
        raise UserError(f"{path}: not a readable feature file ({error})") from None
    raise UserError(f"{path}: a feature file ends in .npz or .safetensors")


def read_member(path: str, name: str) -> np.ndarray:
    """The array `name` of an npz file in this machine's byte order. Objects are refused: they are pickled."""
    try:
        with bounded(path), np.load(path, allow_pickle=False) as file:
            array = file[name]
            return array.astype(array.dtype.newbyteorder("="), copy=False)
    except UserError:
        raise
    except Exception as error:  # a broken archive within an archive: numpy, zipfile and zlib raise many kinds
        raise UserError(f"{path}: '{name}' is not a readable array ({error})") from None


def _array(path: str, name: str) -> torch.Tensor:
    try:
        return torch.from_numpy(read_member(path, name))
    except TypeError as error:
        raise UserError(f"{path}: '{name}' is not a readable array of numbers ({error})") from None


def _tensor(tensors: Any, name: str, path: str) -> torch.Tensor:
    try:
        return tensors.get_tensor(name)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: '{name}' is not a readable array of numbers ({error})") from None


def unit_rows(x: torch.Tensor, what: str) -> torch.Tensor:
    """x (n, d) of any norm and float type as float32 unit rows.

    Raises UserError, naming `what`, if x is no such table or a row is zero or not finite.
    """
    if x.ndim != 2 or x.dtype not in NUMBERS or not x.is_floating_point():
        raise UserError(
            f"{what} must be a table of floating-point rows (n, d); it is {x.dtype}, {tuple(x.shape)}"
        )
    x = x.float()
    norms = x.norm(dim=1, keepdim=True)
    if not torch.isfinite(norms).all() or (norms == 0).any():
        raise UserError(f"{what} has rows that are zero or not finite")
    return x / norms


# ---------------------------------------------------------------- batches of features


class FeatureLoader:
    """Batches of features in the form of Dassl's: {"img": (B, d), "label", "domain", "impath", "index"}.

    features (n, d) and labels (n,) stay where they are; if `shuffle`, `generator` orders each pass anew.
    Raises ValueError if there is nothing to serve.
    """

    def __init__(
        self,
        features: torch.Tensor,
        labels: torch.Tensor,
        batch_size: int,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
    ) -> None:
        if not 0 < len(features) == len(labels):
            raise ValueError(f"{len(features)} features with {len(labels)} labels: nothing to serve")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.dataset = torch.utils.data.TensorDataset(features, labels)
        self.features, self.labels, self.batch_size = features, labels, batch_size
        self.shuffle, self.generator, self.drop_last = shuffle, generator, drop_last

    def __len__(self) -> int:
        whole, rest = divmod(len(self.features), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        n = len(self.features)
        order = torch.randperm(n, generator=self.generator) if self.shuffle else torch.arange(n)
        for index in order.split(self.batch_size)[: len(self)]:
            place = index.to(self.features.device)
            yield {
                "img": self.features[place],
                "label": self.labels[place],
                "domain": torch.zeros_like(index),
                "impath": [""] * len(index),
                "index": index,
            }


# ---------------------------------------------------------------- encoding images, once


def default_cache_dir() -> Path:
    """$DFZSL_CACHE, or ~/.cache/dfzsl: never the data folder, which may be read-only."""
    return Path(os.environ.get("DFZSL_CACHE") or Path.home() / ".cache" / "dfzsl")


def encode_datums(
    backbone: Encoder,
    datums: Sequence[Datum],
    transform: Callable[[Image.Image], torch.Tensor],
    cache_dir: str | os.PathLike[str] | None = None,
    batch_size: int = 256,
    num_workers: int = 4,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """The datums' features, (n, d) float32 unit rows in their order.

    A FeatureDatum brings its own. Images are encoded once: the result is kept under `cache_dir` in a
    file named by backbone, weights, precision, transform and the images' paths, sizes and times, and is
    memory-mapped ever after. The work is kept in parts, so an interrupted run goes on where it stopped, and
    within torch.distributed the ranks share the parts.

    Raises UserError for an image that cannot be read.
    """
    if datums and isinstance(datums[0], FeatureDatum):
        return torch.stack([datum.feature for datum in datums])
    if not datums:
        return torch.empty(0, backbone.dim)
    directory = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    paths = [datum.impath for datum in datums]
    whole = directory / f"{_key(backbone, transform, paths)}.safetensors"
    if not whole.exists():
        try:
            _encode(backbone, paths, transform, whole, batch_size, num_workers, torch.device(device))
        except OSError as error:
            raise UserError(
                f"the feature cache {directory} cannot be written ({error}); set the environment variable "
                "DFZSL_CACHE to a folder that can"
            ) from None
    # By the process that joins them, or by the next one if that was killed here.
    with contextlib.suppress(OSError):  # a cache that is read-only by now
        parts = list(_parts(whole, len(paths)).values())
        if parts[-1].exists():  # the last one to go
            for part in parts:
                part.unlink(missing_ok=True)
    return _part(whole, "image features", (len(datums), backbone.dim))


def _part(path: Path, kind: str, shape: tuple[int, int]) -> torch.Tensor:
    """The features (n, d) that a file of the cache must hold. Raises UserError if it holds anything else."""
    features = load_tensors(path, kind)[0].get("features", torch.empty(0))
    if features.shape != shape or features.dtype != torch.float32:
        raise UserError(f"{path}: it does not hold the features of its {shape[0]} images; delete it")
    return features


def _parts(whole: Path, n: int) -> dict[int, Path]:
    """First image -> file, of the parts that `whole` is joined from."""
    return {start: whole.with_suffix(f".{start}") for start in range(0, n, PART)}


def _key(backbone: Encoder, transform: object, paths: Sequence[str]) -> str:
    """A content key: what decides the features, hashed."""
    what = re.sub(r" at 0x[0-9a-f]+", "", repr(transform))  # Dassl's own transforms print their address
    digest = hashlib.sha256(
        json.dumps([backbone.name, backbone.weights_id, backbone.precision, what]).encode()
    )
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise UserError(f"{path}: cannot read the image ({error.strerror})") from None
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """The picture as RGB. Raises UserError if it is broken, huge, or of a format that is not in `FORMATS`."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL raises many kinds
        raise UserError(f"{path}: not a readable image ({error or type(error).__name__})") from None


class _Images(torch.utils.data.Dataset):
    """Item i is (transformed image, ""), or (None, what is wrong with file i)."""

    def __init__(self, paths: Sequence[str], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __getitem__(self, index: int) -> tuple[torch.Tensor | None, str]:
        try:
            return self.transform(read_image(self.paths[index])), ""
        # A worker process would turn an exception into a page of traceback.
        except Exception as error:
            said = str(error) or type(error).__name__
            return None, said if isinstance(error, UserError) else f"{self.paths[index]}: {said}"


def _stack(items: list[tuple[torch.Tensor | None, str]]) -> tuple[torch.Tensor | None, str]:
    wrong = next((message for _, message in items if message), "")
    return (None, wrong) if wrong else (torch.stack([image for image, _ in items if image is not None]), "")


def _each(loader: Iterable) -> Generator:
    yield from loader


@torch.inference_mode()
def _encode(
    backbone: Encoder,
    paths: Sequence[str],
    transform: Callable[[Image.Image], torch.Tensor],
    whole: Path,
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> None:
    """Encode `paths` into parts beside `whole`, this rank's share of them, then join the parts into it."""
    n = len(paths)
    parts = _parts(whole, n)
    mine = [start for start in list(parts)[ranks.mine() :: ranks.count()] if not parts[start].exists()]
    batches = {start: torch.arange(start, min(start + PART, n)).split(batch_size) for start in mine}
    loader = torch.utils.data.DataLoader(
        _Images(paths, transform),
        batch_sampler=[batch.tolist() for start in mine for batch in batches[start]],
        num_workers=min(num_workers, len(mine) and sum(map(len, batches.values()))),
        collate_fn=_stack,
        pin_memory=device.type == "cuda",
        # Of its own: a run that finds the features in the cache goes on with the same random numbers.
        generator=torch.Generator(),
        # Torch's default of 2 batches ahead lets one slow file stall the encoder.
        prefetch_factor=4 if num_workers and mine else None,
    )
    todo = sum(len(batch) for start in mine for batch in batches[start])
    with (
        # Closed, also after an error: left to the garbage collector, the workers linger for seconds.
        contextlib.closing(_each(loader)) as images,
        tqdm(total=n, initial=n - todo, unit="img", desc="encode", disable=ranks.mine() > 0) as bar,
    ):
        for start in mine:
            features = []
            for _ in batches[start]:
                batch, wrong = next(images)
                if wrong:
                    raise UserError(wrong)
                features.append(backbone.encode_image(batch.to(device, non_blocking=True)))
                bar.update(len(batch))
            # One transfer a part: waiting for every batch would leave the device idle between them.
            save_tensors(parts[start], {"features": torch.cat(features).float()}, {"kind": "part"})
    ranks.wait()
    if ranks.mine() == 0 and not whole.exists():
        try:
            joined = torch.cat(
                [_part(part, "part", (min(PART, n - start), backbone.dim)) for start, part in parts.items()]
            )
        except UserError:
            if not whole.exists():  # else another process has joined the parts and removed them
                raise
        else:
            about = {"kind": "image features", "backbone": backbone.name, "weights": backbone.weights_id}
            save_tensors(whole, {"features": joined}, about)
    ranks.wait()
