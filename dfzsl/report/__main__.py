"""Run `dfzsl report` as `python -m dfzsl.report`."""

from __future__ import annotations

from collections.abc import Sequence

from dfzsl.cli.experiments import report
from dfzsl.cli.main import invoke, run


def main(args: Sequence[str] | None = None) -> None:
    """Run the command within this process. Raises UserError for a user's mistake."""
    invoke(report, args)


if __name__ == "__main__":
    run(report)
