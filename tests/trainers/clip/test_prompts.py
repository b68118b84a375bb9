from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from towers import CONFIGS, FAST, SentencePieces, plain_text_features, tiny

import dfzsl.trainers.clip.prompts as prompts
from dfzsl.trainers.clip.backbone import FeatureBackbone
from dfzsl.trainers.clip.learner import PromptLearner
from dfzsl.trainers.clip.loading import load_backbone
from dfzsl.trainers.clip.prompts import POSITIONS, Prompts
from dfzsl.utils.errors import UserError

NAMES = [
    "cat",
    "a very long class name of many words",
    "dog",
    "golden_retriever",
    "tiger cat",
    "St. Bernard's",
]
WORDS = [name.replace("_", " ") for name in NAMES]


def both_ways(name: str):
    backbone = tiny(name)
    if name == "tiny-both-ways":
        # A copy: the tower is shared with other tests, and knows the padding of its own tokenizer.
        backbone = copy.copy(backbone)
        backbone.__dict__.pop("pad_id", None)
        backbone.__dict__["tokenizer"] = SentencePieces(backbone.context_length, 49408)
    return backbone


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def compare(backbone, names, n_ctx, position, class_specific, images, seed=0):
    """Largest relative differences of features and of gradients to the plain encoding."""
    generator = torch.Generator().manual_seed(seed)
    layout = Prompts(backbone, names, n_ctx, position, class_specific)
    shape = (images, *([len(names)] if class_specific else []), n_ctx, layout.tower.width)
    context = (0.05 * torch.randn(shape, generator=generator)).requires_grad_()
    weight = torch.randn(images, len(names), backbone.dim, generator=generator)
    features = layout.encode(context)
    words = [name.replace("_", " ") for name in names]
    plain = torch.stack([plain_text_features(backbone, words, c, position) for c in context])
    (gradient,) = torch.autograd.grad((features * weight).sum(), context)
    (expected,) = torch.autograd.grad((plain * weight).sum(), context)
    return difference(features, plain), difference(gradient, expected)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "tiny-openai"])
def test_features_and_gradients_equal_the_plain_encoding(name, position):
    for class_specific, images in ((False, 1), (False, 3), (True, 3)):
        assert max(compare(both_ways(name), NAMES, 5, position, class_specific, images)) < 1e-5


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-both-ways"])
@pytest.mark.parametrize("class_specific", [False, True])
def test_chunks_with_recomputation_change_nothing(name, class_specific, monkeypatch):
    backbone = both_ways(name)
    for rows in (1, 20, 45):
        monkeypatch.setattr(backbone, "chunk_tokens", rows)
        assert max(compare(backbone, NAMES, 4, "end", class_specific, 3)) < 1e-5


def test_chunks_hold_few_activations(monkeypatch):
    """What autograd keeps does not grow with the number of classes once they are cut into chunks."""
    backbone = tiny("tiny-vit")
    monkeypatch.setattr(backbone, "chunk_tokens", 64)
    kept = []
    for classes in (50, 200):
        layout = Prompts(backbone, [f"thing number {i}" for i in range(classes)], 4)
        size = 0

        def pack(tensor):
            nonlocal size
            size += tensor.numel()
            return tensor

        context = torch.zeros(1, 4, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layout.encode(context)
        kept.append(size / classes)
    # Per class only the output, its norm and the like: not 3 layers of 14 * 64 values for each token.
    assert max(kept) < 10 * backbone.dim


def test_only_tokens_of_the_class_name_are_run():
    layout = Prompts(tiny("tiny-vit"), ["cat", "dog", "red fox", "grey wolf"], 4)
    (block,) = layout.blocks
    # Start and context once, then name, full stop and end token of each class.
    assert len(block.ids) == 5 + 3 + 3 + 4 + 4
    assert block.groups == ((2, 3), (2, 4))


def test_towers_with_a_cache_use_it():
    assert all(tiny(name).text_tower.cacheable == (name in FAST) for name in CONFIGS if name != "tiny-openai")


def test_a_layer_compiles_in_one_piece(monkeypatch):
    compiled = torch.compile(prompts._run_layer, backend="eager", fullgraph=True)
    monkeypatch.setattr(prompts, "_compiled_layer", lambda: compiled)
    backbone = tiny("tiny-vit")
    monkeypatch.setattr(backbone, "compiled", True)
    assert max(compare(backbone, NAMES, 4, "end", False, 2)) < 1e-5


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-both-ways", "tiny-coca"])
def test_low_precision_stays_close_and_gives_float32(name, monkeypatch):
    """The GPU's autocast, tried on the CPU's."""
    backbone = both_ways(name)
    learner = PromptLearner(backbone, NAMES, n_ctx=4)
    exact = learner()
    monkeypatch.setattr(backbone, "precision", "bf16")
    low = learner()
    (gradient,) = torch.autograd.grad(low[0].sum(), learner.ctx)
    assert low.dtype == gradient.dtype == torch.float32
    assert 0 < difference(low, exact) < 0.05
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(st.text("abc -'7_", min_size=1, max_size=30), min_size=1, max_size=7),
    n_ctx=st.integers(1, 20),
    position=st.sampled_from(POSITIONS),
)
def test_any_names_in_any_order(names, n_ctx, position):
    words = [name.replace("_", " ").strip() for name in names]
    backbone = tiny("tiny-custom")
    if len(set(words)) < len(words) or "" in words:
        with pytest.raises(UserError):
            Prompts(backbone, names, n_ctx, position)
    else:
        assert max(compare(backbone, names, n_ctx, position, False, 1)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ViT-B-16", "ViT-B-32", "RN50", "ViT-B-16-SigLIP", "ViT-L-14", "coca_ViT-B-32"]
)
def test_real_sizes_equal_the_plain_encoding(name):
    backbone = load_backbone(name, "random")
    if "SigLIP" in name:
        backbone.__dict__["tokenizer"] = SentencePieces(64, 32000)
    for position in POSITIONS:
        for class_specific, images in ((False, 1), (True, 1), (False, 2)):
            assert max(compare(backbone, NAMES[:4], 4, position, class_specific, images)) < 1e-4


