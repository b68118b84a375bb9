"""Numbers at their limits: a stage gives finite unit rows, or one line that says which class has none."""

from __future__ import annotations

from multiprocessing import get_context

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_proc, peak_memory
from torch import Tensor

from dfzsl.trainers.clip.aligned_text import AlignedText
from dfzsl.trainers.generation.calibrated_stacking import _margins
from dfzsl.trainers.generation.classifier import Classifier, ClassWeights
from dfzsl.trainers.generation.generate import generate
from dfzsl.trainers.generation.generators import GENERATORS
from dfzsl.trainers.generation.training import GenerationSettings
from dfzsl.trainers.recovery.class_directions import paper_concentration
from dfzsl.trainers.recovery.open_oracle import open_oracle
from dfzsl.trainers.recovery.oracle import LEVELS
from dfzsl.trainers.recovery.recover import recover
from dfzsl.trainers.recovery.settings import METHODS
from dfzsl.trainers.recovery.teacher import Teacher, fit_teacher
from dfzsl.trainers.recovery.virtual_classes import VirtualClasses
from dfzsl.trainers.recovery.vmf import VonMisesFisher
from dfzsl.utils.errors import UserError
from dfzsl.utils.numerics import check_unit_rows, unit

NAMES = ["ant", "bee", "cat", "dog", "elk", "fox"]
NEW = ["gnu", "hen", "ibis"]
SMALL = {"num_per_class": 12, "num_generated": 12, "classifier_steps": 8}
SCALES = (1e-42, 1e-30, 1e-14, 1e-6, 1e6, 1e18, 1e25, 1e37)


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def world(d: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher's rows (6, d), text features (6, d) of its classes and (3, d) of new ones."""
    rng = stream()
    common, own, off = (torch.randn(n, d, generator=rng) / d**0.5 for n in (1, 9, 9))
    means = F.normalize(2 * common + own, dim=1)
    text = F.normalize(means + off, dim=1)
    return means[:6] - means[:6].mean(0), text[:6], text[6:]


def stages(
    weight: Tensor,
    text: Tensor,
    new: Tensor,
    *,
    level: str = "weights",
    normalized: bool = True,
    generator: str = "closed_form",
    **recovery: object,
) -> tuple[VirtualClasses, Classifier]:
    """Stages 1 and 3, with what leaves them looked at."""
    names, made = NAMES[: len(weight)], GENERATORS.get(generator)
    oracle = open_oracle(Teacher(weight, names, normalized=normalized), level)
    virtual = recover(oracle, text, names, new_text=new, generator=stream(), **recovery)
    own = {} if made is None or generator == "vmf" else {"epochs": 2, "hidden": 16, "batch": 16}
    # Calibrating a generator takes many trainings, so only the closed form is calibrated.
    own |= {"calibrate": generator == "closed_form"}
    settings = GenerationSettings(name=generator, **SMALL, **own)
    classifier = generate(
        virtual,
        AlignedText(unit(text), unit(new), NEW[: len(new)]),
        settings=settings,
        generator=stream(),
    )
    trained = [] if generator == "closed_form" else [classifier.weight]
    for rows in (virtual.mu, *trained):
        assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), atol=1e-3)
    assert torch.isfinite(classifier.weight).all() and classifier.weight.dtype == torch.float32
    for values in (virtual.kappa, virtual.weight, classifier.bias):
        assert torch.isfinite(values).all()
    return virtual, classifier


@pytest.mark.parametrize("generator", [*GENERATORS, "none", "closed_form"])
def test_short_floats_in_every_stage(generator, tried):
    weight, text, new = world()
    kinds = (torch.float16, torch.bfloat16, torch.float64)
    for kind in kinds:
        stages(weight.to(kind), text.to(kind), new.to(kind), generator=generator)
        features = F.normalize(torch.randn(24, 24, generator=stream()), dim=1)
        if generator in GENERATORS:
            model = GENERATORS[generator](
                24, 24, **({} if generator == "vmf" else {"epochs": 1, "hidden": 8})
            )
            model.fit(features.to(kind), torch.arange(24) % 6, text.to(kind), stream())
            made = model.sample(new.to(kind), 4, stream())
            check_unit_rows(made, generator, "feature")
    tried("numbers", "float16, bfloat16 and float64 input, every generator", len(kinds), "float32, finite")


