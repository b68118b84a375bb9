"""Draw the images of Shapes, the built-in toy data set.

An image shows a `Composition` of shape, color, pattern and background. Position, size, rotation, light, color
cast, clutter, blur and noise vary as in real images. `render` needs neither files nor fonts and takes well
under a millisecond. The same generator state draws the same bytes.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

VERSION = 2  # increased with every change of the images; part of the folder name
SIZE = 64  # pixels, both sides

SHAPES = (
    "circle", "square", "triangle", "star", "heart", "crescent", "cross", "hexagon",
    "diamond", "ring", "arrow", "flower", "teardrop", "leaf", "lightning bolt", "gear",
)  # fmt: skip

COLORS = {
    "red": (205, 30, 35),
    "orange": (240, 130, 25),
    "yellow": (240, 215, 45),
    "green": (45, 150, 50),
    "teal": (20, 150, 150),
    "blue": (35, 75, 205),
    "purple": (125, 45, 165),
    "pink": (240, 130, 180),
    "brown": (120, 75, 40),
    "white": (240, 240, 240),
    "black": (28, 28, 32),
    "gray": (135, 135, 138),
}

# Words in class names. Plain patterns and backgrounds have none.
PATTERNS = {
    "plain": "",
    "striped": "striped",
    "dotted": "polka-dot",
    "checkered": "checkered",
    "zigzag": "zigzag",
    "crosshatched": "crosshatched",
    "two-tone": "two-tone",
}

BACKGROUNDS = {
    "plain": "",
    "sand": "on sand",
    "grass": "on grass",
    "water": "on the water",
    "night": "in the night sky",
    "brick": "on a brick wall",
    "wood": "on wood",
    "snow": "in the snow",
}


@dataclass(frozen=True)
class Composition:
    """The contents of an image: one value of each attribute."""

    shape: str
    color: str
    pattern: str
    background: str

    @property
    def name(self) -> str:
        """The class name, for example "striped red star on sand"."""
        words = (PATTERNS[self.pattern], self.color, self.shape, BACKGROUNDS[self.background])
        return " ".join(word for word in words if word)


def compositions() -> list[Composition]:
    """Return all compositions (16 shapes x 12 colors x 7 patterns x 8 backgrounds)."""
    return [Composition(*values) for values in itertools.product(SHAPES, COLORS, PATTERNS, BACKGROUNDS)]


@functools.cache
def classes() -> tuple[Composition, ...]:
    """Return the 120 classes of Shapes in label order; the first half are base classes, the second new ones.

    Classes form families of three: the second and third differ from the first in one attribute each, which is
    needed to distinguish them. Each half uses every value of every attribute, and no (shape, color, pattern)
    of one half occurs in the other.
    """
    draw = random.Random(1)
    values = (SHAPES, tuple(COLORS), tuple(PATTERNS), tuple(BACKGROUNDS))
    chosen: list[Composition] = []
    for half in range(2):
        taken = set() if half == 0 else {foreground(c) for c in chosen}
        decks = [draw.sample(v + v + v, 3 * len(v)) for v in values]
        decks = [sorted(set(deck), key=deck.index) + deck for deck in decks]
        decks = [draw.sample(deck[:20], 20) for deck in decks]
        for first in zip(*decks, strict=True):
            family: list[Composition] = []
            while len(family) < 3:
                attributes = list(first)
                if family:
                    axis = draw.randrange(4)
                    attributes[axis] = draw.choice(values[axis])
                member = Composition(*attributes)
                if foreground(member) in taken and not family:
                    first = (draw.choice(SHAPES), *first[1:])
                elif foreground(member) not in taken and member not in chosen + family:
                    family.append(member)
            chosen += family
    return tuple(chosen)


def foreground(composition: Composition) -> tuple[str, str, str]:
    """Return shape, color and pattern. The built-in CLIP is not trained on those of the classes."""
    return composition.shape, composition.color, composition.pattern


# ---------------------------------------------------------------------------------------------- drawing

Points = list[tuple[float, float]]


def _polygon(corners: int, inner: float = 0.0, start: float = -90.0) -> Points:
    """Return a regular polygon of radius 1, or a star with notches of radius `inner`."""
    count = 2 * corners if inner else corners
    angles = np.deg2rad(start) + 2 * np.pi * np.arange(count) / count
    radii = np.where(np.arange(count) % 2, inner, 1.0) if inner else np.ones(count)
    return list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True))


def _curve(x: Callable, y: Callable, count: int = 36) -> Points:
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return list(zip(x(angle), y(angle), strict=True))


def _crescent() -> Points:
    outer = np.linspace(0.25 * np.pi, 1.75 * np.pi, 24)
    inner = np.linspace(1.68 * np.pi, 0.32 * np.pi, 20)
    points = [(np.cos(a) + 0.15, np.sin(a)) for a in outer]
    return points + [(0.78 * np.cos(a) + 0.5, 0.84 * np.sin(a)) for a in inner]


def _gear() -> Points:
    radii = np.tile([1.0, 1.0, 0.72, 0.72], 8)
    angles = 2 * np.pi * (np.arange(32) + 0.5) / 32
    return list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True))


# Outline of each shape in a box of about [-1, 1] x [-1, 1], with y pointing down.
OUTLINES: dict[str, Points] = {
    "circle": _polygon(36),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -0.95), (1.0, 0.75), (-1.0, 0.75)],
    "star": _polygon(5, 0.42),
    "heart": _curve(
        lambda a: np.sin(a) ** 3,
        lambda a: -(13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)) / 16,
    ),
    "crescent": _crescent(),
    "cross": [
        (-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32),
        (0.32, 1), (-0.32, 1), (-0.32, 0.32), (-1, 0.32), (-1, -0.32), (-0.32, -0.32),
    ],
    "hexagon": _polygon(6),
    "diamond": [(0, -1.05), (0.68, 0), (0, 1.05), (-0.68, 0)],
    "ring": _polygon(36),
    "arrow": [
        (1, 0), (0.15, -0.8), (0.15, -0.32), (-1, -0.32), (-1, 0.32), (0.15, 0.32), (0.15, 0.8),
    ],
    "flower": _curve(
        lambda a: (0.72 + 0.28 * np.cos(6 * a)) * np.cos(a),
        lambda a: (0.72 + 0.28 * np.cos(6 * a)) * np.sin(a),
        count=60,
    ),
    "teardrop": _curve(lambda a: 0.75 * np.sin(a) * np.sin(a / 2) ** 1.5 * 1.25, lambda a: -np.cos(a)),
    "leaf": _curve(lambda a: np.cos(a), lambda a: 0.55 * np.sin(a) * np.abs(np.sin(a)) ** 0.5),
    "lightning bolt": [
        (0.25, -1), (-0.6, 0.15), (-0.08, 0.15), (-0.3, 1), (0.6, -0.25), (0.08, -0.25), (0.5, -1),
    ],
    "gear": _gear(),
}  # fmt: skip
HOLES = {"ring": 0.55, "gear": 0.3}  # radius of the hole


@dataclass(frozen=True)
class Style:
    """Rendering parameters of an image. Values are drawn uniformly from ranges."""

    cast: tuple[tuple[float, float], ...] = ((0.92, 1.08),) * 3  # factor of red, green and blue
    light: tuple[float, float] = (0.8, 1.15)  # overall factor
    gradient: float = 0.3  # largest change of light across the image
    noise: tuple[float, float] = (2, 12)  # standard deviation, in levels
    blur: tuple[float, float] = (0, 0.7)  # Gaussian radius, in pixels
    clutter: int = 2  # largest number of small objects
    scale: tuple[float, float] = (0.42, 0.72)  # object radius, relative to half the image
    finish: str = ""  # "", "drawing", "pixel", "painting", "cloth"


STYLES = {
    "photo": Style(),
    "dark": Style(light=(0.35, 0.6)),
    "bright": Style(light=(1.2, 1.5)),
    "blurry": Style(blur=(1.0, 1.8)),
    "noisy": Style(noise=(18, 34)),
    "small": Style(scale=(0.3, 0.42)),
    "close": Style(scale=(0.75, 0.95), clutter=0),
    "drawing": Style(noise=(0, 3), gradient=0, clutter=1, finish="drawing"),
    "pixel": Style(noise=(0, 3), finish="pixel"),
    "painting": Style(noise=(0, 6), finish="painting"),
    "cloth": Style(noise=(2, 8), gradient=0.15, finish="cloth"),
}

# The style of Shapes: warm light, cloth texture, clutter. It differs from all styles above.
LAMPLIGHT = Style(
    cast=((1.0, 1.12), (0.84, 0.96), (0.6, 0.8)),
    light=(0.6, 1.0),
    gradient=0.5,
    noise=(4, 14),
    blur=(0.2, 0.9),
    clutter=3,
    scale=(0.4, 0.68),
    finish="cloth",
)


def render(composition: Composition, rng: np.random.Generator, style: Style = STYLES["photo"]) -> np.ndarray:
    """Draw an image.

    Args:
        composition: its contents.
        rng: generator of everything random.
        style: its rendering parameters.

    Returns:
        (SIZE, SIZE, 3), uint8.
    """
    image = _backdrop(composition.background, rng)
    image = _clutter(image, int(rng.integers(style.clutter + 1)), rng)
    image = _place(image, composition, rng, style)
    image = _light(image, rng, style)
    return _develop(image, rng, style)


def _backdrop(background: str, rng: np.random.Generator) -> np.ndarray:
    """Draw a window of the background's texture with random brightness, (SIZE, SIZE, 3), float32."""
    left, top = rng.integers(0, 256 - SIZE, 2)
    window = _texture(background)[top : top + SIZE, left : left + SIZE]
    if background == "plain":  # random dull color
        return window + (rng.uniform(-45, 45, 3) + rng.uniform(-60, 60)).astype(np.float32)
    return window + np.float32(rng.uniform(-14, 14))


