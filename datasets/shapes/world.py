"""The built-in world: pictures of one object, drawn by code.

A picture shows a shape x colour x pattern x background, its `Composition`, under the nuisance that real
pictures have: position, size, rotation, light, colour cast, clutter, blur and noise. `render` needs
neither files nor fonts, takes well under a millisecond, and the same generator state draws the same
bytes.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

VERSION = 1  # raised with every change that draws other pictures: it names the folder they are written to
SIZE = 64  # pixels, both sides

SHAPES = (
    "circle", "square", "triangle", "star", "heart", "crescent", "cross", "hexagon",
    "diamond", "ring", "arrow", "flower", "teardrop", "leaf", "lightning bolt", "gear",
)  # fmt: skip

COLOURS = {
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

# The word in a class name; plain patterns and plain backgrounds go without one.
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
    """What a picture shows: one value of each attribute."""

    shape: str
    colour: str
    pattern: str
    background: str

    @property
    def name(self) -> str:
        """The English name, such as "striped red star on sand"."""
        words = (PATTERNS[self.pattern], self.colour, self.shape, BACKGROUNDS[self.background])
        return " ".join(word for word in words if word)


def compositions() -> list[Composition]:
    """All compositions of the world (16 shapes x 12 colours x 7 patterns x 8 backgrounds)."""
    return [Composition(*values) for values in itertools.product(SHAPES, COLOURS, PATTERNS, BACKGROUNDS)]


@functools.cache
def classes() -> tuple[Composition, ...]:
    """The 120 classes of the data set `shapes`, in label order: base is the first half, new the second.

    They come in families of three: a first class and two that differ from it in one attribute each, so
    that telling them apart takes that attribute. Each half uses every value of every attribute, and no
    (shape, colour, pattern) of one half occurs in the other.
    """
    draw = random.Random(1)
    values = (SHAPES, tuple(COLOURS), tuple(PATTERNS), tuple(BACKGROUNDS))
    chosen: list[Composition] = []
    for half in range(2):
        taken = set() if half == 0 else {looks(c) for c in chosen}
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
                if looks(member) in taken and not family:
                    first = (draw.choice(SHAPES), *first[1:])
                elif looks(member) not in taken and member not in chosen + family:
                    family.append(member)
            chosen += family
    return tuple(chosen)


def looks(composition: Composition) -> tuple[str, str, str]:
    """The object without its background: what is held out of the training of the built-in CLIP."""
    return composition.shape, composition.colour, composition.pattern


# ---------------------------------------------------------------------------------------------- drawing

Points = list[tuple[float, float]]


def _polygon(corners: int, inner: float = 0.0, start: float = -90.0) -> Points:
    """A regular polygon of radius 1, or a star when `inner` gives the radius of the notches."""
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


# Outline of each shape in a box of about [-1, 1] x [-1, 1], y downwards.
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


@functools.cache
def _grid() -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres in [-1, 1]: x (1, SIZE) and y (SIZE, 1)."""
    line = ((np.arange(SIZE) + 0.5) * 2 / SIZE - 1).astype(np.float32)
    return line[None, :], line[:, None]


@functools.cache
def _noise() -> np.ndarray:
    """A long strip of standard normal values; a picture takes a stretch of it at a random place."""
    return np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)


def _smooth(rng: np.random.Generator, size: int, *blurs: float) -> np.ndarray:
    """(size, size) noise of several blurs in [-1, 1], wrapped round the edges."""
    total = np.zeros((size, size), np.float32)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    for blur in blurs:
        spectrum = np.fft.fft2(rng.standard_normal((size, size))) * np.exp(-((frequency * blur * np.pi) ** 2))
        layer = np.fft.ifft2(spectrum).real
        total += (layer / np.abs(layer).max()).astype(np.float32)
    return total / len(blurs)


@functools.cache
def _texture(background: str) -> np.ndarray:
    """A (256, 256, 3) float32 texture in [0, 255], from which a picture takes a window."""
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


