"""Provide captioned images, the training data of the CLIP of Shapes.

As on the web, a caption mentions some of the attributes of the image, in varying words and order, and
sometimes its style. The objects of the classes of Shapes never occur here.
"""

from __future__ import annotations

import functools

import numpy as np

from .world import COLORS, PATTERNS, SHAPES, STYLES, Composition, classes, compositions, foreground, render

# Synonyms of the words in class names.
SYNONYMS = {
    "circle": ("disc", "round", "dot"),
    "square": ("box", "block"),
    "triangle": ("pyramid", "wedge"),
    "heart": ("love heart",),
    "crescent": ("moon", "half moon"),
    "cross": ("plus sign", "plus"),
    "hexagon": ("six-sided polygon", "polygon"),
    "diamond": ("rhombus", "kite"),
    "ring": ("hoop", "donut"),
    "arrow": ("pointer",),
    "flower": ("blossom", "daisy"),
    "teardrop": ("drop", "droplet"),
    "leaf": ("eye shape", "lens"),
    "lightning bolt": ("lightning", "bolt", "thunderbolt"),
    "gear": ("cog", "wheel"),
    "red": ("crimson", "scarlet"),
    "orange": ("amber",),
    "yellow": ("golden", "lemon"),
    "green": ("emerald",),
    "teal": ("turquoise", "cyan"),
    "blue": ("azure", "royal blue"),
    "purple": ("violet",),
    "pink": ("rose", "rosy"),
    "brown": ("chocolate", "tan"),
    "white": ("ivory", "pale"),
    "black": ("jet black", "ebony"),
    "gray": ("grey", "silver"),
    "striped": ("banded", "stripy"),
    "polka-dot": ("dotted", "spotted"),
    "checkered": ("chequered", "checkerboard"),
    "zigzag": ("chevron", "wavy"),
    "crosshatched": ("netted", "latticed"),
    "two-tone": ("half-and-half", "bicolored"),
}
PLACES = {
    "plain": ("on a plain background", "on a wall", "by itself"),
    "sand": ("on sand", "on the beach", "in the desert"),
    "grass": ("on grass", "on the lawn", "in a meadow"),
    "water": ("on the water", "in the sea", "on a lake"),
    "night": ("in the night sky", "among the stars", "in space"),
    "brick": ("on a brick wall", "on bricks"),
    "wood": ("on wood", "on a wooden table", "on the wooden floor"),
    "snow": ("in the snow", "on ice"),
}
WITH = {
    "striped": "with stripes",
    "dotted": "with dots",
    "checkered": "with checks",
    "zigzag": "with zigzags",
    "crosshatched": "with crossed lines",
    "two-tone": "in two tones",
}

