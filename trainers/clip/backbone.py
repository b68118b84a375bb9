"""The frozen vision-language model of a run. The only file that knows open_clip."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import logging
import os
import socket
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from dfzsl.errors import UserError
from dfzsl.files import bounded

BUILT_IN = "shapes"
BUILT_IN_FOLDER = Path(__file__).resolve().parents[2] / "datasets" / "shapes"
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "amp": torch.float16, "bf16": torch.bfloat16}
# What OpenAI's archives hold beside the weights; nobody else's do.
OPENAI_MARKS = ("input_resolution", "context_length", "vocab_size")
TEXTS_AT_ONCE = 256
ROWS_AT_ONCE = 8192

log = logging.getLogger(__name__)


def _open_clip() -> Any:
    """open_clip, imported at first use: it takes seconds."""
    from dfzsl.torchvision_guard import import_torchvision

    import_torchvision()
    import open_clip

    return open_clip


class TextTower:
    """One view of every text transformer open_clip builds, whether inside CLIP or as a tower of its own.

    Attributes:
        blocks: the residual attention blocks, in order.
        width, context_length: w and L, the width of a token and the number of positions.
        positions: (L, w) positional embedding.
        causal: a token sees itself and what stands before it.
        cacheable: causal, pooled at EOT and of standard attention blocks, so that positions which many
            prompts share need to be computed once.
    """

    def __init__(self, module: Any) -> None:
        self._transformer: nn.Module = module.transformer
        self._embedding: nn.Embedding = module.token_embedding
        self._norm: nn.Module = module.ln_final
        self._projection = module.text_projection
        self._module = module
        inside = hasattr(module, "text_pool_type")  # a CLIP carries its text tower's parts itself
        self._pool: str = module.text_pool_type if inside else module.pool_type
        self._eos: int = module.text_eos_id if inside else module.eos_id
        self._class_token = getattr(module, "cls_emb", None)
        self.blocks = list(module.transformer.resblocks)
        self.positions: Tensor = module.positional_embedding
        self.context_length: int = module.context_length
        self.width: int = self.positions.shape[1]
        self.causal = module.attn_mask is not None
        self._cut = self.causal and self._pool in ("argmax", "eos") and self._class_token is None
        self.cacheable = self._cut and all(isinstance(b.attn, nn.MultiheadAttention) for b in self.blocks)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings (..., w) of token ids (...), without positions."""
        return self._embedding(ids)

    def pooled_position(self, ids: Tensor) -> Tensor:
        """The position (N,) whose output stands for the text, for token ids (N, L)."""
        if self._pool == "argmax":
            return ids.argmax(dim=-1)
        if self._pool == "eos":
            return (ids == self._eos).int().argmax(dim=-1)
        return ids.new_full((len(ids),), 0 if self._pool == "first" else ids.shape[1] - 1)

    def run(self, x: Tensor, ids: Tensor) -> Tensor:
        """The plain way: every position of every text, cut at the last EOT where the tower is causal.

        Args:
            x: (N, L, w) embeddings without positions.  ids: (N, L) their ids, for the position of EOT.
        Returns:
            (N, w) the pooled outputs of the last block.
        """
        at = self.pooled_position(ids)
        if self._cut:
            x = x[:, : int(at.max()) + 1]
        length = x.shape[1]
        mask = self._module.attn_mask
        if self._class_token is not None:
            # CoCa: a class token at the end, which alone is pooled and must not see the padding.
            x = torch.cat([x, self._class_token.expand(len(x), 1, -1)], dim=1)
            at, length = at.new_full(at.shape, length), length + 1
            padding = self._module._build_additive_mask(ids, length, x.dtype)
            mask = padding if mask is None else mask[:length, :length] + padding
        elif mask is not None:
            mask = mask[:length, :length]
        x = self._transformer(x + self.positions[:length], attn_mask=mask)
        return x[torch.arange(len(x), device=x.device), at]

    def project(self, x: Tensor) -> Tensor:
        """Final norm and projection: (..., w) outputs of the last block to (..., d) text features."""
        x = self._norm(x)
        if self._projection is None:
            return x
        return self._projection(x) if isinstance(self._projection, nn.Linear) else x @ self._projection