# The prompt learner


@pytest.fixture
def backbone():
    return tiny("tiny-vit")


def test_words_begin_the_context(backbone):
    learner = PromptLearner(backbone, NAMES, n_ctx=16, ctx_init="a_photo of a")
    expected = backbone.class_features(NAMES, ["a photo of a {}."])
    assert learner.ctx.shape == (4, 64)
    torch.testing.assert_close(learner(), expected)


def test_words_of_several_tokens_count_their_tokens(backbone):
    learner = PromptLearner(backbone, NAMES, ctx_init="a photomicrograph of")
    assert learner.ctx.shape[0] > 3
    torch.testing.assert_close(learner(), backbone.class_features(NAMES, ["a photomicrograph of {}."]))


def test_class_specific_contexts_begin_alike_and_learn_apart(backbone):
    learner = PromptLearner(backbone, NAMES, ctx_init="a photo of a", class_specific=True)
    assert learner.ctx.shape == (len(NAMES), 4, 64)
    (gradient,) = torch.autograd.grad(learner()[2].sum(), learner.ctx)
    assert gradient[2].abs().max() > 0
    assert gradient[[0, 1, 3]].abs().max() == 0
    with pytest.raises(UserError, match="CSC"):
        learner.text_features(["bird"])


def test_state_dict_is_that_of_coop(backbone):
    learner = PromptLearner(backbone, NAMES, n_ctx=6, ctx_init="")
    state = learner.state_dict()
    ids = backbone.tokenizer([f"X X X X X X {word}." for word in WORDS])
    embedded = backbone.model.token_embedding(ids)
    assert list(state) == ["ctx", "token_prefix", "token_suffix"]
    torch.testing.assert_close(state["token_prefix"], embedded[:, :1])
    torch.testing.assert_close(state["token_suffix"], embedded[:, 7:])


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
def test_state_dict_has_the_same_shape_everywhere(backbone, position, class_specific):
    learner = PromptLearner(backbone, NAMES, 5, "", position, class_specific)
    state = learner.state_dict()
    assert state["token_prefix"].shape == (len(NAMES), 1, 64)
    assert state["token_suffix"].shape == (len(NAMES), 77 - 6, 64)


def test_a_checkpoint_of_other_classes_loads_strictly(backbone):
    trained = PromptLearner(backbone, NAMES[:3], n_ctx=4)
    learner = PromptLearner(backbone, NAMES[3:], n_ctx=4)
    learner.load_state_dict({key: value.half() for key, value in trained.state_dict().items()})
    torch.testing.assert_close(learner.ctx, trained.ctx.half().float())
    assert learner().shape == (3, 48)


def test_evaluation_encodes_once_until_the_context_changes(backbone, monkeypatch):
    learner = PromptLearner(backbone, NAMES, n_ctx=4)
    calls = []
    encode = learner.prompts.encode

    def counted(*given):
        calls.append(1)
        return encode(*given)

    monkeypatch.setattr(learner.prompts, "encode", counted)
    learner.eval()
    with torch.no_grad():
        first = learner()
        assert learner() is first
        learner.load_state_dict({"ctx": torch.ones(4, 64)})
        learner.eval()
        assert not torch.equal(learner(), first)
    assert len(calls) == 2


def test_text_features_of_other_classes(backbone):
    learner = PromptLearner(backbone, NAMES, n_ctx=4, position="middle")
    other = PromptLearner(backbone, ["bird", "fish"], n_ctx=4, position="middle")
    other.load_state_dict(learner.state_dict())
    torch.testing.assert_close(learner.text_features(["bird", "fish"]), other())


def test_the_frozen_model_is_not_part_of_the_learner(backbone):
    assert [name for name, _ in PromptLearner(backbone, NAMES).named_parameters()] == ["ctx"]


@pytest.mark.parametrize(
    ("names", "settings", "said"),
    [
        (["cat", "word " * 71], {"n_ctx": 4}, "word word"),
        (["cat", "dog", "cat"], {}, "'cat'"),
        (["red_fox", "red fox"], {}, "'red fox'"),
        (["cat", " "], {}, "class 1"),
        ([], {}, "class names"),
        (["cat"], {"n_ctx": 74}, "73"),
        (["cat"], {"n_ctx": 0}, "73"),
        (["cat"], {"ctx_init": "word " * 74}, "73"),
        (["cat"], {"position": "back"}, "'back'.*end, middle, front"),
    ],
)
def test_bad_input_is_one_clear_line(backbone, names, settings, said):
    with pytest.raises(UserError, match=said) as error:
        PromptLearner(backbone, names, **settings)
    assert "\n" not in str(error.value)


def test_the_largest_context_and_the_longest_name_fit(backbone):
    assert PromptLearner(backbone, ["cat"], n_ctx=73)().shape == (1, 48)
    assert PromptLearner(backbone, ["word " * 70], n_ctx=4)().shape == (1, 48)


def test_features_alone_learn_no_prompts():
    backbone = FeatureBackbone(8, {"cat": F.normalize(torch.ones(8), dim=0)})
    with pytest.raises(UserError, match=r"MODEL\.BACKBONE\.NAME"):
        PromptLearner(backbone, ["cat"])
