"""Images as features: made once by a frozen encoder and kept on disk."""

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

# Pillow hands others to programs of the system, Ghostscript for one, whatever the file's name.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
IMAGES_PER_PART = (
    512  # images a part file holds: what an interrupted encoding can lose, and what ranks share out
)


class Encoder(Protocol):
    """What encoding needs of a backbone."""

    name: str
    weights_id: str
    precision: str
    dim: int

    def encode_image(self, images: torch.Tensor) -> torch.Tensor: ...


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
    """The datums' features, (n, d) unit rows in their order.

    A FeatureDatum brings its own. Images are encoded once: the result is kept under `cache_dir` in a
    file named by backbone, weights, precision, transform and the images' paths, sizes and times, and is
    memory-mapped, by this call too: float16, whatever the encoder's precision. The work is kept in parts, so
    an interrupted run goes on where it stopped, and within torch.distributed the ranks share the parts.

    Raises UserError for an image that cannot be read.
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
                f"the feature cache {directory} cannot be written ({error}); set the environment variable "
                "DFZSL_CACHE to a folder that can"
            ) from None
    # By the process that joins them, or by the next one if that was killed here.
    with contextlib.suppress(OSError):  # a cache that is read-only by now
        parts = list(_part_files(whole, len(paths)).values())
        if parts[-1].exists():  # the last one to go
            for part in parts:
                part.unlink(missing_ok=True)
    return _load_part(whole, "image features", (len(datums), backbone.dim))


def _load_part(path: Path, kind: str, shape: tuple[int, int]) -> torch.Tensor:
    """The features (n, d) that a file of the cache must hold, float16; those of version 0.2 are float32.

    Raises UserError if it holds anything else.
    """
    features = load_tensors(path, kind)[0].get("features", torch.empty(0))
    if features.shape != shape or features.dtype not in (torch.float16, torch.float32):
        raise UserError(f"{path}: it does not hold the features of its {shape[0]} images; delete it")
    return features.half()


def _part_files(whole: Path, n: int) -> dict[int, Path]:
    """First image -> file, of the parts that `whole` is joined from."""
    return {start: whole.with_suffix(f".{start}") for start in range(0, n, IMAGES_PER_PART)}


def _cache_key(backbone: Encoder, transform: object, paths: Sequence[str]) -> str:
    """A content key: what decides the features, hashed."""
    what = re.sub(r" at 0x[0-9a-f]+", "", repr(transform))  # Dassl's own transforms print their address
    return _hash_file_states([backbone.name, backbone.weights_id, backbone.precision, what], paths)


def _hash_file_states(what: Sequence[str], paths: Sequence[str]) -> str:
    """A hash of `what` and of the paths, sizes and times of files."""
    state = hashlib.sha256(json.dumps(what).encode())
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise UserError(f"{path}: cannot read the image ({error.strerror})") from None
        state.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return state.hexdigest()[:32]


def checksum(dataset: ClassDataset, datums: Sequence[Datum]) -> str:
    """What decides a run on `datums`, hashed: the names and the prompt, and of each example its place in the
    data set, its label and what its file holds. Where the data set lies is no part of it.

    Files are read once: what they hold is kept in the cache, by their paths, sizes and times.
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
    """A checksum of what files hold, in their order."""
    kept = default_cache_dir() / f"{_hash_file_states(['contents'], paths)}.sha256"
    if kept.exists():
        return read_text(kept)
    hashed = hashlib.sha256()
    with ThreadPoolExecutor() as pool, tqdm(total=len(paths), unit="img", desc="read", leave=False) as bar:
        for start in range(0, len(paths), IMAGES_PER_PART):
            part = paths[start : start + IMAGES_PER_PART]
            hashed.update("".join(pool.map(digest, part)).encode())
            bar.update(len(part))
    with contextlib.suppress(OSError), atomic(kept) as temporary:  # a cache that is read-only
        temporary.write_text(hashed.hexdigest(), encoding="utf-8")
    return hashed.hexdigest()


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """The picture as RGB. Raises UserError if it is broken, huge, or of a format that is not in `IMAGE_FORMATS`."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL raises many kinds
        raise UserError(f"{path}: not a readable image ({error or type(error).__name__})") from None


class _Images(torch.utils.data.Dataset):
    """Item i is (i, transformed image, ""), or (i, None, what is wrong with file i)."""

    def __init__(self, paths: Sequence[str], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | None, str]:
        try:
            return index, self.transform(read_image(self.paths[index])), ""
        # A worker process would turn an exception into a page of traceback.
        except Exception as error:
            said = str(error) or type(error).__name__
            return index, None, said if isinstance(error, UserError) else f"{self.paths[index]}: {said}"


@torch.inference_mode()
def encode_files(
    backbone: Any,
    paths: Sequence[str],
    batch_size: int = 64,
    num_workers: int = 4,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[list[str], torch.Tensor, list[str]]]:
    """Features of picture files as they come, batch after batch, and kept nowhere.

    Yields the paths that could be read, their unit features (n, d), and what is wrong with the others.
    """
    batches = torch.arange(len(paths)).split(batch_size)
    # Closed, also after an error: left to the garbage collector, the workers linger for seconds.
    with contextlib.closing(
        _image_batches(paths, backbone.transform, batches, num_workers, torch.device(device))
    ) as pictures:
        for good, images, wrong in pictures:
            features = backbone.encode_image(images) if good else torch.empty(0, backbone.dim)
            yield [paths[place] for place in good], features, wrong


def _image_batches(
    paths: Sequence[str],
    transform: Callable[[Image.Image], torch.Tensor],
    batches: Sequence[torch.Tensor],
    num_workers: int,
    device: torch.device,
) -> Generator[tuple[list[int], torch.Tensor, list[str]]]:
    """For each batch of places in `paths`: those that could be read, their pictures (n, 3, h, w) on `device`,
    and what is wrong with the others. Processes decode what comes next meanwhile."""
    first, rest = _split_transform(transform)
    ahead = min(num_workers, len(batches)) if len(batches) > 1 else 0  # of one batch nothing is ahead
    loader = torch.utils.data.DataLoader(
        _Images(paths, first),
        batch_sampler=[batch.tolist() for batch in batches],
        num_workers=ahead,
        collate_fn=_collate_readable,
        pin_memory=device.type == "cuda",
        # Of its own: a run that finds the features in the cache goes on with the same random numbers.
        generator=torch.Generator(),
        # Torch's default of 2 batches ahead lets one slow file stall the encoder.
        prefetch_factor=4 if ahead else None,
    )
    for good, images, wrong in loader:
        yield good, rest(images.to(device, non_blocking=True)) if good else images, wrong


def _split_transform(
    transform: Callable[[Image.Image], torch.Tensor],
) -> tuple[Callable[[Image.Image], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """`transform` as what turns a picture into a tensor, and what is left to do to a batch of tensors.

    Where it ends in torchvision's ToTensor and Normalize, bytes come from the processes that decode, a
    quarter of what floats are, and the encoder's device makes the same floats of them.
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

    def rest(batch: torch.Tensor) -> torch.Tensor:
        floats = batch.float().div_(255) if batch.dtype == torch.uint8 else batch
        return normalize(floats, last.mean, last.std, inplace=True)

    return transforms.Compose([*first, transforms.PILToTensor()]), rest


