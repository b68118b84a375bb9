"""Render tables as text: plain, Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tabulate import tabulate

from .sections import Section, Spread, sources
from .tables import COST_COLUMNS, Cell, Table, legend, tables

WRAP_COLUMNS = 110
# Characters that would break a Markdown table or start an HTML tag in it.
MARKDOWN_ESCAPES = str.maketrans({"|": r"\|", "<": "&lt;"})
TEX_ESCAPES = str.maketrans(
    {c: rf"\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "…": r"\dots{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "–": "--", "−": "$-$", "Δ": r"$\Delta$", "±": r"$\pm$"}
)


def terminal(parts: Sequence[Section], width: int | None = None) -> str:
    """Return plain text, with notes below each table.

    Args:
        parts: sections to render.
        width: width of a terminal in characters. With it, ranks are bold and underlined by escape sequences,
            and a table that is too wide omits its last `COST_COLUMNS`; a note names them.
    """

    def mark(text: str, rank: int) -> str:
        return f"\x1b[{(1, 4)[rank - 1]}m{text}\x1b[0m" if rank and width else text

    def wrap(line: str, bullet: str = "") -> str:
        line_width = min(width or WRAP_COLUMNS, WRAP_COLUMNS)
        return textwrap.fill(line, line_width, initial_indent=bullet, subsequent_indent=" " * len(bullet))

    blocks = []
    for section in parts:
        notes = list(section.notes)
        for table in tables(section):
            narrow = table if width is None else _drop_cost_columns(table, width)
            blocks.append(f"{table.title}\n\n{render_table(narrow.headers, narrow.texts(mark), 'simple')}")
            if omitted := table.headers[len(narrow.headers) :]:
                notes.append(f"Columns omitted because the terminal is too narrow: {', '.join(omitted)}.")
        if notes:
            blocks.append("\n".join(wrap(note, "  * ") for note in notes))
    lines = [*legend(parts), *sources(parts)]
    return "\n\n".join([*blocks, "\n".join(wrap(line) for line in lines)]) + "\n"


def _drop_cost_columns(table: Table, width: int) -> Table:
    """Drop `COST_COLUMNS` from the right until the table fits `width` characters."""
    while table.rows and table.headers[-1] in COST_COLUMNS:
        if len(render_table(table.headers, table.texts(), "simple").split("\n", 1)[0]) <= width:
            break
        table = replace(table, headers=table.headers[:-1], rows=[row[:-1] for row in table.rows])
    return table


def render_table(headers: Sequence[str], texts: list[list[str]], style: str) -> str:
    """Return a table as text, with names left-aligned and numbers right-aligned."""
    if not texts:
        return "no finished run yet"
    return tabulate(
        texts,
        headers,
        tablefmt=style,
        disable_numparse=True,
        preserve_whitespace=True,
        colalign=["left"] + ["right"] * (len(headers) - 1),
    )


def markdown(parts: Sequence[Section]) -> str:
    """Return GitHub-flavored Markdown."""

    def mark(text: str, rank: int) -> str:
        return (text.translate(MARKDOWN_ESCAPES), f"**{text}**", f"<ins>{text}</ins>")[rank]

    blocks = []
    for section in parts:
        for table in tables(section):
            headers = [header.translate(MARKDOWN_ESCAPES) for header in table.headers]
            body = render_table(headers, table.texts(mark), "github")
            blocks += [f"### {table.title.translate(MARKDOWN_ESCAPES)}", body]
        if section.notes:
            blocks.append("\n".join(f"- {note}" for note in section.notes))
    return "\n\n".join([*blocks, *legend(parts), *sources(parts)]) + "\n"


def latex(parts: Sequence[Section]) -> str:
    r"""Return a LaTeX tabular for each table, for \input in a document with booktabs and siunitx.

    Titles, notes and the legend are comments.
    """
    blocks = [r"% \usepackage{booktabs, siunitx}"]
    for section in parts:
        blocks += [_tabular(table) if table.rows else f"% {table.title}: no run" for table in tables(section)]
        blocks += [f"% {note}" for note in section.notes]
    return "\n".join([*blocks, *(f"% {line}" for line in [*legend(parts), *sources(parts)])]) + "\n"


def _tabular(table: Table) -> str:
    columns = list(zip(*table.rows, strict=True))
    formats = " ".join(["l", *map(_column_format, columns[1:])])
    setup = r"{\sisetup{detect-weight, table-align-text-post=false}"
    lines = [f"% {table.title}", rf"{setup}\begin{{tabular}}{{{formats}}}", r"\toprule"]
    lines += [
        " & ".join(f"{{{header.translate(TEX_ESCAPES)}}}" for header in table.headers) + r" \\",
        r"\midrule",
    ]
    for place, row in enumerate(table.rows):
        lines += [r"\midrule"] if table.grouped and place and row[0] else []
        lines.append(" & ".join(map(_tex, row)) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}"])


def _column_format(cells: Sequence[Cell]) -> str:
    """Return siunitx's S format for a column of scores, wide enough for all of them, else r."""
    scores = [cell for cell in cells if isinstance(cell, Spread)]
    if not scores:
        return "r"
    whole = max(len(f"{score.mean:.0f}") for score in scores)
    tail = max(map(_tex_deviation, scores), key=len)
    return f"S[table-format={whole}.1" + (f", table-space-text-post={tail}]" if tail else "]")


def _tex(cell: Cell) -> str:
    """Return a cell for an S column. Braces center what S cannot align: texts and underlined numbers."""
    if not isinstance(cell, Spread):
        (text,) = Table("", [""], [[cell]]).texts()[0]
        return f"{{{text.translate(TEX_ESCAPES)}}}"
    mean, tail = f"{cell.mean:.1f}", _tex_deviation(cell)
    return (f"{mean} {tail}", rf"\bfseries {mean} {tail}", rf"{{\underline{{{mean}}}{tail}}}")[
        cell.rank
    ].strip()


def _tex_deviation(cell: Spread) -> str:
    return "" if cell.deviation is None else rf"{{\,\scriptsize$\pm${cell.deviation:.1f}}}"


def comma_separated(parts: Sequence[Section]) -> str:
    """Return CSV with one line per method and section, and numbers with four decimals.

    Column `NAME sd` is the standard deviation over seeds.
    """
    rows: list[dict[str, Any]] = []
    for section in parts:
        for summary in section.summaries:
            row: dict[str, Any] = {"protocol": section.protocol, "data set": section.title}
            row |= {"method": summary.label, "shots": summary.shots}
            spreads = summary.scores | summary.targets
            spreads |= {"mean of H": summary.mean_h} if summary.mean_h else {}
            for name, spread in spreads.items():
                row |= {name: round(spread.mean, 4)}
                row |= {} if spread.deviation is None else {f"{name} sd": round(spread.deviation, 4)}
            row["H"] = None if summary.h is None else round(summary.h, 4)
            row |= {"seeds": " ".join(map(str, summary.seeds)), "seconds": summary.seconds}
            row |= {"trained": summary.trained, "images": summary.images, "queries": summary.queries}
            row |= {"published in": summary.source}
            rows.append({name: escape_formula(cell) for name, cell in row.items()})
    out = io.StringIO()
    names = list({name: None for row in rows for name in row})
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writerow({name: escape_formula(name) for name in names})
    writer.writerows(rows)
    return out.getvalue()


def escape_formula(cell: Any) -> Any:
    """Prefix a text that a spreadsheet would evaluate as a formula with an apostrophe."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@")) else cell


FORMATS = {"terminal": terminal, "markdown": markdown, "latex": latex, "csv": comma_separated}
