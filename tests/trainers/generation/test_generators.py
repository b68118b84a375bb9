"""Generators: one interface, checked over the whole registry; each one's mathematics; divergence."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from draws import rng

from dfzsl.io.tensors import load_tensors, save_tensors
from dfzsl.trainers.generation.generators import GENERATORS, NeuralGenerator, build_generator, load_generator
from dfzsl.trainers.generation.generators import base as base_module
from dfzsl.trainers.generation.generators.base import critic_loss, mlp
from dfzsl.trainers.generation.generators.cvae import encode
from dfzsl.trainers.recovery.vmf import VonMisesFisher
from dfzsl.utils.errors import UserError

DIM, CONDITION = 16, 16
QUICK = {
    "cvae": {"hidden": 64, "epochs": 12, "lr": 2e-3, "batch": 32},
    "clswgan": {"hidden": 64, "epochs": 40, "lr": 3e-3, "batch": 32, "critic_iter": 3, "class_weight": 0.1},
    "tfvaegan": {"hidden": 64, "epochs": 8, "lr": 2e-3, "batch": 32, "critic_iter": 1},
    "vmf": {},
}
NEURAL = sorted(set(GENERATORS) - {"vmf"})


def quick(name: str, **changes):
    return QUICK[name] | (changes if name in NEURAL else {})


@pytest.fixture(scope="module")
def world():
    """12 classes whose mean directions follow from their conditions by a linear map; the last 2 are new."""
    g = rng(3)
    conditions = F.normalize(torch.randn(12, CONDITION, generator=g), dim=1)
    turn = torch.eye(CONDITION) + 0.2 * torch.randn(CONDITION, DIM, generator=g)
    means = F.normalize(1.0 + conditions @ turn, dim=1)
    labels = torch.arange(10).repeat_interleave(60)
    features = VonMisesFisher(means[:10], 400.0).sample((60,), g).transpose(0, 1).reshape(-1, DIM)
    return features, labels, conditions, means


@pytest.fixture(scope="module")
def fitted(world):
    features, labels, conditions, _ = world
    return {
        name: build_generator(name, DIM, CONDITION, **quick(name)).fit(
            features, labels, conditions[:10], rng(1)
        )
        for name in GENERATORS
    }


@pytest.mark.parametrize("name", GENERATORS)
class TestEvery:
    def test_makes_unit_rows_class_by_class(self, name, fitted, world):
        conditions, means = world[2], world[3]
        made = fitted[name].sample(conditions, 30, rng(2))
        assert made.shape == (12 * 30, DIM)
        assert torch.allclose(made.norm(dim=1), torch.ones(len(made)), atol=1e-5)
        centered = made.view(12, 30, DIM).mean(1)
        centered, target = centered - centered.mean(0), means - means.mean(0)
        nearest = (F.normalize(centered, dim=1) @ F.normalize(target, dim=1).T).argmax(1)
        assert (nearest[:10] == torch.arange(10)).float().mean() > 0.5

    def test_new_classes_differ_as_their_means_do(self, name, fitted, world):
        conditions, means = world[2], world[3]
        made = fitted[name].sample(conditions[10:], 200, rng(2)).view(2, 200, DIM).mean(1)
        assert F.cosine_similarity(made[0] - made[1], means[10] - means[11], dim=0) > 0.1

    def test_same_seed_same_bytes_and_the_global_stream_is_left_alone(self, name, world):
        features, labels, conditions, _ = world
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        twice = [
            build_generator(name, DIM, CONDITION, **quick(name, epochs=1))
            .fit(features, labels, conditions[:10], rng(7))
            .sample(conditions[10:], 5, rng(8))
            for _ in range(2)
        ]
        assert torch.equal(*twice)
        assert torch.equal(torch.rand(3), expected)

    def test_file_round_trip(self, name, fitted, world, tmp_path):
        fitted[name].save(tmp_path / "g.safetensors")
        loaded = load_generator(tmp_path / "g.safetensors")
        assert type(loaded) is type(fitted[name]) and loaded.settings == fitted[name].settings
        a, b = (model.sample(world[2][10:], 4, rng(1)) for model in (loaded, fitted[name]))
        assert torch.equal(a, b)

    def test_no_condition_makes_no_feature(self, name, fitted):
        assert fitted[name].sample(torch.zeros(0, CONDITION), 5, rng()).shape == (0, DIM)

    def test_conditions_of_another_dimension(self, name, world):
        features, labels, conditions, _ = world
        model = build_generator(name, DIM, 5, **quick(name, epochs=1))
        model.fit(features, labels, conditions[:10, :5].contiguous(), rng())
        assert model.sample(conditions[10:, :5], 3, rng()).shape == (6, DIM)

    def test_faulty_input_is_one_clear_error(self, name, world):
        features, labels, conditions, _ = world
        model = build_generator(name, DIM, CONDITION, **quick(name))
        for x, y, t, said in (
            (features[:, :3], labels, conditions, "features"),
            (features, labels, conditions[:, :3], "conditions"),
            (features, labels, conditions[:9], "labels"),
            (features, labels, conditions, "feature"),
            (features * math.nan, labels, conditions[:10], "features|finite"),
        ):
            with pytest.raises(UserError, match=said):
                model.fit(x, y, t, rng())


def test_unknown_names_and_settings():
    with pytest.raises(UserError, match=r"'tfvaegann'.*tfvaegan"):
        build_generator("tfvaegann", 4, 4)
    with pytest.raises(UserError, match="epochs"):
        build_generator("cvae", 4, 4, epoch=3)
    with pytest.raises(UserError, match="hidden"):
        build_generator("vmf", 4, 4, hidden=3)


def test_broken_files_are_refused(tmp_path, fitted):
    path = tmp_path / "g.safetensors"
    with pytest.raises(UserError, match=r"g\.safetensors"):
        load_generator(path)
    save_tensors(path, {"x": torch.zeros(1)}, {"kind": "generator", "name": "vmf"})
    with pytest.raises(UserError, match=r"g\.safetensors"):
        load_generator(path)


def test_paper_settings_are_the_defaults():
    settings = build_generator("tfvaegan", 512, 512).settings
    paper = {"hidden": 1024, "lr": 3e-5, "epochs": 120, "batch": 64, "penalty": 10.0, "critic_iter": 5}
    paper |= {"recons_weight": 0.1, "feed_lr": 7e-4, "dec_lr": 5e-4, "freeze_dec": True, "feedback_loop": 2}
    paper |= {"a1": 0.01, "a2": 0.01}
    assert {key: settings[key] for key in paper} == paper


@pytest.mark.parametrize("penalty", [0.0, 10.0])
def test_critic_loss_and_its_gradient_are_those_of_two_graphs(penalty):
    critic = mlp(6, 8, 1).to_empty(device="cpu")
    for parameter in critic.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5, generator=rng())
    real, fake, a = (torch.randn(5, n, generator=rng(n)) for n in (4, 4, 2))
    mix = torch.rand(5, 1, generator=rng(9))
    x = (mix * real + (1 - mix) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(torch.cat([x, a], 1)).sum(), x, create_graph=True)
    apart = critic(torch.cat([fake, a], 1)).mean() - critic(torch.cat([real, a], 1)).mean()
    expected = apart + penalty * ((slope.norm(dim=1) - 1) ** 2).mean()
    found = critic_loss(critic, real, fake, a, penalty, rng(9))
    torch.testing.assert_close(found, expected)
    # The last bias adds the same to both scores, and the hidden one does not move a slope.
    for ours, theirs in zip(
        torch.autograd.grad(found, list(critic.parameters())),
        torch.autograd.grad(expected, list(critic.parameters()), allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_kl_of_the_encoder_agrees_with_torch():
    encoder = mlp(6, 8, 10).to_empty(device="cpu")
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5, generator=rng())
    x, a = torch.randn(7, 4, generator=rng(1)), torch.randn(7, 2, generator=rng(2))
    _, divergence = encode(encoder, x, a, rng(3))
    mean, log_variance = encoder(torch.cat([x, a], 1)).chunk(2, 1)
    q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    assert divergence.item() == pytest.approx(expected.item(), rel=1e-5)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", NEURAL)
class TestCheckpoint:
    def fit(self, name, world, checkpoint, **changes):
        features, labels, conditions, _ = world
        model, stream = (
            build_generator(name, DIM, CONDITION, **quick(name, epochs=4, patience=2, **changes)),
            rng(1),
        )
        model.fit(features, labels, conditions[:10], stream, checkpoint)
        return model, torch.randn(3, generator=stream)

    @pytest.mark.parametrize("holdout", [0.0, 0.3])
    def test_killed_after_any_epoch_it_ends_the_same(self, name, holdout, world, tmp_path, monkeypatch):
        model, after = self.fit(name, world, None, holdout=holdout)
        path, keep, kills = tmp_path / "kept.safetensors", NeuralGenerator._save_checkpoint, []

        def killed(*args):
            keep(*args)
            kills.append(1)
            raise Killed

        monkeypatch.setattr(NeuralGenerator, "_save_checkpoint", killed)
        while True:
            try:
                again, then = self.fit(name, world, path, holdout=holdout)
                break
            except Killed:
                pass
        assert len(kills) == len(model.history) - 1  # no epoch is trained twice
        assert again.history == model.history and torch.equal(then, after)
        for key, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key

    def test_another_file_is_refused(self, name, world, tmp_path):
        path = tmp_path / "kept.safetensors"
        self.fit(name, world, path)
        tensors, about = load_tensors(path, "generator checkpoint")
        for wrong in ({**about, "name": "vmf"}, {key: about[key] for key in about if key != "since"}):
            save_tensors(path, tensors, wrong)
            with pytest.raises(UserError, match=str(path)):
                self.fit(name, world, path)
        del tensors["now/feature_mean"]
        save_tensors(path, tensors, about)
        with pytest.raises(UserError, match=str(path)):
            self.fit(name, world, path)


class TestMonitor:
    def test_stops_when_held_out_classes_gain_nothing(self, world):
        features, labels, conditions, _ = world
        model = build_generator("cvae", DIM, CONDITION, hidden=64, epochs=400, lr=3e-3, patience=3)
        model.fit(features, labels, conditions[:10], rng())
        assert len(model.history) < 400
        best = min(range(1, len(model.history)), key=model.history.__getitem__)
        assert len(model.history) - 1 - best == 3

    def test_training_brings_generated_features_nearer(self, fitted):
        for name in NEURAL:
            assert min(fitted[name].history) < 0.9 * fitted[name].history[0]

    @pytest.mark.parametrize("name", NEURAL)
    def test_divergence_keeps_the_last_good_state(self, name, world, monkeypatch):
        features, labels, conditions, _ = world
        model = build_generator(name, DIM, CONDITION, **quick(name, epochs=6, batch=32))
        step, calls = model.step, []

        def breaks(batches, generator):
            calls.append(1)
            loss = step(batches, generator)
            # 9 classes of 60 rows are trained on in batches of 32: 17 steps an epoch.
            if len(calls) == 40:
                for parameter in model.parameters():
                    parameter.data.fill_(math.nan)
            return loss

        monkeypatch.setattr(model, "step", breaks)
        with pytest.warns(RuntimeWarning, match=f"'{name}'.*epoch 3"):
            model.fit(features, labels, conditions[:10], rng())
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())
        assert torch.isfinite(model.sample(conditions, 3, rng())).all()

    def test_divergence_from_the_start_is_an_error(self, world):
        features, labels, conditions, _ = world
        model = build_generator("clswgan", DIM, CONDITION, hidden=8, lr=1e30)
        with pytest.raises(UserError, match="first epoch"):
            model.fit(features, labels, conditions[:10], rng())

    def test_few_classes_are_all_trained_on(self, world):
        features, labels, conditions, _ = world
        few = labels < 2
        model = build_generator("cvae", DIM, CONDITION, **QUICK["cvae"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.fit(features[few], labels[few], conditions[:2], rng())
        assert len(model.history) == QUICK["cvae"]["epochs"] + 1


class TestVMF:
    def test_finds_a_linear_map(self):
        """With many classes and conditions in few dimensions, predictions of new classes are nearly exact."""
        g = rng(0)
        turn = 0.3 * torch.randn(4, DIM, generator=g)
        conditions = torch.randn(60, 4, generator=g)
        means = F.normalize(2.0 + conditions @ turn, dim=1)
        labels = torch.arange(50).repeat_interleave(40)
        features = VonMisesFisher(means[labels], 1e4).sample((), g)
        model = build_generator("vmf", DIM, 4).fit(features, labels, conditions[:50], g)
        assert (model.predict(conditions[50:]).loc * means[50:]).sum(1).min() > 0.99

    def test_text_that_says_nothing_predicts_nothing(self):
        """Conditions unrelated to the features: the mean of all, and a concentration that admits it."""
        g = rng(1)
        means = F.normalize(2.0 + torch.randn(40, DIM, generator=g), dim=1)
        labels = torch.arange(40).repeat_interleave(30)
        features = VonMisesFisher(means[labels], 1e4).sample((), g)
        conditions = F.normalize(torch.randn(40, DIM, generator=g), dim=1)
        model = build_generator("vmf", DIM, DIM).fit(features, labels, conditions, g)
        assert model.map.norm() < 0.5
        assert model.kappa < 500

    def test_leave_one_out_residuals_equal_refitting(self, world):
        """kappa rests on the closed form of leave-one-class-out; here every class is left out in earnest."""
        features, labels, conditions, _ = world
        model = build_generator("vmf", DIM, CONDITION).fit(features, labels, conditions[:10], rng())
        means = base_module.class_means(features, labels, 10)
        m, t = means - means.mean(0), conditions[:10] - conditions[:10].mean(0)
        rho = (m * t).sum() / t.square().sum()
        residual, size = m - rho * t, (t @ t.T).diagonal().mean()
        errors = {}
        for ridge in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0):
            error = []
            for c in range(10):
                keep = torch.arange(10) != c
                inside, middle = t[keep] - t[keep].mean(0), residual[keep].mean(0)
                inner = inside @ inside.T + ridge * size * torch.eye(9)
                beta = torch.linalg.solve(inner, residual[keep] - middle)
                error.append(residual[c] - middle - (t[c] - t[keep].mean(0)) @ inside.T @ beta)
            errors[ridge] = torch.stack(error)
        best = min(errors.values(), key=lambda error: float(error.square().sum()))
        cosine = (F.normalize(means - best, dim=1) * means).sum(1).mean()
        assert model.predict(conditions).mean_resultant_length[0].item() == pytest.approx(
            cosine.item(), abs=1e-4
        )
