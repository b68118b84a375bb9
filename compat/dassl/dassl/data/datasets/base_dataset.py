"""Items and data sets.

The module's name, `Datum` and its underscore attributes are a file format: published few-shot splits are
pickles of `Datum`.
"""

from __future__ import annotations

import os
import random
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ...utils import check_isfile, download_url

__all__ = ["DatasetBase", "Datum"]


class Datum:
    """An image file with its label, domain and class name. Asserts that the file exists."""

    def __init__(self, impath: str = "", label: int = 0, domain: int = 0, classname: str = "") -> None:
        assert isinstance(impath, str), f"impath must be a string, got {impath!r}"
        assert check_isfile(impath), f"no file at {impath!r}"
        self._impath = impath
        self._label = label
        self._domain = domain
        self._classname = classname

    @property
    def impath(self) -> str:
        return self._impath

    @property
    def label(self) -> int:
        return self._label

    @property
    def domain(self) -> int:
        return self._domain

    @property
    def classname(self) -> str:
        return self._classname


class DatasetBase:
    """Labelled training items, unlabelled training items, validation and test items (lists of Datum).

    A subclass takes `cfg`, reads its files and ends with `super().__init__(train_x=..., val=..., test=...)`.
    Classes are those of `train_x`: `num_classes` is the greatest label + 1, `classnames` the names in the
    order of the labels. Raises ValueError if a label in between has no training item, since the class names
    would then be out of step with the labels.
    """

    dataset_dir = ""
    domains: Sequence[str] = []

    def __init__(
        self,
        train_x: list[Any] | None = None,
        train_u: list[Any] | None = None,
        val: list[Any] | None = None,
        test: list[Any] | None = None,
    ) -> None:
        self._train_x = train_x
        self._train_u = train_u
        self._val = val
        self._test = test
        self._num_classes = self.get_num_classes(train_x)
        self._lab2cname, self._classnames = self.get_lab2cname(train_x)
        missing = sorted(set(range(self._num_classes)) - set(self._lab2cname))
        if missing:
            raise ValueError(
                f"{type(self).__name__}: no training item of class {', '.join(map(str, missing[:5]))}"
                f"{', ...' if len(missing) > 5 else ''}; number the classes 0 to n-1 without gaps"
            )

    @property
    def train_x(self) -> Any:
        return self._train_x

    @property
    def train_u(self) -> Any:
        return self._train_u

    @property
    def val(self) -> Any:
        return self._val

    @property
    def test(self) -> Any:
        return self._test

    @property
    def lab2cname(self) -> dict[int, str]:
        return self._lab2cname

    @property
    def classnames(self) -> list[str]:
        return self._classnames

    @property
    def num_classes(self) -> int:
        return self._num_classes

    @staticmethod
    def get_num_classes(data_source: Any) -> int:
        """The greatest label + 1. Raises ValueError if there is no item."""
        if not data_source:
            raise ValueError("the training set is empty: no classes to learn")
        return max(item.label for item in data_source) + 1

    @staticmethod
    def get_lab2cname(data_source: Any) -> tuple[dict[int, str], list[str]]:
        """Class names by label, and as a list sorted by label."""
        mapping = {item.label: item.classname for item in data_source}
        return mapping, [mapping[label] for label in sorted(mapping)]

    def check_input_domains(self, source_domains: Sequence[str], target_domains: Sequence[str]) -> None:
        """ValueError unless all are among `domains`."""
        for domain in (*source_domains, *target_domains):
            if domain not in self.domains:
                raise ValueError(f"Input domain must belong to {self.domains}, but got [{domain}]")

    def download_data(self, url: str, dst: str, from_gdrive: bool = True) -> None:
        """Download to `dst` (a zip, tar or tar.gz file) and extract it beside.

        Downloads from Google Drive need the package gdown.
        """
        os.makedirs(os.path.dirname(dst), exist_ok=True)
        if from_gdrive:
            try:
                import gdown
            except ImportError as error:
                raise ImportError("downloading from Google Drive needs gdown: pip install gdown") from error
            gdown.download(url, dst, quiet=False)
        else:
            download_url(url, dst)
        print("Extracting file ...")
        folder = os.path.dirname(dst)
        if zipfile.is_zipfile(dst):
            with zipfile.ZipFile(dst) as archive:
                archive.extractall(folder)
        elif tarfile.is_tarfile(dst):
            with tarfile.open(dst) as archive:
                archive.extractall(folder, filter="data")
        else:
            raise ValueError(f"{dst} is neither a zip nor a tar file; delete it and download it by hand")
        print(f"File extracted to {folder}")

    def generate_fewshot_dataset(self, *data_sources: Any, num_shots: int = -1, repeat: bool = False) -> Any:
        """Draw `num_shots` items of each class, in the order in which the classes appear.

        Of a class with fewer, all items are taken, or, with `repeat`, draws with replacement. Below 1: the
        input itself. Python's `random` is used, so that a seed gives the same items as ever.
        Returns a list of items, or, for several sources, a list of such lists.
        """
        if num_shots < 1:
            return data_sources[0] if len(data_sources) == 1 else data_sources
        print(f"Creating a {num_shots}-shot dataset")
        output = []
        for data_source in data_sources:
            drawn: list[Any] = []
            short = []
            groups = self.split_dataset_by_label(data_source)
            for label, items in groups.items():
                if len(items) >= num_shots:
                    drawn.extend(random.sample(items, num_shots))
                elif repeat:
                    drawn.extend(random.choices(items, k=num_shots))
                else:
                    drawn.extend(items)
                    short.append(f"{items[0].classname or label} ({len(items)})")
            if short:
                listed = ", ".join(short[:5]) + (", ..." if len(short) > 5 else "")
                counts = f"{len(short)} of {len(groups)} classes"
                # Not among the log's lines, which are the original's.
                said = f"Note: fewer than {num_shots} items in {counts}, all of them taken: {listed}"
                print(said, file=sys.stderr)
            output.append(drawn)
        return output[0] if len(output) == 1 else output

    def split_dataset_by_label(self, data_source: Any) -> dict[int, list[Any]]:
        """Items by label, labels in the order of their first appearance."""
        groups: dict[int, list[Any]] = defaultdict(list)
        for item in data_source:
            groups[item.label].append(item)
        return groups

    def split_dataset_by_domain(self, data_source: Any) -> dict[int, list[Any]]:
        """Items by domain, domains in the order of their first appearance."""
        groups: dict[int, list[Any]] = defaultdict(list)
        for item in data_source:
            groups[item.domain].append(item)
        return groups