def _soft(value: np.ndarray, sharpness: float) -> np.ndarray:
    """A step at zero, `1/sharpness` wide: 0 below, 1 above."""
    return np.clip(0.5 + sharpness * value, 0, 1)


def _pattern(pattern: str, u: np.ndarray, v: np.ndarray, pitch: float) -> np.ndarray | None:
    """Where the second colour shows, (SIZE, SIZE) in [0, 1], in the object's own coordinates."""
    if pattern == "plain":
        return None
    if pattern == "two-tone":
        return _soft(u, 16)
    wave = np.float32(2 * np.pi / pitch)
    if pattern == "striped":
        return _soft(np.sin(wave * u), 2)
    if pattern == "dotted":
        return _soft(np.sin(wave * u) * np.sin(wave * v) - 0.35, 4)
    if pattern == "checkered":
        return _soft(np.sin(wave * u * 0.8) * np.sin(wave * v * 0.8), 5)
    if pattern == "zigzag":
        teeth = np.abs((v * 1.6 / pitch) % 2 - 1) * pitch * 0.8
        return _soft(np.sin(wave * (u + teeth)), 2)
    return _soft(np.maximum(np.sin(wave * (u + v)), np.sin(wave * (u - v))) - 0.75, 4)


@dataclass(frozen=True)
class Style:
    """How a picture was made and what became of it since; ranges are drawn from uniformly."""

    cast: tuple[tuple[float, float], ...] = ((0.92, 1.08),) * 3  # factor of red, green and blue
    light: tuple[float, float] = (0.8, 1.15)  # overall factor
    gradient: float = 0.3  # largest fall of light across the picture
    noise: tuple[float, float] = (2, 12)  # standard deviation, in levels
    blur: tuple[float, float] = (0, 0.7)  # Gaussian radius, in pixels
    clutter: int = 2  # most small things beside the object
    scale: tuple[float, float] = (0.42, 0.72)  # object radius; half the picture is 1
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

# The pictures of the data set: taken by a warm lamp, woven, cluttered. No style above looks like it.
LAMPLIGHT = Style(
    cast=((1.0, 1.12), (0.8, 0.92), (0.52, 0.7)),
    light=(0.6, 1.0),
    gradient=0.5,
    noise=(8, 20),
    blur=(0.3, 1.0),
    clutter=4,
    scale=(0.36, 0.66),
    finish="cloth",
)


