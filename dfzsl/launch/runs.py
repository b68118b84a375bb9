"""What a run is called: its data, its method, its folders and its command lines."""

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

from .checkouts import Checkout, Recipe, in_words

OWNER = "TeacherZeroshot"
FREE = ("ZeroshotCLIP", OWNER, "TextTeacherMix")
METHODS = (*FREE, "CoOp", "CoCoOp", "DFZSL")
DEFAULT_SEEDS = ("1", "2", "3")
TARGETS = ["caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101"]
TARGETS += ["fgvc_aircraft", "sun397", "dtd", "eurosat", "ucf101"]
# The same classes in other pictures, by the data set whose classes they are.
VARIANTS = {
    "imagenet": ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"),
    "shapes": ("shapes_dark", "shapes_drawing", "shapes_painting", "shapes_pixel"),
}
XD_TARGETS = (*TARGETS, *VARIANTS["imagenet"])


@functools.cache
def _shipped(config: Path) -> Any:
    """The keys of a config that is part of the project; a sweep of a thousand runs asks for them often."""
    return read_yaml(config) or {}


@dataclass(frozen=True)
class Data:
    """A data set as the command line names it: a config's name, or KIND:PATH for your own."""

    given: str
    root: str

    @property
    def name(self) -> str:
        """The folder name of its results."""
        kind, _, path = self.given.partition(":")
        place = Path(os.path.abspath(path))
        return (place.name if place.is_dir() else place.stem) if path else kind

    @property
    def config(self) -> Path:
        return dataset_config(self.given.partition(":")[0])

    @property
    def place(self) -> str:
        """What DATASET.ROOT is."""
        path = self.given.partition(":")[2]
        if path and not Path(path).exists():
            raise UserError(f"{self.given}: {path} does not exist")
        return path or self.root

    def overrides(self) -> list[str]:
        """The backbone of a data set that brings its own stands above that of a trainer's common config."""
        model = _shipped(self.config).get("MODEL", {})
        backbone = model.get("BACKBONE", {})
        return [word for key, value in backbone.items() for word in (f"MODEL.BACKBONE.{key}", value)]


@dataclass(frozen=True)
class Protocol:
    """The classes to train on, and what is tested beside them.

    tests: other classes of the same data set. targets: other data sets, by the one trained on; "": by any
        other. default: the data set unless one is named. shots: images a class unless --shots says so.
    """

    train: str
    tests: tuple[str, ...] = ()
    targets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    default: str = "shapes"
    shots: tuple[int, ...] = (16,)


PROTOCOLS = {
    "base2new": Protocol("base", tests=("new",)),
    "gzsl": Protocol("base", tests=("all",)),
    "xd": Protocol("all", targets={"": XD_TARGETS}, default="imagenet"),
    "dg": Protocol("all", targets=VARIANTS, default="imagenet"),
    "fewshot": Protocol("all", shots=(1, 2, 4, 8, 16)),
}
CHECKOUTS_KNOW = [name for name in PROTOCOLS if name != "gzsl"]  # whose classes and means are not CoOp's


