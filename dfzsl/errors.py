"""The one error a user's mistake raises: a single line that says what is wrong and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST = 2000  # characters of a message
LISTED = 60  # known names in a message
# Control characters, line separators, marks that turn the direction of writing, halves of characters.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str) -> str:
    """`text` on one line with what is unprintable spelt out: words from a file must not steer a terminal."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], " ".join(text.split()))


class UserError(ValueError):
    """A mistake in the input. The command line prints its one line and exits with code 2."""

    def __init__(self, message: str) -> None:
        line = one_line(message)
        half = LONGEST // 2
        super().__init__(line if len(line) <= LONGEST else f"{line[:half]} [...] {line[-half:]}")


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that no registry holds: the known names, nearest first."""
    names = sorted(known)
    lowered = {n.lower(): n for n in names}
    near = [lowered[m] for m in difflib.get_close_matches(name.lower(), list(lowered), n=3, cutoff=0.5)]
    names = near + [n for n in names if n not in near]
    listed = ", ".join(names[:LISTED] + [f"and {len(names) - LISTED} more"] * (len(names) > LISTED))
    return UserError(f"unknown {kind} '{name}'; known: {listed}")
