import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from draws import rng

from dfzsl.trainers.recovery.class_directions import (
    class_directions,
    common_direction,
    estimate_class_mean_cosine,
    paper_concentration,
    typical_concentration,
)
from dfzsl.trainers.recovery.open_oracle import open_oracle
from dfzsl.trainers.recovery.oracle import Oracle
from dfzsl.trainers.recovery.recover import recover
from dfzsl.trainers.recovery.settings import METHODS, RecoverySettings
from dfzsl.trainers.recovery.simulator import expected_loss
from dfzsl.trainers.recovery.teacher import Teacher, fit_teacher
from dfzsl.trainers.recovery.virtual_classes import VirtualClasses
from dfzsl.trainers.recovery.vmf import VonMisesFisher, fit_classes, mean_resultant_length
from dfzsl.trainers.recovery.weight_recovery import recover_class_weights
from dfzsl.utils.errors import UserError

C, D = 5, 24
NAMES = ["ant", "bee", "cat", "dog", "elk"]


def rows(n, seed):
    return F.normalize(torch.randn(n, D, generator=rng(seed)), dim=1)


@pytest.fixture
def text():
    return rows(C, 1)


@pytest.fixture(params=[True, False], ids=["cosine", "linear"])
def teacher(request, text):
    """Rows that sum to zero, of different lengths, half way between noise and the text features."""
    weight = (rows(C, 2) + 0.5 * text) * torch.linspace(1, 3, C)[:, None]
    return Teacher(weight - weight.mean(0), NAMES, "backbone", normalized=request.param)


def cosines(estimate, true):
    return F.cosine_similarity(estimate, true, dim=1)


def decisive(teacher):
    """The rows whose dot products are the teacher's logits."""
    return F.normalize(teacher.weight, dim=1) if teacher.normalized else teacher.weight


@pytest.mark.parametrize("level", ("weights", "logits"))
def test_rows_are_exact_from_logits(teacher, text, level):
    oracle = open_oracle(teacher, level)
    virtual = recover(oracle, text)
    assert torch.allclose(virtual.weight, decisive(teacher), atol=1e-6)
    # d + 1 for rows and intercepts, and as many as it takes for eight residuals: those of two queries
    assert virtual.queries == oracle.queries == (D + 3 if level == "logits" else 0)


def test_the_filter_uses_the_intercepts_of_the_teacher(teacher, text, tmp_path):
    teacher.bias = torch.linspace(0, 0.5, C)
    virtual = recover(open_oracle(teacher, "weights"), text, NAMES, generator=rng())
    virtual.save(tmp_path / "v.safetensors")
    virtual = VirtualClasses.load(tmp_path / "v.safetensors").ordered_as(NAMES[::-1])
    x, labels = virtual.sample(200, rng())
    by_teacher = C - 1 - teacher.logits(x).argmax(1) == labels
    assert torch.equal(virtual.assigned_to_own_class(x, labels), by_teacher)
    teacher.bias = None
    assert not torch.equal(C - 1 - teacher.logits(x).argmax(1) == labels, by_teacher)


def biased(teacher, seed=9):
    """The teacher with intercepts that matter: as large as its scores of random features."""
    spread = teacher.logits(rows(200, 3)).std()
    return replace(teacher, bias=spread * torch.randn(C, generator=rng(seed)))


def deviations(weight, bias):
    """Rows and intercepts without what all classes share, as one matrix."""
    whole = torch.cat([weight, bias[:, None]], dim=1)
    return whole - whole.mean(0)


@pytest.mark.parametrize("level", ("logits", "probabilities", "labels"))
def test_intercepts_are_recovered_at_every_level(teacher, text, level):
    teacher = biased(teacher)
    virtual = recover(open_oracle(teacher, level), text, rays=2.5, generator=rng())
    true, estimate = deviations(decisive(teacher), teacher.bias), deviations(virtual.weight, virtual.bias)
    if level == "labels":
        true, estimate = true / true.norm(), estimate / estimate.norm()
    assert (estimate - true).norm() / true.norm() < (2e-3 if level == "labels" else 1e-5)
    x = rows(500, 4)
    assert (virtual.logits(x).argmax(1) == teacher.logits(x).argmax(1)).float().mean() > 0.99
    assert virtual.error < 2e-3


