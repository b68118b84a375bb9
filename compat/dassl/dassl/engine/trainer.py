"""The training loop and its hooks.

TrainerBase holds models, optimizers and schedules by name and saves and loads them; SimpleTrainer adds
data, model and evaluation from a configuration; TrainerX (labelled data) and TrainerXU (labelled and
unlabelled) add the epoch. A trainer for prompt learning subclasses TrainerX and defines

    check_cfg(cfg)                 assertions on the configuration
    build_model()                  sets self.model, self.optim, self.sched and calls register_model
    forward_backward(batch)        one step: returns a dict of numbers for the log, and calls self.update_lr()
                                   when (self.batch_idx + 1) == self.num_batches
    parse_batch_train(batch)       what of a batch goes to the device
    load_model(directory, epoch)   if its checkpoints need care
"""

from __future__ import annotations

import datetime
import os
import shutil
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from yacs.config import CfgNode

from ..data import DataManager
from ..evaluation import build_evaluator
from ..modeling import build_backbone, build_head
from ..optim import build_lr_scheduler, build_optimizer
from ..utils import (
    AverageMeter,
    MetricMeter,
    count_num_param,
    load_checkpoint,
    load_pretrained_weights,
    mkdir_if_missing,
    resume_from_checkpoint,
    save_checkpoint,
    tolist_if_not,
)
from ..utils.rng import get_random_state, set_random_state
from ..utils.torchtools import load_trainer_checkpoint, load_weights, resume_training
from ..utils.writer import SummaryWriter

__all__ = [
    "AverageMeter",
    "MetricMeter",
    "SimpleNet",
    "SimpleTrainer",
    "SummaryWriter",
    "TrainerBase",
    "TrainerX",
    "TrainerXU",
    "load_checkpoint",
    "resume_from_checkpoint",
]

BEST = "model-best.pth.tar"


class SimpleNet(nn.Module):
    """Backbone, optional head and linear classifier, as `model_cfg` (the MODEL node) names them.

    With `num_classes` 0 there is no classifier, and `forward` returns the features.
    """

    def __init__(self, cfg: CfgNode, model_cfg: CfgNode, num_classes: int, **kwargs: Any) -> None:
        super().__init__()
        self.backbone = build_backbone(
            model_cfg.BACKBONE.NAME, verbose=cfg.VERBOSE, pretrained=model_cfg.BACKBONE.PRETRAINED, **kwargs
        )
        width = self.backbone.out_features
        self.head = None
        if model_cfg.HEAD.NAME and model_cfg.HEAD.HIDDEN_LAYERS:
            self.head = build_head(
                model_cfg.HEAD.NAME,
                verbose=cfg.VERBOSE,
                in_features=width,
                hidden_layers=model_cfg.HEAD.HIDDEN_LAYERS,
                activation=model_cfg.HEAD.ACTIVATION,
                bn=model_cfg.HEAD.BN,
                dropout=model_cfg.HEAD.DROPOUT,
                **kwargs,
            )
            width = self.head.out_features
        self.classifier = nn.Linear(width, num_classes) if num_classes > 0 else None
        self._fdim = width

    @property
    def fdim(self) -> int:
        """Width of the features that the classifier gets."""
        return self._fdim

    def forward(self, x: Tensor, return_feature: bool = False) -> Any:
        features = self.backbone(x)
        if self.head is not None:
            features = self.head(features)
        if self.classifier is None:
            return features
        logits = self.classifier(features)
        return (logits, features) if return_feature else logits


