"""From the configuration to data loaders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from yacs.config import CfgNode

from ..utils import read_image
from .datasets import build_dataset
from .samplers import build_sampler
from .transforms import build_img0_transform, build_transform

__all__ = ["DataManager", "DatasetWrapper", "build_data_loader"]


def build_data_loader(
    cfg: CfgNode,
    sampler_type: str = "SequentialSampler",
    data_source: Any = None,
    batch_size: int = 64,
    n_domain: int = 0,
    n_ins: int = 2,
    tfm: Any = None,
    is_train: bool = True,
    dataset_wrapper: Callable[..., TorchDataset] | None = None,
) -> DataLoader:
    """A loader over `data_source` (a list of Datum) that yields the batches described at DatasetWrapper.

    In training an incomplete last batch is dropped, unless it is the only one. Raises ValueError if there is
    no item or no batch.
    """
    if data_source is None or len(data_source) == 0:
        raise ValueError("cannot build a data loader: there are no items")
    wrapper = dataset_wrapper or DatasetWrapper
    loader = DataLoader(
        wrapper(cfg, data_source, transform=tfm, is_train=is_train),
        batch_size=batch_size,
        sampler=build_sampler(
            sampler_type,
            cfg=cfg,
            data_source=data_source,
            batch_size=batch_size,
            n_domain=n_domain,
            n_ins=n_ins,
        ),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        drop_last=is_train and len(data_source) >= batch_size,
        pin_memory=torch.cuda.is_available() and cfg.USE_CUDA,
    )
    if len(loader) == 0:
        raise ValueError(f"{sampler_type} draws no batch of {batch_size} from {len(data_source)} items")
    return loader


class DataManager:
    """The data set of DATASET.NAME and its loaders.

    Attributes: dataset; train_loader_x, train_loader_u (None without unlabelled items), val_loader (None
    without validation items), test_loader; num_classes, num_source_domains, lab2cname.

    custom_tfm_train, custom_tfm_test: transforms (or lists of them) instead of the configured ones;
    dataset_wrapper: a class instead of DatasetWrapper, called in the same way.
    """

    def __init__(
        self,
        cfg: CfgNode,
        custom_tfm_train: Any = None,
        custom_tfm_test: Any = None,
        dataset_wrapper: Callable[..., TorchDataset] | None = None,
    ) -> None:
        dataset = build_dataset(cfg)
        if custom_tfm_train is None:
            tfm_train = build_transform(cfg, is_train=True)
        else:
            print("* Using custom transform for training")
            tfm_train = custom_tfm_train
        if custom_tfm_test is None:
            tfm_test = build_transform(cfg, is_train=False)
        else:
            print("* Using custom transform for testing")
            tfm_test = custom_tfm_test

        def loader(node: CfgNode, items: Any, is_train: bool) -> DataLoader:
            return build_data_loader(
                cfg,
                sampler_type=node.SAMPLER,
                data_source=items,
                batch_size=node.BATCH_SIZE,
                n_domain=node.get("N_DOMAIN", 0),
                n_ins=node.get("N_INS", 2),
                tfm=tfm_train if is_train else tfm_test,
                is_train=is_train,
                dataset_wrapper=dataset_wrapper,
            )

        nodes = cfg.DATALOADER
        self.train_loader_x = loader(nodes.TRAIN_X, dataset.train_x, is_train=True)
        self.train_loader_u = None
        if dataset.train_u:
            node = nodes.TRAIN_X if nodes.TRAIN_U.SAME_AS_X else nodes.TRAIN_U
            self.train_loader_u = loader(node, dataset.train_u, is_train=True)
        self.val_loader = loader(nodes.TEST, dataset.val, is_train=False) if dataset.val else None
        self.test_loader = loader(nodes.TEST, dataset.test, is_train=False)

        self.dataset = dataset
        self._num_classes = dataset.num_classes
        self._num_source_domains = len(cfg.DATASET.SOURCE_DOMAINS)
        self._lab2cname = dataset.lab2cname
        if cfg.VERBOSE:
            self.show_dataset_summary(cfg)

    @property
    def num_classes(self) -> int:
        return self._num_classes

    @property
    def num_source_domains(self) -> int:
        return self._num_source_domains

    @property
    def lab2cname(self) -> dict[int, str]:
        return self._lab2cname

    def show_dataset_summary(self, cfg: CfgNode) -> None:
        """Print a table of the data set's name and sizes."""
        rows: list[tuple[str, Any]] = [("Dataset", cfg.DATASET.NAME)]
        if cfg.DATASET.SOURCE_DOMAINS:
            rows.append(("Source", cfg.DATASET.SOURCE_DOMAINS))
        if cfg.DATASET.TARGET_DOMAINS:
            rows.append(("Target", cfg.DATASET.TARGET_DOMAINS))
        rows.append(("# classes", f"{self.num_classes:,}"))
        rows.append(("# train_x", f"{len(self.dataset.train_x):,}"))
        if self.dataset.train_u:
            rows.append(("# train_u", f"{len(self.dataset.train_u):,}"))
        if self.dataset.val:
            rows.append(("# val", f"{len(self.dataset.val):,}"))
        rows.append(("# test", f"{len(self.dataset.test):,}"))
        widths = [max(len(str(row[i])) for row in rows) for i in (0, 1)]
        rule = "  ".join("-" * width for width in widths)
        lines = [f"{name:<{widths[0]}}  {value!s:<{widths[1]}}".rstrip() for name, value in rows]
        print("\n".join([rule, *lines, rule]))


class DatasetWrapper(TorchDataset):
    """Items as dictionaries: label, domain, impath, index, img.

    With a list of transforms their images are img, img2, img3 ...; with DATALOADER.K_TRANSFORMS > 1 each of
    them is, in training, a list of that many draws. With DATALOADER.RETURN_IMG0, img0 is the image resized
    to INPUT.SIZE without augmentation. Without a transform img is the PIL image.
    """

    def __init__(
        self, cfg: CfgNode, data_source: Sequence[Any], transform: Any = None, is_train: bool = False
    ) -> None:
        self.cfg = cfg
        self.data_source = data_source
        self.transform = transform
        self.is_train = is_train
        self.k_tfm = cfg.DATALOADER.K_TRANSFORMS if is_train else 1
        self.return_img0 = cfg.DATALOADER.RETURN_IMG0
        if self.k_tfm > 1 and transform is None:
            raise ValueError(f"Cannot augment the image {self.k_tfm} times because transform is None")
        if self.return_img0:
            self.to_tensor = build_img0_transform(cfg)

    def __len__(self) -> int:
        return len(self.data_source)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        item = self.data_source[idx]
        output = {"label": item.label, "domain": item.domain, "impath": item.impath, "index": idx}
        img0 = read_image(item.impath)
        if self.transform is None:
            output["img"] = img0
        elif isinstance(self.transform, (list, tuple)):
            for i, transform in enumerate(self.transform):
                output["img" if i == 0 else f"img{i + 1}"] = self._transform_image(transform, img0)
        else:
            output["img"] = self._transform_image(self.transform, img0)
        if self.return_img0:
            output["img0"] = self.to_tensor(img0)
        return output

    def _transform_image(self, tfm: Callable[[Any], Any], img0: Any) -> Any:
        images = [tfm(img0) for _ in range(self.k_tfm)]
        return images[0] if len(images) == 1 else images
