"""Tables as text: one renderer a format, each a pure function of the sections."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tabulate import tabulate

from .sections import Section, Spread, sources
from .tables import COSTS, Cell, Table, legend, tables

WRAP = 110
# What would break a Markdown table or be HTML in it.
MARKDOWN = str.maketrans({"|": r"\|", "<": "&lt;"})
TEX = str.maketrans(
    {c: rf"\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "…": r"\dots{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "–": "--", "−": "$-$", "Δ": r"$\Delta$", "±": r"$\pm$"}
)


def terminal(parts: Sequence[Section], width: int | None = None) -> str:
    """Plain text, notes below each table.

    width: of a terminal, in columns. Ranks are then bold and underlined by escapes, and where a table is too
    wide its last `COSTS` are left out, by name.
    """

    def mark(text: str, rank: int) -> str:
        return f"\x1b[{(1, 4)[rank - 1]}m{text}\x1b[0m" if rank and width else text

    def wrapped(line: str, bullet: str = "") -> str:
        at = min(width or WRAP, WRAP)
        return textwrap.fill(line, at, initial_indent=bullet, subsequent_indent=" " * len(bullet))

    blocks = []
    for section in parts:
        notes = list(section.notes)
        for table in tables(section):
            shown = table if width is None else _narrowed(table, width)
            blocks.append(f"{table.title}\n\n{tabulated(shown.headers, shown.texts(mark), 'simple')}")
            if left_out := table.headers[len(shown.headers) :]:
                notes.append(f"Too wide for this terminal, but on the page: {', '.join(left_out)}.")
        if notes:
            blocks.append("\n".join(wrapped(note, "  * ") for note in notes))
    lines = [*legend(parts), *sources(parts)]
    return "\n\n".join([*blocks, "\n".join(wrapped(line) for line in lines)]) + "\n"


def _narrowed(table: Table, width: int) -> Table:
    """The table without as many of its last columns, costs of methods all, as make it too wide."""
    while table.rows and table.headers[-1] in COSTS:
        if len(tabulated(table.headers, table.texts(), "simple").split("\n", 1)[0]) <= width:
            break
        table = replace(table, headers=table.headers[:-1], rows=[row[:-1] for row in table.rows])
    return table


def tabulated(headers: Sequence[str], texts: list[list[str]], style: str) -> str:
    """Text of a table: names left, numbers right, one below the other."""
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
    """GitHub's Markdown."""

    def mark(text: str, rank: int) -> str:
        return (text.translate(MARKDOWN), f"**{text}**", f"<ins>{text}</ins>")[rank]

    blocks = []
    for section in parts:
        for table in tables(section):
            headers = [header.translate(MARKDOWN) for header in table.headers]
            body = tabulated(headers, table.texts(mark), "github")
            blocks += [f"### {table.title.translate(MARKDOWN)}", body]
        if section.notes:
            blocks.append("\n".join(f"- {note}" for note in section.notes))
    return "\n\n".join([*blocks, *legend(parts), *sources(parts)]) + "\n"


def latex(parts: Sequence[Section]) -> str:
    r"""A tabular for each table, to be \input where booktabs and siunitx are loaded; the rest is comments."""
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
    lines += [" & ".join(f"{{{header.translate(TEX)}}}" for header in table.headers) + r" \\", r"\midrule"]
    for place, row in enumerate(table.rows):
        lines += [r"\midrule"] if table.grouped and place and row[0] else []
        lines.append(" & ".join(map(_tex, row)) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}"])


def _column_format(cells: Sequence[Cell]) -> str:
    """siunitx's S for a column of scores, with room for the longest number and deviation; r for others."""
    scores = [cell for cell in cells if isinstance(cell, Spread)]
    if not scores:
        return "r"
    whole = max(len(f"{score.mean:.0f}") for score in scores)
    tail = max(map(_tex_deviation, scores), key=len)
    return f"S[table-format={whole}.1" + (f", table-space-text-post={tail}]" if tail else "]")


def _tex(cell: Cell) -> str:
    """A score that S aligns; what is none, and what is underlined, in braces, which centre it."""
    if not isinstance(cell, Spread):
        (text,) = Table("", [""], [[cell]]).texts()[0]
        return f"{{{text.translate(TEX)}}}"
    mean, tail = f"{cell.mean:.1f}", _tex_deviation(cell)
    return (f"{mean} {tail}", rf"\bfseries {mean} {tail}", rf"{{\underline{{{mean}}}{tail}}}")[
        cell.rank
    ].strip()


def _tex_deviation(cell: Spread) -> str:
    return "" if cell.deviation is None else rf"{{\,\scriptsize$\pm${cell.deviation:.1f}}}"


def comma_separated(parts: Sequence[Section]) -> str:
    """CSV with one line a method and table, numbers in full; `NAME sd` is the deviation over seeds.

    A name that a spreadsheet would take for a formula gets an apostrophe in front.
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
            rows.append({name: no_formula(cell) for name, cell in row.items()})
    out = io.StringIO()
    names = list({name: None for row in rows for name in row})
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writerow({name: no_formula(name) for name in names})
    writer.writerows(rows)
    return out.getvalue()


def no_formula(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@")) else cell


FORMATS = {"terminal": terminal, "markdown": markdown, "latex": latex, "csv": comma_separated}
