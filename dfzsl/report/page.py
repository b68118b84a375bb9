"""One HTML page that needs nothing but itself: tables, plots, notes, in light and dark."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from dfzsl.io.files import atomic

from .figures import Plot, by_class, plots
from .formats import no_formula
from .method_names import NAMES, meaning
from .read_runs import TRANSFER
from .sections import Section, sources
from .tables import RANKS, SPREADS, Table, columns, tables

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
SHORT_WORD, NO_BREAK = re.compile(r" (?=\S\S?( |$))|(?<= \S) |(?<= \S\S) "), "\N{NO-BREAK SPACE}"
FOLDED = 4  # more notes than these are folded


def write_page(path: Path, parts: Sequence[Section]) -> None:
    """Write the page, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(page(parts), encoding="utf-8")


def page(parts: Sequence[Section]) -> str:
    """The page's HTML: an average first, the data sets that it averages folded below it."""
    title = "Results: " + ", ".join(dict.fromkeys(NAMES[part.protocol] for part in parts))
    averaged = {id(member) for part in parts for member in part.members}
    body = "".join(_section(part, place, id(part) in averaged) for place, part in enumerate(parts))
    links = "".join(f'<li><a href="#s{i}">{escape(part.title)}</a></li>' for i, part in enumerate(parts))
    contents = f'<nav aria-label="Contents"><ul>{links}</ul></nav>' if len(parts) > 1 else ""
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
{contents}
</header>
<main>
{body}</main>
<footer>
<h2>Reading this page</h2>
<p>{escape(SPREADS)} {escape(RANKS)}</p>
{_glossary(parts)}{_sources(parts)}{_versions(parts)}</footer>
</body>
</html>
"""


def _section(part: Section, place: int, folded: bool) -> str:
    shown = "".join(_table(table) for table in tables(part))
    notes = "".join(f"<li>{escape(note)}</li>" for note in part.notes)
    listed = f'<ul class="notes">{notes}</ul>\n' if notes else ""
    if len(part.notes) > FOLDED:
        listed = f"<details><summary>{len(part.notes)} notes</summary>\n{listed}</details>\n"
    drawn = "".join(_figure(plot) for plot in plots(part, details=folded))
    body = f"<p>{escape(part.subtitle)}</p>\n{shown}{listed}{_classes(part)}"
    body += f'<div class="plots">\n{drawn}</div>\n'
    title = f"<h2>{escape(part.title)}</h2>"
    if folded:  # a link to what is inside a fold opens it
        body = f'<details><summary>{title}</summary>\n<div id="s{place}">\n{body}</div>\n</details>\n'
        return f"<section>\n{body}</section>\n"
    return f'<section id="s{place}">\n{title}\n{body}</section>\n'


def _table(table: Table) -> str:
    """A table that scrolls by itself where it is wide, by keyboard too."""
    if not table.rows:
        return "<p>No finished run yet.</p>\n"
    kinds = ["published" if _published(name) else "" for name in table.headers]
    head = "".join(
        f'<th scope="col" class="{kind}">{escape(SHORT_WORD.sub(NO_BREAK, name))}</th>'
        for kind, name in zip(kinds, table.headers, strict=True)
    )

    def mark(text: str, rank: int) -> str:
        return (escape(text), f"<b>{escape(text)}</b>", f"<u>{escape(text)}</u>")[rank]

    lines = []
    starts = [place for place, row in enumerate(table.rows) if row[0] != ""]
    spans = {a: b - a for a, b in itertools.pairwise([*starts, len(table.rows)])}
    for place, (first, *rest) in enumerate(table.texts(mark)):
        kind = "published" if _published(first) else "group" if spans.get(place, 1) > 1 else ""
        head_cell = f'<th scope="rowgroup" rowspan="{spans[place]}">{first}</th>' if place in spans else ""
        cells = "".join(f"<td>{cell}</td>" for cell in rest)
        lines.append(f'<tr class="{kind}">{head_cell}{cells}</tr>')
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.title)}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>\n"
    )


def _published(name: str) -> bool:
    return name.endswith("(published)")


def _classes(part: Section) -> str:
    """A link that holds the accuracy of every class as CSV."""
    found = {} if part.members or part.protocol in TRANSFER else by_class(part)
    if not found:
        return ""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(map(no_formula, ["class", *found]))
    for name in dict.fromkeys(name for values in found.values() for name in values):
        accuracies = (values.get(name) for values in found.values())
        rows.writerow([no_formula(name), *("" if a is None else f"{a:.2f}" for a in accuracies)])
    address = f"data:text/csv;charset=utf-8,{quote(out.getvalue())}"
    return f'<p><a download="classes.csv" href="{address}">Accuracy on every class as CSV</a></p>\n'


def _figure(plot: Plot) -> str:
    return (
        f"<figure>\n<h3>{escape(plot.title)}</h3>\n{plot.svg}<figcaption>{escape(plot.caption)}</figcaption>\n"
        "</figure>\n"
    )


def _glossary(parts: Sequence[Section]) -> str:
    """What the columns and the methods on this page are."""
    labels = dict.fromkeys(row.label for part in parts for row in part.summaries if not row.source)
    said = columns(parts) | {label: meaning(label) for label in sorted(labels)}
    entries = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in said.items() if v)
    return f"<dl>{entries}</dl>\n" if entries else ""


def _sources(parts: Sequence[Section]) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in sources(parts))
    return f"<details><summary>Published figures</summary><ul>{lines}</ul></details>\n" if lines else ""


def _versions(parts: Sequence[Section]) -> str:
    """What the runs were made with, as they say themselves."""
    runs = [run for part in parts for found in part.outcomes.values() for run in found]
    versions: dict[str, set[str]] = {}
    for results in (results for run in runs for results in run.parts.values()):
        for name, version in results.get("versions", {}).items():
            versions.setdefault(name, set()).add(str(version)[:12])
    made = "; ".join(f"{name} {', '.join(sorted(found))}" for name, found in versions.items())
    return f"<p>Made with {escape(made)}.</p>\n" if made else ""
