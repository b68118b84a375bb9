"""Every reader of what comes from outside, with one valid file of each kind: what is fuzzed.

A kind is a function of a folder that writes its file there and returns (path, reader). Readers end well, or
in an error that `dfzsl.utils.errors.describe_user_error` puts into one line.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import fake_data
import numpy as np
import torch
from conftest import ROOT, peak_memory
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from dassl.utils import load_checkpoint
from PIL import Image

from dfzsl import report, train
from dfzsl.client.measure import measure_encoder
from dfzsl.datasets import encoding
from dfzsl.datasets.base import read_fewshot, read_split
from dfzsl.datasets.labeled_images import read_labeled_features
from dfzsl.io import run_directory
from dfzsl.io.file_summary import summarize_file
from dfzsl.io.tensors import save_tensors
from dfzsl.owner.import_head import import_teacher
from dfzsl.owner.server.config import ServerConfig
from dfzsl.owner.server.protocol import parse_queries
from dfzsl.owner.server.refusal import Refusal
from dfzsl.prepare import fetch
from dfzsl.trainers.clip.class_prompts import ClassPrompts
from dfzsl.trainers.clip.loading import _read_state
from dfzsl.trainers.generation.classifier import Classifier
from dfzsl.trainers.recovery.feature_statistics import FeatureStatistics, measure_feature_statistics
from dfzsl.trainers.recovery.remote_oracle import HTTPTeacher
from dfzsl.trainers.recovery.teacher import Teacher
from dfzsl.trainers.recovery.teacher_card import TeacherCard
from dfzsl.trainers.recovery.virtual_classes import VirtualClasses
from dfzsl.utils import errors
from dfzsl.utils.errors import UserError

NAMES = ["ant", "bee", "cat"]


def build(name: str, root: Path, **keys: object) -> Any:
    cfg = get_cfg_default()
    cfg.merge_from_list(["DATASET.NAME", name, "DATASET.ROOT", str(root)])
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return DATASET_REGISTRY.get(name)(cfg)


def teacher(folder: Path) -> tuple[Path, Callable]:
    card = TeacherCard([5, 6, 7], 3.0, 0.5, {"text": 50.0, "teacher": 60.0, "mixture": 70.0}, 0.8, 0.5)
    Teacher(torch.randn(3, 8), NAMES, "b", card=card).save(folder / "t.safetensors")
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
    return path, lambda path: encoding._load_part(path, "image features", (4, 8))


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


def text_of(name: str, content: str | bytes, load: Callable[[Path], object]) -> Callable:
    def make(folder: Path) -> tuple[Path, Callable]:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / name, load

    return make


def geometry(folder: Path) -> tuple[Path, Callable]:
    measure_feature_statistics(torch.randn(120, 4), torch.arange(120) % 3, backbone="b").save(
        folder / "g.safetensors"
    )
    return folder / "g.safetensors", FeatureStatistics.load


def pictures_measured(folder: Path) -> tuple[Path, Callable]:
    x = np.random.default_rng(0).normal(size=(120, 4)).astype("float32")
    np.savez(folder / "x.npz", x=x, y=np.arange(120) % 3)
    return folder / "x.npz", lambda path: measure_encoder([path])


def labeled(folder: Path) -> tuple[Path, Callable]:
    return fake_data.make("Features", folder), read_parts


def labeled_tensors(folder: Path) -> tuple[Path, Callable]:
    return feature_safetensors(folder)[0], read_parts


def read_parts(path: Path) -> None:
    read_labeled_features(path, lambda: None, ("train", "test"))


def tensors_measured(folder: Path) -> tuple[Path, Callable]:
    tensors = {"x": torch.randn(120, 4), "y": torch.arange(120) % 3}
    save_tensors(folder / "x.safetensors", tensors, {"backbone": "b"})
    return folder / "x.safetensors", lambda path: measure_encoder([path])


def shown(folder: Path) -> tuple[Path, Callable]:
    path, _ = classifier(folder)
    return path, summarize_file


def head(kind: str) -> Callable[[Path], tuple[Path, Callable]]:
    """A linear classifier of another toolbox."""

    def make(folder: Path) -> tuple[Path, Callable]:
        path = folder / f"head.{kind}"
        weight, names = torch.randn(3, 4), (folder / "names.txt")
        names.write_text("\n".join(NAMES))
        if kind == "npz":
            np.savez(path, coef_=weight.numpy(), intercept_=np.zeros(3), classes_=np.array(NAMES))
        elif kind == "pt":
            torch.save({"state_dict": {"fc.weight": weight, "fc.bias": torch.zeros(3)}}, path)
        elif kind == "safetensors":
            save_tensors(path, {"head.weight": weight}, {})
        else:
            from sklearn.linear_model import LogisticRegression
            from skops.io import dump

            dump(LogisticRegression().fit(torch.randn(9, 4).numpy(), NAMES * 3), path)
            # Here and not in a child process, which takes seconds to start.
            from dfzsl.io.untrusted.skops_reader import read_linear_classifier

            return path, lambda path: read_linear_classifier(str(path))
        given = "" if kind == "npz" else names
        return path, lambda path: import_teacher(path, classnames=given or ())

    return make


def names_of_classes(kind: str) -> Callable[[Path], tuple[Path, Callable]]:
    content = {
        "txt": "ant\nbee\ncat\n",
        "csv": 'id,name\n0,ant\n1,"bee, wild"\n2,cat\n',
        "json": '["ant", "bee", "cat"]',
        "config.json": '{"id2label": {"0": "ant", "1": "bee", "2": "cat"}}',
    }[kind]

    def make(folder: Path) -> tuple[Path, Callable]:
        np.savez(folder / "head.npz", coef_=np.ones((3, 4), dtype="f4"))
        load = text_of(
            f"names.{kind}", content, lambda path: import_teacher(folder / "head.npz", classnames=path)
        )
        return load(folder)

    return make


def sentences(folder: Path) -> tuple[Path, Callable]:
    content = json.dumps({name: [f"a {name} on grass.", f"a small {name}."] for name in NAMES})
    return text_of("prompts.json", content, lambda path: ClassPrompts.parse(str(path)))(folder)


def aircraft(folder: Path) -> tuple[Path, Callable]:
    fake_data.make("FGVCAircraft", folder)
    return folder / "fgvc_aircraft/images_variant_test.txt", lambda path: build("FGVCAircraft", folder)


def server(folder: Path) -> tuple[Path, Callable]:
    """One reply, as a description and as the answer to a question."""
    reply = {"classnames": NAMES, "dim": 4, "normalized": True, "backbone": "b", "budget": 9, "batch": 2}
    reply["logits"] = [[0.1, -0.2, 3.5], [1.0, 2.0, 1e-3]]

    def load(path: Path) -> None:
        teacher = HTTPTeacher("http://localhost:1/", retries=0)
        teacher._send = lambda request, most: path.read_bytes()  # type: ignore[method-assign]
        oracle = teacher.oracle("logits")
        oracle(torch.ones(2, 4).double())

    return text_of("reply.json", json.dumps(reply), load)(folder)


def question(folder: Path) -> tuple[Path, Callable]:
    """What a client sends to an owner's server: refused with a status, or answered."""

    def load(path: Path) -> None:
        try:
            parse_queries(path.read_bytes(), ServerConfig(access="logits"), 2)
        except Refusal as refusal:
            raise UserError(f"{refusal.status}: {refusal}") from None

    return text_of("q.json", '{"level": "logits", "features": [[0.5, 1], [-1e-3, 2.5]]}', load)(folder)