@dataclass(frozen=True)
class Method:
    """A trainer, its source of features and its config: `TRAINER[@virtual][:CONFIG][+VARIANT]`.

    Variants are changes to the config, listed in configs/ablations.yaml.
    """

    trainer: str
    virtual: bool = False
    config: str = ""
    variant: str = ""

    @classmethod
    def parse(cls, given: str) -> Method:
        """Raises UserError for an unknown trainer or variant, listing the known ones."""
        name, _, variant = given.partition("+")
        name, _, config = name.partition(":")
        name, _, source = name.partition("@")
        known = {known.lower(): known for known in TRAINER_REGISTRY.registered_names()}
        if name.lower() not in known or source not in ("", "virtual"):
            raise unknown_name("method", given, [*known.values(), "CoOp@virtual"])
        method = cls(known[name.lower()], bool(source), config, variant)
        if method.virtual and method.type.image_prompts:
            raise UserError(f"{given}: {method.trainer} learns inside the image encoder, from pictures alone")
        if variant and variant not in method.variants:
            raise unknown_name(f"variant of {method.trainer}", variant, method.variants)
        return method

    @property
    def variants(self) -> dict[str, list]:
        return _shipped(CONFIGS / "ablations.yaml").get(self.trainer, {})

    @property
    def name(self) -> str:
        """The folder name of its results."""
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
    """One method on one data set with one seed: train and test, then test on the other classes."""

    protocol: str
    method: Method | Checkout
    data: Data
    seed: int
    shots: int
    teacher_shots: int
    output: Path
    opts: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        """How a checkout runs this job."""
        assert isinstance(self.method, Checkout)
        return self.method.recipe(self.protocol, self.data.name, self.shots)

    @property
    def config_file(self) -> Path | None:
        """The method's config: the one it names, else the data set's own, else the trainer's recipe.

        A config that is a folder holds one file for each data set.
        """
        if isinstance(self.method, Checkout):
            return self.method.config_file(self.recipe)
        folder, kind = CONFIGS / "trainers" / self.method.trainer, self.data.given.partition(":")[0]
        named = self.method.config
        wanted = [f"{named}/{kind}", named] if named else [kind, self.method.type.recipe]
        for name in wanted:
            if (path := folder / f"{name}.yaml").is_file():
                return path
        if named:
            known = {p.relative_to(folder).parts[0].removesuffix(".yaml") for p in folder.rglob("*.yaml")}
            raise unknown_name(f"config of {self.method.trainer} for {kind}", named, known)
        return None

    def folder(self, part: str, data: Data | None = None) -> Path:
        """The output folder of one part (`train_base`, `test_new`), laid out as CoOp lays it out."""
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
        """Images a class behind this job: the teacher's where it learns from the teacher. -1: all."""
        if self.method.trainer == OWNER or self.method.data_free:
            return self.teacher_shots
        return self.shots if self.method.trains else 0

    @property
    def teacher(self) -> Job:
        """The owner's job that writes the teacher this one reads, by its config of the same name if any."""
        own = CONFIGS / "trainers" / OWNER / f"{self.method.config}.yaml"
        return replace(self, method=Method(OWNER, config=self.method.config if own.is_file() else ""))

    def arguments(self, part: str, classes: str, data: Data | None = None) -> list[str]:
        """The train.py command line of one part."""
        data = data or self.data
        words = ["--trainer", self.method.trainer, "--seed", str(self.seed)]
        of = self.method.dataset_config(data.name) if isinstance(self.method, Checkout) else data.config
        words += ["--dataset-config-file", str(of), "--root", data.place]
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
            words += [*self.method.key_values(self.recipe, self.seed), *self.settled]
            return self.method.from_its_folder(words)
        if not self.config_file or self.config_file.stem != self.data.given.partition(":")[0]:
            words += self.data.overrides()
        if self.waits_for_owner:
            owner = self.teacher.folder(f"train_{PROTOCOLS[self.protocol].train}")
            words += ["TEACHER.FILE", str(owner / "teacher.safetensors")]
        words += map(str, self.method.variants.get(self.method.variant, []))
        return words + list(self.settled)

    @property
    def settled(self) -> tuple[str, ...]:
        """The KEY VALUE pairs that are this job's: a client's teacher is no affair of who has images, and no
        checkout knows the keys that are only ours."""
        if self.method.data_free:
            return self.opts
        pairs = zip(self.opts[::2], self.opts[1::2], strict=True)
        ours = ADDED_KEYS if isinstance(self.method, Checkout) else set()
        mine = [pair for pair in pairs if not pair[0].startswith("TEACHER.") and pair[0] not in ours]
        return tuple(word for pair in mine for word in pair)

    @property
    def waits_for_owner(self) -> bool:
        """Whether the sweep's own owner makes the teacher, and no KEY VALUE names another."""
        return self.method.data_free and "TEACHER.FILE" not in self.opts[::2]

    def parts(self) -> list[tuple[Path, list[str]]]:
        """(output folder, train.py arguments) of every part, in order."""
        protocol = PROTOCOLS[self.protocol]
        wanted = [(f"train_{protocol.train}", protocol.train, self.data)]
        wanted += [(f"test_{classes}", classes, self.data) for classes in protocol.tests]
        wanted += [("test_all", "all", Data(name, self.data.root)) for name in self.targets]
        return [
            (self.folder(part, data), self.arguments(part, classes, data)) for part, classes, data in wanted
        ]

    def run_checkout(self, folder: Path, arguments: list[str]) -> None:
        """One of `parts` of a checkout, in a process of its own."""
        assert isinstance(self.method, Checkout)
        words = dict(itertools.pairwise(arguments))
        about = {
            "trainer": self.method.trainer,
            "dataset": Path(words["--dataset-config-file"]).stem,
            "backbone": self.method.backbone(self.recipe, self.settled),
            "classes": words["DATASET.SUBSAMPLE_CLASSES"],
            "shots": self.shots_seen,
            "seed": self.seed,
        }
        self.method.run(folder, arguments, self.recipe, about)

    @property
    def reader(self) -> Job:
        """A job of ours that reads the same data with the same encoder."""
        if not isinstance(self.method, Checkout):
            return self
        given = dict(zip(self.opts[::2], self.opts[1::2], strict=True))
        encoder = {
            "MODEL.BACKBONE.NAME": self.method.backbone(self.recipe, self.opts),
            "MODEL.BACKBONE.WEIGHTS": given.get("MODEL.BACKBONE.WEIGHTS", "openai"),
        }
        data = {key: value for key, value in given.items() if key.startswith("DATASET.")}
        return replace(self, method=Method("CoOp"), opts=tuple(in_words(encoder | data)))

    @property
    def targets(self) -> Sequence[str]:
        """The data sets it is tested on. Raises UserError where there are none for the one it trains on."""
        known = PROTOCOLS[self.protocol].targets
        if known and "" not in known and self.data.given not in known:
            raise unknown_name(f"data set to train on for {self.protocol}", self.data.given, known)
        return known.get(self.data.given, known.get("", ()))

    @property
    def finished(self) -> bool:
        return all((folder / RESULTS).exists() for folder, _ in self.parts())

    @property
    def settings(self) -> Path:
        """A file with the `identity` of what has been run here."""
        return self.parts()[0][0] / "settings.txt"

    @property
    def identity(self) -> str:
        """The KEY VALUE pairs, which no folder's name tells, and what a checkout was."""
        words = list(self.settled)
        if isinstance(self.method, Checkout):
            words.append(self.method.identity(self.recipe, self.data.name, self.data.place))
        return " ".join(words)

    def check(self) -> None:
        """Raises UserError for what is unknown, where the folder holds this job with other settings, and for
        results that cannot be read."""
        if isinstance(self.method, Checkout) and self.protocol not in CHECKOUTS_KNOW:
            raise UserError(
                f"{self.method.name}: a checkout runs in {', '.join(CHECKOUTS_KNOW)}, not in {self.protocol}"
            )
        for folder, _ in self.parts():
            if (folder / RESULTS).exists():
                read_results(folder / RESULTS)
        if self.settings.exists():
            was, now = self.settings.read_text(encoding="utf-8"), self.identity
            if was != now:
                was, now = (f"with settings '{opts}'" if opts else "without settings" for opts in (was, now))
                raise UserError(f"{self.settings.parent} was run {was}, not {now}; choose another --output")

    @property
    def failure(self) -> Path:
        return self.parts()[0][0] / "failed.txt"

    @property
    def said(self) -> Path:
        """The last line of its console, while it runs."""
        return self.parts()[0][0] / ".said"