def test_a_narrow_distribution_in_float16():
    draws = VonMisesFisher(torch.ones(8).half(), torch.tensor(1e6)).sample((5,), stream())
    assert torch.isfinite(draws).all() and draws.std(0).max() < 0.01


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("normalized", [True, False])
def test_rows_of_any_length(level, normalized, tried):
    """A cosine teacher's rows have directions alone; a linear one's have lengths, which are theirs."""
    weight, text, new = world()
    usual, _ = stages(weight, text, new, level=level, normalized=normalized)
    said = 0
    for scale in SCALES:
        try:
            virtual, _ = stages(weight * scale, text, new, level=level, normalized=normalized)
        except UserError as error:  # probabilities are all 0 or 1, or all equal
            assert not normalized and level != "weights" and "\n" not in str(error)
            said += 1
        else:
            if normalized or level == "weights":
                assert torch.allclose(virtual.mu, usual.mu, atol=1e-2)
    assert said < len(SCALES)
    tried(
        "numbers",
        "teachers' rows of length 1e-42 to 1e37",
        len(SCALES),
        "the same directions, or one line",
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "rows",
    [
        lambda w: w[:1].repeat(6, 1),
        lambda w: w[:1] + 1e-7 * w,
        lambda w: torch.cat([w[:3], -w[:3]]),
        lambda w: w * torch.tensor([[1e-20], [1e20], [1.0], [1e-6], [1e6], [1.0]]),
    ],
    ids=["equal", "near-duplicates", "antipodal", "of all lengths"],
)
def test_teachers_that_hardly_tell_classes_apart(level, rows, tried):
    weight, text, new = world()
    try:
        stages(rows(weight), text, new, level=level)
    except UserError as error:
        if level == "labels":
            assert "never returned" in str(error)
        else:
            assert level != "weights"
            assert "are identical" in str(error) or "do not determine" in str(error)
    tried("numbers", "equal, near-duplicate, antipodal rows", 1, "finite, or one line")


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize(
    "texts",
    [
        lambda t: t[:1].repeat(9, 1),
        lambda t: t[:1] + 1e-6 * t,
        lambda t: torch.cat([t[:3], -t[:3], t[6:]]),
        lambda t: t * 1e30,
        lambda t: t * 1e-30,
    ],
    ids=["equal", "near-duplicates", "antipodal", "huge", "tiny"],
)
def test_names_that_mean_the_same_or_the_opposite(generator, texts, tried):
    weight, text, new = world()
    text = texts(torch.cat([text, new]))
    stages(weight, text[:6], text[6:], generator=generator)
    tried("numbers", "equal, near-duplicate, antipodal, huge, tiny text features", 1, "finite")


@pytest.mark.parametrize("method", METHODS)
def test_concentrations_from_none_to_infinite(method, tried):
    weight, text, new = world()
    for theta in (1e-9, 1e-3, 1e3, 1e9):
        stages(weight, text, new, method=method, theta=theta, epochs=2)
    for theta in (1e38, 1e300):
        with pytest.raises(UserError, match=r"RECOVERY\.THETA .* infinite; lower it"):
            stages(weight, text, new, method=method, theta=theta, epochs=2)
    tried("numbers", "RECOVERY.THETA 1e-9 to 1e300, every method", 6, "finite, or one line")


@pytest.mark.parametrize("d", [2, 3, 8, 64, 1024, pytest.param(4096, marks=pytest.mark.slow)])
def test_dimensions(d, tried):
    virtual, _ = stages(*world(d))
    draws, labels = virtual.sample(50, stream())
    cosine = (draws * virtual.mu[labels]).sum(1).mean()
    assert abs(float(cosine) - 0.88) < 0.08  # RECOVERY.COHERENCE, whatever d
    tried("numbers", "2 to 4,096 dimensions", 1, "finite, of the right spread")


