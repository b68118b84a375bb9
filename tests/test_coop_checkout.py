"""README's "In a CoOp checkout", typed in a checkout in CoOp's manner."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import fake_data
import pytest
from conftest import ROOT

from dfzsl.results import read_results
from dfzsl.trainers.generation.classifier import Classifier

pytestmark = pytest.mark.slow

# As CoOp's: its own registered data set and trainer, and keys of its own that it adds to the config.
DATA_SET = """
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase

@DATASET_REGISTRY.register()
class OxfordPets(DatasetBase):
    dataset_dir = "oxford_pets"
"""
TRAINER = """
from dassl.engine import TRAINER_REGISTRY, TrainerX

@TRAINER_REGISTRY.register()
class CoOp(TrainerX):
    pass
"""
TRAIN = """
import argparse

from dassl.utils import setup_logger, set_random_seed
from dassl.config import get_cfg_default
from dassl.engine import TRAINER_REGISTRY, build_trainer

import datasets.oxford_pets
import trainers.coop

PLUGIN


def extend_cfg(cfg):
    from yacs.config import CfgNode as CN

    cfg.TRAINER.COOP = CN()
    cfg.TRAINER.COOP.N_CTX = 16
    cfg.TRAINER.COOP.CSC = False
    cfg.TRAINER.COOP.CTX_INIT = ""
    cfg.TRAINER.COOP.PREC = "fp16"
    cfg.TRAINER.COOP.CLASS_TOKEN_POSITION = "end"
    cfg.DATASET.SUBSAMPLE_CLASSES = "all"


def main(args):
    cfg = get_cfg_default()
    extend_cfg(cfg)
    cfg.merge_from_file(args.dataset_config_file)
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    cfg.DATASET.ROOT, cfg.OUTPUT_DIR, cfg.SEED = args.root, args.output_dir, args.seed
    cfg.TRAINER.NAME, cfg.MODEL.BACKBONE.NAME = args.trainer, args.backbone
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    set_random_seed(cfg.SEED)
    setup_logger(cfg.OUTPUT_DIR)
    assert TRAINER_REGISTRY.get("CoOp").__module__ == "trainers.coop"
    trainer = build_trainer(cfg)
    if args.eval_only:
        trainer.load_model(args.model_dir, epoch=args.load_epoch)
        trainer.test()
    else:
        trainer.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for flag in "root output-dir config-file dataset-config-file trainer backbone model-dir".split():
        parser.add_argument(f"--{flag}", type=str, default="")
    parser.add_argument("--seed", type=int, default=-1)
    parser.add_argument("--load-epoch", type=int)
    parser.add_argument("--eval-only", action="store_true")
    parser.add_argument("opts", default=None, nargs=argparse.REMAINDER)
    main(parser.parse_args())
"""


@pytest.fixture
def section() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8").partition("## In a CoOp checkout\n")[2]


@pytest.fixture
def checkout(section, tmp_path) -> Path:
    (plugin,) = set(re.findall(r"`(import dfzsl[.\w]*)`", section))
    files = {
        "train.py": TRAIN.replace("PLUGIN", plugin),
        "datasets/oxford_pets.py": DATA_SET,
        "trainers/coop.py": TRAINER,
        "configs/datasets/oxford_pets.yaml": 'DATASET:\n  NAME: "OxfordPets"\n',
    }
    for name, text in files.items():
        path = tmp_path / "CoOp" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    return tmp_path / "CoOp"


def test_the_commands_do_what_is_said(section, checkout, tmp_path):
    """With pictures made up and the built-in CLIP in place of ViT-B/16."""
    data = fake_data.make("OxfordPets", tmp_path / "data")
    installing, block = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    assert all(line.startswith("pip install /path/to/this/checkout") for line in installing.splitlines())
    script = block.replace("/path/to/data", str(data)).replace("--backbone ViT-B/16", "--backbone shapes")
    done = subprocess.run(
        ["bash", "-e", "-u", "-c", script],
        cwd=checkout,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    output = checkout / "output"
    classifier = Classifier.load(output / "client/classifier.safetensors")
    base, new = classifier.classnames[:3], classifier.classnames[3:]
    assert classifier.is_new.tolist() == [False] * 3 + [True] * 2
    for run, names, images in (("owner", base, 12), ("client", base, 0), ("client_new", new, 0)):
        results = read_results(output / run / "results.json")
        assert [row["class"] for row in results["per_class"]] == names
        assert results["images_used"] == images
