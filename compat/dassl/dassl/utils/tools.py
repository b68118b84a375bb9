"""Files, seeds, the environment."""

from __future__ import annotations

import difflib
import json
import os
import random
import sys
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

__all__ = [
    "check_availability",
    "check_isfile",
    "collect_env_info",
    "download_url",
    "get_most_similar_str_to_a_from_b",
    "listdir_nohidden",
    "mkdir_if_missing",
    "read_image",
    "read_json",
    "set_random_seed",
    "tolist_if_not",
    "write_json",
]


# Pillow hands others to programs of the system, Ghostscript for one, whatever the file's name.
FORMATS = ("JPEG", "JPEG2000", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def mkdir_if_missing(dirname: str) -> None:
    """Make the folder and its parents; the empty name is the current folder."""
    if dirname:
        os.makedirs(dirname, exist_ok=True)


def check_isfile(fpath: str) -> bool:
    """Whether there is such a file; warns if not."""
    isfile = os.path.isfile(fpath)
    if not isfile:
        warnings.warn(f'No file found at "{fpath}"', stacklevel=2)
    return isfile


def read_json(fpath: str) -> Any:
    with open(fpath, encoding="utf-8") as file:
        return json.load(file)


def write_json(obj: Any, fpath: str) -> None:
    """Write as JSON, four spaces an indent; the folder is made if missing."""
    mkdir_if_missing(os.path.dirname(fpath))
    replace_file(fpath, lambda path: Path(path).write_text(json.dumps(obj, indent=4), encoding="utf-8"))


def replace_file(fpath: str, write: Callable[[str], Any]) -> None:
    """Call `write` on a path beside `fpath`, then move it there: all of it is seen there, or nothing."""
    partial = f"{fpath}.partial-{os.getpid()}"
    try:
        write(partial)
        _to_disk(partial, os.O_RDWR)
        os.replace(partial, fpath)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            _to_disk(os.path.dirname(fpath) or ".", os.O_RDONLY)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def _to_disk(path: str, flags: int) -> None:
    file = os.open(path, flags)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def set_random_seed(seed: int) -> None:
    """Seed Python's random, numpy's global generator and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def download_url(url: str, dst: str) -> None:
    """Download to the file `dst`, with progress on one line."""
    print(f'* url="{url}"')
    print(f'* destination="{dst}"')
    start = time.time()

    def progress(count: int, block_size: int, total_size: int) -> None:
        done = count * block_size
        speed = done / 1024 / max(time.time() - start, 1e-6)
        percent = f"{min(100, 100 * done // total_size)}%, " if total_size > 0 else ""
        sys.stdout.write(f"\r...{percent}{done >> 20} MB, {speed:.0f} KB/s")
        sys.stdout.flush()

    urllib.request.urlretrieve(url, dst, progress)
    sys.stdout.write("\n")


def read_image(path: str) -> Image.Image:
    """The image as RGB. Raises OSError that names the file if it is missing or no readable image."""
    if not os.path.exists(path):
        raise OSError(f"No file exists at {path}")
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.convert("RGB")
    # Pillow raises SyntaxError, ValueError or EOFError for some kinds of damage.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise OSError(f"Cannot read the image {path}: {error}") from error


def collect_env_info() -> str:
    """Versions of torch, CUDA, Pillow and so on, for the head of a log."""
    from torch.utils.collect_env import get_pretty_env_info

    return get_pretty_env_info() + f"\n        Pillow ({PIL.__version__})"


def listdir_nohidden(path: str, sort: bool = False) -> list[str]:
    """The entries whose names do not start with a dot."""
    items = [name for name in os.listdir(path) if not name.startswith(".")]
    return sorted(items) if sort else items


def get_most_similar_str_to_a_from_b(a: str, b: Iterable[str]) -> str | None:
    """The string of `b` nearest to `a`; None if `b` is empty."""
    return max(b, key=lambda s: difflib.SequenceMatcher(None, a, s).ratio(), default=None)


def check_availability(requested: str, available: Iterable[str], left_out: Iterable[str] = ()) -> None:
    """ValueError, with the nearest name that exists, unless `requested` is among `available`.

    left_out: names that the original has and this drop-in has not, about which the error says so.
    """
    available = list(available)
    if requested in left_out and requested not in available:
        raise ValueError(f"{requested} is not in this drop-in for Dassl (see its README: what is left out)")
    if requested not in available:
        nearest = get_most_similar_str_to_a_from_b(requested, available)
        raise ValueError(
            f"The requested one is expected to belong to {available}, "
            f"but got [{requested}] (do you mean [{nearest}]?)"
        )


def tolist_if_not(x: Any) -> list:
    return x if isinstance(x, list) else [x]
