"""The one error a user's mistake raises: a single line that says what is wrong and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input. The command line prints its one line and exits with code 2."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that no registry holds: the known names, nearest first."""
    names = sorted(known)
    lowered = {n.lower(): n for n in names}
    near = [lowered[m] for m in difflib.get_close_matches(name.lower(), list(lowered), n=3, cutoff=0.5)]
    listed = ", ".join(near + [n for n in names if n not in near])
    return UserError(f"unknown {kind} '{name}'; known: {listed}")
