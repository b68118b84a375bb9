"""What is said of a class: one template, an ensemble of templates, sentences of its own, a tuned context."""

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
CACHED = 512  # texts from which on their features are kept on disk


@dataclass(frozen=True)
class ClassPrompts:
    """The texts of classes, whose normalised mean feature stands for the class.

    Attributes:
        templates: texts with one {} for the class's name.
        sentences: {class name: its sentences}, which go before the templates; names are compared without
            regard to case, _ being a space.
        spec: what made it: a template, "ensemble", "sentences", or "" for the data set's own template.
        context: (M, w) tuned tokens that stand before the name in place of the template (FLPT), or None;
            words: those that they were tuned from.

    Beside a context, texts that TEXT.PROMPTS gives say what they add to its first words: the feature is
    that in the context, plus the texts' less that of "words name.", normalised.
    """

    templates: tuple[str, ...] = ()
    sentences: Mapping[str, Sequence[str]] = field(default_factory=dict)
    spec: str = ""
    context: Tensor | None = None
    words: str = ""

    def __post_init__(self) -> None:
        for template in self.templates:
            if re.findall("[{}]+", template) != ["{}"]:
                raise UserError(f"'{template}' is no template: it needs one {{}} for the class name")
        if self.context is not None and self.context.dim() != 2:
            raise UserError(f"a context is a table of tokens, got shape {tuple(self.context.shape)}")

    @classmethod
    def parse(cls, prompts: str, template: str = "a photo of a {}.") -> ClassPrompts:
        """The texts that TEXT.PROMPTS asks for.

        "" stands for `template`; "ensemble" for the 80 templates that CLIP's authors published for ImageNet,
        as open_clip ships them; a text with {} for itself; and the path of a .json file for sentences of
        each class, {"name": ["sentence", ...]}, as CuPL and ProText publish them. Raises UserError.
        """
        if not prompts:
            return cls((template,))
        if prompts == ENSEMBLE:
            import_open_clip()
            from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES as templates

            return cls(tuple(template("{}") for template in templates), spec=ENSEMBLE)
        if prompts.endswith(".json"):
            return cls((), _sentences(prompts), SENTENCES)
        if "{" not in prompts:
            raise UserError(
                f"TEXT.PROMPTS '{prompts}': give a template with one {{}} for the class name, '{ENSEMBLE}', "
                'or a .json file of {"class name": ["sentence", ...]}'
            )
        return cls((prompts,), spec=prompts)

    @property
    def about(self) -> str:
        """In a word, for tables."""
        said = f"'{self.templates[0]}'" if len(self.templates) == 1 else self.spec
        return f"{said}, in a tuned context" if self.context is not None else said

    def features(self, backbone: Any, classnames: Sequence[str]) -> Tensor:
        """Unit text features (C, d). Raises UserError naming the classes that have no sentence."""
        if self.context is None:
            return self.plain(backbone, classnames)
        require_text_encoder(backbone)
        if self.context.shape[1] != backbone.text_tower.width:
            raise UserError(f"its context of width {self.context.shape[1]} was not tuned on {backbone.name}")
        prompts = Prompts(backbone, classnames, len(self.context))
        rows = prompts.encode(self.context.to(backbone.device)[None])[0]
        added = self.beside(backbone, classnames)
        return rows if added is None else F.normalize(rows + added, dim=1)

    def beside(self, backbone: Any, classnames: Sequence[str]) -> Tensor | None:
        """What the texts add (C, d) to the first words of the context; None where TEXT.PROMPTS is empty."""
        if not self.spec:
            return None
        first = f"{self.words.replace('_', ' ') or 'a photo of a'} {{}}."
        return self.plain(backbone, classnames) - backbone.class_features(classnames, [first])

    def plain(self, backbone: Any, classnames: Sequence[str]) -> Tensor:
        """`features` without the context."""
        if not self.spec:
            return backbone.class_features(classnames, self.templates)
        if not backbone.has_text_encoder:
            raise UserError("TEXT.PROMPTS needs a text encoder: name a backbone with MODEL.BACKBONE.NAME")
        if self.spec != SENTENCES:
            texts = [[t.replace("{}", name.replace("_", " ")) for t in self.templates] for name in classnames]
        else:
            if missing := [name for name in classnames if normalize_class_name(name) not in self.sentences]:
                more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
                raise UserError(
                    f"no sentence for the class {', '.join(missing[:5])}{more}: give a .json file "
                    "(TEXT.PROMPTS, --text) that names every class"
                )
            texts = [list(self.sentences[normalize_class_name(name)]) for name in classnames]
        if sum(map(len, texts)) < CACHED:
            return backbone.mean_features(texts)
        said = json.dumps([backbone.identity, backbone.precision, texts]).encode()
        kept = default_cache_dir() / "text" / f"{hashlib.sha256(said).hexdigest()[:32]}.safetensors"
        if not kept.exists():
            save_tensors(kept, {"features": backbone.mean_features(texts)}, {"kind": "text features"})
        return load_tensors(kept, "text features")[0]["features"].to(backbone.device)


def _sentences(path: str) -> dict[str, list[str]]:
    content = read_json(Path(path).expanduser())
    found: dict[str, list[str]] = {}
    for name, said in content.items() if isinstance(content, dict) else [("", None)]:
        texts = [said] if isinstance(said, str) else said
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(t, str) and t.strip() for t in texts)
        ):
            raise UserError(
                f'{path}: not a JSON of sentences: it must be {{"class name": ["sentence", ...], ...}}'
            )
        found.setdefault(normalize_class_name(name), []).extend(texts)
    return found
