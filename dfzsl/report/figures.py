"""Draw the plots of the HTML page as SVG whose colors the page's style sheet defines."""

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

from .method_names import NUM_COLORS, dataset_name, style_of
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

WIDTH_INCHES = 4.0  # readable on a phone; two plots fit side by side on a desktop screen
LABEL_INCHES = 0.16  # height of a label
MAX_BARS = 12  # classes or data sets in a bar chart
BASELINE_TRAINER = "ZeroshotCLIP"

# Placeholder colors. The style sheet replaces them by variables with values for light and dark.
TEXT, MUTED, LINE, GAIN, LOSS = (f"#fe01{number:02x}" for number in range(5))
METHOD_COLORS = [f"#fe02{number:02x}" for number in range(NUM_COLORS)]
VARIABLES = {MUTED: "var(--muted)", LINE: "var(--line)", GAIN: "var(--gain)", LOSS: "var(--loss)"}
VARIABLES |= {TEXT: "currentColor"} | {color: f"var(--method{i})" for i, color in enumerate(METHOD_COLORS)}
RC_PARAMS: dict[Any, Any] = {
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
    """A plot with its title and caption; `svg` is an HTML element."""

    title: str
    caption: str
    svg: str


def plots(section: Section, details: bool) -> list[Plot]:
    """Return the plots of a section.

    Args:
        section: section to plot.
        details: whether to omit the plots of scores, which the plots of its average show already.
    """
    if not section.summaries:
        return []
    result = [] if details else [_bars(section)]
    if not details and section.protocol in PAIRED:
        result.append(_scatter(section))
    if section.protocol == "fewshot":
        result.append(_by_shots(section))
    return [*result, *_against_baseline(section), *_curves(section)]


def _draw(title: str, height: float, paint: Callable[[Canvas], str]) -> Plot:
    """Return a plot of `height` inches; `paint` draws on the canvas and returns the caption."""
    with matplotlib.rc_context(RC_PARAMS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has the fonts, not matplotlib
        canvas = Canvas((WIDTH_INCHES, height))
        svg, out = FigureCanvasSVG(canvas), io.StringIO()
        caption = paint(canvas)
        # As savefig, without its first drawing, which only computes the layout.
        ConstrainedLayoutEngine().execute(canvas)
        svg.print_svg(out, metadata={"Date": None})
    return Plot(title, caption, _embeddable(out.getvalue(), title))


def _embeddable(svg: str, title: str) -> str:
    """Return the <svg> element, sized by the page, with the page's colors and without external addresses."""
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
    return METHOD_COLORS[style_of(label)[0]]


def _format_bar_rows(axes: Axes, names: Sequence[str]) -> None:
    """Label the rows of a bar chart, the first on top, and hide unneeded axes."""
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _short(name: str) -> str:
    return name if len(name) <= 26 else f"{name[:14]}…{name[-11:]}"  # names differ at both ends


def _bars(section: Section) -> Plot:
    """Draw horizontal bars of the headline score, the best on top, each with its number at the end."""
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
        _format_bar_rows(axes, [row.label for row in rows])
        axes.set_xlim(0, max(row.headline.mean for row in rows) * 1.3 or 1)
        return f"{title} in percent. Whiskers: standard deviation over seeds."

    title = name if name == "H" or section.protocol == "fewshot" else f"Mean over {name}"
    return _draw(title, 0.7 + 0.26 * len(rows), paint)


def _scatter(section: Section) -> Plot:
    """Draw the first against the second score, with lines of equal H and a column of names at the right."""
    rows = section.summaries
    first, second = rows[0].scores
    points = [tuple(score.mean for score in row.scores.values()) for row in rows]
    height = max(3.0, 0.9 + LABEL_INCHES * len(rows))

    def paint(canvas: Canvas) -> str:
        axes = canvas.add_subplot()
        for place, row in enumerate(rows):
            x, y = row.scores.values()
            color, marker = (MUTED, "o") if row.source else (_color(row.label), style_of(row.label)[1])
            # Methods at the same point become concentric rings.
            ring = sum(_coincide(points[place], other) for other in points[:place])
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
        _label_at_right(axes, rows, points, LABEL_INCHES / (height - 0.7))
        axes.set_xlabel(f"{first} accuracy")
        axes.set_ylabel(f"{second} accuracy")
        caption = (
            "Dashed: equal H. Whiskers: standard deviation over seeds. Rings: methods at the same point."
        )
        return caption + (
            " Small open circles: published results." if any(row.source for row in rows) else ""
        )

    return _draw(f"{first} against {second}", height, paint)


def _by_shots(section: Section) -> Plot:
    """Draw the accuracy against the number of training images per class, as in the paper of CoOp."""
    rows = section.summaries
    names = list(rows[0].scores)
    numbers = [shots_in(name) for name in names]
    places = [number if math.isfinite(number) else 2 * max([1, *numbers[:-1]]) for number in numbers]
    height = max(3.0, 0.9 + LABEL_INCHES * len(rows))

    def paint(canvas: Canvas) -> str:
        axes = canvas.add_subplot()
        for row in rows:
            means = [row.scores[name].mean for name in names]
            spread = [row.scores[name].deviation or 0 for name in names]
            color, marker = _color(row.label), style_of(row.label)[1]
            axes.errorbar(places, means, yerr=spread, color=color, linewidth=1.2, marker=marker, markersize=5)
        axes.set_xticks(places, [name.split()[0] for name in names])
        axes.set_xlabel("training images per class")
        axes.set_ylabel("accuracy")
        ends = [(places[-1], row.headline.mean) for row in rows]
        _label_at_right(axes, rows, ends, LABEL_INCHES / (height - 0.7))
        return "Whiskers: standard deviation over seeds. Flat lines: methods without images."

    return _draw("Accuracy by the number of training images", height, paint)


def _coincide(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(abs(a - b) < 0.05 for a, b in zip(one, other, strict=True))


def _label_at_right(axes: Axes, rows: Sequence[Summary], points: Sequence, gap: float) -> None:
    """Write the names right of the axes near the height of their points, with lines to them.

    `gap`: minimum distance of two names, as a share of the height of the axes.
    """
    low, high = axes.get_ylim()
    order = sorted(range(len(rows)), key=lambda place: (points[place][1], points[place][0]))
    heights = [(points[place][1] - low) / (high - low) for place in order]
    for place, y in zip(order, _space_apart(heights, gap), strict=True):
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


def _space_apart(values: Sequence[float], gap: float) -> list[float]:
    """Move ascending values to be at least `gap` apart, within [0, 1] if there is room."""
    placed: list[float] = []
    for value in values:
        placed.append(max(value, placed[-1] + gap) if placed else value)
    top = max(1.0, gap * (len(placed) - 1))
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], top - gap * (len(placed) - 1 - i))
    return placed


def _iso_h(axes: Axes) -> None:
    """Draw about five dashed curves y = H x / (2 x - H), each labeled at the top or the left of the axes."""
    axes.margins(0.35, 0.15)  # space for the labels at the left
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    low, high = harmonic_mean(max(x0, 1), max(y0, 1)), harmonic_mean(x1, y1)
    step = next((step for step in (0.5, 1, 2, 5, 10) if (high - low) / step <= 6), 20)
    label_positions: list[tuple[float, float]] = []
    for level in np.arange(step * (low // step + 1), high, step):
        left = level * x0 / (2 * x0 - level) if 2 * x0 > level else float("inf")
        top = level * y1 / (2 * y1 - level)
        at = ((top - x0) / (x1 - x0), 1.0) if left > y1 else (0.0, (left - y0) / (y1 - y0))
        if any(abs(at[0] - x) < 0.2 and abs(at[1] - y) < 0.06 for x, y in label_positions):
            continue
        label_positions.append(at)
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
    """Return the accuracy in percent of each method on each class, averaged over seeds.

    Methods without results of single classes (logs) are missing.
    """
    by_method: dict[str, dict[str, list[float]]] = {}
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
            by_method[label] = values
    return {
        label: {name: statistics.fmean(accuracies) for name, accuracies in values.items()}
        for label, values in by_method.items()
    }


def _by_dataset(section: Section) -> dict[str, dict[str, float]]:
    """Return the headline score of each method on each data set of an average, or on each target."""
    scores: dict[str, dict[str, float]] = {label: {} for label in section.outcomes}
    for part in section.members:
        for row in part.summaries:
            if row.label in scores:
                scores[row.label][part.title] = row.headline.mean
    for row in section.summaries:
        if row.label in scores:
            scores[row.label] |= {dataset_name(name): score.mean for name, score in row.targets.items()}
    return scores


def _against_baseline(section: Section) -> list[Plot]:
    """Draw gains over zero-shot CLIP by class, data set or target: of the best method, and their spreads."""
    by_dataset = section.members or section.protocol in TRANSFER
    values = _by_dataset(section) if by_dataset else by_class(section)
    score = section.headline if section.members else "accuracy"
    unit = "data set" if section.members else "target" if by_dataset else "class"
    baseline = next(
        (label for label in values if section.outcomes[label][0].method.name == BASELINE_TRAINER), None
    )
    if baseline is None:
        return []
    gains = {
        row.label: {k: v - values[baseline][k] for k, v in values[row.label].items() if k in values[baseline]}
        for row in section.summaries
        if row.label in values and row.label != baseline
    }
    gains = {label: method_gains for label, method_gains in gains.items() if method_gains}
    if not gains:
        return []
    best = next(iter(gains))
    result = [_extremes(f"{best} against {baseline} by {unit}", gains[best], score)]
    if len(next(iter(gains.values()))) > 2:
        result.append(_spreads(f"All against {baseline} by {unit}", gains, score, unit))
    return result


def _extremes(title: str, gains: dict[str, float], score: str) -> Plot:
    """Draw bars of the gains; of more than `MAX_BARS` the largest and the smallest."""
    order = sorted(gains, key=lambda key: -gains[key])
    num_omitted = len(order) - MAX_BARS
    half = MAX_BARS // 2
    keys: list[str | None] = [*order] if num_omitted <= 1 else [*order[:half], None, *order[-half:]]
    names = [f"⋯ {num_omitted} between" if key is None else key for key in keys]

    def paint(canvas: Canvas) -> str:
        axes = canvas.add_subplot()
        for place, key in enumerate(keys):
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
        _format_bar_rows(axes, names)
        axes.axvline(0, color=LINE, linewidth=1)
        low, high = min(0, *gains.values()), max(0, *gains.values())
        margin = 0.4 * (high - low or 1)  # space for a number
        axes.set_xlim(low - (margin if low < 0 else 0), high + (margin if high > 0 else 0))
        extremes = f" The largest gains and losses of {len(gains)}." if num_omitted > 1 else ""
        return f"Difference of {score} in percentage points, averaged over seeds.{extremes}"

    return _draw(title, 0.7 + 0.22 * len(keys), paint)


def _spreads(title: str, gains: dict[str, dict[str, float]], score: str, unit: str) -> Plot:
    """Draw one row per method: its median gain, and the central 50 % and 90 % of its gains."""

    def paint(canvas: Canvas) -> str:
        axes = canvas.add_subplot()
        for place, (label, method_gains) in enumerate(gains.items()):
            low, left, median, right, high = np.percentile(list(method_gains.values()), [5, 25, 50, 75, 95])
            color, (_, marker) = _color(label), style_of(label)
            axes.plot([low, high], [place, place], color=color, linewidth=1)
            axes.plot([left, right], [place, place], color=color, linewidth=7, alpha=0.45)
            axes.plot(median, place, marker, color=color, markersize=6)
        _format_bar_rows(axes, list(gains))
        axes.axvline(0, color=TEXT, linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        caption = f"Difference of {score} in percentage points: the median {unit} (marker),"
        return caption + " and the central 50 % (band) and 90 % (line)."

    return _draw(title, 0.7 + 0.28 * len(gains), paint)


def _curves(section: Section) -> list[Plot]:
    """Draw each recorded training curve of each method on its own axes, with one line per seed."""
    curves_by_panel: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for row in section.summaries:
        for outcome in section.outcomes.get(row.label, []) if not section.members else []:
            for name, values in outcome.training.get("curves", {}).items():
                if values:
                    curves_by_panel[row.label, name].append(values)
    if not curves_by_panel:
        return []
    lines = (len(curves_by_panel) + 1) // 2

    def paint(canvas: Canvas) -> str:
        panels = canvas.subplots(lines, 2, squeeze=False).flatten()
        for axes, ((label, name), curves) in zip(panels, curves_by_panel.items(), strict=False):
            for curve in curves:
                marker = "." if len(curve) < 3 else ""
                epochs = range(1, len(curve) + 1)
                axes.plot(epochs, curve, marker=marker, color=_color(label), linewidth=1, alpha=0.8)
            axes.set_title(f"{label}: {name}")
            axes.xaxis.set_major_locator(MaxNLocator(3, integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.tick_params(labelsize=8)
        for axes in panels[len(curves_by_panel) :]:
            axes.set_axis_off()
        return "Value after each epoch, one line per seed. Scales differ because objectives differ."

    return [_draw("Training curves", 0.2 + 1.35 * lines, paint)]
