"""Write a self-contained HTML page with tables, plots and notes."""

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
from .formats import escape_formula
from .method_names import PROTOCOL_TITLES, describe_method
from .read_runs import TRANSFER
from .sections import Section, sources
from .tables import RANK_LEGEND, SPREAD_LEGEND, Table, columns, tables

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
SHORT_WORD, NO_BREAK = re.compile(r" (?=\S\S?( |$))|(?<= \S) |(?<= \S\S) "), "\N{NO-BREAK SPACE}"
MAX_OPEN_NOTES = 4  # a longer list of notes is folded


def write_page(path: Path, parts: Sequence[Section]) -> None:
    """Write the page atomically."""
    with atomic(path) as temporary:
        temporary.write_text(page(parts), encoding="utf-8")


def page(parts: Sequence[Section]) -> str:
    """Return the HTML of the page. Each average precedes its data sets, which are folded."""
    title = "Results: " + ", ".join(dict.fromkeys(PROTOCOL_TITLES[part.protocol] for part in parts))
    member_ids = {id(member) for part in parts for member in part.members}
    body = "".join(_section(part, place, id(part) in member_ids) for place, part in enumerate(parts))
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
<h2>Legend</h2>
<p>{escape(SPREAD_LEGEND)} {escape(RANK_LEGEND)}</p>
{_glossary(parts)}{_sources(parts)}{_versions(parts)}</footer>
</body>
</html>
"""


def _section(part: Section, place: int, folded: bool) -> str:
    table_html = "".join(_table(table) for table in tables(part))
    notes = "".join(f"<li>{escape(note)}</li>" for note in part.notes)
    note_html = f'<ul class="notes">{notes}</ul>\n' if notes else ""
    if len(part.notes) > MAX_OPEN_NOTES:
        note_html = f"<details><summary>{len(part.notes)} notes</summary>\n{note_html}</details>\n"
    plot_html = "".join(_figure(plot) for plot in plots(part, details=folded))
    body = f"<p>{escape(part.subtitle)}</p>\n{table_html}{note_html}{_classes(part)}"
    body += f'<div class="plots">\n{plot_html}</div>\n'
    title = f"<h2>{escape(part.title)}</h2>"
    if folded:  # browsers open a fold when a link leads inside it
        body = f'<details><summary>{title}</summary>\n<div id="s{place}">\n{body}</div>\n</details>\n'
        return f"<section>\n{body}</section>\n"
    return f'<section id="s{place}">\n{title}\n{body}</section>\n'


def _table(table: Table) -> str:
    """Return the HTML of a table. A wide table scrolls by itself, also by keyboard."""
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
    """Return a link that contains the accuracy on every class as CSV."""
    accuracies = {} if part.members or part.protocol in TRANSFER else by_class(part)
    if not accuracies:
        return ""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(map(escape_formula, ["class", *accuracies]))
    for name in dict.fromkeys(name for values in accuracies.values() for name in values):
        row = (values.get(name) for values in accuracies.values())
        rows.writerow([escape_formula(name), *("" if a is None else f"{a:.2f}" for a in row)])
    address = f"data:text/csv;charset=utf-8,{quote(out.getvalue())}"
    return f'<p><a download="classes.csv" href="{address}">Accuracy on every class as CSV</a></p>\n'


def _figure(plot: Plot) -> str:
    return (
        f"<figure>\n<h3>{escape(plot.title)}</h3>\n{plot.svg}<figcaption>{escape(plot.caption)}</figcaption>\n"
        "</figure>\n"
    )


def _glossary(parts: Sequence[Section]) -> str:
    """Return the meanings of the columns and methods on this page as HTML."""
    labels = dict.fromkeys(row.label for part in parts for row in part.summaries if not row.source)
    meanings = columns(parts) | {label: describe_method(label) for label in sorted(labels)}
    entries = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in meanings.items() if v)
    return f"<dl>{entries}</dl>\n" if entries else ""


def _sources(parts: Sequence[Section]) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in sources(parts))
    return f"<details><summary>Published results</summary><ul>{lines}</ul></details>\n" if lines else ""


def _versions(parts: Sequence[Section]) -> str:
    """Return the versions that are recorded in the results, as HTML."""
    runs = [run for part in parts for outcomes in part.outcomes.values() for run in outcomes]
    versions: dict[str, set[str]] = {}
    for results in (results for run in runs for results in run.parts.values()):
        for name, version in results.get("versions", {}).items():
            versions.setdefault(name, set()).add(str(version)[:12])
    text = "; ".join(f"{name} {', '.join(sorted(values))}" for name, values in versions.items())
    return f"<p>Made with {escape(text)}.</p>\n" if text else ""