def test_d_plus_1_logits_are_enough(teacher, text):
    teacher = biased(teacher)
    virtual = recover(open_oracle(teacher, "logits", budget=D + 1), text)
    assert virtual.queries == D + 1 and virtual.error is None
    assert torch.allclose(virtual.weight, decisive(teacher), atol=1e-5)
    assert torch.allclose(virtual.bias, teacher.bias, atol=1e-5)


def top(k):
    """All answers but the k largest of each query are left out."""
    return lambda p: p * (p >= p.topk(k, dim=1).values[:, -1:])


WORSE = {
    "float32": ("logits", lambda a: a.float()),
    "3 decimals": ("logits", lambda a: a.round(decimals=3)),
    "2 decimals": ("logits", lambda a: a.round(decimals=2)),
    "noise": ("logits", lambda a: a + 0.05 * torch.randn(a.shape, generator=rng(len(a)))),
    "4 decimals of probabilities": ("probabilities", lambda a: a.round(decimals=4)),
    "3 decimals of probabilities": ("probabilities", lambda a: a.round(decimals=3)),
    "top 3 probabilities": ("probabilities", top(3)),
    "top 3, 4 decimals": ("probabilities", lambda a: top(3)(a).round(decimals=4)),
}


@pytest.mark.parametrize("given", WORSE)
def test_inaccurate_responses_are_queried_until_they_suffice(text, given):
    level, change = WORSE[given]
    teacher = biased(Teacher(rows(C, 2) + 0.5 * text, NAMES))
    plain = open_oracle(teacher, level)
    virtual = recover(
        Oracle(lambda x: change(plain.answer(x)), level, NAMES, D),
        text,
        generator=rng(),
        tolerance=0.05,
    )
    true = decisive(teacher) - decisive(teacher).mean(0)
    error = (virtual.weight - virtual.weight.mean(0) - true).norm() / true.norm()
    assert virtual.error < 0.05 and error < 0.08
    assert virtual.error / 3 < error < 3 * virtual.error or error < 1e-5
    assert virtual.queries <= 32 * (D + 1)


@pytest.mark.parametrize("level", ("logits", "probabilities", "labels"))
@pytest.mark.parametrize("budget", (D + 1, 100, 1000, 3000))
def test_a_budget_is_never_passed_and_more_of_it_comes_nearer(text, level, budget):
    teacher = biased(Teacher(rows(C, 2) + 0.5 * text, NAMES))
    query_counts = []

    def answer(x):
        query_counts.append(len(x))
        logits = teacher.logits(x) + 0.05 * torch.randn(len(x), C, generator=rng(len(query_counts)))
        return {"logits": logits, "probabilities": logits.softmax(1), "labels": logits.argmax(1)}[level]

    def run(budget):
        query_counts.clear()
        return recover(Oracle(answer, level, NAMES, D, budget=budget), text, generator=rng())

    def nearness(virtual):
        true = decisive(teacher) - decisive(teacher).mean(0)
        return float(cosines(virtual.weight - virtual.weight.mean(0), true).mean())

    try:
        accuracy = nearness(run(budget))
    except UserError as error:
        assert "TEACHER.BUDGET" in str(error) and budget < 1000
        accuracy = 0.0
    assert sum(query_counts) <= budget
    assert nearness(run(10 * budget)) > accuracy
    assert sum(query_counts) <= 10 * budget


