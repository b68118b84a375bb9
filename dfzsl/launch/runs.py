"""Define the runs of protocols: data sets, methods, output folders and command lines."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dassl.engine import TRAINER_REGISTRY

from dfzsl.configs import CONFIGS, dataset_config
from dfzsl.io.results import RESULTS, read_results
from dfzsl.io.untrusted.yaml_reader import read_yaml
from dfzsl.trainers.base import CLIPTrainer
from dfzsl.utils.dassl_plugin import ADDED_KEYS
from dfzsl.utils.errors import UserError, unknown_name

from .checkouts import Checkout, CheckoutRecipe, to_arguments

OWNER_TRAINER = "TeacherZeroshot"
BASELINE_TRAINERS = ("ZeroshotCLIP", OWNER_TRAINER, "TextTeacherMix")
DEFAULT_METHODS = (*BASELINE_TRAINERS, "CoOp", "CoCoOp", "DFZSL")
DEFAULT_SEEDS = ("1", "2", "3")
TRANSFER_DATASETS = ["caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101"]
TRANSFER_DATASETS += ["fgvc_aircraft", "sun397", "dtd", "eurosat", "ucf101"]
# Data sets with the same classes and other images (shifted), by the training data set.
SHIFTED_DATASETS = {
    "imagenet": ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"),
    "shapes": ("shapes_dark", "shapes_drawing", "shapes_painting", "shapes_pixel"),
}
XD_DATASETS = (*TRANSFER_DATASETS, *SHIFTED_DATASETS["imagenet"])


@functools.cache
def _read_project_config(config: Path) -> Any:
    """Read a config of this project, cached because each run of a sweep reads it."""
    return read_yaml(config) or {}


@dataclass(frozen=True)
class Data:
    """A data set as given on the command line.

    Attributes:
        spec: name of a data set config, or KIND:PATH for your own data.
        root: data folder.
    """

    spec: str
    root: str

    @property
    def name(self) -> str:
        """Folder name of its results."""
        kind, _, path = self.spec.partition(":")
        place = Path(os.path.abspath(path))
        return (place.name if place.is_dir() else place.stem) if path else kind

    @property
    def config(self) -> Path:
        """Config file of the data set."""
        return dataset_config(self.spec.partition(":")[0])

    @property
    def place(self) -> str:
        """Value of DATASET.ROOT. Raises UserError if the path does not exist."""
        path = self.spec.partition(":")[2]
        if path and not Path(path).exists():
            raise UserError(f"{self.spec}: {path} does not exist")
        return path or self.root

    def overrides(self) -> list[str]:
        """Return KEY VALUE pairs of the data set's own backbone, which override a trainer's config."""
        model = _read_project_config(self.config).get("MODEL", {})
        backbone = model.get("BACKBONE", {})
        return [word for key, value in backbone.items() for word in (f"MODEL.BACKBONE.{key}", value)]


@dataclass(frozen=True)
class Protocol:
    """Classes and data sets of training and tests.

    Attributes:
        train: classes to train on: base or all.
        tests: further classes of the same data set to test on: new or all.
        targets: further data sets to test on, by the training data set; "" for any training data set.
        default: default data set.
        shots: default numbers of training images per class.
    """

    train: str
    tests: tuple[str, ...] = ()
    targets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    default: str = "shapes"
    shots: tuple[int, ...] = (16,)


PROTOCOLS = {
    "base2new": Protocol("base", tests=("new",)),
    "gzsl": Protocol("base", tests=("all",)),
    "xd": Protocol("all", targets={"": XD_DATASETS}, default="imagenet"),
    "dg": Protocol("all", targets=SHIFTED_DATASETS, default="imagenet"),
    "fewshot": Protocol("all", shots=(1, 2, 4, 8, 16)),
}
# CoOp and its descendants have no GZSL, with its joint classes and per-class means.
CHECKOUT_PROTOCOLS = [name for name in PROTOCOLS if name != "gzsl"]


@dataclass(frozen=True)
class Method:
    """A trainer with its settings, given as `TRAINER[@virtual][:CONFIG][+VARIANT]`.

    Attributes:
        trainer: name of a registered trainer.
        virtual: whether it trains on virtual features instead of images.
        config: name of its config, or "" for the default.
        variant: key of changes to the config in configs/ablations.yaml, or "".
    """

    trainer: str
    virtual: bool = False
    config: str = ""
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Method:
        """Parse a method.

        Raises:
            UserError: the trainer or variant is unknown, or the trainer cannot use virtual features.
        """
        name, _, variant = text.partition("+")
        name, _, config = name.partition(":")
        name, _, source = name.partition("@")
        trainers = {trainer.lower(): trainer for trainer in TRAINER_REGISTRY.registered_names()}
        if name.lower() not in trainers or source not in ("", "virtual"):
            raise unknown_name("method", text, [*trainers.values(), "CoOp@virtual"])
        method = cls(trainers[name.lower()], bool(source), config, variant)
        if method.virtual and method.type.image_prompts:
            raise UserError(f"{text}: {method.trainer} trains inside the image encoder and needs images")
        if variant and variant not in method.variants:
            raise unknown_name(f"variant of {method.trainer}", variant, method.variants)
        return method

    @property
    def variants(self) -> dict[str, list]:
        """KEY, VALUE, ... of each variant of the trainer."""
        return _read_project_config(CONFIGS / "ablations.yaml").get(self.trainer, {})

    @property
    def name(self) -> str:
        """Folder name of its results."""
        return f"{self.trainer}@virtual" if self.virtual else self.trainer

    @property
    def type(self) -> type[CLIPTrainer]:
        return TRAINER_REGISTRY.get(self.trainer)

    @property
    def trains(self) -> bool:
        return self.type.trains

    @property
    def data_free(self) -> bool:
        return self.virtual or self.type.needs_teacher


@dataclass(frozen=True)
class Job:
    """A run of one method on one data set with one seed.

    Attributes:
        protocol: key of `PROTOCOLS`.
        method: trainer or checkout.
        data: data set to train on.
        seed: random seed.
        shots: training images per class, -1 for all.
        teacher_shots: the owner's training images per class, -1 for all.
        output: folder of all results.
        opts: KEY, VALUE, ... for the config.
    """

    protocol: str
    method: Method | Checkout
    data: Data
    seed: int
    shots: int
    teacher_shots: int
    output: Path
    opts: tuple[str, ...] = ()

    @property
    def recipe(self) -> CheckoutRecipe:
        """Recipe of a checkout for this job."""
        assert isinstance(self.method, Checkout)
        return self.method.recipe(self.protocol, self.data.name, self.shots)

    @property
    def config_file(self) -> Path | None:
        """Config of the method: the given one, else that of the data set, else the trainer's recipe.

        A config that is a folder has one file for each data set.
        """
        if isinstance(self.method, Checkout):
            return self.method.config_file(self.recipe)
        folder, kind = CONFIGS / "trainers" / self.method.trainer, self.data.spec.partition(":")[0]
        config_name = self.method.config
        names = [f"{config_name}/{kind}", config_name] if config_name else [kind, self.method.type.recipe]
        for name in names:
            if (path := folder / f"{name}.yaml").is_file():
                return path
        if config_name:
            available = {p.relative_to(folder).parts[0].removesuffix(".yaml") for p in folder.rglob("*.yaml")}
            raise unknown_name(f"config of {self.method.trainer} for {kind}", config_name, available)
        return None

    def folder(self, part: str, data: Data | None = None) -> Path:
        """Return the output folder of one part (`train_base`, `test_new`), in CoOp's layout."""
        config = self.method.config or (self.config_file.stem if self.config_file else "default")
        if self.method.variant:
            config += f"+{self.method.variant}"
        name = (data or self.data).name
        return (
            self.output
            / self.protocol
            / part
            / name
            / f"shots_{'all' if self.shots_seen < 0 else self.shots_seen}"
            / self.method.name
            / config
            / f"seed{self.seed}"
        )

    @property
    def shots_seen(self) -> int:
        """Training images per class, for data-free methods those of the teacher; -1 for all."""
        if self.method.trainer == OWNER_TRAINER or self.method.data_free:
            return self.teacher_shots
        return self.shots if self.method.trains else 0

    @property
    def teacher(self) -> Job:
        """The owner's job that trains the teacher, with the config of the same name if it exists."""
        config = CONFIGS / "trainers" / OWNER_TRAINER / f"{self.method.config}.yaml"
        return replace(
            self, method=Method(OWNER_TRAINER, config=self.method.config if config.is_file() else "")
        )

    def arguments(self, part: str, classes: str, data: Data | None = None) -> list[str]:
        """Return the arguments of train.py for one part."""
        data = data or self.data
        words = ["--trainer", self.method.trainer, "--seed", str(self.seed)]
        config = self.method.dataset_config(data.name) if isinstance(self.method, Checkout) else data.config
        words += ["--dataset-config-file", str(config), "--root", data.place]
        words += ["--output-dir", str(self.folder(part, data))]
        if self.config_file:
            words += ["--config-file", str(self.config_file)]
        trained = self.folder(f"train_{PROTOCOLS[self.protocol].train}")
        if part.startswith("test") or not self.method.trains:
            words += ["--eval-only"]
            if self.method.trains:
                words += ["--model-dir", str(trained)]
        words += ["DATASET.SUBSAMPLE_CLASSES", classes, "DATASET.NUM_SHOTS", str(self.shots_seen)]
        if isinstance(self.method, Checkout):
            words += [*self.method.key_values(self.recipe, self.seed), *self.applicable_opts]
            return self.method.with_absolute_paths(words)
        if not self.config_file or self.config_file.stem != self.data.spec.partition(":")[0]:
            words += self.data.overrides()
        if self.needs_owner_teacher:
            owner = self.teacher.folder(f"train_{PROTOCOLS[self.protocol].train}")
            words += ["TEACHER.FILE", str(owner / "teacher.safetensors")]
        words += map(str, self.method.variants.get(self.method.variant, []))
        return words + list(self.applicable_opts)

    @property
    def applicable_opts(self) -> tuple[str, ...]:
        """The KEY VALUE pairs that apply to this job.

        TEACHER keys apply only to data-free methods; checkouts lack the keys that this project adds to Dassl.
        """
        if self.method.data_free:
            return self.opts
        pairs = zip(self.opts[::2], self.opts[1::2], strict=True)
        unsupported = ADDED_KEYS if isinstance(self.method, Checkout) else set()
        applicable = [
            pair for pair in pairs if not pair[0].startswith("TEACHER.") and pair[0] not in unsupported
        ]
        return tuple(word for pair in applicable for word in pair)

    @property
    def needs_owner_teacher(self) -> bool:
        """Whether it reads the teacher of the sweep's owner, because TEACHER.FILE gives no other."""
        return self.method.data_free and "TEACHER.FILE" not in self.opts[::2]

    def parts(self) -> list[tuple[Path, list[str]]]:
        """Return (output folder, arguments of train.py) of every part, in order of execution."""
        protocol = PROTOCOLS[self.protocol]
        parts = [(f"train_{protocol.train}", protocol.train, self.data)]
        parts += [(f"test_{classes}", classes, self.data) for classes in protocol.tests]
        parts += [("test_all", "all", Data(name, self.data.root)) for name in self.targets]
        return [
            (self.folder(part, data), self.arguments(part, classes, data)) for part, classes, data in parts
        ]

    def run_checkout(self, folder: Path, arguments: list[str]) -> None:
        """Run one of the `parts` of a checkout in its own process."""
        assert isinstance(self.method, Checkout)
        words = dict(itertools.pairwise(arguments))
        fields = {
            "trainer": self.method.trainer,
            "dataset": Path(words["--dataset-config-file"]).stem,
            "backbone": self.method.backbone(self.recipe, self.applicable_opts),
            "classes": words["DATASET.SUBSAMPLE_CLASSES"],
            "shots": self.shots_seen,
            "seed": self.seed,
        }
        self.method.run(folder, arguments, self.recipe, fields)

    @property
    def data_job(self) -> Job:
        """For a checkout, a job of this project that reads the same data with the same encoder."""
        if not isinstance(self.method, Checkout):
            return self
        values = dict(zip(self.opts[::2], self.opts[1::2], strict=True))
        encoder = {
            "MODEL.BACKBONE.NAME": self.method.backbone(self.recipe, self.opts),
            "MODEL.BACKBONE.WEIGHTS": values.get("MODEL.BACKBONE.WEIGHTS", "openai"),
        }
        data = {key: value for key, value in values.items() if key.startswith("DATASET.")}
        return replace(self, method=Method("CoOp"), opts=tuple(to_arguments(encoder | data)))

    @property
    def targets(self) -> Sequence[str]:
        """Further data sets to test on. Raises UserError if there are none for the training data set."""
        targets = PROTOCOLS[self.protocol].targets
        if targets and "" not in targets and self.data.spec not in targets:
            raise unknown_name(f"data set to train on for {self.protocol}", self.data.spec, targets)
        return targets.get(self.data.spec, targets.get("", ()))

    @property
    def finished(self) -> bool:
        """Whether all parts have results."""
        return all((folder / RESULTS).exists() for folder, _ in self.parts())

    @property
    def settings(self) -> Path:
        """File with the `identity` of the run in this folder."""
        return self.parts()[0][0] / "settings.txt"

    @property
    def identity(self) -> str:
        """Settings that the folder name does not contain: KEY VALUE pairs, and the version of a checkout."""
        words = list(self.applicable_opts)
        if isinstance(self.method, Checkout):
            words.append(self.method.identity(self.recipe, self.data.name, self.data.place))
        return " ".join(words)

    def check(self) -> None:
        """Check the output folder.

        Raises:
            UserError: the method does not support the protocol, the folder has a run with other settings, or
                its results are invalid.
        """
        if isinstance(self.method, Checkout) and self.protocol not in CHECKOUT_PROTOCOLS:
            raise UserError(
                f"{self.method.name}: checkouts support {', '.join(CHECKOUT_PROTOCOLS)}, not {self.protocol}"
            )
        for folder, _ in self.parts():
            if (folder / RESULTS).exists():
                read_results(folder / RESULTS)
        if self.settings.exists():
            recorded, requested = self.settings.read_text(encoding="utf-8"), self.identity
            if recorded != requested:
                old, new = (
                    f"with settings '{opts}'" if opts else "without settings"
                    for opts in (recorded, requested)
                )
                raise UserError(f"{self.settings.parent} was run {old}, not {new}; choose another --output")

    @property
    def failure(self) -> Path:
        """File with the message of the error that stopped the run."""
        return self.parts()[0][0] / "failed.txt"

    @property
    def progress_file(self) -> Path:
        """File with the last line of the console output while the job runs."""
        return self.parts()[0][0] / ".said"
