"""The plots of the HTML page, drawn by matplotlib as SVG whose colours the page's style defines."""

from __future__ import annotations

import io
import re
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ..errors import UserError
from ..results import harmonic_mean
from .outcomes import Outcome
from .tables import Section, Summary

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
except ImportError as error:
    raise UserError("the HTML page needs matplotlib: pip install matplotlib") from error

WIDTH = 4.0  # inches: the text is readable on a telephone, and two plots stand side by side on a desk
CLASSES_SHOWN = 24
BASELINE = "ZeroshotCLIP"

# Colours that occur nowhere else. The page gives each its meaning, one for light and one for dark.
TEXT, MUTED, LINE, GAIN, LOSS = (f"#fe01{number:02x}" for number in range(5))
METHODS = [f"#fe02{number:02x}" for number in range(8)]
VARIABLES = {MUTED: "var(--muted)", LINE: "var(--line)", GAIN: "var(--gain)", LOSS: "var(--loss)"}
VARIABLES |= {TEXT: "currentColor"} | {color: f"var(--method{i})" for i, color in enumerate(METHODS)}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dfzsl",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": TEXT,
    "text.color": TEXT,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}

Palette = dict[str, tuple[str, str]]  # label -> (colour, marker)


@dataclass(frozen=True)
class Plot:
    title: str
    caption: str
    svg: str