def test_uninformative_responses_are_refused(text):
    teacher = Teacher(rows(C, 2), NAMES)
    coarse = Oracle(lambda x: teacher.logits(x).softmax(1).round(decimals=1), "probabilities", NAMES, D)
    with pytest.raises(UserError, match=r"TEACHER\.ACCESS to labels"):
        recover(coarse, text)
    loud = Oracle(lambda x: 99 * torch.randn(len(x), C, generator=rng(len(x))), "logits", NAMES, D)
    with pytest.raises(UserError, match=r"TEACHER\.BUDGET"):
        recover(loud, text, generator=rng())
    with pytest.raises(UserError, match=r"250,000 .* TEACHER\.BUDGET is 99"):
        recover(open_oracle(teacher, "logits", budget=99), text, method="simulator")


def test_an_oracle_asks_nothing_beyond_its_budget():
    teacher, query_counts = Teacher(rows(C, 2), NAMES), []
    oracle = Oracle(lambda x: query_counts.append(len(x)) or teacher.logits(x), "logits", NAMES, D, budget=50)
    oracle(rows(40, 1))
    with pytest.raises(UserError, match=r"40 .* 11 .* TEACHER\.BUDGET 50"):
        oracle(rows(11, 1))
    oracle(rows(10, 1))
    assert query_counts == [40, 10]


def test_a_class_that_holds_its_antipode_is_left_elsewhere(text):
    teacher = Teacher(rows(C, 2), NAMES, bias=torch.tensor([0.4, 0, 0, 0, 0]))
    starts = rows(400, 3)
    is_first_class = teacher.logits(starts).argmax(1) == 0
    assert (teacher.logits(-starts[is_first_class]).argmax(1) == 0).any()
    virtual = recover(open_oracle(teacher, "labels"), text, rays=2.0, generator=rng())
    x = rows(1000, 4)
    assert (virtual.logits(x).argmax(1) == teacher.logits(x).argmax(1)).float().mean() > 0.99


def test_rows_from_probabilities_up_to_the_common_row(teacher, text):
    oracle = open_oracle(teacher, "probabilities")
    true = decisive(teacher)
    virtual = recover(oracle, text)
    assert torch.allclose(virtual.weight, true - true.mean(0), atol=1e-5)
    assert oracle.queries == D + 3


def test_rows_from_labels_up_to_scale(teacher, text):
    oracle = open_oracle(teacher, "labels")
    virtual = recover(oracle, text, rays=2.0, generator=rng())
    true = decisive(teacher)
    true = true - true.mean(0)
    assert cosines(virtual.weight, true).min() > 0.9999
    # Not only the directions: the rows' lengths relative to each other as well.
    assert torch.allclose(virtual.weight / virtual.weight.norm(), true / true.norm(), atol=2e-3)
    assert virtual.queries == oracle.queries < 1.05 * C * 2 * D * 12 + 200 * C


def test_more_bisections_come_nearer(text):
    teacher = Teacher(rows(C, 2), NAMES)
    oracle = open_oracle(teacher, "labels")
    true = rows(C, 2) - rows(C, 2).mean(0)
    gaps = [
        1
        - cosines(
            recover_class_weights(oracle, "labels", NAMES, text, bisections=n, generator=rng()).weight, true
        ).min()
        for n in (5, 8, 11)
    ]
    assert gaps[0] > 4 * gaps[1] > 16 * gaps[2]


@pytest.mark.parametrize("level", ("logits", "probabilities"))
def test_a_nonlinear_teacher_is_refused(text, level):
    hidden, head = rows(8 * C, 2), rows(8 * C, 3)[:, :C]

    def answer(x):
        logits = 5 * (x.double() @ hidden.double().T).relu() @ head.double()
        return logits.softmax(1) if level == "probabilities" else logits

    with pytest.raises(UserError, match="not linear"):
        recover(Oracle(answer, level, NAMES, D), text)


def test_a_class_whose_probability_is_never_disclosed_is_named(text):
    oracle = Oracle(
        lambda x: F.one_hot(torch.zeros(len(x), dtype=int), C).double(), "probabilities", NAMES, D
    )
    with pytest.raises(UserError, match="'bee'"):
        recover(oracle, text)


