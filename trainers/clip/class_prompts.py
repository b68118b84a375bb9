"""Provide the prompts of classes: a template, an ensemble of templates, sentences, or a tuned context."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dfzsl.datasets.encoding import default_cache_dir
from dfzsl.io.class_names import normalize_class_name
from dfzsl.io.files import read_json
from dfzsl.io.tensors import load_tensors, save_tensors
from dfzsl.utils.errors import UserError

from .backbone import import_open_clip
from .learner import require_text_encoder
from .prompts import Prompts

ENSEMBLE, SENTENCES = "ensemble", "sentences"
# From this number of prompts on, their text features are cached on disk.
MIN_CACHED_PROMPTS = 512


@dataclass(frozen=True)
class ClassPrompts:
    """Prompts of classes; a class embedding is the L2-normalized mean of the text features of its prompts.

    With a tuned context the embedding is that of the class name in this context. Prompts of TEXT.PROMPTS then
    add their offset (`text_offset`) to it, and the sum is L2-normalized.

    Attributes:
        templates: prompts with one {} for the class name.
        sentences: {class name: its sentences}, which replace the templates; class names are compared without
            regard to case, and "_" equals a space.
        source: the template, "ensemble" or "sentences" of TEXT.PROMPTS; "" for the template of the data set.
        context: (M, w) tuned token embeddings that replace the words before the class name (FLPT), or None.
        context_init: words from which the context was tuned.

    Raises:
        UserError: a template does not have exactly one {}, or the context is not a matrix.
    """

    templates: tuple[str, ...] = ()
    sentences: Mapping[str, Sequence[str]] = field(default_factory=dict)
    source: str = ""
    context: Tensor | None = None
    context_init: str = ""

    def __post_init__(self) -> None:
        for template in self.templates:
            if re.findall("[{}]+", template) != ["{}"]:
                raise UserError(
                    f"prompt template '{template}' must contain {{}} exactly once, for the class name"
                )
        if self.context is not None and self.context.dim() != 2:
            raise UserError(f"a prompt context must have shape (M, w), got {tuple(self.context.shape)}")

    @classmethod
    def parse(cls, prompts: str, template: str = "a photo of a {}.") -> ClassPrompts:
        """Parse the value of TEXT.PROMPTS.

        Args:
            prompts: "" for `template`; "ensemble" for the 80 ImageNet templates of CLIP's authors, as
                open_clip ships them; a template with {}; or the path of a .json file with sentences of each
                class, {"class name": ["sentence", ...]}, the format of CuPL and ProText.
            template: prompt of the data set.

        Raises:
            UserError: the value is none of these, or the file cannot be read.
        """
        if not prompts:
            return cls((template,))
        if prompts == ENSEMBLE:
            import_open_clip()
            from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES as templates

            return cls(tuple(template("{}") for template in templates), source=ENSEMBLE)
        if prompts.endswith(".json"):
            return cls((), _read_sentences(prompts), SENTENCES)
        if "{" not in prompts:
            raise UserError(
                f"TEXT.PROMPTS '{prompts}': give a template with one {{}} for the class name, '{ENSEMBLE}', "
                'or a .json file of {"class name": ["sentence", ...]}'
            )
        return cls((prompts,), source=prompts)

    @property
    def description(self) -> str:
        """Short description for tables."""
        source = f"'{self.templates[0]}'" if len(self.templates) == 1 else self.source
        return f"{source}, in a tuned context" if self.context is not None else source

    def features(self, backbone: Any, classnames: Sequence[str]) -> Tensor:
        """Compute class embeddings.

        Args:
            backbone: frozen model, or features only (`FeatureBackbone`).
            classnames: C class names.

        Returns:
            (C, d) L2-normalized embeddings.

        Raises:
            UserError: a class has no sentence, the backbone has no text encoder, or the context was tuned on
                another backbone.
        """
        if self.context is None:
            return self.encode_plain(backbone, classnames)
        require_text_encoder(backbone)
        if self.context.shape[1] != backbone.text_tower.width:
            raise UserError(
                f"the prompt context of width {self.context.shape[1]} was not tuned on {backbone.name}"
            )
        prompts = Prompts(backbone, classnames, len(self.context))
        features = prompts.encode(self.context.to(backbone.device)[None])[0]
        offset = self.text_offset(backbone, classnames)
        return features if offset is None else F.normalize(features + offset, dim=1)

    def text_offset(self, backbone: Any, classnames: Sequence[str]) -> Tensor | None:
        """Compute the difference between the class embeddings and those of the initial context.

        Returns:
            (C, d) differences, or None if TEXT.PROMPTS is empty.
        """
        if not self.source:
            return None
        template = f"{self.context_init.replace('_', ' ') or 'a photo of a'} {{}}."
        return self.encode_plain(backbone, classnames) - backbone.class_features(classnames, [template])

    def encode_plain(self, backbone: Any, classnames: Sequence[str]) -> Tensor:
        """Compute class embeddings (C, d) without the context (arguments and errors: `features`)."""
        if not self.source:
            return backbone.class_features(classnames, self.templates)
        if not backbone.has_text_encoder:
            raise UserError("TEXT.PROMPTS needs a text encoder: set MODEL.BACKBONE.NAME")
        if self.source != SENTENCES:
            prompts = [
                [t.replace("{}", name.replace("_", " ")) for t in self.templates] for name in classnames
            ]
        else:
            if missing := [name for name in classnames if normalize_class_name(name) not in self.sentences]:
                more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
                raise UserError(
                    f"no sentence for the classes {', '.join(missing[:5])}{more}: give a .json file "
                    "(TEXT.PROMPTS, --text) with sentences for every class"
                )
            prompts = [list(self.sentences[normalize_class_name(name)]) for name in classnames]
        if sum(map(len, prompts)) < MIN_CACHED_PROMPTS:
            return backbone.mean_features(prompts)
        key = json.dumps([backbone.identity, backbone.precision, prompts]).encode()
        path = default_cache_dir() / "text" / f"{hashlib.sha256(key).hexdigest()[:32]}.safetensors"
        if not path.exists():
            save_tensors(path, {"features": backbone.mean_features(prompts)}, {"kind": "text features"})
        return load_tensors(path, "text features")[0]["features"].to(backbone.device)


def _read_sentences(path: str) -> dict[str, list[str]]:
    """Read {normalized class name: sentences} from a JSON file."""
    content = read_json(Path(path).expanduser())
    sentences: dict[str, list[str]] = {}
    for name, value in content.items() if isinstance(content, dict) else [("", None)]:
        texts = [value] if isinstance(value, str) else value
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(t, str) and t.strip() for t in texts)
        ):
            raise UserError(
                f'{path}: not a file of sentences; it must contain {{"class name": ["sentence", ...], ...}}'
            )
        sentences.setdefault(normalize_class_name(name), []).extend(texts)
    return sentences
