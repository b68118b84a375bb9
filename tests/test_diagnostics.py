import numpy as np
import pytest
import torch
from conftest import CLASSES, write_features

from dfzsl.cli.experiments import plot
from dfzsl.cli.main import invoke
from dfzsl.report import diagnostics
from dfzsl.trainers.recovery.virtual_classes import VirtualClasses
from dfzsl.utils.errors import UserError

BASE = list(CLASSES[:4])


def write_run(folder, dim=32, names=BASE):
    mu = torch.eye(dim)[: len(names)]
    VirtualClasses(mu, torch.full((len(names),), 500.0), list(names), mu).save(folder / "virtual.safetensors")
    return folder


def test_a_run_is_drawn(feature_file, tmp_path, capsys):
    run = write_run(tmp_path)
    invoke(plot, [str(run), str(feature_file), "--classes", "3"])
    assert (run / "virtual.png").read_bytes().startswith(b"\x89PNG")
    assert str(run / "virtual.png") in capsys.readouterr().out


def test_real_classes_are_matched_by_name(feature_file):
    features, labels = diagnostics.read_real(str(feature_file), ["dog", "ant"])
    file = np.load(feature_file)
    expected = file["y_test"][np.isin(file["y_test"], [0, 3])]
    assert labels.tolist() == [1 if label == 0 else 0 for label in expected]
    assert features.shape == (len(expected), 32)


def test_margins_and_angles():
    mu = torch.eye(3)
    virtual = VirtualClasses(mu, torch.ones(3), ["a", "b", "c"], mu)
    x = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0]])
    assert diagnostics.margin(virtual, x, torch.tensor([0, 0])) == pytest.approx([1.0, -0.2])
    assert diagnostics.angles(x, mu[[1, 0]]) == pytest.approx([90, 53.1301], rel=1e-4)


@pytest.mark.parametrize(
    ("dim", "names", "message"),
    [(32, ["ant", "emu"], "'emu'"), (16, BASE, "32 dimensions.* 16")],
)
def test_what_does_not_fit_is_one_line(feature_file, tmp_path, dim, names, message):
    with pytest.raises(UserError, match=message):
        diagnostics.plot_run(write_run(tmp_path, dim, names), feature_file)
    with pytest.raises(UserError, match="nowhere"):
        diagnostics.plot_run(tmp_path / "nowhere", feature_file)


def test_a_class_without_test_features_is_reported(tmp_path):
    file = write_features(tmp_path / "f.npz")
    labels = np.load(file)["y_test"]
    write_features(tmp_path / "f.npz", y_test=np.where(labels == 3, 2, labels))
    with pytest.raises(UserError, match="no test feature"):
        diagnostics.plot_run(write_run(tmp_path), file)