class Backbone(nn.Module):
    """A frozen CLIP-like model: unit image and text features of the same dimension.

    Attributes:
        name: open_clip's name of the model.  weights_id: tag, or sha256 prefix of the weights file.
        dim: d.  logit_scale: exp of the learned scale, the inverse softmax temperature.
        preprocess_cfg: size (h, w), mean, std, interpolation, resize_mode of its pictures.
        identity: what features made with it are marked with.
        precision: fp32, fp16, amp or bf16; set it with `use_precision`.
        compiled: learn prompts through compiled layers.
        rows_at_once: tokens of prompts whose activations are kept for the backward pass (0.4 MB each in the
            text tower of ViT-B/16); where there are more, they are recomputed in chunks of so many.
    """

    has_text_encoder = True

    def __init__(
        self, model: Any, name: str, weights_id: str, dim: int, tokenizer: Callable[[], Any]
    ) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self.name = name
        self.weights_id = weights_id
        self.dim = dim
        self.precision = "fp32"
        self.compiled = False
        self.rows_at_once = ROWS_AT_ONCE
        self.context_length: int = model.context_length
        self.logit_scale = float(model.logit_scale.exp())
        self._make_tokenizer = tokenizer
        cfg = _open_clip().get_model_preprocess_cfg(model)
        size = cfg["size"]
        self.preprocess_cfg = {**cfg, "size": (size, size) if isinstance(size, int) else tuple(size)}

    def train(self, mode: bool = True) -> Backbone:
        return super().train(False)  # frozen: batch norm statistics and dropout never wake up

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def text_tower(self) -> TextTower:
        """Raises UserError for a tower of another library: only open_clip's own takes context tokens."""
        module = getattr(self.model, "text", self.model)
        if not hasattr(module, "token_embedding"):
            raise UserError(f"the text tower of {self.name} is not open_clip's own: choose another backbone")
        return TextTower(module)

    @property
    def transform(self) -> Callable:
        """open_clip's test transform: a PIL image to (3, h, w)."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        return image_transform_v2(PreprocessCfg(**self.preprocess_cfg), is_train=False)

    @cached_property
    def tokenizer(self) -> Callable[..., Tensor]:
        try:
            return self._make_tokenizer()
        except (ImportError, OSError) as error:
            raise UserError(f"the tokenizer of {self.name} cannot be loaded: {_first_line(error)}") from None

    def tokenize(self, texts: Sequence[str], room: int = 0, kind: str = "text") -> Tensor:
        """Token ids (n, L - room) of n texts in a tower of L positions, `room` of which stay free.

        Raises UserError naming the first text that does not fit; open_clip would cut it silently.
        """
        length = self.context_length - room
        ids = self.tokenizer(list(texts), context_length=length)
        # What fits has, with one position more, one padding token more and is else the same.
        longer = self.tokenizer(list(texts), context_length=length + 1)
        columns = torch.arange(length + 1)
        padding = torch.where(longer == self.pad_id, columns, -1).amax(dim=1, keepdim=True)
        shorter = longer.gather(1, columns[:-1] + (columns[:-1] >= padding).long())
        fits = (shorter == ids).all(dim=1) & (padding[:, 0] >= 0)
        if not bool(fits.all()):
            text = texts[int((~fits).nonzero()[0])]
            raise UserError(
                f"{kind} '{text}' needs more than the {length} tokens {self.name} has for it: shorten it"
            )
        return ids.to(self.device)

    @cached_property
    def pad_id(self) -> int:
        """The id that fills up a text: the commonest in one that is nearly all padding."""
        return int(self.tokenizer(["a"], context_length=self.context_length)[0].mode().values)

    @property
    def identity(self) -> str:
        return f"{self.name}@{self.weights_id}"

    def use_precision(self, precision: str) -> None:
        """Run the encoders in float32 or, on a GPU, under autocast; fp16 and amp are the same, bf16 wider.

        Weights stay float32. Raises UserError for a precision that is unknown; a CPU runs all in fp32.
        """
        if precision not in PRECISIONS:
            raise UserError(f"unknown precision '{precision}'; known: {', '.join(PRECISIONS)}")
        if precision != "fp32" and self.device.type == "cpu":
            print(f"Precision {precision} needs a GPU: running in fp32")
            precision = "fp32"
        self.precision = precision

    def autocast(self) -> contextlib.AbstractContextManager:
        """Autocast to `precision`; none for fp32."""
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    @torch.no_grad()
    def encode_image(self, x: Tensor) -> Tensor:
        """Unit image features (n, d) of pictures (n, 3, h, w); features (n, d) pass unchanged."""
        if x.ndim == 2:
            if x.shape[1] != self.dim:
                raise UserError(
                    f"features have {x.shape[1]} dimensions, {self.name} has {self.dim}: other backbone?"
                )
            return x
        with self.autocast():
            features = self.model.encode_image(x)
        return F.normalize(features.float(), dim=-1)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit text features (n, d) of n texts. Raises UserError for a text that is too long."""
        tower = self.text_tower
        with self.autocast():
            rows = [
                tower.project(tower.run(tower.embed(ids), ids)).float()
                for ids in self.tokenize(texts).split(TEXTS_AT_ONCE)
            ]
        return F.normalize(torch.cat(rows), dim=-1)

    def class_features(self, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Unit text features (C, d) of classes: the normalised mean over prompts like "a photo of a {}."."""
        names = [name.replace("_", " ") for name in classnames]
        mean = torch.stack([self.encode_text([t.format(name) for name in names]) for t in templates]).mean(0)
        return F.normalize(mean, dim=-1)


class FeatureBackbone(nn.Module):
    """Stands for a model where only its features are at hand: images are unit rows, classes a table.

    Args:
        dim: d.  text_features: (d,) unit text feature of each class name.
        logit_scale: inverse softmax temperature; 100 is CLIP's.
    """

    has_text_encoder = False
    name = ""

    def __init__(
        self, dim: int, text_features: Mapping[str, Tensor] | None, logit_scale: float = 100.0
    ) -> None:
        super().__init__()
        self.dim = dim
        self.logit_scale = logit_scale
        self.weights_id = "features"
        self._text = dict(text_features or {})

    @property
    def identity(self) -> str:
        return self.weights_id

    def encode_image(self, x: Tensor) -> Tensor:
        """Features (n, d), unchanged. Raises UserError for pictures and for another dimension."""
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise UserError(
                f"expected features of {self.dim} dimensions, got a batch of shape {tuple(x.shape)}; "
                "name a backbone with MODEL.BACKBONE.NAME to encode pictures"
            )
        return x

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        raise UserError("no text encoder: features only; name a backbone with MODEL.BACKBONE.NAME")

    def class_features(self, classnames: Sequence[str], templates: Sequence[str] = ()) -> Tensor:
        """Unit text features (C, d) from the table. Raises UserError naming a class that it does not hold."""
        missing = [name for name in classnames if name not in self._text]
        if missing:
            raise UserError(
                f"the features hold no text row for class '{missing[0]}', and there is no text encoder"
            )
        return F.normalize(torch.stack([self._text[name].float() for name in classnames]), dim=-1)


def load_backbone(
    name: str, weights: str = "openai", device: str | torch.device = "cpu", precision: str = "fp32"
) -> Backbone:
    """Load a frozen model.

    Args:
        name: open_clip's name, CoOp's spelling ("ViT-B/16") included, or "shapes", the built-in small model.
        weights: open_clip's pretrained tag ("openai", ...), the path of a file (safetensors, a state dict,
            OpenAI's own archive), or "random": the same random weights every time. The built-in model
            brings its own and knows no tags.
        device, precision: where and how the encoders run; see `Backbone`.

    Raises UserError for an unknown name or tag, weights that cannot be fetched, and files that are broken
    or belong to another model.
    """
    backbone = _load_built_in(weights or "openai") if name == BUILT_IN else _load_open_clip(name, weights)
    backbone = backbone.to(device)
    backbone.use_precision(precision)
    return backbone


def _load_built_in(weights: str) -> Backbone:
    open_clip = _open_clip()
    open_clip.add_model_config(BUILT_IN_FOLDER / "clip.json")
    model, dim = _random_model("clip")
    if weights == "random":
        weights_id = weights
    else:
        # It has one set of weights: the configured default tag means that.
        path = BUILT_IN_FOLDER / "clip.safetensors" if weights == "openai" else Path(weights)
        _load_state(model, _read_state(path), path)
        weights_id = _file_id(path)
    length = model.context_length
    return Backbone(
        model, BUILT_IN, weights_id, dim, lambda: open_clip.SimpleTokenizer(context_length=length)
    )


def _load_open_clip(name: str, weights: str) -> Backbone:
    open_clip = _open_clip()
    name = name.replace("/", "-")
    known = open_clip.list_models()
    if name not in known:
        lowered = {n.lower(): n for n in (*known, BUILT_IN)}
        near = [lowered[n] for n in difflib.get_close_matches(name.lower(), lowered, n=4, cutoff=0.4)]
        raise UserError(
            f"unknown backbone '{name}'; nearest: {', '.join(near) or BUILT_IN}; all: open_clip.list_models()"
        )

    def tokenizer() -> Any:
        return open_clip.get_tokenizer(name)

    tag = open_clip.pretrained.get_pretrained_cfg(name, weights)
    path: Path | None = None
    if os.path.isfile(weights):
        path, weights_id = Path(weights), _file_id(Path(weights))
    elif tag:
        path, weights_id = _download(name, weights, tag), weights
    elif weights == "random":
        weights_id = weights
    else:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(
            f"no weights '{weights}' for {name}: neither a file nor a tag; known tags: {tags}; "
            "set MODEL.BACKBONE.WEIGHTS to one of them or to the path of a file"
        )
    state = _read_state(path) if path and path.suffix != ".npz" else {}
    # OpenAI trained with QuickGELU; a state dict does not tell, so ask its tag or its marks.
    quick_gelu = bool(tag and tag.get("quick_gelu")) or any(mark in state for mark in OPENAI_MARKS)
    model, dim = _random_model(name, quick_gelu)
    if path and state:
        _load_state(model, {k: v for k, v in state.items() if k not in OPENAI_MARKS}, path)
    elif path:
        with _broken(path):  # the NumPy archives of big_vision (SigLIP)
            open_clip.load_checkpoint(model, str(path))
    if tag:
        fields = ("mean", "std", "interpolation", "resize_mode")
        preprocess = {**open_clip.get_model_preprocess_cfg(model), **{k: tag[k] for k in fields if k in tag}}
        open_clip.set_model_preprocess_cfg(model, preprocess)
    return Backbone(model, name, weights_id, dim, lambda: open_clip.get_tokenizer(name))


def _random_model(name: str, quick_gelu: bool = False) -> tuple[Any, int]:
    """The model and its d; its random weights neither depend on nor disturb the run's random stream."""
    open_clip = _open_clip()
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(0)
        # Some configs ask for QuickGELU themselves, so a False must not overrule them.
        model = open_clip.create_model(name, pretrained=None, force_quick_gelu=quick_gelu)
    return model, open_clip.get_model_config(name)["embed_dim"]


def _download(name: str, tag: str, cfg: Mapping[str, Any]) -> Path:
    """The file of a pretrained tag: from the cache, else from the network.

    A direct address goes before the hub, because it ends up where CoOp keeps the file: ~/.cache/clip.
    """
    open_clip = _open_clip()
    import huggingface_hub.constants as hub

    with contextlib.ExitStack() as stack:
        if not _resolves(hub.ENDPOINT):
            # Without this the hub's client tries again and again, for most of a minute.
            was, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True
            stack.callback(setattr, hub, "HF_HUB_OFFLINE", was)
        try:
            return Path(open_clip.download_pretrained(dict(cfg), prefer_hf_hub=False))
        except Exception as error:
            source = cfg.get("url") or cfg.get("hf_hub", "").rstrip("/")
            raise UserError(
                f"cannot fetch the weights '{tag}' of {name} ({_first_line(error)}); download {source} where "
                "there is a network and give the file's path: MODEL.BACKBONE.WEIGHTS /path/to/file"
            ) from None


def _resolves(url: str) -> bool:
    try:
        socket.getaddrinfo(urlparse(url).hostname, None)
    except OSError:
        return False
    return True


def _read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, float32. No pickled code runs: safetensors, `weights_only` or TorchScript."""
    state: Any
    try:
        with bounded(path):
            if path.suffix == ".safetensors":
                state = load_file(path)
            elif _is_torchscript(path):
                state = torch.jit.load(path, map_location="cpu").state_dict()
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such weights file") from None
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a readable weights file ({_first_line(error)})") from None
    except Exception as error:  # pickle.UnpicklingError and whatever a broken pickle raises besides
        raise UserError(f"{path}: not a plain weights file ({_first_line(error)})") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path}: not a state dict of tensors")
    state = {
        key.removeprefix("module."): v.float() if v.is_floating_point() else v for key, v in state.items()
    }
    bad = next((k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()), None)
    if bad is not None:
        raise UserError(f"{path}: tensor '{bad}' has values that are not finite")
    return state


def _is_torchscript(path: Path) -> bool:
    """OpenAI's own files are TorchScript archives. Raises UserError for one that would run when loaded."""
    if not zipfile.is_zipfile(path):
        return False
    # The reader that torch.jit.load has: another one might find other records under the same names.
    reader = torch._C.PyTorchFileReader(str(path))
    records = reader.get_all_records()
    if "constants.pkl" not in records:
        return False
    for name in records:
        if name.startswith("code/") and b"__setstate__" in reader.get_record(name):
            raise UserError(f"{path}: a program that runs when it is loaded, not plain weights")
    # Objects of C++ classes, which unpack themselves.
    if b"__torch__.torch.classes" in reader.get_record("data.pkl") + reader.get_record("constants.pkl"):
        raise UserError(f"{path}: it holds objects that are no plain weights")
    return True


def _load_state(model: Any, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict of open_clip or OpenAI into a model, the token embedding sparse or whole."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    if "token_embedding.ids" in state:
        # Rows of the tokens that training met; the others never matter and are zero.
        ids, rows = state.pop("token_embedding.ids").long(), state.pop("token_embedding.rows")
        table = torch.zeros_like(model.get_parameter("token_embedding.weight"))
        if rows.shape != (len(ids), table.shape[1]) or ids.min() < 0 or ids.max() >= len(table):
            raise UserError(f"{path}: its sparse token embedding does not fit the model")
        table[ids] = rows
        state["token_embedding.weight"] = table
    with _broken(path):
        state = convert_state_dict(model, state)
        if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
            state = convert_to_custom_text_state_dict(state)
        if "logit_scale" in state:
            state["logit_scale"] = state["logit_scale"].reshape(model.logit_scale.shape)
        model.load_state_dict(state)


@contextlib.contextmanager
def _broken(path: Path):
    """Turn whatever a wrong file makes open_clip raise into one line."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = lines[min(1, len(lines) - 1)][:200] if lines else type(error).__name__
        raise UserError(f"{path}: these weights do not belong to this model ({detail})") from None


@contextlib.contextmanager
def _quiet():
    """Keep open_clip's account of what it builds out of the run's log."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _file_id(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        raise UserError(f"{path}: no such weights file") from None
    return digest.hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
