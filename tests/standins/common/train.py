"""A train.py in the manner of CoOp's: its flags, its order of settings."""

import argparse

import datasets.oxford_pets  # noqa: F401
import trainers.method
from dassl.config import get_cfg_default
from dassl.engine import build_trainer
from dassl.utils import set_random_seed, setup_logger


def read_flags():
    flags = argparse.ArgumentParser()
    names = "root, output-dir, resume, config-file, dataset-config-file, trainer, backbone, model-dir"
    for flag in names.split(", "):
        flags.add_argument(f"--{flag}", default="")
    flags.add_argument("--seed", type=int, default=-1)
    flags.add_argument("--load-epoch", type=int)
    flags.add_argument("--eval-only", action="store_true")
    flags.add_argument("opts", nargs=argparse.REMAINDER)
    return flags.parse_args()


def settings(args):
    cfg = get_cfg_default()
    cfg.DATASET.SUBSAMPLE_CLASSES = "all"
    trainers.method.extend_cfg(cfg)
    cfg.merge_from_file(args.dataset_config_file)
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    cfg.DATASET.ROOT = args.root
    cfg.OUTPUT_DIR = args.output_dir
    cfg.TRAINER.NAME = args.trainer
    if args.backbone:
        cfg.MODEL.BACKBONE.NAME = args.backbone
    if args.seed:
        cfg.SEED = args.seed
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    return cfg


def main(args):
    cfg = settings(args)
    if cfg.SEED >= 0:
        set_random_seed(cfg.SEED)
    setup_logger(cfg.OUTPUT_DIR)
    print("************", "** Config **", "************", cfg, "Collecting env info ...", sep="\n")
    trainer = build_trainer(cfg)
    if args.eval_only:
        trainer.load_model(args.model_dir, epoch=args.load_epoch)
        trainer.test()
    else:
        trainer.train()


if __name__ == "__main__":
    main(read_flags())
