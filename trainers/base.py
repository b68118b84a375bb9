"""Provide the base class of all trainers: a frozen CLIP, cached test features, virtual or real training data.

A subclass of `CLIPTrainer` defines `build_model`, `forward_backward` and `model_inference`, as any trainer of
Dassl does; see docs/new_trainer.md.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from dassl.data import DataManager
from dassl.data.transforms import build_transform
from dassl.engine import TrainerX
from dassl.utils import load_checkpoint
from tqdm import tqdm

from dfzsl.datasets.encoding import checksum, encode_datums
from dfzsl.datasets.features import FeatureDatum
from dfzsl.datasets.loader import FeatureLoader
from dfzsl.datasets.names_only import ClassNames
from dfzsl.datasets.virtual_features import DataFreeManager, VirtualLoader
from dfzsl.io.files import digest, read_json, with_filename, write_json
from dfzsl.io.results import RESULTS, peak_memory, per_class_counts, write_results
from dfzsl.io.run_directory import RunDirectory
from dfzsl.utils import distributed
from dfzsl.utils.dassl_plugin import add_keys, keys_of
from dfzsl.utils.errors import UserError
from dfzsl.utils.log import log_to_stdout, logger

from .clip.backbone import FeatureBackbone
from .clip.class_prompts import ClassPrompts
from .clip.loading import BUILT_IN, BUILT_IN_FOLDER, load_backbone
from .recovery.feature_statistics import FeatureStatistics
from .recovery.open_oracle import open_oracle
from .recovery.oracle import Oracle
from .recovery.recover import recover
from .recovery.remote_oracle import is_address
from .recovery.settings import RecoverySettings
from .recovery.virtual_classes import VirtualClasses
from .recovery.vmf import fit_classes

add_keys("MODEL.BACKBONE", WEIGHTS="openai")
add_keys("TEXT", PROMPTS="")
add_keys("TEACHER", FILE="", ACCESS="logits", BUDGET=0)
add_keys("GEOMETRY", FILE="")
add_keys("RECOVERY", **keys_of(RecoverySettings))

LOSSES_FILE = "losses.json"  # mean loss of each finished epoch, in the output directory
# Dassl's transforms that are not random. If there are no others, each image is encoded only once.
DETERMINISTIC_TRANSFORMS = {"normalize", "center_crop", "instance_norm"}


class CLIPTrainer(TrainerX):
    """Train on features of a frozen CLIP, in Dassl's training loop.

    A run is data-free if `TEACHER.FILE` is set or `virtual` is given. The data set then provides class names
    and test images only, and training batches are sampled from the vMF distributions recovered from the
    teacher (stage 1). A data-free run needs no data set: with DATASET.NAME "", its classes are the teacher's.

    Args:
        cfg: the frozen config.
        virtual: the result of stage 1, if available; by default `recover` queries the teacher.

    Attributes (set before `build_model` is called):
        backbone: the frozen model (trainers/clip/backbone.py).
        classnames: names of this run's classes, in label order.
        template: the data set's prompt template, for example "a photo of a {}."
        texts: the prompts of a class, from TEXT.PROMPTS or `template` (trainers/clip/class_prompts.py).
    """

    cfg: Any
    backbone: Any  # a Backbone, or a FeatureBackbone if only features are available
    dm: Any
    recipe = ""  # default config in configs/trainers/NAME/
    trains = True  # False: the trainer learns nothing, so a test loads no model
    needs_teacher = False  # True: always data-free
    epoch_callback: Callable[[int], None] | None = None  # called with the index of each finished epoch
    image_prompts = False  # True: learns inside the image encoder and so needs images, not features

    def __init__(self, cfg: Any, virtual: VirtualClasses | None = None) -> None:
        self.virtual = virtual
        super().__init__(cfg)

    @property
    def data_free(self) -> bool:
        """Whether the run has a teacher in place of training images."""
        return bool(self.cfg.TEACHER.FILE) or self.virtual is not None

    def build_data_loader(self) -> None:
        # Another program, for example CoOp's train.py, has not configured our logger.
        if not logger.hasHandlers():
            log_to_stdout()
        self.started = time.perf_counter()
        self.stage_seconds: dict[str, float] = {}
        self.losses: dict[int, float] = {}
        self.queries = 0
        self.folder = RunDirectory(self.cfg)
        cfg = self.cfg = _limit_workers(self.cfg)
        backbone_cfg = cfg.MODEL.BACKBONE
        backbone: Any = None
        if backbone_cfg.NAME:
            backbone = load_backbone(backbone_cfg.NAME, backbone_cfg.WEIGHTS, self.device)
            cfg = self.cfg = _match_preprocessing(cfg, backbone)
        self.transform = build_transform(cfg, is_train=False)
        self.dm = self.build_data_manager()
        dataset = self.dm.dataset
        if backbone is None:
            backbone = _feature_backbone(dataset)
        self.backbone = backbone
        with distributed.rank_zero_first():
            test = checksum(dataset, dataset.test)
        self.folder.add({"backbone": backbone.identity, "test data": test})
        self.classnames = list(dataset.classnames)
        self.template = dataset.template
        self.texts = ClassPrompts.parse(cfg.TEXT.PROMPTS, self.template)
        self.num_classes = self.dm.num_classes
        self.num_source_domains = self.dm.num_source_domains
        self.lab2cname = self.dm.lab2cname
        self.train_loader_u = None
        validates = cfg.TEST.SPLIT == "val" or cfg.TEST.FINAL_MODEL == "best_val"
        self.val_loader = self._feature_loader(dataset.val) if dataset.val and validates else None
        self.test_loader: Any = self._feature_loader(dataset.test) if dataset.test else None
        self.train_loader_x = None

    def build_data_manager(self) -> Any:
        """Build Dassl's DataManager, or an equivalent without training images if the run is data-free."""
        if not self.data_free:
            return DataManager(self.cfg, custom_tfm_test=self.transform)
        if self.cfg.DATASET.NAME:
            return DataFreeManager(self.cfg)
        base = self.virtual.classnames if self.virtual else self.oracle.classnames
        return DataFreeManager(self.cfg, ClassNames(base, self.configured_new_classnames))

    @property
    def configured_new_classnames(self) -> list[str]:
        """New classes named in the config; they replace those of the data set."""
        return []

    @functools.cached_property
    def oracle(self) -> Oracle:
        """The teacher at access level TEACHER.ACCESS.

        Responses of a server cost query budget, so they are stored in OUTPUT_DIR/answers.
        """
        teacher = self.cfg.TEACHER
        journal = Path(self.cfg.OUTPUT_DIR) / "answers" if is_address(teacher.FILE) else None
        return open_oracle(teacher.FILE, teacher.ACCESS, journal, teacher.BUDGET)

    def encode(self, datums: list) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode images with `encode_datums`.

        Args:
            datums: list of n Datum.

        Returns:
            L2-normalized features (n, d) and labels (n,).
        """
        features = encode_datums(
            self.backbone,
            datums,
            self.transform,
            batch_size=self.cfg.DATALOADER.TEST.BATCH_SIZE,
            num_workers=self.cfg.DATALOADER.NUM_WORKERS,
            device=self.device,
        )
        return features, torch.tensor([datum.label for datum in datums])

    def _feature_loader(self, datums: list) -> FeatureLoader:
        return FeatureLoader(*self.encode(datums), batch_size=self.cfg.DATALOADER.TEST.BATCH_SIZE)

    def _train_loader(self):
        """Build the loader of training data: images if the config augments them, else features."""
        datums = self.dm.dataset.train_x
        augmented = (
            not self.cfg.INPUT.NO_TRANSFORM and not set(self.cfg.INPUT.TRANSFORMS) <= DETERMINISTIC_TRANSFORMS
        )
        if augmented and not isinstance(datums[0], FeatureDatum):
            return self.dm.train_loader_x
        batch_size = self.cfg.DATALOADER.TRAIN_X.BATCH_SIZE
        return FeatureLoader(
            *self.encode(datums), batch_size=batch_size, shuffle=True, drop_last=len(datums) >= batch_size
        )

    def parse_batch_train(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        return batch["img"].to(self.device), batch["label"].to(self.device)

    def require_training_images(self) -> None:
        """Record the checksum of the training images in the run manifest.

        Raises:
            UserError: the data set has test images only (ImageNet's variants), or the run in OUTPUT_DIR had
                other training images.
        """
        if self.dm.dataset.test_only:
            raise UserError(
                f"{self.cfg.DATASET.NAME} ({self.cfg.DATASET.SUBSAMPLE_CLASSES}) has test images only; "
                "evaluate a trained model on it with --eval-only --model-dir"
            )
        with distributed.rank_zero_first():
            training = checksum(self.dm.dataset, [*self.dm.dataset.train_x, *self.dm.dataset.val])
        self.folder.add({"training data": training})

    def before_train(self) -> None:
        if not self.data_free:
            self.require_training_images()
        super().before_train()
        self.train_loader_x = self.recover_virtual_features() if self.data_free else self._train_loader()
        self.folder.write_config()
        self.train_started = time.perf_counter()

    def before_epoch(self) -> None:
        super().before_epoch()
        if self.data_free:
            # A seed per epoch makes a resumed run draw the same features as an uninterrupted one.
            self.draw_generator.manual_seed(max(self.cfg.SEED, 0) * 1_000_003 + self.epoch + 1)

    def write_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        with with_filename(Path(self.output_dir) / "tensorboard"):
            super().write_scalar(tag, scalar_value, global_step)
        if tag == "train/loss":
            self.losses[self.epoch] = float(scalar_value)  # running mean of the epoch

    def save_model(self, epoch: int, directory: str, *args: Any, **kwargs: Any) -> None:
        # The losses are written before the checkpoint: an epoch that is repeated overwrites its loss.
        if distributed.rank() == 0:
            write_json(Path(directory) / LOSSES_FILE, list(self.losses.values()))
            super().save_model(epoch, directory, *args, **kwargs)
        distributed.barrier()

    def init_writer(self, log_dir: str) -> None:
        if distributed.rank() == 0:
            with with_filename(log_dir):
                super().init_writer(log_dir)

    def after_epoch(self) -> None:
        super().after_epoch()
        self.stage_seconds["train"] = time.perf_counter() - self.train_started
        if self.epoch_callback:
            self.epoch_callback(self.epoch)

    def recover_virtual_features(self) -> VirtualLoader:
        """Run stage 1, or load its result from OUTPUT_DIR/virtual.safetensors.

        Returns:
            The loader of virtual features.
        """
        started = time.perf_counter()
        settings = {key.lower(): value for key, value in self.cfg.RECOVERY.items()}
        if self.virtual is not None:
            self.folder.add({"virtual classes": self.virtual.digest()})
        else:
            path = Path(self.cfg.OUTPUT_DIR) / "virtual.safetensors"
            statistics = self.load_feature_statistics()
            with distributed.rank_zero_first():
                if path.exists():
                    self.virtual = replace(VirtualClasses.load(path), geometry=statistics)
                else:
                    self.virtual = self.query_teacher(statistics, settings)
                    self.folder.write_config()
                    self.virtual.save(path)
        self.virtual = self.virtual.ordered_as(self.classnames)
        self.queries = self.virtual.queries
        self.draw_generator = self.stage_generator()
        loader = VirtualLoader(
            self.virtual,
            self.cfg.DATALOADER.TRAIN_X.BATCH_SIZE,
            **{key: settings[key] for key in ("num_per_class", "filter", "fresh")},
            generator=self.draw_generator,
        )
        self.stage_seconds["recovery"] = time.perf_counter() - started
        return loader

    def query_teacher(self, statistics: FeatureStatistics | None, settings: dict[str, Any]) -> VirtualClasses:
        """Recover the base classes from the teacher.

        Args:
            statistics: feature statistics of the encoder, if available.
            settings: the fields of `RecoverySettings`.
        """
        oracle = self.oracle
        if oracle.backbone and oracle.backbone != self.backbone.identity:
            raise UserError(
                f"{self.cfg.TEACHER.FILE}: the teacher reads features of {oracle.backbone}, not those of "
                f"{self.backbone.identity}; set MODEL.BACKBONE to the teacher's"
            )
        if note := self.text_note:
            logger.warning(f"Text: {note}")
        # Stored responses belong to this run.
        if oracle.journal:
            self.folder.write_config()
        new_classnames = self.configured_new_classnames or self.dm.dataset.new_classnames
        virtual = recover(
            oracle,
            self.text_of(self.classnames).cpu(),
            self.classnames,
            new_text=self.text_of(new_classnames).cpu() if new_classnames else None,
            generator=self.stage_generator(),
            geometry=statistics,
            **settings,
        )
        logger.info(f"Teacher: {virtual.summary}")
        return virtual

    @property
    def text_note(self) -> str:
        """A warning if the owner measured the mixing weight with other prompts than this run's, else ""."""
        if not self.cfg.TEACHER.FILE or is_address(self.cfg.TEACHER.FILE):
            return ""  # only a file has a card
        card = self.oracle.card
        return card.prompt_mismatch(self.texts.description) if card else ""

    def load_feature_statistics(self) -> FeatureStatistics | None:
        """Load the feature statistics in GEOMETRY.FILE (a file, or the built-in "shapes"), if any."""
        name = self.cfg.GEOMETRY.FILE
        if not name:
            return None
        path = BUILT_IN_FOLDER / "geometry.safetensors" if name == BUILT_IN else Path(name)
        statistics = FeatureStatistics.load(path)
        self.folder.add({"geometry": digest(path)})
        if statistics.backbone and statistics.backbone != self.backbone.identity:
            raise UserError(
                f"{name}: these feature statistics are those of {statistics.backbone}, not of "
                f"{self.backbone.identity}; measure this encoder's, or set GEOMETRY.FILE ''"
            )
        return statistics

    def stage_generator(self) -> torch.Generator:
        """Return a new random generator for a stage, seeded with the seed of the run."""
        return torch.Generator().manual_seed(max(self.cfg.SEED, 0))

    def text_of(self, classnames: list[str]) -> torch.Tensor:
        """Return L2-normalized text embeddings (n, d) of n class names, with the prompts `texts`."""
        return self.texts.features(self.backbone, classnames)

    def resume_model_if_exist(self, directory: str) -> int:
        """Load the last checkpoint and return the epoch to resume from (0 if there is no checkpoint)."""
        epoch = super().resume_model_if_exist(directory) if self.get_model_names() else 0
        if epoch and (path := Path(directory) / LOSSES_FILE).exists():
            self.losses = dict(enumerate(cast(list[float], read_json(path))[:epoch]))
        return epoch

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        """Load trained weights: of the given epoch, else the best on validation, else the last saved.

        Buffers that depend on class names are ignored, so a model trained on base classes runs on any others.

        Raises:
            UserError: there is no such checkpoint in `directory`.
        """
        if not directory:
            return
        for name in self.get_model_names():
            folder = Path(directory) / name
            best = folder / "model-best.pth.tar"
            if epoch is not None:
                path = folder / f"model.pth.tar-{epoch}"
            elif best.exists() or not (folder / "checkpoint").exists():
                path = best
            else:
                path = folder / (folder / "checkpoint").read_text(encoding="utf-8").strip()
            if not path.exists():
                raise UserError(
                    f"{path}: no such checkpoint; set --model-dir to the directory of a finished run"
                )
            checkpoint = load_checkpoint(str(path))
            state = {
                key: value
                for key, value in checkpoint["state_dict"].items()
                if not key.endswith(("token_prefix", "token_suffix"))
            }
            logger.info(f'Loading weights to {name} from "{path}" (epoch = {checkpoint["epoch"]})')
            self._models[name].load_state_dict(state, strict=False)

    @property
    def trained_parameters(self) -> int:
        """Number of trained parameters."""
        models = self._models.values()
        return sum(p.numel() for model in models for p in model.parameters() if p.requires_grad)

    @property
    def images_used(self) -> int:
        """Number of training images that this run has access to."""
        no_images = self.data_free or not self.trains or self.dm.dataset.test_only
        return 0 if no_images else len(self.dm.dataset.train_x)

    @torch.no_grad()
    def test(self, split: str | None = None) -> float:
        """Evaluate, print Dassl's log lines, and write OUTPUT_DIR/results.json for the test split.

        Args:
            split: "val" or "test"; by default TEST.SPLIT.

        Returns:
            Accuracy in percent.
        """
        self.set_model_mode("eval")
        self.evaluator.reset()
        split = split or self.cfg.TEST.SPLIT
        if split == "val" and self.val_loader is not None:
            loader = self.val_loader
        else:
            split, loader = "test", self.test_loader
        logger.info(f"Evaluate on the *{split}* set")
        labels, predictions = [], []
        for batch in tqdm(loader):
            features, label = self.parse_batch_test(batch)
            output = self.model_inference(features)
            self.evaluator.process(output, label)
            labels.append(label.cpu())
            predictions.append(output.argmax(1).cpu())
        results = self.evaluator.evaluate()
        for key, value in results.items():
            self.write_scalar(f"{split}/{key}", value, self.epoch)
        if split == "test" and distributed.rank() == 0:
            self._write_results(torch.cat(predictions), torch.cat(labels))
        return next(iter(results.values()))

    def _write_results(self, predictions: torch.Tensor, labels: torch.Tensor) -> None:
        path = Path(self.cfg.OUTPUT_DIR) / RESULTS
        self.folder.write_config()
        write_results(
            path,
            cfg=self.cfg,
            accuracy=100.0 * int((predictions == labels).sum()) / max(len(labels), 1),
            per_class=per_class_counts(predictions, labels, self.classnames, self.dm.dataset.new_classnames),
            trained_parameters=self.trained_parameters,
            images_used=self.images_used,
            queries=self.queries,
            seconds=self.stage_seconds,
            elapsed=time.perf_counter() - self.started,
            curves={"loss": list(self.losses.values())} if self.losses else {},
            concentration=self._concentrations(),
            peak_memory=peak_memory(),
            notes=self.notes(),
        )
        logger.info(f"Results written to {path}")

    def _concentrations(self) -> list[dict]:
        """Return the recovered concentration of each class and the one measured on its test features."""
        if self.virtual is None:
            return []
        labels = self.test_loader.labels
        if torch.bincount(labels, minlength=self.num_classes).min() < 2:
            return []
        _, measured = fit_classes(self.test_loader.features.float(), labels, self.num_classes)
        return [
            {"class": name, "recovered": float(recovered), "true": float(true)}
            for name, recovered, true in zip(self.classnames, self.virtual.kappa, measured, strict=True)
        ]

    def notes(self) -> list[str]:
        """Return remarks that every table prints with this run's results."""
        return []


def _limit_workers(cfg):
    """Return a config with at most as many loader processes as there are processors."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = min(cfg.DATALOADER.NUM_WORKERS, os.cpu_count() or 1)
    cfg.freeze()
    return cfg


def _match_preprocessing(cfg, backbone):
    """Return a config with the image size and normalization of the backbone."""
    cfg = cfg.clone()
    cfg.defrost()
    preprocess = backbone.preprocess_cfg
    cfg.INPUT.SIZE = tuple(preprocess["size"])
    cfg.INPUT.PIXEL_MEAN = list(preprocess["mean"])
    cfg.INPUT.PIXEL_STD = list(preprocess["std"])
    cfg.INPUT.INTERPOLATION = preprocess["interpolation"]
    if "normalize" not in cfg.INPUT.TRANSFORMS:
        cfg.INPUT.TRANSFORMS = (*cfg.INPUT.TRANSFORMS, "normalize")
    cfg.freeze()
    return cfg


def _feature_backbone(dataset) -> FeatureBackbone:
    """Return a backbone that passes features through, with the text embeddings of a feature file."""
    text = getattr(dataset, "text_features", None)
    if text is None:
        raise UserError(
            "no backbone: set MODEL.BACKBONE.NAME, or use a feature file with text features (array text)"
        )
    return FeatureBackbone(len(next(iter(text.values()))), text)