class TrainerBase:
    """Models by name, with their optimizers and schedules; the order of events in training."""

    # A trainer with mixed precision sets its torch.amp.GradScaler here.
    scaler: Any = None

    def __init__(self) -> None:
        self._models: OrderedDict[str, nn.Module] = OrderedDict()
        self._optims: OrderedDict[str, Any] = OrderedDict()
        self._scheds: OrderedDict[str, Any] = OrderedDict()
        self._writer: Any = None

    # Models

    def register_model(
        self, name: str = "model", model: nn.Module | None = None, optim: Any = None, sched: Any = None
    ) -> None:
        """Have `model` saved, loaded, switched between modes and (with `optim`, `sched`) trained.

        Only registered models are; `name` is the name of its folder of checkpoints.
        """
        if self.__dict__.get("_models") is None:
            raise AttributeError("Cannot assign model before super().__init__() call")
        assert name not in self._models, f"Found duplicate model names: {name}"
        self._models[name] = model  # type: ignore[assignment]
        self._optims[name] = optim
        self._scheds[name] = sched

    def get_model_names(self, names: str | list[str] | None = None) -> list[str]:
        """All registered names, or `names` as a list after checking that they are registered."""
        if names is None:
            return list(self._models)
        names = tolist_if_not(names)
        for name in names:
            assert name in self._models, f"no model is registered as {name}; there is {list(self._models)}"
        return names

    def set_model_mode(self, mode: str = "train", names: str | list[str] | None = None) -> None:
        """Training ("train") or evaluation ("eval", "test") mode; KeyError for another."""
        if mode not in ("train", "test", "eval"):
            raise KeyError(f"unknown mode {mode!r}: train, eval or test")
        for name in self.get_model_names(names):
            self._models[name].train(mode == "train")

    # Checkpoints

    def save_model(
        self,
        epoch: int,
        directory: str,
        is_best: bool = False,
        val_result: float | None = None,
        model_name: str = "",
    ) -> None:
        """Save all registered models after `epoch` (0-based), each in its folder under `directory`.

        Besides what the original saves, the states of the random generators and of the gradient scaler
        (self.scaler) are kept, so that a resumed run goes on exactly as an uninterrupted one.
        """
        resume = {
            "random_state": get_random_state(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }
        for name in self.get_model_names():
            optim, sched = self._optims[name], self._scheds[name]
            state = {
                "state_dict": self._models[name].state_dict(),
                "epoch": epoch + 1,
                "optimizer": None if optim is None else optim.state_dict(),
                "scheduler": None if sched is None else sched.state_dict(),
                "val_result": val_result,
                "resume": resume,
            }
            save_checkpoint(state, os.path.join(directory, name), is_best=is_best, model_name=model_name)

    def resume_model_if_exist(self, directory: str) -> int:
        """Go on from the last checkpoints in `directory`, if every model has one there.

        Returns the number of epochs done (0 without checkpoints). Where a run was killed between saving one
        model and the next, all go back to the last epoch that every model has. Raises ValueError if there is
        none.
        """
        names = self.get_model_names()
        there = [os.path.exists(os.path.join(directory, name, "checkpoint")) for name in names]
        if not there or not all(there):
            print("No checkpoint found, train from scratch")
            return 0
        print(f"Found checkpoint at {directory} (will resume training)")
        checkpoints = {
            name: resume_training(
                os.path.join(directory, name), self._models[name], self._optims[name], self._scheds[name]
            )
            for name in names
        }
        common = min(checkpoint["epoch"] for checkpoint in checkpoints.values())
        for name, checkpoint in checkpoints.items():
            earlier = f"model.pth.tar-{common}"
            if checkpoint["epoch"] > common and os.path.exists(os.path.join(directory, name, earlier)):
                checkpoints[name] = resume_training(
                    os.path.join(directory, name),
                    self._models[name],
                    self._optims[name],
                    self._scheds[name],
                    earlier,
                )
        epochs = {name: checkpoint["epoch"] for name, checkpoint in checkpoints.items()}
        if len(set(epochs.values())) > 1:
            raise ValueError(
                f"the checkpoints in {directory} are of different epochs ({epochs}): name in each folder's "
                "file `checkpoint` one of the same epoch"
            )
        # Files of the original have no such entry.
        resume = next(iter(checkpoints.values())).get("resume")
        if resume is not None:
            if resume["scaler"] and self.scaler is not None:
                self.scaler.load_state_dict(resume["scaler"])
            set_random_state(resume["random_state"])
        return epochs[names[0]]

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        """Load all registered models: the best ones, or those of `epoch` (1-based).

        Nothing is loaded if `directory` is empty. Raises FileNotFoundError.
        """
        if not directory:
            print(
                "Note that load_model() is skipped as no pretrained model is given "
                "(ignore this if it's done on purpose)"
            )
            return
        model_file = BEST if epoch is None else f"model.pth.tar-{epoch}"
        for name in self.get_model_names():
            path = os.path.join(directory, name, model_file)
            if not os.path.exists(path):
                raise FileNotFoundError(f'No model at "{path}"')
            checkpoint = load_trainer_checkpoint(path)
            val_result = checkpoint.get("val_result")
            suffix = "" if val_result is None else f", val_result={val_result:.1f}"
            print(f"Load {path} to {name} (epoch={checkpoint['epoch']}{suffix})")
            load_weights(self._models[name], checkpoint, path)

    # Tensorboard

    def init_writer(self, log_dir: str) -> None:
        if self._writer is None:
            print(f"Initialize tensorboard (log_dir={log_dir})")
            self._writer = SummaryWriter(log_dir=log_dir)

    def close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def write_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        """Does nothing outside training, when there is no writer."""
        if self._writer is not None:
            self._writer.add_scalar(tag, scalar_value, global_step)

    # The order of events

    def train(self, start_epoch: int, max_epoch: int) -> None:
        """Epochs from `start_epoch` to `max_epoch` - 1, with the hooks around them."""
        self.start_epoch = start_epoch
        self.max_epoch = max_epoch
        self.before_train()
        # before_train may move start_epoch (resume).
        for self.epoch in range(self.start_epoch, self.max_epoch):  # noqa: B020
            self.before_epoch()
            self.run_epoch()
            self.after_epoch()
        self.after_train()

    def before_train(self) -> None:
        pass

    def after_train(self) -> None:
        pass

    def before_epoch(self) -> None:
        pass

    def after_epoch(self) -> None:
        pass

    def run_epoch(self) -> None:
        raise NotImplementedError

    def test(self, split: str | None = None) -> float:
        raise NotImplementedError

    def parse_batch_train(self, *batches: Any) -> Any:
        raise NotImplementedError

    def parse_batch_test(self, batch: Any) -> Any:
        raise NotImplementedError

    def forward_backward(self, *batches: Any) -> dict[str, float] | None:
        raise NotImplementedError

    def model_inference(self, input: Any) -> Any:
        raise NotImplementedError

    # One step of training

    def detect_anomaly(self, loss: Tensor) -> None:
        if not torch.isfinite(loss).all():
            raise FloatingPointError("Loss is infinite or NaN!")

    def model_zero_grad(self, names: str | list[str] | None = None) -> None:
        for name in self.get_model_names(names):
            if self._optims[name] is not None:
                self._optims[name].zero_grad()

    def model_backward(self, loss: Tensor) -> None:
        self.detect_anomaly(loss)
        loss.backward()

    def model_update(self, names: str | list[str] | None = None) -> None:
        for name in self.get_model_names(names):
            if self._optims[name] is not None:
                self._optims[name].step()

    def model_backward_and_update(self, loss: Tensor, names: str | list[str] | None = None) -> None:
        """Zero the gradients, backward, step. Raises FloatingPointError for a loss that is not finite."""
        self.model_zero_grad(names)
        self.model_backward(loss)
        self.model_update(names)

    def prograd_backward_and_update(
        self, loss_a: Tensor, loss_b: Tensor, lambda_: float = 1, names: str | list[str] | None = None
    ) -> None:
        """A step along the gradient of `loss_a` that does not go against that of `loss_b`.

        With g_a, g_b a parameter's gradients: g_a if g_a . g_b >= 0, else
        g_a - lambda_ (g_a . g_b) / |g_b|^2 g_b (Zhu et al., Prompt-aligned gradient for prompt tuning, ICCV
        2023). Not in the original, but in the version of it that ProGrad's repository carries.
        """
        self.model_zero_grad(names)
        self.detect_anomaly(loss_b)
        loss_b.backward(retain_graph=True)
        parameters = [p for name in self.get_model_names(names) for p in self._models[name].parameters()]
        general = [None if p.grad is None else p.grad.clone() for p in parameters]
        self.model_zero_grad(names)
        self.model_backward(loss_a)
        for parameter, g_b in zip(parameters, general, strict=True):
            if parameter.grad is None or g_b is None:
                continue
            dot = (parameter.grad * g_b).sum()
            if dot < 0:
                parameter.grad -= lambda_ * dot / g_b.pow(2).sum() * g_b
        self.model_update(names)

    def update_lr(self, names: str | list[str] | None = None) -> None:
        """Step the schedules; to be called by `forward_backward` on an epoch's last batch."""
        for name in self.get_model_names(names):
            if self._scheds[name] is not None:
                self._scheds[name].step()

    def get_current_lr(self, names: str | list[str] | None = None) -> float:
        """The learning rate of the first model's first parameter group."""
        return self._optims[self.get_model_names(names)[0]].param_groups[0]["lr"]


class SimpleTrainer(TrainerBase):
    """Data, model and evaluator from a configuration.

    Order in __init__: check_cfg, device, epochs, output_dir, cfg, build_data_loader, build_model, evaluator.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.check_cfg(cfg)
        self.device = torch.device("cuda" if torch.cuda.is_available() and cfg.USE_CUDA else "cpu")
        self.start_epoch = self.epoch = 0
        self.max_epoch = cfg.OPTIM.MAX_EPOCH
        self.output_dir = cfg.OUTPUT_DIR
        self.cfg = cfg
        self.build_data_loader()
        self.build_model()
        self.evaluator = build_evaluator(cfg, lab2cname=self.lab2cname)
        self.best_result = float("-inf")

    def check_cfg(self, cfg: CfgNode) -> None:
        """Assert what this trainer needs of the configuration."""

    def build_data_loader(self) -> None:
        """Set dm, train_loader_x, train_loader_u, val_loader, test_loader, num_classes, num_source_domains
        and lab2cname.
        """
        self.take_data(DataManager(self.cfg))

    def take_data(self, dm: Any) -> None:
        """Set what `build_data_loader` sets, from a DataManager or one's own."""
        self.train_loader_x: Any = dm.train_loader_x
        self.train_loader_u: Any = dm.train_loader_u
        self.val_loader = dm.val_loader
        self.test_loader = dm.test_loader
        self.num_classes = dm.num_classes
        self.num_source_domains = dm.num_source_domains
        self.lab2cname = dm.lab2cname
        self.dm = dm

    def build_model(self) -> None:
        """Build and register self.model; here a SimpleNet.

        With several GPUs it is split over them if the environment variable DASSL_DATA_PARALLEL is 1.
        """
        cfg = self.cfg
        print("Building model")
        self.model: Any = SimpleNet(cfg, cfg.MODEL, self.num_classes)
        if cfg.MODEL.INIT_WEIGHTS:
            load_pretrained_weights(self.model, cfg.MODEL.INIT_WEIGHTS)
        self.model.to(self.device)
        print(f"# params: {count_num_param(self.model):,}")
        self.optim = build_optimizer(self.model, cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, cfg.OPTIM)
        self.register_model("model", self.model, self.optim, self.sched)
        device_count = torch.cuda.device_count()
        if self.device.type == "cuda" and device_count > 1 and os.environ.get("DASSL_DATA_PARALLEL") == "1":
            print(f"Detected {device_count} GPUs (use nn.DataParallel)")
            self.model = nn.DataParallel(self.model)

    def train(self) -> None:  # type: ignore[override]
        super().train(self.start_epoch, self.max_epoch)

    def before_train(self) -> None:
        """Resume from RESUME, or from OUTPUT_DIR if it holds checkpoints; open tensorboard."""
        directory = self.cfg.RESUME or self.cfg.OUTPUT_DIR
        self.start_epoch = self.resume_model_if_exist(directory)
        if self.start_epoch > 0 and self.cfg.TEST.FINAL_MODEL == "best_val":
            self._resume_best(directory)
            # A run killed between saving the best model and the same epoch's own checkpoint lacks the latter.
            due = not self.cfg.RESUME and self._saves_after(self.start_epoch)
            if due and not self._saved(self.start_epoch):
                self.save_model(self.start_epoch - 1, self.output_dir)
        writer_dir = os.path.join(self.output_dir, "tensorboard")
        mkdir_if_missing(writer_dir)
        self.init_writer(writer_dir)
        self.time_start = time.time()

    def _resume_best(self, directory: str) -> None:
        """Take over the best model so far, so that only a better one replaces it."""
        for name in self.get_model_names():
            path = os.path.join(directory, name, BEST)
            if not os.path.exists(path):
                continue
            val_result = load_trainer_checkpoint(path).get("val_result")
            if val_result is not None:
                self.best_result = val_result
            target = os.path.join(self.output_dir, name, BEST)
            if not os.path.exists(target):
                mkdir_if_missing(os.path.dirname(target))
                shutil.copy(path, target)

    def after_train(self) -> None:
        print("Finish training")
        if not self.cfg.TEST.NO_TEST:
            if self.cfg.TEST.FINAL_MODEL == "best_val":
                print("Deploy the model with the best val performance")
                self.load_model(self.output_dir)
            else:
                print("Deploy the last-epoch model")
            self.test()
        elapsed = max(round(time.time() - self.time_start), 0)  # a clock may be set back
        print(f"Elapsed: {datetime.timedelta(seconds=elapsed)}")
        self.close_writer()

    def after_epoch(self) -> None:
        """Keep the best model on the validation data, if asked for; save at CHECKPOINT_FREQ and the end."""
        cfg = self.cfg
        if not cfg.TEST.NO_TEST and cfg.TEST.FINAL_MODEL == "best_val":
            result = self.test(split="val")
            if result > self.best_result:
                self.best_result = result
                self.save_model(self.epoch, self.output_dir, val_result=result, model_name=BEST)
        if self._saves_after(self.epoch + 1):
            self.save_model(self.epoch, self.output_dir)

    def _saves_after(self, epochs: int) -> bool:
        freq = self.cfg.TRAIN.CHECKPOINT_FREQ
        return epochs == self.max_epoch or (freq > 0 and epochs % freq == 0)

    def _saved(self, epochs: int) -> bool:
        names = self.get_model_names()
        return all(
            os.path.exists(os.path.join(self.output_dir, name, f"model.pth.tar-{epochs}")) for name in names
        )

    @torch.no_grad()
    def test(self, split: str | None = None) -> float:
        """Evaluate on `split` (default TEST.SPLIT): "val", where there is such data, else the test data.

        Returns the evaluator's first result, which is the accuracy in percent.
        """
        self.set_model_mode("eval")
        self.evaluator.reset()
        split = split or self.cfg.TEST.SPLIT
        if split == "val" and self.val_loader is not None:
            loader = self.val_loader
        else:
            if split == "val":
                warnings.warn("there are no validation data: the test data stand for them", stacklevel=3)
            split, loader = "test", self.test_loader
        print(f"Evaluate on the *{split}* set")
        for batch in tqdm(loader):
            input, label = self.parse_batch_test(batch)
            self.evaluator.process(self.model_inference(input), label)
        results = self.evaluator.evaluate()
        for name, value in results.items():
            self.write_scalar(f"{split}/{name}", value, self.epoch)
        return next(iter(results.values()))

    def model_inference(self, input: Any) -> Any:
        """Model outputs (B, C) for what `parse_batch_test` gave first."""
        return self.model(input)

    def parse_batch_test(self, batch: dict[str, Any]) -> tuple[Any, Tensor]:
        """Images (B, 3, H, W) and labels (B,) on the device."""
        return batch["img"].to(self.device), batch["label"].to(self.device)

    def _run_batches(self, batches: Iterator[Sequence[Any]], num_batches: int) -> None:
        """One epoch: `forward_backward` on each of `num_batches` tuples of batches, with the log."""
        self.set_model_mode("train")
        losses = MetricMeter()
        batch_time = AverageMeter()
        data_time = AverageMeter()
        self.num_batches = num_batches
        print_freq = self.cfg.TRAIN.PRINT_FREQ
        end = time.perf_counter()
        for self.batch_idx, batch in zip(range(num_batches), batches, strict=False):
            data_time.update(time.perf_counter() - end)
            losses.update(self.forward_backward(*batch))
            batch_time.update(time.perf_counter() - end)
            if (self.batch_idx + 1) % print_freq == 0 or num_batches < print_freq:
                remaining = num_batches * (self.max_epoch - self.epoch) - self.batch_idx - 1
                eta = datetime.timedelta(seconds=int(batch_time.avg * remaining))
                print(
                    f"epoch [{self.epoch + 1}/{self.max_epoch}] "
                    f"batch [{self.batch_idx + 1}/{num_batches}] "
                    f"time {batch_time.val:.3f} ({batch_time.avg:.3f}) "
                    f"data {data_time.val:.3f} ({data_time.avg:.3f}) "
                    f"{losses} "
                    f"lr {self.get_current_lr():.4e} "
                    f"eta {eta}"
                )
            step = self.epoch * num_batches + self.batch_idx
            for name, meter in losses.meters.items():
                self.write_scalar(f"train/{name}", meter.avg, step)
            self.write_scalar("train/lr", self.get_current_lr(), step)
            end = time.perf_counter()


class TrainerX(SimpleTrainer):
    """Learns from labelled data: `forward_backward(batch)`."""

    def run_epoch(self) -> None:
        batches = ((batch,) for batch in self.train_loader_x)
        self._run_batches(batches, len(self.train_loader_x))

    def parse_batch_train(self, batch: dict[str, Any]) -> Any:
        """Images (B, 3, H, W), labels (B,) and domains (B,) on the device."""
        return (
            batch["img"].to(self.device),
            batch["label"].to(self.device),
            batch["domain"].to(self.device),
        )


class TrainerXU(SimpleTrainer):
    """Learns from labelled and unlabelled data: `forward_backward(batch_x, batch_u)`.

    TRAIN.COUNT_ITER says which of the two loaders an epoch goes through once: train_x, train_u or
    smaller_one. The other starts again when it is exhausted.
    """

    def run_epoch(self) -> None:
        loaders = (self.train_loader_x, self.train_loader_u)
        lengths = {"train_x": len(loaders[0]), "train_u": len(loaders[1])}
        lengths["smaller_one"] = min(lengths.values())
        if self.cfg.TRAIN.COUNT_ITER not in lengths:
            raise ValueError(
                f"TRAIN.COUNT_ITER must be one of {list(lengths)}, got {self.cfg.TRAIN.COUNT_ITER}"
            )
        self._run_batches(_endless_pairs(*loaders), lengths[self.cfg.TRAIN.COUNT_ITER])

    def parse_batch_train(self, batch_x: dict[str, Any], batch_u: dict[str, Any]) -> Any:
        """Labelled images, their labels and domains, and unlabelled images, on the device."""
        return (
            batch_x["img"].to(self.device),
            batch_x["label"].to(self.device),
            batch_x["domain"].to(self.device),
            batch_u["img"].to(self.device),
        )


def _endless_pairs(loader_x: Iterable[Any], loader_u: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Pairs of batches; each loader starts again when it is exhausted."""
    loaders = [loader_x, loader_u]
    iterators = [iter(loader) for loader in loaders]
    while True:
        pair = []
        for i, loader in enumerate(loaders):
            try:
                pair.append(next(iterators[i]))
            except StopIteration:
                iterators[i] = iter(loader)
                pair.append(next(iterators[i]))
        yield pair[0], pair[1]
