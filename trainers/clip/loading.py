"""Load backbones: resolve names and tags, download weights, read untrusted weights files."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
import shutil
import socket
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dfzsl.io.files import atomic, digest
from dfzsl.io.untrusted.archives import check_zip
from dfzsl.safe_pickle import check_script
from dfzsl.safe_pickle import load as load_checkpoint
from dfzsl.utils.errors import UserError

from .backbone import Backbone, first_line, import_open_clip

BUILT_IN = "shapes"
# Names of the files of each built-in backbone. shapes-vit has the same text tower and a vision transformer.
BUILT_INS = {BUILT_IN: "clip", "shapes-vit": "vit"}
BUILT_IN_FOLDER = Path(__file__).resolve().parents[2] / "datasets" / "shapes"
# Keys without weights that only OpenAI's archives have.
OPENAI_ONLY_KEYS = ("input_resolution", "context_length", "vocab_size")


def load_backbone(
    name: str, weights: str = "openai", device: str | torch.device = "cpu", precision: str = "fp32"
) -> Backbone:
    """Load a frozen model.

    Args:
        name: open_clip's name of the model, also in CoOp's spelling ("ViT-B/16"), or "shapes" or
            "shapes-vit", the small built-in models.
        weights: pretrained tag of open_clip ("openai", ...), the path of a file (safetensors, state dict or
            archive of OpenAI), or "random" for random weights with a fixed seed. A built-in model has one set
            of weights; the tag is then ignored.
        device: device of the encoders.
        precision: fp32, fp16, amp or bf16, see `Backbone.use_precision`.

    Raises:
        UserError: the name or tag is unknown, the weights cannot be downloaded, or the file is broken or
            belongs to another model.
    """
    backbone = _load_built_in(name, weights) if name in BUILT_INS else _load_open_clip(name, weights)
    backbone = backbone.to(device)
    backbone.use_precision(precision)
    return backbone


def identity(name: str, weights: str, fetch: bool = True) -> str:
    """Return the `Backbone.identity` that `load_backbone` would give, without loading the weights.

    Args:
        name: as in `load_backbone`; "" gives "features (features)".
        weights: as in `load_backbone`.
        fetch: whether to download the weights and to raise the errors of `load_backbone`.
    """
    name = name.replace("/", "-")
    if not name:
        return "features (features)"
    if fetch or name in BUILT_INS:
        return f"{name} ({_locate(name, weights)[1]})"
    return f"{name} ({_file_id(Path(weights)) if os.path.isfile(weights) else weights})"


def parse_identity(identity: str) -> tuple[str, str]:
    """Return the arguments `name` and `weights` of `load_backbone` from a `Backbone.identity`.

    Raises:
        UserError: the identity names no backbone.
    """
    match = re.fullmatch(r"(\S+) \((.+)\)", identity)
    if not match or match[1] == "features":
        raise UserError(f"the backbone of these features is unknown ('{identity}'): name it with --backbone")
    return match[1], "openai" if match[1] in BUILT_INS else match[2]


def copy_to_clip_cache(name: str, weights: str) -> None:
    """Copy weights to ~/.cache/clip/NAME.pt, where `clip.load` of CoOp and its forks looks for them.

    Args:
        name: as in `load_backbone`.
        weights: as in `load_backbone`.

    Raises:
        UserError: the weights cannot be downloaded, or are not those of OpenAI. `clip.load` verifies the
            checksum of the file and would replace others.
    """
    name = name.replace("/", "-")
    path = _locate(name, weights)[0]
    url = import_open_clip().pretrained.get_pretrained_cfg(name, "openai").get("url", f"/{name}.pt")
    *_, checksum, file = url.split("/")
    target = Path("~/.cache/clip").expanduser() / file
    if path == target:
        return
    if path is None or (name != BUILT_IN and checksum != digest(path)):
        raise UserError(
            f"MODEL.BACKBONE.WEIGHTS {weights}: CoOp and its forks load only OpenAI's weights of {name}; "
            "run the checkout without this setting, into another --output"
        )
    if not target.exists() or digest(target) != digest(path):
        with atomic(target) as temporary:
            shutil.copyfile(path, temporary)


def _locate(name: str, weights: str) -> tuple[Path | None, str, Mapping[str, Any] | None]:
    """Return the weights file (None: random weights), its id and open_clip's config of the tag."""
    if name in BUILT_INS:
        if weights == "random":
            return None, weights, None
        # A built-in model has one set of weights, which the default tag of the config stands for.
        path = (
            BUILT_IN_FOLDER / f"{BUILT_INS[name]}.safetensors" if weights in ("openai", "") else Path(weights)
        )
        return path, _file_id(path), None
    open_clip = import_open_clip()
    names = open_clip.list_models()
    if name not in names:
        lowered = {n.lower(): n for n in (*names, *BUILT_INS)}
        matches = [lowered[n] for n in difflib.get_close_matches(name.lower(), lowered, n=4, cutoff=0.4)]
        raise UserError(
            f"unknown backbone '{name}'; similar names: {', '.join(matches) or BUILT_IN}; "
            "open_clip.list_models() lists all"
        )
    tag = open_clip.pretrained.get_pretrained_cfg(name, weights)
    if os.path.isfile(weights):
        return Path(weights), _file_id(Path(weights)), tag
    if tag:
        return _download(name, weights, tag), weights, tag
    if weights == "random":
        return None, weights, None
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
    raise UserError(
        f"MODEL.BACKBONE.WEIGHTS '{weights}' is neither a file nor a tag of {name}; tags: {tags}; "
        "set it to one of them or to the path of a file"
    )