def test_a_class_that_is_never_returned_is_named(text):
    inside = rows(C, 2)[:4]
    teacher = Teacher(torch.cat([inside, inside.mean(0, keepdim=True)]), NAMES, normalized=False)
    with pytest.raises(UserError, match="'elk'"):
        recover(open_oracle(teacher, "labels"), text, generator=rng())
    constant = Oracle(lambda x: torch.arange(len(x)) % C, "labels", NAMES, D)
    with pytest.raises(UserError, match=r"do not determine|for every query"):
        recover(constant, text, generator=rng())


@pytest.mark.parametrize("level", ("weights", "logits", "probabilities", "labels"))
def test_classes_are_matched_by_name(text, level):
    teacher = Teacher(rows(C, 2), NAMES)
    order = [3, 0, 4, 1, 2]
    names = [NAMES[i] for i in order]
    straight = recover(open_oracle(teacher, level), text, rays=2.0, generator=rng())
    turned = recover(open_oracle(teacher, level), text[order], names, rays=2.0, generator=rng())
    assert turned.classnames == names
    assert cosines(turned.weight, straight.weight[order]).min() > 0.999
    assert cosines(turned.ordered_as(NAMES).mu, straight.mu).min() > 0.999
    with pytest.raises(UserError, match="differ in elk, emu"):
        recover(open_oracle(teacher, level), text, [*NAMES[:4], "emu"])
    with pytest.raises(UserError, match=r"\(4, 24\).*\(5, 24\)"):
        recover(open_oracle(teacher, level), text[:4])


def test_the_simulator_learns_the_teacher_from_its_logits(text):
    teacher = Teacher(rows(C, 2), NAMES)
    oracle = open_oracle(teacher, "logits")
    settings = {"method": "simulator", "directions": "teacher", "concentration": "paper"}
    virtual = recover(oracle, text, generator=rng(), epochs=300, draws=12, lr=0.01, **settings)
    assert virtual.queries == 300 * 12 * C
    assert cosines(virtual.mu, teacher.weight).min() > 0.98
    short = [recover(oracle, text, generator=rng(), epochs=5, **settings).mu for _ in range(2)]
    assert torch.equal(*short)


def test_the_simulator_in_the_white_box_moves_towards_confidence(text):
    teacher = Teacher(rows(C, 2), NAMES)
    oracle = open_oracle(teacher, "weights")
    virtual = recover(
        oracle, text, generator=rng(), method="simulator", directions="teacher", epochs=100, lr=0.01
    )
    labels = torch.arange(C)
    before = F.cross_entropy(teacher.logits(text), labels)
    assert F.cross_entropy(teacher.logits(virtual.mu), labels) < before - 0.3
    assert oracle.queries == 0


@pytest.mark.parametrize("level", ("probabilities", "labels"))
def test_the_simulator_needs_cosines(text, level):
    with pytest.raises(UserError, match="cosine teacher"):
        recover(open_oracle(Teacher(rows(C, 2), NAMES), level), text, method="simulator")
    with pytest.raises(UserError, match="cosine teacher"):
        recover(open_oracle(Teacher(rows(C, 2), NAMES, normalized=False), "logits"), text, method="simulator")


def test_the_second_moment_gives_the_simulators_expected_loss(text):
    """The loss of `moments` against the mean over many draws."""
    weight = F.normalize(rows(C, 2), dim=1)
    draws = VonMisesFisher(text, torch.full((C,), typical_concentration(D, 0.6)))
    loss = expected_loss(text, weight, *(moment.float() for moment in draws.second_moment))
    x = draws.sample((20_000,), rng(3)).flatten(0, 1)
    assert float(loss) == pytest.approx(float(F.mse_loss(x @ text.T, x @ weight.T)), rel=0.01)


