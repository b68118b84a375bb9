"""The plots of the HTML page, drawn by matplotlib as SVG whose colours the page's style defines."""

from __future__ import annotations

import io
import itertools
import math
import re
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from dfzsl.io.results import harmonic_mean
from dfzsl.utils.errors import UserError

from .method_names import COLORS, dataset_name, look
from .read_runs import PAIRED, TRANSFER, shots_in
from .sections import Section, Summary

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise UserError("the HTML page needs matplotlib: pip install matplotlib") from error

WIDTH = 4.0  # inches: the text is readable on a telephone, and two plots stand side by side on a desk
LINE_HEIGHT = 0.16  # inches a label
SHOWN = 12  # classes or data sets with a bar of their own
BASELINE = "ZeroshotCLIP"

# Colours that occur nowhere else. The page gives each its meaning, one for light and one for dark.
TEXT, MUTED, LINE, GAIN, LOSS = (f"#fe01{number:02x}" for number in range(5))
METHODS = [f"#fe02{number:02x}" for number in range(COLORS)]
VARIABLES = {MUTED: "var(--muted)", LINE: "var(--line)", GAIN: "var(--gain)", LOSS: "var(--loss)"}
VARIABLES |= {TEXT: "currentColor"} | {color: f"var(--method{i})" for i, color in enumerate(METHODS)}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dfzsl",
    "text.parse_math": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": TEXT,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "text.color": TEXT,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
}


@dataclass(frozen=True)
class Plot:
    title: str
    caption: str
    svg: str


def plots(section: Section, details: bool) -> list[Plot]:
    """The plots of a section; only its `details` where an average shows the scores of all sections."""
    if not section.summaries:
        return []
    made = [] if details else [_bars(section)]
    if not details and section.protocol in PAIRED:
        made.append(_scatter(section))
    if section.protocol == "fewshot":
        made.append(_by_shots(section))
    return [*made, *_against_baseline(section), *_curves(section)]


def _draw(title: str, height: float, paint: Callable[[Canvas], str]) -> Plot:
    """One plot of `height` inches; `paint` draws on the canvas and returns the caption."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has the fonts, not matplotlib
        canvas = Canvas((WIDTH, height))
        svg, out = FigureCanvasSVG(canvas), io.StringIO()
        caption = paint(canvas)
        # What savefig does, without its first drawing, which is for nothing but the layout.
        ConstrainedLayoutEngine().execute(canvas)
        svg.print_svg(out, metadata={"Date": None})
    return Plot(title, caption, _embeddable(out.getvalue(), title))


def _embeddable(svg: str, title: str) -> str:
    """The <svg> element alone, sized by the page, with the page's colours and without foreign addresses."""
    svg = svg[svg.index("<svg") :]
    for pattern in (
        r"<metadata>.*?</metadata>",
        r"<defs>\s*<style.*?</style>\s*</defs>",
        r' xmlns(:\w+)?="[^"]*"',
    ):
        svg = re.sub(pattern, "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, variable)
    return re.sub(r' width="[^"]*"| height="[^"]*"', "", svg, count=2).replace(
        "<svg", f'<svg role="img" aria-label="{escape(title)}"', 1
    )


def _color(label: str) -> str:
    return METHODS[look(label)[0]]


def _rows_of_bars(axes: Axes, names: Sequence[str]) -> None:
    """Names the rows of a bar chart, the first on top, and takes away what is not needed."""
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _short(name: str) -> str:
    return name if len(name) <= 26 else f"{name[:14]}…{name[-11:]}"  # what tells names apart is at both ends


def _bars(section: Section) -> Plot:
    """Horizontal bars of the headline, the best on top, its number at the end of each."""
    rows, name = section.summaries, section.headline

    def paint(canvas: Canvas) -> str:
        axes = canvas.add_subplot()
        for place, row in enumerate(rows):
            value, deviation = row.headline.mean, row.headline.deviation
            color = MUTED if row.source else _color(row.label)
            axes.barh(place, value, height=0.7, color=color, alpha=0.45 if row.source else 0.85, linewidth=0)
            if deviation is not None:
                axes.errorbar(value, place, xerr=deviation, color=TEXT, linewidth=1, capsize=2)
            text = f"{value:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")
            end = value + (deviation or 0), place
            axes.annotate(text, end, (4, 0), textcoords="offset points", va="center", fontsize=8.5)
        _rows_of_bars(axes, [row.label for row in rows])
        axes.set_xlim(0, max(row.headline.mean for row in rows) * 1.3 or 1)
        return f"{title} in percent. Whiskers: standard deviation over seeds."

    title = name if name == "H" or section.protocol == "fewshot" else f"Mean over {name}"
    return _draw(title, 0.7 + 0.26 * len(rows), paint)


