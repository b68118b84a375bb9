"""Writes the table of docs/api.md from the docstrings of what `import dfzsl` gives: python docs/api.py"""

from __future__ import annotations

import inspect
from pathlib import Path

from tabulate import tabulate

import dfzsl

PAGE = Path(__file__).with_name("api.md")
MARKS = "<!-- api -->\n", "<!-- end of api -->"


def table() -> str:
    """Each name with its parameters, and the first sentence that it says of itself."""
    rows = []
    for name in dfzsl.__all__:
        thing = getattr(dfzsl, name)
        parameters = [
            f"{key}="
            if parameter.default is not parameter.empty
            else f"**{key}"
            if parameter.kind == 4
            else key
            for key, parameter in inspect.signature(thing).parameters.items()
        ]
        first = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
        rows.append(
            (
                f"`dfzsl.{name}`",
                f"`{', '.join(parameters)}`",
                first.partition(". Raises")[0].rstrip(".") + ".",
            )
        )
    return tabulate(rows, headers=("name", "takes", "what it is"), tablefmt="github") + "\n"


def page() -> str:
    """The page with the table as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    return f"{before}{MARKS[0]}{table()}{MARKS[1]}{rest.partition(MARKS[1])[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
