"""How a backbone is found, fetched and read from files that are not to be trusted."""

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
# What the files of each are called; shapes-vit is the same text tower beside a vision transformer.
BUILT_INS = {BUILT_IN: "clip", "shapes-vit": "vit"}
BUILT_IN_FOLDER = Path(__file__).resolve().parents[2] / "datasets" / "shapes"
# What OpenAI's archives hold beside the weights; nobody else's do.
OPENAI_MARKS = ("input_resolution", "context_length", "vocab_size")


def load_backbone(
    name: str, weights: str = "openai", device: str | torch.device = "cpu", precision: str = "fp32"
) -> Backbone:
    """Load a frozen model.

    Args:
        name: open_clip's name, CoOp's spelling ("ViT-B/16") included, or "shapes" or "shapes-vit", the
            built-in small models.
        weights: open_clip's pretrained tag ("openai", ...), the path of a file (safetensors, a state dict,
            OpenAI's own archive), or "random": the same random weights every time. A built-in model
            brings its own and knows no tags.
        device, precision: where and how the encoders run; see `Backbone`.

    Raises UserError for an unknown name or tag, weights that cannot be fetched, and files that are broken
    or belong to another model.
    """
    backbone = _load_built_in(name, weights) if name in BUILT_INS else _load_open_clip(name, weights)
    backbone = backbone.to(device)
    backbone.use_precision(precision)
    return backbone


def identity(name: str, weights: str, fetch: bool = True) -> str:
    """`Backbone.identity` of what `load_backbone` would load, "features (features)" without a name. Reads no
    weights; fetches them and raises UserError as that does, unless nobody is to load them."""
    name = name.replace("/", "-")
    if not name:
        return "features (features)"
    if fetch or name in BUILT_INS:
        return f"{name} ({_locate(name, weights)[1]})"
    return f"{name} ({_file_id(Path(weights)) if os.path.isfile(weights) else weights})"


def parse_identity(identity: str) -> tuple[str, str]:
    """Return name and weights of a backbone from its `Backbone.identity`, as `load_backbone` takes them.

    Raises:
        UserError: the identity names no backbone.
    """
    match = re.fullmatch(r"(\S+) \((.+)\)", identity)
    if not match or match[1] == "features":
        raise UserError(
            f"the teacher does not say whose features it reads ({identity or 'no backbone'}): name the model "
            "with --backbone"
        )
    return match[1], "openai" if match[1] in BUILT_INS else match[2]


def offer_to_coop(name: str, weights: str) -> None:
    """Put the weights that `load_backbone` would load where `clip.load` in CoOp and its relatives looks
    for them, ~/.cache/clip/NAME.pt, so that they fetch nothing.

    Raises UserError for weights that cannot be fetched, and for others than OpenAI's: `clip.load` knows a
    file by its checksum and would put OpenAI's in its place.
    """
    name = name.replace("/", "-")
    path = _locate(name, weights)[0]
    url = import_open_clip().pretrained.get_pretrained_cfg(name, "openai").get("url", f"/{name}.pt")
    *_, checksum, file = url.split("/")
    place = Path("~/.cache/clip").expanduser() / file
    if path == place:
        return
    if path is None or (name != BUILT_IN and checksum != digest(path)):
        raise UserError(
            f"MODEL.BACKBONE.WEIGHTS {weights}: a checkout of CoOp's kind loads OpenAI's own file of {name} "
            "alone, and this is another; run the checkout without it, into another --output"
        )
    if not place.exists() or digest(place) != digest(path):
        with atomic(place) as temporary:
            shutil.copyfile(path, temporary)


def _locate(name: str, weights: str) -> tuple[Path | None, str, Mapping[str, Any] | None]:
    """The weights' file, fetched if need be (None: random ones), their id, what open_clip knows of a tag."""
    if name in BUILT_INS:
        if weights == "random":
            return None, weights, None
        # It has one set of weights: the configured default tag means that.
        path = (
            BUILT_IN_FOLDER / f"{BUILT_INS[name]}.safetensors" if weights in ("openai", "") else Path(weights)
        )
        return path, _file_id(path), None
    open_clip = import_open_clip()
    known = open_clip.list_models()
    if name not in known:
        lowered = {n.lower(): n for n in (*known, *BUILT_INS)}
        near = [lowered[n] for n in difflib.get_close_matches(name.lower(), lowered, n=4, cutoff=0.4)]
        raise UserError(
            f"unknown backbone '{name}'; nearest: {', '.join(near) or BUILT_IN}; all: open_clip.list_models()"
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
        f"no weights '{weights}' for {name}: neither a file nor a tag; known tags: {tags}; "
        "set MODEL.BACKBONE.WEIGHTS to one of them or to the path of a file"
    )


def _load_built_in(name: str, weights: str) -> Backbone:
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
    open_clip = import_open_clip()
    name = name.replace("/", "-")
    path, weights_id, tag = _locate(name, weights)
    state = _read_state(path) if path and path.suffix != ".npz" else {}
    # OpenAI trained with QuickGELU; a state dict does not tell, so ask its tag or its marks.
    quick_gelu = bool(tag and tag.get("quick_gelu")) or any(mark in state for mark in OPENAI_MARKS)
    model, dim = _new_model(name, quick_gelu=quick_gelu)
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


def _new_model(name: str, quick_gelu: bool = False) -> tuple[Any, int]:
    """Return a model with random weights, which neither depend on nor change the run's random state, and its
    feature dimension d."""
    open_clip = import_open_clip()
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        # Some configs ask for QuickGELU themselves, so a False must not overrule them.
        model = open_clip.create_model(name, pretrained=None, force_quick_gelu=quick_gelu)
    return model, open_clip.get_model_config(name)["embed_dim"]


def _download(name: str, tag: str, cfg: Mapping[str, Any]) -> Path:
    """The file of a pretrained tag: from the cache, else from the network.

    A direct address goes before the hub, because it ends up where CoOp keeps the file: ~/.cache/clip.
    """
    open_clip = import_open_clip()
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
                f"cannot fetch the weights '{tag}' of {name} ({first_line(error)}); download {source} where "
                "there is a network and give the file's path: MODEL.BACKBONE.WEIGHTS /path/to/file"
            ) from None


def _resolves(url: str) -> bool:
    try:
        socket.getaddrinfo(urlparse(url).hostname, None)
    except OSError:
        return False
    return True


def _read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, float32: safetensors, torch.save's or TorchScript. No code in it runs."""
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
    except Exception as error:  # pickle.UnpicklingError and whatever a broken pickle raises besides
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
    bad = next((k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()), None)
    if bad is not None:
        raise UserError(f"{path}: tensor '{bad}' has values that are not finite")
    return state


def _is_torchscript(path: Path) -> bool:
    """OpenAI's own files are TorchScript archives. Raises UserError for one that would run when loaded."""
    if not zipfile.is_zipfile(path):
        return False
    # torch's reader and parser have no bounds of their own. Weights are not compressed, and code is short.
    check_zip(path, floor=1 << 24)
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
    for name, folder in (("data.pkl", "data"), ("constants.pkl", "constants")):
        check_script(reader.get_record(name), lambda key, at=folder: len(reader.get_record(f"{at}/{key}")))
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
def quiet():
    """Keep a library's account of what it builds out of the run's log."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _file_id(path: Path) -> str:
    try:
        return digest(path)[:16]
    except FileNotFoundError:
        raise UserError(f"{path}: no such weights file") from None