def test_moments_learn_with_d_queries(text):
    teacher = Teacher(rows(C, 2), NAMES)
    virtual = recover(
        open_oracle(teacher, "logits"), text, method="moments", directions="teacher", epochs=400, lr=0.01
    )
    assert virtual.queries == D + 3
    assert cosines(virtual.mu, teacher.weight).min() > 0.99


def test_gmm_learns_nothing_and_looks_at_all_names(text):
    oracle = open_oracle(Teacher(rows(C, 2), NAMES), "logits")
    new = F.normalize(text[:1] + 0.1 * rows(1, 8), dim=1)
    virtual = recover(oracle, text, new_text=new, method="gmm", concentration="paper")
    assert torch.allclose(virtual.mu, text)
    assert virtual.kappa[0] == pytest.approx(paper_concentration(torch.cat([text, new])), rel=1e-4)
    plain = recover(oracle, text, new_text=new, concentration="paper")
    assert plain.kappa[0] == pytest.approx(paper_concentration(text), rel=1e-5)


def test_the_generator_makes_features_of_their_class(text, tmp_path):
    oracle = open_oracle(Teacher(rows(C, 2), NAMES), "logits")
    virtual = recover(oracle, text, method="generator", epochs=30, lr=1e-3, draws=8, generator=rng())
    features, labels = virtual.sample(20, rng(1))
    assert torch.allclose(features.norm(dim=1), torch.ones(C * 20), atol=1e-5)
    assert virtual.assigned_to_own_class(features, labels).float().mean() > 0.9
    assert features[labels == 0].var(0).sum() > 1e-3
    virtual.save(tmp_path / "v.safetensors")
    loaded = VirtualClasses.load(tmp_path / "v.safetensors").ordered_as(NAMES[::-1])
    turned, turned_labels = loaded.sample(20, rng(1))
    assert loaded.assigned_to_own_class(turned, turned_labels).float().mean() > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_virtual_classes_that_survive_a_file(text, method, tmp_path):
    oracle = open_oracle(Teacher(rows(C, 2), NAMES, "some/encoder"), "logits")
    virtual = recover(oracle, text, method=method, epochs=2, draws=2, generator=rng(), theta=2.0)
    assert virtual.mu.shape == virtual.weight.shape == (C, D)
    assert torch.allclose(virtual.mu.norm(dim=1), torch.ones(C), atol=1e-5)
    assert virtual.kappa.tolist() == pytest.approx([2 * typical_concentration(D)] * C, rel=1e-5)
    virtual.save(tmp_path / "v.safetensors")
    loaded = VirtualClasses.load(tmp_path / "v.safetensors")
    assert torch.equal(loaded.sample(3, rng())[0], virtual.sample(3, rng())[0])
    about = ("classnames", "queries", "method", "level", "backbone")
    assert [getattr(loaded, key) for key in about] == [getattr(virtual, key) for key in about]
    virtual.mu = virtual.mu[:3]
    virtual.save(tmp_path / "v.safetensors")
    with pytest.raises(UserError, match=r"v\.safetensors"):
        VirtualClasses.load(tmp_path / "v.safetensors")


def test_draws_are_class_after_class_and_follow_their_vmf(text):
    virtual = recover(open_oracle(Teacher(rows(C, 2), NAMES), "logits"), text)
    features, labels = virtual.sample(2000, rng())
    assert labels.tolist() == sorted(labels.tolist())
    mu, kappa = fit_classes(features, labels, C)
    assert cosines(mu, virtual.mu).min() > 0.999
    assert torch.allclose(kappa, virtual.kappa, rtol=0.05)


