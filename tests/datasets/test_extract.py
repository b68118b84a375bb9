"""A data set becomes a feature file that stands for it; ranks share the work."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import fake_data
import pytest
import torch
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from fake_data import Backbone, pixels

from dfzsl.cli.experiments import extract as extract_command
from dfzsl.cli.main import invoke
from dfzsl.datasets import extract, features
from dfzsl.datasets.encoding import encode_datums
from dfzsl.io.tensors import load_tensors
from dfzsl.utils.errors import UserError, run_program

IMAGES = {
    "OxfordPets": "oxford_pets",
    "ImageNetR": "imagenet_r",
    "CUB": "cub",
    "Folder": "folder",
    "Csv": "csv",
}


def dataset(name: str, root: Path, subsample: str = "all", teacher: str = ""):
    cfg = get_cfg_default()
    pairs = ["DATASET.NAME", name, "DATASET.ROOT", str(root), "DATASET.SUBSAMPLE_CLASSES", subsample]
    cfg.merge_from_list([*pairs, "TEACHER.FILE", teacher])
    return DATASET_REGISTRY.get(name)(cfg)


@pytest.mark.parametrize("name", IMAGES)
def test_the_file_stands_for_the_data_set(name, tmp_path):
    root = fake_data.make(name, tmp_path)
    kind = IMAGES[name]
    given = f"{kind}:{root}" if kind in ("folder", "csv") else kind
    images = extract.open_dataset(given, "" if ":" in given else str(root))
    extract.extract(images, Backbone(), tmp_path / "f.safetensors", num_workers=0)
    for part in ("base", "new", "all"):
        one, two = dataset(name, root, part), dataset("Features", tmp_path / "f.safetensors", part)
        assert two.classnames == one.classnames and two.template == one.template
        assert two.new_classnames == one.new_classnames
        for which in ("train_x", "val", "test"):
            left, right = getattr(one, which), getattr(two, which)
            assert [d.label for d in left] == [d.label for d in right]
            direct = encode_datums(Backbone(), left, pixels, num_workers=0)
            rows = features.unit_rows(direct, which) if left else direct
            assert torch.allclose(rows, encode_datums(Backbone(), right, pixels), atol=1e-6)
        assert two.test_only == one.test_only
    expected = Backbone().class_features(two.all_classnames, [two.template])
    assert torch.allclose(torch.stack(list(two.text_features.values())), expected)
    assert (two.backbone_id, two.weights_id) == ("mean", "none")
    assert dataset("Features", tmp_path / "f.safetensors", teacher="teacher.safetensors").train_x == []


def test_a_second_extraction_encodes_nothing(tmp_path):
    root = fake_data.make("OxfordPets", tmp_path)
    images = extract.open_dataset("oxford_pets", str(root))
    first, second = Backbone(), Backbone()
    extract.extract(images, first, tmp_path / "a.safetensors", num_workers=0)
    extract.extract(images, second, tmp_path / "b.safetensors", num_workers=0)
    assert (first.seen, second.seen) == (45, 0)
    one, two = (load_tensors(tmp_path / f"{name}.safetensors", "features") for name in "ab")
    assert one[1] == two[1] and all(torch.equal(one[0][name], two[0][name]) for name in one[0] | two[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [("oxford_pet", "'oxford_pet'.*oxford_pets"), ("folder:nowhere", "nowhere")],
)
def test_what_is_not_there(given, message, tmp_path):
    with pytest.raises(UserError, match=message):
        extract.open_dataset(given, str(tmp_path))


def test_features_are_not_extracted_again(tmp_path):
    path = fake_data.make("Features", tmp_path)
    with pytest.raises(UserError, match="features"):
        extract.extract(extract.open_dataset(f"features:{path}", ""), Backbone(), tmp_path / "f.safetensors")


def test_two_classes_of_one_name(tmp_path):
    root = fake_data.make("ImageNetR", tmp_path)
    names = tmp_path / "imagenet-rendition/classnames.txt"
    names.write_text(names.read_text().replace("goldfish", "tench"))
    with pytest.raises(UserError, match="'tench'"):
        extract.extract(extract.open_dataset("imagenet_r", str(root)), Backbone(), tmp_path / "f.safetensors")


def test_the_output_must_be_safetensors():
    with pytest.raises(UserError, match=r"\.safetensors"):
        invoke(extract_command, ["dtd", "--output", "dtd.npz"])


RANK = """
import sys
import torch
import fake_data
from dfzsl.datasets import encoding, extract

encoding.IMAGES_PER_PART = 4
torch.distributed.init_process_group("gloo")
backbone = fake_data.Backbone()
data = extract.open_dataset("oxford_pets", sys.argv[1])
extract.extract(data, backbone, sys.argv[2], num_workers=0, batch_size=3)
print("seen", backbone.seen)
torch.distributed.destroy_process_group()
"""


def test_two_ranks_share_the_images(tmp_path):
    """What torchrun does, without its launcher: two processes, gloo, the environment's addresses."""
    root = fake_data.make("OxfordPets", tmp_path)
    (tmp_path / "rank.py").write_text(RANK)
    common = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "WORLD_SIZE": "2"}
    common |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29500 + os.getpid() % 2000),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(tmp_path / "rank.py"), str(root), str(tmp_path / "two.safetensors")]
    ranks = [
        subprocess.Popen(command, env={**common, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    seen = [int(text.split("seen")[1]) for text in outputs]
    assert sum(seen) == 45 and min(seen) > 10

    images = extract.open_dataset("oxford_pets", str(root))
    extract.extract(
        images, Backbone(), tmp_path / "one.safetensors", cache_dir=tmp_path / "own", num_workers=0
    )
    one, two = (load_tensors(tmp_path / f"{name}.safetensors", "features")[0] for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    assert not [path for path in Path(os.environ["DFZSL_CACHE"]).iterdir() if path.suffix != ".safetensors"]


def command(*words: str, launcher: Sequence[str] = ()) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *launcher, "-m", "dfzsl", "extract", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_the_command_itself(tmp_path):
    """With the built-in backbone, from the shell: no warning of runpy's, and a file that can be read."""
    if not (Path(features.__file__).parent / "shapes/clip.safetensors").exists():
        pytest.skip("the built-in backbone is not in this checkout")
    root = fake_data.make("Folder", tmp_path)
    output = tmp_path / "f.safetensors"
    done = command(f"folder:{root}", "--backbone", "shapes", "--output", str(output), "--workers", "0")
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" not in done.stderr
    assert len(dataset("Features", output).test) == 15


@pytest.mark.slow
def test_torchrun(tmp_path):
    """The real launcher and the real command: two ranks write what one writes."""
    root = fake_data.make("Csv", tmp_path)
    words = [f"csv:{root}", "--backbone", "shapes", "--workers", "1", "--batch-size", "4"]
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611"]
    for output, how in ((one, []), (two, launcher)):
        given = [*words, "--output", str(output), "--cache", str(tmp_path / output.stem)]
        done = command(*given, launcher=how)
        assert done.returncode == 0, done.stderr
    left, right = load_tensors(one, "features"), load_tensors(two, "features")
    assert left[1] == right[1] and all(
        torch.equal(left[0][name], right[0][name]) for name in left[0] | right[0]
    )


def test_a_mistake_at_the_command_is_one_line(tmp_path, capfd):
    words = ["folder:nowhere", "--backbone", "shapes", "--output", str(tmp_path / "f.safetensors")]
    with pytest.raises(SystemExit) as left:
        run_program(lambda: invoke(extract_command, words))
    message = capfd.readouterr().err
    assert left.value.code == 2 and message.count("\n") == 1 and "nowhere" in message
