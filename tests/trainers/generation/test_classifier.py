"""The final classifier: its file, its parts, and the whole of stage 3 on a small world shaped like CLIP's."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from draws import rng, unit
from scipy.optimize import minimize

from dfzsl.io.tensors import save_tensors
from dfzsl.trainers.clip.aligned_text import AlignedText
from dfzsl.trainers.generation.calibrated_stacking import _accuracy_curve as curve
from dfzsl.trainers.generation.calibrated_stacking import fit_stacking_bias, pseudo_novel_folds
from dfzsl.trainers.generation.classifier import Classifier, ClassWeights, fit_class_weights, minimize_loss
from dfzsl.trainers.generation.generate import generate
from dfzsl.trainers.generation.generators import GENERATORS
from dfzsl.trainers.generation.training import GenerationSettings
from dfzsl.trainers.recovery.virtual_classes import VirtualClasses
from dfzsl.utils.errors import UserError

DIM, BASE, NEW = 32, 16, 8


@pytest.fixture(scope="module")
def world():
    """Base and new classes in an image cone; texts in another cone that point only roughly at them."""
    g = rng(4)
    image_side, text_side = unit(torch.randn(2, DIM, generator=g))
    deviation = 0.4 * unit(torch.randn(BASE + NEW, DIM, generator=g))
    means = unit(image_side + deviation)
    text = unit(text_side + deviation + 0.35 * unit(torch.randn(BASE + NEW, DIM, generator=g)))
    kappa = torch.full((BASE + NEW,), 300.0)
    names = [f"class {i}" for i in range(BASE + NEW)]
    every = VirtualClasses(means, kappa, names, weight=means - means.mean(0))
    # A teacher that was trained tells classes apart by what they do not share.
    rows = deviation[:BASE] - (deviation[:BASE] @ image_side)[:, None] * image_side
    virtual = VirtualClasses(means[:BASE], kappa[:BASE], names[:BASE], weight=rows, owner_weight=3.0)
    return virtual, text[:BASE], text[BASE:], names, every


def build(world, new=None, **settings) -> Classifier:
    virtual, base_text, new_text, names, _ = world
    new_names = names[BASE:]
    if new is not None:
        new_text, new_names = new
    return generate(
        virtual,
        AlignedText(base_text, new_text, new_names, backbone="ViT-B-32", weights="openai"),
        settings=GenerationSettings(**{"num_per_class": 40, "classifier_steps": 80} | settings),
        generator=rng(1),
    )


@pytest.fixture(scope="module")
def classifier(world):
    return build(world)


class TestClassifier:
    def test_logits_follow_the_formula(self):
        c = Classifier(
            weight=unit(torch.randn(3, 5, generator=rng())),
            classnames=["a", "b", "c"],
            is_new=torch.tensor([False, False, True]),
            bias=torch.tensor([0.0, 0.0, 0.02]),
            temperature=0.05,
            shift=0.3 * torch.ones(5),
        )
        x = torch.randn(4, 5, generator=rng(1))
        moved = x / x.norm(dim=1, keepdim=True) + 0.3
        cosine = torch.nn.functional.cosine_similarity(moved[:, None], c.weight[None], dim=2)
        assert torch.allclose(c.logits(x), (cosine + c.bias) / 0.05, atol=1e-4)

    def test_named_classes_in_the_order_asked_for(self, classifier):
        x = torch.randn(3, DIM, generator=rng())
        names = [classifier.classnames[i] for i in (9, 2)]
        assert torch.allclose(classifier.logits(x, names), classifier.logits(x)[:, [9, 2]])
        with pytest.raises(UserError, match="'class 99'"):
            classifier.logits(x, ["class 99"])

    def test_file_round_trip(self, classifier, tmp_path):
        path = tmp_path / "classifier.safetensors"
        for original in (
            classifier,
            replace(classifier, shift=torch.ones(DIM), text_map=None, text_shift=None),
        ):
            original.save(path)
            loaded = Classifier.load(path)
            x = torch.randn(3, DIM, generator=rng())
            assert torch.equal(loaded.logits(x), original.logits(x))
            assert (loaded.classnames, loaded.new_bias) == (original.classnames, original.new_bias)
            assert (loaded.backbone, loaded.weights) == ("ViT-B-32", "openai")
            assert (loaded.shift is None, loaded.text_shift is None) == (
                original.shift is None,
                original.text_shift is None,
            )

    def test_broken_files_are_refused(self, classifier, tmp_path):
        path = tmp_path / "classifier.safetensors"
        with pytest.raises(UserError, match="no such classifier file"):
            Classifier.load(path)
        save_tensors(path, {"weight": torch.zeros(2, 3)}, {"kind": "classifier"})
        with pytest.raises(UserError, match="incomplete classifier"):
            Classifier.load(path)
        save_tensors(path, {"weight": torch.zeros(2, 3)}, {"kind": "teacher"})
        with pytest.raises(UserError, match="found teacher"):
            Classifier.load(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: setattr(c, "temperature", float("inf")), "temperature must be greater than 0"),
            (lambda c: setattr(c, "temperature", "0.01"), "incomplete classifier"),
            (lambda c: setattr(c, "new_bias", float("nan")), "biases must be finite"),
            (lambda c: c.weight[1].zero_(), "class 'class 1' has norm 0"),
            (lambda c: c.weight[1].mul_(1e20), "has norm"),
            (lambda c: setattr(c, "text_shift", None), r"text_map of a classifier must be"),
            (lambda c: c.classnames.__setitem__(0, "class_1"), "class_1"),
        ],
        ids=range(7),
    )
    def test_values_that_decide_nothing_are_refused(self, classifier, change, message, tmp_path):
        wrong = copy.deepcopy(classifier)
        change(wrong)
        wrong.save(tmp_path / "classifier.safetensors")
        with pytest.raises(UserError, match=message):
            Classifier.load(tmp_path / "classifier.safetensors")

    def test_a_class_added_later_gets_the_row_of_one_that_was_there(self, world, classifier):
        """The same text as a class that was built with the others: the same row, whatever its name."""
        new_text = world[2]
        later = classifier.extend(["late a", "late b"], new_text[:2])
        assert torch.equal(later.weight[: BASE + NEW], classifier.weight)
        assert torch.allclose(later.weight[-2:], classifier.weight[BASE : BASE + 2], atol=1e-5)
        assert later.bias[-2:].tolist() == [classifier.new_bias] * 2 and later.is_new[-2:].all()

    def test_without_a_map_a_class_added_later_has_its_text(self, classifier):
        plain = replace(classifier, text_map=None, text_shift=None)
        text = unit(torch.randn(1, DIM, generator=rng()))
        assert torch.equal(plain.extend(["late"], text).weight[-1:], text)

    def test_extend_refuses_names_and_shapes_that_do_not_fit(self, classifier):
        row = torch.zeros(1, DIM)
        with pytest.raises(UserError, match="'class 3'"):
            classifier.extend(["class 3"], row)
        with pytest.raises(UserError, match="'x'"):
            classifier.extend(["x", "x"], row.repeat(2, 1))
        with pytest.raises(UserError, match="2"):
            classifier.extend(["x", "y"], row)


class TestFits:
    def test_minimise_finds_the_minimum(self):
        x, y = torch.randn(20, 3, generator=rng()), torch.zeros(20)
        found = minimize_loss(
            lambda x, y, p: (x @ p - 1).square().mean(),
            torch.zeros(3),
            x,
            y,
            rng(),
            steps=2000,
            lr=0.02,
            batch=100,
        )
        assert torch.allclose(found, torch.linalg.lstsq(x, torch.ones(20, 1)).solution[:, 0], atol=1e-3)

    def test_rows_are_the_optimum_that_scipy_finds(self):
        g = rng(2)
        x, y = unit(torch.randn(60, 4, generator=g)), torch.arange(60) % 3
        rows = unit(torch.randn(3, 4, generator=g))
        found = fit_class_weights(x, y, rows, g, l2_to_init=5.0, steps=3000, lr=1e-2, temperature=0.1)

        def objective(flat):
            delta = torch.tensor(flat, dtype=torch.float64).view(3, 4).requires_grad_()
            logits = x.double() @ (rows.double() + delta).T / 0.1
            value = F.cross_entropy(logits, y) + 2.5 * delta.square().sum(1).mean()
            value.backward()
            return value.item(), delta.grad.numpy().ravel()

        best = torch.tensor(minimize(objective, torch.zeros(12).numpy(), jac=True).x).view(3, 4)
        assert torch.allclose(found.double(), unit(rows.double() + best), atol=1e-3)

    def test_a_row_that_serves_its_class_stays(self, world):
        """Features at the text rows themselves: nothing to learn, whatever the penalty."""
        rows = torch.eye(5)
        x = rows.repeat_interleave(10, 0)
        found = fit_class_weights(x, torch.arange(5).repeat_interleave(10), rows, rng(), l2_to_init=0.0)
        assert torch.allclose(found, rows, atol=1e-6)

    def test_log_prior_corrects_unequal_class_sizes(self):
        """Two classes mirrored about a plane, one ten times the other: the boundary stays on the plane."""
        g = rng(1)
        counts, start = torch.tensor([2000, 200]), unit(torch.tensor([[1.0, 2.0], [-1.0, 2.0]]))
        y = torch.arange(2).repeat_interleave(counts)
        x = unit(start[y] + 0.5 * torch.randn(len(y), 2, generator=g))
        head_start = {}
        for prior in (True, False):
            on_plane = (
                fit_class_weights(x, y, start, g, l2_to_init=0.1, log_prior=prior, temperature=0.2)
                @ torch.eye(2)[1]
            )
            head_start[prior] = float(on_plane[0] - on_plane[1])
        assert abs(head_start[True]) < 0.1 * head_start[False]

    def test_divergence_is_a_clear_error(self):
        x = torch.full((4, 3), math.inf)
        with pytest.raises(UserError, match="diverged"):
            fit_class_weights(x, torch.zeros(4, dtype=torch.long), torch.eye(3), rng(), steps=2)


class TestStageThree:
    def test_beats_zero_shot_on_base_classes_and_balances(self, world, classifier):
        _, base_text, new_text, names, every = world
        x, y = every.sample(50, rng(9))
        seen = y < BASE
        text = torch.cat([base_text, new_text])

        def accuracy(logits, rows):
            return (logits.argmax(1) == y)[rows].float().mean()

        def harmonic(logits):
            s, u = accuracy(logits, seen), accuracy(logits, ~seen)
            return 2 * s * u / (s + u)

        ours, zero_shot = classifier.logits(x), x @ text.T
        own = names[:BASE]
        base = (classifier.logits(x[seen], own).argmax(1) == y[seen]).float().mean()
        assert base > ((x[seen] @ base_text.T).argmax(1) == y[seen]).float().mean() + 0.1
        assert harmonic(ours) > harmonic(zero_shot) + 0.1

    @pytest.mark.parametrize("name", GENERATORS)
    def test_every_generator(self, world, name):
        c = build(world, name=name, epochs=0 if name == "vmf" else 1, hidden=0 if name == "vmf" else 16)
        assert c.weight.shape == (BASE + NEW, DIM)
        assert torch.allclose(c.weight.norm(dim=1), torch.ones(BASE + NEW), atol=1e-5)
        assert not torch.allclose(c.weight[BASE:], unit(world[2]), atol=1e-3)

    def test_same_seed_same_bytes(self, world):
        a, b = (build(world, name="vmf") for _ in range(2))
        assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)

    def test_without_generator_and_balance_new_rows_are_the_text(self, world):
        c = build(world, name="none", calibrate=False)
        assert torch.allclose(c.weight[BASE:], unit(world[2]), atol=1e-6)
        assert c.text_map is None and not c.bias.any()

    def test_image_shift_is_kept_and_learned_behind(self, world):
        virtual, base_text, new_text, names, _ = world
        shift = 0.2 * unit(torch.randn(DIM, generator=rng(3)))
        c = generate(virtual, AlignedText(base_text, new_text, names[BASE:], shift=shift), generator=rng(1))
        assert torch.equal(c.shift, shift)
        x, y = virtual.sample(30, rng(2))
        assert (c.logits(x, names[:BASE]).argmax(1) == y).float().mean() > 0.9

    @pytest.mark.parametrize("generator", ["closed_form", "none", "vmf", "cvae"])
    @pytest.mark.parametrize("count", [0, 1])
    def test_one_new_class_or_none(self, world, generator, count):
        new = (world[2][:count], world[3][BASE : BASE + count])
        quick = {"epochs": 1, "hidden": 8} if generator == "cvae" else {}
        c = build(world, new=new, name=generator, **quick)
        assert c.weight.shape == (BASE + count, DIM) and c.is_new.sum() == count
        assert torch.isfinite(c.logits(torch.randn(2, DIM, generator=rng()))).all()

    def test_names_that_clash(self, world):
        text = world[2][:2]
        with pytest.raises(UserError, match="'class 1'"):
            build(world, new=(text, ["class 1", "fresh"]))
        with pytest.raises(UserError, match="'fresh'"):
            build(world, new=(text, ["fresh", "fresh"]))
        with pytest.raises(UserError, match="text features"):
            build(world, new=(text, ["fresh"]))

    def test_thousands_of_new_classes_in_bounded_memory(self, world, monkeypatch):
        monkeypatch.setattr("dfzsl.trainers.generation.training.MAX_GENERATED", 6000)
        text = unit(torch.randn(3000, DIM, generator=rng()))
        made = []
        sample = GENERATORS["vmf"].sample

        def watched(self, conditions, n, generator):
            made.append(len(conditions) * n)
            return sample(self, conditions, n, generator)

        monkeypatch.setattr(GENERATORS["vmf"], "sample", watched)
        names = [f"new {i}" for i in range(3000)]
        c = build(world, new=(text, names), name="vmf", classifier_steps=3, classifier_batch=256)
        assert c.weight.shape == (BASE + 3000, DIM)
        assert max(made) <= 6000

    def test_unknown_generator(self, world):
        with pytest.raises(UserError, match="'gan'"):
            build(world, name="gan")


class TestCalibration:
    def test_curve_counts(self):
        margin = torch.tensor([-0.2, -0.1, 0.1, 0.2])
        correct = torch.tensor([True, False, True, True])
        grid = torch.tensor([-0.3, 0.0, 0.15, 0.3])
        above = [((margin > g) & correct).float().mean().item() for g in grid]
        below = [((margin < g) & correct).float().mean().item() for g in grid]
        assert curve(margin, correct, grid, above=True).tolist() == above
        assert curve(margin, correct, grid, above=False).tolist() == below

    def test_undoes_a_head_start_of_base_classes(self, world):
        """Base rows get a part along the cone's axis, 0.05 more for every image: the bias gives it back."""
        virtual, base_text, *_ = world
        x, y = virtual.sample(40, rng())
        axis = unit(virtual.mu.mean(0))
        biases = {}
        for start in (0.0, 0.05):
            lift = start / float((x @ axis).mean()) * axis

            def compute_weights(known, others, lift=lift):
                return ClassWeights(base_text[known] + lift, others, torch.zeros(len(known)))

            folds = pseudo_novel_folds(x, y, base_text, NEW, compute_weights, rng())
            biases[start] = fit_stacking_bias(folds, x.device)
        assert biases[0.0] == pytest.approx(0.0, abs=0.02)
        assert biases[0.05] - biases[0.0] == pytest.approx(0.05, abs=0.01)
