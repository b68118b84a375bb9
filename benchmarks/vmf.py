"""Speed of the vMF sampler beside its lower bound and beside scipy's: python benchmarks/vmf.py"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import vonmises_fisher
from tabulate import tabulate

from dfzsl.trainers.recovery.vmf import VonMisesFisher, mean_resultant_length


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--classes", type=int, default=40)
    flags.add_argument("--draws", type=int, default=600)
    flags.add_argument("--dim", type=int, default=512)
    flags.add_argument("--kappa", type=float, nargs="+", default=[205.0, 2000.0])
    flags.add_argument("--rounds", type=int, default=9)
    args = flags.parse_args()

    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    mu = F.normalize(torch.randn(args.classes, args.dim, generator=generator), dim=1)

    def normalised() -> torch.Tensor:
        return F.normalize(torch.randn(args.draws * args.classes, args.dim, generator=generator), dim=1).view(
            args.draws, args.classes, args.dim
        )

    table = []
    for kappa in args.kappa:

        def ours(kappa=kappa) -> torch.Tensor:
            return VonMisesFisher(mu, kappa).sample((args.draws,), generator)

        def scipys(kappa=kappa) -> torch.Tensor:
            draws = [vonmises_fisher(m, kappa, seed=rng).rvs(args.draws) for m in mu.double().numpy()]
            return torch.from_numpy(np.stack(draws, axis=1))

        rounds = [(seconds(normalised), seconds(ours)) for _ in range(args.rounds)]
        bound, own = (statistics.median(column) for column in zip(*rounds, strict=True))
        slow = seconds(scipys)
        exact = float(mean_resultant_length(kappa, args.dim))
        for name, time_taken, sampler in (
            ("F.normalize(torch.randn)", bound, normalised),
            ("VonMisesFisher.sample", own, ours),
            ("scipy, class by class", slow, scipys),
        ):
            cosine = float((sampler() * mu).sum(2).mean())
            table.append((kappa, name, time_taken, time_taken / bound, time_taken / own, cosine, exact))
    print(
        f"{args.classes} classes x {args.draws} draws, d = {args.dim}, {torch.get_num_threads()} thread(s)\n"
    )
    headers = ("kappa", "", "seconds", "of the bound", "of ours", "mean cosine", "A_d(kappa)")
    print(
        tabulate(table, headers, tablefmt="github", floatfmt=(".0f", "", ".3f", ".2f", ".1f", ".4f", ".4f"))
    )


if __name__ == "__main__":
    main()
