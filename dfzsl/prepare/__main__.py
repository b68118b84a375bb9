"""Run `dfzsl prepare` as `python -m dfzsl.prepare`."""

from __future__ import annotations

from collections.abc import Sequence

from dfzsl.cli.experiments import prepare
from dfzsl.cli.main import invoke, run


def main(args: Sequence[str] | None = None) -> None:
    """Run the command within this process. Raises UserError for a mistake of the user."""
    invoke(prepare, args)


if __name__ == "__main__":
    run(prepare)
