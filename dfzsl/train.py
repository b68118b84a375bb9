"""One run, by CoOp's command line: train and test, or with --eval-only load and test."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from dassl.engine import TRAINER_REGISTRY, build_trainer
from dassl.utils import set_random_seed, setup_logger
from yacs.config import CfgNode

import dfzsl.datasets  # noqa: F401
from dfzsl.io.run_directory import RunDirectory
from dfzsl.io.untrusted.yaml_reader import read_yaml
from dfzsl.trainers.base import CLIPTrainer
from dfzsl.trainers.recovery.remote_oracle import check_address, is_address
from dfzsl.utils import distributed
from dfzsl.utils.dassl_plugin import list_changes
from dfzsl.utils.errors import UserError, run_program, unknown_name
from dfzsl.utils.log import log_to_stdout

BASE = "_BASE_"  # in a config: the one that it changes, a path from its own folder (as in detectron2)
DEEPEST = 20  # configs that build on one another


def parser() -> argparse.ArgumentParser:
    """The flags of CoOp's train.py, under their own names."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--root", default="", help="data folder (or the file, for features and csv)")
    flags.add_argument("--output-dir", default="", help="where logs, checkpoints and results.json go")
    flags.add_argument("--resume", default="", help="output folder of an interrupted run to go on with")
    flags.add_argument("--seed", type=int, default=-1, help="0 or more fixes the seed")
    flags.add_argument("--source-domains", nargs="+", help="source domains (domain generalisation)")
    flags.add_argument("--target-domains", nargs="+", help="target domains (domain generalisation)")
    flags.add_argument("--transforms", nargs="+", help="training transforms")
    flags.add_argument("--config-file", default="", help="the trainer's config")
    flags.add_argument("--dataset-config-file", default="", help="the data set's config")
    flags.add_argument("--trainer", default="", help="name of a registered trainer")
    flags.add_argument("--backbone", default="", help="open_clip model name")
    flags.add_argument("--head", default="", help="name of a head")
    flags.add_argument("--eval-only", action="store_true", help="load --model-dir and test")
    flags.add_argument("--model-dir", default="", help="output folder to load from with --eval-only")
    flags.add_argument("--load-epoch", type=int, help="epoch to load with --eval-only")
    flags.add_argument("--no-train", action="store_true", help="build everything, train nothing")
    flags.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    return flags


def setup_cfg(args: argparse.Namespace):
    """The frozen config of a run: defaults, data set's file, trainer's file, flags, KEY VALUE pairs."""
    cfg = get_cfg_default()
    for path in filter(None, (args.dataset_config_file, args.config_file)):
        for source, keys in read_config(path):
            merge(source, cfg.merge_from_other_cfg, keys)
    overrides = {
        "DATASET.ROOT": args.root,
        "OUTPUT_DIR": args.output_dir,
        "RESUME": args.resume,
        "SEED": args.seed if args.seed >= 0 else None,
        "DATASET.SOURCE_DOMAINS": args.source_domains,
        "DATASET.TARGET_DOMAINS": args.target_domains,
        "INPUT.TRANSFORMS": args.transforms,
        "TRAINER.NAME": args.trainer,
        "MODEL.BACKBONE.NAME": args.backbone,
        "MODEL.HEAD.NAME": args.head,
    }
    for key, value in overrides.items():
        if value:
            cfg.merge_from_list([key, value])
    if args.seed == 0:
        cfg.SEED = 0
    merge("command line", cfg.merge_from_list, args.opts)
    cfg.freeze()
    return cfg


def read_config(path: str) -> list[tuple[str, CfgNode]]:
    """A config file and those it builds on, (path, keys) in the order to merge: its `_BASE_` comes first."""
    chain: list[tuple[str, CfgNode]] = []
    while path:
        keys = merge(path, _read_keys, path)
        base = keys.pop(BASE, "")
        if not isinstance(base, str) or len(chain) == DEEPEST:
            raise UserError(
                f"{path}: {BASE} must be the path of another config, and not lead back to this one"
            )
        chain.insert(0, (path, keys))
        path = base and os.path.join(os.path.dirname(path), base)
    return chain


def _read_keys(path: str) -> CfgNode:
    """One file: YAML of plain values, never Python."""
    keys = read_yaml(path)
    if not isinstance(keys, dict | None):
        raise UserError(f"{path}: not a config: it must consist of lines KEY: value")
    return CfgNode(keys)


def merge(source: str, into, what):
    """into(what), telling a user's slip (missing file, bad YAML, unknown key) in one line."""
    try:
        return into(what)
    except (UserError, OSError):
        raise
    except Exception as error:  # yacs and yaml raise nearly anything for a slip in a file
        raise UserError(f"{source}: {error.args[0] if error.args else error}") from None


def check(cfg) -> None:
    """Refuse what can be seen to be wrong before anything is written. Raises UserError."""
    for kind, name, registry in (
        ("trainer", cfg.TRAINER.NAME, TRAINER_REGISTRY),
        ("data set", cfg.DATASET.NAME, DATASET_REGISTRY),
    ):
        if name not in registry.registered_names():
            raise unknown_name(kind, name, registry.registered_names())
    if is_address(cfg.TEACHER.FILE):
        check_address(cfg.TEACHER.FILE)
    elif cfg.TEACHER.FILE and not Path(cfg.TEACHER.FILE).is_file():
        raise UserError(
            f"TEACHER.FILE {cfg.TEACHER.FILE}: no such file; train.py --trainer TeacherZeroshot makes one"
        )


@distributed.process_group()
def main(argv: Sequence[str] | None = None) -> None:
    """Run one experiment, on the processes that torchrun started. Raises UserError for a user's mistake."""
    args = parser().parse_args(argv)
    cfg = setup_cfg(args)
    check(cfg)
    folder = RunDirectory(cfg)
    if cfg.SEED >= 0:
        set_random_seed(cfg.SEED)
    elif distributed.world_size() > 1:
        raise UserError("several processes need a --seed, to draw the same batches")
    with folder.held() if distributed.rank() == 0 else contextlib.nullcontext():
        _run(args, cfg, folder)


def _run(args: argparse.Namespace, cfg: CfgNode, folder: RunDirectory) -> None:
    log_to_stdout()
    if distributed.rank() == 0:
        setup_logger(cfg.OUTPUT_DIR)
    print(
        f"Setting fixed seed: {cfg.SEED}" if cfg.SEED >= 0 else "No seed is set: this run cannot be repeated"
    )
    print(f"** Config ** (all keys: {folder.path})", *list_changes(cfg), sep="\n")
    trainer = build_trainer(cfg)
    if args.eval_only:
        trainer.load_model(args.model_dir, epoch=args.load_epoch)
    if not isinstance(trainer, CLIPTrainer):  # which does it when all is read
        folder.write_config()
    if args.eval_only:
        trainer.test()
    elif not args.no_train:
        trainer.train()


if __name__ == "__main__":
    run_program(main)
