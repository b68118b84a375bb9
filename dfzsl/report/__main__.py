"""Run `dfzsl report` as `python -m dfzsl.report`."""

from __future__ import annotations

from collections.abc import Sequence

from dfzsl.cli.experiments import report
from dfzsl.cli.main import invoke, run


def main(args: Sequence[str] | None = None) -> None:
    """Run the command in this process.

    Raises:
        UserError: the arguments or the results are wrong.
    """
    invoke(report, args)


if __name__ == "__main__":
    run(report)
