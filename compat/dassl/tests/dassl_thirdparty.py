"""A small third-party repository in the manner of CoOp and its relatives.

It touches Dassl as those do: each hook that they override, each attribute that they use, each name that they
import, from the place where they import it. "CLIP" is two random projections.
"""

import argparse
import copy
import math
import os
import os.path as osp
import pickle
import time
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from dassl.config import clean_cfg, get_cfg_default
from dassl.data import DataManager
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from dassl.engine import TRAINER_REGISTRY, TrainerXU, build_trainer
from dassl.engine.trainer import AverageMeter, MetricMeter, SummaryWriter, TrainerX
from dassl.metrics import compute_accuracy
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.optim.radam import RAdam
from dassl.utils import (
    collect_env_info,
    listdir_nohidden,
    load_checkpoint,
    read_json,
    set_random_seed,
    setup_logger,
    write_json,
)
from dassl.utils.tools import mkdir_if_missing
from PIL import Image
from torch.nn import functional as F
from yacs.config import CfgNode as CN


def make_images(folder, n_classes, n_images):
    """Noise around a colour of the class; 20 x 24 pixels."""
    generator = np.random.RandomState(0)
    for label in range(n_classes):
        (Path(folder) / f"class_{label}").mkdir(parents=True)
        colour = generator.randint(60, 190, size=3)
        for i in range(n_images):
            pixels = colour + generator.randint(-60, 60, size=(20, 24, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(Path(folder) / f"class_{label}" / f"{i}.png")


# Data


@DATASET_REGISTRY.register()
class TinyPets(DatasetBase):
    """Reads its split from a file, and draws and keeps few-shot splits."""

    dataset_dir = "tiny_pets"

    def __init__(self, cfg):
        root = osp.abspath(osp.expanduser(cfg.DATASET.ROOT))
        self.dataset_dir = osp.join(root, self.dataset_dir)
        self.image_dir = osp.join(self.dataset_dir, "images")
        self.split_path = osp.join(self.dataset_dir, "split.json")
        self.split_fewshot_dir = osp.join(self.dataset_dir, "split_fewshot")
        mkdir_if_missing(self.split_fewshot_dir)
        if not osp.exists(self.split_path):
            self.save_split()
        train, val, test = (self.read(items) for items in read_json(self.split_path).values())

        num_shots = cfg.DATASET.NUM_SHOTS
        if num_shots >= 1:
            name = f"shot_{num_shots}-seed_{cfg.SEED}.pkl"
            preprocessed = osp.join(self.split_fewshot_dir, name)
            if osp.exists(preprocessed):
                with open(preprocessed, "rb") as file:
                    data = pickle.load(file)
                    train, val = data["train"], data["val"]
            else:
                train = self.generate_fewshot_dataset(train, num_shots=num_shots)
                val = self.generate_fewshot_dataset(val, num_shots=min(num_shots, 4))
                with open(preprocessed, "wb") as file:
                    pickle.dump({"train": train, "val": val}, file, protocol=pickle.HIGHEST_PROTOCOL)

        subsample = cfg.DATASET.SUBSAMPLE_CLASSES
        train, val, test = (self.subsample(items, subsample) for items in (train, val, test))
        super().__init__(train_x=train, val=val, test=test)

    def save_split(self):
        split = {"train": [], "val": [], "test": []}
        for label, classname in enumerate(listdir_nohidden(self.image_dir, sort=True)):
            names = listdir_nohidden(osp.join(self.image_dir, classname), sort=True)
            for i, name in enumerate(names):
                part = "train" if i < 5 else "val" if i < 7 else "test"
                split[part].append((osp.join(classname, name), label, classname))
        write_json(split, self.split_path)

    def read(self, items):
        return [Datum(impath=osp.join(self.image_dir, i[0]), label=int(i[1]), classname=i[2]) for i in items]

    @staticmethod
    def subsample(items, subsample):
        labels = sorted({item.label for item in items})
        half = math.ceil(len(labels) / 2)
        selected = {"all": labels, "base": labels[:half], "new": labels[half:]}[subsample]
        relabel = {y: y_new for y_new, y in enumerate(selected)}
        return [
            Datum(impath=item.impath, label=relabel[item.label], classname=item.classname)
            for item in items
            if item.label in selected
        ]


@DATASET_REGISTRY.register()
class TinyUnlabelled(TinyPets):
    """With unlabelled items, two more than labelled ones, and two domains."""

    domains = ["even", "odd"]  # noqa: RUF012

    def __init__(self, cfg):
        super().__init__(cfg)
        self.check_input_domains(cfg.DATASET.SOURCE_DOMAINS, cfg.DATASET.TARGET_DOMAINS)
        items = [Datum(d.impath, d.label, i % 2, d.classname) for i, d in enumerate(self.train_x)]
        DatasetBase.__init__(self, train_x=items, train_u=items + items[:2], val=self.val, test=self.test)


# Models


class PromptLearner(nn.Module):
    def __init__(self, cfg, classnames, width):
        super().__init__()
        generator = torch.Generator().manual_seed(len(classnames))
        self.ctx = nn.Parameter(0.02 * torch.randn(cfg.TRAINER.TINYCOOP.N_CTX, width))
        names = torch.stack([torch.full((width,), float(sum(map(ord, name)) % 7)) for name in classnames])
        self.register_buffer("token_prefix", torch.randn(len(classnames), 1, width, generator=generator))
        self.register_buffer("token_suffix", names.unsqueeze(1))

    def forward(self):
        ctx = self.ctx.unsqueeze(0).expand(len(self.token_prefix), -1, -1)
        return torch.cat([self.token_prefix, ctx, self.token_suffix], dim=1)


class CustomCLIP(nn.Module):
    def __init__(self, cfg, classnames, width=8):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        size = 3 * cfg.INPUT.SIZE[0] * cfg.INPUT.SIZE[1]
        self.prompt_learner = PromptLearner(cfg, classnames, width)
        self.image_encoder = nn.Linear(size, width)
        self.text_encoder = nn.Linear(width, width)
        for parameter in (*self.image_encoder.parameters(), *self.text_encoder.parameters()):
            nn.init.normal_(parameter, std=0.1, generator=generator)

    def forward(self, image, label=None):
        text = F.normalize(self.text_encoder(torch.tanh(self.prompt_learner())).mean(dim=1), dim=-1)
        features = F.normalize(self.image_encoder(image.flatten(1)), dim=-1)
        logits = 10 * features @ text.t()
        if self.prompt_learner.training and label is not None:
            return F.cross_entropy(logits, label)
        return logits


# Trainers


@TRAINER_REGISTRY.register()
class TinyCoOp(TrainerX):
    """CoOp's: registers the prompt learner alone, and loads it without the class tokens."""

    def check_cfg(self, cfg):
        assert cfg.TRAINER.TINYCOOP.PREC in ["fp16", "fp32", "amp"]

    def build_model(self):
        cfg = self.cfg
        self.model = CustomCLIP(cfg, self.dm.dataset.classnames)
        for name, param in self.model.named_parameters():
            if "prompt_learner" not in name:
                param.requires_grad_(False)
        self.model.to(self.device)
        self.optim = build_optimizer(self.model.prompt_learner, cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, cfg.OPTIM)
        self.register_model("prompt_learner", self.model.prompt_learner, self.optim, self.sched)
        self.scaler = torch.amp.GradScaler("cpu") if cfg.TRAINER.TINYCOOP.PREC == "amp" else None

    def forward_backward(self, batch):
        image, label = self.parse_batch_train(batch)
        if self.scaler is not None:
            with torch.autocast("cpu"):
                output = self.model(image)
                loss = F.cross_entropy(output, label)
            self.optim.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optim)
            self.scaler.update()
        else:
            output = self.model(image)
            loss = F.cross_entropy(output, label)
            self.model_backward_and_update(loss)
        loss_summary = {"loss": loss.item(), "acc": compute_accuracy(output, label)[0].item()}
        if (self.batch_idx + 1) == self.num_batches:
            self.update_lr()
        return loss_summary

    def parse_batch_train(self, batch):
        return batch["img"].to(self.device), batch["label"].to(self.device)

    def load_model(self, directory, epoch=None):
        if not directory:
            print("Note that load_model() is skipped as no pretrained model is given")
            return
        model_file = "model-best.pth.tar" if epoch is None else "model.pth.tar-" + str(epoch)
        for name in self.get_model_names():
            model_path = osp.join(directory, name, model_file)
            if not osp.exists(model_path):
                raise FileNotFoundError(f'Model not found at "{model_path}"')
            checkpoint = load_checkpoint(model_path)
            state_dict = checkpoint["state_dict"]
            for key in ("token_prefix", "token_suffix"):
                state_dict.pop(key, None)
            print(f'Loading weights to {name} from "{model_path}" (epoch = {checkpoint["epoch"]})')
            self._models[name].load_state_dict(state_dict, strict=False)


@TRAINER_REGISTRY.register()
class TinyCoCoOp(TinyCoOp):
    """CoCoOp's: the loss is computed in the model, when its prompt learner is in training mode."""

    def forward_backward(self, batch):
        image, label = self.parse_batch_train(batch)
        loss = self.model(image, label)
        assert loss.dim() == 0, "the prompt learner is not in training mode"
        self.optim.zero_grad()
        loss.backward()
        self.optim.step()
        if (self.batch_idx + 1) == self.num_batches:
            self.update_lr()
        return {"loss": loss.item()}


@TRAINER_REGISTRY.register()
class TinyZeroshot(TrainerX):
    """Zero-shot CLIP's: no optimizer, nothing registered; only tested."""

    def build_model(self):
        self.model = CustomCLIP(self.cfg, self.dm.dataset.classnames).to(self.device)

    def model_inference(self, image):
        return self.model(image)


@TRAINER_REGISTRY.register()
class TinySRC(TinyCoOp):
    """PromptSRC's: registers the whole model, and changes its weights after the last step."""

    def build_model(self):
        cfg = self.cfg
        self.model = CustomCLIP(cfg, self.dm.dataset.classnames)
        self.optim = build_optimizer(self.model, cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, cfg.OPTIM)
        self.register_model("VLPromptLearner", self.model, self.optim, self.sched)
        self.step_counter = 1
        self.average = None

    def forward_backward(self, batch):
        summary = super().forward_backward(batch)
        weights = copy.deepcopy(self.model.state_dict())
        self.average = weights if self.average is None else {k: self.average[k] + weights[k] for k in weights}
        if (self.batch_idx + 1) == self.num_batches and self.epoch + 1 == self.max_epoch:
            self.model.load_state_dict({k: v / self.step_counter for k, v in self.average.items()})
        self.step_counter += 1
        return summary

    @property
    def scaler(self):
        return None


@TRAINER_REGISTRY.register()
class TinyDePT(TinyCoOp):
    """DePT's: parameter groups of its own, several optimizers, an epoch loop of its own."""

    def build_model(self):
        cfg = self.cfg
        self.model = CustomCLIP(cfg, self.dm.dataset.classnames).to(self.device)
        self.scaler = None
        groups = [
            {"params": [self.model.prompt_learner.ctx]},
            {"params": self.model.text_encoder.parameters(), "lr": 10 * cfg.OPTIM.LR},
        ]
        if cfg.OPTIM.NAME == "radam":
            self.optim = RAdam(groups, lr=cfg.OPTIM.LR, weight_decay=0, betas=(0.9, 0.99))
        else:
            self.optim = build_optimizer(self.model, cfg.OPTIM, param_groups=groups)
        self.sched = build_lr_scheduler(self.optim, cfg.OPTIM)
        self.register_model("PromptLearner", self.model, self.optim, self.sched)

    def before_train(self):
        super().before_train()
        assert type(self._writer).__name__ == SummaryWriter.__name__

    def run_epoch(self):
        self.set_model_mode("train")
        losses = MetricMeter()
        batch_time = AverageMeter()
        data_time = AverageMeter()
        self.num_batches = len(self.train_loader_x)
        end = time.time()
        for self.batch_idx, batch in enumerate(self.train_loader_x):  # noqa: B020
            data_time.update(time.time() - end)
            loss_summary = self.forward_backward(batch)
            batch_time.update(time.time() - end)
            losses.update(loss_summary)
            nb_remain = (self.max_epoch - self.epoch) * self.num_batches - self.batch_idx - 1
            eta = str(timedelta(seconds=int(batch_time.avg * nb_remain)))
            print(f"DePT epoch {self.epoch} {losses} lr {self.get_current_lr():.4e} eta {eta}")
            n_iter = self.epoch * self.num_batches + self.batch_idx
            for name, meter in losses.meters.items():
                self.write_scalar("train/" + name, meter.avg, n_iter)
            end = time.time()


@TRAINER_REGISTRY.register()
class TinyXU(TrainerXU):
    """Labelled and unlabelled batches; two registered models, of which one learns."""

    def build_data_loader(self):
        dm = DataManager(self.cfg, custom_tfm_test=None)
        for name in ("train_loader_x", "train_loader_u", "val_loader", "test_loader", "num_classes"):
            setattr(self, name, getattr(dm, name))
        self.num_source_domains, self.lab2cname, self.dm = dm.num_source_domains, dm.lab2cname, dm
        self.seen = []

    def build_model(self):
        self.model = nn.Sequential(nn.Flatten(), nn.LazyLinear(self.num_classes)).to(self.device)
        self.model(torch.zeros(1, 3, *self.cfg.INPUT.SIZE))
        self.optim = build_optimizer(self.model, self.cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, self.cfg.OPTIM)
        self.register_model("net", self.model, self.optim, self.sched)
        self.register_model("teacher", copy.deepcopy(self.model))

    def forward_backward(self, batch_x, batch_u):
        self.seen.append((tuple(batch_x["index"].tolist()), tuple(batch_u["index"].tolist())))
        image, label, domain, image_u = self.parse_batch_train(batch_x, batch_u)
        assert set(domain.tolist()) <= {0, 1}
        loss = F.cross_entropy(self.model(image), label) + self.model(image_u).softmax(dim=1).var()
        self.model_backward_and_update(loss, names="net")
        if (self.batch_idx + 1) == self.num_batches:
            self.update_lr(names=["net"])
        return {"loss": loss.item()}


# train.py


def get_arguments(argv):
    parser = argparse.ArgumentParser()
    for name in ("root", "output-dir", "resume", "trainer", "model-dir", "config-file"):
        parser.add_argument(f"--{name}", type=str, default="")
    parser.add_argument("--seed", type=int, default=-1)
    parser.add_argument("--load-epoch", type=int)
    parser.add_argument("--eval-only", action="store_true")
    parser.add_argument("--no-train", action="store_true")
    parser.add_argument("opts", default=None, nargs=argparse.REMAINDER)
    return parser.parse_args(argv)


def extend_cfg(cfg):
    cfg.TRAINER.TINYCOOP = CN()
    cfg.TRAINER.TINYCOOP.N_CTX = 2
    cfg.TRAINER.TINYCOOP.CSC = False
    cfg.TRAINER.TINYCOOP.PREC = "fp32"
    cfg.DATASET.SUBSAMPLE_CLASSES = "all"


def setup_cfg(args):
    cfg = get_cfg_default()
    extend_cfg(cfg)
    cfg.DATASET.NAME = "TinyPets"
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.TRAIN_X.BATCH_SIZE = 6
    cfg.INPUT.SIZE = (8, 8)
    cfg.INPUT.TRANSFORMS = ["random_resized_crop", "random_flip", "normalize"]
    cfg.OPTIM.NAME, cfg.OPTIM.LR, cfg.OPTIM.LR_SCHEDULER = "sgd", 0.1, "cosine"
    cfg.OPTIM.MAX_EPOCH, cfg.OPTIM.WARMUP_EPOCH, cfg.OPTIM.WARMUP_TYPE = 4, 1, "constant"
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    for key, value in (
        ("DATASET.ROOT", args.root),
        ("OUTPUT_DIR", args.output_dir),
        ("RESUME", args.resume),
        ("TRAINER.NAME", args.trainer),
    ):
        if value:
            cfg.merge_from_list([key, value])
    if args.seed >= 0:
        cfg.SEED = args.seed
    cfg.merge_from_list(args.opts)
    clean_cfg(cfg, "TinyCoOp")
    cfg.freeze()
    return cfg


def main(argv):
    args = get_arguments(argv)
    cfg = setup_cfg(args)
    if cfg.SEED >= 0:
        print(f"Setting fixed seed: {cfg.SEED}")
        set_random_seed(cfg.SEED)
    setup_logger(cfg.OUTPUT_DIR)
    if os.environ.get("COLLECT_ENV"):
        print(f"** System info **\n{collect_env_info()}\n")
    trainer = build_trainer(cfg)
    if args.eval_only:
        trainer.load_model(args.model_dir, epoch=args.load_epoch)
        trainer.test()
        return trainer
    if not args.no_train:
        trainer.train()
    return trainer


def parse_test_res(directory):
    """Mean accuracy over the logs directory/*/log.txt, as parse_test_res.py reads them."""
    import re

    accuracies = []
    for name in listdir_nohidden(directory, sort=True):
        found, accuracy = False, None
        with open(osp.join(directory, name, "log.txt")) as file:
            for line in file:
                line = line.strip()
                found = found or line == "Finish training"
                match = re.search(r"\* accuracy: ([\.\deE+-]+)%", line)
                if match and found:
                    accuracy = float(match.group(1))
        accuracies.append(accuracy)
    return OrderedDict(accuracy=float(np.mean(accuracies)))