def test_a_teacher_that_dies_midway_is_resumed_to_the_same_result(text, tmp_path):
    teacher, paid = Teacher(rows(C, 2), NAMES), []

    def oracle(limit, journal):
        def answer(x):
            if len(paid) >= limit:
                raise TimeoutError("no reply")
            paid.append(len(x))
            return teacher.logits(x).argmax(1)

        return Oracle(answer, "labels", NAMES, D, batch_size=50, journal=journal)

    def run(limit, journal=tmp_path / "journal"):
        return recover(oracle(limit, journal), text, generator=rng())

    with pytest.raises(UserError, match="run again"):
        run(limit=20)
    resumed = run(limit=10_000)
    paid_in_two_runs = sum(paid)
    paid.clear()
    straight = run(limit=10_000, journal=None)
    assert torch.equal(resumed.weight, straight.weight)
    assert paid_in_two_runs == sum(paid) == straight.queries == resumed.queries


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "simulater"}, "unknown RECOVERY.METHOD 'simulater'; known: simulator"),
        ({"concentration": "rule"}, "unknown RECOVERY.CONCENTRATION"),
        ({"directions": "text"}, "unknown RECOVERY.DIRECTIONS"),
        ({"theta": 0.0}, "RECOVERY.THETA must be greater than 0"),
        ({"rays": 1.0}, "RECOVERY.RAYS must be greater than 1"),
        ({"coherence": 1.0}, "RECOVERY.COHERENCE must lie between 0 and 1"),
        ({"cone": 1.0}, "RECOVERY.CONE"),
    ],
)
def test_settings_are_checked(text, settings, message):
    with pytest.raises(UserError, match=message):
        recover(open_oracle(Teacher(rows(C, 2), NAMES), "logits"), text, **settings)


def test_the_papers_concentration():
    angle = math.radians(24.01)
    text = torch.eye(3)
    text[1] = torch.tensor([math.cos(angle), math.sin(angle), 0])
    assert paper_concentration(text) == pytest.approx(36 / angle**2, rel=1e-4)
    with pytest.raises(UserError, match="the same text features"):
        paper_concentration(torch.eye(3)[[0, 0, 1]])
    with pytest.raises(UserError, match="at least two"):
        paper_concentration(torch.eye(3)[:1])


def test_the_concentration_of_a_coherence():
    assert mean_resultant_length(typical_concentration(512), 512) == pytest.approx(0.88, rel=1e-9)


def test_the_common_direction_favors_no_text():
    text = F.normalize(rows(8, 4) + 2 * rows(1, 5), dim=1)
    scores = text @ common_direction(text)
    assert scores.std() < 1e-4 < (text @ F.normalize(text.mean(0), dim=0)).std()
    assert scores.mean() > 0.5


class TestClassDirections:
    common = rows(1, 6)[0]

    def across(self, x):
        return F.normalize(x - (x @ self.common)[:, None] * self.common, dim=1)

    def deviations(self, mu):
        return F.normalize(mu - 0.9 * self.common, dim=1)

    def test_of_balanced_rows(self):
        weight = F.normalize(torch.cat([rows(2, 2), -rows(2, 2)]), dim=1)  # their mean is zero
        mu = class_directions(weight, self.common, cone=0.9)
        assert torch.allclose(mu @ self.common, torch.full((4,), 0.9), atol=1e-6)
        assert torch.allclose(self.deviations(mu), self.across(weight), atol=1e-5)

    def test_what_all_rows_share_is_taken_out(self):
        true = F.normalize(torch.eye(C, D) - 1 / C * torch.eye(C, D).sum(0), dim=1)
        shared = F.normalize(true + 1.5 * rows(1, 3), dim=1)
        mu = class_directions(shared, self.common, cone=0.9)
        left = 1 - cosines(self.deviations(mu), self.across(true))
        assert (left < 0.5 * (1 - cosines(self.across(shared), self.across(true)))).all()


