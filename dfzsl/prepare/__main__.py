"""Download data sets into CoOp's layout, or check what is there.

    python -m dfzsl.prepare oxford_pets dtd --root data
    python -m dfzsl.prepare all --root data --from mirror
    python -m dfzsl.prepare all --root data --check

What cannot be downloaded is said: which file to put where. Give the command again after an interruption: it
goes on. docs/DATASETS.md has addresses, sizes, licences and layouts.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY

from dfzsl.configs import CONFIGS
from dfzsl.train import cli
from dfzsl.utils.errors import UserError, unknown

from .recipes import RECIPES, prepare
from .verify import check, table


def names_of(given: Sequence[str]) -> list[str]:
    """Registry names of data sets given by that name or by their config's, in any case; "all" is all."""
    known = {name.lower(): name for name in RECIPES}
    for config in (CONFIGS / "datasets").glob("*.yaml"):
        cfg = get_cfg_default()
        cfg.merge_from_file(str(config))
        if cfg.DATASET.NAME in RECIPES:
            known[config.stem] = cfg.DATASET.NAME
    found = []
    for word in given:
        if word.lower() != "all" and word.lower() not in known:
            raise unknown("data set", word, [*known, "all"])
        found += list(RECIPES) if word.lower() == "all" else [known[word.lower()]]
    return list(dict.fromkeys(found))


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m dfzsl.prepare", description=__doc__.splitlines()[0])
    flags.add_argument("names", nargs="+", help="data sets (dtd, OxfordPets, awa2, ...), or all")
    flags.add_argument("--root", default="data", type=Path, help="data folder (./data)")
    flags.add_argument("--check", action="store_true", help="verify what is there, download nothing")
    flags.add_argument("--from", dest="source", choices=["official", "mirror"], default="official")
    flags.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode images")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises UserError where something is wrong or left to do."""
    args = parser().parse_args(argv)
    names = names_of(args.names)
    if args.check:
        reports = {name: check(name, args.root, args.workers) for name in names}
        print(table(reports))
        wrong = [name for name, report in reports.items() if not report.fine]
        if wrong:
            raise UserError(f"not as published: {', '.join(wrong)}")
        return
    left = {}
    for name in names:
        try:
            prepare(name, args.root, args.source)
            print(f"{name}: in {args.root / DATASET_REGISTRY.get(name).folder}")
        except UserError as error:
            left[name] = str(error)
    print(f"archives stay in {args.root / '.downloads'}; delete them when --check is content")
    if left:
        raise UserError("\n".join(f"{name}: {said}" for name, said in left.items()))


if __name__ == "__main__":
    cli(main)