def _collate_readable(
    items: list[tuple[int, torch.Tensor | None, str]],
) -> tuple[list[int], torch.Tensor, list[str]]:
    """Places and tensors of the pictures that could be read, and what is wrong with the others."""
    good = [place for place, image, _ in items if image is not None]
    images = [image for _, image, _ in items if image is not None]
    return good, torch.stack(images) if images else torch.empty(0), [said for *_, said in items if said]


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
    parts = _part_files(whole, n)
    starts = [
        start
        for start in list(parts)[distributed.rank() :: distributed.world_size()]
        if not parts[start].exists()
    ]
    batches = {
        start: torch.arange(start, min(start + IMAGES_PER_PART, n)).split(batch_size) for start in starts
    }
    todo = [batch for start in starts for batch in batches[start]]
    left = sum(map(len, todo))
    with (
        contextlib.closing(_image_batches(paths, transform, todo, num_workers, device)) as pictures,
        tqdm(total=n, initial=n - left, unit="img", desc="encode", disable=distributed.rank() > 0) as bar,
    ):
        for start in starts:
            features = []
            for batch in batches[start]:
                _, images, wrong = next(pictures)
                if wrong:
                    raise UserError(wrong[0])
                features.append(backbone.encode_image(images))
                bar.update(len(batch))
            # One transfer a part: waiting for every batch would leave the device idle between them.
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
            if not whole.exists():  # else another process has joined the parts and removed them
                raise
        else:
            about = {"kind": "image features", "backbone": backbone.name, "weights": backbone.weights_id}
            save_tensors(whole, {"features": joined}, about)
    distributed.barrier()