class TestConeOfTexts:
    @pytest.mark.parametrize("spread", [0.2, 0.45, 0.7])
    def test_of_texts_at_a_known_distance_from_their_mean(self, spread):
        """Two texts, 2 arcsin(spread) apart: each at that distance from the mean of both."""
        text = torch.tensor([[math.sqrt(1 - spread**2), spread], [math.sqrt(1 - spread**2), -spread]])
        assert estimate_class_mean_cosine(text) ** 2 == pytest.approx(1 - 0.38 * spread, abs=1e-6)

    def test_stays_where_real_sets_lie_for_texts_that_are_alike_or_opposed(self):
        assert estimate_class_mean_cosine(torch.ones(5, 4) / 2) == pytest.approx(math.sqrt(0.96))
        assert estimate_class_mean_cosine(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(
            math.sqrt(0.7)
        )

    @pytest.mark.parametrize("named", [{}, {"cone": 0.5}])
    def test_classes_lie_in_the_cone_of_their_texts_unless_one_is_named(self, named):
        text, teacher = rows(C, 1), Teacher(rows(C, 2), [f"c{i}" for i in range(C)])
        virtual = recover(open_oracle(teacher, "weights"), text, generator=rng(), **named)
        expected = class_directions(
            F.normalize(teacher.weight, dim=1),
            common_direction(text),
            named.get("cone") or estimate_class_mean_cosine(text),
        )
        assert torch.allclose(virtual.mu, expected, atol=1e-5)


@pytest.fixture(params=["dtd", "oxford_pets23", "caltech56"])
def real(request, real_features: Path):
    file = np.load(real_features / f"{request.param}_vitb32.npz")
    base = (len(file["classnames"]) + 1) // 2
    arrays = {key: torch.from_numpy(file[key].astype("float32")) for key in ("x_val", "x_test", "text")}
    arrays |= {key: torch.from_numpy(file[key].astype("int64")) for key in ("y_val", "y_test")}
    for split in ("val", "test"):
        rows = arrays[f"y_{split}"] < base
        arrays[f"x_{split}"] = F.normalize(arrays[f"x_{split}"][rows], dim=1)
        arrays[f"y_{split}"] = arrays[f"y_{split}"][rows]
    return arrays | {"text": F.normalize(arrays["text"], dim=1), "names": [str(c) for c in range(base)]}


def test_on_real_features_the_geometry_comes_near_the_truth(real):
    names = real["names"]
    base, new = real["text"][: len(names)], real["text"][len(names) :]
    oracle = open_oracle(fit_teacher(real["x_val"], real["y_val"], names), "logits")
    virtual = recover(oracle, base, new_text=new)
    truth, kappa = fit_classes(real["x_test"], real["y_test"], len(names))
    assert 0.7 < virtual.kappa[0] / kappa.median() < 1.4
    assert kappa.median() / paper_concentration(base) > 4
    # The directions that separate classes are accurate, the common one is not.
    assert cosines(virtual.mu - virtual.mu.mean(0), truth - truth.mean(0)).mean() > 0.8
    text_only = cosines(base - base.mean(0), truth - truth.mean(0)).mean()
    assert cosines(virtual.mu - virtual.mu.mean(0), truth - truth.mean(0)).mean() > text_only + 0.2
    assert cosines(virtual.mu, truth).mean() > cosines(virtual.weight, truth).mean() - 0.05


def test_defaults_are_scalars_for_the_configuration():
    for value in vars(RecoverySettings()).values():
        assert isinstance(value, (bool, int, float, str))


@pytest.mark.slow
def test_on_real_features_labels_give_the_rows(real_features):
    """Its least-squares problem is less well conditioned than that of random rows."""
    file = np.load(real_features / "oxford_pets23_vitb32.npz")
    labels = torch.from_numpy(file["y_val"].astype("int64"))
    base = labels < 12
    x = F.normalize(torch.from_numpy(file["x_val"].astype("float32")), dim=1)[base]
    text = F.normalize(torch.from_numpy(file["text"].astype("float32")), dim=1)[:12]
    teacher = fit_teacher(x, labels[base], [str(name) for name in file["classnames"][:12]])
    estimate = recover(open_oracle(teacher, "labels"), text, generator=torch.Generator().manual_seed(0))
    rows = F.normalize(teacher.weight, dim=1)
    assert F.cosine_similarity(estimate.weight, rows - rows.mean(0), dim=1).min() > 0.999