def _scatter(section: Section) -> Plot:
    """First against second score, with lines of equal H; the names stand in a column beside it."""
    rows = section.summaries
    first, second = rows[0].scores
    points = [tuple(score.mean for score in row.scores.values()) for row in rows]
    height = max(3.0, 0.9 + LINE_HEIGHT * len(rows))

    def paint(canvas: Canvas) -> str:
        axes = canvas.add_subplot()
        for place, row in enumerate(rows):
            x, y = row.scores.values()
            color, marker = (MUTED, "o") if row.source else (_color(row.label), look(row.label)[1])
            # Those at the same point are rings around one another.
            ring = sum(_near(points[place], other) for other in points[:place])
            axes.errorbar(
                x.mean,
                y.mean,
                xerr=x.deviation,
                yerr=y.deviation,
                color=color,
                linewidth=1,
                marker=marker,
                markersize=(4 if row.source else 7) + 5 * ring,
                linestyle="none",
                markerfacecolor="none" if row.source or ring else color,
            )
        _iso_h(axes)
        _name_beside(axes, rows, points, LINE_HEIGHT / (height - 0.7))
        axes.set_xlabel(f"{first} accuracy")
        axes.set_ylabel(f"{second} accuracy")
        said = "Dashed: equal H. Whiskers: standard deviation over seeds. Rings: methods at one point."
        return said + (" Small open circles: published figures." if any(row.source for row in rows) else "")

    return _draw(f"{first} against {second}", height, paint)


def _by_shots(section: Section) -> Plot:
    """Accuracy against the number of training images a class, as in CoOp's paper; the names stand beside."""
    rows = section.summaries
    names = list(rows[0].scores)
    numbers = [shots_in(name) for name in names]
    places = [number if math.isfinite(number) else 2 * max([1, *numbers[:-1]]) for number in numbers]
    height = max(3.0, 0.9 + LINE_HEIGHT * len(rows))

    def paint(canvas: Canvas) -> str:
        axes = canvas.add_subplot()
        for row in rows:
            means = [row.scores[name].mean for name in names]
            spread = [row.scores[name].deviation or 0 for name in names]
            color, marker = _color(row.label), look(row.label)[1]
            axes.errorbar(places, means, yerr=spread, color=color, linewidth=1.2, marker=marker, markersize=5)
        axes.set_xticks(places, [name.split()[0] for name in names])
        axes.set_xlabel("training images a class")
        axes.set_ylabel("accuracy")
        ends = [(places[-1], row.headline.mean) for row in rows]
        _name_beside(axes, rows, ends, LINE_HEIGHT / (height - 0.7))
        return "Whiskers: standard deviation over seeds. What is flat sees no image."

    return _draw("Accuracy by the number of images", height, paint)