def run_config(folder: Path) -> tuple[Path, Callable]:
    words = "# made of test data: 0123456789abcdef\nDATASET:\n  ROOT: data/x\nSEED: 1\n"
    load = lambda path: run_directory.check_inputs(path, {"test data": "0123456789abcdef"}, "--output")  # noqa: E731
    return text_of("config.yaml", words, load)(folder)


def sums(folder: Path) -> tuple[Path, Callable]:
    (folder / "a.bin").write_bytes(b"x")
    words = json.dumps({"http://x/a.bin": hashlib.sha256(b"x").hexdigest()})

    def load(path: Path) -> None:
        (folder / "a.bin").write_bytes(b"x")
        fetch.verify(folder / "a.bin", "http://x/a.bin", "", path)

    return text_of(fetch.CHECKSUMS, words, load)(folder)


def listing(folder: Path) -> tuple[Path, Callable]:
    words = json.dumps([{"path": "README.md"}, {"path": "dtd.zip", "lfs": {"oid": "ab", "size": 9}}])

    def load(path: Path) -> None:
        with mock.patch.object(
            fetch.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(path.read_bytes())
        ):
            fetch.listing("somebody/data")

    return text_of("tree.json", words, load)(folder)


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
    "geometry.safetensors": geometry,
    "features to measure .npz": pictures_measured,
    "features to measure .safetensors": tensors_measured,
    "labeled features .npz": labeled,
    "labeled features .safetensors": labeled_tensors,
    "dfzsl show": shown,
    **{f"head of another toolbox .{kind}": head(kind) for kind in ("npz", "pt", "safetensors", "skops")},
    **{f"class names .{kind}": names_of_classes(kind) for kind in ("txt", "csv", "json", "config.json")},
    "sentences .json": sentences,
    "images_variant .txt": aircraft,
    "a server's reply": server,
    "a client's question": question,
    "config.yaml of a run": run_config,
    "sha256.json": sums,
    "the mirror's listing": listing,
    "zip": archive("zip"),
    "tar.gz": archive("tar"),
}


def attempt(load: Callable, path: Path) -> str | None:
    """The one line in which reading ended; None if it went well. Anything else is a defect and is raised."""
    try:
        load(path)
    except Exception as error:
        said = errors.describe_user_error(error)
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
    assert ours.poll(600), "no answer"
    said, size = ours.recv()
    process.join()
    assert not (said or "").startswith("DEFECT"), said
    return said, size