def render(composition: Composition, rng: np.random.Generator, style: Style = STYLES["photo"]) -> np.ndarray:
    """Draw one picture: (SIZE, SIZE, 3) uint8. Everything random comes from `rng`."""
    x, y = _grid()
    number = iter(rng.random(40).tolist())

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * next(number)

    scale = uniform(*style.scale)
    room = max(0.0, 0.95 - scale)
    centre = uniform(-room, room), uniform(-room, room)
    turn = np.deg2rad(uniform(-25, 25))
    light = uniform(*style.light)

    left, top = int(uniform(0, 256 - SIZE)), int(uniform(0, 256 - SIZE))
    picture = _texture(composition.background)[top : top + SIZE, left : left + SIZE]
    if composition.background == "plain":
        tint = [uniform(-75, 75) for _ in range(3)]
        picture = picture + np.asarray(tint, np.float32) * 0.6 + np.float32(uniform(-60, 60))
    else:
        picture = picture + np.float32(uniform(-14, 14))
    mask = Image.new("L", (2 * SIZE, 2 * SIZE))
    draw = ImageDraw.Draw(mask)

    things = int(uniform(0, style.clutter + 1))
    if things:
        canvas = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
        brush = ImageDraw.Draw(canvas)
        for kind, tone, angle, size in rng.random((things, 4)).tolist():
            points = OUTLINES[SHAPES[int(kind * len(SHAPES))]]
            colour = list(COLOURS.values())[int(tone * len(COLOURS))]
            place = 2 * np.pi * angle
            _draw(
                brush,
                points,
                SIZE,
                (0.9 * np.cos(place), 0.9 * np.sin(place)),
                0.1 + 0.12 * size,
                9 * tone,
                colour,
            )
        picture = np.asarray(canvas, np.float32)

    outline = OUTLINES[composition.shape]
    _draw(draw, outline, 2 * SIZE, centre, scale, turn, 255)
    if composition.shape in HOLES:
        _draw(draw, OUTLINES["circle"], 2 * SIZE, centre, scale * HOLES[composition.shape], turn, 0)
    mask = mask.reduce(2)
    cover = np.asarray(mask, np.float32)[..., None] / 255

    ink = np.asarray(COLOURS[composition.colour], np.float32)
    ink = np.clip(ink * uniform(0.85, 1.12) + [uniform(-14, 14), uniform(-14, 14), uniform(-14, 14)], 0, 255)
    cos, sin = np.float32(np.cos(turn) / scale), np.float32(np.sin(turn) / scale)
    u = (x - centre[0]) * cos + (y - centre[1]) * sin
    v = (y - centre[1]) * cos - (x - centre[0]) * sin
    spots = _pattern(composition.pattern, u, v, uniform(0.45, 0.75))
    fill = ink.astype(np.float32)
    if spots is not None:
        other = 255.0 if ink.mean() < 128 else 0.0
        second = ink + (other - ink) * uniform(0.5, 0.75)
        fill = (ink + (second - ink) * spots[..., None]).astype(np.float32)
    if style.finish == "drawing":
        edge = np.asarray(mask.filter(ImageFilter.FIND_EDGES), np.float32)[..., None] / 255
        fill = fill * (1 - edge)
    else:
        shift = int(uniform(1, 4))
        shadow = np.roll(cover, (shift, int(uniform(-3, 4))), (0, 1))
        picture = picture * (1 - uniform(0, 0.5) * shadow)
    picture = picture + (fill - picture) * cover

    angle = uniform(0, 2 * np.pi)
    ramp = 1 + uniform(0, style.gradient) * (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)))
    cast = np.asarray([light * uniform(*factor) for factor in style.cast], np.float32)
    picture = picture * (ramp[..., None] * cast)
    if style.finish == "cloth":
        picture = picture * (1 + 0.16 * _weave(int(uniform(0, 4)))[..., None])

    canvas = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    if style.finish == "pixel":
        side = int(uniform(20, 30))
        canvas = canvas.resize((side, side), Image.Resampling.BOX).resize(
            (SIZE, SIZE), Image.Resampling.NEAREST
        )
    elif style.finish == "painting":
        canvas = ImageOps.posterize(canvas.filter(ImageFilter.BoxBlur(1)), 3)
    radius = uniform(*style.blur)
    if radius > 0.2:
        canvas = canvas.filter(ImageFilter.GaussianBlur(radius))
    start = int(next(number) * (_noise().size - SIZE * SIZE * 3))
    grain = _noise()[start : start + SIZE * SIZE * 3].reshape(SIZE, SIZE, 3)
    return np.clip(np.asarray(canvas, np.float32) + np.float32(uniform(*style.noise)) * grain, 0, 255).astype(
        np.uint8
    )


@functools.cache
def _weave(phase: int) -> np.ndarray:
    """Threads over and under each other, (SIZE, SIZE) in [-1, 1]."""
    row, column = np.mgrid[:SIZE, :SIZE] + phase
    return np.where((row // 2 + column // 2) % 2, np.sin(row * np.pi / 2), np.sin(column * np.pi / 2)).astype(
        np.float32
    )


def _draw(
    brush: ImageDraw.ImageDraw,
    points: Points,
    size: int,
    centre: tuple[float, float],
    scale: float,
    turn: float,
    fill,
) -> None:
    """Fill a polygon given in units of `scale`, turned by `turn` radians, on a square of `size` pixels."""
    cos, sin = np.cos(turn) * scale, np.sin(turn) * scale
    half = size / 2
    placed = [
        (half * (1 + centre[0] + px * cos - py * sin), half * (1 + centre[1] + px * sin + py * cos))
        for px, py in points
    ]
    brush.polygon(placed, fill=fill)