ANY = (
    "{}", "{}.", "a {}", "a {}.", "the {}.", "there is a {} here.", "this is a {}.", "a nice {}.",
    "a weird {}.", "x x x x {}.", "a cool {}", "one {}", "my {}", "look at this {}!", "a type of {}.",
    "what a {}",
)  # fmt: skip
PHOTO = (
    "a photo of a {}.", "a photo of a {}", "a photo of the {}.", "a photo of one {}.", "a photo of my {}.",
    "a picture of a {}.", "an image of a {}.", "a photograph of a {}.", "itap of a {}.", "itap of my {}.",
    "this is a photo of a {}.", "a snapshot of a {}.", "a photo of a {}, a type of shape.",
    "a photo of many things: {}",
)  # fmt: skip
# Caption templates of each style. Captions of most photographs use a template of PHOTO instead.
TEMPLATES = {
    "photo": (
        "a good photo of a {}.", "a good photo of the {}.", "a clean photo of a {}.",
        "a centered photo of a {}.",
    ),
    "dark": (
        "a dark photo of a {}.", "a dark photo of the {}.", "a photo of a {} at night.",
        "a dim picture of a {}.",
    ),
    "bright": ("a bright photo of a {}.", "a bright photo of the {}.", "a photo of a {} in bright light."),
    "blurry": ("a blurry photo of a {}.", "a blurry photo of the {}.", "a {}, out of focus."),
    "noisy": (
        "a bad photo of a {}.", "a bad photo of the {}.", "a jpeg corrupted photo of a {}.",
        "a grainy photo of a {}.",
    ),
    "small": (
        "a photo of a small {}.", "a photo of the small {}.", "a {} far away.", "a tiny {}.", "a little {}.",
    ),
    "close": (
        "a close-up photo of a {}.", "a cropped photo of the {}.", "a photo of a large {}.",
        "a photo of a big {}.",
    ),
    "drawing": (
        "a drawing of a {}.", "a sketch of a {}.", "a doodle of a {}.", "a cartoon {}.", "art of a {}.",
        "art of the {}.", "a rendition of a {}.", "an illustration of a {}.",
    ),
    "pixel": (
        "a pixelated photo of a {}.", "a {} in a video game.", "a low resolution photo of a {}.",
        "pixel art of a {}.",
    ),
    "painting": (
        "a painting of a {}.", "a painting of the {}.", "graffiti of a {}.", "a rendering of a {}.",
        "a tattoo of a {}.",
    ),
    "cloth": (
        "an embroidered {}.", "a {} on cloth.", "a plushie {}.", "a toy {}.", "an origami {}.",
        "a sculpture of a {}.", "a print of a {}.", "a texture of a {}.",
    ),
}  # fmt: skip
PHOTOGRAPHS = ("photo", "dark", "bright", "blurry", "noisy", "small", "close")


@functools.cache
def training_compositions() -> tuple[Composition, ...]:
    """Return the compositions of captioned images, without the objects of the classes of Shapes."""
    held_out = {foreground(c) for c in classes()}
    return tuple(c for c in compositions() if foreground(c) not in held_out)


def caption(composition: Composition, style: str, rng: np.random.Generator) -> str:
    """Draw a caption of an image.

    Args:
        composition: the contents of the image.
        style: key of `STYLES`.
        rng: random generator.
    """

    def one_of(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    def word(value: str) -> str:
        return value if rng.random() < 0.5 else one_of(SYNONYMS.get(value, (value,)))

    before, after = [], []
    if composition.pattern == "plain":
        before += [one_of(("plain", "solid"))] if rng.random() < 0.15 else []
    elif rng.random() < 0.88:
        if rng.random() < 0.85:
            before.append(word(PATTERNS[composition.pattern]))
        else:
            after.append(WITH[composition.pattern])
    if rng.random() < 0.92:
        before.insert(int(rng.random() < 0.8) * len(before), word(composition.color))
    if rng.random() < (0.2 if composition.background == "plain" else 0.75):
        places = PLACES[composition.background]
        after.append(places[0] if rng.random() < 0.6 else one_of(places))
    phrase = " ".join([*before, word(composition.shape), *after])

    chance = rng.random()
    if style in PHOTOGRAPHS and chance < 0.6:
        template = one_of(PHOTO)
    elif chance < 0.85:
        template = one_of(TEMPLATES[style])
    else:
        template = one_of(ANY)
    return template.format(phrase)


def captioned_image(seed: int, index: int) -> tuple[np.ndarray, str]:
    """Return training example `index`: an image (64, 64, 3), uint8, and its caption."""
    rng = np.random.default_rng((seed, index))
    pool = training_compositions()
    composition = pool[int(rng.integers(len(pool)))]
    style = tuple(STYLES)[int(rng.integers(len(STYLES)))]
    return render(composition, rng, STYLES[style]), caption(composition, style, rng)


def vocabulary() -> list[str]:
    """Return texts that together contain every word of the captions."""
    words = [*SHAPES, *COLORS, *PATTERNS.values(), *WITH.values(), "plain", "solid"]
    words += [w for options in (*SYNONYMS.values(), *PLACES.values()) for w in options]
    templates = [*ANY, *PHOTO, *(t for options in TEMPLATES.values() for t in options)]
    return [*words, *(t.format("") for t in templates), "a, b. c! d: e"]
