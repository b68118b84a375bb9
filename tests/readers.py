"""Every reader of what comes from outside, with one valid file of each kind: what is fuzzed.

A kind is a function of a folder that writes its file there and returns (path, reader). Readers end well, or
in an error that `dfzsl.errors.explain` puts into one line.
"""

from __future__ import annotations

import json
import multiprocessing
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_data
import numpy as np
import torch
from conftest import ROOT, peak_memory
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from dassl.utils import load_checkpoint
from PIL import Image

from dfzsl import errors, report, train
from dfzsl.datasets import encoding
from dfzsl.datasets.base import read_fewshot, read_split
from dfzsl.files import save_tensors
from dfzsl.prepare import fetch
from dfzsl.trainers.clip.loading import _read_state
from dfzsl.trainers.generation.classifier import Classifier
from dfzsl.trainers.recovery.teacher import Teacher
from dfzsl.trainers.recovery.virtual import VirtualClasses

NAMES = ["ant", "bee", "cat"]


def build(name: str, root: Path, **keys: object) -> Any:
    cfg = get_cfg_default()
    cfg.merge_from_list(["DATASET.NAME", name, "DATASET.ROOT", str(root)])
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return DATASET_REGISTRY.get(name)(cfg)


def teacher(folder: Path) -> tuple[Path, Callable]:
    Teacher(torch.randn(3, 8), NAMES, "b").save(folder / "t.safetensors")
    return folder / "t.safetensors", lambda path: (t := Teacher.load(path)).logits(
        torch.ones(2, t.weight.shape[1])
    )


def virtual(folder: Path) -> tuple[Path, Callable]:
    mu = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    VirtualClasses(mu, torch.full((3,), 50.0), NAMES, mu).save(folder / "v.safetensors")
    return folder / "v.safetensors", lambda path: VirtualClasses.load(path).sample(2)


def classifier(folder: Path) -> tuple[Path, Callable]:
    flags = torch.tensor([False, False, True])
    Classifier(torch.eye(3, 8), NAMES, flags, torch.zeros(3), shift=torch.zeros(8)).save(
        folder / "c.safetensors"
    )
    return folder / "c.safetensors", lambda path: (c := Classifier.load(path)).logits(
        torch.ones(2, c.weight.shape[1])
    )


def cached_features(folder: Path) -> tuple[Path, Callable]:
    path = folder / "f.safetensors"
    save_tensors(path, {"features": torch.randn(4, 8)}, {"kind": "image features"})
    return path, lambda path: encoding._part(path, "image features", (4, 8))


def checkpoint(folder: Path) -> tuple[Path, Callable]:
    state = {"state_dict": {"ctx": torch.randn(2, 3)}, "epoch": 1, "optimizer": None, "scheduler": None}
    torch.save(state, folder / "model.pth.tar-1")
    return folder / "model.pth.tar-1", lambda path: load_checkpoint(str(path))


def weights(folder: Path) -> tuple[Path, Callable]:
    torch.save({"visual": torch.randn(2, 3)}, folder / "w.pt")
    return folder / "w.pt", _read_state


def feature_npz(folder: Path) -> tuple[Path, Callable]:
    path = fake_data.make("Features", folder)
    return path, lambda path: build("Features", path)


def feature_safetensors(folder: Path) -> tuple[Path, Callable]:
    arrays = dict(np.load(fake_data.make("Features", folder)))
    names = arrays.pop("classnames").tolist()
    path = folder / "features.safetensors"
    save_tensors(path, {name: torch.from_numpy(a) for name, a in arrays.items()}, {"classnames": names})
    return path, lambda path: build("Features", path)


def mat_splits(folder: Path) -> tuple[Path, Callable]:
    fake_data.make("AWA2", folder)
    return folder / "AWA2/clip_splits.mat", lambda path: build("AWA2", folder, DATASET__FEATURES="ViTB16.mat")


def mat_features(folder: Path) -> tuple[Path, Callable]:
    fake_data.make("AWA2", folder)
    return folder / "AWA2/ViTB16.mat", lambda path: build("AWA2", folder, DATASET__FEATURES="ViTB16.mat")


def mat_files(folder: Path) -> tuple[Path, Callable]:
    fake_data.make("AWA2", folder)
    return folder / "AWA2/res101.mat", lambda path: build("AWA2", folder)


def few_shots(folder: Path) -> tuple[Path, Callable]:
    from dassl.data.datasets import Datum

    (folder / "a.jpg").touch()
    items = [Datum(str(folder / "a.jpg"), 1, 0, "bee")]
    (folder / "shot_1-seed_1.pkl").write_bytes(pickle.dumps({"train": items, "val": items}))
    return folder / "shot_1-seed_1.pkl", read_fewshot


def split_json(folder: Path) -> tuple[Path, Callable]:
    rows = [[f"{name}/1.jpg", label, name] for label, name in enumerate(NAMES)]
    (folder / "split.json").write_text(json.dumps({"train": rows, "val": rows, "test": rows}))
    return folder / "split.json", lambda path: read_split(path, str(folder), "get it")


def csv_table(folder: Path) -> tuple[Path, Callable]:
    return fake_data.make("Csv", folder), lambda path: build("Csv", path)


def class_names(folder: Path) -> tuple[Path, Callable]:
    fake_data.make("ImageNet", folder)
    return folder / "imagenet/classnames.txt", lambda path: build("ImageNet", folder)


