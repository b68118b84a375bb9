"""The order in which training items are drawn."""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data.sampler import RandomSampler, Sampler, SequentialSampler
from yacs.config import CfgNode

__all__ = ["RandomClassSampler", "RandomDomainSampler", "SeqDomainSampler", "build_sampler"]


def _indices_by(data_source: Any, attribute: str) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = defaultdict(list)
    for index, item in enumerate(data_source):
        groups[getattr(item, attribute)].append(index)
    return groups


class _DomainSampler(Sampler):
    """Batches of `batch_size` items, as many from each of several domains; stops when a domain runs out."""

    def __init__(self, data_source: Any, batch_size: int, n_domain: int) -> None:
        self.data_source = data_source
        self.domain_dict = _indices_by(data_source, "domain")
        self.domains = list(self.domain_dict)
        # 0 or less: all domains in every batch.
        self.n_domain = n_domain if n_domain > 0 else len(self.domains)
        if self.n_domain > len(self.domains) or batch_size % self.n_domain:
            raise ValueError(
                f"cannot draw batches of {batch_size} from {self.n_domain} of {len(self.domains)} domains: "
                "the batch size must be a multiple of N_DOMAIN, which is at most the number of domains"
            )
        self.batch_size = batch_size
        self.n_img_per_domain = batch_size // self.n_domain
        smallest = min(len(indices) for indices in self.domain_dict.values())
        if smallest < self.n_img_per_domain:
            raise ValueError(
                f"a domain has {smallest} items, but each batch takes {self.n_img_per_domain} from a domain"
            )
        self.length = len(list(iter(self)))

    def choose_domains(self) -> list[int]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[int]:
        left = copy.deepcopy(self.domain_dict)
        drawn: list[int] = []
        while True:
            for domain in self.choose_domains():
                indices = left[domain]
                for index in random.sample(indices, self.n_img_per_domain):
                    drawn.append(index)
                    indices.remove(index)
            if any(len(indices) < self.n_img_per_domain for indices in left.values()):
                return iter(drawn)

    def __len__(self) -> int:
        return self.length


class RandomDomainSampler(_DomainSampler):
    """Each batch: `n_domain` domains drawn at random, `batch_size` / `n_domain` items from each."""

    def choose_domains(self) -> list[int]:
        return random.sample(self.domains, self.n_domain)


class SeqDomainSampler(_DomainSampler):
    """Each batch: the same number of items from every domain, domain after domain."""

    def __init__(self, data_source: Any, batch_size: int) -> None:
        super().__init__(data_source, batch_size, n_domain=0)

    def choose_domains(self) -> list[int]:
        return self.domains


class RandomClassSampler(Sampler):
    """Each batch: `batch_size` / `n_ins` classes drawn at random, `n_ins` items of each.

    A class with fewer items than `n_ins` is drawn from with replacement.
    """

    def __init__(self, data_source: Any, batch_size: int, n_ins: int) -> None:
        self.index_dic = _indices_by(data_source, "label")
        self.labels = list(self.index_dic)
        self.n_ins = n_ins
        self.ncls_per_batch = batch_size // n_ins
        if not 1 <= self.ncls_per_batch <= len(self.labels):
            raise ValueError(
                f"cannot draw batches of {batch_size} items, {n_ins} a class, from {len(self.labels)} classes"
            )
        self.data_source = data_source
        self.batch_size = batch_size
        self.length = len(list(iter(self)))

    def __iter__(self) -> Iterator[int]:
        # Each class's items, shuffled and cut into groups of n_ins; the remainder is left out.
        groups: dict[int, list[list[int]]] = {}
        for label in self.labels:
            indices = list(self.index_dic[label])
            if len(indices) < self.n_ins:
                indices = np.random.choice(indices, size=self.n_ins, replace=True).tolist()
            random.shuffle(indices)
            groups[label] = [
                indices[i : i + self.n_ins] for i in range(0, len(indices) - self.n_ins + 1, self.n_ins)
            ]
        left = list(self.labels)
        drawn: list[int] = []
        while len(left) >= self.ncls_per_batch:
            for label in random.sample(left, self.ncls_per_batch):
                drawn.extend(groups[label].pop(0))
                if not groups[label]:
                    left.remove(label)
        return iter(drawn)

    def __len__(self) -> int:
        return self.length


def build_sampler(
    sampler_type: str,
    cfg: CfgNode | None = None,
    data_source: Any = None,
    batch_size: int = 32,
    n_domain: int = 0,
    n_ins: int = 16,
) -> Sampler:
    """The sampler of that name over `data_source`. Raises ValueError for an unknown name."""
    if sampler_type == "RandomSampler":
        return RandomSampler(data_source)
    if sampler_type == "SequentialSampler":
        return SequentialSampler(data_source)
    if sampler_type == "RandomDomainSampler":
        return RandomDomainSampler(data_source, batch_size, n_domain)
    if sampler_type == "SeqDomainSampler":
        return SeqDomainSampler(data_source, batch_size)
    if sampler_type == "RandomClassSampler":
        return RandomClassSampler(data_source, batch_size, n_ins)
    raise ValueError(
        f"Unknown sampler type: {sampler_type} (known: RandomSampler, SequentialSampler, "
        "RandomDomainSampler, SeqDomainSampler, RandomClassSampler)"
    )