def _near(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(abs(a - b) < 0.05 for a, b in zip(one, other, strict=True))


def _name_beside(axes: Axes, rows: Sequence[Summary], points: Sequence, gap: float) -> None:
    """Every name right of the axes near its point's height, `gap` of the axes apart, with a line to it."""
    low, high = axes.get_ylim()
    order = sorted(range(len(rows)), key=lambda place: (points[place][1], points[place][0]))
    wanted = [(points[place][1] - low) / (high - low) for place in order]
    for place, y in zip(order, _apart(wanted, gap), strict=True):
        row = rows[place]
        color = MUTED if row.source else _color(row.label)
        axes.annotate(
            row.label.removesuffix(" (published)"),
            points[place],
            (1.05, y),
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color=MUTED if row.source else TEXT,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "relpos": (0, 0.5)},
            annotation_clip=False,
        )


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending numbers near those wanted, at least `gap` apart, in [0, 1] as far as there is room."""
    placed: list[float] = []
    for value in wanted:
        placed.append(max(value, placed[-1] + gap) if placed else value)
    top = max(1.0, gap * (len(placed) - 1))
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], top - gap * (len(placed) - 1 - i))
    return placed


def _iso_h(axes: Axes) -> None:
    """Dashed curves y = H x / (2 x - H), about five, each named where it enters: on top or at the left."""
    axes.margins(0.35, 0.15)  # for the names at the left
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    low, high = harmonic_mean(max(x0, 1), max(y0, 1)), harmonic_mean(x1, y1)
    step = next((step for step in (0.5, 1, 2, 5, 10) if (high - low) / step <= 6), 20)
    named: list[tuple[float, float]] = []
    for level in np.arange(step * (low // step + 1), high, step):
        left = level * x0 / (2 * x0 - level) if 2 * x0 > level else float("inf")
        top = level * y1 / (2 * y1 - level)
        at = ((top - x0) / (x1 - x0), 1.0) if left > y1 else (0.0, (left - y0) / (y1 - y0))
        if any(abs(at[0] - x) < 0.2 and abs(at[1] - y) < 0.06 for x, y in named):
            continue
        named.append(at)
        start = max(x0, level / 2 * 1.001)
        xs = [start + (x1 - start) * i / 100 for i in range(101)]
        axes.plot(xs, [level * x / (2 * x - level) for x in xs], "--", color=LINE, linewidth=0.9, zorder=1)
        side = {"xytext": (0, 3), "ha": "center", "va": "bottom"} if at[1] == 1 else {"xytext": (3, 3)}
        axes.annotate(
            f"H {level:g}",
            at,
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=8,
            color=MUTED,
            annotation_clip=False,
            **side,
        )
    axes.set_xlim(x0, x1)
    axes.set_ylim(y0, y1)


def by_class(section: Section) -> dict[str, dict[str, float]]:
    """Accuracy in percent of each method on each class, over all seeds; {} where results do not tell."""
    found: dict[str, dict[str, list[float]]] = {}
    for label, runs in section.outcomes.items():
        values = defaultdict(list)
        for name, rows in itertools.chain.from_iterable(run.classes().items() for run in runs):
            if section.protocol == "fewshot" and name != section.headline:
                continue
            for row in rows:
                if row["total"]:
                    new = " (new)" if name in ("new", "unseen U") else ""
                    values[row["class"] + new].append(100 * row["correct"] / row["total"])
        if values:
            found[label] = values
    return {
        label: {key: statistics.fmean(of) for key, of in values.items()} for label, values in found.items()
    }


def _by_place(section: Section) -> dict[str, dict[str, float]]:
    """The headline of each method on each data set of an average, or its accuracy on each target."""
    found: dict[str, dict[str, float]] = {label: {} for label in section.outcomes}
    for part in section.members:
        for row in part.summaries:
            if row.label in found:
                found[row.label][part.title] = row.headline.mean
    for row in section.summaries:
        if row.label in found:
            found[row.label] |= {dataset_name(name): score.mean for name, score in row.targets.items()}
    return found


def _against_baseline(section: Section) -> list[Plot]:
    """What methods gain on zero-shot CLIP: the best by class, data set or target, and the spread of all."""
    several = section.members or section.protocol in TRANSFER
    values = _by_place(section) if several else by_class(section)
    of = section.headline if section.members else "accuracy"
    what = "data set" if section.members else "target" if several else "class"
    baseline = next((label for label in values if section.outcomes[label][0].method.name == BASELINE), None)
    if baseline is None:
        return []
    gains = {
        row.label: {k: v - values[baseline][k] for k, v in values[row.label].items() if k in values[baseline]}
        for row in section.summaries
        if row.label in values and row.label != baseline
    }
    gains = {label: found for label, found in gains.items() if found}
    if not gains:
        return []
    best = next(iter(gains))
    made = [_extremes(f"{best} against {baseline} by {what}", gains[best], of)]
    if len(next(iter(gains.values()))) > 2:
        made.append(_spreads(f"All against {baseline} by {what}", gains, of, what))
    return made


def _extremes(title: str, gains: dict[str, float], of: str) -> Plot:
    """Bars of the gains, of many the largest and the smallest."""
    order = sorted(gains, key=lambda key: -gains[key])
    left_out = len(order) - SHOWN
    half = SHOWN // 2
    shown: list[str | None] = [*order] if left_out <= 1 else [*order[:half], None, *order[-half:]]
    names = [f"⋯ {left_out} between" if key is None else key for key in shown]

    def paint(canvas: Canvas) -> str:
        axes = canvas.add_subplot()
        for place, key in enumerate(shown):
            if key is not None:
                gain = gains[key]
                axes.barh(place, gain, height=0.7, color=GAIN if gain > 0 else LOSS, alpha=0.85, linewidth=0)
                axes.annotate(
                    f"{gain:+.1f}".replace("-", "−"),
                    (gain, place),
                    (4 if gain >= 0 else -4, 0),
                    textcoords="offset points",
                    va="center",
                    ha="left" if gain >= 0 else "right",
                    fontsize=8.5,
                )
        _rows_of_bars(axes, names)
        axes.axvline(0, color=LINE, linewidth=1)
        low, high = min(0, *gains.values()), max(0, *gains.values())
        room = 0.4 * (high - low or 1)  # for a number
        axes.set_xlim(low - (room if low < 0 else 0), high + (room if high > 0 else 0))
        some = f" The largest gains and losses of {len(gains)}." if left_out > 1 else ""
        return f"Percentage points of {of} above or below, averaged over seeds.{some}"

    return _draw(title, 0.7 + 0.22 * len(shown), paint)


def _spreads(title: str, gains: dict[str, dict[str, float]], of: str, what: str) -> Plot:
    """A row a method: its median gain, the middle half, and the middle nine tenths."""

    def paint(canvas: Canvas) -> str:
        axes = canvas.add_subplot()
        for place, (label, found) in enumerate(gains.items()):
            low, left, median, right, high = np.percentile(list(found.values()), [5, 25, 50, 75, 95])
            color, (_, marker) = _color(label), look(label)
            axes.plot([low, high], [place, place], color=color, linewidth=1)
            axes.plot([left, right], [place, place], color=color, linewidth=7, alpha=0.45)
            axes.plot(median, place, marker, color=color, markersize=6)
        _rows_of_bars(axes, list(gains))
        axes.axvline(0, color=TEXT, linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        said = f"Percentage points of {of} above or below: the median {what}, and what the middle half"
        return said + " (band) and nine tenths (line) span."

    return _draw(title, 0.7 + 0.28 * len(gains), paint)


def _curves(section: Section) -> list[Plot]:
    """Small multiples: each recorded curve of each method on axes of its own, a line a seed."""
    found: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for row in section.summaries:
        for outcome in section.outcomes.get(row.label, []) if not section.members else []:
            for name, values in outcome.training.get("curves", {}).items():
                if values:
                    found[row.label, name].append(values)
    if not found:
        return []
    lines = (len(found) + 1) // 2

    def paint(canvas: Canvas) -> str:
        panels = canvas.subplots(lines, 2, squeeze=False).flatten()
        for axes, ((label, name), curves) in zip(panels, found.items(), strict=False):
            for curve in curves:
                marker = "." if len(curve) < 3 else ""
                epochs = range(1, len(curve) + 1)
                axes.plot(epochs, curve, marker=marker, color=_color(label), linewidth=1, alpha=0.8)
            axes.set_title(f"{label}: {name}")
            axes.xaxis.set_major_locator(MaxNLocator(3, integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.tick_params(labelsize=8)
        for axes in panels[len(found) :]:
            axes.set_axis_off()
        return "After each epoch, a line a seed. Objectives differ, so does each scale."

    return [_draw("Training curves", 0.2 + 1.35 * lines, paint)]
