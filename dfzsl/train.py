"""Train and test a method with CoOp's command line, or load and test it with --eval-only."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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

BASE_KEY = "_BASE_"  # names the config that a config changes, relative to its folder (as in detectron2)
MAX_BASE_CONFIGS = 20


def parser() -> argparse.ArgumentParser:
    """Return the argument parser, with the flags of CoOp's train.py."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--root", default="", help="data folder (or the file, for features and csv)")
    flags.add_argument("--output-dir", default="", help="folder of logs, checkpoints and results.json")
    flags.add_argument("--resume", default="", help="output folder of an interrupted run to resume")
    flags.add_argument("--seed", type=int, default=-1, help="random seed; negative: none")
    flags.add_argument("--source-domains", nargs="+", help="source domains (domain generalization)")
    flags.add_argument("--target-domains", nargs="+", help="target domains (domain generalization)")
    flags.add_argument("--transforms", nargs="+", help="training transforms")
    flags.add_argument("--config-file", default="", help="the trainer's config")
    flags.add_argument("--dataset-config-file", default="", help="the data set's config")
    flags.add_argument("--trainer", default="", help="name of a registered trainer")
    flags.add_argument("--backbone", default="", help="open_clip model name")
    flags.add_argument("--head", default="", help="name of a head")
    flags.add_argument("--eval-only", action="store_true", help="load --model-dir and test")
    flags.add_argument("--model-dir", default="", help="output folder to load from with --eval-only")
    flags.add_argument("--load-epoch", type=int, help="epoch to load with --eval-only")
    flags.add_argument("--no-train", action="store_true", help="build the trainer but do not train")
    flags.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    return flags


def setup_cfg(args: argparse.Namespace):
    """Return the frozen config of a run.

    Later sources override earlier ones: defaults, data set's file, trainer's file, flags, KEY VALUE pairs.
    """
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
    merge_settings("command line", cfg, args.opts)
    cfg.freeze()
    return cfg


def read_config(path: str) -> list[tuple[str, CfgNode]]:
    """Read a config file and its `_BASE_` files.

    Returns:
        (path, keys) of each file in the order to merge, the base first.
    """
    chain: list[tuple[str, CfgNode]] = []
    while path:
        keys = merge(path, _read_keys, path)
        base = keys.pop(BASE_KEY, "")
        if not isinstance(base, str) or len(chain) == MAX_BASE_CONFIGS:
            raise UserError(
                f"{path}: {BASE_KEY} must be the path of another config, and must not lead back to this one"
            )
        chain.insert(0, (path, keys))
        path = base and os.path.join(os.path.dirname(path), base)
    return chain


def _read_keys(path: str) -> CfgNode:
    """Read one config file of plain YAML values."""
    keys = read_yaml(path)
    if not isinstance(keys, dict | None):
        raise UserError(f"{path}: not a config; it must have lines KEY: value")
    return CfgNode(keys)


def merge(source: str, function, argument):
    """Return function(argument); convert an error of a config (bad YAML, unknown key) to a UserError."""
    try:
        return function(argument)
    except (UserError, OSError):
        raise
    except Exception as error:  # yacs and yaml raise many types for a mistake in a file
        raise UserError(f"{source}: {error.args[0] if error.args else error}") from None


def merge_settings(source: str, cfg: CfgNode, settings: Sequence[str]) -> None:
    """Merge KEY, VALUE, ... into a config. An integer is a valid value of a key whose type is float."""
    settings = list(settings)
    for place, key in enumerate(settings[:-1:2]):
        value: Any = cfg
        for part in key.split("."):
            value = value.get(part) if isinstance(value, CfgNode) else None
        if isinstance(value, float) and re.fullmatch(r"[+-]?\d+", settings[2 * place + 1]):
            settings[2 * place + 1] += ".0"
    merge(source, cfg.merge_from_list, settings)


def check(cfg) -> None:
    """Check trainer, data set and teacher before anything is written. Raises UserError."""
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
            f"TEACHER.FILE {cfg.TEACHER.FILE}: no such file; write it with train.py --trainer TeacherZeroshot"
        )


@distributed.process_group()
def main(argv: Sequence[str] | None = None) -> None:
    """Run one experiment on the ranks that torchrun started. Raises UserError for a mistake of the user."""
    args = parser().parse_args(argv)
    cfg = setup_cfg(args)
    check(cfg)
    folder = RunDirectory(cfg)
    if cfg.SEED >= 0:
        set_random_seed(cfg.SEED)
    elif distributed.world_size() > 1:
        raise UserError("a run with several ranks needs --seed, so that all draw the same batches")
    with folder.locked() if distributed.rank() == 0 else contextlib.nullcontext():
        _run(args, cfg, folder)


def _run(args: argparse.Namespace, cfg: CfgNode, folder: RunDirectory) -> None:
    log_to_stdout()
    if distributed.rank() == 0:
        setup_logger(cfg.OUTPUT_DIR)
    print(
        f"Setting fixed seed: {cfg.SEED}" if cfg.SEED >= 0 else "No seed is set: this run is not reproducible"
    )
    print(f"** Config ** (all keys: {folder.path})", *list_changes(cfg), sep="\n")
    trainer = build_trainer(cfg)
    if args.eval_only:
        trainer.load_model(args.model_dir, epoch=args.load_epoch)
    if not isinstance(trainer, CLIPTrainer):  # a CLIPTrainer writes it when it has read its inputs
        folder.write_config()
    if args.eval_only:
        trainer.test()
    elif not args.no_train:
        trainer.train()


if __name__ == "__main__":
    run_program(main)