def palette(parts: Sequence[Section]) -> Palette:
    """One colour a method on the whole page; a second round of colours has another marker."""
    labels = sorted({row.label for section in parts for row in section.summaries if not row.source})
    return {
        label: (METHODS[place % len(METHODS)], "osD^v"[place // len(METHODS) % 5])
        for place, label in enumerate(labels)
    }


def plots(section: Section, single: Sequence[Section], colors: Palette) -> list[Plot]:
    """The plots of a section; `single` are the sections of its data sets where it is their average."""
    rows = section.summaries
    if not rows:
        return []
    made = []
    if section.protocol == "xd":
        made.append(_bars(rows, "Mean over other data sets", colors))
        targets = sorted({name for row in rows for name in row.targets})
        by_target = {
            name: {row.label: row.targets[name].mean for row in rows if name in row.targets}
            for name in targets
        }
        made.append(_dots(by_target, "Accuracy on each target", "accuracy", colors))
    else:
        made.append(_bars(rows, "H", colors))
        made.append(_scatter(section, colors))
    if single:
        by_set = {
            part.title: {row.label: row.h for row in part.summaries if not row.source and row.h is not None}
            for part in single
        }
        made.append(_dots(by_set, "H on each data set", "H", colors))
        return made
    makers: list[Callable[[Section, Palette], Plot | None]] = [_changes, _concentrations]
    made += [plot for maker in makers if (plot := maker(section, colors))]
    return made + _curves(section, colors)


def _draw(title: str, height: float, paint: Callable[[Axes], str]) -> Plot:
    """One plot of `height` inches; `paint` draws on the axes and returns the caption."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has the fonts, not matplotlib
        canvas = Canvas((WIDTH, height), layout="constrained")
        axes = canvas.add_subplot()
        axes.grid(color=LINE, linewidth=0.5)
        axes.set_axisbelow(True)
        caption = paint(axes)
        out = io.StringIO()
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None})
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


def _bars(rows: Sequence[Summary], name: str, colors: Palette) -> Plot:
    """Horizontal bars of the headline, the best on top, its number at the end of each."""

    def paint(axes: Axes) -> str:
        for place, row in enumerate(reversed(rows)):
            value, deviation = row.headline.mean, row.headline.deviation
            color = MUTED if row.source else colors[row.label][0]
            axes.barh(place, value, height=0.7, color=color, alpha=0.45 if row.source else 0.85, linewidth=0)
            if deviation is not None:
                axes.errorbar(value, place, xerr=deviation, color=TEXT, linewidth=1, capsize=2)
            text = f"{value:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")
            end = value + (deviation or 0), place
            axes.annotate(text, end, (4, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.set_yticks(range(len(rows)), [row.label for row in reversed(rows)])
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, max(row.headline.mean for row in rows) * 1.22 or 1)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        return f"{name} in percent. Whiskers: standard deviation over seeds."

    return _draw(name, 0.7 + 0.26 * len(rows), paint)


def _scatter(section: Section, colors: Palette) -> Plot:
    """First against second score, with lines of equal H."""
    first, second = section.summaries[0].scores

    def paint(axes: Axes) -> str:
        for row in section.summaries:
            x, y = (row.scores[name] for name in (first, second))
            if row.source:
                axes.plot(x.mean, y.mean, "o", color=MUTED, markersize=4, markerfacecolor="none")
                continue
            color, marker = colors[row.label]
            axes.errorbar(
                x.mean,
                y.mean,
                xerr=x.deviation,
                yerr=y.deviation,
                color=color,
                marker=marker,
                markersize=7,
                linestyle="none",
                linewidth=1,
                label=row.label,
            )
        _iso_h(axes)
        _name_published(axes, section.summaries)
        axes.set_xlabel(f"{first} accuracy")
        axes.set_ylabel(f"{second} accuracy")
        _legend(axes)
        published = (
            " Open circles: published figures." if any(row.source for row in section.summaries) else ""
        )
        return f"Dashed: equal H. Whiskers: standard deviation over seeds.{published}"

    measured = sum(not row.source for row in section.summaries)
    return _draw(f"{first} against {second}", 3.3 + 0.18 * ((measured + 1) // 2), paint)


def _name_published(axes: Axes, rows: Sequence[Summary]) -> None:
    """Names beside the published points, the best first, as long as they do not stand on one another."""
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    named: list[tuple[float, float]] = []
    for row in [row for row in rows if row.source]:
        x, y = (score.mean for score in row.scores.values())
        if all(abs(x - a) > 0.15 * (x1 - x0) or abs(y - b) > 0.04 * (y1 - y0) for a, b in named):
            named.append((x, y))
            name = row.label.removesuffix(" (published)")
            axes.annotate(name, (x, y), (4, 2), textcoords="offset points", fontsize=8, color=MUTED)


def _iso_h(axes: Axes) -> None:
    """Dashed curves y = H x / (2 x - H) through what the axes show, about five of them."""
    axes.margins(0.12)
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    low, high = harmonic_mean(max(x0, 1), max(y0, 1)), harmonic_mean(x1, y1)
    step = next((step for step in (0.5, 1, 2, 5, 10) if (high - low) / step <= 7), 20)
    level = step * (low // step + 1)
    while level < high:
        start = max(x0, level / 2 * 1.001)
        xs = [start + (x1 - start) * i / 100 for i in range(101)]
        axes.plot(xs, [level * x / (2 * x - level) for x in xs], "--", color=LINE, linewidth=0.9, zorder=1)
        right, top = level * x1 / (2 * x1 - level), level * y1 / (2 * y1 - level)
        at_right = y0 <= right <= y1
        if at_right or x0 <= top <= x1:
            axes.annotate(
                f"H {level:g}",
                (x1, right) if at_right else (top, y1),
                (3, 0) if at_right else (0, 2),
                textcoords="offset points",
                va="center" if at_right else "bottom",
                ha="left" if at_right else "center",
                fontsize=8,
                color=MUTED,
                annotation_clip=False,
            )
        level += step
    axes.set_xlim(x0, x1)
    axes.set_ylim(y0, y1)


def _legend(axes: Axes) -> None:
    """Below the axes, whatever their height."""
    axes.figure.legend(loc="outside lower center", ncols=2, handletextpad=0.3, columnspacing=1)


def _dots(values: dict[str, dict[str, float]], title: str, name: str, colors: Palette) -> Plot:
    """A row for each data set, a dot for each method, sorted by the best."""
    order = sorted(
        (place for place in values if values[place]), key=lambda place: max(values[place].values())
    )
    labels = sorted({label for scores in values.values() for label in scores if label in colors})

    def paint(axes: Axes) -> str:
        for label in labels:
            color, marker = colors[label]
            places = [place for place, dataset in enumerate(order) if label in values[dataset]]
            axes.plot(
                [values[order[p]][label] for p in places],
                places,
                marker,
                color=color,
                alpha=0.85,
                label=label,
            )
        axes.set_yticks(range(len(order)), order)
        axes.set_ylim(-0.6, len(order) - 0.4)
        axes.set_xlabel(name)
        _legend(axes)
        return f"{name} in percent, data sets in order of the best method."

    return _draw(title, 1.3 + 0.24 * len(order) + 0.18 * ((len(labels) + 1) // 2), paint)


def _accuracies(outcomes: Sequence[Outcome]) -> dict[tuple[str, bool], float]:
    """Accuracy in percent of each (class, is new), averaged over seeds."""
    found = defaultdict(list)
    for outcome in outcomes:
        parts = ["test_all"] if outcome.protocol == "gzsl" else ["train_base", "test_new"]
        for part in parts:
            for row in outcome.parts[part]["per_class"]:
                if row["total"]:
                    new = row["new"] if outcome.protocol == "gzsl" else part == "test_new"
                    found[row["class"], new].append(100 * row["correct"] / row["total"])
    return {key: statistics.fmean(values) for key, values in found.items()}


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"


def _changes(section: Section, colors: Palette) -> Plot | None:
    """A grid of classes and methods: accuracy minus zero-shot CLIP's."""
    if section.protocol == "xd":
        return None
    accuracies = {label: found for label, runs in section.outcomes.items() if (found := _accuracies(runs))}
    names = {label: runs[0].method.name for label, runs in section.outcomes.items()}
    baseline = next((found for label, found in accuracies.items() if names[label] == BASELINE), None)
    labels = [row.label for row in section.summaries if accuracies.get(row.label, baseline) is not baseline]
    if not baseline or not labels:
        return None
    changes = {
        key: [accuracies[label].get(key, value) - value for label in labels]
        for key, value in baseline.items()
    }
    largest = sorted(changes, key=lambda key: -max(map(abs, changes[key])))[:CLASSES_SHOWN]
    shown = [key for key in changes if key in set(largest)]
    scale = max((abs(change) for key in shown for change in changes[key]), default=0) or 1

    def paint(axes: Axes) -> str:
        for row, key in enumerate(shown):
            for column, change in enumerate(changes[key]):
                tile = Rectangle((column - 0.5, row - 0.5), 1, 1, linewidth=0)
                tile.set(facecolor=GAIN if change > 0 else LOSS, alpha=0.75 * abs(change) / scale)
                axes.add_patch(tile)
                axes.text(column, row, f"{change:+.0f}", ha="center", va="center", fontsize=8)
        axes.set_yticks(range(len(shown)), [_short(name) + " (new)" * new for name, new in shown])
        axes.set_xticks(range(len(labels)), labels, rotation=35, ha="left", rotation_mode="anchor")
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set_xlim(-0.5, len(labels) - 0.5)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        some = (
            f" The {len(shown)} of {len(changes)} classes that change most."
            if len(shown) < len(changes)
            else ""
        )
        return f"Percentage points above or below zero-shot CLIP, averaged over seeds.{some}"

    return _draw("Change per class", 1.1 + 0.2 * len(shown), paint)


def _curves(section: Section, colors: Palette) -> list[Plot]:
    """One plot for each curve that runs recorded: its mean over seeds, and each seed faintly."""
    found: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for label, runs in section.outcomes.items():
        for outcome in runs:
            for name, values in outcome.training.get("curves", {}).items():
                if values:
                    found[name][label].append(values)

    def draw(name: str) -> Plot:
        def paint(axes: Axes) -> str:
            for label, curves in found[name].items():
                color, _ = colors[label]
                epochs = range(1, min(map(len, curves)) + 1)
                for curve in curves:
                    axes.plot(range(1, len(curve) + 1), curve, color=color, linewidth=0.6, alpha=0.35)
                mean = [statistics.fmean(values) for values in zip(*curves, strict=False)]
                axes.plot(epochs, mean, color=color, linewidth=1.6, label=label)
            axes.set_xlabel("epoch")
            axes.set_ylabel(name)
            _legend(axes)
            return f"Training {name} after each epoch, each seed and their mean."

        return _draw(f"Learning curves: {name}", 3 + 0.18 * ((len(found[name]) + 1) // 2), paint)

    return [draw(name) for name in found]


def _concentrations(section: Section, colors: Palette) -> Plot | None:
    """Recovered against true concentration of the base classes, where the truth is known."""
    found: dict[str, list[dict[str, Any]]] = {}
    for label, runs in section.outcomes.items():
        points = [point for outcome in runs for point in outcome.training.get("concentration", [])]
        if points:
            found[label] = points
    if not found:
        return None
    every = [point[name] for points in found.values() for point in points for name in ("true", "recovered")]

    def paint(axes: Axes) -> str:
        axes.plot([min(every), max(every)], [min(every), max(every)], "--", color=LINE, linewidth=0.9)
        for label, points in found.items():
            color, marker = colors[label]
            xs, ys = ([point[name] for point in points] for name in ("true", "recovered"))
            axes.plot(xs, ys, marker, color=color, markersize=4, alpha=0.6, markeredgewidth=0, label=label)
        for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
            scale("log")
            decades = max(every) > 10 * min(every)
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if decades else MaxNLocator(5))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("true concentration κ")
        axes.set_ylabel("recovered κ")
        _legend(axes)
        return "Each base class and seed. On the dashed line the recovered concentration is the true one."

    return _draw("Recovered concentration", 3.1 + 0.18 * ((len(found) + 1) // 2), paint)
