"""Encode images with a frozen encoder and cache the features on disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from dassl.data.datasets import Datum
from PIL import Image
from tqdm import tqdm

from dfzsl.io.files import atomic, digest, read_text
from dfzsl.io.tensors import load_tensors, save_tensors
from dfzsl.utils import distributed
from dfzsl.utils.errors import UserError
from dfzsl.utils.torchvision_import import import_torchvision

from .base import ClassDataset
from .features import FeatureDatum

# Pillow opens some other formats with system programs such as Ghostscript, whatever the file's name.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
IMAGES_PER_PART = (
    512  # images a part file holds: what an interrupted encoding can lose, and what ranks share out
)


class Encoder(Protocol):
    """Interface of a backbone that encodes images."""

    name: str
    weights_id: str
    precision: str
    dim: int

    def encode_image(self, images: torch.Tensor) -> torch.Tensor: ...


def default_cache_dir() -> Path:
    """Return $DFZSL_CACHE or ~/.cache/dfzsl, not the data folder, since that may be read-only."""
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
    """Encode images, or load their features from the cache.

    The cache file is named by a hash of backbone, weights, precision, transform and the images' paths, sizes
    and times. Features are stored as float16, whatever the encoder's precision, and memory-mapped. They are
    written in parts, so an interrupted run resumes, and within torch.distributed the ranks share the parts.

    Args:
        backbone: the image encoder.
        datums: n images, or FeatureDatums, whose features are returned as they are.
        transform: the preprocessing of an image.
        cache_dir: by default `default_cache_dir`.
        batch_size: images per batch.
        num_workers: processes that decode images.
        device: device of the encoder.

    Returns:
        L2-normalized features (n, d).

    Raises:
        UserError: an image cannot be read, or the cache cannot be written.
    """
    if datums and isinstance(datums[0], FeatureDatum):
        return torch.stack([datum.feature for datum in datums])
    if not datums:
        return torch.empty(0, backbone.dim)
    directory = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    paths = [datum.impath for datum in datums]
    whole = directory / f"{_cache_key(backbone, transform, paths)}.safetensors"
    if not whole.exists():
        try:
            _encode(backbone, paths, transform, whole, batch_size, num_workers, torch.device(device))
        except OSError as error:
            raise UserError(
                f"cannot write the feature cache {directory} ({error}); set the environment variable "
                "DFZSL_CACHE to a writable folder"
            ) from None
    # The process that joined the parts deletes them, or the next one if that was killed. The last part is
    # deleted last. The cache may have become read-only.
    with contextlib.suppress(OSError):
        parts = list(_part_files(whole, len(paths)).values())
        if parts[-1].exists():
            for part in parts:
                part.unlink(missing_ok=True)
    return _load_part(whole, "image features", (len(datums), backbone.dim))


def _load_part(path: Path, kind: str, shape: tuple[int, int]) -> torch.Tensor:
    """Load the features (n, d) of a cache file as float16. Version 0.2 stored float32.

    Raises UserError if the file has other contents.
    """
    features = load_tensors(path, kind)[0].get("features", torch.empty(0))
    if features.shape != shape or features.dtype not in (torch.float16, torch.float32):
        raise UserError(f"{path}: not the features of {shape[0]} images; delete the file")
    return features.half()


def _part_files(whole: Path, n: int) -> dict[int, Path]:
    """Return the files of the parts of `whole` by the index of their first image."""
    return {start: whole.with_suffix(f".{start}") for start in range(0, n, IMAGES_PER_PART)}


def _cache_key(backbone: Encoder, transform: object, paths: Sequence[str]) -> str:
    """Hash everything that the features depend on."""
    # The representation of Dassl's own transforms contains their address.
    preprocessing = re.sub(r" at 0x[0-9a-f]+", "", repr(transform))
    return _hash_file_states([backbone.name, backbone.weights_id, backbone.precision, preprocessing], paths)


def _hash_file_states(texts: Sequence[str], paths: Sequence[str]) -> str:
    """Hash texts and the paths, sizes and modification times of files."""
    state = hashlib.sha256(json.dumps(texts).encode())
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise UserError(f"{path}: cannot read the image ({error.strerror})") from None
        state.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return state.hexdigest()[:32]


def checksum(dataset: ClassDataset, datums: Sequence[Datum]) -> str:
    """Hash the data of a run: class names, template, and path, label and contents of each example.

    Paths are relative to the data set, whose location does not matter. Files are read once: the cache stores
    the hash of their contents by their paths, sizes and times.

    Args:
        dataset: the data set.
        datums: its examples that the run uses.
    """
    names = [dataset.all_classnames, dataset.new_classnames, dataset.template]
    hashed = hashlib.sha256(json.dumps(names).encode())
    for row in (dataset.text_features or {}).values():
        hashed.update(row.numpy().tobytes())
    images = []
    within = functools.cache(lambda folder: os.path.relpath(folder, dataset.dataset_dir))
    for datum in datums:
        hashed.update(b"%d\n" % datum.label)
        if isinstance(datum, FeatureDatum):
            hashed.update(datum.feature.numpy().tobytes())
        else:
            images.append(datum.impath)
            folder, name = os.path.split(datum.impath)
            hashed.update(os.fsencode(os.path.normpath(os.path.join(within(folder), name))))
    if images:
        hashed.update(_hash_file_contents(images).encode())
    return hashed.hexdigest()


def _hash_file_contents(paths: Sequence[str]) -> str:
    """Hash the contents of files, in their order."""
    cached = default_cache_dir() / f"{_hash_file_states(['contents'], paths)}.sha256"
    if cached.exists():
        return read_text(cached)
    hashed = hashlib.sha256()
    with ThreadPoolExecutor() as pool, tqdm(total=len(paths), unit="img", desc="read", leave=False) as bar:
        for start in range(0, len(paths), IMAGES_PER_PART):
            part = paths[start : start + IMAGES_PER_PART]
            hashed.update("".join(pool.map(digest, part)).encode())
            bar.update(len(part))
    # The cache may be read-only.
    with contextlib.suppress(OSError), atomic(cached) as temporary:
        temporary.write_text(hashed.hexdigest(), encoding="utf-8")
    return hashed.hexdigest()


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image as RGB. Raises UserError if it is broken, huge, or not in a format of `IMAGE_FORMATS`."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL raises many kinds
        raise UserError(f"{path}: not a readable image ({error or type(error).__name__})") from None


class _Images(torch.utils.data.Dataset):
    """Data set whose item i is (i, transformed image, ""), or (i, None, error message)."""

    def __init__(self, paths: Sequence[str], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | None, str]:
        try:
            return index, self.transform(read_image(self.paths[index])), ""
        # An exception in a worker process would print a long traceback.
        except Exception as error:
            message = str(error) or type(error).__name__
            return index, None, message if isinstance(error, UserError) else f"{self.paths[index]}: {message}"


@torch.inference_mode()
def encode_files(
    backbone: Any,
    paths: Sequence[str],
    batch_size: int = 64,
    num_workers: int = 4,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[list[str], torch.Tensor, list[str]]]:
    """Encode image files batch by batch, without the cache.

    Args:
        backbone: the image encoder.
        paths: the files.
        batch_size: images per batch.
        num_workers: processes that decode images.
        device: device of the encoder.

    Yields:
        For each batch: paths of readable images, their L2-normalized features (n, d), and an error message
        for each of the others.
    """
    batches = torch.arange(len(paths)).split(batch_size)
    # Closed explicitly: the garbage collector would stop the workers only seconds later.
    with contextlib.closing(
        _image_batches(paths, backbone.transform, batches, num_workers, torch.device(device))
    ) as image_batches:
        for indices, images, errors in image_batches:
            features = backbone.encode_image(images) if indices else torch.empty(0, backbone.dim)
            yield [paths[index] for index in indices], features, errors


def _image_batches(
    paths: Sequence[str],
    transform: Callable[[Image.Image], torch.Tensor],
    batches: Sequence[torch.Tensor],
    num_workers: int,
    device: torch.device,
) -> Generator[tuple[list[int], torch.Tensor, list[str]]]:
    """Load batches of indices into `paths`, while worker processes decode the next ones.

    Yields, for each batch, the indices of readable images, these images (n, 3, h, w) on `device`, and an
    error message for each of the others.
    """
    decode, finish = _split_transform(transform)
    # Worker processes cannot help with a single batch.
    workers = min(num_workers, len(batches)) if len(batches) > 1 else 0
    loader = torch.utils.data.DataLoader(
        _Images(paths, decode),
        batch_sampler=[batch.tolist() for batch in batches],
        num_workers=workers,
        collate_fn=_collate_readable,
        pin_memory=device.type == "cuda",
        # A separate generator: a run that finds the features in the cache must have the same random numbers.
        generator=torch.Generator(),
        # With torch's default of 2 batches, one slow file stalls the encoder.
        prefetch_factor=4 if workers else None,
    )
    for indices, images, errors in loader:
        yield indices, finish(images.to(device, non_blocking=True)) if indices else images, errors


def _split_transform(
    transform: Callable[[Image.Image], torch.Tensor],
) -> tuple[Callable[[Image.Image], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """Split a transform into one from an image to a tensor and one of a batch of tensors.

    If `transform` ends in torchvision's ToTensor and Normalize, the first returns bytes, a quarter of the
    memory of floats, and the second computes the same floats from them on the encoder's device.
    """
    steps: Sequence[Any] = getattr(transform, "transforms", [])
    if len(steps) < 2:
        return transform, lambda batch: batch
    import_torchvision()
    from torchvision import transforms
    from torchvision.transforms.functional import normalize

    *first, to_tensor, last = steps
    if not isinstance(to_tensor, transforms.ToTensor) or not isinstance(last, transforms.Normalize):
        return transform, lambda batch: batch

    def finish(batch: torch.Tensor) -> torch.Tensor:
        floats = batch.float().div_(255) if batch.dtype == torch.uint8 else batch
        return normalize(floats, last.mean, last.std, inplace=True)

    return transforms.Compose([*first, transforms.PILToTensor()]), finish


def _collate_readable(
    items: list[tuple[int, torch.Tensor | None, str]],
) -> tuple[list[int], torch.Tensor, list[str]]:
    """Collate indices and tensors of readable images, and the error messages of the others."""
    indices = [index for index, image, _ in items if image is not None]
    images = [image for _, image, _ in items if image is not None]
    errors = [message for *_, message in items if message]
    return indices, torch.stack(images) if images else torch.empty(0), errors


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
    """Encode this rank's share of the parts of `whole`, then join all parts."""
    n = len(paths)
    parts = _part_files(whole, n)
    starts = [
        start
        for start in list(parts)[distributed.rank() :: distributed.world_size()]
        if not parts[start].exists()
    ]
    batches = {
        start: torch.arange(start, min(start + IMAGES_PER_PART, n)).split(batch_size) for start in starts
    }
    pending = [batch for start in starts for batch in batches[start]]
    num_pending = sum(map(len, pending))
    with (
        contextlib.closing(_image_batches(paths, transform, pending, num_workers, device)) as image_batches,
        tqdm(
            total=n, initial=n - num_pending, unit="img", desc="encode", disable=distributed.rank() > 0
        ) as bar,
    ):
        for start in starts:
            features = []
            for batch in batches[start]:
                _, images, errors = next(image_batches)
                if errors:
                    raise UserError(errors[0])
                features.append(backbone.encode_image(images))
                bar.update(len(batch))
            # One transfer per part: waiting for each batch would leave the device idle.
            save_tensors(parts[start], {"features": torch.cat(features).half()}, {"kind": "part"})
    distributed.barrier()
    if distributed.rank() == 0 and not whole.exists():
        try:
            joined = torch.cat(
                [
                    _load_part(part, "part", (min(IMAGES_PER_PART, n - start), backbone.dim))
                    for start, part in parts.items()
                ]
            )
        except UserError:
            # Another process may have joined and deleted the parts.
            if not whole.exists():
                raise
        else:
            metadata = {"kind": "image features", "backbone": backbone.name, "weights": backbone.weights_id}
            save_tensors(whole, {"features": joined}, metadata)
    distributed.barrier()