def _load_built_in(name: str, weights: str) -> Backbone:
    """Load a built-in backbone."""
    open_clip = import_open_clip()
    stem = BUILT_INS[name]
    open_clip.add_model_config(BUILT_IN_FOLDER / f"{stem}.json")
    path, weights_id, _ = _locate(name, weights)
    model, dim = _new_model(stem)
    if path:
        _load_state(model, _read_state(path), path)
    length = model.context_length
    return Backbone(model, name, weights_id, dim, lambda: open_clip.SimpleTokenizer(context_length=length))


def _load_open_clip(name: str, weights: str) -> Backbone:
    """Load a backbone of open_clip."""
    open_clip = import_open_clip()
    name = name.replace("/", "-")
    path, weights_id, tag = _locate(name, weights)
    state = _read_state(path) if path and path.suffix != ".npz" else {}
    # OpenAI's models use QuickGELU. A state dict does not record the activation, but the tag does, and only
    # OpenAI's archives have the extra keys.
    quick_gelu = bool(tag and tag.get("quick_gelu")) or any(key in state for key in OPENAI_ONLY_KEYS)
    model, dim = _new_model(name, quick_gelu=quick_gelu)
    if path and state:
        _load_state(model, {k: v for k, v in state.items() if k not in OPENAI_ONLY_KEYS}, path)
    elif path:
        # NumPy archives of big_vision (SigLIP)
        with _raise_mismatch(path):
            open_clip.load_checkpoint(model, str(path))
    if tag:
        fields = ("mean", "std", "interpolation", "resize_mode")
        preprocess = {**open_clip.get_model_preprocess_cfg(model), **{k: tag[k] for k in fields if k in tag}}
        open_clip.set_model_preprocess_cfg(model, preprocess)
    return Backbone(model, name, weights_id, dim, lambda: open_clip.get_tokenizer(name))


def _new_model(name: str, quick_gelu: bool = False) -> tuple[Any, int]:
    """Return a model with random weights of a fixed seed, and its feature dimension d.

    The global random state does not change.
    """
    open_clip = import_open_clip()
    with torch.random.fork_rng(devices=[]), logging_disabled():
        torch.manual_seed(0)
        # False does not disable QuickGELU where the model config enables it.
        model = open_clip.create_model(name, pretrained=None, force_quick_gelu=quick_gelu)
    return model, open_clip.get_model_config(name)["embed_dim"]


def _download(name: str, tag: str, cfg: Mapping[str, Any]) -> Path:
    """Return the weights file of a pretrained tag, from the cache or downloaded.

    A URL is preferred to the Hugging Face hub: its file is cached in ~/.cache/clip, as by CoOp.
    """
    open_clip = import_open_clip()
    import huggingface_hub.constants as hub

    with contextlib.ExitStack() as stack:
        if not _resolves(hub.ENDPOINT):
            # Otherwise the client of the hub retries for most of a minute.
            previous, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True
            stack.callback(setattr, hub, "HF_HUB_OFFLINE", previous)
        try:
            return Path(open_clip.download_pretrained(dict(cfg), prefer_hf_hub=False))
        except Exception as error:
            source = cfg.get("url") or cfg.get("hf_hub", "").rstrip("/")
            raise UserError(
                f"cannot fetch the weights '{tag}' of {name} ({first_line(error)}); download {source} on "
                "a machine with network access and give the path: MODEL.BACKBONE.WEIGHTS /path/to/file"
            ) from None