@pytest.mark.parametrize(("base", "new"), [(1, 1), (2, 0), (2, 1), (3, 3)])
@pytest.mark.parametrize("generator", ["vmf", "cvae", "closed_form"])
def test_few_classes(base, new, generator):
    weight, text, more = world()
    stages(weight[:base], text[:base], more[:new], generator=generator)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_row_without_direction_is_named(bad, tried):
    weight, text, new = world()
    how = "is zero" if bad == 0 else "is not finite"

    def spoilt(rows: Tensor) -> Tensor:
        return torch.cat([rows[:2], torch.full_like(rows[:1], bad), rows[3:]])

    with pytest.raises(UserError, match=f"teacher.*'cat' {how}"):
        Teacher(spoilt(weight), NAMES)
    with pytest.raises(UserError, match=f"stage 1.*'cat' {how}"):
        stages(weight, spoilt(text), new)
    with pytest.raises(UserError, match=f"stage 1.*new classes.*row 2 {how}"):
        stages(weight, text, spoilt(new))
    virtual, _ = stages(weight, text, new)
    for base_text, new_text, name in ((spoilt(text), new, "cat"), (text, spoilt(new), "ibis")):
        with pytest.raises(UserError, match=f"stage 3.*'{name}' {how}"):
            generate(virtual, AlignedText(base_text, new_text, NEW), generator=stream())
    virtual.mu = spoilt(virtual.mu)
    with pytest.raises((UserError, ValueError), match=r"cat|loc must be finite and of non-zero length"):
        virtual.sample(2)
    tried("numbers", "a row that is zero, NaN or infinite", 6, "one line: stage, class, what of it")


def test_a_class_that_is_the_mean_of_all_has_no_row_of_its_own():
    """Probabilities show rows without their mean: of a class in the middle nothing is left."""
    weight, text, new = world()
    weight[2] = 0
    weight -= weight.mean(0) - weight[2]
    weight[3] -= weight.sum(0)
    weight[2] = 1e-8
    stages(weight, text, new, level="probabilities", normalized=False)
    with pytest.raises(UserError, match=r"mean direction of class 'ant' is zero"):
        stages(weight[:1], text[:1], new, level="probabilities", directions="teacher")


def test_teachers_from_next_to_nothing(tried):
    features = F.normalize(torch.randn(6, 24, generator=stream()), dim=1)
    labels = torch.arange(6)
    assert fit_teacher(features, labels, NAMES).logits(features).argmax(1).tolist() == list(range(6))
    assert fit_teacher(features.half(), labels, NAMES).weight.dtype == torch.float32
    with pytest.raises(UserError, match="'ant'"):
        fit_teacher(features[:1].repeat(12, 1), torch.arange(12) % 6, NAMES)
    close = fit_teacher(features[:1] + 1e-2 * features, labels, NAMES)
    assert torch.isfinite(close.weight).all()
    tried("numbers", "one image a class, equal images, near-duplicates", 4, "a teacher, or one line")


def test_lengths_do_not_overflow():
    x = torch.randn(5, 16, generator=stream())
    for scale in (1e-40, 1e-20, 1e19, 1e36):
        assert torch.allclose(unit(x * scale), F.normalize(x, dim=1), atol=1e-4)
    assert torch.equal(unit(x * 2.0**-60), F.normalize(x, dim=1))  # powers of two change no bit
    assert torch.equal(unit(torch.zeros(2, 3)), torch.zeros(2, 3))


def _many(out) -> None:
    """Stages 1 and 3 with 10,000 classes; sends the peak of memory that they add, in bytes."""
    torch.set_num_threads(1)
    before = peak_memory()
    rng, d, base, new = stream(), 32, 9_000, 1_000
    text = F.normalize(torch.randn(base + new, d, generator=rng), dim=1)
    weight = F.normalize(text[:base] + torch.randn(base, d, generator=rng) / d**0.5, dim=1)
    names = [str(c) for c in range(base + new)]
    virtual = recover(open_oracle(Teacher(weight, names[:base]), "logits"), text[:base], new_text=text[base:])
    paper_concentration(text)
    x, y = virtual.sample(10, rng)
    virtual.assigned_to_own_class(x, y)
    _margins(x, y, ClassWeights(virtual.weight, text[base:], torch.zeros(base)))
    settings = GenerationSettings(name="vmf", classifier_steps=3, calibrate=False)
    classifier = generate(
        virtual, AlignedText(text[:base], text[base:], names[base:]), settings=settings, generator=rng
    )
    assert classifier.weight.shape == (base + new, d)
    out.send(peak_memory() - before)


@pytest.mark.slow
@needs_proc
def test_ten_thousand_classes_in_bounded_memory(tried):
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_many, args=(theirs,))
    process.start()
    theirs.close()
    peak = ours.recv()
    process.join()
    assert peak < 3 * 2**30
    tried("numbers", "10,000 classes", 1, f"finite, in {peak / 2**30:.1f} GiB (d = 32)")
