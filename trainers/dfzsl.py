"""The method: FLPT on virtual features (stages 1 and 2), then generated new features and one classifier.

Tang et al., Data-Free Generalized Zero-Shot Learning, AAAI 2024.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from dassl.engine import TRAINER_REGISTRY

from dfzsl.io.class_names import checked_names
from dfzsl.utils.dassl_plugin import add_keys, keys_of, register
from dfzsl.utils.errors import UserError
from dfzsl.utils.numerics import checked

from .flpt import FLPT
from .generation.classifier import Classifier
from .generation.generate import build_classifier
from .generation.training import StageThreeSettings

add_keys("TRAINER.DFZSL", FLPT=True, NEW_CLASSES=())
add_keys("GENERATOR", **keys_of(StageThreeSettings))

CLASSIFIER = "classifier.safetensors"


@register(TRAINER_REGISTRY)
class DFZSL(FLPT):
    """Data-free generalized zero-shot learning.

    Reads TEACHER.FILE, class names and nothing else of the training set. Writes virtual.safetensors
    (stage 1), prompt_learner/ (stage 2) and classifier.safetensors (stage 3: one for base and new).
    Without a text encoder, or with TRAINER.DFZSL.FLPT False, stage 2 is left out: text features stay CLIP's.
    """

    recipe = "dfzsl"
    needs_teacher = True

    def check_cfg(self, cfg) -> None:
        if not cfg.TEACHER.FILE:
            raise UserError(
                "DFZSL needs the owner's teacher: set TEACHER.FILE (train.py --trainer TeacherZeroshot)"
            )

    def build_model(self) -> None:
        self.classifier: Classifier | None = None
        self.tuned = self.cfg.TRAINER.DFZSL.FLPT and self.backbone.has_text_encoder
        if self.tuned:
            super().build_model()
        else:
            print(self.notes()[0])
            self.max_epoch = 0

    @property
    def trained_parameters(self) -> int:
        """Of the prompts and of the final classifier; the generator is thrown away."""
        rows = self.classifier.weight.numel() if self.classifier else 0
        return super().trained_parameters + rows

    def notes(self) -> list[str]:
        if self.tuned:
            return []
        if self.backbone.has_text_encoder:
            return ["FLPT left out (TRAINER.DFZSL.FLPT False)"]
        return ["FLPT left out (features without a text encoder)"]

    @property
    def new_classnames(self) -> list[str]:
        """The classes to add: TRAINER.DFZSL.NEW_CLASSES, else the new classes of the data set, if any."""
        new = [name for name in self.dm.dataset.new_classnames if name not in self.classnames]
        return list(self.cfg.TRAINER.DFZSL.NEW_CLASSES) or new

    @property
    def announced(self) -> list[str]:
        return list(self.cfg.TRAINER.DFZSL.NEW_CLASSES) or super().announced

    def before_train(self) -> None:
        checked_names(self.new_classnames, "the new classes", taken=self.classnames)
        super().before_train()

    @property
    def checkpoints(self) -> Path:
        """Where stage 3 keeps what it has trained, until the classifier is made."""
        return Path(self.output_dir) / "generator"

    @torch.no_grad()
    def after_train(self) -> None:
        started = time.perf_counter()
        path = Path(self.output_dir) / CLASSIFIER
        if path.exists():
            self.classifier = Classifier.load(path)
        else:
            self.classifier = self.generate()
            self.classifier.save(path)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        self.stage_seconds["generate"] = time.perf_counter() - started
        super().after_train()

    def text_rows(self, classnames: list[str]) -> torch.Tensor:
        """Unit text features (n, d), in the tuned context where there is one."""
        if not self.tuned:
            return self.text_of(classnames)
        self.set_model_mode("eval")
        rows = self.text_features(classnames).detach()
        return checked(rows, "stage 2 (FLPT)", "tuned text feature", classnames)

    @torch.enable_grad()
    def generate(self) -> Classifier:
        """Stage 3: train the generator on aligned virtual features, make new ones, fit one classifier."""
        base, new = self.classnames, self.new_classnames
        base_text = self.text_rows(base)
        new_text = self.text_rows(new) if new else base_text[:0]
        shift = self.shift().detach() if self.tuned else None
        assert self.virtual is not None, "stage 1 comes first"
        settings = {key.lower(): value for key, value in self.cfg.GENERATOR.items()}
        texts = self.tuned_texts(self.model.prompt_learner) if self.tuned else self.texts
        classifier = build_classifier(
            self.virtual,
            base_text,
            new_text,
            new_classnames=new,
            shift=shift,
            settings=StageThreeSettings(**settings),
            generator=self.stage_generator(),
            folder=self.checkpoints,
            backbone=self.backbone.name,
            weights=self.backbone.weights_id,
        )
        return replace(classifier, texts=texts)

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        """Load the classifier; `epoch` means nothing to it. Classes it does not know (another data set's) get
        their text features, in the tuned context where there is one."""
        classifier = Classifier.load(Path(directory) / CLASSIFIER)
        if strangers := [name for name in self.classnames if name not in classifier.classnames]:
            classifier = classifier.add(strangers, self.backbone, self.texts)
        self.classifier = classifier

    def model_inference(self, input: torch.Tensor) -> torch.Tensor:
        assert self.classifier is not None, "train or load first"
        return self.classifier.logits(self.backbone.encode_image(input), self.classnames)