def config(folder: Path) -> tuple[Path, Callable]:
    text = (ROOT / "configs/trainers/DFZSL/dfzsl.yaml").read_text() + "DATALOADER:\n  NUM_WORKERS: 0\n"
    (folder / "c.yaml").write_text(text)
    return folder / "c.yaml", lambda path: str(
        train.setup_cfg(train.parser().parse_args(["--config-file", str(path)]))
    )


RUN = "train_base/animals/shots_16/CoOp/vit/seed1"


def results(folder: Path) -> tuple[Path, Callable]:
    run = folder / "base2new" / RUN
    run.mkdir(parents=True)
    rows = [{"class": name, "correct": 1, "total": 2, "new": False} for name in NAMES]
    measured = {"schema": 1, "backbone": "shapes", "accuracy": 50.0, "per_class": rows, "queries": 0}
    measured |= {"trained_parameters": 8, "images_used": 0, "seconds": {"train": 1.5}, "notes": ["a note"]}
    measured |= {"curves": {"loss": [2.0, 1.0]}, "versions": {"dfzsl": "1"}}
    measured["concentration"] = [{"class": "ant", "true": 9.0, "recovered": 8.0}]
    for part in ("train_base", "test_new"):
        place = folder / "base2new" / RUN.replace("train_base", part)
        place.mkdir(parents=True, exist_ok=True)
        (place / "results.json").write_text(json.dumps(measured))
    return run / "results.json", lambda path: tables_of(folder)


def tables_of(folder: Path) -> dict[str, str]:
    sections = report.sections(report.collect(folder))
    return {name: show(sections) for name, show in report.FORMATS.items()}


def coop_log(folder: Path) -> tuple[Path, Callable]:
    run = folder / RUN
    run.mkdir(parents=True)
    (run / "log.txt").write_text(
        "# train_x  1,600\nepoch [1/1]\nFinish training\n=> result\n"
        "* accuracy: 81.2%\nElapsed: 1 day, 0:01:02\n"
    )

    def load(path: Path) -> None:
        for show in report.FORMATS.values():
            show(report.sections(report.collect_logs(folder)))

    return run / "log.txt", load


def picture(kind: str) -> Callable[[Path], tuple[Path, Callable]]:
    def make(folder: Path) -> tuple[Path, Callable]:
        pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3)).astype("uint8")
        Image.fromarray(pixels).save(folder / "a.jpg", format=kind)
        return folder / "a.jpg", encoding.read_image

    return make


def archive(kind: str) -> Callable[[Path], tuple[Path, Callable]]:
    def make(folder: Path) -> tuple[Path, Callable]:
        (folder / "in").mkdir()
        (folder / "in/a.txt").write_text("text " * 50)
        if kind == "zip":
            with zipfile.ZipFile(folder / "a", "w", zipfile.ZIP_DEFLATED) as file:
                file.write(folder / "in/a.txt", "deep/a.txt")
        else:
            with tarfile.open(folder / "a", "w:gz") as file:
                file.add(folder / "in", "deep")
        return folder / "a", lambda path: fetch.unpack(path, folder / "out")

    return make


KINDS: dict[str, Callable[[Path], tuple[Path, Callable]]] = {
    "teacher.safetensors": teacher,
    "virtual.safetensors": virtual,
    "classifier.safetensors": classifier,
    "feature cache": cached_features,
    "checkpoint": checkpoint,
    "open_clip weights": weights,
    "features .npz": feature_npz,
    "features .safetensors": feature_safetensors,
    "splits .mat": mat_splits,
    "features .mat": mat_features,
    "image list .mat": mat_files,
    "few-shot pickle": few_shots,
    "split_zhou .json": split_json,
    "CSV": csv_table,
    "classnames.txt": class_names,
    "config YAML": config,
    "results.json": results,
    "log of CoOp": coop_log,
    "JPEG": picture("JPEG"),
    "PNG": picture("PNG"),
    "GIF": picture("GIF"),
    "TIFF": picture("TIFF"),
    "zip": archive("zip"),
    "tar.gz": archive("tar"),
}


def attempt(load: Callable, path: Path) -> str | None:
    """The one line in which reading ended; None if it went well. Anything else is a defect and is raised."""
    try:
        load(path)
    except Exception as error:
        said = errors.explain(error)
        if said is None:
            raise
        assert said and said.isprintable() and len(said) < 5000, said
        return said
    return None


EDITS = ("flip", "cut", "insert", "copy", "zeros", "drop")


def damaged(whole: bytes, edits: list[tuple]) -> bytes:
    """`whole` after some edits (kind, place in 0..1, size, bytes)."""
    data = bytearray(whole)
    for kind, share, size, junk in edits:
        place = int(share * len(data))
        if kind == "flip":
            data[place : place + len(junk)] = junk
        elif kind == "cut":
            del data[place:]
        elif kind == "insert":
            data[place:place] = junk
        elif kind == "copy":
            data[place:place] = data[: size * 8]
        elif kind == "zeros":
            data[place : place + size] = bytes(size)
        else:
            del data[place : place + size]
    return bytes(data)


def grown(load: Callable, path: Path) -> tuple[str | None, int]:
    """(the line in which reading ended, bytes by which a process of its own grew at its peak)."""

    def work(pipe: Any) -> None:
        before = peak_memory()
        try:
            said: str | None = attempt(load, path)
        except BaseException as error:
            said = f"DEFECT {error!r}"
        pipe.send((said, peak_memory() - before))

    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=work, args=(theirs,))
    process.start()
    assert ours.poll(120), "no answer"
    said, size = ours.recv()
    process.join()
    assert not (said or "").startswith("DEFECT"), said
    return said, size