def _resolves(url: str) -> bool:
    """Return whether DNS knows the host of `url`."""
    try:
        socket.getaddrinfo(urlparse(url).hostname, None)
    except OSError:
        return False
    return True


def _read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict in float32 (safetensors, torch.save or TorchScript), without running code in it."""
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        elif _is_torchscript(path):
            state = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            state = load_checkpoint(path)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such weights file") from None
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a readable weights file ({first_line(error)})") from None
    # A broken pickle may raise any error, not only pickle.UnpicklingError.
    except Exception as error:
        raise UserError(f"{path}: not a plain weights file ({first_line(error)})") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if (
        not isinstance(state, Mapping)
        or not state
        or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())
    ):
        raise UserError(f"{path}: not a state dict of tensors")
    state = {
        key.removeprefix("module."): v.float() if v.is_floating_point() else v for key, v in state.items()
    }
    invalid = next(
        (k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()), None
    )
    if invalid is not None:
        raise UserError(f"{path}: tensor '{invalid}' has values that are not finite")
    return state


def _is_torchscript(path: Path) -> bool:
    """Return whether a file is a TorchScript archive, as OpenAI's are.

    Raises:
        UserError: loading the archive would run code of it.
    """
    if not zipfile.is_zipfile(path):
        return False
    # The reader of torch does not limit the unpacked size. Weights are not compressed, and code is short.
    check_zip(path, floor=1 << 24)
    # This is the reader of torch.jit.load. Another one might find other records under the same names.
    reader = torch._C.PyTorchFileReader(str(path))
    records = reader.get_all_records()
    if "constants.pkl" not in records:
        return False
    for name in records:
        if name.startswith("code/") and b"__setstate__" in reader.get_record(name):
            raise UserError(
                f"{path}: contains code that runs when the file is loaded; only plain weights are read"
            )
    # C++ classes run their own code when they are unpacked.
    if b"__torch__.torch.classes" in reader.get_record("data.pkl") + reader.get_record("constants.pkl"):
        raise UserError(f"{path}: contains objects other than tensors; only plain weights are read")
    for name, folder in (("data.pkl", "data"), ("constants.pkl", "constants")):
        check_script(
            reader.get_record(name), lambda key, folder=folder: len(reader.get_record(f"{folder}/{key}"))
        )
    return True


def _load_state(model: Any, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict of open_clip or OpenAI into a model; its token embedding may be sparse."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    if "token_embedding.ids" in state:
        # Only the embeddings of tokens that occur in training are stored; the others are zero.
        ids, rows = state.pop("token_embedding.ids").long(), state.pop("token_embedding.rows")
        table = torch.zeros_like(model.get_parameter("token_embedding.weight"))
        if rows.shape != (len(ids), table.shape[1]) or ids.min() < 0 or ids.max() >= len(table):
            raise UserError(f"{path}: the sparse token embedding does not match the model")
        table[ids] = rows
        state["token_embedding.weight"] = table
    with _raise_mismatch(path):
        state = convert_state_dict(model, state)
        if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
            state = convert_to_custom_text_state_dict(state)
        if "logit_scale" in state:
            state["logit_scale"] = state["logit_scale"].reshape(model.logit_scale.shape)
        model.load_state_dict(state)


@contextlib.contextmanager
def _raise_mismatch(path: Path):
    """Raise UserError for any error of open_clip on the weights of another model."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = lines[min(1, len(lines) - 1)][:200] if lines else type(error).__name__
        raise UserError(f"{path}: these weights are not of this model ({detail})") from None


@contextlib.contextmanager
def logging_disabled():
    """Disable logging up to level WARNING, for libraries that log what they build.

    The root logger's handlers are restored: open_clip logs through it, which adds one.
    """
    level, handlers = logging.root.manager.disable, list(logging.root.handlers)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
        logging.root.handlers[:] = handlers


def _file_id(path: Path) -> str:
    """Return the first 16 hex digits of the SHA-256 of a weights file."""
    try:
        return digest(path)[:16]
    except FileNotFoundError:
        raise UserError(f"{path}: no such weights file") from None
