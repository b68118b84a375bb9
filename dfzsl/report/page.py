"""One HTML page that needs nothing but itself: tables, plots, notes, in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..files import atomic
from .figures import Palette, Plot, palette, plots
from .tables import NAMES, Section, Table, legend, tables

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def write_page(path: Path, parts: Sequence[Section]) -> None:
    """Write the page, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(page(parts), encoding="utf-8")


def page(parts: Sequence[Section]) -> str:
    """The page's HTML. An average comes before the data sets that it averages."""
    colors = palette(parts)
    ordered = sorted(parts, key=lambda part: (list(NAMES).index(part.protocol), len(part.datasets) == 1))
    title = "Results: " + ", ".join(dict.fromkeys(NAMES[part.protocol] for part in ordered))
    body = "".join(
        _section(part, place, _averaged(part, parts), colors) for place, part in enumerate(ordered)
    )
    links = "\n".join(f'<a href="#s{place}">{escape(part.title)}</a>' for place, part in enumerate(ordered))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<ul>{"".join(f"<li>{escape(line)}</li>" for line in legend([]))}</ul>
{f"<nav>{links}</nav>" if len(ordered) > 1 else ""}
</header>
{body}<footer>{_sources(parts)}{_versions(parts)}</footer>
</body>
</html>
"""


def _averaged(part: Section, parts: Sequence[Section]) -> list[Section]:
    """The sections of the data sets that `part` averages."""
    if len(part.datasets) == 1:
        return []
    return [other for other in parts if other.protocol == part.protocol and len(other.datasets) == 1]


def _section(part: Section, place: int, single: Sequence[Section], colors: Palette) -> str:
    shown = "".join(_table(table, part) for table in tables(part))
    notes = "".join(f"<li>{escape(note)}</li>" for note in part.notes)
    drawn = "".join(_figure(plot) for plot in plots(part, single, colors))
    return (
        f'<section id="s{place}">\n<h2>{escape(part.title)}</h2>\n<p>{escape(part.subtitle)}</p>\n{shown}'
        + (f'<ul class="notes">{notes}</ul>\n' if notes else "")
        + f'<div class="plots">\n{drawn}</div>\n</section>\n'
    )


def _table(table: Table, part: Section) -> str:
    if not table.rows:
        return "<p>No finished run yet.</p>"
    published = {row.label for row in part.summaries if row.source}
    measured = [row.label for row in part.summaries if not row.source]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.headers)
    lines = []
    for cells in table.texts():
        kind = "published" if cells[0] in published else "best" if measured[:1] == [cells[0]] else ""
        lines.append(f'<tr class="{kind}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>\n"
    )


def _figure(plot: Plot) -> str:
    return (
        f"<figure>\n<h3>{escape(plot.title)}</h3>\n{plot.svg}<figcaption>{escape(plot.caption)}</figcaption>\n"
        "</figure>\n"
    )


def _sources(parts: Sequence[Section]) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in legend(parts)[len(legend([])) :])


def _versions(parts: Sequence[Section]) -> str:
    """What the runs were made with, as they say themselves."""
    runs = [run for part in parts for found in part.outcomes.values() for run in found]
    versions: dict[str, set[str]] = {}
    for results in (results for run in runs for results in run.parts.values()):
        for name, version in results.get("versions", {}).items():
            versions.setdefault(name, set()).add(str(version)[:12])
    made = "; ".join(f"{name} {', '.join(sorted(found))}" for name, found in versions.items())
    return f"<p>Made with {escape(made)}.</p>" if made else ""