def _clutter(image: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw small shapes near the border of the image."""
    canvas = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    brush = ImageDraw.Draw(canvas)
    for _ in range(count):
        outline = OUTLINES[SHAPES[rng.integers(len(SHAPES))]]
        color = list(COLORS.values())[rng.integers(len(COLORS))]
        angle, turn = rng.uniform(0, 2 * np.pi, 2)
        center = 0.9 * np.cos(angle), 0.9 * np.sin(angle)
        _fill(brush, outline, center, rng.uniform(0.1, 0.22), turn, color)
    return np.asarray(canvas, np.float32)


def _place(image: np.ndarray, composition: Composition, rng: np.random.Generator, style: Style) -> np.ndarray:
    """Draw the object: outline, pattern in two shades of the color, shadow or contour."""
    scale, turn = rng.uniform(*style.scale), np.deg2rad(rng.uniform(-25, 25))
    center = (rng.uniform(-1, 1, 2) * max(0.0, 0.95 - scale)).tolist()
    canvas = Image.new("L", (2 * SIZE, 2 * SIZE))
    brush = ImageDraw.Draw(canvas)
    _fill(brush, OUTLINES[composition.shape], center, scale, turn, 255)
    if hole := HOLES.get(composition.shape):
        _fill(brush, OUTLINES["circle"], center, scale * hole, turn, 0)
    mask = canvas.reduce(2)
    cover = np.asarray(mask, np.float32)[..., None] / 255

    ink = np.asarray(COLORS[composition.color]) * rng.uniform(0.85, 1.12) + rng.uniform(-14, 14, 3)
    ink = np.clip(ink, 0, 255).astype(np.float32)
    shade = ink + (255 * (ink.mean() < 128) - ink) * np.float32(rng.uniform(0.5, 0.75))
    x, y = _grid()
    x, y = (x - np.float32(center[0])) / np.float32(scale), (y - np.float32(center[1])) / np.float32(scale)
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    spots = _pattern(composition.pattern, x * cos + y * sin, y * cos - x * sin, rng.uniform(0.45, 0.75))
    fill = ink + (shade - ink) * spots[..., None]

    if style.finish == "drawing":
        fill *= 1 - np.asarray(mask.filter(ImageFilter.FIND_EDGES), np.float32)[..., None] / 255
    else:
        shadow = np.roll(cover, (rng.integers(1, 4), rng.integers(-3, 4)), (0, 1))
        image = image * (1 - np.float32(rng.uniform(0, 0.5)) * shadow)
    return image + (fill - image) * cover


def _light(image: np.ndarray, rng: np.random.Generator, style: Style) -> np.ndarray:
    """Apply colored light with a gradient, and the threads of a cloth."""
    x, y = _grid()
    angle, fall = rng.uniform(0, 2 * np.pi), rng.uniform(0, style.gradient)
    ramp = 1 + x * np.float32(fall * np.cos(angle)) + y * np.float32(fall * np.sin(angle))
    cast = rng.uniform(*style.light) * rng.uniform(*np.transpose(style.cast))
    image = image * ramp[..., None] * cast.astype(np.float32)
    return image * _weave(int(rng.integers(4))) if style.finish == "cloth" else image


def _develop(image: np.ndarray, rng: np.random.Generator, style: Style) -> np.ndarray:
    """Apply coarse pixels or few tones, blur and noise, and convert to uint8."""
    canvas = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    if style.finish == "pixel":
        side = int(rng.integers(20, 31))
        coarse = canvas.resize((side, side), Image.Resampling.BOX)
        canvas = coarse.resize((SIZE, SIZE), Image.Resampling.NEAREST)
    elif style.finish == "painting":
        canvas = ImageOps.posterize(canvas.filter(ImageFilter.BoxBlur(1)), 3)
    canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(*style.blur)))
    start = rng.integers(_grain().size - SIZE * SIZE * 3)
    grain = _grain()[start : start + SIZE * SIZE * 3].reshape(SIZE, SIZE, 3)
    image = np.asarray(canvas, np.float32) + np.float32(rng.uniform(*style.noise)) * grain
    return np.clip(image, 0, 255).astype(np.uint8)


def _fill(
    brush: ImageDraw.ImageDraw,
    outline: Points,
    center: Sequence[float],
    scale: float,
    turn: float,
    color: int | tuple[int, int, int],
) -> None:
    """Fill `outline`, scaled, rotated by `turn` (radians) and moved to `center` in [-1, 1] x [-1, 1]."""
    half = brush.im.size[0] / 2
    cos, sin = half * scale * np.cos(turn), half * scale * np.sin(turn)
    left, top = half * (1 + center[0]), half * (1 + center[1])
    brush.polygon([(left + x * cos - y * sin, top + x * sin + y * cos) for x, y in outline], color)


def _pattern(pattern: str, u: np.ndarray, v: np.ndarray, pitch: float) -> np.ndarray:
    """Return the share (SIZE, SIZE) of the second shade, in object coordinates u and v."""
    wave = np.float32(2 * np.pi / pitch)
    if pattern == "striped":
        return _step(np.sin(wave * u), 2)
    if pattern == "dotted":
        return _step(np.sin(wave * u) * np.sin(wave * v) - 0.35, 4)
    if pattern == "checkered":
        return _step(np.sin(wave * u * 0.8) * np.sin(wave * v * 0.8), 5)
    if pattern == "zigzag":
        teeth = np.abs((v * 1.6 / pitch) % 2 - 1) * pitch * 0.8
        return _step(np.sin(wave * (u + teeth)), 2)
    if pattern == "crosshatched":
        return _step(np.maximum(np.sin(wave * (u + v)), np.sin(wave * (u - v))) - 0.75, 4)
    if pattern == "two-tone":
        return _step(u, 16)
    return np.zeros((SIZE, SIZE), np.float32)


def _step(value: np.ndarray, slope: float) -> np.ndarray:
    """Return a step function with a ramp of the given slope, which smooths edges."""
    return np.clip(0.5 + slope * value, 0, 1)


@functools.cache
def _grid() -> tuple[np.ndarray, np.ndarray]:
    """Return pixel centers in [-1, 1]: x (1, SIZE) and y (SIZE, 1)."""
    line = ((np.arange(SIZE) + 0.5) * 2 / SIZE - 1).astype(np.float32)
    return line[None, :], line[:, None]


@functools.cache
def _grain() -> np.ndarray:
    """Return standard normal values (2^20,), of which each image uses a random section."""
    return np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)


@functools.cache
def _weave(phase: int) -> np.ndarray:
    """Return the brightness factor (SIZE, SIZE, 1) of woven threads."""
    row, column = np.mgrid[:SIZE, :SIZE] + phase
    across = (row // 2 + column // 2) % 2 == 0
    threads = np.sin(np.where(across, column, row) * np.pi / 2)
    return (1 + 0.16 * threads[..., None]).astype(np.float32)


def _smooth(rng: np.random.Generator, size: int, *blurs: float) -> np.ndarray:
    """Return periodic noise (size, size) in [-1, 1], the mean of several blurs."""
    total = np.zeros((size, size), np.float32)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    for blur in blurs:
        spectrum = np.fft.fft2(rng.standard_normal((size, size))) * np.exp(-((frequency * blur * np.pi) ** 2))
        layer = np.fft.ifft2(spectrum).real
        total += (layer / np.abs(layer).max()).astype(np.float32)
    return total / len(blurs)


@functools.cache
def _texture(background: str) -> np.ndarray:
    """Return the texture (256, 256, 3), float32 in [0, 255], of a background."""
    n = 256
    rng = np.random.default_rng(100 + list(BACKGROUNDS).index(background))
    y, x = np.mgrid[:n, :n].astype(np.float32)
    if background == "sand":
        value, base, span = (
            _smooth(rng, n, 1, 24) + 0.15 * np.sin(y / 5 + 3 * _smooth(rng, n, 40)),
            (214, 186, 132),
            42,
        )
    elif background == "grass":
        blades = np.roll(_smooth(rng, n, 1.5), 3, 0) + _smooth(rng, n, 2)
        value, base, span = blades + _smooth(rng, n, 30), (88, 140, 58), 60
    elif background == "water":
        value, base, span = (
            np.sin(y / 3.2 + 5 * _smooth(rng, n, 14, 30)) * 0.7 + _smooth(rng, n, 4),
            (62, 120, 178),
            34,
        )
    elif background == "night":
        value, base, span = _smooth(rng, n, 40) + 9.0 * (rng.random((n, n)) > 0.992), (22, 26, 56), 24
    elif background == "brick":
        row = np.floor(y / 12)
        mortar = ((y % 12) < 2) | (((x + 13 * (row % 2)) % 26) < 2)
        shade = rng.uniform(-0.6, 0.6, (32, 16))[row.astype(int), ((x + 13 * (row % 2)) // 26).astype(int)]
        value, base, span = np.where(mortar, 1.6, shade) + 0.3 * _smooth(rng, n, 1), (158, 82, 62), 44
    elif background == "wood":
        grain = np.sin(y / 2.6 + 8 * _smooth(rng, n, 50) + x / 60)
        value, base, span = (
            0.6 * grain + np.where(y % 32 < 1.5, -2.0, 0) + 0.4 * _smooth(rng, n, 1),
            (168, 118, 72),
            34,
        )
    elif background == "snow":
        value, base, span = _smooth(rng, n, 3, 40) + 0.3 * _smooth(rng, n, 1), (228, 234, 242), 20
    else:
        value, base, span = 0.5 * _smooth(rng, n, 60), (150, 150, 150), 16
    return np.clip(np.asarray(base, np.float32) + span * value[..., None].astype(np.float32), 0, 255)
