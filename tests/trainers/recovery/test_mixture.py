"""Test mixtures, model cards of teachers and ridge regression against direct computation."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from draws import rng, unit
from sklearn.linear_model import LogisticRegression

from dfzsl.trainers.recovery.feature_statistics import FeatureStatistics, measure_feature_statistics
from dfzsl.trainers.recovery.mixture import (
    TEACHER_WEIGHT_RANGE,
    mix,
    predict_teacher_weight,
    teacher_rows,
    text_teacher_statistics,
)
from dfzsl.trainers.recovery.ridge import RIDGES, leave_one_out_ridge
from dfzsl.trainers.recovery.teacher import Teacher, fit_teacher
from dfzsl.trainers.recovery.teacher_card import (
    TeacherCard,
    cross_validate,
    estimate_class_spread,
    one_standard_error_choice,
    rank_in_class,
)
from dfzsl.utils.errors import UserError

DIM, CLASSES = 24, 10


@pytest.fixture(scope="module")
def toy_data():
    """Return images in one cone and texts in another: (text (C, d), features (n, d), labels (n,))."""
    g = rng(3)
    deviation = unit(torch.randn(CLASSES, DIM, generator=g))
    axes = torch.eye(DIM)[:2]
    text = unit(2 * axes[0] + deviation + 0.7 * unit(torch.randn(CLASSES, DIM, generator=g)))
    labels = torch.arange(CLASSES).repeat(12)
    noise = torch.randn(len(labels), DIM, generator=g) / DIM**0.5
    return text, unit(2 * axes[1] + deviation[labels] + 1.1 * noise), labels


class TestRidge:
    def test_left_out_predictions_are_those_of_refits_without_the_class(self):
        """The shortcut equals centering and solving again without each row, at every strength."""
        g = rng(1)
        t, y = torch.randn(8, 5, generator=g).double(), torch.randn(8, 3, generator=g).double()
        _, left_out = leave_one_out_ridge(t, y)
        losses = {}
        centered = t - t.mean(0)
        for ridge in RIDGES[:-1]:
            strength = ridge * centered.square().sum(1).mean()
            predictions = []
            for i in range(len(t)):
                rest = [j for j in range(len(t)) if j != i]
                x, z = t[rest] - t[rest].mean(0), y[rest] - y[rest].mean(0)
                beta = torch.linalg.solve(x.T @ x + strength * torch.eye(5), x.T @ z)
                predictions.append(y[rest].mean(0) + (t[i] - t[rest].mean(0)) @ beta)
            losses[ridge] = (torch.stack(predictions), float((torch.stack(predictions) - y).square().sum()))
        best = min(losses, key=lambda ridge: losses[ridge][1])
        mean_alone = torch.stack([y[[j for j in range(8) if j != i]].mean(0) for i in range(8)])
        expected = losses[best][0] if losses[best][1] < (mean_alone - y).square().sum() else mean_alone
        assert torch.allclose(left_out + y.mean(0), expected, atol=1e-8)

    def test_rows_that_sum_to_zero_do_not_leak_the_left_out_one(self):
        """Random targets cannot be predicted, though centered rows determine the missing one."""
        g = rng(2)
        t, y = torch.randn(12, 40, generator=g), torch.randn(12, 40, generator=g)
        y = y - y.mean(0)
        _, left_out = leave_one_out_ridge(t, y)
        assert float(F.cosine_similarity(left_out, y, dim=1).mean()) < 0.2

    def test_a_linear_map_is_recovered(self):
        g = rng(4)
        t, law = torch.randn(30, 6, generator=g), torch.randn(6, 4, generator=g)
        ridge_map, left_out = leave_one_out_ridge(t, t @ law + 3)
        assert torch.allclose(ridge_map, law, atol=0.1)
        assert float(F.cosine_similarity(left_out, (t - t.mean(0)) @ law, dim=1).mean()) > 0.98


class TestMixture:
    def test_scaling_and_centering_change_no_decision_of_the_teacher(self, toy_data):
        _, x, _ = toy_data
        weight, bias = (
            7 * unit(torch.randn(CLASSES, DIM, generator=rng(5))),
            torch.randn(CLASSES, generator=rng(6)),
        )
        rows, offset = teacher_rows(weight, bias)
        assert torch.equal((x @ rows.T + offset).argmax(1), (x @ weight.T + bias).argmax(1))
        assert rows.mean(0).abs().max() < 1e-6 and offset.mean().abs() < 1e-6
        assert float(rows.square().sum(1).mean()) == pytest.approx(1, abs=1e-5)

    def test_the_owners_weight_is_taken_as_it_is(self, toy_data):
        text, *_ = toy_data
        weight = torch.randn(CLASSES, DIM, generator=rng(7))
        mixture = mix(text, weight, owner_weight=0.4)
        assert torch.allclose(mixture.class_weights, text + 0.4 * teacher_rows(weight)[0], atol=1e-6)
        assert (mixture.teacher_weight, mixture.reason) == (0.4, "the owner's cross-validation")
        assert not mixture.bias.any()

    def test_statistics_match_loops(self, toy_data):
        text, x, labels = toy_data
        weight = torch.stack([x[labels == c].mean(0) for c in range(CLASSES)])
        nearest_text_cosine, retrieval_accuracy, text_teacher_cosine = text_teacher_statistics(text, weight)
        w = unit(weight - weight.mean(0))
        t = text - text.mean(0)
        scores = np.array([[float(w[r] @ t[c]) for c in range(CLASSES)] for r in range(CLASSES)])
        scores -= scores.mean(0)
        others = [max(float(text[i] @ text[j]) for j in range(CLASSES) if j != i) for i in range(CLASSES)]
        assert nearest_text_cosine == pytest.approx(np.mean(others), abs=1e-5)
        assert retrieval_accuracy == pytest.approx((scores.argmax(1) == np.arange(CLASSES)).mean())
        assert text_teacher_cosine == pytest.approx(
            np.mean([float(w[c] @ t[c] / t[c].norm()) for c in range(CLASSES)]), abs=1e-5
        )

    def test_the_weight_rises_with_agreement_and_with_text_similarity(self, toy_data):
        text, x, labels = toy_data
        means = torch.stack([x[labels == c].mean(0) for c in range(CLASSES)])
        noise = torch.randn(CLASSES, DIM, generator=rng(8))
        assert predict_teacher_weight(text, means) > predict_teacher_weight(text, noise)
        similar = unit(text + 4 * text.mean(0))
        assert predict_teacher_weight(similar, means) > predict_teacher_weight(text, means)
        assert TEACHER_WEIGHT_RANGE[0] <= predict_teacher_weight(text, noise) <= TEACHER_WEIGHT_RANGE[1]

    def test_a_teacher_trained_from_text_is_used_unchanged(self, toy_data):
        text, *_ = toy_data
        weight = text + 0.1 * unit(torch.randn(CLASSES, DIM, generator=rng(9)))
        mixture = mix(text, weight)
        assert math.isinf(mixture.teacher_weight) and mixture.loo_predictability == 0
        assert torch.allclose(mixture.class_weights, teacher_rows(weight)[0], atol=1e-6)

    @pytest.mark.parametrize("classes", [1, 2, 3])
    @pytest.mark.parametrize("whitened", [False, True])
    def test_few_classes_and_equal_ones(self, classes, whitened):
        geometry = measure_feature_statistics(torch.randn(200, DIM, generator=rng())) if whitened else None
        text = unit(torch.ones(classes, DIM))
        mixture = mix(text, torch.ones(classes, DIM), geometry=geometry)
        assert torch.isfinite(mixture.class_weights).all() and torch.isfinite(mixture.text_to_weight).all()


class TestGeometry:
    def test_measures_what_the_features_were_drawn_with(self):
        g = rng(1)
        root = torch.diag(torch.linspace(0.2, 2, DIM))
        labels = torch.arange(400).repeat_interleave(10)
        means = 5 * torch.eye(DIM)[0] + torch.randn(400, DIM, generator=g)
        x = means[labels] + 0.05 * torch.randn(4000, DIM, generator=g) @ root
        scatter = measure_feature_statistics(x, labels).scatter
        true = (root @ root)[1:, 1:]  # the mean's own direction is lost on the sphere
        assert F.cosine_similarity(scatter[1:, 1:].flatten(), true.flatten(), dim=0) > 0.97
        assert measure_feature_statistics(x).scatter.trace() == pytest.approx(1, abs=1e-5)

    def test_whitening_undoes_the_scatter_and_noise_has_it(self):
        scatter = torch.diag(torch.linspace(0.1, 3, DIM))
        geometry = FeatureStatistics(torch.eye(DIM)[0], scatter / scatter.trace())
        eye = torch.eye(DIM)
        expected = torch.linalg.inv((scatter / scatter.trace() * DIM + 3 * eye) / 4)
        assert torch.allclose(geometry.whiten(eye), expected, atol=1e-5)
        drawn = geometry.noise(20_000, rng())
        assert torch.allclose(drawn.T @ drawn / 20_000, geometry.scatter, atol=5e-3)

    def test_file_round_trip_and_broken_ones(self, tmp_path):
        geometry = measure_feature_statistics(
            torch.randn(150, DIM, generator=rng()), backbone="b", source="images"
        )
        geometry.save(tmp_path / "g.safetensors")
        loaded = FeatureStatistics.load(tmp_path / "g.safetensors")
        assert torch.equal(loaded.scatter, geometry.scatter) and repr(loaded) == repr(geometry)
        Teacher(torch.eye(2), ["a", "b"]).save(tmp_path / "t.safetensors")
        for path, message in (("none", "no such geometry file"), ("t.safetensors", "found teacher")):
            with pytest.raises(UserError, match=message):
                FeatureStatistics.load(tmp_path / path)
        with pytest.raises(UserError, match="100 images or more, got 3"):
            measure_feature_statistics(torch.eye(3))


class TestCard:
    def test_ranks_count_within_a_class(self):
        assert rank_in_class(torch.tensor([1, 0, 1, 1, 0])).tolist() == [0, 0, 1, 2, 1]

    def test_the_spread_of_known_means(self):
        """Many images of few: the true coherence and cone, where the plain mean of two images is far off."""
        g = rng(5)
        d, classes, coherence, cone = 256, 60, 0.8, 0.9
        axis = torch.eye(d)[0]
        own = unit(torch.randn(classes, d, generator=g) * (1 - axis))
        mean = coherence * unit(cone * axis + math.sqrt(1 - cone**2) * own)
        labels = torch.arange(classes).repeat_interleave(2)
        x = unit(
            mean[labels] + math.sqrt(1 - coherence**2) * torch.randn(len(labels), d, generator=g) / d**0.5
        )
        assert estimate_class_spread(x, labels, classes) == pytest.approx((coherence, cone), abs=0.03)
        assert estimate_class_spread(x[::2], labels[::2], classes) == (None, None)

    def test_finds_a_strength_and_a_weight_that_beat_text_and_the_papers_teacher(self, toy_data):
        text, x, labels = toy_data
        card = cross_validate(x, labels, text)
        assert card.images == [12] * CLASSES and card.accuracy is not None
        assert card.accuracy["mixture"] >= max(card.accuracy["text"], card.accuracy["teacher"])
        fold = rank_in_class(labels) % 3
        hits = 0
        for f in range(3):  # the accuracy on the card, by scikit-learn alone
            model = LogisticRegression(C=card.strength, max_iter=100, fit_intercept=False)
            model.fit(x[fold != f], labels[fold != f])
            rows = unit(torch.from_numpy(model.coef_).float())
            rows = rows - rows.mean(0)
            rows = rows / rows.square().sum(1).mean().sqrt()
            scores = x[fold == f] @ (text + card.weight * rows).T
            hits += int((scores.argmax(1) == labels[fold == f]).sum())
        assert card.accuracy["mixture"] == pytest.approx(100 * hits / len(labels), abs=0.9)

    def test_the_least_of_equally_good_weights_is_chosen(self):
        right = torch.zeros(2, 14, 300, dtype=torch.bool)
        right[1, :, :200] = True
        assert one_standard_error_choice(right) == (1, 0)
        right[1, 6:, 200:260] = True  # equally good, and clearly better than the others
        assert one_standard_error_choice(right) == (1, 8)  # the first whose neighbors are as good
        right[0] = True
        assert one_standard_error_choice(right) == (0, 0)

    def test_the_chosen_weight_is_better_than_the_best_of_noisy_accuracies(self):
        """A curve whose truth is known, seen on 300 images that most weights agree on."""
        g = rng(3)
        truth = torch.tensor(
            [0.60, 0.62, 0.65, 0.68, 0.71, 0.73, 0.74, 0.74, 0.73, 0.71, 0.69, 0.67, 0.65, 0.63]
        )
        lost = weight = best = 0.0
        for _ in range(200):
            ease = torch.rand(
                300, generator=g
            )  # how hard an image is, the same for all weights, and some noise
            right = ease + 0.1 * torch.randn(14, 300, generator=g) < truth[:, None]
            _, column = one_standard_error_choice(right[None])
            plain = int(right.double().mean(1).argmax())
            lost += float(truth.max() - truth[column]) / 200
            best += float(truth.max() - truth[plain]) / 200
            weight += (column - plain) / 200
        assert lost < best + 0.002 and weight < -0.3  # as good, and a smaller weight

    def test_too_few_images_leave_the_weight_to_the_client(self, toy_data):
        text, x, labels = toy_data
        few = rank_in_class(labels) < 2
        card = cross_validate(x[few], labels[few], text)
        assert (card.weight, card.accuracy, card.strength) == (None, None, 0.316)

    def test_goes_with_the_teachers_file(self, toy_data, tmp_path):
        text, x, labels = toy_data
        names = [f"class {i}" for i in range(CLASSES)]
        teacher = fit_teacher(x, labels, names, text=text)
        teacher.save(tmp_path / "t.safetensors")
        assert Teacher.load(tmp_path / "t.safetensors").card == teacher.card
        assert fit_teacher(x, labels, names).card is None

    @pytest.mark.parametrize(
        "changes",
        [3, {}, {"images": [1]}, {"weight": -1.0}, {"weight": float("nan")}, {"strength": 0}, {"cone": 2.0}],
    )
    def test_a_card_that_cannot_be_is_refused(self, changes):
        values = TeacherCard([3, 3], 1.0, 0.2, {"text": 50.0}, 0.9, 0.9).as_dict()
        assert TeacherCard.from_dict(values, 2).weight == 0.2
        with pytest.raises(UserError, match="its card"):
            TeacherCard.from_dict(values | changes if changes and isinstance(changes, dict) else changes, 2)
